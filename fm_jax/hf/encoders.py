"""Families of encoders of text: BERT and those after it."""

from fm_jax.hf.tables import Family, Row, Windows, sentence_encoder, weight_and_bias

_OURS = "transformer.layers."


def _encoder(prefix, layer, *, attention, attention_out, attention_norm, mlp, mlp_norm, head, types=True):
    """Returns the rows of an encoder as BERT's: norms behind the sublayers, a projection and a norm before the logits.

    layer: of the keys, {} the number; the others are keys below it: of queries, keys and values, of their output and
    its norm, of the mlp's two projections and its norm. head: keys of the projection, the norm, the biases, the table.
    """
    at = lambda key: layer + key
    rows = [Row(prefix + "embeddings.word_embeddings.weight", "V D", "embed.tokens", "VD"),
            Row(prefix + "embeddings.position_embeddings.weight", "P D", "embed.positions", "PD")]
    if types:
        rows.append(Row(prefix + "embeddings.token_type_embeddings.weight", "Y D", "embed.types", "YD"))
    rows += weight_and_bias(prefix + "embeddings.LayerNorm", "D", "embed.norm.scale", "D")
    for one, q, key in zip("qkv", ("KGH", "KH", "KH"), attention):
        rows += weight_and_bias(at(key), f"{q} D", f"{_OURS}attention.w{one}", f"D{q}",
                                 (q, f"{_OURS}attention.{one}_bias", q))
    rows += [*weight_and_bias(at(attention_out), "D KGH", _OURS + "attention.wo", "KGHD",
                               ("D", _OURS + "attention.o_bias", "D")),
             *weight_and_bias(at(attention_norm), "D", _OURS + "attention_norm.scale", "D"),
             *weight_and_bias(at(mlp[0]), "F D", _OURS + "mlp.w_up", "DF", ("F", _OURS + "mlp.up_bias", "F")),
             *weight_and_bias(at(mlp[1]), "D F", _OURS + "mlp.w_down", "FD", ("D", _OURS + "mlp.down_bias", "D")),
             *weight_and_bias(at(mlp_norm), "D", _OURS + "mlp_norm.scale", "D")]
    transform, norm, bias, table = head
    return (*rows, *weight_and_bias(transform, "U D", "embed.transform", "DU", ("U", "embed.transform_bias", "U")),
            *weight_and_bias(norm, "D", "embed.transform_norm.scale", "D"),
            Row(bias, "V", "embed.head_bias", "V"), Row(table, "V D", "embed.head", "VD"))


_BERT_FIXED = dict(causal=False, norm="layernorm", norm_bias=True, norm_position="post", final_norm=False,
                   gated_mlp=False, qkv_bias=True, attention_out_bias=True, mlp_bias=True, position="learned",
                   embed_norm=True, head_transform=True, tie_embeddings=True)
_BERT_LAYER = dict(attention=[f"attention.self.{one}" for one in ("query", "key", "value")],
                   attention_out="attention.output.dense", attention_norm="attention.output.LayerNorm",
                   mlp=("intermediate.dense", "output.dense"), mlp_norm="output.LayerNorm")
_BERT_SETTINGS = (
    ("vocab_size", "vocab_size", 30522), ("hidden_size", "embed_dim", 768), ("num_hidden_layers", "num_layers", 12),
    ("num_attention_heads", "num_heads", 12), ("intermediate_size", "mlp_dim", 3072),
    ("hidden_act", "activation", "gelu"), ("type_vocab_size", "num_token_types", 2),
    ("layer_norm_eps", "norm_eps", 1e-12))
# Untied, transformers takes another bias of the logits too.
_BERT = dict(only={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
                   "tie_word_embeddings": True},
             harmless=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
             objective="fm_jax.objectives.masked_lm.MaskedLM")

_MODERN = "model.layers.{}."
_MODERN_ROWS = (
    Row("model.embeddings.tok_embeddings.weight", "V D", "embed.tokens", "VD"),
    Row("model.embeddings.norm.weight", "D", "embed.norm.scale", "D"),
    Row(_MODERN + "attn_norm.weight", "D", _OURS + "attention_norm.scale", "D"),   # but of the first layer
    Row(_MODERN + "attn.Wqkv.weight", "+KGH D", _OURS + "attention.wq", "DKGH"),
    Row(_MODERN + "attn.Wqkv.weight", "+KH D", _OURS + "attention.wk", "DKH"),
    Row(_MODERN + "attn.Wqkv.weight", "+KH D", _OURS + "attention.wv", "DKH"),
    Row(_MODERN + "attn.Wo.weight", "D KGH", _OURS + "attention.wo", "KGHD"),
    Row(_MODERN + "mlp_norm.weight", "D", _OURS + "mlp_norm.scale", "D"),
    Row(_MODERN + "mlp.Wi.weight", "+F D", _OURS + "mlp.w_gate", "DF"),
    Row(_MODERN + "mlp.Wi.weight", "+F D", _OURS + "mlp.w_up", "DF"),
    Row(_MODERN + "mlp.Wo.weight", "D F", _OURS + "mlp.w_down", "FD"),
    Row("model.final_norm.weight", "D", "transformer.final_norm.scale", "D"),
    Row("head.dense.weight", "U D", "embed.transform", "DU"),
    Row("head.norm.weight", "D", "embed.transform_norm.scale", "D"),
    Row("decoder.bias", "V", "embed.head_bias", "V"),
    Row("decoder.weight", "V D", "embed.head", "VD"),
)

FAMILIES = {
    "bert": Family(
        "BertForMaskedLM", "bert.",
        _encoder("bert.", "bert.encoder.layer.{}.", **_BERT_LAYER, head=(
            "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
            "cls.predictions.decoder.weight")),
        _BERT_FIXED, (*_BERT_SETTINGS, ("max_position_embeddings", "max_seq_len", 512)), **_BERT,
        # A bias stored twice; the pooler and the next sentence's head, which are no part of the masked language model.
        buffers=r"cls\.predictions\.decoder\.bias|bert\.embeddings\.position_ids|bert\.pooler\..*|"
                r"cls\.seq_relationship\..*"),
    "roberta": Family(
        "RobertaForMaskedLM", "roberta.",
        _encoder("roberta.", "roberta.encoder.layer.{}.", **_BERT_LAYER, head=(
            "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight")),
        _BERT_FIXED | dict(position_offset=2),   # behind the padding token's, which has id 1
        (*_BERT_SETTINGS,
         ("max_position_embeddings", "max_seq_len", 512, lambda v: v - 2, lambda a: a.max_seq_len + 2)), **_BERT,
        buffers=r"lm_head\.decoder\.bias|roberta\.embeddings\.position_ids|roberta\.pooler\..*"),
    "distilbert": Family(
        "DistilBertForMaskedLM", "distilbert.",
        _encoder("distilbert.", "distilbert.transformer.layer.{}.", types=False,
                 attention=[f"attention.{one}_lin" for one in "qkv"], attention_out="attention.out_lin",
                 attention_norm="sa_layer_norm", mlp=("ffn.lin1", "ffn.lin2"), mlp_norm="output_layer_norm",
                 head=("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight")),
        _BERT_FIXED | dict(norm_eps=1e-12),
        (("vocab_size", "vocab_size", 30522), ("dim", "embed_dim", 768), ("n_layers", "num_layers", 6),
         ("n_heads", "num_heads", 12), ("hidden_dim", "mlp_dim", 3072), ("activation", "activation", "gelu"),
         ("max_position_embeddings", "max_seq_len", 512)),
        only={"sinusoidal_pos_embds": False, "tie_weights_": True, "tie_word_embeddings": True},
        harmless=("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"),
        objective="fm_jax.objectives.masked_lm.MaskedLM", buffers=r"distilbert\.embeddings\.position_ids"),
    "mpnet": Family(
        "MPNetForMaskedLM", "mpnet.",
        (*_encoder("mpnet.", "mpnet.encoder.layer.{}.", **_BERT_LAYER | dict(
            attention=[f"attention.attn.{one}" for one in "qkv"], attention_out="attention.attn.o",
            attention_norm="attention.LayerNorm"), types=False,
            head=("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight")),
         Row("mpnet.encoder.relative_attention_bias.weight", "B KG", "transformer.relative_bias", "BKG")),
        _BERT_FIXED | dict(position="learned_relative", position_offset=2, relative_buckets=32,
                           relative_max_distance=128),
        (*(s for s in _BERT_SETTINGS if s[0] != "type_vocab_size"),
         ("max_position_embeddings", "max_seq_len", 512, lambda v: v - 2, lambda a: a.max_seq_len + 2)),
        **_BERT | dict(only=_BERT["only"] | {"relative_attention_num_buckets": 32}), sizes=lambda model: {"B": 32},
        buffers=r"lm_head\.decoder\.bias|mpnet\.embeddings\.position_ids|mpnet\.pooler\..*"),
    "modernbert": Family(
        "ModernBertForMaskedLM", "model.", _MODERN_ROWS,
        dict(causal=False, norm="layernorm", position="rope", gated_mlp=True, activation="gelu", embed_norm=True,
             first_norm=False, head_transform=True, tie_embeddings=True),
        (("vocab_size", "vocab_size", 50368), ("hidden_size", "embed_dim", 768), ("intermediate_size", "mlp_dim", 1152),
         ("num_hidden_layers", "num_layers", 22), ("num_attention_heads", "num_heads", 12),
         ("max_position_embeddings", "max_seq_len", 8192), ("norm_eps", "norm_eps", 1e-5)),
        only={"hidden_activation": "gelu", "classifier_activation": "gelu", "norm_bias": False, "attention_bias": False,
              "mlp_bias": False, "classifier_bias": False, "decoder_bias": True, "tie_word_embeddings": True},
        harmless=("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout", "classifier_pooling",
                  "cls_token_id", "sep_token_id", "initializer_cutoff_factor", "deterministic_flash_attn",
                  "reference_compile", "repad_logits_with_grad", "sparse_prediction", "sparse_pred_ignore_index",
                  "position_embedding_type", "layer_norm_eps"),   # what is read is norm_eps
        rope_theta=("global_rope_theta", 160000.0), rope_local_theta="local_rope_theta",
        # A window of 128 tokens is the 64 before and the 64 behind.
        windows=Windows(lambda s, i: i % (s.get("global_attn_every_n_layers") or 3) > 0, default=128, by_layer=True,
                        keys=("global_attn_every_n_layers",), key="local_attention",
                        ways=(lambda v: v // 2 + 1, lambda w: 2 * (w - 1))),
        # transformers 4 has no layer_types.
        write=lambda model: {"global_attn_every_n_layers": len(model.stacks["model"].layer_pattern)},
        objective="fm_jax.objectives.masked_lm.MaskedLM"),
}

_HEADS = r"|cls\..*|lm_head\..*|vocab_\w+\..*|head\..*|decoder\..*"   # in files of a full model
_POOLER = r"pooler\..*|embeddings\.position_ids" + _HEADS   # which sentence-transformers has no use for
FAMILIES |= {
    "BertModel": sentence_encoder("bert", FAMILIES["bert"], "BertModel", _POOLER),
    "RobertaModel": sentence_encoder("roberta", FAMILIES["roberta"], "RobertaModel", _POOLER),
    "MPNetModel": sentence_encoder("mpnet", FAMILIES["mpnet"], "MPNetModel", _POOLER),
    "ModernBertModel": sentence_encoder("modernbert", FAMILIES["modernbert"], "ModernBertModel", _POOLER),
    "DistilBertModel": sentence_encoder("distilbert", FAMILIES["distilbert"], "DistilBertModel", _POOLER),
}

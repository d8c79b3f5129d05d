"""Families of an encoder and a decoder: T5."""

from fm_jax.errors import choose
from fm_jax.hf.tables import Family, Row


def _t5_rows(gated: bool) -> tuple[Row, ...]:
    rows = [Row("shared.weight", "V D", "embed.tokens", "VD"), Row("lm_head.weight", "V D", "embed.head", "VD")]
    for side, stack in (("encoder", "encoder"), ("decoder", "model")):
        block, ours = f"{side}.block." + "{}.layer.", f"{side}.layers."
        sublayers = [("0.SelfAttention", "attention")] + [("1.EncDecAttention", "cross")] * (side == "decoder")
        for number, (key, name) in enumerate(sublayers):
            for one, axes in (("q", "KGH"), ("k", "KH"), ("v", "KH")):
                rows.append(Row(f"{block}{key}.{one}.weight", f"{axes} D", f"{ours}{name}.w{one}", f"D{axes}", stack))
            rows += [Row(f"{block}{key}.o.weight", "D KGH", f"{ours}{name}.wo", "KGHD", stack),
                     Row(f"{block}{number}.layer_norm.weight", "D", f"{ours}{name}_norm.scale", "D", stack)]
        last = len(sublayers)
        mlp = {"wi_0": "w_gate", "wi_1": "w_up"} if gated else {"wi": "w_up"}
        rows += [Row(f"{block}{last}.DenseReluDense.{key}.weight", "F D", f"{ours}mlp.{name}", "DF", stack)
                 for key, name in mlp.items()]
        rows += [Row(f"{block}{last}.DenseReluDense.wo.weight", "D F", f"{ours}mlp.w_down", "FD", stack),
                 Row(f"{block}{last}.layer_norm.weight", "D", f"{ours}mlp_norm.scale", "D", stack),
                 # The first layer's is the one of all.
                 Row(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "B KG",
                     f"{side}.relative_bias", "BKG", stack),
                 Row(f"{side}.final_layer_norm.weight", "D", f"{side}.final_norm.scale", "D", stack)]
    return tuple(rows)


# Its gate's gelu is the approximation, whatever the name says; the plain mlp's is not.
_GATES = {"gated-gelu": "gelu_tanh", "gated-gelu_new": "gelu_tanh", "gated-silu": "silu", "gated-relu": "relu"}
_PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def _t5(gated: bool) -> Family:
    shared = (("vocab_size", "vocab_size", 32128), ("d_model", "embed_dim", 512), ("d_kv", "head_dim", 64),
              ("d_ff", "mlp_dim", 2048), ("num_heads", "num_heads", 8), ("n_positions", "max_seq_len", 512),
              ("relative_attention_num_buckets", "relative_buckets", 32),
              ("relative_attention_max_distance", "relative_max_distance", 128),
              ("layer_norm_epsilon", "norm_eps", 1e-6))
    fixed = dict(position="relative", attention_scale=1.0, gated_mlp=gated)
    activations = _GATES if gated else _PLAIN

    def read(settings, place):
        proj = choose(settings.get("feed_forward_proj", "relu"), activations, f"{place}: feed_forward_proj")
        # A tied head is scaled, one apart is not: transformers 5 writes the scale, and a tie always; 4 the tie alone.
        scaled = settings.get("scale_decoder_outputs", settings.get("tie_word_embeddings", True))
        both = {"activation": activations[proj], "tie_embeddings": scaled,
                "logit_scale": settings.get("d_model", 512) ** -0.5 if scaled else 1.0}
        layers = settings.get("num_layers", 6)
        return {"num_layers": settings.get("num_decoder_layers") or layers, "encoder.num_layers": layers,
                **both, **{f"encoder.{name}": value for name, value in both.items()}}

    def write(model):
        arch, encoder = model.stacks["model"], model.stacks["encoder"]
        proj = {ours: theirs for theirs, ours in reversed(activations.items())}
        return {"num_layers": encoder.num_layers, "num_decoder_layers": arch.num_layers, "is_encoder_decoder": True,
                "feed_forward_proj": proj.get(arch.activation, arch.activation),
                "tie_word_embeddings": arch.tie_embeddings, "scale_decoder_outputs": arch.logit_scale != 1}

    return Family(
        "T5ForConditionalGeneration", "", _t5_rows(gated),
        fixed | {f"encoder.{name}": value for name, value in fixed.items()} | {"cross_attention": True,
                                                                              "encoder.causal": False},
        (*shared, *((key, f"encoder.{field}", default) for key, field, default in shared),
         ("decoder_start_token_id", "objective_args.start_id", 0)),
        model_type="t5", when=lambda settings: str(settings.get("feed_forward_proj")).startswith("gated") == gated,
        only={"is_encoder_decoder": True, "is_decoder": False},
        harmless=("dropout_rate", "classifier_dropout", "initializer_factor", "dense_act_fn", "is_gated_act"),
        copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
        # Of some published files: cross attention has no positions.
        buffers=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        objective="fm_jax.objectives.seq2seq.Seq2Seq", read=read, write=write,
        keys=("feed_forward_proj", "num_layers", "num_decoder_layers", "scale_decoder_outputs", "tie_word_embeddings"),
        sizes=lambda model: {"B": model.stacks["model"].relative_buckets})


FAMILIES = {"t5": _t5(False), "t5_gated": _t5(True)}

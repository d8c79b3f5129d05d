"""Families of an encoder and a decoder: T5 and Whisper."""

from fm_jax.errors import choose
from fm_jax.hf.tables import Family, Row, weight_and_bias


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


def _whisper_rows() -> tuple[Row, ...]:
    stem = "model.encoder."
    rows = [*weight_and_bias(stem + "conv1", "D C W", "stem.conv1", "WCD", ("D", "stem.conv1_bias", "D")),
            *weight_and_bias(stem + "conv2", "D U W", "stem.conv2", "WUD", ("D", "stem.conv2_bias", "D")),
            Row(stem + "embed_positions.weight", "P D", "stem.positions", "PD", "encoder"),
            Row("model.decoder.embed_tokens.weight", "V D", "embed.tokens", "VD"),
            Row("model.decoder.embed_positions.weight", "P D", "embed.positions", "PD"),
            Row("proj_out.weight", "V D", "embed.head", "VD")]
    for side, stack in (("encoder", "encoder"), ("decoder", "model")):
        layer, ours = f"model.{side}.layers." + "{}.", f"{side}.layers."
        both = lambda *row: [r._replace(stack=stack) for r in weight_and_bias(*row)]
        for key, name in (("self_attn", "attention"), ("encoder_attn", "cross"))[: 1 + (side == "decoder")]:
            for one, axes in (("q", "KGH"), ("v", "KH")):
                rows += both(f"{layer}{key}.{one}_proj", f"{axes} D", f"{ours}{name}.w{one}", f"D{axes}",
                             (axes, f"{ours}{name}.{one}_bias", axes))
            rows.append(Row(f"{layer}{key}.k_proj.weight", "KH D", f"{ours}{name}.wk", "DKH", stack))
            rows += both(f"{layer}{key}.out_proj", "D KGH", f"{ours}{name}.wo", "KGHD",
                         ("D", f"{ours}{name}.o_bias", "D"))
            rows += both(f"{layer}{key}_layer_norm", "D", f"{ours}{name}_norm.scale", "D")
        rows += both(layer + "fc1", "F D", ours + "mlp.w_up", "DF", ("F", ours + "mlp.up_bias", "F"))
        rows += both(layer + "fc2", "D F", ours + "mlp.w_down", "FD", ("D", ours + "mlp.down_bias", "D"))
        rows += both(layer + "final_layer_norm", "D", ours + "mlp_norm.scale", "D")
        rows += both(f"model.{side}.layer_norm", "D", f"{side}.final_norm.scale", "D")
    return tuple(rows)


_WHISPER_FIXED = dict(norm="layernorm", norm_bias=True, norm_eps=1e-5, gated_mlp=False, qkv_bias=True, key_bias=False,
                      attention_out_bias=True, mlp_bias=True)
_SUPPRESSED = {"suppress_tokens": "objective_args.suppress_ids",
               "begin_suppress_tokens": "objective_args.begin_suppress_ids"}
_GENERATION = "generation_config.json/"


def _whisper_read(settings, place):
    """Returns what is never written: of generation_config.json, or of config.json, as older folders have it."""
    either = lambda key: settings.get(_GENERATION + key, settings.get(key)) or ()
    return {field: tuple(either(key)) for key, field in _SUPPRESSED.items()}


def _whisper_write(model):
    ids = {key: list(model.args[field.rpartition(".")[2]]) for key, field in _SUPPRESSED.items()}
    return {"is_encoder_decoder": True, **{_GENERATION + key: value for key, value in ids.items() if value}}


_WHISPER = Family(
    "WhisperForConditionalGeneration", "model.", _whisper_rows(),
    _WHISPER_FIXED | {f"encoder.{name}": value for name, value in _WHISPER_FIXED.items()} | {
        "position": "learned", "cross_attention": True, "encoder.position": "none", "encoder.causal": False,
        **{field: () for field in _SUPPRESSED.values()}},
    (("vocab_size", "vocab_size", 51865), ("vocab_size", "encoder.vocab_size", 51865),
     ("d_model", "embed_dim", 384), ("d_model", "encoder.embed_dim", 384),
     ("decoder_layers", "num_layers", 4), ("encoder_layers", "encoder.num_layers", 4),
     ("decoder_attention_heads", "num_heads", 6), ("encoder_attention_heads", "encoder.num_heads", 6),
     ("decoder_ffn_dim", "mlp_dim", 1536), ("encoder_ffn_dim", "encoder.mlp_dim", 1536),
     ("max_target_positions", "max_seq_len", 448), ("max_source_positions", "encoder.max_seq_len", 1500),
     ("activation_function", "activation", "gelu"), ("activation_function", "encoder.activation", "gelu"),
     ("tie_word_embeddings", "tie_embeddings", True), ("tie_word_embeddings", "encoder.tie_embeddings", True),
     ("num_mel_bins", "objective_args.num_mels", 80)),
    only={"is_encoder_decoder": True, "scale_embedding": False, "is_decoder": False},
    # Of training, of other heads, and of how transformers generates.
    harmless=("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std",
              "num_hidden_layers", "decoder_start_token_id", "use_weighted_layer_sum", "classifier_proj_size",
              "apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks", "mask_feature_prob",
              "mask_feature_length", "mask_feature_min_masks", "median_filter_width", "max_length", "forced_decoder_ids",
              *(_GENERATION + key for key in (
                  "alignment_heads", "decoder_start_token_id", "forced_decoder_ids", "is_multilingual", "lang_to_id",
                  "language", "max_initial_timestamp_index", "max_length", "no_timestamps_token_id",
                  "prev_sot_token_id", "return_timestamps", "task", "task_to_id", "_from_model_config"))),
    objective="fm_jax.objectives.speech.SpeechRecognition", files=("generation_config.json",),
    read=_whisper_read, write=_whisper_write,
    keys=(*_SUPPRESSED, *(_GENERATION + key for key in _SUPPRESSED)),
    sizes=lambda model: {"C": model.args["num_mels"], "W": 3})

FAMILIES = {"t5": _t5(False), "t5_gated": _t5(True), "whisper": _WHISPER}

"""Families of decoders: GPT-2, GPT-NeoX, and those with Llama's names."""

from fm_jax.hf.tables import Family, Row, Windows, sentence_encoder, weight_and_bias

_LLAMA_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_SANDWICH_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "attention_out_norm",
                   "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_out_norm"}
_OUTPUT_NORMS = {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
_LAYER, _OURS = "model.layers.{}.", "transformer.layers."


def _gated_mlp() -> list[Row]:
    rows = []
    for one, axes, letters in (("gate", "F D", "DF"), ("up", "F D", "DF"), ("down", "D F", "FD")):
        rows.append(Row(f"{_LAYER}mlp.{one}_proj.weight", axes, f"{_OURS}mlp.w_{one}", letters))
        rows.append(Row(f"{_LAYER}mlp.{one}_proj.bias", axes[0], f"{_OURS}mlp.{one}_bias", axes[0]))
    return rows


def _experts(router: str, names: dict[str, str]) -> list[Row]:
    """Returns the rows of a mixture: keys below the layer's of the router, and of each expert's matrix."""
    rows = [Row(f"{_LAYER}{router}.weight", "E D", _OURS + "moe.router", "DE")]
    for ours, key in names.items():
        axes, letters = ("D M", "MD") if ours == "w_down" else ("M D", "DM")
        rows.append(Row(f"{_LAYER}{key}.weight", axes, f"{_OURS}moe.{ours}", letters))
    return rows


def _llama(*, norms=_LLAMA_NORMS, qk_norm="", merged=False, mlp=None) -> tuple[Row, ...]:
    """Returns the rows of a decoder with Llama's names.

    qk_norm: letters of its scales, "HH" or "QR". merged: queries, keys and values are one tensor, so gate and up.
    mlp: other rows in place of the mlp's.
    """
    rows = [Row("model.embed_tokens.weight", "V D", "embed.tokens", "VD")]
    for one, q in (("q", "KGH"), ("k", "KH"), ("v", "KH")):
        key, first = (f"{_LAYER}self_attn.qkv_proj", "+") if merged else (f"{_LAYER}self_attn.{one}_proj", "")
        rows.append(Row(f"{key}.weight", f"{first}{q} D", f"{_OURS}attention.w{one}", f"D{q}"))
        rows.append(Row(f"{key}.bias", first + q, f"{_OURS}attention.{one}_bias", q))
    rows += [Row(_LAYER + "self_attn.o_proj.weight", "D KGH", _OURS + "attention.wo", "KGHD"),
             Row(_LAYER + "self_attn.o_proj.bias", "D", _OURS + "attention.o_bias", "D")]
    rows += [Row(f"{_LAYER}self_attn.{one}_norm.weight", letter, f"{_OURS}attention.{one}_norm.scale", letter)
             for one, letter in zip("qk", qk_norm)]
    rows += [Row(f"{_LAYER}{key}.weight", "D", f"{_OURS}{name}.scale", "D") for key, name in norms.items()]
    if merged:
        rows += [Row(_LAYER + "mlp.gate_up_proj.weight", "+F D", f"{_OURS}mlp.w_{one}", "DF") for one in ("gate", "up")]
        rows.append(Row(_LAYER + "mlp.down_proj.weight", "D F", _OURS + "mlp.w_down", "FD"))
    else:
        rows += mlp or _gated_mlp()
    rows += [Row("model.norm.weight", "D", "transformer.final_norm.scale", "D"),
             Row("lm_head.weight", "V D", "embed.head", "VD")]
    return tuple(rows)


_NEOX, _QKV = "gpt_neox.layers.{}.", "gpt_neox.layers.{}.attention.query_key_value"
_NEOX_ROWS = (
    Row("gpt_neox.embed_in.weight", "V D", "embed.tokens", "VD"),
    *weight_and_bias(_NEOX + "input_layernorm", "D", _OURS + "attention_norm.scale", "D"),
    *weight_and_bias(_NEOX + "post_attention_layernorm", "D", _OURS + "mlp_norm.scale", "D"),
    Row(_QKV + ".weight", "K:+GH D", _OURS + "attention.wq", "DKGH"),   # K is all heads
    Row(_QKV + ".weight", "K:+H D", _OURS + "attention.wk", "DKH"),
    Row(_QKV + ".weight", "K:+H D", _OURS + "attention.wv", "DKH"),
    Row(_QKV + ".bias", "K:+GH", _OURS + "attention.q_bias", "KGH"),
    Row(_QKV + ".bias", "K:+H", _OURS + "attention.k_bias", "KH"),
    Row(_QKV + ".bias", "K:+H", _OURS + "attention.v_bias", "KH"),
    *weight_and_bias(_NEOX + "attention.dense", "D KGH", _OURS + "attention.wo", "KGHD",
                      ("D", _OURS + "attention.o_bias", "D")),
    *weight_and_bias(_NEOX + "mlp.dense_h_to_4h", "F D", _OURS + "mlp.w_up", "DF", ("F", _OURS + "mlp.up_bias", "F")),
    *weight_and_bias(_NEOX + "mlp.dense_4h_to_h", "D F", _OURS + "mlp.w_down", "FD",
                      ("D", _OURS + "mlp.down_bias", "D")),
    *weight_and_bias("gpt_neox.final_layer_norm", "D", "transformer.final_norm.scale", "D"),
    Row("embed_out.weight", "V D", "embed.head", "VD"),
)


_GPT2_ROWS = (
    Row("transformer.wte.weight", "V D", "embed.tokens", "VD"),
    Row("transformer.wpe.weight", "P D", "embed.positions", "PD"),
    Row("transformer.h.{}.ln_1.weight", "D", "transformer.layers.attention_norm.scale", "D"),
    Row("transformer.h.{}.ln_1.bias", "D", "transformer.layers.attention_norm.bias", "D"),
    Row("transformer.h.{}.attn.c_attn.weight", "D +KGH", "transformer.layers.attention.wq", "DKGH"),
    Row("transformer.h.{}.attn.c_attn.weight", "D +KH", "transformer.layers.attention.wk", "DKH"),
    Row("transformer.h.{}.attn.c_attn.weight", "D +KH", "transformer.layers.attention.wv", "DKH"),
    Row("transformer.h.{}.attn.c_attn.bias", "+KGH", "transformer.layers.attention.q_bias", "KGH"),
    Row("transformer.h.{}.attn.c_attn.bias", "+KH", "transformer.layers.attention.k_bias", "KH"),
    Row("transformer.h.{}.attn.c_attn.bias", "+KH", "transformer.layers.attention.v_bias", "KH"),
    Row("transformer.h.{}.attn.c_proj.weight", "KGH D", "transformer.layers.attention.wo", "KGHD"),
    Row("transformer.h.{}.attn.c_proj.bias", "D", "transformer.layers.attention.o_bias", "D"),
    Row("transformer.h.{}.ln_2.weight", "D", "transformer.layers.mlp_norm.scale", "D"),
    Row("transformer.h.{}.ln_2.bias", "D", "transformer.layers.mlp_norm.bias", "D"),
    Row("transformer.h.{}.mlp.c_fc.weight", "D F", "transformer.layers.mlp.w_up", "DF"),
    Row("transformer.h.{}.mlp.c_fc.bias", "F", "transformer.layers.mlp.up_bias", "F"),
    Row("transformer.h.{}.mlp.c_proj.weight", "F D", "transformer.layers.mlp.w_down", "FD"),
    Row("transformer.h.{}.mlp.c_proj.bias", "D", "transformer.layers.mlp.down_bias", "D"),
    Row("transformer.ln_f.weight", "D", "transformer.final_norm.scale", "D"),
    Row("transformer.ln_f.bias", "D", "transformer.final_norm.bias", "D"),
    Row("lm_head.weight", "V D", "embed.head", "VD"),
)


_LLAMA_SETTINGS = (   # the defaults are those of transformers' LlamaConfig
    ("vocab_size", "vocab_size", 32000), ("hidden_size", "embed_dim", 4096), ("intermediate_size", "mlp_dim", 11008),
    ("num_hidden_layers", "num_layers", 32), ("num_attention_heads", "num_heads", 32),
    ("num_key_value_heads", "num_kv_heads", None), ("head_dim", "head_dim", None),
    ("max_position_embeddings", "max_seq_len", 2048), ("hidden_act", "activation", "silu"),
    ("rms_norm_eps", "norm_eps", 1e-6), ("tie_word_embeddings", "tie_embeddings", False),
)
_LLAMA_FIXED = dict(norm="rmsnorm", position="rope", gated_mlp=True)


def _settings(*more, **defaults):
    """Returns Llama's settings with other defaults, by key, and more."""
    assert set(defaults) <= {key for key, _, _ in _LLAMA_SETTINGS}, defaults
    return (*((key, field, defaults.get(key, default)) for key, field, default in _LLAMA_SETTINGS), *more)


def _whole(number):
    """Returns a number as an int, where it is one but for rounding."""
    return round(number) if abs(number - round(number)) < 1e-6 else number


_ATTENTION_BIAS = ("attention_bias", "qkv_bias", False), ("attention_bias", "attention_out_bias", False)
_EXPERTS = ("router_aux_loss_coef", "output_router_logits")   # of training
_QWEN_WINDOWS = dict(switch=True, by_layer=True, keys=("max_window_layers",))
_GEMMA_FIXED = _LLAMA_FIXED | dict(norm_position="sandwich", norm_zero_centered=True)


def _gemma_settings(attention_softcap, logit_softcap, **defaults):
    """Returns Gemma's: embeddings are scaled by the root of the width, scores by that of a number of its own."""
    same = lambda v: v
    settings = _settings(
        ("hidden_size", "embed_scale", 2304, lambda v: v ** 0.5, None),
        ("query_pre_attn_scalar", "attention_scale", 256, lambda v: v ** -0.5,
         lambda a: _whole((a.attention_scale or a.head_dim ** -0.5) ** -2)),
        ("attn_logit_softcapping", "attention_softcap", attention_softcap, same, lambda a: a.attention_softcap or None),
        ("final_logit_softcapping", "logit_softcap", logit_softcap, same, lambda a: a.logit_softcap or None),
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, **defaults)
    return tuple((key.replace("hidden_act", "hidden_activation"), *rest) for key, *rest in settings)


_LLAMA_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

# The first that can express a model is the one it is exported as.
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "transformer.", _GPT2_ROWS,
        fixed=dict(norm="layernorm", norm_bias=True, position="learned", gated_mlp=False, qkv_bias=True,
                   attention_out_bias=True, mlp_bias=True),
        settings=(("vocab_size", "vocab_size", 50257), ("n_embd", "embed_dim", 768), ("n_inner", "mlp_dim", None),
                  ("n_layer", "num_layers", 12), ("n_head", "num_heads", 12), ("n_positions", "max_seq_len", 1024),
                  ("activation_function", "activation", "gelu_new"), ("layer_norm_epsilon", "norm_eps", 1e-5),
                  ("tie_word_embeddings", "tie_embeddings", True)),
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        # Dropout is of training: set model.dropout. n_ctx repeats n_positions; the rest is of other heads, or says
        # in which order half-precision attention is computed.
        harmless=("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type",
                  "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        buffers=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
    "llama": Family(
        "LlamaForCausalLM", "model.", _llama(), _LLAMA_FIXED,
        settings=_settings(*_ATTENTION_BIAS, ("mlp_bias", "mlp_bias", False)),
        only={"rope_interleaved": False},
        # pretraining_tp cuts the same products into parts; is_llama_config marks a conversion (SmolLM2).
        harmless=("attention_dropout", "pretraining_tp", "is_llama_config"), buffers=_LLAMA_BUFFERS),
    "mistral": Family(
        "MistralForCausalLM", "model.", _llama(), _LLAMA_FIXED,
        settings=_settings(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32),
        harmless=("attention_dropout",), windows=Windows(lambda s, i: True), buffers=_LLAMA_BUFFERS),
    "qwen2": Family(
        "Qwen2ForCausalLM", "model.", _llama(), _LLAMA_FIXED | dict(qkv_bias=True),
        _settings(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768),
        only={"use_mrope": False}, harmless=("attention_dropout",), buffers=_LLAMA_BUFFERS,
        windows=Windows(lambda s, i: i >= s.get("max_window_layers", 28), **_QWEN_WINDOWS)),
    "qwen3": Family(
        "Qwen3ForCausalLM", "model.", _llama(qk_norm="HH"), _LLAMA_FIXED | dict(qk_norm="head"),
        _settings(*_ATTENTION_BIAS, vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, head_dim=128,
                  max_position_embeddings=32768),
        harmless=("attention_dropout",), buffers=_LLAMA_BUFFERS,
        windows=Windows(lambda s, i: i >= s.get("max_window_layers", 28), **_QWEN_WINDOWS)),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "model.",
        _llama(qk_norm="HH", mlp=_experts("mlp.gate", {
            f"w_{one}": "mlp.experts.{e}." + one + "_proj" for one in ("gate", "up", "down")})),
        _LLAMA_FIXED | dict(qk_norm="head"),
        _settings(("num_experts", "num_experts", 128), ("num_experts_per_tok", "experts_per_token", 8),
                  ("moe_intermediate_size", "expert_dim", 768), ("norm_topk_prob", "router_renormalize", False),
                  vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
                  num_key_value_heads=4, max_position_embeddings=32768),
        aliases={"num_local_experts": "num_experts"},
        only={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        harmless=("attention_dropout", *_EXPERTS), buffers=_LLAMA_BUFFERS,
        windows=Windows(lambda s, i: True, switch=True, keys=("max_window_layers",))),
    "mixtral": Family(
        "MixtralForCausalLM", "model.",
        _llama(mlp=_experts("block_sparse_moe.gate", {
            f"w_{one}": "block_sparse_moe.experts.{e}." + key for one, key in (("gate", "w1"), ("up", "w3"),
                                                                              ("down", "w2"))})),
        _LLAMA_FIXED,
        _settings(("num_local_experts", "num_experts", 8), ("num_experts_per_tok", "experts_per_token", 2),
                  ("intermediate_size", "expert_dim", 14336), intermediate_size=14336, num_key_value_heads=8,
                  max_position_embeddings=4096 * 32, rms_norm_eps=1e-5),
        only={"router_jitter_noise": 0.0}, harmless=("attention_dropout", *_EXPERTS), rope_theta=("rope_theta", 1e6),
        windows=Windows(lambda s, i: True, default=None), buffers=_LLAMA_BUFFERS),
    "gemma2": Family(
        "Gemma2ForCausalLM", "model.", _llama(norms=_SANDWICH_NORMS), _GEMMA_FIXED,
        _gemma_settings(50.0, 30.0, vocab_size=256000, max_position_embeddings=8192),
        only={"attention_bias": False, "use_bidirectional_attention": None, "cache_implementation": "hybrid"},
        harmless=("attention_dropout", "hidden_act"), buffers=_LLAMA_BUFFERS,   # what is read is hidden_activation
        windows=Windows(lambda s, i: i % 2 == 0, by_layer=True)),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", "model.", _llama(norms=_SANDWICH_NORMS, qk_norm="HH"), _GEMMA_FIXED | dict(qk_norm="head"),
        _gemma_settings(None, None, vocab_size=262208, max_position_embeddings=131072),
        only={"attention_bias": False, "use_bidirectional_attention": False, "cache_implementation": "hybrid"},
        harmless=("attention_dropout", "_sliding_window_pattern"), buffers=_LLAMA_BUFFERS,
        rope_theta=("rope_theta", 1e6), rope_local_theta="rope_local_base_freq",
        windows=Windows(lambda s, i: (i + 1) % (s.get("sliding_window_pattern") or 6) > 0, by_layer=True,
                        keys=("sliding_window_pattern",))),
    "phi3": Family(
        "Phi3ForCausalLM", "model.", _llama(merged=True), _LLAMA_FIXED,
        tuple(s for s in _settings(vocab_size=32064, hidden_size=3072, intermediate_size=8192,
                                   max_position_embeddings=4096, rms_norm_eps=1e-5) if s[0] != "head_dim"),
        only={"attention_bias": False},
        # original_max_position_embeddings is of a rope scaling that is refused.
        harmless=("attention_dropout", "resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "auto_map"),
        rope_frac=("partial_rotary_factor", 1.0), windows=Windows(lambda s, i: True, default=None),
        buffers=_LLAMA_BUFFERS),
    "olmo2": Family(
        "Olmo2ForCausalLM", "model.", _llama(norms=_OUTPUT_NORMS, qk_norm="QR"),
        _LLAMA_FIXED | dict(norm_position="output", qk_norm="full"),
        tuple(s for s in _settings(*_ATTENTION_BIAS, vocab_size=50304, rms_norm_eps=1e-5) if s[0] != "head_dim"),
        harmless=("attention_dropout",), buffers=_LLAMA_BUFFERS),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", "gpt_neox.", _NEOX_ROWS,
        dict(norm="layernorm", norm_bias=True, position="rope", gated_mlp=False, mlp_bias=True),
        settings=(("vocab_size", "vocab_size", 50432), ("hidden_size", "embed_dim", 6144),
                  ("intermediate_size", "mlp_dim", 24576), ("num_hidden_layers", "num_layers", 44),
                  ("num_attention_heads", "num_heads", 64), ("max_position_embeddings", "max_seq_len", 2048),
                  ("hidden_act", "activation", "gelu"), ("layer_norm_eps", "norm_eps", 1e-5),
                  ("tie_word_embeddings", "tie_embeddings", False), ("attention_bias", "qkv_bias", True),
                  ("attention_bias", "attention_out_bias", True), ("use_parallel_residual", "parallel_residual", True)),
        harmless=("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder"),
        rope_theta=("rotary_emb_base", 10000.0), rope_frac=("rotary_pct", 0.25),
        buffers=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
}

FAMILIES |= {f"{name}Model": sentence_encoder(kind, FAMILIES[kind], f"{name}Model", r"lm_head\.weight")
             for name, kind in (("Mistral", "mistral"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3"))}

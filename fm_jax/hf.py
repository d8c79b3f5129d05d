"""Weights, settings and tokenizers of Hugging Face folders, in and out: one table per family. Layer 3.

    python -m fm_jax.convert --from_hf path/to/folder --workdir runs/imported
    python -m fm_jax.convert --workdir runs/x --to_hf exported
    fm_jax.load("path/to/folder")

A row of a table names a tensor of the family, its axes, our parameter and its axes, and is read in
both directions; so is what follows it, from `config.json` to `Architecture` and back. What has no
place in the tables is an error that names it. No pickle is read. The safetensors format (a length, a
JSON header, raw bytes) is read and written here and not by its library, whose NumPy side holds a
whole file in memory to write it and has no bfloat16 of its own.
"""

import json
import math
import pathlib
import re
import shutil
import tempfile
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fm_jax import config as config_lib
from fm_jax import gguf
from fm_jax import tokenizer as tokenizers
from fm_jax import tree
from fm_jax.architecture import ROPE_SCALINGS, Architecture
from fm_jax.errors import UserError, choose

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MOST_LISTED = 10              # wrong tensors in one error
MOST_HEADER_BYTES = 100_000_000   # as the format's own library allows
FILE_BYTES = 5_000_000_000    # of an exported file at most, but for a larger tensor: the limit of most hubs' tools


# --- The tables

class Row(NamedTuple):
    """A parameter of ours in a tensor of the family.

    Letters: those of model.py, and P positions, Y token types, U the width once more, M hidden channels of an expert,
    Q and R channels of all heads and of all kv heads. Letters that share an axis of the tensor are merged there, the
    first outermost. "+" marks the axis along which the rows that share a tensor follow each other; "K:+H" that they do
    so for each K in turn.
    """

    key: str       # of the tensor; {}: the layer, {e}: the expert
    axes: str      # of the tensor, separated by spaces
    name: str      # of our parameter
    letters: str   # axes of our parameter, behind those of the layers and experts


class Family(NamedTuple):
    architecture: str                  # the class in transformers, as config.json names it
    prefix: str                        # of the keys; files of a bare model without head lack it
    rows: tuple[Row, ...]
    fixed: dict                        # fields of Architecture that all its models share
    # (key of config.json, field of Architecture, default of the key), and where the two are not the same number:
    # (function of the key's value, function of the Architecture that gives it back; None: the key is written already).
    settings: tuple[tuple, ...]
    aliases: dict = {}                 # other keys of config.json, by which some versions of transformers write it
    only: dict = {}                    # key of config.json: the one value that we honour, which is its default
    harmless: tuple[str, ...] = ()     # keys of config.json that change no logits
    windows: "Windows | None" = None   # None: every layer is global
    rope_theta: tuple[str, float] = ("rope_theta", 10000.0)   # key of config.json, and its default
    rope_frac: tuple[str, float] = ("", 1.0)                  # the same of rope_frac; "": all channels are rotated
    rope_local_theta: str = ""         # key of config.json: theta of local layers
    buffers: str = "(?!)"              # pattern of tensors that are no parameters, or another head's
    objective: str = "fm_jax.objectives.causal_lm.CausalLM"


class Windows(NamedTuple):
    """Which layers are local, where `sliding_window` is set and `layer_types` does not say."""

    local: Callable[[dict, int], bool]   # of (config.json, number of the layer)
    default: int | None = 4096           # of sliding_window
    switch: bool = False                 # use_sliding_window must be set too
    by_layer: bool = False               # config.json has layer_types
    keys: tuple[str, ...] = ()           # what `local` reads


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


def _weight_and_bias(key, axes, name, letters, bias=None):
    """Returns the rows of a product or norm that adds a bias. bias: (axes, name, letters) of it, default a norm's."""
    bias = bias or (axes, name.removesuffix("scale") + "bias", letters)
    return Row(key + ".weight", axes, name, letters), Row(key + ".bias", *bias)


_NEOX, _QKV = "gpt_neox.layers.{}.", "gpt_neox.layers.{}.attention.query_key_value"
_NEOX_ROWS = (
    Row("gpt_neox.embed_in.weight", "V D", "embed.tokens", "VD"),
    *_weight_and_bias(_NEOX + "input_layernorm", "D", _OURS + "attention_norm.scale", "D"),
    *_weight_and_bias(_NEOX + "post_attention_layernorm", "D", _OURS + "mlp_norm.scale", "D"),
    Row(_QKV + ".weight", "K:+GH D", _OURS + "attention.wq", "DKGH"),   # K is all heads
    Row(_QKV + ".weight", "K:+H D", _OURS + "attention.wk", "DKH"),
    Row(_QKV + ".weight", "K:+H D", _OURS + "attention.wv", "DKH"),
    Row(_QKV + ".bias", "K:+GH", _OURS + "attention.q_bias", "KGH"),
    Row(_QKV + ".bias", "K:+H", _OURS + "attention.k_bias", "KH"),
    Row(_QKV + ".bias", "K:+H", _OURS + "attention.v_bias", "KH"),
    *_weight_and_bias(_NEOX + "attention.dense", "D KGH", _OURS + "attention.wo", "KGHD",
                      ("D", _OURS + "attention.o_bias", "D")),
    *_weight_and_bias(_NEOX + "mlp.dense_h_to_4h", "F D", _OURS + "mlp.w_up", "DF", ("F", _OURS + "mlp.up_bias", "F")),
    *_weight_and_bias(_NEOX + "mlp.dense_4h_to_h", "D F", _OURS + "mlp.w_down", "FD",
                      ("D", _OURS + "mlp.down_bias", "D")),
    *_weight_and_bias("gpt_neox.final_layer_norm", "D", "transformer.final_norm.scale", "D"),
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
    rows += _weight_and_bias(prefix + "embeddings.LayerNorm", "D", "embed.norm.scale", "D")
    for one, q, key in zip("qkv", ("KGH", "KH", "KH"), attention):
        rows += _weight_and_bias(at(key), f"{q} D", f"{_OURS}attention.w{one}", f"D{q}",
                                 (q, f"{_OURS}attention.{one}_bias", q))
    rows += [*_weight_and_bias(at(attention_out), "D KGH", _OURS + "attention.wo", "KGHD",
                               ("D", _OURS + "attention.o_bias", "D")),
             *_weight_and_bias(at(attention_norm), "D", _OURS + "attention_norm.scale", "D"),
             *_weight_and_bias(at(mlp[0]), "F D", _OURS + "mlp.w_up", "DF", ("F", _OURS + "mlp.up_bias", "F")),
             *_weight_and_bias(at(mlp[1]), "D F", _OURS + "mlp.w_down", "FD", ("D", _OURS + "mlp.down_bias", "D")),
             *_weight_and_bias(at(mlp_norm), "D", _OURS + "mlp_norm.scale", "D")]
    transform, norm, bias, table = head
    return (*rows, *_weight_and_bias(transform, "U D", "embed.transform", "DU", ("U", "embed.transform_bias", "U")),
            *_weight_and_bias(norm, "D", "embed.transform_norm.scale", "D"),
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
    ("hidden_act", "activation", "gelu"), ("type_vocab_size", "num_token_types", 2), ("layer_norm_eps", "norm_eps", 1e-12))
# Untied, transformers takes another bias of the logits too.
_BERT = dict(only={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
                   "tie_word_embeddings": True},
             harmless=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
             objective="fm_jax.objectives.masked_lm.MaskedLM")
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
         ("max_position_embeddings", "max_seq_len", 512, lambda v: v - 2, lambda a: a.max_seq_len + 2)), **_BERT, buffers=r"lm_head\.decoder\.bias|roberta\.embeddings\.position_ids|roberta\.pooler\..*"),
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
}

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu",
               "swish": "silu", "relu": "relu"}
# Of config.json in any family: names, special tokens, precision (the files have their own), generation, caching.
HARMLESS = frozenset((
    "model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "initializer_range", "task_specific_params",
    "transformers.js_config", "_attn_implementation_autoset", "output_attentions", "output_hidden_states",
    "output_past", "return_dict", "gradient_checkpointing", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward"))
# Keys of rope_scaling: theirs to ours. `attention_factor` and what else shapes yarn are read below.
_ROPE_KEYS = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
              "original_max_position_embeddings": "original_max_seq_len", "beta_fast": "beta_fast",
              "beta_slow": "beta_slow", "attention_factor": "attention_factor"}
# Fields of Architecture that say how it is computed, and not what.
_COMPUTE = ("dtype", "param_dtype", "matmul_dtype", "remat", "scan_layers", "attention_kernel", "loss_chunk_tokens",
            "dropout", "pipeline_microbatches", "pipeline_repeats")


# --- Settings

def is_folder(folder) -> bool:
    """Returns whether a folder has a config.json of Hugging Face (a run's has no model_type), or is a GGUF file."""
    path = pathlib.Path(folder, "config.json")
    return _is_gguf(folder) or path.is_file() and "model_type" in _json(path)


def _is_gguf(path):
    return pathlib.Path(path).suffix == ".gguf"


class Folder(NamedTuple):
    """A folder, or a GGUF file, whose headers have been read."""

    path: pathlib.Path
    place: str                      # of the settings, for errors
    settings: dict                  # config.json
    family: Family
    entries: dict[str, "_Entry"]    # of the weights, with keys as the family's full model names them
    tokenizer: Callable | None = None   # of a GGUF file: returns the tokenizer's files


def open_folder(path) -> Folder:
    """Returns what `read_config`, `read_tokenizer` and `read_params` read from.

    Raises:
      UserError: an unknown family, no weights, or a damaged file.
    """
    path = pathlib.Path(path)
    if _is_gguf(path):
        file = gguf.read(path)
        entries = {key: _Entry(path, key, "F32", shape, read) for key, (shape, read) in file.tensors.items()}
        return Folder(path, str(path), file.settings, FAMILIES[file.settings["model_type"]], entries, file.tokenizer)
    settings, place = _json(path / "config.json"), str(path / "config.json")
    family = FAMILIES[choose(settings.get("model_type"), FAMILIES, f"{place}: model_type")]
    return Folder(path, place, settings, family, _entries(path, family))


def read_config(folder: Folder, *, dtype: str = "") -> ml_collections.ConfigDict:
    """Returns the config of a run that holds the folder's model.

    dtype: of activations; default that of the stored weights. Parameters are bfloat16 where all stored ones
    are, else float32: nothing is lost.

    Raises:
      UserError: a setting that this model cannot honour.
    """
    arch = architecture(folder.settings, folder.place)
    stored = {e.dtype for key, e in folder.entries.items()
              if e.dtype in DTYPES and not re.fullmatch(folder.family.buffers, key)}
    config = config_lib.defaults()
    config.objective = folder.family.objective
    config.name, config.hf_family = folder.path.resolve().name.removesuffix(".gguf"), folder.settings["model_type"]
    model = {f: getattr(arch, f) for f in config.model if f not in _COMPUTE}
    config_lib.override(config, {f"model.{f}": value for f, value in model.items()})
    config.model.param_dtype = "bfloat16" if stored == {"BF16"} else "float32"
    config.model.dtype = dtype or (DTYPES[stored.pop()].name if len(stored) == 1 else "float32")
    config.seq_len = min(config.seq_len, arch.max_seq_len)   # of training; evaluation goes by max_seq_len
    return config


def architecture(settings: dict, place: str) -> Architecture:
    """Returns what the settings of a config.json, read at `place`, describe.

    Raises:
      UserError: an unknown family, or a setting that this model cannot honour.
    """
    family = FAMILIES[choose(settings.get("model_type"), FAMILIES, f"{place}: model_type")]
    settings = {family.aliases.get(key, key): value for key, value in settings.items()}
    known = {key for key, *_ in family.settings} | HARMLESS | {*family.harmless, *family.only}
    if family.fixed["position"] == "rope":
        known |= {family.rope_theta[0], family.rope_frac[0], family.rope_local_theta, "rope_scaling", "rope_parameters"}
    if family.windows:
        known |= {"sliding_window", "use_sliding_window", "layer_types", *family.windows.keys}
    wrong = [f"{k}={v!r}" for k, v in settings.items() if k not in known and v is not None]
    wrong += [f"{k}={settings[k]!r}" for k, v in family.only.items() if settings.get(k, v) not in (v, None)]
    if wrong:
        raise UserError(f"{place}: this model cannot be computed here with {', '.join(wrong)}")
    fields, plain = dict(family.fixed), Architecture()
    for key, field, default, *ways in family.settings:
        value = settings.get(key, default)
        if field == "activation":
            value = ACTIVATIONS[choose(value, ACTIVATIONS, f"{place}: {key}")]
        kind = type(getattr(plain, field))
        if value is not None and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{place}: {key}={value!r}: expected {kind.__name__}")
        # 0: derived from the others, or off
        fields[field] = 0 if value is None else ways[0](value) if ways else value
    if family.fixed["position"] == "rope":
        fields |= _rope(settings, family, fields["max_seq_len"], place)
    if family.windows:
        fields |= _windows(settings, family.windows, fields["num_layers"], place)
    try:
        return Architecture(**fields)
    except UserError as e:
        raise UserError(f"{place}: {e}") from None


LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


def _windows(settings, windows, num_layers, place):
    """Returns the fields layer_pattern and window of Architecture."""
    window = settings.get("sliding_window", windows.default)
    if window is None or windows.switch and not settings.get("use_sliding_window", False):
        return {}
    if types := settings.get("layer_types"):
        if len(types) != num_layers:
            raise UserError(f"{place}: layer_types names {len(types)} layers, and there are {num_layers}")
        kinds = tuple(LAYER_TYPES[choose(t, LAYER_TYPES, f"{place}: layer_types")] for t in types)
    else:
        kinds = tuple("local" if windows.local(settings, i) else "global" for i in range(num_layers))
    if "local" not in kinds:
        return {}
    period = next(p for p in range(1, num_layers + 1) if all(kinds[i] == kinds[i % p] for i in range(num_layers)))
    return {"layer_pattern": kinds[:period], "window": window}


def _rope(settings, family, max_seq_len, place):
    """Returns the fields of Architecture on rotary positions. The newest spelling is `rope_parameters`."""
    (theta_key, theta), (frac_key, frac) = family.rope_theta, family.rope_frac
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    local = {}
    if family.rope_local_theta:
        by_layer = set(rope) and set(rope) <= set(LAYER_TYPES)
        local = dict(rope.get("sliding_attention") or {}) if by_layer else {}
        rope = (rope.get("full_attention") or {}) if by_layer else rope
        if local.pop("rope_type", "default") != "default":
            raise UserError(f"{place}: this model cannot be computed here with a rope scaling of its local layers")
        local = {"rope_local_theta": float(local.pop("rope_theta", settings.get(family.rope_local_theta) or 1e4))}
    rope = {k: v for k, v in rope.items() if v is not None}
    for key, value in {theta_key: settings.get(theta_key), frac_key: settings.get(frac_key), **rope}.items():
        if value is not None and key not in ("rope_type", "type", "truncate") and type(value) not in (int, float):
            raise UserError(f"{place}: {key}={value!r}: expected a number")
    theta = rope.pop("rope_theta", settings.get(theta_key) or theta)
    frac = rope.pop("partial_rotary_factor", settings.get(frac_key) or frac)
    if frac != 1 and not frac_key:
        raise UserError(f"{place}: this model cannot be computed here with a partial_rotary_factor other than 1")
    kind, _ = rope.pop("rope_type", rope.get("type", "default")), rope.pop("type", None)
    kind = "none" if kind == "default" else choose(kind, ROPE_SCALINGS, f"{place}: rope scaling")
    known = ROPE_SCALINGS.get(kind, {})
    if known and "factor" not in rope:
        raise UserError(f"{place}: rope scaling of type {kind} lacks its factor")
    scaling = {"type": kind, **known}
    if "original_max_seq_len" in known:
        rope.setdefault("original_max_position_embeddings", max_seq_len)
    if kind == "yarn":
        mscales = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if all(mscales) and "attention_factor" not in rope:
            over, under = (0.1 * m * math.log(rope.get("factor", 1)) + 1 for m in mscales)
            rope["attention_factor"] = over / under
        if rope.pop("truncate", True) is not True:
            raise UserError(f"{place}: this model cannot be computed here with truncate=False in its rope scaling")
    for key, value in rope.items():
        if _ROPE_KEYS.get(key) not in known:
            raise UserError(f"{place}: this model cannot be computed here with {key}={value!r} in its rope scaling "
                            f"({kind})")
        scaling[_ROPE_KEYS[key]] = value
    return {"rope_theta": float(theta), "rope_frac": float(frac), "rope_scaling": scaling, **local}


def settings_of(arch: Architecture, family: str = "") -> dict:
    """Returns the config.json of an architecture, without its special tokens.

    Rotary settings and dtype are spelt as in transformers 4, which 5 reads too. A family can express a model if what
    it would write is read back as the same model. family: its name; "": the first that can.

    Raises:
      UserError: no family can; the fields that the nearest cannot express are named.
    """
    failed = {}
    for name in [choose(family, FAMILIES, "config.hf_family")] if family else FAMILIES:
        settings = _express(name, arch)
        failed[name] = _lost(arch, settings)
        if not failed[name]:
            return settings
    nearest = min(failed, key=lambda name: len(failed[name]))
    raise UserError(f"no Hugging Face family here ({', '.join(failed)}) can express this model; {nearest} comes "
                    f"nearest, without {', '.join(failed[nearest])}")


def _express(name, arch):
    family = FAMILIES[name]
    settings = {"model_type": name, "architectures": [family.architecture]}
    spelt = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    for key, field, _, *ways in family.settings:
        value = getattr(arch, field)
        if not ways:
            settings[key] = spelt[value] if field == "activation" else value
        elif ways[1]:
            settings[key] = ways[1](arch)
    if family.fixed["position"] == "rope":
        kind = arch.rope_scaling.get("type", "none")
        values = {**ROPE_SCALINGS.get(kind, {}), **arch.rope_scaling}
        own = {family.rope_theta[0]: arch.rope_theta, family.rope_frac[0]: arch.rope_frac,
               family.rope_local_theta: arch.rope_local_theta}
        settings |= {key: value for key, value in own.items() if key}
        settings["rope_scaling"] = None if kind == "none" else {"rope_type": kind} | {
            theirs: values[ours] for theirs, ours in _ROPE_KEYS.items() if values.get(ours)}
    if family.windows:
        settings["sliding_window"] = arch.window if "local" in arch.layer_kinds else None
        if family.windows.switch:
            settings["use_sliding_window"] = "local" in arch.layer_kinds
        if family.windows.by_layer:
            theirs = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
            settings["layer_types"] = [theirs[kind] for kind in arch.layer_kinds]
    return settings


def _lost(arch, settings):
    """Returns [field=value] of an architecture that a config.json does not give back."""
    def meant(a):
        fields = {f: v for f, v in vars(a).items() if f not in _COMPUTE}
        kind = a.rope_scaling.get("type", "none")
        local = "local" in a.layer_kinds
        return fields | {
            "layer_pattern": a.layer_kinds, "window": a.window * local, "rope_local_theta": a.rope_local_theta * local,
            "attention_scale": a.attention_scale or a.head_dim ** -0.5, **(
                {"rope_scaling": {"type": kind, **ROPE_SCALINGS.get(kind, {}), **a.rope_scaling}}
                if a.position == "rope" else {"rope_theta": 0, "rope_frac": 0, "rope_scaling": 0})}
    family = FAMILIES[settings["model_type"]]
    if "head_dim" not in settings and arch.head_dim * arch.num_heads != arch.embed_dim:
        return [f"{f}={getattr(arch, f)!r}" for f in ("head_dim", *(f for f, v in family.fixed.items()
                                                                    if getattr(arch, f) != v))]
    found = meant(architecture(settings, "config.json"))
    lost = [f"{f}={getattr(arch, f)!r}" for f, value in meant(arch).items() if found[f] != value]
    if settings["model_type"] == "llama" and arch.embed_dim % arch.num_heads:   # refused by LlamaConfig
        lost.append(f"embed_dim={arch.embed_dim} that num_heads={arch.num_heads} does not divide")
    return lost


# --- Weights in

def read_params(folder: Folder, arch: Architecture, abstract):
    """Returns the parameters, arrays of the shapes, dtypes and shardings of `abstract`.

    Each process reads its own shards through memory maps; beside the result, the host holds a copy of
    one parameter's largest shard.

    Raises:
      UserError: tensors that are missing, left over or of another shape, the first ten of them; one that is not
        finite.
    """
    names, entries = tree.flatten(abstract), folder.entries
    tensors = _tensors(folder.family, arch, names)
    _check(folder, tensors, names)
    where = {}   # name of ours -> the _Part of each layer and expert
    for tensor in tensors:
        for part in tensor.parts:
            where.setdefault(part.row.name, []).append(part._replace(entry=entries[tensor.key]))
    sizes = _sizes(arch)

    def read(name, leaf):
        key = where[name][0].row.key
        outer = leaf.shape[:("{}" in key) + ("{e}" in key)]   # layers, experts: each a tensor
        parts = np.fromiter(where[name], object).reshape(outer)

        def piece(index):
            chosen, inside = parts[(*index[: len(outer)], ...)], index[len(outer) :]
            out = []
            for part in chosen.flat:
                out.append(_view(part, sizes)[inside].astype(leaf.dtype))
                if not np.isfinite(out[-1]).all():
                    raise UserError(f"{part.entry.path}: {part.entry.key} has values that are not finite")
            return np.stack(out).reshape(*chosen.shape, *out[0].shape)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    return tree.map_named(read, abstract)


class _Part(NamedTuple):
    """Of a tensor, what is a parameter of ours: from `start` to `stop` of `length` along the axis marked "+"."""

    row: Row
    start: int
    stop: int
    length: int = 0
    entry: "_Entry | None" = None


class _Tensor(NamedTuple):
    key: str
    shape: tuple[int, ...]
    at: tuple[int, ...]          # layer and expert
    parts: tuple[_Part, ...]


def _tensors(family, arch, names):
    """Returns the tensors that a model of the family with our parameters `names` has, in the table's order."""
    groups, sizes, out = {}, _sizes(arch), []
    for row in family.rows:
        if row.name in names:
            groups.setdefault(row.key, []).append(row)
    for key, rows in groups.items():
        parts, stop = [], 0
        for row in rows:
            start, stop = stop, stop + _blocks(row, sizes)[_joint(row)]
            parts.append(_Part(row, start, stop))
        parts = tuple(part._replace(length=stop) for part in parts)
        shape, blocks = [], iter(_blocks(rows[0], sizes, stop))
        for axis in rows[0].axes.split():
            shape.append(math.prod(next(blocks) for _ in axis.split(":")))
        layers = range(arch.num_layers) if "{}" in key else [None]
        experts = range(arch.num_experts) if "{e}" in key else [None]
        out += [_Tensor(key.format(l, e=e), tuple(shape), tuple(i for i in (l, e) if i is not None), parts)
                for l in layers for e in experts]
    return out


def _sizes(a):
    heads = a.num_kv_heads * a.head_dim
    return {"V": a.vocab_size, "D": a.embed_dim, "U": a.embed_dim, "K": a.num_kv_heads, "G": a.groups, "H": a.head_dim,
            "Q": heads * a.groups, "R": heads, "F": a.mlp_dim, "E": a.num_experts, "M": a.expert_dim,
            "P": a.max_seq_len + a.position_offset, "Y": a.num_token_types}


def _blocks(row, sizes, joint: int | None = None):
    """Returns the sizes of a tensor's axes, those of "K:+H" apart; joint: of the axis marked "+", of all its rows."""
    axes = re.split("[ :]", row.axes)
    return [joint if joint is not None and axis.startswith("+") else math.prod(sizes[c] for c in axis.strip("+"))
            for axis in axes]


def _joint(row):
    """Returns the axis of `_blocks` along which rows of one tensor follow each other."""
    return next((i for i, axis in enumerate(re.split("[ :]", row.axes)) if axis.startswith("+")), 0)


def _view(part, sizes):
    """Returns a row's parameter as a view of the file."""
    row = part.row
    array = part.entry.read().reshape(_blocks(row, sizes, part.length))
    array = array[(slice(None),) * _joint(row) + (slice(part.start, part.stop),)]
    letters = re.sub("[ +:]", "", row.axes)
    return array.reshape([sizes[c] for c in letters]).transpose([letters.index(c) for c in row.letters])


def _check(folder, tensors, names):
    """Raises UserError where the files do not hold just what the model has."""
    path, family, entries = folder.path, folder.family, folder.entries
    wanted = {t.key: t for t in tensors}
    wrong = [f"{k} is missing" for k in wanted if k not in entries]
    for key, entry in entries.items():
        if key in wanted and entry.shape != wanted[key].shape:
            wrong.append(f"{key} has shape {list(entry.shape)} instead of {list(wanted[key].shape)}")
        elif key in wanted and entry.dtype not in DTYPES:
            wrong.append(f"{key} is of type {entry.dtype}, not one of {', '.join(DTYPES)}")
        elif key not in wanted and not re.fullmatch(family.buffers, key) and not _is_tied(family, key, entries, names):
            wrong.append(f"{key} is left over")
    if wrong:
        more = f"; and {len(wrong) - MOST_LISTED} more" if len(wrong) > MOST_LISTED else ""
        raise UserError(f"{path}: the weights are not those of its config.json: "
                        + "; ".join(wrong[:MOST_LISTED]) + more)


def _is_tied(family, key, entries, names):
    """Returns whether `key` is the head of a tied model, stored again: the same bytes as its embedding."""
    table, head = (next(r.key for r in family.rows if r.name == n) for n in ("embed.tokens", "embed.head"))
    if key != head or "embed.head" in names or table not in entries:
        return False
    one, other = entries[table].read(), entries[head].read()
    return one.dtype == other.dtype and np.array_equal(one.view(np.uint8), other.view(np.uint8))


# --- The safetensors format

class _Entry(NamedTuple):
    path: pathlib.Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable         # returns the array: of a safetensors file a map, of a GGUF file dequantised


def _entries(folder, family):
    """Returns {key: _Entry} of the folder's safetensors files."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict) or not all(
                isinstance(f, str) and pathlib.PurePath(f).name == f for f in files.values()):
            raise UserError(f"{index}: not an index of safetensors files (weight_map: key to file name)")
    elif single.is_file():
        files = dict.fromkeys(_header(single), single.name)
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
        raise UserError(f"{folder}: no model.safetensors here" + (
            f"; {pickles[0]} is a pickle, which could run any code and is never read: save the model as safetensors"
            if pickles else ""))
    headers = {name: _header(folder / name) for name in sorted(set(files.values()))}
    absent = [key for key, name in files.items() if key not in headers[name]]
    if absent:
        raise UserError(f"{folder / files[absent[0]]}: lacks {absent[0]}, which {index.name} places there")
    # TensorFlow's names, in BERT's older files.
    renamed = lambda key: re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {
        "gamma": "weight", "beta": "bias"}[m[1]], key)
    entries = {renamed(key): headers[name][key] for key, name in files.items()}
    if not any(key.startswith(family.prefix) for key in entries):   # the bare model's names
        heads = {row.key for row in family.rows if not row.key.startswith(family.prefix)}
        entries = {key if key in heads else family.prefix + key: e for key, e in entries.items()}
    return entries


def _header(path):
    """Returns {key: _Entry} of one file. Raises UserError where it is missing, damaged or cut short."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, although the index of the weights names it")
    total = path.stat().st_size
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if total < 8 or size > min(total - 8, MOST_HEADER_BYTES):
            raise UserError(f"{path}: not a safetensors file, or cut short ({total} bytes); copy it again")
        text = f.read(size)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {key: (t["dtype"], tuple(map(int, t["shape"])), *(8 + size + at for at in t["data_offsets"]))
                   for key, t in header.items()}
        if any(len(t) != 4 for t in tensors.values()):
            raise ValueError("data_offsets")
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: not a safetensors file ({type(e).__name__}: {e})") from None
    for key, (dtype, shape, start, stop) in tensors.items():
        if not 8 + size <= start <= stop <= total:
            raise UserError(f"{path}: cut short: {key} ends at byte {stop}, the file at {total}; copy it again")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{path}: damaged: {key} of type {dtype} and shape {list(shape)} has {stop - start} bytes")
    read = lambda dtype, shape, start: lambda: np.memmap(path, DTYPES[dtype], "r", start, shape)
    return {key: _Entry(path, key, dtype, shape, read(dtype, shape, start))
            for key, (dtype, shape, start, _) in tensors.items()}


def _write(path, tensors):
    """Writes one file of [(key, dtype, shape, function that makes the array)], one array in memory at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0   # which transformers asks for
    names = {dtype: name for name, dtype in DTYPES.items()}
    for key, dtype, shape, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, make in tensors:
            f.write(np.ascontiguousarray(make()).view(np.uint8).data)


# --- Weights out

def save(folder, arch: Architecture, params, tokenizer, *, family: str = "", file_bytes: int = FILE_BYTES) -> str:
    """Returns a line on the tokenizer; writes a folder that transformers opens, whole or not at all.

    family: see `settings_of`. params: NumPy arrays, float32, bfloat16 or float16; stored as they are.

    Raises:
      UserError: no family can express the model; the folder exists; a parameter has another dtype.
    """
    folder = pathlib.Path(folder)
    settings = settings_of(arch, family)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already and is not empty; name another folder")
    names = tree.flatten(params)
    dtypes = {choose(np.dtype(p.dtype), tuple(DTYPES.values()), f"{n}: dtype") for n, p in names.items()}
    settings["torch_dtype"] = dtypes.pop().name if len(dtypes) == 1 else "float32"
    settings |= {f"{which}_token_id": getattr(tokenizer, f"{which}_id") for which in ("bos", "eos", "pad")}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as e:
        raise UserError(f"{folder}: cannot be made ({e.strerror}: {e.filename}); name another folder") from None
    try:
        _write_json(made / "config.json", settings)
        _save_tensors(made, FAMILIES[settings["model_type"]], arch, names, file_bytes)
        note = _save_tokenizer(made, tokenizer)
        made.chmod(0o755)   # mkdtemp's is private
        made.replace(folder)
    except BaseException as e:
        shutil.rmtree(made)
        if isinstance(e, OSError):
            raise UserError(f"{folder}: cannot be written ({e.strerror}: {e.filename}); nothing is left of it") from e
        raise
    return note


def _save_tensors(folder, family, arch, names, file_bytes):
    sizes, written, files = _sizes(arch), {row.name for row in family.rows}, [[]]
    assert written >= set(names), set(names) - written   # settings_of has seen to it
    room = file_bytes
    for tensor in _tensors(family, arch, names):
        first = tensor.parts[0].row

        def make(tensor=tensor, first=first):
            parts = [_block(names[part.row.name][tensor.at], part.row, sizes) for part in tensor.parts]
            return np.concatenate(parts, axis=_joint(first)).reshape(tensor.shape)

        dtype = np.dtype(names[first.name].dtype)
        room -= (size := math.prod(tensor.shape) * dtype.itemsize)
        if room < 0 and files[-1]:
            files.append([])
            room = file_bytes - size
        files[-1].append((tensor.key, dtype, tensor.shape, make))
    if len(files) == 1:
        _write(folder / "model.safetensors", files[0])
        return
    where = {}
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        _write(folder / name, tensors)
        where |= {key: name for key, _, _, _ in tensors}
    total = sum(p.nbytes for p in names.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _block(array, row, sizes):
    """Returns the tensor, or part of one, that a row's parameter makes: the inverse of `_view`."""
    letters = re.sub("[ +:]", "", row.axes)
    return array.transpose([row.letters.index(c) for c in letters]).reshape(_blocks(row, sizes))


# --- Tokenizers

def read_tokenizer(folder: Folder) -> tokenizers.Tokenizer:
    """Returns the folder's tokenizer. Its chat template, and special tokens that only other files name, come along.

    They go into the tokenizer's own tokenizer_config.json, as `chat_template`, `bos_token`, `eos_token`, `pad_token`.
    """
    path, ids = folder.path, folder.settings
    if folder.tokenizer:
        files = folder.tokenizer()
        return tokenizers.HuggingFaceTokenizer(files["tokenizer.json"], files["tokenizer_config.json"], str(path))
    tokenizer = tokenizers.load(path)
    if not isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
        return tokenizer
    content = (path / "tokenizer.json").read_bytes()
    optional = lambda name: _json(path / name) if (path / name).is_file() else {}
    settings, named = map(optional, ("tokenizer_config.json", "special_tokens_map.json"))
    before = dict(settings)
    pieces = {t["id"]: t["content"] for t in json.loads(content).get("added_tokens", [])}
    for which in ("bos", "eos", "pad"):
        i = ids.get(f"{which}_token_id")
        found = named.get(f"{which}_token") or pieces.get(i[0] if isinstance(i, list) and i else i)
        # A token that is null there is one the tokenizer does without.
        if f"{which}_token" not in settings and found:
            settings[f"{which}_token"] = found
    if (path / tokenizers.CHAT_TEMPLATE).is_file():
        settings["chat_template"] = tokenizer.chat_template
    if settings == before:
        return tokenizer
    return tokenizers.HuggingFaceTokenizer(content, json.dumps(settings, ensure_ascii=False).encode(), str(path))


def _save_tokenizer(folder, tokenizer):
    """Returns a line for the user; writes the tokenizer's files, for AutoTokenizer where it can read them."""
    tokenizer.save(folder)
    if isinstance(tokenizer, tokenizers.ByteTokenizer):
        _write_json(folder / "tokenizer.json", _bytes_json(tokenizer))
    elif isinstance(tokenizer, tokenizers.SentencePieceTokenizer):
        content = _sentencepiece_json((folder / "tokenizer.model").read_bytes())
        if content is None:
            return ("tokenizer: tokenizer.model alone, a SentencePiece model that normalises text or is not BPE, which "
                    "has no equal as tokenizer.json here")
        _write_json(folder / "tokenizer.json", content)
    path = folder / "tokenizer_config.json"
    settings, content = _json(path) if path.is_file() else {}, _json(folder / "tokenizer.json")
    pieces = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
    for which in ("bos", "eos", "pad"):
        if getattr(tokenizer, f"{which}_id") in pieces:
            settings.setdefault(f"{which}_token", pieces[getattr(tokenizer, f"{which}_id")])
    # Without a class, transformers takes that of the model's family and its rules instead of the file's.
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    _write_json(path, settings)
    return "tokenizer: tokenizer.json" + (", with its chat template" if tokenizer.chat_template else "")


def _bytes_json(tokenizer):
    """Returns the tokenizer.json that gives the ids of `tokenizer.ByteTokenizer`: byte-level BPE without merges."""
    special = {i: name for name, i in tokenizer.specials.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = tokenizers.byte_level_alphabet() | {name: i for i, name in special.items()}
    return tokenizers.bpe_json(vocab, [], special, pre_tokenizer=level, decoder=level)


def _sentencepiece_json(model: bytes):
    """Returns the tokenizer.json that gives the ids of a SentencePiece BPE without normalisation, or None.

    So are those of `train_sentencepiece`. But there a U+2581 of the text, spelt in bytes here, becomes a space, and
    the name of a special token in the text that token.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trained, text = proto.trainer_spec, proto.normalizer_spec
    if (trained.model_type != trained.BPE or not trained.byte_fallback or text.precompiled_charsmap
            or text.add_dummy_prefix or text.remove_extra_whitespaces):
        return None
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # A pair is merged where the whole is a piece, the best piece first. Every way to cut a piece is such a pair.
    merges = [(-normal[whole], vocab[whole[:i]], vocab[whole[i:]], whole[:i], whole[i:])
              for whole in normal for i in range(1, len(whole)) if whole[:i] in normal and whole[i:] in normal]
    special = {i: p.piece for i, p in enumerate(proto.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
    bar = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return tokenizers.bpe_json(vocab, [m[3:] for m in sorted(merges)], special, normalizer=bar, decoder={
        "type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        unk_token=proto.pieces[trained.unk_id].piece, byte_fallback=True)


def _json(path):
    """Returns the object in a JSON file. Raises UserError where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a JSON file ({e})") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object, but a {type(value).__name__}")
    return value


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

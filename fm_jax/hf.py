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

    Letters: those of model.py, and P positions. Letters that share an axis of the tensor are merged there, the
    first outermost; "+" marks the axis along which the rows that share a tensor follow each other.
    """

    key: str       # of the tensor; {}: the layer
    axes: str      # of the tensor, separated by spaces
    name: str      # of our parameter
    letters: str   # axes of our parameter, behind that of the layers


class Family(NamedTuple):
    architecture: str                  # the class in transformers, as config.json names it
    prefix: str                        # of the keys; files of a bare model without head lack it
    rows: tuple[Row, ...]
    fixed: dict                        # fields of Architecture that all its models share
    settings: tuple[tuple, ...]        # (key of config.json, field of Architecture, default of the key)
    only: dict = {}                    # key of config.json: the one value that we honour, which is its default
    harmless: tuple[str, ...] = ()     # keys of config.json that change no logits
    window: bool = False               # `sliding_window` holds for every layer
    buffers: str = "(?!)"              # pattern of tensors that are no parameters


def _llama(biases: bool) -> tuple[Row, ...]:
    layer, ours = "model.layers.{}.", "transformer.layers."
    rows = [Row("model.embed_tokens.weight", "V D", "embed.tokens", "VD"),
            Row(layer + "input_layernorm.weight", "D", ours + "attention_norm.scale", "D")]
    for one, q in (("q", "KGH"), ("k", "KH"), ("v", "KH")):
        rows.append(Row(f"{layer}self_attn.{one}_proj.weight", f"{q} D", f"{ours}attention.w{one}", f"D{q}"))
        rows.append(Row(f"{layer}self_attn.{one}_proj.bias", q, f"{ours}attention.{one}_bias", q))
    rows += [Row(layer + "self_attn.o_proj.weight", "D KGH", ours + "attention.wo", "KGHD"),
             Row(layer + "self_attn.o_proj.bias", "D", ours + "attention.o_bias", "D"),
             Row(layer + "post_attention_layernorm.weight", "D", ours + "mlp_norm.scale", "D")]
    for one, axes, letters in (("gate", "F D", "DF"), ("up", "F D", "DF"), ("down", "D F", "FD")):
        rows.append(Row(f"{layer}mlp.{one}_proj.weight", axes, f"{ours}mlp.w_{one}", letters))
        rows.append(Row(f"{layer}mlp.{one}_proj.bias", axes[0], f"{ours}mlp.{one}_bias", axes[0]))
    rows += [Row("model.norm.weight", "D", "transformer.final_norm.scale", "D"),
             Row("lm_head.weight", "V D", "embed.head", "VD")]
    return tuple(r for r in rows if biases or not r.key.endswith("bias"))


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
        "LlamaForCausalLM", "model.", _llama(biases=True), _LLAMA_FIXED,
        settings=(*_LLAMA_SETTINGS, ("attention_bias", "qkv_bias", False),
                  ("attention_bias", "attention_out_bias", False), ("mlp_bias", "mlp_bias", False)),
        only={"rope_interleaved": False},
        # pretraining_tp cuts the same products into parts; is_llama_config marks a conversion (SmolLM2).
        harmless=("attention_dropout", "pretraining_tp", "is_llama_config"), buffers=_LLAMA_BUFFERS),
    "mistral": Family(
        "MistralForCausalLM", "model.", _llama(biases=False), _LLAMA_FIXED,
        settings=tuple((key, field, {"intermediate_size": 14336, "num_key_value_heads": 8,
                                     "max_position_embeddings": 4096 * 32}.get(key, default))
                       for key, field, default in _LLAMA_SETTINGS),
        harmless=("attention_dropout",), window=True, buffers=_LLAMA_BUFFERS),
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
    config.name = folder.path.resolve().name.removesuffix(".gguf")
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
    known = {key for key, _, _ in family.settings} | HARMLESS | {*family.harmless, *family.only}
    known |= {"rope_theta", "rope_scaling", "rope_parameters"} if family.fixed["position"] == "rope" else set()
    known |= {"sliding_window"} if family.window else set()
    wrong = [f"{k}={v!r}" for k, v in settings.items() if k not in known and v is not None]
    wrong += [f"{k}={settings[k]!r}" for k, v in family.only.items() if settings.get(k, v) != v]
    if wrong:
        raise UserError(f"{place}: this model cannot be computed here with {', '.join(wrong)}")
    fields, plain = dict(family.fixed), Architecture()
    for key, field, default in family.settings:
        value = settings.get(key)
        value = default if value is None else value
        if field == "activation":
            value = ACTIVATIONS[choose(value, ACTIVATIONS, f"{place}: {key}")]
        kind = type(getattr(plain, field))
        if value is not None and type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{place}: {key}={value!r}: expected {kind.__name__}")
        fields[field] = 0 if value is None else value   # 0: derived from the others
    if family.fixed["position"] == "rope":
        fields |= _rope(settings, fields["max_seq_len"], place)
    if family.window and settings.get("sliding_window", 4096) is not None:
        fields |= {"layer_pattern": ("local",), "window": settings.get("sliding_window", 4096)}
    try:
        return Architecture(**fields)
    except UserError as e:
        raise UserError(f"{place}: {e}") from None


def _rope(settings, max_seq_len, place):
    """Returns the fields rope_theta and rope_scaling of Architecture. The newest spelling is `rope_parameters`."""
    rope = {k: v for k, v in (settings.get("rope_parameters") or settings.get("rope_scaling") or {}).items()
            if v is not None}
    for key, value in {"rope_theta": settings.get("rope_theta"), **rope}.items():
        if value is not None and key not in ("rope_type", "type", "truncate") and type(value) not in (int, float):
            raise UserError(f"{place}: {key}={value!r}: expected a number")
    theta = rope.pop("rope_theta", settings.get("rope_theta") or 10000.0)
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
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{place}: this model cannot be computed here with a partial_rotary_factor other than 1")
    for key, value in rope.items():
        if _ROPE_KEYS.get(key) not in known:
            raise UserError(f"{place}: this model cannot be computed here with {key}={value!r} in its rope scaling "
                            f"({kind})")
        scaling[_ROPE_KEYS[key]] = value
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def settings_of(arch: Architecture) -> dict:
    """Returns the config.json of an architecture, without its special tokens.

    Rotary settings and dtype are spelt as in transformers 4, which 5 reads too. A family can express a model if what
    it would write is read back as the same model.

    Raises:
      UserError: no family can; the fields that the nearest cannot express are named.
    """
    failed = {}
    for name in FAMILIES:
        settings = _express(name, arch)
        failed[name] = _lost(arch, settings)
        if not failed[name]:
            return settings
    nearest = min(failed, key=lambda name: len(failed[name]))
    raise UserError(f"no Hugging Face family here ({', '.join(FAMILIES)}) can express this model; {nearest} comes "
                    f"nearest, without {', '.join(failed[nearest])}")


def _express(name, arch):
    family = FAMILIES[name]
    settings = {"model_type": name, "architectures": [family.architecture]}
    spelt = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    for key, field, _ in family.settings:
        value = getattr(arch, field)
        settings[key] = spelt[value] if field == "activation" else value
    if family.fixed["position"] == "rope":
        kind = arch.rope_scaling.get("type", "none")
        values = {**ROPE_SCALINGS.get(kind, {}), **arch.rope_scaling}
        settings["rope_theta"] = arch.rope_theta
        settings["rope_scaling"] = None if kind == "none" else {"rope_type": kind} | {
            theirs: values[ours] for theirs, ours in _ROPE_KEYS.items() if values.get(ours)}
    if family.window:
        settings["sliding_window"] = arch.window if set(arch.layer_kinds) == {"local"} else None
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
    where = {}   # name of ours -> [(entry, row, start, stop) of each layer]
    for tensor in tensors:
        for row, start, stop in tensor.parts:
            where.setdefault(row.name, []).append((entries[tensor.key], row, start, stop))
    sizes = _sizes(arch)

    def read(name, leaf):
        layered = "{}" in where[name][0][1].key

        def piece(index):
            parts, inside = (where[name][index[0]], index[1:]) if layered else (where[name], index)
            out = [_view(part, sizes)[inside].astype(leaf.dtype) for part in parts]
            for (entry, *_), array in zip(parts, out):
                if not np.isfinite(array).all():
                    raise UserError(f"{entry.path}: {entry.key} has values that are not finite")
            return np.stack(out) if layered else out[0]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, piece)

    return tree.map_named(read, abstract)


class _Tensor(NamedTuple):
    key: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Row, int, int], ...]   # with the place of each along the axis marked "+"


def _tensors(family, arch, names):
    """Returns the tensors that a model of the family with our parameters `names` has, in the table's order."""
    groups, sizes, out = {}, _sizes(arch), []
    for row in family.rows:
        if row.name in names:
            groups.setdefault(row.key, []).append(row)
    for key, rows in groups.items():
        parts, stop = [], 0
        for row in rows:
            shape = _shape(row, sizes)
            start, stop = stop, stop + shape[_joint(row)]
            parts.append((row, start, stop))
        shape[_joint(rows[0])] = stop
        keys = [key.format(i) for i in range(arch.num_layers)] if "{}" in key else [key]
        out += [_Tensor(k, tuple(shape), tuple(parts)) for k in keys]
    return out


def _sizes(a):
    return {"V": a.vocab_size, "D": a.embed_dim, "K": a.num_kv_heads, "G": a.groups, "H": a.head_dim, "F": a.mlp_dim,
            "P": a.max_seq_len}


def _shape(row, sizes):
    return [math.prod(sizes[c] for c in axis.strip("+")) for axis in row.axes.split()]


def _joint(row):
    """Returns the axis along which rows of one tensor follow each other."""
    return next((i for i, axis in enumerate(row.axes.split()) if axis.startswith("+")), 0)


def _view(part, sizes):
    """Returns a row's parameter as a view of the file."""
    entry, row, start, stop = part
    array = entry.read()[(slice(None),) * _joint(row) + (slice(start, stop),)]
    letters = re.sub("[ +]", "", row.axes)
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
    entries = {key: headers[name][key] for key, name in files.items()}
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

def save(folder, arch: Architecture, params, tokenizer, *, file_bytes: int = FILE_BYTES) -> str:
    """Returns a line on the tokenizer; writes a folder that transformers opens, whole or not at all.

    params: NumPy arrays, float32, bfloat16 or float16; stored as they are.

    Raises:
      UserError: no family can express the model; the folder exists; a parameter has another dtype.
    """
    folder = pathlib.Path(folder)
    settings = settings_of(arch)
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
    layers, room = {}, file_bytes
    for tensor in _tensors(family, arch, names):
        first = tensor.parts[0][0]
        layer = layers[first.key] = layers.get(first.key, -1) + 1

        def make(tensor=tensor, layer=layer):
            return np.concatenate([_tensor(names[row.name], layer, row, sizes) for row, _, _ in tensor.parts],
                                  axis=_joint(tensor.parts[0][0]))

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


def _tensor(array, layer, row, sizes):
    """Returns the tensor, or part of one, that a row's parameter makes: the inverse of `_view`."""
    array = array[layer] if "{}" in row.key else array
    letters = re.sub("[ +]", "", row.axes)
    return array.transpose([row.letters.index(c) for c in letters]).reshape(_shape(row, sizes))


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

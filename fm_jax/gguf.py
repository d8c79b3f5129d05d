"""What a GGUF file holds, in the words of a Hugging Face folder: settings, tensors, tokenizer files. Layer 2.

llama.cpp's format of one file, often quantised; `hf` reads it like a folder. Needs the package of
the same name (`pip install 'fm_jax[gguf]'`), which maps the file and dequantises.

    python -m fm_jax.convert --from_hf model.gguf --workdir runs/imported
"""

import json
import re
from typing import Callable, NamedTuple

import numpy as np

from fm_jax import tokenizer as tokenizers
from fm_jax.errors import UserError, choose

# Settings: their names after the architecture's and those of Hugging Face's config.
SETTINGS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}
HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")   # all one number here
TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}
# general.architecture, which is model_type too: whether llama.cpp rotates neighbouring channels, and stores queries and
# keys in that order.
PAIRS = {"llama": True, "qwen2": False, "qwen3": False}
# How text is cut before the merges. Source: llama.cpp, src/llama-vocab.cpp, in the words of tokenizers.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "qwen2": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+")}},
        _BYTE_LEVEL | {"use_regex": False}]},
}
NORMALIZERS = {"qwen2": {"type": "NFC"}}   # of the models' own tokenizers; llama.cpp has none


class File(NamedTuple):
    settings: dict                                        # a config.json
    tensors: dict[str, tuple[tuple[int, ...], Callable]]  # Hugging Face key -> (shape, function that dequantises it)
    tokenizer: Callable                                   # returns tokenizer.json and tokenizer_config.json, as bytes


def read(path) -> File:
    """Returns what the file holds. Tensors are dequantised to float32 when their function is called.

    Raises:
      UserError: the package is not installed; no GGUF file; another architecture, setting or tokenizer.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading GGUF needs the package gguf: pip install 'fm_jax[gguf]'") from None
    try:
        reader = GGUFReader(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, IndexError, KeyError) as e:   # what it raises for a file that is cut short, too
        raise UserError(f"{path}: not a GGUF file, or cut short ({e})") from None
    # Not the tokenizer's, of a string for each token: a second for 49,152 of them.
    fields = {key: field.contents() for key, field in reader.fields.items() if len(field.data) < 100}
    family = choose(fields.get("general.architecture"), PAIRS, f"{path}: general.architecture")
    own = {key.removeprefix(f"{family}."): value for key, value in fields.items() if key.startswith(f"{family}.")}
    head_dim = next((own[key] for key in HEAD_DIM if key in own), None)
    unknown = [f"{family}.{k}={v!r}" for k, v in own.items() if v != head_dim and k in HEAD_DIM or (
        k not in SETTINGS and k not in HEAD_DIM)]
    if unknown:
        raise UserError(f"{path}: this model cannot be computed here with {', '.join(unknown)}")
    names = {t.name: t for t in reader.tensors}
    settings = {"model_type": family, "head_dim": head_dim, "tie_word_embeddings": "output.weight" not in names,
                **{SETTINGS[k]: v for k, v in own.items() if k in SETTINGS},
                **{f"{which}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id")
                   for which, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}}
    if "token_embd.weight" in names:
        settings.setdefault("vocab_size", int(names["token_embd.weight"].shape[1]))
    heads = {"attn_q": settings["num_attention_heads"],
             "attn_k": settings.get("num_key_value_heads", settings["num_attention_heads"])} if PAIRS[family] else {}

    def make(tensor, kind):
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if kind in heads:   # from pairs to halves
            array = array.reshape(heads[kind], -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    tensors = {}
    for name, tensor in names.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        kind = match and match[2]
        layer = f"model.layers.{match[1]}." if match and match[1] else ""
        key = f"{layer}{TENSORS[kind]}.{match[3]}" if kind in TENSORS else name   # the unknown are left over, then
        tensors[key] = tuple(map(int, tensor.shape[::-1])), lambda tensor=tensor, kind=kind: make(tensor, kind)
    return File(settings, tensors, lambda: _tokenizer(reader, path, own.get("context_length")))


def _tokenizer(reader, path, longest):
    fields = {key: field.contents() for key, field in reader.fields.items()}
    f = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    choose(f.get("model"), ("gpt2",), f"{path}: tokenizer.ggml.model")   # byte-level BPE
    pre = choose(f.get("pre"), PRE_TOKENIZERS, f"{path}: tokenizer.ggml.pre")
    if f.get("add_bos_token") or f.get("add_eos_token"):
        raise UserError(f"{path}: its tokenizer adds tokens around every text, which is not read here")
    # Types: 1 normal, 3 control, 4 user-defined; the latter two are never cut.
    added = {i: piece for i, (piece, kind) in enumerate(zip(f["tokens"], f["token_type"])) if kind in (3, 4)}
    vocab, merges = {piece: i for i, piece in enumerate(f["tokens"])}, [m.split(" ") for m in f["merges"]]
    content = tokenizers.bpe_json(vocab, merges, added, plain=[i for i in added if f["token_type"][i] == 4],
                                  normalizer=NORMALIZERS.get(pre), pre_tokenizer=PRE_TOKENIZERS[pre],
                                  decoder=_BYTE_LEVEL)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest}
    for which, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if f"{name}_token_id" in f:
            settings[f"{which}_token"] = f["tokens"][f[f"{name}_token_id"]]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    as_bytes = lambda value: json.dumps(value, ensure_ascii=False).encode()
    return {"tokenizer.json": as_bytes(content), "tokenizer_config.json": as_bytes(settings)}

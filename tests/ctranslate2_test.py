"""A CTranslate2 model of Whisper, written here from the format's description, is the Hugging Face model it was made of."""

import json
import pathlib
import re
import struct

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

import fm_jax
from fm_jax import ctranslate2
from fm_jax.errors import UserError
from fm_jax.hf import safetensors

MODEL = pathlib.Path(__file__).parent / "hf_models" / "whisper"


def variables():
    """Returns {name in CTranslate2: array} of the model: products of one matrix joined, keys with a bias of zeros."""
    w = {key: np.array(e.read()) for key, e in safetensors.read_folder(MODEL).items()}
    c = json.loads((MODEL / "config.json").read_text())
    out = {"decoder/embeddings/weight": w["model.decoder.embed_tokens.weight"]}
    for side in ("encoder", "decoder"):
        above = f"model.{side}."
        norm = lambda theirs, ours: {f"{theirs}/gamma": w[f"{ours}.weight"], f"{theirs}/beta": w[f"{ours}.bias"]}
        out[f"{side}/position_encodings/encodings"] = w[f"{above}embed_positions.weight"]
        out |= norm(f"{side}/layer_norm", f"{above}layer_norm")
        out[f"{side}/num_heads"] = np.int16(c[f"{side}_attention_heads"])
        for i in range(c[f"{side}_layers"]):
            theirs, ours = f"{side}/layer_{i}/", f"{above}layers.{i}."

            def product(name, *parts):
                bias = [w.get(f"{ours}{p}.bias", np.zeros(len(w[f"{ours}{p}.weight"]), np.float32)) for p in parts]
                return {f"{theirs}{name}/weight": np.concatenate([w[f"{ours}{p}.weight"] for p in parts]),
                        f"{theirs}{name}/bias": np.concatenate(bias)}

            out |= product("self_attention/linear_0", *(f"self_attn.{p}_proj" for p in "qkv"))
            out |= product("self_attention/linear_1", "self_attn.out_proj")
            out |= norm(theirs + "self_attention/layer_norm", ours + "self_attn_layer_norm")
            if side == "decoder":
                out |= product("attention/linear_0", "encoder_attn.q_proj")
                out |= product("attention/linear_1", "encoder_attn.k_proj", "encoder_attn.v_proj")
                out |= product("attention/linear_2", "encoder_attn.out_proj")
                out |= norm(theirs + "attention/layer_norm", ours + "encoder_attn_layer_norm")
            out |= product("ffn/linear_0", "fc1") | product("ffn/linear_1", "fc2")
            out |= norm(theirs + "ffn/layer_norm", ours + "final_layer_norm")
    for conv in ("conv1", "conv2"):
        out |= {f"encoder/{conv}/{kind}": w[f"model.encoder.{conv}.{kind}"] for kind in ("weight", "bias")}
    return out | {"decoder/pre_norm": np.int8(1), "decoder/activation": np.int8(3), "decoder/alignment_layer": np.int16(1)}


def write(folder, arrays, version=6, spec="WhisperSpec"):
    text = lambda s: struct.pack("<H", len(s) + 1) + s.encode() + b"\0"
    types = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    out = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(arrays))
    for name, a in sorted(arrays.items()):
        a = a.astype(np.float16) if a.dtype == np.float32 else a
        out += text(name) + struct.pack(f"<B{a.ndim}I", a.ndim, *a.shape)
        out += struct.pack("<BI", types[a.dtype.name], a.nbytes) + a.tobytes()
    out += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(out)
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [3, 5], "suppress_ids_begin": [7], "lang_ids": []}))
    words = hf_tokenizers.models.WordLevel({f"w{i}": i for i in range(41)}, unk_token="w0")
    hf_tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder


def test_it_is_the_model_it_was_made_of(tmp_path):
    (tmp_path / "there").mkdir()
    for file in MODEL.iterdir():
        (tmp_path / "there" / file.name).write_bytes(file.read_bytes())
    folder = write(tmp_path / "made", variables())
    (tmp_path / "there" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    want, got = fm_jax.load(tmp_path / "there"), fm_jax.load(folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).astype(np.float16), b), want.params, got.params)
    assert want.objective.arch == got.objective.arch and want.objective.encoder == got.objective.encoder
    assert (got.objective.suppress_ids, got.objective.begin_suppress_ids) == ([3, 5], [7])


def test_damage_and_what_is_not_read_are_named(tmp_path):
    whole = variables()
    bias = "decoder/layer_1/self_attention/linear_0/bias"
    for changes, how, message in [
            ({}, dict(version=5), "of version 5"), ({}, dict(spec="TransformerSpec"), "model: unknown 'TransformerSpec'"),
            ({"decoder/pre_norm": np.int8(0)}, {}, "with decoder/pre_norm=0"),
            ({"encoder/conv1/weight": np.zeros((20, 7, 3), np.int8)}, {}, "encoder/conv1/weight is quantised to int8"),
            ({bias: whole[bias] + 1}, {}, "keys have a bias"), ({"decoder/extra/weight": np.zeros(3, np.float32)}, {},
                                                                "model.decoder.extra.weight is left over")]:
        with pytest.raises(UserError, match=re.escape(message)):
            fm_jax.load(write(tmp_path / "made", whole | changes, **how))
    folder = write(tmp_path / "made", whole)
    content = (folder / "model.bin").read_bytes()
    for cut in (len(content) // 2, 50, len(content) - 3):   # such as without its second half
        (folder / "model.bin").write_bytes(content[:cut])
        with pytest.raises(UserError, match="both halves"):
            ctranslate2.read(folder)
    (folder / "model.bin").write_bytes(content)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no config.json of a CTranslate2 Whisper.*suppress_ids"):
        fm_jax.load(folder)

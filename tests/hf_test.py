"""Hugging Face folders in and out: against NumPy models written from that side's layout, and transformers itself."""

import errno
import io
import json
import lzma
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf_tokenizers

import fm_jax
from fm_jax import config as config_lib
from fm_jax import hf, objectives, pretrained, sharding, tree
from fm_jax import tokenizer as tokenizers
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 24,
         "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
         "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
         "rope_theta": 5000.0, "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0,
         "eos_token_id": 0}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_embd": 24, "n_layer": 2,
        "n_head": 3, "n_positions": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "n_ctx": 64, "bos_token_id": 0, "eos_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
# All sizes odd in some way: kv heads != heads, head_dim != D / N, windows shorter than the input.
CASES = {
    "gpt2": GPT2,
    "gpt2 untied, wide mlp, erf": GPT2 | {"tie_word_embeddings": False, "n_inner": 56, "activation_function": "gelu"},
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 6},
    "llama biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 10},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama llama3": LLAMA | {"rope_scaling": LLAMA3},
    "llama yarn": LLAMA | {"rope_scaling": YARN},
    "llama yarn given": LLAMA | {"rope_scaling": YARN | {"attention_factor": 0.9, "beta_slow": 2.0}},
    "mistral": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "mistral global": LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                               "sliding_window": None},
}
PLAIN = ["gpt2", "gpt2 untied, wide mlp, erf", "llama", "llama tied", "llama biases", "llama linear", "mistral"]


def shapes(c):
    """Returns {key: shape} of the family's tensors, as transformers lays them out."""
    if c["model_type"] == "gpt2":
        D, F, V = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"], c["vocab_size"]
        out = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (c["n_positions"], D)}
        for i in range(c["n_layer"]):
            h = f"transformer.h.{i}."
            for norm in ("ln_1", "ln_2"):
                out |= {f"{h}{norm}.weight": (D,), f"{h}{norm}.bias": (D,)}
            for name, n, m in (("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, F),
                               ("mlp.c_proj", F, D)):
                out |= {f"{h}{name}.weight": (n, m), f"{h}{name}.bias": (m,)}
        out |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
        return out if c.get("tie_word_embeddings", True) else out | {"lm_head.weight": (V, D)}
    D, F, V = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        out |= {f"{h}input_layernorm.weight": (D,), f"{h}post_attention_layernorm.weight": (D,)}
        for name, n, m in (("q", D, q), ("k", D, kv), ("v", D, kv), ("o", q, D)):
            out[f"{h}self_attn.{name}_proj.weight"] = (m, n)
            if c.get("attention_bias"):
                out[f"{h}self_attn.{name}_proj.bias"] = (m,)
        for name, n, m in (("gate", D, F), ("up", D, F), ("down", F, D)):
            out[f"{h}mlp.{name}_proj.weight"] = (m, n)
            if c.get("mlp_bias"):
                out[f"{h}mlp.{name}_proj.bias"] = (m,)
    return out if c["tie_word_embeddings"] else out | {"lm_head.weight": (V, D)}


def weights(c, seed=0):
    rng = np.random.default_rng(seed)
    norm = lambda key: "norm" in key or "ln_" in key
    return {key: (rng.normal(0, 0.15, shape) + (norm(key) and key.endswith("weight"))).astype(np.float32)
            for key, shape in shapes(c).items()}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q, k, v, window):
    """q, k, v [heads, T, head_dim] to [T, heads * head_dim]."""
    T = q.shape[1]
    t, s = np.arange(T)[:, None], np.arange(T)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    scores = np.where((s <= t) & (s > t - window), scores, -np.inf)
    return (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, -1)


def naive_logits(c, w, tokens):
    """Returns float64 logits [T, V] of one sequence, from tensors and settings as the family has them."""
    w, T = {k: v.astype(np.float64) for k, v in w.items()}, len(tokens)
    split = lambda x, n: x.reshape(T, n, -1).transpose(1, 0, 2)
    if c["model_type"] == "gpt2":
        def norm(x, name):
            x = x - x.mean(-1, keepdims=True)
            return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
        erf = np.vectorize(math.erf)
        gelu = {"gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
                "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))}
        conv = lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"]
        x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][:T]
        for i in range(c["n_layer"]):
            h = f"transformer.h.{i}."
            q, k, v = (split(y, c["n_head"]) for y in np.split(conv(norm(x, h + "ln_1"), h + "attn.c_attn"), 3, axis=1))
            x = x + conv(attend(q, k, v, T), h + "attn.c_proj")
            hidden = gelu[c["activation_function"]](conv(norm(x, h + "ln_2"), h + "mlp.c_fc"))
            x = x + conv(hidden, h + "mlp.c_proj")
        return norm(x, "transformer.ln_f") @ w.get("lm_head.weight", w["transformer.wte.weight"]).T
    norm = lambda x, name: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[f"{name}.weight"]
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    H = c["head_dim"]
    angle = np.arange(T)[:, None] * c["rope_theta"] ** (-np.arange(0, H, 2) / H)
    angle = np.tile(angle / (c.get("rope_scaling") or {"factor": 1})["factor"], 2)   # plain or linear
    turn = lambda x: x * np.cos(angle) + np.concatenate([-x[..., H // 2 :], x[..., : H // 2]], -1) * np.sin(angle)
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        y = norm(x, h + "input_layernorm")
        n, m = c["num_attention_heads"], c["num_key_value_heads"]
        q, k, v = (split(linear(y, f"{h}self_attn.{p}_proj"), heads) for p, heads in (("q", n), ("k", m), ("v", m)))
        k, v = (np.repeat(one, n // m, axis=0) for one in (turn(k), v))
        x = x + linear(attend(turn(q), k, v, c.get("sliding_window") or T), h + "self_attn.o_proj")
        y = norm(x, h + "post_attention_layernorm")
        gate = linear(y, h + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, h + "mlp.up_proj"), h + "mlp.down_proj")
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def write_safetensors(path, arrays):
    """Written from the format's description; the header is not padded, so that nothing is aligned."""
    header, at = {}, 0
    for key, a in arrays.items():
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}[a.dtype.name]
        header[key] = {"dtype": kind, "shape": a.shape, "data_offsets": (at, at := at + a.nbytes)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values()))


def read_safetensors(path):
    """Returns {key: (dtype, shape, bytes)}."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8 : 8 + size]), data[8 + size :]
    assert size % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}   # transformers asks for it
    return {k: (t["dtype"], tuple(t["shape"]), data[slice(*t["data_offsets"])]) for k, t in header.items()}


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """A byte-level BPE of 300 ids with one special token."""
    model = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    model.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(["the cat sat on the mat and the dog sat on the log 1212"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path


@pytest.fixture
def folder(tmp_path, tokenizer_files):
    """Returns a function that makes a folder of Hugging Face weights: (settings, arrays, name) to its path."""
    def make(c, arrays=None, name="there"):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(c))
        write_safetensors(path / "model.safetensors", weights(c) if arrays is None else arrays)
        shutil.copy(tokenizer_files, path / "tokenizer.json")
        return path
    return make


ARCH = Architecture(vocab_size=640, num_layers=1, embed_dim=8, num_heads=2, max_seq_len=8)


def config_of(arch):
    config = config_lib.defaults()
    config_lib.override(config, {f"model.{f}": getattr(arch, f) for f in config.model})
    config.seq_len = arch.max_seq_len
    return config


def abstract_params(arch):
    return sharding.unbox(jax.eval_shape(objectives.load(config_of(arch)).init, jax.random.key(0)))[0]


def tokens(n=2, length=19):
    return np.random.default_rng(1).integers(0, 300, (n, length))


def refuses(path, pattern):
    with pytest.raises(UserError, match=pattern) as error:
        fm_jax.load(path)
    return str(error.value)


# --- In -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", PLAIN)
def test_logits_are_those_of_numpy_on_the_same_tensors(case, folder):
    c, t = CASES[case], tokens()
    got = fm_jax.load(folder(c)).logits(t)
    want = np.stack([naive_logits(c, weights(c), row) for row in t])
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-4)   # float32 against float64


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_files_of_the_bare_model_open_too(case, folder):
    """Published GPT-2 names no `transformer.`, and brings masks that are no parameters."""
    c = CASES[case] | {"tie_word_embeddings": True}
    prefix = hf.FAMILIES[case].prefix
    bare = {key.removeprefix(prefix): a for key, a in weights(c).items()}
    buffer = "h.0.attn.bias" if case == "gpt2" else "layers.0.self_attn.rotary_emb.inv_freq"
    bare[buffer] = np.ones((1, 1, 64, 64), np.uint8)
    got, want = (fm_jax.load(folder(c, a, n)).params for a, n in ((bare, "bare"), (weights(c), "full")))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype, want", [("bfloat16", "bfloat16"), ("float16", "float32")])
def test_no_bit_of_the_stored_weights_is_lost(dtype, want, folder):
    arrays = {k: a.astype(jnp.dtype(dtype)) for k, a in weights(LLAMA).items()}
    lm = fm_jax.load(folder(LLAMA, arrays))
    assert (lm.config.model.param_dtype, lm.config.model.dtype) == (want, dtype)
    embedding = np.asarray(lm.params["embed"]["tokens"])
    assert embedding.dtype.name == want
    np.testing.assert_array_equal(embedding.astype(np.float32), arrays["model.embed_tokens.weight"].astype(np.float32))
    wide = pretrained.load_hf(folder(LLAMA, arrays, "again"), dtype="float32")
    want = naive_logits(LLAMA, {k: a.astype(np.float32) for k, a in arrays.items()}, tokens()[0])
    np.testing.assert_allclose(wide.logits(tokens())[0], want, atol=2e-4)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_gives_the_same_logits(mesh, folder):
    path = folder(LLAMA)
    lm, other = fm_jax.load(path), fm_jax.load(path, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, lm.params, other.params)
    wq = other.params["transformer"]["layers"]["attention"]["wq"]
    assert wq.addressable_shards[0].data.size < wq.size
    np.testing.assert_allclose(other.logits(tokens(8)), lm.logits(tokens(8)), atol=2e-4)   # sums in another order


def test_settings_become_fields():
    """Each against the sentence of the family's documentation; the defaults are transformers' where a key lacks."""
    read = lambda changes, family="llama": hf.model_of({"model_type": family, **changes}, "config.json").stacks["model"]
    a = read({})
    assert (a.vocab_size, a.embed_dim, a.mlp_dim, a.num_layers, a.num_kv_heads, a.head_dim) == (
        32000, 4096, 11008, 32, 32, 128)
    assert not a.tie_embeddings and a.norm_eps == 1e-6 and a.rope_theta == 1e4
    assert read({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta == 7
    assert read({"rope_scaling": LLAMA3}).rope_scaling == {
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 32}
    assert read({"rope_scaling": {"type": "yarn", "factor": 2.0}}).rope_scaling["original_max_seq_len"] == 2048
    mscale = {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    assert read({"rope_scaling": mscale}).rope_scaling["attention_factor"] == pytest.approx(
        (0.1 * np.log(2) + 1) / (0.05 * np.log(2) + 1))
    assert read({}, "mistral").layer_pattern == ("local",) and read({}, "mistral").window == 4096
    a = read({}, "gpt2")
    assert (a.vocab_size, a.embed_dim, a.mlp_dim, a.max_seq_len, a.activation, a.tie_embeddings) == (
        50257, 768, 3072, 1024, "gelu_tanh", True)


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mamba"}, "config.json: model_type: unknown 'mamba'.*known: gpt2, llama, mistral"),
    ({"quantization_config": {"bits": 4}}, "cannot be computed here with quantization_config="),
    ({"rope_interleaved": True}, "with rope_interleaved=True"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling: unknown 'dynamic'"),
    ({"rope_scaling": YARN | {"truncate": False}}, "truncate=False"),
    ({"rope_scaling": {"type": "linear"}}, "lacks its factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2': expected a number"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"hidden_act": "mish"}, "hidden_act: unknown 'mish'"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers='3': expected int"),
    ({"num_key_value_heads": 4}, "config.json: .*must divide num_heads=6"),
])
def test_a_setting_that_cannot_be_honoured_is_named(changes, message, folder):
    refuses(folder(LLAMA | changes, weights(LLAMA)), message)


def test_wrong_tensors_are_listed(folder):
    arrays = weights(LLAMA)
    renamed = {k.replace("q_proj", "query").replace("k_proj", "key"): a for k, a in arrays.items()}
    text = refuses(folder(LLAMA, renamed, "a"), "q_proj.weight is missing.*; and 2 more")
    assert text.count("; ") == 10   # ten of them, and how many more
    wrong = arrays | {"model.norm.weight": arrays["model.norm.weight"][:-1], "score.weight": np.zeros(3, np.float32)}
    refuses(folder(LLAMA, wrong, "b"),
            r"model.norm.weight has shape \[23\] instead of \[24\]; score.weight is left over")
    integers = arrays | {"model.norm.weight": np.zeros(24, np.uint8)}
    refuses(folder(LLAMA, integers, "c"), "model.norm.weight is of type U8, not one of F32, F16, BF16")
    arrays["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    refuses(folder(LLAMA, arrays, "d"), "model.layers.1.mlp.up_proj.weight has values that are not finite")


def test_the_head_of_a_tied_model_may_be_stored_if_it_is_the_embedding(folder):
    c = CASES["llama tied"]
    arrays = weights(c)
    fm_jax.load(folder(c, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, "same"))
    refuses(folder(c, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"] + 1}, "other"),
            "lm_head.weight is left over")


def test_damaged_files_are_named(folder, tmp_path):
    path = folder(LLAMA) / "model.safetensors"
    whole = path.read_bytes()
    for content, message in [(whole[:-5], "model.safetensors: cut short: .*copy it again"),
                             (whole[:5], "not a safetensors file, or cut short"),
                             (whole[:500], "not a safetensors file, or cut short"),
                             (b"\x08" + b"\0" * 7 + b"notjson!" + whole, "not a safetensors file"),
                             (whole.replace(b'"F32"', b'"F16"'), "damaged: .* of type F16")]:
        path.write_bytes(content)
        refuses(path.parent, message)
    path.rename(path.with_name("pytorch_model.bin"))
    refuses(path.parent, "no model.safetensors here; pytorch_model.bin is a pickle.*never read")
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    refuses(path.parent, "not an index")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    refuses(path.parent, "gone.safetensors: no such file")
    (path.parent / "config.json").write_text('{"model_type"')
    refuses(path.parent, "config.json: not a JSON file")
    with pytest.raises(UserError, match="step=3: a folder of Hugging Face weights has no checkpoints"):
        fm_jax.load(folder(LLAMA, name="other"), step=3)


# --- Out ------------------------------------------------------------------------------------------------------------

def numpy_params(lm):
    return jax.tree.map(np.asarray, lm.params)


@pytest.mark.parametrize("case", CASES)
def test_out_is_what_came_in(case, folder, tmp_path):
    """To the last bit of every tensor, and to the meaning of every setting."""
    c = CASES[case]
    lm = fm_jax.load(folder(c))
    lm.config.hf_family = ""
    hf.save(tmp_path / "out", lm.config, numpy_params(lm), lm.tokenizer)
    found = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert found == {k: ("F32", a.shape, a.tobytes()) for k, a in weights(c).items()}
    family = c["model_type"] if case != "mistral global" else "llama"   # which it is, then
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (0, None)
    assert hf.read_config(hf.open_folder(tmp_path / "out")).model == lm.config.model
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_several_files_hold_the_same(folder, tmp_path):
    arrays = {k: a.astype(jnp.bfloat16) for k, a in weights(LLAMA).items()}
    lm = fm_jax.load(folder(LLAMA, arrays))
    hf.save(tmp_path / "out", lm.config, numpy_params(lm), lm.tokenizer, file_bytes=6000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    found = {k: (v, f.name) for f in files for k, v in read_safetensors(f).items()}
    assert {k: v for k, (v, _) in found.items()} == {k: ("BF16", a.shape, a.tobytes()) for k, a in arrays.items()}
    assert {k: name for k, (_, name) in found.items()} == index["weight_map"]
    # A tensor larger than a file's limit has one to itself.
    assert all(sum(len(b) for _, _, b in read_safetensors(f).values()) <= 6000 or len(read_safetensors(f)) == 1
               for f in files)
    jax.tree.map(np.testing.assert_array_equal, fm_jax.load(tmp_path / "out").params, lm.params)


@pytest.mark.parametrize("changes, message", [
    ({"qk_norm": "head", "mlp_bias": True}, "llama comes nearest, without qk_norm='head'"),
    ({"causal": False}, "without causal=False"),
    ({"logit_softcap": 30.0}, "without logit_softcap=30.0"),
    ({"qkv_bias": True, "mlp_bias": True}, "without qkv_bias=True"),
    ({"layer_pattern": ("local", "global"), "window": 4, "mlp_bias": True}, "without layer_pattern=.*, window=4"),
    ({"norm": "layernorm"}, "without norm='layernorm'"),
    ({"embed_dim": 25, "head_dim": 8, "mlp_bias": True}, "without embed_dim=25 that num_heads=6 does not divide"),
    ({"position": "none"}, "without position='none'"),
    ({"embed_scale": 4.0}, "without embed_scale=4.0"),
])
def test_what_no_family_can_express_is_named(changes, message):
    small = dict(vocab_size=300, num_layers=2, embed_dim=24, num_heads=6)
    with pytest.raises(UserError, match=message):
        hf.settings_of(config_of(Architecture(**small | changes)))


@pytest.mark.parametrize("changes, family", [
    ({}, "llama"), ({"layer_pattern": ("local",), "window": 4}, "mistral"), ({"qkv_bias": True}, "qwen2"),
    ({"layer_pattern": ("local", "global"), "window": 4, "qk_norm": "head"}, "qwen3"),
    ({"num_experts": 4}, "mixtral"), ({"num_experts": 4, "qk_norm": "head"}, "qwen3_moe")])
def test_a_model_is_exported_as_the_first_family_that_can_express_it(changes, family):
    arch = Architecture(**dict(vocab_size=300, num_layers=2, embed_dim=24, num_heads=6) | changes)
    config = config_of(arch)
    assert hf.settings_of(config)["model_type"] == family
    config.hf_family = "lama"
    with pytest.raises(UserError, match="hf_family: unknown 'lama'; did you mean 'llama'"):
        hf.settings_of(config)


def test_a_folder_that_is_not_empty_is_left_alone(folder):
    path = folder(LLAMA)
    lm, before = fm_jax.load(path), sorted(p.name for p in path.iterdir())
    with pytest.raises(UserError, match="exists already and is not empty"):
        hf.save(path, lm.config, numpy_params(lm), lm.tokenizer)
    assert sorted(p.name for p in path.iterdir()) == before
    broken = tree.map_named(lambda n, a: a.astype(np.float64) if "norm" in n else a, numpy_params(lm))
    with pytest.raises(UserError, match="dtype: unknown dtype..float64"):
        hf.save(path.parent / "new", lm.config, broken, lm.tokenizer)


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path):
    lm = fm_jax.load(folder(LLAMA))

    class Full:   # the tokenizer is the last to be written
        bos_id = eos_id = pad_id = None

        def save(self, folder):
            assert (folder / "model.safetensors").is_file()
            raise OSError(errno.ENOSPC, "No space left on device", "tokenizer.json")

    with pytest.raises(UserError, match="new: cannot be written .No space left on device: tokenizer.json"):
        hf.save(tmp_path / "new", lm.config, numpy_params(lm), Full())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        hf.save(tmp_path / "file" / "new", lm.config, numpy_params(lm), lm.tokenizer)


# --- Tokenizers -----------------------------------------------------------------------------------------------------

def test_special_tokens_and_template_come_from_wherever_they_are(folder, tmp_path):
    """Published GPT-2 names its end of text in config.json alone; newer folders keep the template in its own file."""
    path = folder(GPT2)
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = hf.read_tokenizer(hf.open_folder(path))
    assert tokenizer.eos_id == tokenizer.bos_id == 0 and tokenizer.pad_id is None
    tokenizer.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 64, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
                        "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<|endoftext|>"}))
    assert hf.read_tokenizer(hf.open_folder(path)).bos_id is None   # said to be without one
    lm = fm_jax.load(path)
    assert "chat template" in hf.save(tmp_path / "out", lm.config, numpy_params(lm), lm.tokenizer)
    assert hf.read_tokenizer(hf.open_folder(tmp_path / "out")).eos_id == 0
    (path / "tokenizer.json").unlink()
    refuses(path, "no tokenizer in this folder")


def some_texts():
    """Lines of Shakespeare, then blanks of all sorts, rare scripts, and random characters of every length in UTF-8."""
    play = lzma.decompress((pathlib.Path(fm_jax.__file__).parent / "data" / "shakespeare.txt.xz").read_bytes()).decode()
    rng = np.random.default_rng(0)
    noise = ["".join(map(chr, rng.choice([*range(1, 0x300), *range(0x4e00, 0x4f00), *range(0x1f600, 0x1f640)], 30)))
             for _ in range(50)]
    return [play[:50_000], *play[50_000:60_000].splitlines(keepends=True), "", " ", "  a  b\t\n\r\n ", "1234567",
            "aaaaaaaaaaa", *noise]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_our_own_tokenizers_become_a_tokenizer_json(kind, tmp_path):
    texts = some_texts()
    ours = tokenizers.load("bytes") if kind == "bytes" else tokenizers.train_sentencepiece(
        texts[0].splitlines(), 600, tmp_path / "trained")
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), abstract_params(ARCH))
    assert hf.save(tmp_path / "out", config_of(ARCH), params, ours) == "tokenizer: tokenizer.json"
    theirs = tokenizers.load(tmp_path / "out" / "tokenizer.json")
    assert (theirs.vocab_size, theirs.bos_id, theirs.eos_id, theirs.pad_id, theirs.fim_ids) == (
        ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id, ours.fim_ids)
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text).tolist() == ids.tolist(), text
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.token_text_bytes() == ours.token_text_bytes()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_our_own_tokenizers_frame_the_texts_of_an_exported_sentence_encoder(kind, tmp_path):
    """As `embed` does: sentence-transformers asks the tokenizer's file for it."""
    texts = some_texts()
    ours = tokenizers.load("bytes") if kind == "bytes" else tokenizers.train_sentencepiece(
        texts[0].splitlines(), 600, tmp_path / "trained")
    config = hf.read_config(hf.open_folder(MODELS / "sentence_bert"))
    config.model.vocab_size, config.hf_family = 640, ""
    objective = objectives.load(config, ours)
    params = sharding.unbox(objective.init(jax.random.key(0)))[0]
    hf.save(tmp_path / "out", config, jax.tree.map(np.asarray, params), ours)
    library = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ["", "To be", *texts[1:5]]:
        framed = [ours.bos_id, *ours.encode(text), ours.eos_id]
        assert library.encode(text).ids == framed and objective.text_ids([text])[0].tolist() == framed[:30][:-1] + [
            ours.eos_id]
    lm = fm_jax.load(tmp_path / "out")
    assert lm.tokenizer.frame == ours.frame and lm.config.hf_family == "BertModel"
    ids = objective.text_ids(["To be"])[0]
    want = jax.jit(objective.predict["embed"])(params, ids[None], np.array([len(ids)]))
    np.testing.assert_allclose(lm.embed(["To be"]), want, atol=1e-5)


def test_a_sentencepiece_model_that_normalises_stays_one(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(some_texts()[0].splitlines()), model_writer=model,
                                             vocab_size=400, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), abstract_params(ARCH))
    note = hf.save(tmp_path / "out", config_of(ARCH), params, tokenizers.load(tmp_path / "tokenizer.model"))
    assert "tokenizer.model alone" in note and not (tmp_path / "out" / "tokenizer.json").exists()


# --- What transformers computed with models of its own: `tests/peers/make_hf_models.py` ------------------------------

MODELS = pathlib.Path(__file__).parent / "hf_models"


SENTENCES = sorted(p.parent.name for p in MODELS.glob("*/modules.json"))
IMAGES = {p.parent.name for p in MODELS.glob("*/preprocessor_config.json")}   # in hf_vision_test.py


def with_words(name, tmp_path):
    """Returns a copy of a model's folder, with a tokenizer."""
    shutil.copytree(MODELS / name, tmp_path / "there")
    words = hf_tokenizers.models.WordLevel({f"w{i}": i for i in range(40)} | {"[MASK]": 40}, unk_token="w0")
    hf_tokenizers.Tokenizer(words).save(str(tmp_path / "there" / "tokenizer.json"))
    return tmp_path / "there"


@pytest.mark.parametrize("name", sorted({p.name for p in MODELS.iterdir()} - {*SENTENCES} - IMAGES))
def test_a_family_is_what_transformers_computes(name, tmp_path):
    """The same hidden states and logits; and exported, the same settings and the same bytes under the same keys."""
    with_words(name, tmp_path)
    expected, lm = np.load(tmp_path / "there" / "expected.npz"), fm_jax.load(tmp_path / "there")
    assert np.abs(expected["logits"]).max() > 3
    first = "frames" if "frames" in expected else "tokens"
    inputs = [expected[key] for key in (first, "decoder_tokens", "mask") if key in expected]
    np.testing.assert_allclose(lm.hidden(*inputs), expected["hidden"], atol=2e-4)
    np.testing.assert_allclose(lm.logits(*inputs), expected["logits"], atol=2e-4)
    hf.save(tmp_path / "back", lm.config, jax.tree.map(np.asarray, lm.params), lm.tokenizer)
    assert read_safetensors(tmp_path / "back" / "model.safetensors") == read_safetensors(
        tmp_path / "there" / "model.safetensors")
    there, back = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("there", "back"))
    models = [hf.model_of(hf.open_folder(tmp_path / side).settings, side) for side in ("there", "back")]
    assert models[0] == models[1]
    assert (back["model_type"], back["architectures"]) == (there["model_type"], there["architectures"])
    if not lm.objective.arch.causal:
        with pytest.raises(UserError, match="masked_lm.MaskedLM, which cannot score texts; it has embed, hidden, logits"):
            lm.score(["w1"], ["w2"])


@pytest.mark.parametrize("name", sorted({p.name for p in MODELS.iterdir()} - {*SENTENCES} - IMAGES))
def test_packed_and_padded_texts_are_what_they_are_alone(name, tmp_path):
    """Two texts in one row, and one before padding: hidden states as transformers has them of each text alone."""
    lm, expected = fm_jax.load(with_words(name, tmp_path)), np.load(MODELS / name / "expected.npz")
    if "decoder_tokens" in expected:
        pytest.skip("a source and a target: packed in tests/objectives/seq2seq_test.py")
    tokens, (a, b) = expected["tokens"], (13, 10)
    rows = np.array([[*tokens[0, :a], *tokens[1, :b]], [*tokens[1, :b], *tokens[0, b:]]])
    segments = np.array([[1] * a + [2] * b, [1] * b + [0] * (23 - b)])
    places = np.array([[*range(a), *range(b)], range(23)])
    apply = jax.jit(lambda p, *given: lm.module.apply({"params": p}, *given)[0])
    got = apply(lm.params, rows, places, segments)
    first = expected["first"] if "first" in expected else expected["hidden"][0, :a]     # causal: whatever follows
    second = expected["second"] if "second" in expected else expected["hidden"][1, :b]
    for found, want in ((got[0, :a], first), (got[0, a:], second), (got[1, :b], second)):
        np.testing.assert_allclose(found, want, atol=2e-4)


@pytest.mark.parametrize("name", SENTENCES)
def test_vectors_are_those_of_sentence_transformers(name, tmp_path):
    """Of a text with padding behind it, too; and exported, the same settings and bytes."""
    path, expected = with_words(name, tmp_path), np.load(MODELS / name / "expected.npz")
    lm = fm_jax.load(path)
    got = jax.jit(lm.objective.predict["embed"])(lm.params, expected["tokens"], expected["lengths"])
    np.testing.assert_allclose(got, expected["vectors"], atol=1e-5)
    assert lm.config.seq_len == 30
    texts = [" ".join(f"w{i}" for i in row[:n]) for row, n in zip(expected["tokens"], expected["lengths"])]
    assert lm.embed([*texts, "w2 " * 99]).shape == (3, expected["vectors"].shape[1])
    hf.save(tmp_path / "back", lm.config, jax.tree.map(np.asarray, lm.params), lm.tokenizer)
    there, back = hf.open_folder(path), hf.open_folder(tmp_path / "back")
    assert back.name == there.name and hf.model_of(back.settings, "") == hf.model_of(there.settings, "")
    assert read_safetensors(tmp_path / "back" / "model.safetensors") == read_safetensors(path / "model.safetensors")
    assert there.entries.keys() == back.entries.keys()   # the projection's, too
    for key, entry in there.entries.items():
        np.testing.assert_array_equal(back.entries[key].read(), entry.read())
    (path / "modules.json").unlink()   # a model alone: the mean, as it is, of all that it reads
    bare = hf.read_config(hf.open_folder(path))
    if lm.objective.arch.causal:   # Qwen3's class says so, too
        assert bare.objective.endswith("TextEmbedding") and bare.objective_args.pooling == "mean"
    else:
        assert (bare.objective_args.pooling, bare.objective_args.normalize, bare.seq_len) == ("mean", False, 48)


def test_the_files_of_sentence_transformers_are_read_strictly(tmp_path):
    path = with_words("sentence_bert", tmp_path)
    modules, pooling = (json.loads((path / f).read_text()) for f in ("modules.json", "1_Pooling/config.json"))
    write = lambda file, value: (path / file).write_text(json.dumps(value))
    older = {"word_embedding_dimension": 20, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write("1_Pooling/config.json", older)
    assert hf.read_config(hf.open_folder(path)).objective_args.pooling == "cls"
    for changes, message in [({"pooling_mode_mean_tokens": True}, "poolings mean, cls"),
                             ({"pooling_mode_cls_token": False}, "poolings none"),
                             ({"pooling_mode_cls_token": False, "pooling_mode_weightedmean_tokens": True},
                              "pooling: unknown 'weightedmean'")]:
        write("1_Pooling/config.json", older | changes)
        refuses(path, message)
    write("1_Pooling/config.json", pooling)
    write("config_sentence_transformers.json", {"prompts": {"query": "w"}, "default_prompt_name": "query"})
    assert fm_jax.load(path).embedded_ids(["3"])[0].tolist() == [3]
    for listed, message in [(modules[:1], "modules Transformer: expected"), (modules[::-1], "expected Transformer"),
                            ([*modules[:2], modules[3] | {"type": "a.CNN"}], "type of a module: unknown 'CNN'"),
                            ({}, "expected Transformer"), ([{}], "not a list of modules")]:
        write("modules.json", listed)
        refuses(path, message)
    write("modules.json", modules)
    write("sentence_bert_config.json", {"do_lower_case": True})
    refuses(path, "do_lower_case=True")


def test_every_family_is_among_them():
    kinds = {tuple(json.loads((p / "config.json").read_text())["architectures"]) for p in MODELS.iterdir()}
    lacking = {family.architecture for family in hf.FAMILIES.values()} - {name for kind in kinds for name in kind}
    # Whose class with a head, and Qwen3's without, are there; parts of others: `hf_vision_test.py`.
    assert lacking == {"MistralModel", "Qwen2Model", "ViTModel", "CLIPVisionModel", "SiglipVisionModel"}


# --- transformers itself --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="transformers computes with PyTorch, which is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("case", CASES)
def test_transformers_agrees_both_ways(case, transformers, tokenizer_files, tmp_path):
    import torch

    c = CASES[case]
    torch.manual_seed(0)
    there = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**c)).eval()
    with torch.no_grad():
        for name, p in there.named_parameters():   # initialised to zero or one, some would prove nothing
            p.add_(torch.randn(p.shape) * 0.1)
    there.save_pretrained(tmp_path / "there", max_shard_size="20KB")
    assert (tmp_path / "there" / "model.safetensors.index.json").exists()
    shutil.copy(tokenizer_files, tmp_path / "there" / "tokenizer.json")
    lm, t = fm_jax.load(tmp_path / "there"), tokens(2, 40)
    logits = lambda model: model(torch.tensor(t)).logits.detach().numpy()
    np.testing.assert_allclose(lm.logits(t), logits(there), atol=2e-4)

    hf.save(tmp_path / "back", lm.config, numpy_params(lm), lm.tokenizer)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert dict(back.named_parameters()).keys() == dict(there.named_parameters()).keys()
    for name, p in there.named_parameters():
        assert torch.equal(p, dict(back.named_parameters())[name]), name
    np.testing.assert_array_equal(logits(back.eval()), logits(there))
    text = "the cat sat on the log"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.encode(text, add_special_tokens=False) == lm.tokenizer.encode(text).tolist()
    assert tokenizer.eos_token_id == lm.tokenizer.eos_id == 0


def test_transformers_opens_bfloat16(transformers, folder, tmp_path):
    import torch

    arrays = {k: a.astype(jnp.bfloat16) for k, a in weights(LLAMA).items()}
    lm = fm_jax.load(folder(LLAMA, arrays))
    hf.save(tmp_path / "out", lm.config, numpy_params(lm), lm.tokenizer, file_bytes=6000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    for key, p in model.state_dict().items():
        np.testing.assert_array_equal(p.float().numpy(), arrays[key].astype(np.float32))


@pytest.mark.parametrize("changes", [
    {}, {"tie_embeddings": False, "num_kv_heads": 2, "head_dim": 10, "mlp_bias": True},
    {"embed_dim": 25, "head_dim": 6}], ids=str)   # which LlamaConfig refuses and MistralConfig takes
def test_our_own_models_open_in_transformers(changes, transformers, tokenizer_files, tmp_path):
    import torch

    config = config_lib.defaults()
    config_lib.override(config, {f"model.{k}": v for k, v in dict(
        vocab_size=300, num_layers=2, embed_dim=24, num_heads=4, max_seq_len=64).items() | changes.items()})
    config.seq_len = 32
    tokenizer = tokenizers.load(tokenizer_files)
    objective = objectives.load(config, tokenizer)
    params = sharding.unbox(objective.init(jax.random.key(0)))[0]
    hf.save(tmp_path / "out", config, jax.tree.map(np.asarray, params), tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    got = model(torch.tensor(tokens())).logits.detach().numpy()
    np.testing.assert_allclose(got, objective.predict["logits"](params, tokens()), atol=2e-4)


# --- GGUF -----------------------------------------------------------------------------------------------------------

GGUF = LLAMA | {"intermediate_size": 64}   # a row of which is two blocks of Q8_0


@pytest.fixture
def gguf_file(tmp_path, tokenizer_files):
    """Returns a function that writes tensors of GGUF as llama.cpp's converter does: (arrays, fields) to a path."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

    def make(arrays, **changes):
        path, c = tmp_path / f"model{len(list(tmp_path.iterdir()))}.gguf", GGUF | changes.pop("settings", {})
        writer = gguf.GGUFWriter(path, arch := changes.pop("arch", "llama"))
        writer.add_block_count(c["num_hidden_layers"])
        writer.add_context_length(c["max_position_embeddings"])
        writer.add_embedding_length(c["hidden_size"])
        writer.add_feed_forward_length(c["intermediate_size"])
        writer.add_head_count(c["num_attention_heads"])
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        writer.add_rope_freq_base(c["rope_theta"])
        if arch == "llama":
            writer.add_rope_dimension_count(c["head_dim"])
        elif arch == "qwen3":
            writer.add_key_length(c["head_dim"])
            writer.add_value_length(c["head_dim"])
        content = json.loads(tokenizer_files.read_text())
        pieces = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(changes.pop("pre", "gpt-2"))
        writer.add_token_list(pieces)
        writer.add_token_types([3 if i == 0 else 1 for i in range(len(pieces))])
        writer.add_token_merges([" ".join(m) for m in content["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)
        writer.add_chat_template("{{ messages }}")
        for key, value in changes.items():
            writer.add_string(key.replace("__", "."), value)
        theirs = {"qwen2": "QWEN2", "qwen3": "QWEN3"}.get(arch, "LLAMA")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[theirs], c["num_hidden_layers"])
        for key, a in arrays.items():
            heads = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}.get(key.split(".")[-2])
            if heads and theirs == "LLAMA":   # `permute` of llama.cpp's convert_hf_to_gguf.py: halves become pairs
                a = a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)
            name = names.get_name(key, try_suffixes=(".weight", ".bias")) or key
            kind = gguf.GGMLQuantizationType.Q8_0 if a.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(a, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path
    return make


def test_gguf_is_the_model_it_was_made_of(gguf_file, folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    arrays = weights(GGUF)
    lm = fm_jax.load(gguf_file(arrays))
    q8 = gguf.GGMLQuantizationType.Q8_0
    stored = {k: gguf.dequantize(gguf.quantize(a, q8), q8) if a.shape[-1] % 32 == 0 else a for k, a in arrays.items()}
    assert sum((stored[k] != arrays[k]).any() for k in arrays) == 3   # the down projections
    np.testing.assert_allclose(lm.logits(tokens())[0], naive_logits(GGUF, stored, tokens()[0]), atol=2e-4)
    text = "the cat, 1234 dogs\n\n sat  on it's log <|endoftext|>"
    there = fm_jax.load(folder(LLAMA)).tokenizer
    assert lm.tokenizer.encode(text).tolist() == there.encode(text).tolist()
    smollm = fm_jax.load(gguf_file(arrays, pre="smollm")).tokenizer   # every digit alone
    assert len(lm.tokenizer.encode("1212")) < len(smollm.encode("1212")) == 4
    assert lm.tokenizer.eos_id == 0 and lm.tokenizer.decode(lm.tokenizer.encode(text)) == text
    lm.tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_gguf_of_qwen_is_the_folder_it_was_made_of(arch, gguf_file, folder):
    """Which the tests of families hold to transformers."""
    own = {"model_type": arch, "intermediate_size": 40} | ({"head_dim": 4} if arch == "qwen2" else {})   # no blocks
    c, rng = GGUF | own, np.random.default_rng(3)
    arrays = weights(c)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}.self_attn."
        if arch == "qwen2":
            sizes = {f"{at}{one}_proj.bias": len(arrays[f"{at}{one}_proj.weight"]) for one in "qkv"}
        else:
            sizes = {f"{at}{one}_norm.weight": c["head_dim"] for one in "qk"}
        arrays |= {key: rng.normal(1, 0.3, n).astype(np.float32) for key, n in sizes.items()}
    there, lm = fm_jax.load(folder(c, arrays)), fm_jax.load(gguf_file(arrays, arch=arch, settings=own, pre="qwen2"))
    there.config.model.norm_eps = lm.config.model.norm_eps   # which is float32 there
    assert lm.config.model == there.config.model and lm.config.hf_family == arch
    np.testing.assert_allclose(lm.logits(tokens()), there.logits(tokens()), atol=1e-5)
    assert lm.tokenizer.encode("caf\u00e9's 12").tolist() == lm.tokenizer.encode("cafe\u0301's 12").tolist()
    assert [lm.tokenizer.decode([i]) for i in lm.tokenizer.encode("IT'S 12")][-3:] == [" ", "1", "2"]


def test_a_gguf_file_that_cannot_be_read_says_why(gguf_file):
    arrays = weights(GGUF)
    path = gguf_file(arrays)
    refuses(gguf_file(arrays, llama__rope__scaling__type="yarn"), "with llama.rope.scaling.type='yarn'")
    refuses(gguf_file(arrays, arch="mamba"), "general.architecture: unknown 'mamba'")
    refuses(gguf_file(arrays, pre="llama-bpe"), "tokenizer.ggml.pre: unknown 'llama-bpe'")
    refuses(gguf_file(arrays | {"rope_freqs.weight": np.ones(4, np.float32)}), "rope_freqs.weight is left over")
    path.write_bytes(path.read_bytes()[:-5000])
    refuses(path, "not a GGUF file, or cut short")
    path.write_bytes(b"GGML" + bytes(100))
    refuses(path, "not a GGUF file, or cut short")
    refuses(path.with_name("gone.gguf"), "gone.gguf: cannot be read .No such file")

"""Freezing, low-rank adapters and quantised bases: what trains, what is kept, and what the model then is."""

import contextlib
import importlib
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

import fm_jax
from fm_jax import checkpoint, config as config_lib, objectives, quantize, sharding, tree
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError
from fm_jax.kernels import Mask
from fm_jax.model import Attention, merged
from fm_jax.step import Program
from fm_jax.train import train

LORA = ("transformer.*attention.w[qkvo]", "transformer.*mlp.w_.*")


def program(mesh=None, **changes):
    config = config_lib.from_file("configs/causal_lm.py:tiny", {
        "checkpoint.init_from": "base", "model.num_kv_heads": 2, "adapt.lora_rank": 3,
        **{k.replace("__", "."): v for k, v in changes.items()}})
    config = config_lib.resolve(config)
    layout = sharding.Layout(sharding.make_mesh(mesh or {"data": 1}))
    return Program(config, objectives.load(config, None, layout), layout)


def model_of(p, seed=7):
    """Returns random parameters of the whole model; none is 0, so that no transposition goes unseen."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32) * 0.1, p.adaptation.model[0])


def begun(p, **randomly):
    """Returns (state on the model of `model_of`, that model). randomly: adapters that are random and not as drawn."""
    model, rng = model_of(p), np.random.default_rng(3)
    base = {n: a for n, a in tree.flatten(model).items() if n in tree.flatten(p.adaptation._base)}
    frozen = jax.device_put(p.adaptation.kept(tree.nest(base)), p.shardings.frozen)
    state = p.init().replace(frozen=frozen)
    if randomly:
        params = tree.map_named(lambda n, a: rng.normal(size=a.shape).astype(np.float32) * 0.2 if n.split(".")[-1] in (
            "lora_a", "lora_b", "magnitude") else a, state.params)
        state = state.replace(params=jax.device_put(params, p.shardings.params))
    return state, model


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_the_papers_matrix(dora):
    p = program(adapt__lora=LORA, adapt__lora_alpha=5.0, adapt__dora=dora)
    state, model = begun(p, adapters="random")
    adapters, merged = tree.flatten(jax.device_get(state.params)), tree.flatten(p.model_params(state))
    D = 32   # rows of w are inputs, as in the papers' W transposed; layers by themselves
    for name, ins in (("transformer.layers.attention.wq", 1), ("transformer.layers.attention.wo", 3),
                      ("transformer.layers.mlp.w_down", 1)):
        w = tree.flatten(model)[name]
        for layer in range(2):
            flat = w[layer].reshape(np.prod(w.shape[1 : 1 + ins]), -1)
            a = adapters[name + ".lora_a"][layer].reshape(flat.shape[0], 3)
            b = adapters[name + ".lora_b"][layer].reshape(3, flat.shape[1])
            want = flat + 5 / 3 * a @ b
            if dora:
                m = adapters[name + ".magnitude"][layer].reshape(-1) * np.linalg.norm(flat, axis=0)
                want = m * want / np.linalg.norm(want, axis=0)
            np.testing.assert_allclose(np.asarray(merged[name])[layer].reshape(flat.shape), want, atol=2e-6)
    assert D == p.objective.arch.embed_dim
    np.testing.assert_array_equal(merged["embed.tokens"], tree.flatten(model)["embed.tokens"])


def test_the_scale_is_of_the_rank():
    state = lambda p: begun(p, adapters="random")[0]
    name = "transformer.layers.mlp.w_up"
    plain, stable = program(adapt__lora=(name,)), program(adapt__lora=(name,), adapt__lora_rank_stabilized=True)
    base = tree.flatten(model_of(plain))[name]
    added = [np.asarray(tree.flatten(p.model_params(state(p)))[name]) - base for p in (plain, stable)]
    np.testing.assert_allclose(added[1], added[0] * 3 ** 0.5, atol=1e-6)


@pytest.mark.parametrize("changes", [
    pytest.param(dict(adapt__lora=LORA), marks=pytest.mark.slow),
    pytest.param(dict(adapt__lora=LORA, adapt__dora=True), marks=pytest.mark.slow),
    dict(adapt__lora=LORA, adapt__quantize="nf4"), dict(adapt__freeze=("embed.*", ".*norm.*"))])
def test_at_first_it_is_the_base_and_then_only_what_trains_changes(changes):
    p = program(**changes)
    state, model = begun(p)
    merged = tree.flatten(jax.device_get(p.model_params(state)))
    same = {n: a for n, a in tree.flatten(model).items() if n in tree.flatten(p.adaptation._base)}
    for n, a in same.items():
        limit = 0.16 * np.abs(a).max() if changes.get("adapt__quantize") and quantize.axis_of(
            tree.flatten(p.adaptation.model[1], sharding.is_axes)[n]) else 1e-7
        np.testing.assert_allclose(merged[n], a, atol=limit)   # nf4: half of the widest gap between its values
    before = jax.device_get((state.params, state.frozen))
    batch = p.place(p.objective.random_batch(8, np.random.default_rng(0)))
    losses, addresses = [], []
    for step in range(6):
        state, values = p.train_step(state, batch, step)
        losses.append(float(values["loss"][0] / values["loss"][1]))
        addresses.append(jax.tree.leaves(state.frozen)[0].unsafe_buffer_pointer())
    assert losses[-1] < losses[0]
    after = jax.device_get((state.params, state.frozen))
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
    assert addresses[-1] == addresses[0]   # handed on, not copied
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(after[0]), jax.tree.leaves(before[0])))


def test_the_gradient_is_that_through_the_whole_matrix():
    """Of a step with SGD's direction: B moves by A^T dW, where dW is the whole model's own gradient."""
    name = "transformer.layers.attention.wv"
    p = program(adapt__lora=(name,))
    state, model = begun(p, adapters="random")
    batch = p.place(p.objective.random_batch(8, np.random.default_rng(0)))
    loss = lambda params: p.objective.loss(params, batch, None).loss
    dw = tree.flatten(jax.grad(loss)(p.model_params(state)))[name]
    through = jax.grad(lambda params: loss(p.adaptation.combined(params, state.frozen)))(state.params)
    a = np.asarray(tree.flatten(state.params)[name + ".lora_a"])
    want = 16 / 3 * np.einsum("ldr,ldkh->lrkh", a, dw)
    np.testing.assert_allclose(tree.flatten(through)[name + ".lora_b"], want, rtol=2e-4, atol=1e-4)


def test_dropout_leaves_out_inputs_and_only_in_training():
    name = "transformer.layers.mlp.w_up"
    p = program(adapt__lora=(name,), adapt__lora_dropout=0.5)
    state, model = begun(p, adapters="random")
    added = lambda key: np.asarray(tree.flatten(merged(
        p.adaptation.combined(state.params, state.frozen, key)))[name]) - tree.flatten(model)[name]
    whole, dropped = added(None), added(jax.random.key(0))
    out = (np.abs(dropped) < 1e-7).all(-1)   # of each layer and input
    assert 0.3 < out.mean() < 0.7 and (out[0] != out[1]).any()
    np.testing.assert_allclose(dropped[~out], 2 * whole[~out], atol=1e-5)


def test_any_mesh_trains_the_same_adapter():
    losses = []
    for mesh in ({"data": 1}, {"data": 2, "context": 2, "tensor": 2}, {"stage": 2, "fsdp": 4}):
        p = program(mesh, adapt__lora=LORA, adapt__dora=True, adapt__quantize="int4", batch_size=8)
        state, _ = begun(p, adapters="random")
        batch = p.place(p.objective.random_batch(8, np.random.default_rng(0)))
        for step in range(2):
            state, values = p.train_step(state, batch, step)
        losses.append(float(values["loss"][0]))
    np.testing.assert_allclose(losses, losses[0], rtol=2e-5)   # sums in another order


# --- runs


@pytest.fixture(scope="module")
def base(tiny_run, tmp_path_factory):
    """Returns a copy of the small run, which a test may move."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(tiny_run[0], folder)
    return folder


def run_config(tiny_flags, base, **changes):
    flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in tiny_flags if flag.startswith("--config."))
    path = next(flag.split("=", 1)[1] for flag in tiny_flags if flag.startswith("--config="))
    return config_lib.from_file(path, flags | {
        "checkpoint.init_from": str(base), "steps": 6, "optimizer.ema_decay": 0.0, "checkpoint.every": 3,
        "log.tensorboard": False, **{k.replace("__", "."): v for k, v in changes.items()}})


@pytest.fixture(scope="module")
def adapter(base, tiny_flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    config = run_config(tiny_flags, base, adapt__lora=LORA, adapt__quantize="int8")
    return folder, train(config, folder), config


def test_a_run_of_an_adapter_is_small_and_loads_whole(adapter, base):
    folder, values, _ = adapter
    stored = checkpoint.restore_params(folder)
    assert set(n.split(".")[-1] for n in tree.flatten(stored)) == {"lora_a", "lora_b"}
    lm, before = fm_jax.load(folder), fm_jax.load(base)
    assert set(tree.flatten(lm.params)) == set(tree.flatten(before.params))
    rows = np.random.default_rng(0).integers(0, 256, (2, 16))
    assert np.abs(lm.logits(rows) - before.logits(rows)).max() > 1e-3
    noted = json.loads((folder / "run.json").read_text())["base"]
    assert noted["step"] == 12 and noted["folder"] == str(base)


def test_a_stopped_run_of_an_adapter_continues_as_if_it_had_not(adapter, tmp_path):
    folder, values, config = adapter
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    assert train(config, tmp_path / "again") == values
    old, new = (checkpoint.restore_params(f) for f in (folder, tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_another_base_is_refused(adapter, base, tmp_path):
    folder, _, config = adapter
    with pytest.raises(UserError, match="no run here"):
        fm_jax.load(folder, base=str(tmp_path / "nowhere"))
    shutil.copytree(base, tmp_path / "moved")
    assert fm_jax.load(folder, base=str(tmp_path / "moved")).step == 6   # the same parameters elsewhere
    other = tmp_path / "other"
    shutil.copytree(base, other)
    for step in ("8", "12"):
        shutil.rmtree(other / "checkpoints" / step)
    (other / "checkpoints" / "4").rename(other / "checkpoints" / "12")
    with pytest.raises(UserError, match="another base than the one"):
        fm_jax.load(folder, base=str(other))
    with pytest.raises(UserError, match="itself an adapter"):
        fm_jax.load(folder, base=str(folder))
    with pytest.raises(UserError, match="has all parameters"):
        fm_jax.load(base, base=str(other))
    with pytest.raises(UserError, match="is of another base"):
        fm_jax.load(other).adapted(folder)
    with pytest.raises(UserError, match="not a run of adapters"):
        fm_jax.load(other).adapted(base)


def test_a_model_takes_adapters_and_shares_the_rest(adapter, base):
    lm = fm_jax.load(base)
    adapted, whole = lm.adapted(adapter[0]), fm_jax.load(adapter[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), adapted.params, whole.params)
    assert adapted.params["embed"]["tokens"] is lm.params["embed"]["tokens"] and adapted.step == 6


@pytest.mark.parametrize("changes, message", [
    (dict(adapt__lora=("transformer.*attn.*",)), "adapt.lora: 'transformer.*attn.*' matches no parameter; nearest"),
    (dict(adapt__lora=("transformer.*scale",)), "which is no matrix; these are: embed.tokens"),
    (dict(adapt__lora=(".*w_up",), adapt__freeze=("embed.*",)), "w_up, which trains in full"),
    (dict(adapt__freeze=("embed.*",), checkpoint__init_pattern="transformer.*"), "would stay as it was drawn"),
    (dict(adapt__quantize="nf4"), "and none is frozen"),
    (dict(adapt__quantize="nf5", adapt__lora=(".*w_up",)), "did you mean 'nf4'"),
    (dict(adapt__lora=(".*w_up",), adapt__lora_rank=0), "adapt.lora_rank=0"),
    (dict(adapt__lora=(".*w_down",), adapt__quantize="int4", model__mlp_dim=63), "63 inputs cannot be kept in pairs"),
])
def test_what_cannot_be_adapted_is_said(changes, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*").replace("(", r"\(")):
        program(**changes)


def test_a_base_of_another_tokenizer_is_refused(base, tiny_flags, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    run = json.loads((base / "run.json").read_text())
    (tmp_path / "base" / "run.json").write_text(json.dumps(run | {"tokenizer": "0" * 64}))
    with pytest.raises(UserError, match="had another tokenizer .*rows of embed.tokens stand for other tokens"):
        train(run_config(tiny_flags, tmp_path / "base", adapt__lora=LORA), tmp_path / "x")


def test_the_config_of_fine_tuning_is_of_the_run(base, data, tmp_path):
    config = config_lib.from_file(f"configs/finetune.py:{base}", {
        "data.train": str(data), "adapt.lora": LORA, "steps": 1, "batch_size": 4, "eval.every": 0, "mesh.data": 1,
        "log.tensorboard": False})
    there = config_lib.load(base / "config.json")[0]
    assert config.model == there.model and config.objective == there.objective
    train(config, tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "run.json").read_text())["base"]["folder"] == str(base)


def test_a_prefix_is_attended_to_beside_the_text(base, data, tmp_path):
    """Shut at first; open, what NumPy makes of the queries; and step by step as all at once."""
    config = config_lib.from_file(f"configs/finetune.py:{base},3", {
        "data.train": str(data), "steps": 2, "batch_size": 4, "eval.every": 0, "log.tensorboard": False, "mesh.data": 1,
        "optimizer.warmup_steps": 0, "optimizer.learning_rate": 0.3})
    train(config, tmp_path / "prefix")
    trained = tree.flatten(checkpoint.restore_params(tmp_path / "prefix"))
    assert {n.split(".")[-1] for n in trained} == {"prompt_k", "prompt_v", "prompt_gate"}
    lm, before = fm_jax.load(tmp_path / "prefix"), fm_jax.load(base)
    rows = np.random.default_rng(0).integers(0, 256, (2, 16))
    assert np.abs(lm.logits(rows) - before.logits(rows)).max() > 1e-3
    shut = tree.nest({n: p * 0 if "prompt_gate" in n else p for n, p in tree.flatten(lm.params).items()})
    np.testing.assert_array_equal(lm.objective.logits(shut, rows), before.objective.logits(before.params, rows))
    made = lm.complete([rows[0].tolist()], max_new_tokens=4)[0].tokens
    whole = np.concatenate([rows[:1], made[None]], axis=1)
    assert lm.logits(whole)[0, 15:-1, :lm.tokenizer.vocab_size].argmax(-1).tolist() == made.tolist()


def test_what_a_prefix_adds():
    arch = Architecture(vocab_size=8, embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=3, position="none",
                        prompt_tokens=5)
    rng, own = np.random.default_rng(0), Attention(arch)
    x = rng.normal(size=(2, 7, 12)).astype(np.float32)
    shapes = jax.eval_shape(lambda: own.init(jax.random.key(0), x, Mask()))["params"]
    params = jax.tree.map(lambda b: rng.normal(size=b.value.shape).astype(np.float32), shapes, is_leaf=sharding.is_boxed)
    apply = lambda params: own.apply({"params": params}, x, Mask())[0]
    added = apply(params) - apply(params | {"prompt_gate": np.zeros((2, 2), np.float32)})
    q = np.einsum("btd,dkgh->btkgh", x, params["wq"])
    s = np.exp(np.einsum("btkgh,pkh->btkgp", q, params["prompt_k"]) / 3 ** 0.5)
    y = np.einsum("btkgp,pkh->btkgh", s / s.sum(-1, keepdims=True), params["prompt_v"])
    want = np.einsum("btkgh,kghd->btd", y * np.tanh(params["prompt_gate"])[..., None], params["wo"])
    np.testing.assert_allclose(added, want, atol=2e-5)


def test_adapters_without_a_base_are_refused(tiny_flags, tmp_path):
    with pytest.raises(UserError, match="none is named: set --config.checkpoint.init_from"):
        train(run_config(tiny_flags, "", adapt__lora=(".*w_up",)), tmp_path / "x")


# --- quantised matrices


@pytest.mark.parametrize("kind, bits, error", [("int8", 8, 0.5 / 127), ("int4", 4, 0.5 / 7), ("nf4", 4, 0.1521)])
def test_a_quantised_matrix_is_near_and_small(kind, bits, error):
    w = np.random.default_rng(0).normal(size=(3, 128, 5)).astype(np.float32)
    w[0, :, 0] = 0   # a block of nothing
    q = jax.jit(lambda w: quantize.quantized(w, kind, -2))(w)
    whole, size = np.asarray(q.array()), quantize.block(128, kind)
    top = np.abs(w.reshape(3, -1, size, 5)).max(2)
    off = np.abs(whole - w).reshape(3, -1, size, 5).max(2)
    assert (off <= error * top + 1e-6).all() and (off > 0.5 * error * top).mean() > 0.5
    assert q.codes.nbytes * 8 == w.size * bits and not whole[0, :, 0].any()
    # The largest of a block keeps its value, and layers alone are what they are together.
    np.testing.assert_allclose(np.abs(whole).reshape(3, -1, size, 5).max(2), top, rtol=1e-6)
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[1], q).array(), whole[1])


def test_nf4_takes_the_nearest_value():
    w = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    codes = np.abs(w - np.array(quantize.NF4, np.float32)).argmin(1)
    np.testing.assert_allclose(quantize.quantized(w, "nf4", -2).array()[:, 0], np.array(quantize.NF4)[codes], atol=1e-6)


# --- PEFT's format: adapters and logits that PEFT itself made, `tests/peers/make_peft_adapters.py`

ADAPTERS = pathlib.Path(__file__).parent / "peft_adapters"


@pytest.fixture(scope="module")
def hf_base(tmp_path_factory):
    """Returns a function: name of a model in tests/hf_models -> the folder of the run that it became."""
    made = {}

    def base(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            shutil.copytree(ADAPTERS.parent / "hf_models" / name, folder / "hf")
            words = hf_tokenizers.models.WordLevel({f"w{i}": i for i in range(41)}, unk_token="w0")
            hf_tokenizers.Tokenizer(words).save(str(folder / "hf" / "tokenizer.json"))
            assert run_command("convert", f"--from_hf={folder / 'hf'}", f"--workdir={folder / 'run'}")[0] == 0
            made[name] = folder / "run"
        return made[name]

    return base


def run_command(name, *flags):
    """Returns (exit code, the error line) of a command, run in this process."""
    module, err = importlib.import_module(f"fm_jax.{name}"), io.StringIO()
    with pytest.raises(SystemExit) as exit_, contextlib.redirect_stderr(err):
        config_lib.run(module.main, module._flags, module.__doc__, [name, *map(str, flags)])
    return exit_.value.code or 0, err.getvalue()


@pytest.mark.parametrize("name", ["gpt2", "dora", "gpt_neox", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_adapter_of_peft_is_what_peft_computes_and_goes_back(name, hf_base, tmp_path):
    base = hf_base(json.loads((ADAPTERS / name / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert run_command("convert", f"--from_peft={ADAPTERS / name}", f"--base={base}",
                       f"--workdir={tmp_path / 'run'}") == (0, "")
    expected, lm = np.load(ADAPTERS / name / "expected.npz"), fm_jax.load(tmp_path / "run")
    assert np.abs(expected["logits"] - fm_jax.load(base).logits(expected["tokens"])).max() > 0.5
    np.testing.assert_allclose(lm.logits(expected["tokens"]), expected["logits"], atol=2e-4)
    # Out and in again: the same matrices, whatever blocks they became on the way.
    assert run_command("convert", f"--workdir={tmp_path / 'run'}", f"--to_peft={tmp_path / 'peft'}") == (0, "")
    assert run_command("convert", f"--from_peft={tmp_path / 'peft'}", f"--base={base}",
                       f"--workdir={tmp_path / 'again'}") == (0, "")
    again = fm_jax.load(tmp_path / "again")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again.params, lm.params)
    # Merged, by a run and by a folder of Hugging Face.
    assert run_command("convert", f"--workdir={tmp_path / 'run'}", f"--to_run={tmp_path / 'merged'}") == (0, "")
    assert run_command("convert", f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'hf'}") == (0, "")
    for folder in ("merged", "hf"):
        jax.tree.map(np.testing.assert_array_equal, fm_jax.load(tmp_path / folder).params, lm.params)


def test_an_adapter_of_something_else_is_refused(hf_base, tmp_path):
    llama, gpt2 = hf_base("llama"), hf_base("gpt2")
    refused = lambda *flags: run_command("convert", *flags)[1]
    into = f"--workdir={tmp_path / 'run'}"
    assert "is of no layer of the base, a model of GPT2LMHeadModel" in refused(
        f"--from_peft={ADAPTERS / 'llama'}", f"--base={gpt2}", into)
    assert "name the run of its base by --base" in refused(f"--from_peft={ADAPTERS / 'llama'}", into)
    assert "no adapter_config.json" in refused(f"--from_peft={tmp_path}", f"--base={gpt2}", into)
    assert "--base=x is of --from_peft, --to_hf, --to_peft, --to_run, not of --from_hf" in refused(
        "--from_hf=x", "--base=x", into)
    shutil.copytree(ADAPTERS / "llama", tmp_path / "other")
    config = json.loads((ADAPTERS / "llama" / "adapter_config.json").read_text())
    for change, message in (({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
                            ({"peft_type": "IA3"}, "peft_type='IA3'"), ({"r": 4}, "have shapes [3, 20] and [24, 3]")):
        (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | change))
        assert message in refused(f"--from_peft={tmp_path / 'other'}", f"--base={llama}", into)
    assert "has no adapters; --to_hf exports" in refused(f"--workdir={llama}", f"--to_peft={tmp_path / 'out'}")
    # What an export says of its base is believed: the same shapes are not the same parameters.
    assert refused(f"--from_peft={ADAPTERS / 'llama'}", f"--base={llama}", into) == ""
    assert refused(into, f"--to_peft={tmp_path / 'out'}") == ""
    (tmp_path / "out" / "fm_jax_base.json").write_text('{"fingerprint": "0123456789abcdef"}')
    assert "is of another base (parameters 0123456789ab)" in refused(
        f"--from_peft={tmp_path / 'out'}", f"--base={llama}", f"--workdir={tmp_path / 'third'}")


def test_a_quantised_run_is_small_and_loads_as_it_is(base, tmp_path):
    before = fm_jax.load(base)
    rows = np.random.default_rng(0).integers(0, 256, (2, 16))
    assert run_command("convert", f"--workdir={base}", f"--to_run={tmp_path / 'small'}", "--quantize=int8") == (0, "")
    small = fm_jax.load(tmp_path / "small")
    wq = small.params["transformer"]["layers"]["attention"]["wq"]
    assert wq.codes.dtype == np.int8 and "37,024 parameters" in repr(small)
    assert tree.nbytes(small.params) < 0.61 * tree.nbytes(before.params)   # two small layers here, and embeddings
    off = np.abs(small.logits(rows) - before.logits(rows)).max()
    assert 0 < off < 0.05 * np.abs(before.logits(rows)).max()
    assert small.generate(["To be"], max_new_tokens=3) == before.generate(["To be"], max_new_tokens=3)
    assert small.score(["To"], [" be"])[0].num_tokens == before.score(["To"], [" be"])[0].num_tokens
    assert "kept in int8 already" in run_command("convert", f"--workdir={tmp_path / 'small'}",
                                                 f"--to_run={tmp_path / 'x'}", "--quantize=nf4")[1]

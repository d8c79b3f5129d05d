"""One step of training: the same on every mesh and in every number of microbatches, and harmless where it must be."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import hlo, objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.step import Program

MESHES = [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4),
          dict(slice=2, expert=2, context=2), dict(context=4, tensor=2)]
BATCH, LENGTH = 8, 16
# Together they use every row of sharding.RULES: kv_heads, groups, head, mlp, vocab, embed, norm, layers, position.
MODELS = {
    "scanned": dict(num_kv_heads=4, qk_norm="head", tie_embeddings=False, layer_pattern=("local", "global"), window=5,
                    scan_layers=True, remat="full"),
    "unrolled": dict(num_kv_heads=4, norm="layernorm", norm_bias=True, qkv_bias=True, attention_out_bias=True,
                     mlp_bias=True, position="learned", gated_mlp=False, activation="gelu", scan_layers=False,
                     dropout=0.1, logit_softcap=3.0),
}


def make(mesh={}, model="scanned", **changes):
    """Returns the Program of a tiny model with adamw.

    Adam divides a gradient by its own size, which would blow up rounding in small ones. With eps = 1 an update is
    nearly linear in the gradient, so that parameters differ after some steps just as the gradients did.
    """
    c = config_lib.defaults()
    c.model.update(vocab_size=64, num_layers=2, embed_dim=16, num_heads=8, head_dim=4, mlp_dim=32, max_seq_len=16,
                   loss_chunk_tokens=20, **MODELS[model])
    c.batch_size, c.seq_len, c.steps = BATCH, LENGTH, 10
    c.optimizer.update(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    c.objective_args.z_loss = 0.01
    c = config_lib.resolve(config_lib.override(c, changes))
    layout = sharding.Layout(sharding.make_mesh(mesh))
    return Program(c, objectives.load(c, None, layout), layout)


def batches(program, n):
    """Returns n packed batches whose rows hold one to four documents, and padding: very unequal weights."""
    rng, made = np.random.default_rng(2), []
    for _ in range(n):
        tokens = rng.integers(0, 64, (BATCH, LENGTH + 1), dtype=np.int32)
        segments = np.sort(rng.integers(1, 4, (BATCH, LENGTH + 1), dtype=np.int32), axis=1)
        for row, length in enumerate(rng.integers(2, LENGTH + 2, BATCH)):
            segments[row, length:] = 0
        made.append(program.objective.examples({"tokens": tokens, "segment_ids": segments},
                                               np.arange(BATCH, dtype=np.uint64)))
    return made


def host(tree_):
    """Returns {name: NumPy copy}: the next step may reuse the device's memory."""
    return {n: np.array(a) for n, a in tree.flatten(tree_).items()}


def run(program, data, state=None):
    """Returns (losses, gradient norms, initial and final parameters, final state) of a step on each batch."""
    state = program.init() if state is None else state
    start, losses, norms = host(state.params), [], []
    for step, batch in enumerate(data):
        state, metrics = program.train_step(state, program.place(batch), step)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
    return losses, norms, start, host(state.params), state


def assert_same_run(got, want):
    """Float32 sums in another order: errors seen are below 1e-6 in losses and 1e-5 of a parameter's total change."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4)
    for n in want[3]:
        moved = np.abs(want[3][n] - want[2][n]).max()
        assert moved > 0, f"{n} was not trained"
        np.testing.assert_allclose(got[3][n], want[3][n], rtol=0, atol=1e-4 * moved + 1e-6, err_msg=n)


@pytest.fixture(scope="module")
def one_device():
    """Returns a function: name of a model -> its run of three steps on one device, made once."""
    @functools.cache
    def made(model):
        program = make(model=model)
        return run(program, batches(program, 3))
    return made


# --- the same everywhere --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, mesh", [
    pytest.param(model, mesh, marks=pytest.mark.slow if set(mesh) & {"slice"} or mesh == {"data": 8} or (
        model == "unrolled" and set(mesh) != {"data", "fsdp", "tensor"}) else ())
    for model in MODELS for mesh in MESHES], ids=str)
def test_every_mesh_trains_the_same(model, mesh, one_device):
    program = make(mesh, model)
    want, got = one_device(model), run(program, batches(program, 3))
    for n in want[2]:   # random bits are drawn by position, whatever the mesh
        np.testing.assert_array_equal(got[2][n], want[2][n], err_msg=n)
    assert_same_run(got, want)


# Divisible by 8 whichever axes are multiplied: layers, heads, experts, and chunks of a sequence.
ANY_MESH = {"model.num_layers": 8, "model.layer_pattern": ("global",), "model.window": 0, "model.num_kv_heads": 8,
            "model.num_experts": 8, "model.expert_dim": 16, "model.num_shared_experts": 1}


@functools.cache
def one_device_of_experts():
    program = make(**ANY_MESH)
    return run(program, batches(program, 1))


@pytest.mark.slow
@pytest.mark.parametrize("axes", list(itertools.combinations_with_replacement(sharding.MESH_AXES, 3)), ids="-".join)
def test_every_mesh_of_eight_devices_trains_the_same(axes):
    """All 84 ways to give three factors of 2 to the axes of the mesh, of a model with experts."""
    program = make({axis: 2 ** axes.count(axis) for axis in axes}, **ANY_MESH)
    assert_same_run(run(program, batches(program, 1)), one_device_of_experts())


@pytest.mark.parametrize("mesh", [dict(fsdp=4, tensor=2), dict(context=4, tensor=2), dict(fsdp=2, context=2, tensor=2),
                                  dict(data=2, fsdp=2, context=2)])
def test_what_is_gathered_on_a_mesh(mesh):
    """Over all axes but `tensor` the weights, once in each pass, and no activations; over `tensor` a sublayer's input,
    once in each pass, and its output's gradient. Two rows and more on a device: no axis of the batch has but one."""
    c = config_lib.defaults()
    c.model.update(vocab_size=64, num_layers=2, embed_dim=64, num_heads=8, mlp_dim=128, max_seq_len=128,
                   loss_chunk_tokens=2048, scan_layers=True)
    c.batch_size, c.seq_len, c.steps = 16, 128, 10
    layout = sharding.Layout(sharding.make_mesh(mesh))
    program = Program(config_lib.resolve(c), objectives.load(c, None, layout), layout)
    gathered = {"tensor": 0, "others": 0}
    for moved in hlo.collectives(program.traced().lower().compile().as_text(), layout.mesh.shape):
        if moved.kind == "all-gather":
            gathered["tensor" if moved.axes == ("tensor",) else "others"] += moved.nbytes * moved.times
    weights = tree.nbytes(program.abstract.params) / layout.mesh.shape["tensor"]
    x = 16 * 128 * 64 * 4 / layout.batch_parts / layout.mesh.shape["context"]
    assert weights < gathered["others"] < 2.1 * weights   # with the table, which is gathered for embedding and logits
    assert gathered["tensor"] <= (2 * 2 * 3 + 2) * x      # and for the logits
    assert (gathered["tensor"] > 0) == ("tensor" in mesh)


def test_the_models_use_every_rule():
    axes = {a for model in MODELS for t in jax.tree.leaves(make(model=model).axes, is_leaf=sharding.is_axes) for a in t}
    elsewhere = {"experts", "expert_embed", "router", "first_layers", "rank", "block",   # in moe_test, adapt_test,
                 "patch_rows", "patch_columns", "channels", "classes", "taps"}   # image_*_test, speech_test
    assert axes | elsewhere | {"batch", "length", "between", "pieces"} == set(sharding.RULES)


@pytest.mark.parametrize("mesh, n", [({}, 4), (dict(data=2, fsdp=2, tensor=2), 2)], ids=str)
def test_accumulation_equals_the_large_batch(mesh, n):
    program = make(mesh, accumulation_steps=n)
    data = batches(program, 3)
    weights = data[1]["weights"].reshape(-1, n, LENGTH).sum((0, 2))
    assert weights.max() > 1.05 * weights.min()   # so that a mean of the microbatches' means would be another number
    data[2]["weights"][1::n] = 0   # a microbatch without a scored token
    assert_same_run(run(program, data), run(make(), data))


def test_a_step_is_a_function_of_its_inputs(one_device):
    program = make(model="unrolled")   # with dropout
    again = run(program, batches(program, 3))
    assert again[0] == one_device("unrolled")[0]
    for n, a in again[3].items():
        np.testing.assert_array_equal(a, one_device("unrolled")[3][n])


def test_bfloat16_computes_over_float32_state(one_device):
    program = make(**{"model.dtype": "bfloat16"})
    losses, _, start, end, state = run(program, batches(program, 3))
    assert {a.dtype for a in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    want = one_device("scanned")
    for n in start:
        np.testing.assert_array_equal(start[n], want[2][n])
    np.testing.assert_allclose(losses, want[0], rtol=5e-3)   # 8 bits
    assert losses != want[0]


def test_evaluation_sums_add_up_to_the_loss(one_device):
    program = make()
    data, state = batches(program, 1)[0], program.init()
    whole = program.eval_step(program.eval_params(state), None, program.place(data))
    np.testing.assert_allclose(whole["loss"][0] / whole["loss"][1], one_device("scanned")[0][0], rtol=1e-5)
    halves = []
    for rows in (slice(0, 3), slice(3, BATCH)):   # the rest of each is padding of weight 0
        part = {k: v.copy() for k, v in data.items()}
        part["weights"][[i for i in range(BATCH) if i not in range(BATCH)[rows]]] = 0
        halves.append(program.eval_step(state.params, None, program.place(part)))
    for name in whole:
        np.testing.assert_allclose([a + b for a, b in zip(halves[0][name], halves[1][name])], whole[name], rtol=1e-5)
    part["weights"][:] = 0
    empty = program.eval_step(state.params, None, program.place(part))
    assert all(float(x) == 0 for x in jax.tree.leaves(empty))


def test_evaluation_takes_the_memory_of_a_microbatch():
    whole, parts, small = make(batch_size=64), make(batch_size=64, accumulation_steps=8), make(batch_size=8)
    need = lambda p: p.eval_step.lower(p.abstract.params, None, p.batch_spec).compile().memory_analysis().temp_size_in_bytes
    assert need(parts) < 1.5 * need(small) < need(whole) / 4   # the sums and the scan need little
    params = whole.init().params
    batch = whole.place(whole.objective.random_batch(64, np.random.default_rng(0)))
    got, want = parts.eval_step(params, None, batch), whole.eval_step(params, None, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)   # order of sums


# --- health ---------------------------------------------------------------------------------------------------------

# Lion moves a parameter by the learning rate, or not at all where its momentum is 0.
WATCHED = {"optimizer.ema_decay": 0.6, "optimizer.name": "lion", "optimizer.weight_decay": 0.0,
           "optimizer.learning_rate": 0.01, "optimizer.schedule": "linear", "optimizer.clip_norm": 1.0,
           "health.skip_grad_norm_factor": 2.0, "health.skip_grad_norm_warmup_steps": 2}


@pytest.fixture(scope="module")
def watched():
    """Returns a Program with an average of the parameters that clips, and skips outliers from its third step on."""
    return make(**WATCHED)


@pytest.mark.parametrize("where", ["batch", "parameter"])
def test_a_step_that_is_not_finite_changes_nothing_nor_do_the_next(watched, where):
    good, after = batches(watched, 2)
    state, _ = watched.train_step(watched.init(), watched.place(good), 0)
    bad = {**after, "weights": np.full_like(after["weights"], np.nan)} if where == "batch" else after
    if where == "parameter":
        broken = state.params["embed"]["tokens"].at[after["tokens"][0, 0], 5].set(jnp.inf)
        state = state.replace(params={**state.params, "embed": {**state.params["embed"], "tokens": broken}})
    before = host(state)
    state, metrics = watched.train_step(state, watched.place(bad), 1)
    assert float(metrics["finite"][0]) == 0 and not np.isfinite(metrics["loss"][0])
    # The host looks a step late and has already asked for steps 2 and 3, of good batches.
    for step in (2, 3):
        state, _ = watched.train_step(state, watched.place(good), step)
    for n, a in host(state).items():
        np.testing.assert_array_equal(a, before[n], err_msg=n)
    if where == "batch":
        state, metrics = watched.train_step(state, watched.place(after), 1)
        assert float(metrics["finite"][0]) == 1 and int(state.step) == 2
        straight = watched.init()
        for step, batch in enumerate((good, after)):
            straight, _ = watched.train_step(straight, watched.place(batch), step)
        for n, a in host(straight).items():   # as if the bad step had never been
            np.testing.assert_array_equal(host(state)[n], a, err_msg=n)


def test_a_batch_without_a_scored_token_has_gradient_0(watched):
    good, empty = batches(watched, 2)
    empty["weights"][:] = 0
    state = watched.init()
    for step, (batch, moves) in enumerate([(empty, False), (good, True), (empty, True)]):   # at last, by momentum
        before = host(state.params)
        state, values = watched.train_step(state, watched.place(batch), step)
        if batch is empty:
            assert [float(x) for x in (*values["loss"], values["grad_norm"][0])] == [0, 0, 0]
        assert float(values["finite"][0]) == 1 and int(state.step) == step + 1
        assert any((a != before[n]).any() for n, a in host(state.params).items()) == moves


def with_outlier(program):
    """Returns five batches; of the fourth, the gradient of two tokens alone is several times the mean's over all."""
    data = batches(program, 5)
    data[3]["weights"][:] = 0
    data[3]["weights"][0, :2], data[3]["segment_ids"][0, :3] = 1, 1
    return data


def test_an_outlier_is_skipped_and_counted(watched):
    state, skipped, rates = watched.init(), [], []
    for step, batch in enumerate(with_outlier(watched)):
        before = host(state.params)
        state, values = watched.train_step(state, watched.place(batch), step)
        skipped.append(float(values["skipped_steps"]))
        rates.append(float(values["learning_rate"][0]))
        moved = max(np.abs(a - before[n]).max() for n, a in host(state.params).items())
        assert moved == pytest.approx(0 if step == 3 else rates[-1], rel=1e-3)   # rounding of parameters near 1
        assert int(state.step) == step + 1   # a skipped step counts as done
    assert skipped == [0, 0, 0, 1, 0] and sorted(set(rates), reverse=True) == rates


def test_clipping_and_skipping_can_be_switched_within_a_run(watched):
    """After a loss spike, a run goes on from before it with skipping on, which knows the norms until then."""
    plain = make(**WATCHED | {"health.skip_grad_norm_factor": 0.0, "optimizer.clip_norm": 0.0})
    assert tree.difference(plain.abstract, watched.abstract) == []
    *data, spike, _ = with_outlier(plain)
    state = plain.init()
    for step, batch in enumerate(data):
        state, values = plain.train_step(state, plain.place(batch), step)
        assert "skipped_steps" not in values
    before = host(state.params)
    skipped, values = watched.train_step(jax.tree.map(jnp.copy, state), watched.place(spike), 3)
    state, _ = plain.train_step(state, plain.place(spike), 3)
    assert values["skipped_steps"] == 1
    for n, a in host(skipped.params).items():
        np.testing.assert_array_equal(a, before[n], err_msg=n)
        assert (host(state.params)[n] != a).any(), n


def test_the_average_of_parameters_equals_numpy(watched):
    state = watched.init()
    want = {n: a.astype(np.float64) for n, a in host(state.params).items()}
    for step, batch in enumerate(batches(watched, 5)[:4]):
        state, _ = watched.train_step(state, watched.place(batch), step)
        d = min(0.6, (1 + step) / (10 + step))
        want = {n: d * want[n] + (1 - d) * a for n, a in host(state.params).items()}
    for n, a in host(state.ema).items():
        np.testing.assert_allclose(a, want[n], rtol=1e-5, atol=1e-7, err_msg=n)   # float32
    assert watched.eval_params(state) is state.ema


# --- what does not fit ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mesh, changes, message", [
    (dict(data=2, fsdp=4), dict(batch_size=12), r"batch_size=12 .* 8 parts .*\(data 2 x fsdp 4\).* a multiple of 8"),
    (dict(data=2, fsdp=2), dict(accumulation_steps=4), "4 microbatches of 2 is not divisible.*multiple of 16"),
    (dict(tensor=8), {}, "'kv_heads' of size 4 is not divisible by mesh.tensor=8"),
    (dict(context=4), dict(seq_len=12), "mesh.context=4 cuts a sequence into 8 chunks, which 12 tokens do not give"),
    (dict(context=2), {"model.attention_kernel": "chunked"}, "set 'auto', or mesh.context=1"),
])
def test_what_the_mesh_does_not_divide_is_refused(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        make(mesh, **changes)


@pytest.mark.parametrize("change", [
    lambda b: {**b, "tokens": b["tokens"].astype(np.int64)}, lambda b: {**b, "weights": b["weights"][:4]},
    lambda b: {**b, "mask": b["weights"]}, lambda b: {k: v for k, v in b.items() if k != "targets"},
], ids=["dtype", "rows", "extra", "missing"])
def test_a_batch_other_than_the_spec_is_refused(watched, change):
    with pytest.raises(UserError, match="batch_spec says"):
        watched.place(change(batches(watched, 1)[0]))


def test_unrolled_layers_need_less_memory_than_scanned_ones():
    """Their weight gradients are made layer by layer; left to the end, all activations would be held until then."""
    size = {"model.num_layers": 8, "model.embed_dim": 64, "model.head_dim": 8, "model.mlp_dim": 256, "model.dropout": 0.0,
            "model.attention_kernel": "auto", "model.max_seq_len": 64, "seq_len": 64, "batch_size": 16}
    memory = {}
    for scan in (True, False):
        program = make(model="unrolled", **size, **{"model.scan_layers": scan})
        compiled = program.train_step.lower(program.abstract, program.batch_spec, 0).compile()
        memory[scan] = compiled.memory_analysis().temp_size_in_bytes
    assert memory[False] < 0.85 * memory[True], memory   # seen: 0.69, and 0.98 without


# --- memory of the host -----------------------------------------------------------------------------------------------

def test_optimizer_state_on_the_host_trains_the_same():
    """Bit for bit, and it is there between the steps; scalars stay on the device."""
    changes = {"optimizer.ema_decay": 0.9, "health.skip_grad_norm_factor": 3.0}
    on_host, on_device = make(dict(fsdp=2), **changes, **{"optimizer.offload": "host"}), make(dict(fsdp=2), **changes)
    data = batches(on_host, 2)
    got, want = run(on_host, data), run(on_device, data)
    kinds = lambda t: {a.sharding.memory_kind for a in jax.tree.leaves(t) if a.ndim}
    for state in (got[4], on_host.abstract):
        assert kinds(state.opt_state) == {"pinned_host"}
    assert kinds((got[4].params, got[4].ema)) == {"device"} == kinds(want[4])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got[4], want[4])
    held = sharding.bytes_per_device(on_device.abstract.opt_state)
    assert sharding.bytes_per_device(on_host.abstract.opt_state) < 0.01 * held


@pytest.mark.parametrize("changes", [{"optimizer.offload": "host"}, {"model.remat": "offload_dots"}])
def test_a_platform_without_such_memory_is_told(monkeypatch, changes):
    monkeypatch.setattr(sharding, "HOST", "memory_of_the_moon")
    (key, value), = changes.items()
    with pytest.raises(UserError, match=f"{key}='{value}' needs memory of kind 'memory_of_the_moon', .*.cpu. has only"):
        make(**changes)

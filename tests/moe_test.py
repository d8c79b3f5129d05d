"""Experts: products by groups, routing, what is dropped, the router's losses; the same on every mesh.

That logits equal those of a loop over tokens, cached and not, is in model_test.py.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from fm_jax import config as config_lib
from fm_jax import kernels, model, objectives, optim, sharding, tree
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError
from fm_jax.step import Program
import naive
import step_test

ROOT = pathlib.Path(__file__).resolve().parent.parent

# --- products by groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 0, 9, 3), (0, 0, 0, 21), (1, 1, 1, 1), (0, 0, 0, 0), (300, 7, 130, 43)], ids=str)
def test_grouped_matmul_equals_a_loop_over_rows(sizes):
    """Values and gradients, by blocks and by ragged_dot, as on TPU; rows behind the groups change nothing."""
    rng, M, D, F = np.random.default_rng(0), sum(sizes) + 4, 6, 5
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((M, D), (4, D, F), (M, F)))
    dy[sum(sizes):] = 0
    expert = np.repeat(np.arange(4), sizes)
    want, dx, dw = np.zeros((M, F)), np.zeros((M, D)), np.zeros(w.shape)
    for m, e in enumerate(expert):
        want[m], dx[m] = x[m] @ w[e], w[e] @ dy[m]
        dw[e] += np.outer(x[m], dy[m])
    n, counts = len(expert), jnp.array(sizes, jnp.int32)

    @jax.jit
    def compute(x, w, dy, counts):
        y, back = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, counts), x, w)
        ragged = jax.lax.ragged_dot
        return ((y, *back(dy)), (ragged(x, w, counts), ragged(dy, w.swapaxes(1, 2), counts),
                                 kernels._ragged_weights(x, dy, counts)),
                (kernels.grouped_matmul_reference(x, w, counts),))

    for results in compute(x, w, dy, counts):
        for got, b, rows in zip(results, (want, dx, dw), (n, n, 4)):   # float32 sums of up to 300 terms
            np.testing.assert_allclose(got[:rows], b[:rows], rtol=1e-4, atol=1e-4)


def test_grouped_matmul_adds_weight_gradients_up_in_float32():
    x = jnp.ones((1000, 8), jnp.bfloat16)
    w = jnp.zeros((2, 8, 4), jnp.bfloat16)
    total = lambda w: (kernels.grouped_matmul(x, w, jnp.array([700, 300])) * jnp.bfloat16(1 / 3)).sum()
    dw = jax.jit(jax.grad(total))(w)
    third = float(jnp.bfloat16(1 / 3))
    np.testing.assert_allclose(np.asarray(dw[:, 0, 0], float), [700 * third, 300 * third], rtol=2 ** -8)


# --- one layer ------------------------------------------------------------------------------------------------------

BASE = dict(vocab_size=64, num_layers=2, embed_dim=16, num_heads=8, head_dim=4, num_kv_heads=4, mlp_dim=32,
            max_seq_len=16, loss_chunk_tokens=20, num_experts=8, experts_per_token=3, expert_dim=8)
DEEPSEEK = dict(router_score="sigmoid", router_bias=True, router_scale=2.5, num_shared_experts=2)
B, T, D = 8, 12, 16
# As in step_test.py: rows with padding at their end.
REAL = np.arange(T) < np.array([12, 3, 12, 7, 1, 0, 9, 12])[:, None]


def layer(seed=0, **changes):
    """Returns (arch, random parameters of one layer's experts, x [B, T, D])."""
    arch, rng = Architecture(**{**BASE, **changes}), np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda k: model.Moe(arch).init(k, jnp.zeros((1, 1, D))), jax.random.key(0))["params"]
    params = jax.tree.map(lambda p: rng.normal(0, 0.4, p.shape).astype(np.float32), sharding.unbox(shapes)[0])
    return arch, params, rng.normal(size=(B, T, D)).astype(np.float32)


def computed(arch, mesh=None):
    """Returns a jitted function: (params, x) -> gradients of a sum that all of the next enter, (output, Routing)."""
    return _computed(tuple((k, v) for k, v in vars(arch).items() if k != "rope_scaling"), tuple((mesh or {}).items()))


@functools.cache
def _computed(fields, mesh):
    arch, layout = Architecture(**dict(fields)), sharding.Layout(sharding.make_mesh(dict(mesh))) if mesh else None

    def loss(params, x):
        y, routing = model.Moe(arch, layout).apply({"params": params}, x, jnp.asarray(REAL))
        parts = jax.tree.map(lambda a: a[None], routing).losses(jnp.asarray(REAL.sum(1), jnp.float32))
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() + sum(parts[:3]), (y, routing)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


MODES = {"dropless": {}, "deepseek": DEEPSEEK, "capacity": dict(capacity_factor=1.0),
         "switch": dict(experts_per_token=1, router_renormalize=False, gated_mlp=False, capacity_factor=0.7)}
MESHES = [dict(expert=8), dict(slice=2, expert=4), dict(data=2, expert=2, tensor=2), dict(fsdp=2, expert=2, tensor=2),
          dict(fsdp=4, tensor=2), dict(data=2, fsdp=4), dict(expert=2, context=2, tensor=2), dict(fsdp=2, context=4)]


BY_DEFAULT = [("deepseek", MESHES[3]), ("deepseek", MESHES[6]), ("capacity", MESHES[2])]   # the rest is slow


@pytest.mark.parametrize("mode, mesh", [
    pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow)
    for case in [*(("deepseek", m) for m in MESHES), *(("capacity", m) for m in MESHES[1:5])]], ids=str)
def test_every_mesh_computes_the_same(mode, mesh):
    """Outputs, statistics and gradients of one device, to the order of float32 sums: seen below 2e-6."""
    arch, params, x = layer(**MODES[mode])
    want, got = computed(arch)(params, x), computed(arch, mesh)(params, x)
    for name, a in tree.flatten({"grads": want[0][0], "x": want[0][1], "y": want[1][0]} | want[1][1]._asdict()).items():
        b = tree.flatten({"grads": got[0][0], "x": got[0][1], "y": got[1][0]} | got[1][1]._asdict())[name]
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=2e-5, err_msg=name)


def test_a_pipeline_can_run_experts_inside_its_own_map():
    """Under a shard_map over `stage`, the layer's own takes the other axes."""
    arch, params, x = layer(**DEEPSEEK)
    outer = sharding.Layout(sharding.make_mesh(dict(stage=2, expert=2, tensor=2)))
    sum_of = lambda p, x, layout: jnp.sin(model.Moe(arch, layout).apply({"params": p}, x)[0]).sum()
    two = jax.tree.map(lambda p: np.stack([p, p[::-1]]), params)   # each stage has parameters of its own

    def stages(two, x):
        def stage(p, x):
            inner = sharding.Layout(jax.sharding.get_abstract_mesh())
            return sum_of(jax.tree.map(lambda a: a[0], p), x[0], inner)[None]

        return jax.shard_map(stage, mesh=outer.mesh, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"},
                             check_vma=False)(two, jnp.stack([x, x])).sum()

    alone = lambda two, x: sum(sum_of(jax.tree.map(lambda a: a[i], two), x, None) for i in range(2))
    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(two, x) for f in (stages, alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_equals_the_loop_over_tokens(mode):
    arch, params, x = layer(**MODES[mode])
    _, (y, routing) = computed(arch)(params, x)
    p = naive._float64(params)
    for row in range(B):
        want = naive.moe(arch, p, list(x[row].astype(float)), REAL[row].astype(int))
        np.testing.assert_allclose(y[row], want, rtol=1e-4, atol=1e-5)   # float32 against float64
    assert (np.asarray(routing.dropped_B) > 0).any() == bool(arch.capacity_factor)


def test_gradients_are_those_of_the_dense_definition():
    """Of every expert for every token, weighted by 0 where it was not chosen: no sorting, no slots."""
    arch, params, x = layer(**DEEPSEEK)

    def dense(params, x):
        ids, weights, _, routing = model.route(arch, x, params["router"], params["router_bias"], jnp.asarray(REAL))
        full = (jax.nn.one_hot(ids, 8) * weights[..., None]).sum(2)   # an id of E gives a row of zeros
        gate, up = (jnp.einsum("btd,edf->btef", x, params[name]) for name in ("w_gate", "w_up"))
        h = jax.nn.silu(gate) * up
        y = jnp.einsum("btef,efd,bte->btd", h, params["w_down"], full)
        s = params["shared"]
        y += (jax.nn.silu(x @ s["w_gate"]) * (x @ s["w_up"])) @ s["w_down"]
        parts = jax.tree.map(lambda a: a[None], routing).losses(jnp.asarray(REAL.sum(1), jnp.float32))
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() + sum(parts[:3])

    want = jax.jit(jax.grad(dense, argnums=(0, 1)))(params, x)
    got = computed(arch)(params, x)[0]
    for name, a in tree.flatten({"params": want[0], "x": want[1]}).items():
        np.testing.assert_allclose(tree.flatten({"params": got[0], "x": got[1]})[name], a, rtol=1e-4, atol=1e-4,
                                   err_msg=name)


def test_with_room_for_all_nothing_is_dropped():
    arch, params, x = layer()
    roomy = Architecture(**{**BASE, "capacity_factor": 8 / 3})   # num_experts / experts_per_token: a whole row
    want, got = computed(arch)(params, x), computed(roomy)(params, x)
    assert not np.asarray(got[1][1].dropped_B).any()
    np.testing.assert_allclose(got[1][0], want[1][0], rtol=1e-5, atol=1e-5)


def test_what_is_dropped_depends_on_earlier_tokens_alone():
    arch, params, x = layer(capacity_factor=0.5)
    _, (want, _) = computed(arch)(params, x)
    other = x.copy()
    other[:, 6:] = np.random.default_rng(9).normal(size=other[:, 6:].shape)
    _, (got, _) = computed(arch)(params, other)
    np.testing.assert_array_equal(got[:, :6], want[:, :6])
    assert np.abs(np.asarray(got - want)[0, 6:]).min() > 0


def test_padding_has_no_expert_and_does_not_count():
    for mode in ({}, dict(capacity_factor=0.5)):
        arch, params, x = layer(**mode)
        grads, (want, routing) = computed(arch)(params, x)
        other = np.where(REAL[..., None], x, 7.0).astype(np.float32)
        _, (got, same) = computed(arch)(params, other)
        np.testing.assert_array_equal(np.asarray(want)[~REAL], 0)
        np.testing.assert_array_equal(np.asarray(got)[REAL], np.asarray(want)[REAL])
        jax.tree.map(np.testing.assert_array_equal, same, routing)
        np.testing.assert_array_equal(routing.tokens_B, REAL.sum(1))
        np.testing.assert_array_equal(np.asarray(routing.load_BE).sum(1), 3 * REAL.sum(1))


# --- the router's losses --------------------------------------------------------------------------------------------

def test_router_losses_equal_their_formulas():
    arch, params, x = layer()
    _, (_, routing) = computed(arch)(params, x)
    weight = np.array([3.0, 1, 0, 2, 1, 0, 4, 5])
    two = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), routing)   # two layers, the second with the rows turned round
    balance, z, _, metrics = two.losses(jnp.asarray(weight))
    want_balance = want_z = entropy = 0.0
    load = np.zeros(8)
    for row, row_weights in enumerate(zip(weight, weight[::-1])):
        f, p, zs = np.zeros(8), np.zeros(8), []
        tokens = x[row][REAL[row]].astype(float)
        for token in tokens:
            logits = token @ params["router"]
            probability = np.exp(logits) / np.exp(logits).sum()
            f[np.argsort(-probability)[:3]] += 8 / 3 / len(tokens)
            p += probability / len(tokens)
            zs.append(np.log(np.exp(logits).sum()) ** 2)
            entropy -= 2 * (probability * np.log(probability)).sum()
        load += f * len(tokens) * 3 / 8
        if len(tokens):
            want_balance += sum(row_weights) * (f @ p)
            want_z += sum(row_weights) * np.mean(zs)
    np.testing.assert_allclose([balance, z], [want_balance, want_z], rtol=1e-5)
    means = {name: float(a / b) for name, (a, b) in metrics.items()}
    share = load / load.sum()
    want = {"load_balance_loss": want_balance / 2 / weight.sum(), "router_z_loss": want_z / 2 / weight.sum(),
            "router_entropy": entropy / 2 / REAL.sum(), "dropped_frac": 0, "most_loaded_expert_frac": share.max(),
            "least_loaded_expert_frac": share.min()}
    assert means == pytest.approx(want, rel=1e-5)


def test_the_bias_is_pushed_down_where_the_load_is_high():
    arch, params, x = layer(**DEEPSEEK)
    _, (_, routing) = computed(arch)(params, x)
    weight = REAL.sum(1).astype(np.float32)

    def value(bias):
        _, _, _, r = model.route(arch, jnp.asarray(x), params["router"], bias, jnp.asarray(REAL))
        return jax.tree.map(lambda a: a[None], r).losses(jnp.asarray(weight))[2]

    loss, gradient = jax.jit(jax.value_and_grad(value))(jnp.asarray(params["router_bias"]))
    load = np.asarray(routing.load_BE)
    assert loss == 0
    want = (load - load.mean(1, keepdims=True)).sum(0) / 3   # weights are the rows' tokens: each choice counts alike
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["bias", "loss"])
def test_the_load_evens_out(by):
    """Tokens with a mean, so that most choose the same three experts: Adam on the bias, or on the loss, ends that."""
    arch, params, x = layer(router_bias=True, router_score="sigmoid" if by == "bias" else "softmax")
    x, tx = jnp.asarray(x + 1), optax.adam(0.01)
    router, bias = jnp.asarray(params["router"]), jnp.zeros(8)

    def loss(trained):
        _, _, _, routing = model.route(arch, x, *((router, trained) if by == "bias" else (trained, None)))
        routing = jax.tree.map(lambda a: a[None], routing)
        return routing.losses(jnp.ones(B))[2 if by == "bias" else 0], routing.load_BE.sum((0, 1)).max() / (3 * B * T)

    def step(state, _):
        trained, opt_state = state
        grads, most = jax.grad(loss, has_aux=True)(trained)
        updates, opt_state = tx.update(grads, opt_state)
        return (trained + updates, opt_state), most

    trained = bias if by == "bias" else router
    _, most = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=100))(trained)
    assert most[0] > 0.3 and most[-1] < 0.16, most   # of all choices: 1 / 3 at most, 1 / 8 if even


# --- training -------------------------------------------------------------------------------------------------------

def make(mesh=None, **changes):
    """Returns the Program of a tiny model of experts, as step_test.make does for dense ones."""
    c = config_lib.defaults()
    c.model.update(**BASE)
    c.batch_size, c.seq_len, c.steps = step_test.BATCH, step_test.LENGTH, 10
    c.optimizer.update(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    c.objective_args.update(z_loss=0.01, load_balance_loss=0.1)
    c = config_lib.resolve(config_lib.override(c, changes))
    layout = sharding.Layout(sharding.make_mesh(mesh or dict(data=1)))
    return Program(c, objectives.load(c, None, layout), layout)


TRAINED = {
    "deepseek": {f"model.{k}": v for k, v in DEEPSEEK.items()} | {"model.num_layers": 3, "model.num_dense_layers": 1},
    "capacity": {"model.capacity_factor": 1.0, "objective_args.router_z_loss": 0.01, "model.remat": "full",
                 "model.scan_layers": False},
}


@pytest.fixture(scope="module")
def one_device():
    """Returns a function: name of TRAINED -> its run of three steps on one device, made once."""
    @functools.cache
    def made(name):
        program = make(**TRAINED[name])
        return step_test.run(program, step_test.batches(program, 3))
    return made


@pytest.mark.parametrize("name, mesh", [
    ("deepseek", dict(expert=2, context=2, tensor=2)),
    pytest.param("deepseek", dict(data=2, fsdp=2, expert=2), marks=pytest.mark.slow),
    pytest.param("deepseek", dict(stage=2, expert=2, tensor=2), marks=pytest.mark.slow),
    pytest.param("capacity", dict(slice=2, expert=2, tensor=2), marks=pytest.mark.slow),
], ids=str)
def test_every_mesh_trains_the_same(name, mesh, one_device):
    program = make(mesh, **TRAINED[name])
    step_test.assert_same_run(step_test.run(program, step_test.batches(program, 3)), one_device(name))


@pytest.mark.parametrize("name", ["capacity", pytest.param("deepseek", marks=pytest.mark.slow)])
def test_accumulation_equals_the_large_batch(name, one_device):
    program = make(accumulation_steps=4, **TRAINED[name])
    step_test.assert_same_run(step_test.run(program, step_test.batches(program, 3)), one_device(name))


def test_only_training_drops_tokens():
    program = make(**{"model.capacity_factor": 0.3})
    batch, state = program.place(step_test.batches(program, 1)[0]), program.init()
    held_out = program.eval_step(state.params, None, batch)
    dropless = make()
    want = dropless.eval_step(state.params, None, batch)
    assert float(held_out["dropped_frac"][0]) == 0
    jax.tree.map(np.testing.assert_array_equal, held_out, want)
    _, metrics = program.train_step(state, batch, 0)
    dropped, choices = map(float, metrics["dropped_frac"])
    assert 0.2 < dropped / choices < 0.9


# --- shapes, counts, what does not fit ------------------------------------------------------------------------------

# Of the published weights, in parameters: all, and those of a token (the model cards' 13B, 3.3B, 2.8B).
PUBLISHED = {"mixtral-8x7b": (46_702_792_704, 12.9e9), "qwen3-30b-a3b": (30_532_122_624, 3.3e9),
             "deepseek-moe-16b": (16_375_728_128, 2.8e9)}


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-moe-16b", "deepseek-v3-like"])
def test_published_shapes_have_their_parameters(name):
    c = config_lib.resolve(config_lib.from_file(f"{ROOT / 'configs' / 'moe.py'}:{name}"))
    arch = Architecture(**c.model.to_dict())
    objective = objectives.load(c)
    boxed = jax.eval_shape(objective.init, jax.random.key(0))
    params, axes = sharding.unbox(boxed)
    assert tree.count(params) == arch.param_count()
    if name in PUBLISHED:
        total, active = PUBLISHED[name]
        assert arch.param_count() == total
        assert arch.matmul_param_count() == pytest.approx(active, rel=0.1)   # the embedding table is not counted here
    layout = sharding.Layout(sharding.abstract_mesh(dict(expert=8, fsdp=4, tensor=2)))
    placed = layout.parameters(params, axes)["transformer"]["layers"]["moe"]["w_down"]
    assert placed.spec == P(None, "expert", "tensor", "fsdp")


def test_flops_are_of_the_experts_of_a_token():
    arch = Architecture(**BASE, num_shared_experts=2)
    dense = Architecture(**{**BASE, "num_experts": 0, "expert_dim": 0})
    more = 2 * (16 * 8 + (3 + 2) * 3 * 16 * 8 - 3 * 16 * 32)   # two layers: a router, three experts and two, but no mlp
    assert arch.flops_per_token(12) - dense.flops_per_token(12) == 6 * more


def test_optimizers_see_one_matrix_for_each_expert():
    assert optim.matrix_axes(("layers", "experts", "expert_embed", "mlp")) == ((2,), (3,))
    assert optim.matrix_axes(("layers", "experts", "mlp", "expert_embed")) == ((2,), (3,))
    assert optim.matrix_axes(("layers", "router")) is None


@pytest.mark.parametrize("changes, message", [
    (dict(experts_per_token=9), "experts_per_token=9 must be from 1 to num_experts=8"),
    (dict(mlp_bias=True), "experts have no biases"), (dict(router_score="softmx"), "did you mean 'softmax'"),
    (dict(num_experts=0), "expert_dim=8 needs num_experts"),
    (dict(num_experts=0, expert_dim=0, capacity_factor=1.5), "capacity_factor=1.5 needs num_experts"),
    (dict(capacity_factor=-1.0), "must be 0 or more"), (dict(num_dense_layers=2), "must be below num_layers=2"),
    (dict(num_experts=0, expert_dim=0, num_dense_layers=1), "num_dense_layers=1 needs num_experts"),
])
def test_bad_architectures_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Architecture(**{**BASE, **changes})


@pytest.mark.parametrize("mesh, changes, message", [
    (dict(expert=8), {"model.num_experts": 12}, "'experts' of size 12 is not divisible by mesh.expert=8"),
    (dict(tensor=2), {"model.expert_dim": 7}, "'mlp' of size 7 is not divisible by mesh.tensor=2"),
    (dict(expert=2, context=2), {"model.capacity_factor": 1.0},
     "capacity_factor=1.0: .* which mesh.context=2 cuts; set capacity_factor=0, or mesh.context=1"),
    (None, {"model.num_experts": 0, "model.expert_dim": 0}, "load_balance_loss=0.1 needs experts"),
    (None, {"model.router_score": "sigmoid", "objective_args.router_z_loss": 0.1}, "router_z_loss=0.1 .*set it to 0"),
])
def test_what_does_not_fit_is_refused(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        make(mesh, **changes)

"""The optimizer against naive NumPy, one matrix at a time, and the bookkeeping around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, optim, sharding, tree
from fm_jax.errors import UserError

L, D, K, G, H, F, V = 3, 8, 2, 2, 4, 12, 16
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "attention": {"wq": ("layers", "embed", "kv_heads", "groups", "head"),
                      "wo": ("layers", "kv_heads", "groups", "head", "embed"),
                      "q_bias": ("layers", "kv_heads", "groups", "head")},
        "mlp": {"w_up": ("layers", "embed", "mlp"), "w_down": ("layers", "mlp", "embed")},
        "norm": {"scale": ("layers", "norm")},
    },
    "final_norm": {"scale": ("norm",)},
}
SIZES = dict(layers=L, embed=D, kv_heads=K, groups=G, head=H, mlp=F, vocab=V, norm=D)
NAMES = config_lib.CHOICES["optimizer.name"]


def random_tree(seed, dtype=np.float32, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=[sizes[n] for n in a]), dtype), AXES,
                        is_leaf=lambda x: isinstance(x, tuple))


def settings(**changes):
    return config_lib.override(config_lib.defaults(), {f"optimizer.{k}": v for k, v in changes.items()}).optimizer


def make(o, params, total=10, warmup=0, decay=2):
    return optim.make(o, total_steps=total, warmup_steps=warmup, decay_steps=decay, params=params, axes=AXES)


def steps(o, params, gradients):
    """Returns the parameters after each gradient."""
    tx, _ = make(o, params)
    state, out = jax.jit(tx.init)(params), []
    for t, g in enumerate(gradients):
        updates, state = jax.jit(tx.update)(g, state, params, step=t)
        params = optax.apply_updates(params, updates)
        out.append({n: np.asarray(p) for n, p in tree.flatten(params).items()})
    return out


def numpy_tree(t):
    return {n: np.asarray(x, np.float64) for n, x in tree.flatten(t).items()}


def decays(name):
    return not name.endswith(("scale", "bias"))


def test_adamw_equals_numpy():
    o = settings(learning_rate=0.1, schedule="constant", weight_decay=0.3, clip_norm=0.5)
    params, grads = random_tree(0), [random_tree(1), random_tree(2), random_tree(3)]
    p, m, v = numpy_tree(params), {}, {}
    for t, (g, got) in enumerate(zip(map(numpy_tree, grads), steps(o, params, grads)), start=1):
        norm = np.sqrt(sum((x ** 2).sum() for x in g.values()))
        for n in p:
            gn = g[n] * min(1, 0.5 / norm)
            m[n] = 0.9 * m.get(n, 0) + 0.1 * gn
            v[n] = 0.95 * v.get(n, 0) + 0.05 * gn ** 2
            step = (m[n] / (1 - 0.9 ** t)) / (np.sqrt(v[n] / (1 - 0.95 ** t)) + 1e-8)
            p[n] = p[n] - 0.1 * (step + 0.3 * p[n] * decays(n))
            np.testing.assert_allclose(got[n], p[n], rtol=2e-5, atol=2e-6)   # float32 against float64


def test_lion_equals_numpy():
    o = settings(name="lion", learning_rate=0.1, schedule="constant", weight_decay=0.3, clip_norm=0.0)
    params, grads = random_tree(0), [random_tree(1), random_tree(2)]
    p, m = numpy_tree(params), {}
    for g, got in zip(map(numpy_tree, grads), steps(o, params, grads)):
        for n in p:
            step = np.sign(0.9 * m.get(n, 0) + 0.1 * g[n])
            m[n] = 0.95 * m.get(n, 0) + 0.05 * g[n]
            p[n] = p[n] - 0.1 * (step + 0.3 * p[n] * decays(n))
            np.testing.assert_allclose(got[n], p[n], rtol=1e-5, atol=1e-6)   # float32 rounding


def newton_schulz(x, steps=5):
    """The quintic iteration of Jordan's Muon on one matrix, in float64."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def test_muon_equals_each_layer_alone_and_is_nearly_orthogonal():
    o = settings(name="muon", muon_learning_rate=0.5, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    params, grad = random_tree(0), random_tree(1)
    got = steps(o, params, [grad])[0]
    before, g = numpy_tree(params), numpy_tree(grad)
    shapes = {"layers.attention.wq": (D, K * G * H), "layers.attention.wo": (K * G * H, D),
              "layers.mlp.w_up": (D, F), "layers.mlp.w_down": (F, D)}
    for name, (rows, columns) in shapes.items():
        for layer in range(L):
            update = (before[name][layer] - got[name][layer]).reshape(rows, columns) / 0.5
            want = newton_schulz(g[name][layer].reshape(rows, columns)) * max(1, columns / rows) ** 0.5
            np.testing.assert_allclose(update, want, atol=2e-4)   # ten float32 products, against float64
            s = np.linalg.svd(update, compute_uv=False) / max(1, columns / rows) ** 0.5
            assert 0.5 < s.min() and s.max() < 1.3   # the range that the iteration's coefficients aim at


def test_muon_leaves_embeddings_norms_and_biases_to_adamw():
    params, grads = random_tree(0), [random_tree(1), random_tree(2)]
    common = dict(clip_norm=1.0, learning_rate=0.1)
    muon, adamw = steps(settings(name="muon", **common), params, grads), steps(settings(**common), params, grads)
    for name in muon[-1]:
        same = np.array_equal(muon[-1][name], adamw[-1][name])
        assert same == (name.split(".")[-1] not in ("wq", "wo", "w_up", "w_down")), name


def test_muon_without_stacked_matrices_is_refused():
    with pytest.raises(UserError, match="muon"):
        optim.make(settings(name="muon", no_decay=()), total_steps=2, warmup_steps=0, decay_steps=0,
                   params={"w": jnp.ones((4, 4))}, axes={"w": ("vocab", "embed")})


def test_adafactor_keeps_factors_of_each_layer_and_equals_numpy():
    sizes = dict(SIZES, embed=128, kv_heads=2, groups=2, head=64, vocab=130, mlp=140)
    o = settings(name="adafactor", learning_rate=0.1, schedule="constant", b2=0.3, weight_decay=0.3, clip_norm=0.0)
    params, grads = random_tree(0, sizes=sizes), [random_tree(1, sizes=sizes), random_tree(2, sizes=sizes)]
    tx, _ = make(o, params)
    kept = {n: x.shape for n, x in tree.flatten(jax.eval_shape(tx.init, params)).items()}
    second_moments = [s for n, s in kept.items() if ".v" in n and n.endswith("attention.wq")]
    assert sorted(second_moments) == sorted([(1,), (L, 128), (L, 256)])

    p, rows, columns, full, m = numpy_tree(params), {}, {}, {}, {}
    for t, (g, got) in enumerate(zip(map(numpy_tree, grads), steps(o, params, grads)), start=1):
        b2 = min(0.3, 1 - t ** -0.8)
        for n in p:
            last = n.split(".")[-1]
            for i in range(L) if n.startswith("layers") else [slice(None)]:
                x = g[n][i]
                if last in ("wq", "wo", "w_up", "w_down", "embedding"):
                    matrix = x.reshape(x.shape[0], -1) if last != "wo" else x.reshape(-1, x.shape[-1])
                    square = matrix ** 2 + 1e-30
                    key = (n, str(i))
                    rows[key] = b2 * rows.get(key, 0) + (1 - b2) * square.mean(1)
                    columns[key] = b2 * columns.get(key, 0) + (1 - b2) * square.mean(0)
                    v = np.outer(rows[key], columns[key]) / rows[key].mean()
                    u = (matrix / np.sqrt(v)).reshape(x.shape)
                else:
                    key = (n, str(i))
                    full[key] = b2 * full.get(key, 0) + (1 - b2) * (x ** 2 + 1e-30)
                    u = x / np.sqrt(full[key])
                u = u / max(1, np.sqrt((u ** 2).mean()))
                m[key] = 0.9 * m.get(key, 0) + 0.1 * u
                p[n][i] -= 0.1 * (m[key] + 0.3 * p[n][i] * decays(n))
            np.testing.assert_allclose(got[n], p[n], rtol=1e-4, atol=1e-5, err_msg=n)   # float32 against float64


@pytest.mark.parametrize("name", NAMES)
def test_no_decay_is_respected(name):
    params, zero = random_tree(0), jax.tree.map(jnp.zeros_like, random_tree(0))
    o = settings(name=name, learning_rate=0.5, muon_learning_rate=0.5, schedule="constant", weight_decay=0.5,
                 no_decay=(".*scale", "embedding"))
    after = steps(o, params, [zero])[0]
    for n, before in tree.flatten(params).items():
        factor = 1 if n.endswith("scale") or n == "embedding" else 0.75
        np.testing.assert_allclose(after[n], factor * np.asarray(before), rtol=1e-6)   # a zero gradient only decays


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="no_decay.*'layers.atention.*'.*nearest.*layers.attention"):
        make(settings(no_decay=("layers.atention.*",)), random_tree(0))


@pytest.mark.parametrize("kind", config_lib.CHOICES["optimizer.schedule"])
@pytest.mark.parametrize("total, warmup, decay", [(20, 4, 5), (20, 0, 20), (1, 1, 0), (5, 0, 0), (8, 8, 0)])
def test_schedule_equals_numpy(kind, total, warmup, decay):
    o = settings(schedule=kind, final_learning_rate_frac=0.25)
    rate = optim.schedule(o, 2.0, total_steps=total, warmup_steps=warmup, decay_steps=decay)
    for t in range(total + 3):
        if t < warmup:
            want = 2.0 * (t + 1) / (warmup + 1)
        else:
            start = total - decay if kind == "wsd" else warmup
            x = min(max(t - start, 0) / (total - start), 1) if total > start else 0
            want = {"cosine": 2.0 * (0.25 + 0.75 * (1 + np.cos(np.pi * x)) / 2), "constant": 2.0,
                    "linear": 2.0 - 1.5 * x, "wsd": 2.0 - 1.5 * x}[kind]
        assert float(rate(t)) == pytest.approx(want, rel=1e-5), t   # float32 cosine


def test_schedule_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="do not fit into the run of 10"):
        make(settings(schedule="wsd"), random_tree(0), total=10, warmup=6, decay=5)


def test_schedule_drives_the_update_also_after_a_skipped_step():
    o = settings(name="lion", learning_rate=1.0, weight_decay=0.0, schedule="linear", final_learning_rate_frac=0.0)
    params = random_tree(0)
    tx, rate = make(o, params, total=5, warmup=1)
    tx = optim.skip_outliers(tx, 2.0, 1)
    state = tx.init(params)
    for t, size in enumerate((1, 1, 9, 1, 1)):
        updates, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, size), params), state, params, step=t)
        # Lion's direction is the sign.
        np.testing.assert_allclose(updates["embedding"], -float(rate(t)) if size == 1 else 0.0, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_keep_float32_state_and_a_stable_structure(name):
    params = random_tree(0, jnp.bfloat16)
    tx, _ = make(settings(name=name), params)
    state = tx.init(params)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    updates, after = tx.update(random_tree(1, jnp.bfloat16), state, params, step=0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert optax.apply_updates(params, updates)["embedding"].dtype == jnp.bfloat16


def test_global_norm_is_summed_in_float32():
    ones = {"w": jnp.ones(200, jnp.bfloat16), "b": jnp.ones(57, jnp.bfloat16)}   # 257 is no bfloat16
    assert float(optim.global_norm(ones)) == pytest.approx(257 ** 0.5, rel=1e-6)   # float32 square root
    clipped, _ = optim.clip_by_global_norm(0.5).update({"w": 3 * jnp.ones(16)}, optax.EmptyState())
    np.testing.assert_allclose(clipped["w"], 0.125, rtol=1e-6)
    small, _ = optim.clip_by_global_norm(50.0).update({"w": 3 * jnp.ones(16)}, optax.EmptyState())
    np.testing.assert_array_equal(small["w"], 3.0)


@pytest.mark.parametrize("name", NAMES)
def test_moments_get_their_parameters_shardings(name):
    params = random_tree(0)
    placed = tree.names(params)   # any value stands for a sharding
    tx, _ = make(settings(name=name), params)
    shardings = optim.state_shardings(tx, params, placed, "replicated")
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    shapes = {n: p.shape for n, p in tree.flatten(params).items()}
    for leaf, s in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        assert s == "replicated" or shapes[s] == leaf.shape
    moments = {"adamw": 2, "lion": 1, "adafactor": 1, "muon": 1}[name]
    for n in ("layers.attention.wq", "layers.mlp.w_down"):
        assert jax.tree.leaves(shardings).count(n) >= moments


@pytest.mark.parametrize("name", NAMES)
def test_sharded_update_equals_unsharded(name):
    """On 8 devices, with sharded parameters and moments, the step is the single-device one."""
    sizes = dict(SIZES, embed=16, vocab=24)
    params, grad = random_tree(0, sizes=sizes), random_tree(1, sizes=sizes)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"embed": "fsdp", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    place = lambda a: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(rules.get(n) for n in a)))
    shardings = jax.tree.map(place, AXES, is_leaf=lambda x: isinstance(x, tuple))
    tx, _ = make(settings(name=name), params)
    of_state = optim.state_shardings(tx, params, shardings, place(()))
    state = jax.jit(tx.init, out_shardings=of_state)(jax.device_put(params, shardings))
    wq = [x for x in jax.tree.leaves(state) if x.shape == params["layers"]["attention"]["wq"].shape]
    assert wq and all(len(x.sharding.device_set) == 8 and not x.is_fully_replicated for x in wq)
    update = jax.jit(tx.update, out_shardings=(shardings, of_state))
    got, _ = update(jax.device_put(grad, shardings), state, jax.device_put(params, shardings), step=0)
    want, _ = jax.jit(tx.update)(grad, tx.init(params), params, step=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), got, want)   # order of sums


def test_ema_equals_numpy():
    params, decay = [random_tree(s) for s in range(4)], 0.3
    ema = optim.ema_init(params[0])
    want = numpy_tree(params[0])
    for t, p in enumerate(params[1:]):
        ema = optim.ema_update(ema, p, decay, t)
        d = min(decay, (1 + t) / (10 + t))
        want = {n: d * want[n] + (1 - d) * x for n, x in numpy_tree(p).items()}
    for n, x in tree.flatten(ema).items():
        np.testing.assert_allclose(x, want[n], rtol=1e-5, atol=1e-6)   # float32 rounding


def test_outlier_steps_change_nothing():
    norms = [2.0, 9.0, 4.0, 100.0, 5.0, 11.0, 10.0, 0.0]   # 9 comes within the warm-up of two steps
    params = {"w": jnp.ones(4)}
    tx = optim.skip_outliers(optax.sgd(1.0, momentum=0.5), 2.0, 2)
    state, plain = tx.init(params), optax.sgd(1.0, momentum=0.5)
    plain_state, taken, mean = plain.init(params), [], 0.0
    for norm in norms:
        take = len(taken) < 2 or norm <= 2.0 * mean
        # Far from 0.98, the average is a plain one over the steps taken; an outlier is added as one at the limit.
        share = 1 / (len(taken) + 1)
        mean += share * ((norm if take else 2.0 * mean) - mean)
        g = {"w": jnp.full(4, norm / 2)}
        updates, state = tx.update(g, state, params)
        want = {"w": jnp.zeros(4)}
        if take:
            want, plain_state = plain.update(g, plain_state, params)
            taken.append(norm)
        np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6)   # float32 rounding
        np.testing.assert_allclose(state.mean_norm, mean, rtol=1e-6)
    assert int(state.taken) == len(taken) < len(norms)


def test_a_lasting_rise_of_the_gradient_norm_is_followed_and_no_warmup_skips_not_everything():
    tx = optim.skip_outliers(optax.sgd(1.0), 2.0, 0)
    params, update = {"w": jnp.ones(1)}, jax.jit(tx.update)
    state = tx.init(params)
    for norm in [1.0] * 60 + [20.0] * 300:
        _, state = update({"w": jnp.full(1, norm)}, state, params)
    # A skipped step multiplies the mean by 1 + 0.02 (2 - 1): it passes 20 / 2 after ln 10 / ln 1.02 = 117 steps.
    assert 100 < 360 - int(state.taken) < 130 and float(state.mean_norm) > 10


def test_moments_keep_their_shardings_inside_skip_outliers():
    params = random_tree(0)
    tx = optim.skip_outliers(make(settings(), params)[0], 2.0, 2)
    placed = jax.tree.leaves(optim.state_shardings(tx, params, tree.names(params), "replicated"))
    assert placed.count("layers.attention.wq") == 2 and placed.count("replicated") == 3   # counts, mean norm


def test_lower_layers_learn_slower():
    """Each layer's update is `layer_decay` times what the one above it gets; embeddings are below all of them."""
    def updates(decay):
        c = config_lib.from_file("configs/masked_lm.py:base", {
            "optimizer.layer_decay": decay, "model.num_layers": 3, "model.vocab_size": 16, "model.embed_dim": 4,
            "model.num_heads": 2, "model.mlp_dim": 8, "model.max_seq_len": 8, "seq_len": 8, "optimizer.warmup_steps": 0,
            "optimizer.schedule": "constant"})
        params, axes = sharding.unbox(jax.eval_shape(objectives.load(c).init, jax.random.key(0)))
        params = jax.tree.map(lambda p: jnp.ones(p.shape), params)
        tx, _ = optim.make(c.optimizer, total_steps=10, warmup_steps=0, decay_steps=0, params=params, axes=axes)
        return tree.flatten(tx.update(params, tx.init(params), params, step=0)[0])

    slow, plain = updates(0.5), updates(1.0)
    for name, update in slow.items():
        ratio = np.asarray(update / plain[name])
        if name.startswith("transformer.layers."):
            want = np.array([0.25, 0.5, 1.0]).reshape(-1, *(1,) * (ratio.ndim - 1))
        else:
            below = name in ("embed.tokens", "embed.positions", "embed.types") or name.startswith("embed.norm.")
            want = 0.125 if below else 1.0
        np.testing.assert_allclose(ratio, np.broadcast_to(want, ratio.shape), rtol=1e-6, err_msg=name)
    assert {"embed.transform", "embed.head_bias", "embed.transform_norm.scale"} <= set(slow)

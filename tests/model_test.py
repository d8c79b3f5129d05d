"""The Transformer against `naive.py`, for every choice the architecture offers, and its invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import decode, frontends, model, sharding, tree
from fm_jax.architecture import SIZES, Architecture
from fm_jax.errors import UserError
import naive

# Odd sizes, so that no two axes can be confused: 6 heads over 2 kv heads of size 10, width 24.
BASE = dict(vocab_size=37, num_layers=3, embed_dim=24, num_heads=6, num_kv_heads=2, head_dim=10, mlp_dim=28,
            max_seq_len=32)
VARIANTS = {
    "llama": {},
    "mha": dict(num_kv_heads=6),
    "mqa": dict(num_kv_heads=1),
    "gpt2": dict(norm="layernorm", norm_bias=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True,
                 activation="gelu_tanh", gated_mlp=False, position="learned", num_kv_heads=6),
    "neox": dict(norm="layernorm", norm_bias=True, rope_frac=0.4, activation="gelu", gated_mlp=False, qkv_bias=True,
                 parallel_residual=True),
    "bert": dict(causal=False, norm="layernorm", norm_bias=True, norm_position="post", final_norm=False,
                 activation="gelu", gated_mlp=False, position="learned", num_token_types=2, embed_norm=True,
                 head_transform=True, mlp_bias=True, position_offset=2),
    "mpnet": dict(causal=False, norm_position="post", final_norm=False, position="learned_relative", relative_buckets=8,
                  relative_max_distance=11, position_offset=2),
    "modernbert": dict(causal=False, norm="layernorm", layer_pattern=("global", "local", "local"), window=3, num_layers=5,
                       rope_local_theta=500.0, embed_norm=True, first_norm=False, head_transform=True),
    "gemma": dict(layer_pattern=("local", "global"), window=4, norm_position="sandwich", norm_zero_centered=True,
                  activation="gelu_tanh", attention_softcap=2.0, logit_softcap=1.5, embed_scale=24 ** 0.5,
                  attention_scale=0.2),
    "gemma3": dict(layer_pattern=("local", "local", "global"), window=3, num_layers=4, qk_norm="head",
                   rope_theta=1e6, rope_local_theta=1e4, rope_scaling=dict(type="linear", factor=8.0)),
    "olmo2": dict(norm_position="output", qk_norm="full", tie_embeddings=False),
    "qwen2": dict(qkv_bias=True, rope_theta=1e6),
    "sinusoidal": dict(position="sinusoidal", activation="relu", gated_mlp=False),
    "no_position": dict(position="none", mlp_bias=True),
    "llama3": dict(rope_theta=5e3, rope_scaling=dict(type="llama3", factor=8.0, low_freq_factor=1.0,
                                                     high_freq_factor=4.0, original_max_seq_len=64)),
    "yarn": dict(rope_scaling=dict(type="yarn", factor=4.0, original_max_seq_len=512)),
    "yarn_set": dict(rope_scaling=dict(type="yarn", factor=3.0, original_max_seq_len=256, beta_fast=12.0, beta_slow=2.0,
                                       attention_factor=1.4)),
    "qk_layernorm": dict(norm="layernorm", norm_bias=True, qk_norm="head"),
    "qk_layernorm_full": dict(norm="layernorm", norm_bias=True, qk_norm="full"),
    "mixtral": dict(num_experts=5, experts_per_token=2, expert_dim=26),
    "deepseek": dict(num_experts=7, num_dense_layers=1, experts_per_token=3, expert_dim=14, num_shared_experts=2,
                     router_score="sigmoid", router_bias=True, router_scale=2.5),
    "t5_decoder": dict(position="relative", relative_buckets=8, relative_max_distance=11, attention_scale=0.5,
                       activation="relu", gated_mlp=False, logit_scale=24 ** -0.5),
    "t5_encoder": dict(position="relative", relative_buckets=8, relative_max_distance=9, causal=False,
                       activation="gelu_tanh", tie_embeddings=False),
    "whisper": dict(norm="layernorm", norm_bias=True, qkv_bias=True, key_bias=False, attention_out_bias=True,
                    mlp_bias=True, activation="gelu", gated_mlp=False, position="learned"),
    "local_encoder": dict(causal=False, layer_pattern=("local",), window=3),
}


def build(**changes):
    """Returns (arch, module, random parameters): random norms and biases too, so that a missing one shows."""
    arch = Architecture(**{**BASE, **changes})
    module = frontends.TextModel(arch)
    shapes = jax.eval_shape(lambda k: module.init(k, jnp.zeros((1, 1), jnp.int32), method=lambda m, t: m.logits(m(t)[0])),
                            jax.random.key(0))["params"]
    rng = np.random.default_rng(1)
    # Projections a little above their initial size, so that attention is far from uniform.
    draw = lambda n, p: rng.normal(0, 0.3 if ".w" in n else 0.4, p.shape) + ("scale" in n and not arch.norm_zero_centered)
    return arch, module, tree.map_named(lambda n, p: draw(n, p).astype(np.float32), sharding.unbox(shapes)[0])


def run(module, params, tokens, **kwargs):
    capture = kwargs.pop("capture", ())

    @jax.jit
    def apply(params, tokens, kwargs):
        hidden, cache, taps = module.apply({"params": params}, tokens, capture=capture, **kwargs)
        return module.apply({"params": params}, hidden, method="logits"), cache, taps

    logits, cache, taps = apply(params, jnp.asarray(tokens), kwargs)
    return np.asarray(logits), cache, taps


TOKENS = np.random.default_rng(2).integers(0, 37, (2, 13))
SEGMENTS = np.array([[1] * 5 + [2] * 7 + [0], [1] * 2 + [2] * 2 + [3] * 9])
POSITIONS = np.array([[*range(5), *range(7), 0], [0, 1, 0, 1, *range(9)]])
# Float32 against float64 through 3 or 4 layers: errors seen are below 2e-5 on logits of order 1 to 10.
TOLERANCE = dict(rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_naive(variant):
    arch, module, params = build(**VARIANTS[variant])
    got, _, _ = run(module, params, TOKENS)
    packed, _, _ = run(module, params, TOKENS, segment_ids_BT=jnp.asarray(SEGMENTS), positions_BT=jnp.asarray(POSITIONS))
    np.testing.assert_allclose(got[0], naive.logits(arch, params, TOKENS[0]), **TOLERANCE)
    want = naive.logits(arch, params, TOKENS[1], SEGMENTS[1], POSITIONS[1])
    np.testing.assert_allclose(packed[1], want, **TOLERANCE)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma3"])
def test_packed_equals_separate(variant):
    _, module, params = build(**VARIANTS[variant])
    packed, _, _ = run(module, params, TOKENS, segment_ids_BT=jnp.asarray(SEGMENTS), positions_BT=jnp.asarray(POSITIONS))
    for start, stop in ((0, 5), (5, 12)):
        alone, _, _ = run(module, params, TOKENS[:1, start:stop])
        np.testing.assert_allclose(packed[0, start:stop], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("causal", True)])
def test_cached_equals_full(variant):
    """Prefill of unequal prompts, then steps of one and of several tokens, give the full pass's logits."""
    arch, module, params = build(**VARIANTS[variant])
    full, _, _ = run(module, params, TOKENS)
    starts = np.array([3, 5])
    got, cache, _ = run(module, params, TOKENS[:, :5],
                        cache=model.Cache.empty(arch, 2, 16)._replace(count_B=jnp.asarray(starts)))
    np.testing.assert_allclose(got[1], full[1, :5], rtol=1e-4, atol=1e-4)   # row 0's last two are padding
    unstacked = decode.per_layer(jax.tree.map(jnp.asarray, params))
    done = starts.copy()
    for n in (1, 1, 3):
        tokens = np.stack([TOKENS[b, done[b] : done[b] + n] for b in range(2)])
        got, cache, _ = run(module, unstacked, tokens, cache=cache)
        for b in range(2):
            np.testing.assert_allclose(got[b], full[b, done[b] : done[b] + n], rtol=1e-4, atol=1e-4)
        done += n


@pytest.mark.parametrize("window", [1, 4, 16, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 31))])
def test_local_layers_store_their_window_alone(window):
    """Cached equals full, far past the window: prompts shorter and longer than it, chunks, steps, tokens taken back."""
    arch, module, params = build(**{**VARIANTS["gemma"], "window": window})
    tokens = np.random.default_rng(5).integers(0, 37, (3, 31))
    full, _, _ = run(module, params, tokens)
    cache = model.Cache.empty(arch, 3, 32, slack=3)
    assert [k.shape[2] for k in cache.k] == [min(window, 32) + 3, 35, min(window, 32) + 3]
    done = np.zeros(3, int)
    # How many are fed to each row, and how many of them each row then takes back: at most the slack.
    for width, count, back in [(12, (2, 7, 12), (0, 0, 0)), (1, (1, 1, 1), (0, 0, 0)), (6, (6, 0, 4), (0, 0, 3)),
                               (4, (4, 4, 4), (3, 0, 1)), (1, (1, 0, 1), (0, 0, 0)), (1, (1, 1, 1), (0, 0, 0)),
                               (4, (4, 4, 4), (2, 3, 1)), (4, (3, 4, 2), (0, 1, 0)), (1, (1, 1, 1), (0, 0, 0))]:
        fed = np.stack([np.resize(tokens[b, done[b] : done[b] + width], width) for b in range(3)])
        got, cache, _ = run(module, params, fed, cache=cache._replace(count_B=jnp.asarray(count)))
        for b in range(3):
            want = full[b, done[b] : done[b] + count[b]]
            np.testing.assert_allclose(got[b, : count[b]], want, rtol=1e-4, atol=1e-4)
        done += count
        done -= back
        assert cache.length_B.tolist() == (done + back).tolist()
        cache = cache._replace(length_B=jnp.asarray(done, jnp.int32))


def forest(seed, T):
    """Returns (parent of each token or -1, index of the last token below it) of trees in depth-first order."""
    rng, parents, path = np.random.default_rng(seed), [], []
    for t in range(T):
        path = path[: rng.integers(len(path) + 1)] if rng.random() < 0.3 else path
        parents.append(path[-1] if path else -1)
        path = path + [t]
    last = np.arange(T)
    for t in reversed(range(T)):
        if parents[t] >= 0:
            last[parents[t]] = max(last[parents[t]], last[t])
    return parents, last


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("causal", True)])
def test_trees_equal_their_paths(variant):
    """Rows of trees, alone and behind a trunk: each token's logits are those at the end of its path as a sequence."""
    arch, module, params = build(**VARIANTS[variant])
    T, rng = 20, np.random.default_rng(6)
    tokens, before = rng.integers(0, 37, (2, T)), rng.integers(0, 37, 6)
    parents, last = zip(*(forest(seed, T) for seed in (1, 2)))
    paths = [[] for _ in range(2)]
    for row in range(2):
        for t in range(T):
            paths[row].append([*(paths[row][parents[row][t]] if parents[row][t] >= 0 else []), t])
    depth = np.array([[len(p) - 1 for p in row] for row in paths])
    assert depth.max() > 6 and (depth == 0).sum() > 3
    whole, _, taps = run(module, params, np.pad(before, (0, 2))[None], capture=("k", "v"))
    # Its 8 places: two are not real, and of the others a tree goes on from the first 6 or 2, the longer first.
    starts = np.array([[6 if path[0] < cut else 2 for path in row] for row, cut in zip(paths, (9, T))])
    seen_by = [[t for t in range(T) if start[t] > place] for start in starts for place in range(8)]
    trunk = model.Trunk(taps["k"][:, 0], taps["v"][:, 0],
                        jnp.array([max(seen, default=-1) for seen in seen_by]).reshape(2, 8))
    assert len(np.unique(starts[0])) == 2
    for start, kwargs in ((0 * starts, {}), (starts, {"trunk": trunk})):
        got, _, _ = run(module, params, tokens, positions_BT=jnp.asarray(depth + start), last_BT=jnp.asarray(last), **kwargs)
        alone = [np.concatenate([before[: start[row, path[-1]]], tokens[row, path]]) for row in range(2)
                 for path in paths[row]]
        want, _, _ = run(module, params, np.stack([np.pad(ids, (0, 32 - len(ids))) for ids in alone]))
        want = [logits[len(ids) - 1] for logits, ids in zip(want, alone)]
        np.testing.assert_allclose(got.reshape(2 * T, -1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["llama", "gemma"])
def test_trees_in_chunks_equal_their_definition(variant):
    """More queries than a chunk has, behind a trunk of a length that no chunk divides."""
    T, rng = 300, np.random.default_rng(7)
    tokens, (parents, last) = rng.integers(0, 37, (1, T)), forest(3, T)
    depth = np.zeros(T, int)
    for t in range(T):
        depth[t] = depth[parents[t]] + 1 if parents[t] >= 0 else 5
    results = []
    for kernel in ("reference", "chunked"):
        arch, module, params = build(**{**VARIANTS[variant], "attention_kernel": kernel})
        trunk = model.Trunk(*rng_trunk(arch), jnp.where(jnp.arange(7) < 5, T - 1, -1)[None])
        results.append(run(module, params, tokens, positions_BT=jnp.asarray(depth[None]), last_BT=jnp.asarray(last[None]),
                           trunk=trunk)[0])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def rng_trunk(arch):
    return np.random.default_rng(8).normal(size=(2, arch.num_layers, 7, arch.num_kv_heads, arch.head_dim)).astype("f")


def test_trees_stand_alone():
    arch, module, params = build()
    spans = dict(positions_BT=jnp.zeros((2, 13), int), last_BT=jnp.tile(jnp.arange(13), (2, 1)))
    for other in (dict(cache=model.Cache.empty(arch, 2, 16)), dict(segment_ids_BT=jnp.asarray(SEGMENTS))):
        with pytest.raises(UserError, match="trees of tokens cannot be combined"):
            run(module, params, TOKENS, **spans, **other)


def test_prefix_lm_equals_naive_and_differs_from_causal():
    arch, _, params = build()
    stack = model.Transformer(arch)
    x = np.random.default_rng(3).normal(size=(1, 9, 24)).astype(np.float32)
    prefix = np.arange(9)[None] < 4
    p = params["transformer"]
    got, _, _ = jax.jit(stack.apply)({"params": p}, x, prefix_BT=jnp.asarray(prefix))
    want = naive.stack(arch, naive._float64(p), list(x[0].astype(np.float64)), prefix=prefix[0])
    np.testing.assert_allclose(got[0], np.stack(want), **TOLERANCE)
    causal, _, _ = jax.jit(stack.apply)({"params": p}, x)
    assert np.abs(np.asarray(causal - got)[0, :3]).max() > 1e-2


def test_encoder_decoder_equals_naive():
    rng = np.random.default_rng(4)
    encoder = Architecture(**BASE, causal=False)
    decoder = Architecture(**BASE, cross_attention=True, qkv_bias=True, position="relative", relative_buckets=8,
                           relative_max_distance=9)
    source, x = rng.normal(size=(1, 7, 24)).astype(np.float32), rng.normal(size=(1, 5, 24)).astype(np.float32)
    source_segments = np.array([[1, 1, 1, 1, 1, 0, 0]])
    e, d = model.Transformer(encoder), model.Transformer(decoder)
    ep, _ = sharding.unbox(jax.jit(e.init)(jax.random.key(0), source)["params"])
    dp, _ = sharding.unbox(jax.jit(d.init)(jax.random.key(1), x, context_BSD=source)["params"])
    encoded, _, _ = jax.jit(e.apply)({"params": ep}, source, segment_ids_BT=jnp.asarray(source_segments))
    got, _, _ = jax.jit(d.apply)({"params": dp}, x, context_BSD=encoded,
                                 context_segment_ids_BS=jnp.asarray(source_segments))
    dp32, ep, dp = dp, naive._float64(ep), naive._float64(dp)
    want_encoded = naive.stack(encoder, ep, list(source[0].astype(float)), segments=source_segments[0])
    want = naive.stack(decoder, dp, list(x[0].astype(float)), context=want_encoded, context_segments=source_segments[0])
    np.testing.assert_allclose(got[0], np.stack(want), **TOLERANCE)
    # Step by step with a cache, as decoding does: of the source, keys and values are made once.
    context = jax.jit(functools.partial(d.apply, method="context"))({"params": dp32}, encoded, jnp.asarray(source_segments))
    cache, steps = model.Cache.empty(decoder, 1, 8)._replace(context=context), []
    for t in range(5):
        out, cache, _ = jax.jit(d.apply)({"params": dp32}, x[:, t : t + 1], cache=cache)
        steps.append(out[0, 0])
    np.testing.assert_allclose(np.stack(steps), got[0], rtol=1e-4, atol=1e-4)
    # Two pairs packed into one row: each segment sees the source of its own.
    packed = dict(segment_ids_BT=jnp.array([[1, 1, 2, 2, 2]]), context_segment_ids_BS=jnp.array([[1, 1, 1, 2, 2, 2, 0]]))
    got, _, _ = jax.jit(d.apply)({"params": dp}, x, context_BSD=source, **packed)
    want = naive.stack(decoder, dp, list(x[0].astype(float)), segments=[1, 1, 2, 2, 2], context=list(source[0].astype(float)),
                       context_segments=[1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_allclose(got[0], np.stack(want), **TOLERANCE)
    with pytest.raises(UserError, match="context_BSD"):
        d.apply({"params": dp}, x)
    with pytest.raises(UserError, match="need context_segment_ids_BS"):
        d.apply({"params": dp}, x, context_BSD=source, segment_ids_BT=packed["segment_ids_BT"])


@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_causal_by_gradient(variant):
    """The logits of place t have no gradient at all with respect to inputs after t, across segments neither."""
    arch, _, params = build(**VARIANTS[variant])
    stack = model.Transformer(arch)
    x = np.random.default_rng(5).normal(size=(1, 13, 24)).astype(np.float32)
    segments = jnp.asarray(SEGMENTS[:1])
    place = lambda x, t: stack.apply({"params": params["transformer"]}, x, segment_ids_BT=segments)[0][0, t].sum()
    gradient = jax.jit(jax.grad(place))
    for t in (0, 4, 6, 11):
        reach = np.abs(gradient(x, t))[0].sum(-1) > 0
        allowed = (np.arange(13) <= t) & (SEGMENTS[0] == SEGMENTS[0][t])
        assert not (reach & ~allowed).any() and reach[t]


@pytest.mark.parametrize("changes", [dict(scan_layers=False), dict(remat="full"), dict(remat="dots"),
                                     dict(remat="dots", scan_layers=False), dict(attention_kernel="chunked")])
@pytest.mark.parametrize("variant", [pytest.param("llama", marks=pytest.mark.slow), "gemma3"])
def test_execution_choices_change_nothing(variant, changes):
    """Scanned, unrolled, rematerialised: the same loss and the same gradients, to float32 rounding."""
    results = []
    for extra in ({}, changes):
        arch, module, params = build(**{**VARIANTS[variant], **extra})

        def loss(p):
            hidden, _, _ = module.apply({"params": p}, jnp.asarray(TOKENS), segment_ids_BT=jnp.asarray(SEGMENTS))
            weights = np.full(TOKENS.shape, 1 / TOKENS.size, np.float32)
            return module.apply({"params": p}, hidden, jnp.asarray(TOKENS), weights, 0.0, method="loss_sum")[0]

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (l0, g0), (l1, g1) = results
    np.testing.assert_allclose(l0, l1, rtol=1e-6)
    for n, a in tree.flatten(g0).items():
        np.testing.assert_allclose(tree.flatten(g1)[n], a, rtol=1e-4, atol=1e-6, err_msg=n)


def test_capture_returns_what_each_sublayer_adds():
    arch, module, params = build()
    _, _, taps = run(module, params, TOKENS, capture=model.TAPS)
    assert taps["residual"].shape == (3, 2, 13, 24) and taps["k"].shape == taps["v"].shape == (3, 2, 13, 2, 10)
    np.testing.assert_allclose(taps["residual"][1] - taps["residual"][0],
                               taps["attention"][1] + taps["mlp"][1], rtol=1e-4, atol=1e-4)


def test_dropout_has_the_right_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 500))
    y = model.dropout(x, 0.25, jax.random.key(0))
    assert abs(float((y == 0).mean()) - 0.25) < 0.005 and abs(float(y.mean()) - 1) < 0.01   # 5 standard errors
    assert model.dropout(x, 0.25, None) is x
    arch, module, params = build(dropout=0.5)
    a, b = (run(module, params, TOKENS, key=k)[0] for k in (jax.random.key(0), jax.random.key(1)))
    assert np.abs(a - b).max() > 1e-2
    np.testing.assert_array_equal(run(module, params, TOKENS)[0], run(module, params, TOKENS)[0])


def test_logits_are_added_up_in_float32_whatever_the_compute_dtype():
    """bfloat16 operands, float32 sums: so that `logits`, `generate` and the loss agree on the likeliest token."""
    arch, module, params = build(dtype="bfloat16", vocab_size=500)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(2, 50, 24)), jnp.bfloat16)
    got = np.asarray(module.apply({"params": params}, x, method="logits"), np.float64)
    table = np.asarray(jnp.asarray(params["embed"]["tokens"], jnp.bfloat16), np.float64)
    want = np.asarray(x, np.float64) @ table.T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)   # bfloat16 sums differ in the third digit
    labels = jnp.asarray(got.argmax(-1), jnp.int32)
    _, (_, _, correct) = module.apply({"params": params}, x, labels, np.ones(labels.shape), 0.0, method="loss_sum")
    assert np.asarray(correct).all()


@pytest.mark.parametrize("name", [*VARIANTS, *SIZES])
def test_counts_equal_the_parameters(name):
    arch = Architecture(**(SIZES[name] if name in SIZES else {**BASE, **VARIANTS[name]}))
    module = frontends.TextModel(arch)
    boxed = jax.eval_shape(lambda k: module.init(k, jnp.zeros((1, 1), jnp.int32), method=lambda m, t: m.logits(m(t)[0])),
                           jax.random.key(0))
    assert tree.count(sharding.unbox(boxed)[0]) == arch.param_count()


def test_layers_start_independent_and_scaled():
    arch = Architecture(vocab_size=64, num_layers=4, embed_dim=256, num_heads=4)
    params, axes = sharding.unbox(jax.jit(model.Transformer(arch).init)(jax.random.key(0), jnp.zeros((1, 1, 256)))["params"])
    wq = np.asarray(params["layers"]["attention"]["wq"])
    assert abs(wq.std() * 16 - 1) < 0.02                      # 1 / sqrt(width), 0.4% standard error
    wo = np.asarray(params["layers"]["attention"]["wo"])
    assert abs(wo.std() * 16 * np.sqrt(8) - 1) < 0.02         # and 1 / sqrt(2 L) for what is added to the residual
    assert abs(np.corrcoef(wq[0].ravel(), wq[1].ravel())[0, 1]) < 0.02
    assert axes["layers"]["attention"]["wq"] == ("layers", "embed", "kv_heads", "groups", "head")


@pytest.mark.parametrize("change, message", [
    (dict(norm="rmsnrm"), "did you mean 'rmsnorm'"), (dict(num_kv_heads=4), "must divide num_heads=6"),
    (dict(layer_pattern=("local",)), "window"), (dict(rope_scaling=dict(type="yarn", factr=2.0)), "did you mean 'factor'"),
    (dict(dropout=1.0), "dropout"), (dict(embed_dim=25, head_dim=0), "must divide embed_dim"),
])
def test_bad_architectures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Architecture(**{**BASE, **change})


@pytest.mark.parametrize("causal, window, T", [(True, 0, 16), (True, 5, 16), (False, 0, 16), (False, 5, 16)])
def test_flops_count_the_visible_pairs(causal, window, T):
    """Attention FLOPs are 12 * heads * head_dim for each visible pair of query and key, counted one by one."""
    pattern = ("local",) if window else ("global",)
    arch = Architecture(**{**BASE, "causal": causal, "window": window, "layer_pattern": pattern})
    pairs = sum((s <= t or not causal) and (not window or abs(t - s) < window) for t in range(T) for s in range(T))
    attention = 12 * 6 * 10 * pairs / T * 3
    matmuls = 6 * (3 * (24 * 60 * 2 + 24 * 20 * 2 + 3 * 24 * 28) + 37 * 24)
    np.testing.assert_allclose(arch.flops_per_token(T), attention + matmuls, rtol=1e-9)

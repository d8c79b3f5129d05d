"""The kernels against naive NumPy and against their JAX references, values and gradients; and what they never build.

The NumPy references are loops with rules asked for single pairs, and no gradients: a kernel's gradient is held
to the central differences of the NumPy value along random directions, and in every element to what autodiff makes
of the JAX reference.
"""

import math

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import kernels
from fm_jax.errors import UserError
from fm_jax.kernels import Mask

# Float32 against float64 or another order of float32 sums: errors seen are below 1e-5 on values of order 1.
CLOSE = dict(rtol=1e-4, atol=5e-5)
# bfloat16 keeps 8 bits: 2^-8 of the largest element, a few roundings deep.
BF16 = 4 * 2 ** -8


def normals(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def assert_derivative(f, args, cotangent, grads, seed=0):
    """Asserts that <grads, d> is the derivative of <f(args), cotangent> along random directions d, one argument each.

    f is NumPy in float64. A central difference of step 1e-4 is right to about 1e-7; the rest is float32.
    """
    rng, args = np.random.default_rng(seed), [np.asarray(a, np.float64) for a in args]
    for i, grad in enumerate(grads):
        d = rng.normal(size=args[i].shape)
        up, down = ([*args[:i], args[i] + sign * 1e-4 * d, *args[i + 1:]] for sign in (1, -1))
        want = ((f(*up) - f(*down)) * cotangent).sum() / 2e-4
        got = (np.asarray(grad, np.float64) * d).sum()
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(np.asarray(grad) * d).sum() ** 0.5,
                                   err_msg=f"argument {i}")


def equations(jaxpr):
    """Yields every equation of a jaxpr and of the jaxprs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from equations(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from equations(inner)


def trace(f, *args):
    return list(equations(jax.make_jaxpr(f)(*args).jaxpr))


def shapes_of(eqns):
    return [v.aval.shape for eqn in eqns for v in eqn.outvars]


def dot_flops(eqns):
    """Returns the multiplications of all matrix products."""
    total = 0
    for eqn in eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
    return total


# --- linear ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x_shape, w_shape, inputs", [((2, 3, 5), (5, 7), 1), ((2, 3, 5), (5, 2, 3, 4), 1),
                                                      ((2, 3, 2, 4), (2, 4, 5), 2), ((4, 2, 1, 3), (2, 1, 3, 6), 3)])
def test_linear_equals_tensordot(x_shape, w_shape, inputs):
    x, w = normals(0, x_shape, w_shape)
    want = np.tensordot(x.astype(np.float64), w, inputs)
    np.testing.assert_allclose(kernels.linear(x, w, inputs), want, **CLOSE)
    half = kernels.linear(jnp.asarray(x, jnp.bfloat16), w, inputs)
    assert half.dtype == jnp.bfloat16 and half.shape == want.shape
    np.testing.assert_allclose(half.astype(np.float32), want, atol=BF16 * np.abs(want).max())


def numpy_rounded(x, kind, axis):
    """Returns x as the 8-bit type holds it, with one scale along `axis`: from the definitions of the types."""
    top = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}[kind]
    scale = np.abs(x).max(axis, keepdims=True) / top
    y = x / scale
    if kind == "int8":
        return np.round(y) * scale
    mantissa, lowest = {"e4m3": (3, -6), "e5m2": (2, -14)}[kind]   # bits, exponent of the smallest normal number
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(y), 1e-30))), lowest) - mantissa)
    return np.round(y / unit) * unit * scale


@pytest.mark.parametrize("matmul_dtype, factor, gradient", [("int8", "int8", "int8"), ("fp8", "e4m3", "e5m2")])
def test_scaled_matmul_equals_numpy_on_rounded_operands(matmul_dtype, factor, gradient):
    x, w, dy = normals(5, (6, 40), (40, 9), (6, 9))
    x[2] *= 1e4   # a row of its own scale
    w[:, 3] = 0   # a column without one
    y, pull = jax.vjp(lambda x, w: kernels.scaled_matmul(x, w, matmul_dtype), x, w)
    dx, dw = pull(dy)
    rounded = lambda a, kind, axis: np.nan_to_num(numpy_rounded(a.astype(np.float64), kind, axis))
    with np.errstate(invalid="ignore", divide="ignore"):
        want = rounded(x, factor, 1) @ rounded(w, factor, 0)
        want_dx = rounded(dy, gradient, 1) @ rounded(w.T, factor, 0)
        want_dw = (x.T.astype(np.float64) @ dy if matmul_dtype == "int8" else
                   rounded(x.T, factor, 1) @ rounded(dy, gradient, 0))
    for got, to in ((y, want), (dx, want_dx), (dw, want_dw)):
        # A quotient on the border between two 8-bit numbers may fall to either side: 1 of 100 elements is off by one.
        np.testing.assert_allclose(got, to, rtol=1e-2, atol=2e-2 * np.abs(to).max(-1, keepdims=True).max())
        assert np.mean(np.isclose(got, to, rtol=1e-4, atol=1e-4 * np.abs(to).max())) > 0.9
    exact = x.astype(np.float64) @ w
    error = np.abs(y - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < {"int8": 0.02, "fp8": 0.06}[matmul_dtype]   # half a unit in 127; 2^-4 of each element


def test_linear_in_8_bits_keeps_shapes_and_dtypes():
    x, w = normals(0, (2, 3, 2, 4), (2, 4, 5))
    plain = kernels.linear(jnp.asarray(x, jnp.bfloat16), w, 2)
    for matmul_dtype in kernels.MATMUL_DTYPES:
        f = lambda x, w: kernels.linear(x, w, 2, matmul_dtype=matmul_dtype)
        y, pull = jax.vjp(f, jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))
        dx, dw = pull(y)
        assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32) and y.shape == plain.shape
        assert (dx.shape, dw.shape) == (x.shape, w.shape)
        np.testing.assert_allclose(y.astype(np.float32), plain.astype(np.float32), atol=0.1 * np.abs(plain).max())


# --- norms ----------------------------------------------------------------------------------------------------------

def numpy_norm(x, scale, bias=None, *, centered, eps=1e-3):
    out = np.empty_like(x)
    for i in np.ndindex(x.shape[:-1]):
        row = x[i] - (x[i].mean() if centered else 0)
        out[i] = row / math.sqrt((row ** 2).mean() + eps) * scale + (0 if bias is None else bias)
    return out


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_norm_equals_numpy_and_autodiff(centered, has_bias):
    x, dy, scale, bias = normals(1, (3, 5, 12), (3, 5, 12), (12,), (12,))
    x = 2 * x + 0.7   # a mean, so that centering shows
    args = (x, scale, bias) if has_bias else (x, scale)
    call = lambda f: lambda x, scale, bias=None: f(x, scale, bias, 1e-3, centered)
    y, pull = jax.vjp(call(kernels.norm), *args)
    grads = pull(dy)
    naive = lambda *a: numpy_norm(*a, centered=centered)
    np.testing.assert_allclose(y, naive(*(a.astype(np.float64) for a in args)), **CLOSE)
    assert_derivative(naive, args, dy, grads)
    for got, want in zip(grads, jax.vjp(call(kernels.norm_reference), *args)[1](dy)):
        np.testing.assert_allclose(got, want, **CLOSE)


def test_norm_in_bfloat16_has_float32_statistics():
    x, dy, scale, bias = normals(2, (4, 256), (4, 256), (256,), (256,))
    x = x + 3.0   # E[x^2] - E[x]^2 in bfloat16 would lose the deviation
    low = jnp.asarray(x, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, s, b: kernels.norm(x, s, b, 1e-6, True), low, scale, bias)
    dx, dscale, dbias = pull(jnp.asarray(dy, jnp.bfloat16))
    want, pull = jax.vjp(lambda x, s, b: kernels.norm_reference(x, s, b, 1e-6, True), np.asarray(low, np.float32),
                         scale, bias)
    assert (y.dtype, dx.dtype, dscale.dtype, dbias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    # One rounding, of the result: half of a unit in the last of 8 bits.
    np.testing.assert_allclose(y.astype(np.float32), want, rtol=2 ** -8, atol=1e-6)
    for got, ref in zip((dx, dscale, dbias), pull(np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float32))):
        np.testing.assert_allclose(np.asarray(got, np.float32), ref, rtol=2 ** -7, atol=1e-3)


# --- attention ------------------------------------------------------------------------------------------------------

def segments(B, T, seed):
    """Returns int32 [B, T]: documents counted from 1, then padding 0."""
    rng = np.random.default_rng(seed)
    rows = [np.searchsorted(np.sort(rng.integers(1, T, 4)), np.arange(T), side="right") + 1 for _ in range(B)]
    out = np.stack(rows).astype(np.int32)
    out[0, T - T // 10:] = 0
    return out


def case(*, B=2, T=300, S=None, K=2, G=1, H=4, causal=True, window=0, packed=False, prefix=False, softcap=0.0, seed=0,
         farthest=None):
    """Returns (q, k, v, Mask, keywords): inputs of a size that makes attention far from uniform."""
    S = S or T
    q, k, v = normals(seed, (B, T, K, G, H), (B, S, K, H), (B, S, K, H))
    q_segments = segments(B, T, seed) if packed else None
    k_segments = q_segments if S == T else segments(B, S, seed + 1) if packed else None
    k_prefix = (np.arange(S) % 97 < 20)[None].repeat(B, 0) if prefix else None
    how = dict(scale=0.9, softcap=softcap)
    if farthest is not None:   # the distance from which on a score's bias is the same
        how["bias_KGR"], = normals(seed + 2, (K, G, 2 * farthest + 1))
    return q, k, v, Mask(causal, window, q_segments, k_segments, k_prefix), how


def numpy_attention(q, k, v, mask, scale, softcap, bias_KGR=None):
    (B, T, K, G, H), S = q.shape, k.shape[1]
    out = np.zeros(q.shape)
    sees = np.array([[[(not mask.causal or s <= t or (mask.k_prefix_BS is not None and mask.k_prefix_BS[b, s]))
                       and (not mask.window or abs(t - s) < mask.window)
                       and (mask.q_segments_BT is None or mask.q_segments_BT[b, t] == mask.k_segments_BS[b, s])
                       for s in range(S)] for t in range(T)] for b in range(B)])
    for b, n, g in np.ndindex(B, K, G):
        for t in range(T):
            keys = np.flatnonzero(sees[b, t])
            scores = k[b, keys, n] @ q[b, t, n, g] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            if bias_KGR is not None:
                farthest = bias_KGR.shape[-1] // 2
                scores = scores + [bias_KGR[n, g, min(max(s - t, -farthest), farthest) + farthest] for s in keys]
            e = np.exp(scores - scores.max())
            out[b, t, n, g] = e / e.sum() @ v[b, keys, n]
    return out


# 300 queries in blocks of 128 leave an odd last block; 97 are less than one block.
CASES = {
    "causal": {},
    "bidirectional": dict(causal=False),
    "one_short_block": dict(T=97, packed=True),
    "window": dict(window=40),
    "window_past_a_block": dict(window=150, G=3),
    "bidirectional_window": dict(causal=False, window=40),
    "packed": dict(packed=True, G=2),
    "packed_window": dict(packed=True, window=33),
    "prefix": dict(prefix=True),
    "prefix_window_packed": dict(prefix=True, window=50, packed=True),
    "softcap": dict(softcap=0.8, packed=True),
    "everything": dict(prefix=True, window=50, packed=True, softcap=1.5, G=2, K=3),
    "cross": dict(causal=False, T=150, S=41),
    "biased": dict(farthest=20, G=2, packed=True),
    "biased_bidirectional": dict(farthest=400, causal=False, window=60),
}


def value_and_grads(kernel, q, k, v, mask, how, dout):
    biases = {name: how[name] for name in how if name == "bias_KGR"}

    @jax.jit
    def run(q, k, v, biases):
        f = lambda q, k, v, biases: kernels.attention(q, k, v, mask, kernel=kernel, **{**how, **biases})
        out, pull = jax.vjp(f, q, k, v, biases)
        *grads, of_biases = pull(dout)
        return out, (*grads, *of_biases.values())
    return run(q, k, v, biases)


@pytest.mark.parametrize("name", CASES)
def test_chunked_attention_equals_numpy_and_autodiff(name):
    q, k, v, mask, how = case(**CASES[name])
    dout, = normals(9, q.shape)
    out, grads = value_and_grads("chunked", q, k, v, mask, how, dout)
    want, want_grads = value_and_grads("reference", q, k, v, mask, how, dout)
    np.testing.assert_allclose(out, want, **CLOSE)
    # Of a bias, the sum over all pairs at one distance.
    for letter, got, ref in zip(("q", "k", "v", "bias"), grads, want_grads):
        np.testing.assert_allclose(got, ref, **CLOSE | (dict(atol=1e-4) if letter == "bias" else {}), err_msg=f"d{letter}")
    naive = numpy_attention(*(x.astype(np.float64) for x in (q, k, v)), mask, **how)
    np.testing.assert_allclose(out, naive, **CLOSE)
    cached = kernels.attention_to_cache(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, **how)
    np.testing.assert_allclose(cached, naive, **CLOSE)


@pytest.mark.parametrize("B", [1, 3])
def test_a_cache_takes_new_entries_at_their_places(B):
    rng, K, S, T, H = np.random.default_rng(0), 2, 7, 3, 4
    held, new = rng.normal(size=(B, K, S, H)).astype("f"), rng.normal(size=(B, T, K, H)).astype("f")
    places = np.array([[2, 6, 7], [0, 9, 3], [7, 8, 9]])[:B]   # 7 and more: not there
    want = held.copy()
    for row, t in np.ndindex(B, T):
        if places[row, t] < S:
            want[row, :, places[row, t]] = new[row, t]
    np.testing.assert_array_equal(kernels.stored(jnp.asarray(held), jnp.asarray(new), places), want)


@pytest.mark.parametrize("kernel", ["chunked", "reference"])
def test_attention_gradients_equal_differences(kernel):
    """Both kernels, on their own, against differences of the loops: a mask wrong in both would agree."""
    q, k, v, mask, how = case(T=140, B=1, K=1, G=2, window=30, packed=True, prefix=True, softcap=1.5)
    dout, = normals(9, q.shape)
    _, grads = value_and_grads(kernel, q, k, v, mask, how, dout)
    assert_derivative(lambda q, k, v: numpy_attention(q, k, v, mask, **how), (q, k, v), dout, grads)


def test_attention_in_bfloat16():
    q, k, v, mask, how = case(packed=True, window=100, G=2)
    q *= 4   # scores up to 50: one rounded to 8 bits would move its weight by a tenth
    dout, = normals(9, q.shape)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, dout)]
    out, grads = value_and_grads("chunked", *low[:3], mask, how, low[3])
    exact, exact_grads = value_and_grads("reference", *(x.astype(np.float32) for x in low[:3]), mask, how,
                                         low[3].astype(np.float32))
    for got, want in zip((out, *grads), (exact, *exact_grads)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, atol=BF16 * np.abs(want).max())


def test_a_query_without_keys_disturbs_nothing():
    """In cross attention a document may have no source: its output is finite, and it moves no query or key."""
    q, k, v, _, how = case(causal=False, T=150, S=41)
    q_segments = np.where(np.arange(150) < 20, 7, 1)[None].repeat(2, 0)
    mask = Mask(False, 0, q_segments, np.ones((2, 41), int))
    dout, = normals(9, q.shape)
    (out, grads), (want, want_grads) = (value_and_grads(kernel, q, k, v, mask, how, dout)
                                        for kernel in ("chunked", "reference"))
    assert np.isfinite(out).all() and not np.asarray(grads[0])[:, :20].any()
    np.testing.assert_allclose(out[:, 20:], want[:, 20:], **CLOSE)
    for i in range(2):
        np.testing.assert_allclose(grads[i], want_grads[i], **CLOSE)


def test_chunked_attention_never_builds_all_scores():
    T = 1024
    q, k, v, _, how = case(B=1, T=T, K=1)
    for window in (0, 100):
        for f in (lambda q, k, v: kernels.attention(q, k, v, Mask(True, window), kernel="chunked", **how).sum(),):
            for traced in (trace(f, q, k, v), trace(jax.grad(f, (0, 1, 2)), q, k, v)):
                assert max(map(math.prod, shapes_of(traced))) <= T * T / 4
    reference = trace(lambda q, k, v: kernels.attention(q, k, v, Mask(), kernel="reference", **how), q, k, v)
    assert max(map(math.prod, shapes_of(reference))) >= T * T   # so the walk does see such arrays


@pytest.mark.parametrize("differentiate", [False, True])
def test_unseen_blocks_are_skipped(differentiate):
    """Products go with the visible pairs of blocks: causal about half of all, windows linear in T."""
    def flops(T, **mask):
        q, k, v, _, how = case(B=1, T=T, K=1)
        f = lambda q, k, v: kernels.attention(q, k, v, Mask(**mask), kernel="chunked", **how).sum()
        return dot_flops(trace(jax.grad(f, (0, 1, 2)) if differentiate else f, q, k, v))

    everything, causal = flops(1024, causal=False), flops(1024)
    assert 0.5 * everything < causal < 0.6 * everything
    near, nearer = flops(1024, window=100), flops(512, window=100)
    assert near < 0.25 * everything and near < 2.3 * nearer
    assert flops(1024, causal=False, window=100) < 0.45 * everything


def test_long_sequences_compile_to_few_blocks():
    q, k, v, _, how = (jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
                       for x in case(B=1, T=64, K=1))
    grow = lambda a: jax.ShapeDtypeStruct((1, 65536, *a.shape[2:]), a.dtype)
    eqns = trace(lambda q, k, v: kernels.attention(q, k, v, Mask(), kernel="chunked", **how), grow(q), grow(k), grow(v))
    assert sum(e.primitive.name == "dot_general" for e in eqns) <= 2 * kernels.MOST_QUERY_CHUNKS


def test_chunked_attention_refuses_what_it_cannot_serve():
    q, k, v, _, how = case(T=8, S=6)
    with pytest.raises(UserError, match="cannot attend to a cache"):
        kernels.attention(q, k, v, Mask(q_index_BT=np.zeros((2, 8))), kernel="chunked", **how)
    with pytest.raises(UserError, match="got 8 and 6"):
        kernels.attention(q, k, v, Mask(), kernel="chunked", **how)


# --- cross-entropy --------------------------------------------------------------------------------------------------

def numpy_cross_entropy(x, table, labels, softcap):
    """Returns (nll, lse, correct) [B, T], one position at a time."""
    out = np.zeros((3, *labels.shape))
    for i in np.ndindex(labels.shape):
        logits = table @ x[i]
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        lse = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        out[(slice(None), *i)] = lse - logits[labels[i]], lse, logits.argmax() == labels[i]
    return out


@pytest.mark.parametrize("chunk_length", [0, 1, 4, 5, 10, 64])   # of 10: all, pieces that leave a rest, more than all
@pytest.mark.parametrize("softcap, z_loss", [(0.0, 0.0), (0.0, 0.3), (1.3, 0.0), (1.3, 0.3)])
def test_cross_entropy_sum_equals_numpy_and_autodiff(softcap, z_loss, chunk_length):
    x, table = normals(8, (3, 10, 6), (17, 6))
    rng = np.random.default_rng(9)
    labels, weights = rng.integers(0, 17, (3, 10)), rng.choice([0, 0.5, 1, 2], (3, 10)).astype(np.float32)
    labels[:, 0] = (x[:, 0] @ table.T).argmax(-1)   # some right ones

    def plain(x, t):
        nll, lse, _ = kernels.cross_entropy_reference(x, t, labels, softcap=softcap)
        return (weights * (nll + z_loss * lse ** 2)).sum()

    fast = lambda x, t: kernels.cross_entropy_sum(x, t, labels, weights, z_loss=z_loss, softcap=softcap,
                                                  chunk_length=chunk_length)
    nll, lse, correct = numpy_cross_entropy(x.astype(np.float64), table.astype(np.float64), labels, softcap)
    want = (weights * (nll + z_loss * lse ** 2)).sum()
    total, tokens = fast(x, table)                      # without a gradient, another path than with one
    # A third of the sum, so that the factor from outside counts; the tokens' own values add nothing.
    outer = lambda x, t: (fast(x, t)[0] / 3 + fast(x, t)[1][0].sum(), fast(x, t))
    (_, (again, _)), grads = jax.value_and_grad(outer, (0, 1), has_aux=True)(x, table)
    for got in (total, again):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, ref in zip(tokens, (nll, lse, correct)):
        np.testing.assert_allclose(got, ref, **CLOSE)

    def naive(x, t):
        nll, lse, _ = numpy_cross_entropy(x, t, labels, softcap)
        return (weights * (nll + z_loss * lse ** 2)).sum()

    assert_derivative(naive, (x, table), 1.0, [3 * g for g in grads])
    for got, ref in zip(grads, jax.grad(plain, (0, 1))(x, table)):
        np.testing.assert_allclose(3 * got, ref, **CLOSE)


def test_cross_entropy_in_bfloat16_sums_in_float32():
    x, table = normals(5, (2, 64, 16), (50, 16))
    labels = np.random.default_rng(6).integers(0, 50, (2, 64))
    low = jnp.asarray(x, jnp.bfloat16)
    weights = np.full(labels.shape, 1 / labels.size, np.float32)
    chunked = lambda x, t: kernels.cross_entropy_sum(x, t, labels, weights, chunk_length=8)[0]
    value, (dx, dtable) = jax.value_and_grad(chunked, (0, 1))(low, table)
    low_table = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float32)
    reference = jax.value_and_grad(lambda x, t: kernels.cross_entropy_reference(x, t, labels)[0].mean(), (0, 1))
    want, wants = reference(np.asarray(low, np.float32), low_table)
    assert (value.dtype, dx.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, want, rtol=1e-5)   # products of bfloat16 are exact in float32
    for got, ref in zip((dx, dtable), wants):
        np.testing.assert_allclose(np.asarray(got, np.float32), ref, atol=BF16 * np.abs(ref).max())


def test_cross_entropy_never_builds_all_logits():
    B, T, V, D, c = 2, 64, 512, 4, 8
    x, table = normals(7, (B, T, D), (V, D))
    labels = np.zeros((B, T), int)
    loss = lambda c: lambda x, t: kernels.cross_entropy_sum(x, t, labels, np.ones((B, T)), chunk_length=c)[0]
    for traced in (trace(loss(c), x, table), trace(jax.grad(loss(c), (0, 1)), x, table)):
        assert max(map(math.prod, shapes_of(traced))) <= B * c * V
    assert max(map(math.prod, shapes_of(trace(jax.grad(loss(0)), x, table)))) >= B * T * V   # the walk would see them

"""Attention over cut sequences: the same as over whole ones, values and gradients, with equal work on every device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import kernels, ring, sharding
from fm_jax.errors import UserError

B, T, K, G, H = 2, 32, 2, 2, 6
RNG = np.random.default_rng(0)
SEGMENTS = np.sort(RNG.integers(0, 4, (B, T)), axis=1).astype(np.int32)
PREFIX = np.arange(T)[None] < np.array([[5], [17]])
MASKS = {
    "causal": dict(causal=True),
    "bidirectional": dict(causal=False),
    "window": dict(causal=True, window=5),             # within a chunk of 4 and the one before
    "wide window": dict(causal=True, window=11),
    "window on both sides": dict(causal=False, window=7),
    "packed": dict(causal=True, q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS),
    "packed, window": dict(causal=True, window=6, q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS),
    "prefix": dict(causal=True, k_prefix_BS=PREFIX),
}


def layout(**sizes):
    return sharding.Layout(sharding.make_mesh(sizes))


def inputs():
    made = np.random.default_rng(1)
    shapes = (B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)
    return [jnp.asarray(made.normal(size=s), jnp.float32) for s in shapes]


def through(here, mask, softcap):
    """Returns f(q, k, v): attention over dealt sequences, collected again."""
    wide, narrow = ("batch", "length", "kv_heads", "groups", "head"), ("batch", "length", "kv_heads", "head")

    def f(q, k, v):
        dealt = kernels.Mask(**{name: x if name in ("causal", "window") else
                                ring.deal(jnp.asarray(x), ("batch", "length"), here) for name, x in mask.items()})
        q, k, v = ring.deal(q, wide, here), ring.deal(k, narrow, here), ring.deal(v, narrow, here)
        return ring.collect(ring.attention(q, k, v, dealt, here, scale=0.4, softcap=softcap), wide, here)
    return f


@pytest.mark.parametrize("name, sizes", [
    *((name, dict(context=4)) for name in MASKS),
    *(pytest.param(name, dict(context=2, data=2, tensor=2), marks=() if name == "packed, window" else pytest.mark.slow)
      for name in MASKS)], ids=str)
def test_a_cut_sequence_attends_as_a_whole_one(name, sizes):
    """Float32 sums in another order: 1e-5 of values near 1."""
    q, k, v, dout = inputs()
    softcap = 2.0 if name == "packed" else 0.0
    plain = functools.partial(kernels.attention_reference, mask=kernels.Mask(**MASKS[name]), scale=0.4, softcap=softcap)
    want, pull = jax.vjp(plain, q, k, v)
    got, pull_ring = jax.vjp(jax.jit(through(layout(**sizes), MASKS[name], softcap)), q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(pull_ring(dout), pull(dout)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_dealing_is_an_order_of_chunks_and_collecting_its_inverse(n):
    here, x = layout(context=n), jnp.arange(2 * 32 * 3).reshape(2, 32, 3)
    axes = ("batch", "length", "embed")
    dealt = jax.jit(lambda x: ring.deal(x, axes, here))(x)
    chunks = np.asarray(x).reshape(2, 2 * n, -1, 3)
    order = [c for d in range(n) for c in (d, 2 * n - 1 - d)]
    np.testing.assert_array_equal(dealt, chunks[:, order].reshape(2, 32, 3))
    np.testing.assert_array_equal(jax.jit(lambda x: ring.collect(x, axes, here))(dealt), x)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_every_device_has_equal_causal_work(n):
    """At each step of the ring as many pairs of chunks as on any other device, and over all steps just the causal ones."""
    chunks = lambda d: (d, 2 * n - 1 - d)
    pairs = [[[(a, b) for a in chunks(d) for b in chunks((d - step) % n) if ring.sees(a, b, 16, True, 0, False)]
              for d in range(n)] for step in range(n)]
    assert all(len({len(each) for each in step}) == 1 for step in pairs)
    assert sorted(p for step in pairs for each in step for p in each) == [(a, b) for a in range(2 * n) for b in range(a + 1)]


@pytest.mark.parametrize("causal, window", [(True, 0), (True, 1), (True, 9), (False, 8), (False, 0)])
def test_skipped_pairs_hold_nothing_that_is_seen(causal, window):
    length, chunks = 8, 6
    seen = kernels.Mask(causal, window).visible(length * chunks, length * chunks)
    seen = np.ones((length * chunks,) * 2, bool) if seen is None else np.asarray(seen[0])
    blocks = seen.reshape(chunks, length, chunks, length).any((1, 3))
    got = [[bool(ring.sees(a, b, length, causal, window, False)) for b in range(chunks)] for a in range(chunks)]
    np.testing.assert_array_equal(got, blocks)


def test_no_device_sees_all_keys():
    """What a device holds at a time does not grow with the number of devices that share a sequence."""
    n, here = 8, layout(context=8)
    q, k, v, _ = inputs()
    made = jax.jit(through(here, MASKS["causal"], 0.0)).lower(q, k, v).compile().as_text()
    assert "all-gather" not in made and "collective-permute" in made


def test_lengths_and_masks_that_do_not_fit_are_refused():
    here = layout(context=4)
    with pytest.raises(UserError, match="mesh.context=4 cuts a sequence into 8 chunks, which 12 tokens do not give; make "
                                        "--config.seq_len a multiple of 8"):
        ring.check(12, here)
    q, k, v, _ = inputs()
    with pytest.raises(UserError, match="use a mesh with context=1"):
        ring.attention(q, k, v, kernels.Mask(q_index_BT=jnp.zeros((1, T), jnp.int32)), here, scale=1.0)

"""Attention over sequences that are cut among devices, mesh axis `context`. Layer 1.

Keys and values go round a ring of n devices; each device attends to what it holds at the time and keeps a running
softmax (ring attention, arXiv:2310.01889), backward as forward. A causal query sees half of the keys on average, but
the first tokens of a sequence few and the last ones all of them. So that every device has equal work, a sequence is
dealt in 2n chunks, device d getting chunks d and 2n - 1 - d ("zigzag"): `deal` and `collect` are that exchange, which
`model.Transformer` makes on entry and on exit, so that no caller sees it. Of the four pairs of query and key chunks
that meet in a device at a step, those that the mask hides whole are not computed: of a causal mask two remain, of a
window fewer.
"""

import functools

import jax
import jax.numpy as jnp

from fm_jax import kernels
from fm_jax.errors import UserError
from fm_jax.sharding import Layout

AXIS = "context"


def check(length: int, layout: Layout) -> None:
    """Raises UserError where sequences of `length` cannot be cut among the devices of `context`."""
    n = layout.mesh.shape[AXIS]
    if length % (2 * n):
        raise UserError(f"mesh.context={n} cuts a sequence into {2 * n} chunks, which {length} tokens do not give; "
                        f"make --config.seq_len a multiple of {2 * n}, or --config.mesh.context smaller")


# --- who has which tokens -------------------------------------------------------------------------------------------

def deal(x, axes, layout: Layout):
    """Returns x with its axis "length" dealt in zigzag order. axes: its logical axes, as of an activation."""
    return _exchange(x, axes, layout, _dealt)


def collect(x, axes, layout: Layout):
    """Returns x with its axis "length" in the order of the sequence again."""
    return _exchange(x, axes, layout, _collected)


def _exchange(x, axes, layout, exchanged):
    spec = layout.spec(axes, x.shape, activation=True, what="activation")
    along = functools.partial(exchanged, axis=axes.index("length"), n=layout.mesh.shape[AXIS])
    return layout.on_each_device(along, spec, spec)(x)


def _owner(chunk, n):
    return chunk if chunk < n else 2 * n - 1 - chunk


def _dealt(x, axis, n):
    """Returns a device's chunks d and 2n - 1 - d, from its chunks 2d and 2d + 1."""
    even, odd = jnp.split(x, 2, axis)
    send = lambda part, offset: jax.lax.ppermute(part, AXIS, [(d, _owner(2 * d + offset, n)) for d in range(n)])
    even, odd = send(even, 0), send(odd, 1)
    # An even chunk is the first of an even device, and the second of an odd one.
    first = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis)


def _collected(x, axis, n):
    low, high = jnp.split(x, 2, axis)
    first = jax.lax.axis_index(AXIS) % 2 == 0
    back = lambda part, offset: jax.lax.ppermute(part, AXIS, [(_owner(2 * d + offset, n), d) for d in range(n)])
    return jnp.concatenate([back(jnp.where(first, low, high), 0), back(jnp.where(first, high, low), 1)], axis)


# --- attention --------------------------------------------------------------------------------------------------------

def attention(q_BTKGH, k_BTKH, v_BTKH, mask: kernels.Mask, layout: Layout, *, scale: float, softcap: float = 0.0):
    """Returns what `kernels.attention` does, of sequences that were dealt: q, k, v and the arrays of the mask.

    Exact for causal, windowed, prefix and bidirectional masks with segments. No device holds keys of more than two
    devices at a time.

    Raises:
      UserError: a mask with index arrays (a cache, trees).
    """
    if any(a is not None for a in (mask.q_index_BT, mask.k_index_BS, mask.k_first_BS)):
        raise UserError(f"mesh.{AXIS}={layout.mesh.shape[AXIS]}: caches and trees of tokens are of whole sequences; "
                        f"use a mesh with {AXIS}=1")
    specs = lambda *axes: layout.spec(axes, activation=True)
    kv = specs("batch", "length", "kv_heads", "head")
    q = specs("batch", "length", "kv_heads", "groups", "head")
    arrays = mask.q_segments_BT, mask.k_segments_BS, mask.k_prefix_BS
    run = functools.partial(_ring, static=(mask.causal, mask.window, scale, softcap, layout.mesh.shape[AXIS]))
    tokens = jax.tree.map(lambda _: specs("batch", "length"), arrays)
    return layout.on_each_device(run, (q, kv, kv, tokens), q)(q_BTKGH, k_BTKH, v_BTKH, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, arrays, static):
    return _ring_forward(q, k, v, arrays, static)[0]


def sees(q_chunk, k_chunk, length, causal, window, has_prefix):
    """Returns whether a query of one chunk may see a key of another, by their places alone; chunks may be traced."""
    near = abs(q_chunk - k_chunk)
    seen = (near - 1) * length + 1 < window if window else near >= 0
    return seen & ((k_chunk <= q_chunk) | (not causal) | has_prefix)


def _pairs(static, arrays, length):
    """Returns f(step, one, state): the state after one(state, a, b, mask) of the pairs that see each other.

    a, b: 0 or 1, the chunk of the queries here and of the keys that have come round. The mask is theirs.
    """
    causal, window, _, _, n = static
    here = jax.lax.axis_index(AXIS)
    chunks = lambda device: (device, 2 * n - 1 - device)

    def through(step, segments, prefix, one, state):
        for a, q_chunk in enumerate(chunks(here)):
            for b, k_chunk in enumerate(chunks((here - step) % n)):
                places = lambda chunk: (chunk * length + jnp.arange(length))[None]
                half = lambda x, i: None if x is None else x[:, i * length : (i + 1) * length]
                mask = kernels.Mask(causal, window, half(arrays[0], a), half(segments, b), half(prefix, b),
                                    places(q_chunk), places(k_chunk))
                state = jax.lax.cond(sees(q_chunk, k_chunk, length, causal, window, prefix is not None),
                                     lambda state: one(state, a, b, mask), lambda state: state, state)
        return state

    return through


def _round(n, moving):
    """Returns the moving arrays of the device before this one."""
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(d, (d + 1) % n) for d in range(n)]), moving)


def _ring_forward(q_BTKGH, k_BTKH, v_BTKH, arrays, static):
    _, _, scale, softcap, n = static
    (B, T, K, G, H), length = q_BTKGH.shape, q_BTKGH.shape[1] // 2
    through = _pairs(static, arrays, length)
    half = lambda x, i: x[:, i * length : (i + 1) * length]

    def step(carry, number):
        (k, v, segments, prefix), state = carry

        def one(state, a, b, mask):
            out, lse = kernels.partial_attention(half(q_BTKGH, a), half(k, b), half(v, b), mask, scale=scale,
                                                 softcap=softcap)
            before, lse_before = state[a]
            both = jnp.logaddexp(lse_before, lse)
            out = before * jnp.exp(lse_before - both) + out * jnp.exp(lse - both)
            return state[:a] + ((out, both),) + state[a + 1 :]

        state = through(number, segments, prefix, one, state)
        return (_round(n, (k, v, segments, prefix)), state), None

    nothing = (jnp.zeros((B, K, G, length, H), jnp.float32), jnp.full((B, K, G, length, 1), kernels.NEVER))
    (_, state), _ = jax.lax.scan(step, ((k_BTKH, v_BTKH, *arrays[1:]), (nothing, nothing)), jnp.arange(n))
    out, lse = (jnp.concatenate(x, axis=3) for x in zip(*state))
    out = out.astype(q_BTKGH.dtype).transpose(0, 3, 1, 2, 4)
    return out, (q_BTKGH, k_BTKH, v_BTKH, arrays, out, lse)


def _ring_backward(static, saved, dout_BTKGH):
    """The gradients of keys and values go round with them, and are at home when the ring is closed."""
    _, _, scale, softcap, n = static
    q_BTKGH, k_BTKH, v_BTKH, arrays, out, lse = saved
    length = q_BTKGH.shape[1] // 2
    through = _pairs(static, arrays, length)
    half = lambda x, i: x[:, i * length : (i + 1) * length]
    put = lambda x, i, more: x.at[:, i * length : (i + 1) * length].add(more.astype(x.dtype))

    def step(carry, number):
        (k, v, segments, prefix, dk, dv), dq = carry

        def one(state, a, b, mask):
            dq, dk, dv = state
            more = kernels.partial_attention_gradient(
                half(q_BTKGH, a), half(k, b), half(v, b), mask, half(out, a),
                lse[:, :, :, a * length : (a + 1) * length], half(dout_BTKGH, a), scale=scale, softcap=softcap)
            return put(dq, a, more[0]), put(dk, b, more[1]), put(dv, b, more[2])

        dq, dk, dv = through(number, segments, prefix, one, (dq, dk, dv))
        return (_round(n, (k, v, segments, prefix, dk, dv)), dq), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    start = (k_BTKH, v_BTKH, *arrays[1:], zeros(k_BTKH), zeros(v_BTKH)), zeros(q_BTKGH)
    ((_, _, _, _, dk, dv), dq), _ = jax.lax.scan(step, start, jnp.arange(n))
    return (dq.astype(q_BTKGH.dtype), dk.astype(k_BTKH.dtype), dv.astype(v_BTKH.dtype),
            jax.tree.map(lambda _: None, arrays))


_ring.defvjp(_ring_forward, _ring_backward)

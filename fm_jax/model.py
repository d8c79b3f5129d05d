"""One Transformer for every model here: decoder, encoder, encoder-decoder, any modality.

Layer 1. What varies is data in `Architecture`; what computes is below, in reading order: parameters,
positions, attention, mlp, experts, block, stack. Linen declares and names parameters; stacking over layers,
scan, remat, dropout, cache and capture are plain JAX.

Letters: B batch, T query length, S key length, D width, N heads, K kv heads, G query heads per kv
head, H head size, F mlp hidden, E experts, V vocabulary, L layers. `x_BTD` has these axes in this order.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
from flax import struct
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from fm_jax import kernels, pipeline, ring
from fm_jax.architecture import ROPE_SCALINGS, Architecture
from fm_jax.errors import UserError
from fm_jax.sharding import Boxed, Layout, is_boxed

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,                      # keeps the input of each block
    "dots": pipeline.named([pipeline.PROJECTION]),                         # and the outputs of its projections
    "offload_full": pipeline.named([], [pipeline.BLOCK_INPUT]),            # the former, on the host
    "offload_dots": pipeline.named([], [pipeline.PROJECTION]),             # the latter, on the host
}
# What `capture` can name: block output, what each sublayer adds, the keys and values that attention makes, and the
# Routing of a mixture of experts (None without).
TAPS = ("residual", "attention", "mlp", "k", "v", "router")


# --- parameters ---------------------------------------------------------------------------------------------------

class Derived(struct.PyTreeNode):
    """What may stand in a parameter's place and makes it there: a matrix in few bits, or with an adapter (adapt.py)."""

    def array(self):
        """Returns the parameter."""
        raise NotImplementedError


def made(p):
    """Returns a parameter, whatever stands in its place."""
    return p.array() if isinstance(p, Derived) else p


def is_derived(p) -> bool:
    return isinstance(p, Derived)


def merged(params):
    """Returns a tree of parameters as plain arrays: of what is derived, what it makes."""
    return jax.tree.map(made, params, is_leaf=is_derived)


def param(module: nn.Module, name: str, init, dtype: str = "float32", /, **axes: int):
    """Returns the parameter `name` of shape `axes.values()` with logical axes `axes.keys()`, in that order."""
    if is_derived(held := module.get_variable("params", name)):
        return held.array()
    make = lambda key: Boxed(init(key, tuple(axes.values()), jnp.dtype(dtype)), tuple(axes))
    return module.param(name, make)


def normal(std: float):
    """Returns an initialiser: normal, cut at two deviations, of standard deviation `std`."""
    return nn.initializers.truncated_normal(std / 0.87962566)   # the deviation of a unit normal cut at 2


def fan_in(size: int, gain: float = 1.0):
    """Returns an initialiser that keeps the variance of a unit-variance input of `size` channels, times gain^2."""
    return normal(gain * size ** -0.5)


zeros, ones = nn.initializers.zeros, nn.initializers.ones


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis."""

    arch: Architecture
    axis: str = "norm"

    @nn.compact
    def __call__(self, x):
        a, size = self.arch, x.shape[-1]
        scale = param(self, "scale", zeros if a.norm_zero_centered else ones, a.param_dtype, **{self.axis: size})
        bias = param(self, "bias", zeros, a.param_dtype, **{self.axis: size}) if a.norm_bias else None
        scale = scale.astype(jnp.float32) + (1.0 if a.norm_zero_centered else 0.0)
        return kernels.norm(x, scale, bias, a.norm_eps, a.norm == "layernorm")


def dropout(x, rate: float, key, dealt=lambda keep: keep):
    """Returns x with a share `rate` of its elements zeroed and the rest scaled up; x itself where key is None.

    key: one, or one for each row of x: then what is drawn for a row does not depend on the other rows.
    dealt: brings what is drawn, in the order of the sequence, into the order of x.
    """
    if key is None or rate == 0:
        return x
    draw = lambda key, x: jax.random.bernoulli(key, 1 - rate, x.shape)
    keep = dealt(jax.vmap(draw)(key, x) if key.ndim else draw(key, x))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _placed(x, layout, *axes):
    """Returns the activation x where its logical axes say, on a mesh."""
    return layout.constrain(x, *axes) if layout else x


def _kept(x, layout, *axes):
    """Returns what a projection gives, placed, by the name under which the remat policy "dots" keeps it."""
    return checkpoint_name(_placed(x, layout, *axes), pipeline.PROJECTION)


def projection(module: nn.Module, length: int, name: str, init, **axes: int):
    """Returns f(x) = x times the parameter `name`, which begins or ends a sublayer on sequences of `length` tokens.

    It begins with x [B, T, embed] where "embed" is the parameter's first axis, and ends with [B, T, embed] where it is
    the last. A mesh may cut tokens over `context`, and outside of sublayers over `tensor` too, which cuts channels
    inside. There, what is gathered, summed and cut is said, forward and backward: left to find it, XLA gathers whole
    sequences (2026-11, eight CPU devices). What is kept for the backward pass is cut, and gathered again.
    """
    a, layout, names = module.arch, module.layout, tuple(axes)
    w = param(module, name, init, a.param_dtype, **axes)
    begins = names[0] == "embed"
    cut = layout is not None and layout.parts("between") > 1
    over_tensor = cut and layout.parts("between") > layout.parts("length") and length % layout.parts("between") == 0
    linear = functools.partial(kernels.linear, inputs=1 if begins else len(names) - 1, matmul_dtype=a.matmul_dtype,
                               as_rows=not cut)

    def on_parts(x, w):
        y = linear(_gathered(x, layout) if begins and over_tensor else x, _whole(w, layout, names))
        return _scattered(y, layout) if over_tensor and not begins else y

    def apply(x):
        if not cut:
            y = linear(x, w)
        else:
            part = jax.lax.with_sharding_constraint(w.astype(x.dtype), layout.sharding(names, w.shape))
            y = jax.checkpoint(on_parts, prevent_cse=not a.scan_layers)(x, part)
        return _kept(y, layout, "batch", "length", *names[1:]) if begins else y

    return apply


# A constraint's own transpose is itself: of a gradient, the sum would be made whole before it is cut.

@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x_BTD, layout):
    """Returns x with the tokens that are cut over `tensor` brought together; its gradient is summed and cut."""
    return layout.constrain(x_BTD, "batch", "length", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scattered(y_BTD, layout):
    """Returns y summed and with its tokens cut over `tensor`; its gradient is brought together."""
    return layout.constrain(y_BTD, "batch", "between", "embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(w, layout, axes):
    """Returns the parameter w with its width brought together; its gradient is summed and cut as w is stored."""
    return layout.constrain(w, *axes)


_gathered.defvjp(lambda x, layout: (_gathered(x, layout), None), lambda layout, _, g: (_scattered(g, layout),))
_scattered.defvjp(lambda y, layout: (_scattered(y, layout), None), lambda layout, _, g: (_gathered(g, layout),))
_whole.defvjp(lambda w, layout, axes: (_whole(w, layout, axes), None), lambda layout, axes, _, g: (
    jax.lax.with_sharding_constraint(g, layout.sharding(axes, g.shape)),))


# --- positions -------------------------------------------------------------------------------------------------------

def rope_frequencies(arch: Architecture, theta: float, scaling: dict) -> tuple[np.ndarray, float]:
    """Returns (angular frequencies [rope_dim / 2] float64, factor on cos and sin).

    Source: RoPE arXiv:2104.09864; linear arXiv:2306.15595; YaRN arXiv:2309.00071, sections 3.2 to 3.4;
    llama3: the Llama 3.1 release, smoothing between two wavelengths.
    """
    dim = arch.rope_dim
    freqs = theta ** (-np.arange(0, dim, 2) / dim)
    kind = scaling.get("type", "none")
    s = {**ROPE_SCALINGS.get(kind, {}), **scaling}
    if kind == "linear":
        return freqs / s["factor"], 1.0
    if kind == "llama3":
        turns = s["original_max_seq_len"] * freqs / (2 * np.pi)   # over the original context
        keep = np.clip((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"]), 0, 1)
        return freqs * (keep + (1 - keep) / s["factor"]), 1.0
    if kind == "yarn":
        # The channel whose frequency makes `turns` turns over the original context.
        channel = lambda turns: dim * np.log(s["original_max_seq_len"] / (turns * 2 * np.pi)) / (2 * np.log(theta))
        low = max(np.floor(channel(s["beta_fast"])), 0)
        high = min(np.ceil(channel(s["beta_slow"])), dim - 1)
        slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        return freqs * (1 - slow) + freqs / s["factor"] * slow, s["attention_factor"] or 0.1 * np.log(s["factor"]) + 1
    return freqs, 1.0


def rope_table(arch: Architecture, kind: str, positions_BT):
    """Returns (cos, sin), float32 [B, T, rope_dim / 2], for the layers of this kind."""
    own = kind == "local" and arch.rope_local_theta > 0
    freqs, factor = rope_frequencies(arch, arch.rope_local_theta if own else arch.rope_theta,
                                     {} if own else arch.rope_scaling)
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freqs, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x, table):
    """Returns x [B, T, ..., H] with its first 2 * table channels rotated, halves paired (channel i with i + half)."""
    cos, sin = (t.reshape(*t.shape[:2], *(1,) * (x.ndim - 3), -1) for t in table)
    half = cos.shape[-1]
    a, b, rest = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    return jnp.concatenate([(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype), rest], axis=-1)


def relative_buckets(arch: Architecture) -> np.ndarray:
    """Returns int [2 M + 1], M = relative_max_distance: the bucket of a key that is -M to M places ahead of its query.

    Half of the buckets are of one place each, the others grow wider with the distance; a bidirectional stack has half
    of both for each direction. In float32, as the models that were trained with it.

    Source: arXiv:1910.10683, section 2.1, and its code (`_relative_position_bucket`).
    """
    count, M = arch.relative_buckets, arch.relative_max_distance
    ahead = np.arange(-M, M + 1)
    if arch.causal:
        first, away = 0, np.maximum(-ahead, 0)
    else:
        count //= 2
        first, away = np.where(ahead > 0, count, 0), np.abs(ahead)
    exact = count // 2
    wide = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(np.log(M / exact))
    return first + np.where(away < exact, away, np.minimum(exact + (wide * (count - exact)).astype(int), count - 1))


# --- attention -----------------------------------------------------------------------------------------------------

class Context(NamedTuple):
    """What a decoder attends to beside its own tokens: of each layer, keys and values [B, K, S, H] of a source."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    seen_BS: jax.Array | None = None   # False where there is no token; None: all are


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far: one array [B, K, S, H] a layer, and how many are valid.

    S is the longest sequence; in a local layer the window, where that is shorter, and place p is at p modulo S.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    length_B: jax.Array
    count_B: jax.Array | None = None   # of the tokens that come next, the first so many are real; None: all
    context: Context | None = None     # of a stack with cross attention

    @classmethod
    def empty(cls, arch: Architecture, batch: int, max_length: int, slack: int = 0) -> "Cache":
        """Returns the cache of no tokens yet.

        slack: the most tokens that `length_B` will be set back by, to take them off again.
        """
        def make(kind):
            length = (min(max_length, arch.window) if kind == "local" else max_length) + slack
            return jnp.zeros((batch, arch.num_kv_heads, length, arch.head_dim), arch.dtype)
        return cls(*(tuple(make(kind) for kind in arch.layer_kinds) for _ in "kv"), jnp.zeros(batch, jnp.int32))


class Trunk(NamedTuple):
    """Keys and values [L, S, K, H] of tokens that rows of trees go on from, each tree from as many as it likes.

    last_BS: the last token of each row that sees each of them, with all before it; -1: none.
    """

    k: jax.Array
    v: jax.Array
    last_BS: jax.Array


class Places(NamedTuple):
    """Where the layers of one kind write T new keys and values, and what each key is that they attend to."""

    write_BT: jax.Array      # index in the layer's arrays; outside of them: not written
    k_index_BS: jax.Array    # place in the sequence of each key
    beside: bool             # the keys are the stored ones and then the new ones; else the stored ones, new included


UNUSED = 2 ** 30   # place of an entry of a ring that holds nothing yet: out of every window


def _places(cache: Cache, size: int, ring: bool, T: int) -> Places:
    """Returns the places of T new tokens in layers of `size` entries."""
    place_BT = cache.length_B[:, None] + jnp.arange(T)
    end_B1 = (cache.length_B + (T if cache.count_B is None else cache.count_B))[:, None]
    if not ring:   # writes past the end are dropped; decode.py never lets a sequence get there
        write = place_BT if cache.count_B is None else jnp.where(place_BT < end_B1, place_BT, size)
        return Places(write, jnp.arange(size)[None], False)
    kept = (place_BT < end_B1) & (place_BT >= end_B1 - size)
    # Writing several tokens first would take from the first of them what only the last no longer see.
    last_B1 = cache.length_B[:, None] - (T > 1)
    held_BS = last_B1 - (last_B1 - jnp.arange(size)) % size
    held_BS = jnp.where(held_BS < 0, UNUSED, held_BS)
    return Places(jnp.where(kept, place_BT % size, size),
                  jnp.concatenate([held_BS, place_BT], axis=1) if T > 1 else held_BS, T > 1)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, to itself or to `context_BSD`."""

    arch: Architecture
    layout: Layout | None = None
    cross: bool = False

    @nn.compact
    def __call__(self, x_BTD, mask=None, rope=None, bias_KGR=None, context_BSD=None, cache=None, trunk=None):
        """Returns (output [B, T, D], cache, its own (k, v) [B, T, K, H]); without x, keys and values alone.

        bias_KGR: see `kernels.pair_bias`.
        cache: None, or (k, v [B, K, S, H], Places) to write and read; of cross attention (k, v), in place of context.
        trunk: None, or (k, v [S, K, H]) to read first.
        """
        a = self.arch
        D, K, G, H = a.embed_dim, a.num_kv_heads, a.groups, a.head_dim
        source = context_BSD if self.cross else x_BTD
        project = lambda x, *which, **axes: projection(self, 0 if x is None else x.shape[1], *which, **axes)
        # Scores begin with the same variance, whatever they are multiplied by.
        gain = H ** -0.5 / a.attention_scale if a.attention_scale else 1.0
        wq = project(x_BTD, "wq", fan_in(D, gain), embed=D, kv_heads=K, groups=G, head=H)
        wk = project(source, "wk", fan_in(D), embed=D, kv_heads=K, head=H)
        wv = project(source, "wv", fan_in(D), embed=D, kv_heads=K, head=H)
        wo = project(x_BTD, "wo", fan_in(K * G * H, (2 * a.num_layers) ** -0.5),
                     kv_heads=K, groups=G, head=H, embed=D)
        plus = lambda y, name, **axes: y + param(self, name, zeros, a.param_dtype, **axes).astype(y.dtype)

        def normed(y, name):
            if a.qk_norm == "none":
                return y
            flat = y if a.qk_norm == "head" else y.reshape(*y.shape[:2], -1)
            return Norm(a, name=name)(flat).reshape(y.shape)

        def placed(y, *more):
            return _placed(y, self.layout, "batch", "length", "kv_heads", *more, "head")

        if x_BTD is not None:
            q = wq(x_BTD)
            q = normed(plus(q, "q_bias", kv_heads=K, groups=G, head=H) if a.qkv_bias else q, "q_norm")
            q = placed(q if rope is None else rotate(q, rope), "groups")
        if self.cross and cache is not None:
            k = v = None
        else:
            k, v = wk(source), wv(source)
            if a.qkv_bias:
                k = plus(k, "k_bias", kv_heads=K, head=H) if a.key_bias else k
                v = plus(v, "v_bias", kv_heads=K, head=H)
            k = normed(k, "k_norm")
            k = placed(k if rope is None else rotate(k, rope))
        own = k, v
        if x_BTD is None:
            return None, None, own
        if cache is not None and not self.cross:
            *held, places = cache
            new = [a.astype(h.dtype) for a, h in zip(own, held)]
            stored = [kernels.stored(h, n, places.write_BT) for h, n in zip(held, new)]
            k, v = ([jnp.concatenate([h, n.swapaxes(1, 2)], axis=2) for h, n in zip(held, new)] if places.beside
                    else stored)
            cache = (*stored, places)
        if trunk is not None:
            k, v = (jnp.concatenate([jnp.broadcast_to(t, (x_BTD.shape[0], *t.shape)), n], axis=1)
                    for t, n in zip(trunk, own))
        if self.cross and cache is not None:
            k, v = cache
        attend = functools.partial(kernels.attention, kernel=a.attention_kernel, layout=self.layout)
        if cache is not None:
            attend = kernels.attention_to_cache
        elif _cut(self.layout):
            attend = functools.partial(ring.attention, layout=self.layout)
        if bias_KGR is not None:
            attend = functools.partial(attend, bias_KGR=bias_KGR)
        scale = a.attention_scale or H ** -0.5
        out = attend(q, k, v, mask, scale=scale, softcap=a.attention_softcap)
        if a.prompt_tokens and not self.cross:
            out += self._prompted(q, scale)
        y = wo(_placed(out, self.layout, "batch", "length", "kv_heads", "groups", "head"))
        if a.attention_out_bias:
            y += param(self, "o_bias", zeros, a.param_dtype, norm=D).astype(y.dtype)
        return y, cache, own


    def _prompted(self, q_BTKGH, scale):
        """Returns [B, T, K, G, H]: what queries find in learned keys and values, which all of them see, times a gate.

        Source: arXiv:2101.00190 (prefix tuning), with the softmax of its own and the gate of arXiv:2303.16199,
        section 3.3: at first the model is what it was. Keys are not rotated.
        """
        a, K, G = self.arch, self.arch.num_kv_heads, self.arch.groups
        table = lambda name: param(self, name, normal(0.02), a.param_dtype, position=a.prompt_tokens, kv_heads=K,
                                   head=a.head_dim).astype(q_BTKGH.dtype)
        gate_KG = jnp.tanh(param(self, "prompt_gate", zeros, a.param_dtype, kv_heads=K, groups=G).astype(jnp.float32))
        s = jnp.einsum("btkgh,pkh->btkgp", q_BTKGH, table("prompt_k"), preferred_element_type=jnp.float32)
        p = jax.nn.softmax(s * scale) * gate_KG[..., None]
        return jnp.einsum("btkgp,pkh->btkgh", p.astype(q_BTKGH.dtype), table("prompt_v"))


# --- mlp ------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """Two projections with an activation between, or three with a gate (arXiv:2002.05202)."""

    arch: Architecture
    layout: Layout | None = None
    hidden: int = 0   # 0: mlp_dim

    @nn.compact
    def __call__(self, x_BTD):
        a = self.arch
        D, F, act = a.embed_dim, self.hidden or a.mlp_dim, ACTIVATIONS[a.activation]
        bias = lambda name, **axes: param(self, name, zeros, a.param_dtype, **axes).astype(x_BTD.dtype)
        project = functools.partial(projection, self, x_BTD.shape[1])
        h = project("w_up", fan_in(D), embed=D, mlp=F)(x_BTD)
        if a.mlp_bias:
            h += bias("up_bias", mlp=F)
        gate = None
        if a.gated_mlp:
            gate = project("w_gate", fan_in(D), embed=D, mlp=F)(x_BTD)
            if a.mlp_bias:
                gate += bias("gate_bias", mlp=F)

        w_down = project("w_down", fan_in(F, (2 * a.num_layers) ** -0.5), mlp=F, embed=D)
        # Only the activation is computed again in the backward pass: less memory for elementwise work.
        y = jax.checkpoint(lambda h, gate: w_down(act(h) if gate is None else act(gate) * h))(h, gate)
        return y + bias("down_bias", norm=D) if a.mlp_bias else y


# --- mixture of experts -----------------------------------------------------------------------------------------------

# Of the gradient that evens out the load, against the loss's: far below it in the global norm, by which gradients are
# clipped, and far above the epsilon of Adam, which makes a step of full size of it.
ROUTER_BIAS_GRADIENT = 0.01


class Routing(NamedTuple):
    """What a router did in each row: sums over the row's real tokens, float32. Of several layers, [L, ...]."""

    tokens_B: jax.Array
    load_BE: jax.Array       # choices of each expert, those that were dropped included
    score_BE: jax.Array      # of each expert, a token's scores over their sum
    z_B: jax.Array           # squared log-normalisers of the scores
    entropy_B: jax.Array     # nats, of a token's scores over their sum
    dropped_B: jax.Array     # choices for which an expert had no room
    bias_B: jax.Array        # 0; its gradient by `router_bias` is by how much the load exceeds the even one

    def losses(self, weight_B):
        """Returns (load-balance, z and bias loss, each a sum over layers and rows; metrics of them all).

        A row's loss is the mean over its real tokens times its weight: how many of its tokens are scored. So it adds up
        over rows, microbatches and devices, as a product of the batch's own means would not. The balance is 1 where a
        row's load or scores are even, and E / k at most.

        Source: arXiv:2412.19437, equations 17 to 20 (balance, over a sequence); arXiv:2202.08906, equation 5 (z);
        arXiv:2408.15664 (bias; there it moves by the load's sign, here by the run's optimizer). The load is that of the
        choices as they are made, with the bias.
        """
        L, _, E = self.load_BE.shape
        n_LB = jnp.maximum(self.tokens_B, 1)
        choices_LB = jnp.maximum(self.load_BE.sum(-1), 1)
        weighted = lambda each_LB: (each_LB * weight_B).sum()
        balance = weighted(E * (self.load_BE * self.score_BE).sum(-1) / (choices_LB * n_LB))
        z, bias = weighted(self.z_B / n_LB), weighted(self.bias_B / n_LB)
        load_LE = self.load_BE.sum(1)
        load_LE /= jnp.maximum(load_LE.sum(-1, keepdims=True), 1)
        tokens, layers_weight = self.tokens_B[0].sum(), L * weight_B.sum()
        metrics = {
            "load_balance_loss": (balance, layers_weight), "router_z_loss": (z, layers_weight),
            "router_entropy": (self.entropy_B.sum(), L * tokens),
            "dropped_frac": (self.dropped_B.sum(), self.load_BE.sum()),
            # Shares of all choices, of a microbatch: the mean over its layers.
            "most_loaded_expert_frac": (load_LE.max(-1).mean() * tokens, tokens),
            "least_loaded_expert_frac": (load_LE.min(-1).mean() * tokens, tokens)}
        return balance, z, bias, jax.lax.stop_gradient(metrics)


class Moe(nn.Module):
    """A router and experts, each an Mlp: of a token, the weighted sum of what those it chose make of it.

    Scores and weights are float32. Over the mesh axis `expert`, each device has its part of the experts. With a
    capacity, tokens travel to their experts and back (all-to-all). Without, every device gets the tokens of all
    devices of the axis and sends back what its experts make of them (all-gather, reduce-scatter): exact whatever the
    load, and it moves no more bytes up to as many devices as a token has experts; its rows must have room for
    min(k, experts here) of each of these tokens, though only those that are used cost time.
    """

    arch: Architecture
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD, real_BT=None):
        """Returns (output [B, T, D], Routing). Where not `real_BT`, a token has no expert and does not count."""
        a = self.arch
        E, D, F = a.num_experts, a.embed_dim, a.expert_dim
        router = param(self, "router", fan_in(D), a.param_dtype, embed=D, router=E)
        bias_E = param(self, "router_bias", zeros, a.param_dtype, router=E) if a.router_bias else None
        up = param(self, "w_up", fan_in(D), a.param_dtype, experts=E, expert_embed=D, mlp=F)
        gate = None
        if a.gated_mlp:
            gate = param(self, "w_gate", fan_in(D), a.param_dtype, experts=E, expert_embed=D, mlp=F)
        down = param(self, "w_down", fan_in(F, (2 * a.num_layers) ** -0.5), a.param_dtype,
                     experts=E, mlp=F, expert_embed=D)
        ids_BTK, weights_BTK, rank_BTK, routing = route(a, x_BTD, router, bias_E, real_BT)
        matrices = jax.tree.map(lambda w: w.astype(x_BTD.dtype), {"up": up, "gate": gate, "down": down})
        compute = self._on_mesh(x_BTD.shape) if self.layout else functools.partial(_experts, a)
        y = compute(x_BTD, ids_BTK, weights_BTK, rank_BTK, matrices)
        if a.num_shared_experts:
            y += Mlp(a, self.layout, a.num_shared_experts * F, name="shared")(x_BTD)
        return y, routing

    def _on_mesh(self, shape):
        """Returns `_experts` for whole arrays, run by each device on its part of them."""
        a, layout = self.arch, self.layout
        # Tokens come and go as they are between sublayers, but where they are too few to be cut, as in decoding.
        between = shape[1] % layout.parts("between") == 0
        tokens = layout.spec(("batch", "between" if between else "length", None), shape, activation=True)
        axes = {"up": ("experts", "expert_embed", "mlp"), "down": ("experts", "mlp", "expert_embed")}
        axes["gate"] = axes["up"] if a.gated_mlp else None
        specs = {name: names and layout.spec(names) for name, names in axes.items()}
        here = [n for n in layout.mesh.axis_names if layout.mesh.shape[n] > 1 and n not in layout.mesh.manual_axes]
        width = layout.mesh_axes("expert_embed", activation=False)
        gather = functools.partial(jax.lax.all_gather, tiled=True)

        def part(experts_E, *arrays):
            *arrays, matrices = arrays
            if width:
                matrices = {name: w if w is None else gather(w, width, axis=axes[name].index("expert_embed"))
                            for name, w in matrices.items()}
            if "tensor" in here and between:
                arrays = jax.tree.map(lambda x: gather(x, "tensor", axis=1), arrays)
            y = _experts(a, *arrays, matrices, experts_E[0], "expert" if "expert" in here else None)
            if "tensor" not in here:
                return y
            return jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True) if between else jax.lax.psum(
                y, "tensor")

        # Which experts are here comes as an array: inside a pipeline, XLA:CPU knows no `axis_index`.
        return functools.partial(
            layout.on_each_device(part, (layout.spec(("experts",)), tokens, tokens, tokens, tokens, specs), tokens),
            jnp.arange(a.num_experts))


def route(a: Architecture, x_BTD, router_DE, bias_E=None, real_BT=None):
    """Returns (ids, weights, ranks [B, T, k], Routing): the experts of each token, E where it has none.

    Ranks are of each choice among those of the same expert and row, None without a capacity.
    """
    B, T, _ = x_BTD.shape
    E, K = a.num_experts, a.experts_per_token
    # The highest precision: on TPU, float32 products are of bfloat16 otherwise, and near ties fall differently.
    logits_BTE = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), router_DE.astype(jnp.float32),
                            precision=jax.lax.Precision.HIGHEST)
    lse_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    scores_BTE = jnp.exp(logits_BTE - lse_BT1) if a.router_score == "softmax" else jax.nn.sigmoid(logits_BTE)
    preferred_BTE = scores_BTE if bias_E is None else scores_BTE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))
    ids_BTK = jax.lax.top_k(jax.lax.stop_gradient(preferred_BTE), K)[1]
    weights_BTK = jnp.take_along_axis(scores_BTE, ids_BTK, axis=-1)
    if a.router_renormalize:
        weights_BTK /= weights_BTK.sum(-1, keepdims=True) + 1e-20   # sigmoids can all be 0
    weights_BTK *= a.router_scale
    real_BT = jnp.ones((B, T), bool) if real_BT is None else real_BT
    ids_BTK = jnp.where(real_BT[..., None], ids_BTK, E)
    rank_BTK, dropped_B = None, jnp.zeros(B)
    if a.capacity_factor:
        rank_BTK = kernels.ranks(ids_BTK, E)
        dropped_B = (rank_BTK >= capacity(a, T)).sum((1, 2), dtype=jnp.float32)
    total = lambda each: jnp.where(real_BT[..., None], each, 0).sum(1)
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    load_BE = (ids_BTK[..., None] == jnp.arange(E)).sum((1, 2), dtype=jnp.float32)
    excess_BE = (load_BE - load_BE.mean(-1, keepdims=True)) / K
    bias_B = jnp.zeros(B) if bias_E is None else (excess_BE * (bias_E - jax.lax.stop_gradient(bias_E))).sum(-1)
    return ids_BTK, weights_BTK, rank_BTK, Routing(
        real_BT.sum(1, dtype=jnp.float32), load_BE, total(share_BTE), total(jnp.square(lse_BT1))[:, 0],
        total(-(share_BTE * jnp.log(share_BTE + 1e-20)).sum(-1, keepdims=True))[:, 0], dropped_B, bias_B)


def capacity(a: Architecture, length: int) -> int:
    """Returns for how many of the choices of a row's `length` tokens each expert has room."""
    return min(length, int(np.ceil(a.capacity_factor * length * a.experts_per_token / a.num_experts)))


def _experts(a: Architecture, x_BTD, ids_BTK, weights_BTK, rank_BTK, matrices, first=0, axis=None):
    """Returns [B, T, D]: of each token, the weighted sum of what its experts make of it.

    matrices: of the experts from number `first` on. axis: the mesh axis over which they and the tokens are cut; None:
    all are here.
    """
    B, T, D = x_BTD.shape
    E, K = a.num_experts, ids_BTK.shape[-1]

    def mlp(rows, multiply):
        up = multiply(rows, matrices["up"])
        gate = None if matrices["gate"] is None else multiply(rows, matrices["gate"])

        def down(up, gate, w):   # its activation is computed again in the backward pass, as in Mlp
            act = ACTIVATIONS[a.activation]
            return multiply(act(up) if gate is None else act(gate) * up, w)

        return jax.checkpoint(down)(up, gate, matrices["down"])

    def weighted(out_NKD, weights_NK):
        return (out_NKD.astype(jnp.float32) * weights_NK[..., None]).sum(1).astype(out_NKD.dtype)

    x_ND, flat = x_BTD.reshape(B * T, D), lambda x: x.reshape(-1, K)
    if rank_BTK is not None:
        C = capacity(a, T)
        row_BTK = (jnp.arange(B)[:, None, None] * E + ids_BTK) * C + rank_BTK
        slots = kernels.slots_by_row(flat(jnp.where((ids_BTK < E) & (rank_BTK < C), row_BTK, B * E * C)), B * E * C)
        rows_BECD = kernels.to_slots(x_ND, slots).reshape(B, E, C, D)
        if axis:
            rows_BECD = jax.lax.all_to_all(rows_BECD, axis, 1, 0, tiled=True)
        here = rows_BECD.shape
        out_EMD = mlp(rows_BECD.swapaxes(0, 1).reshape(here[1], here[0] * C, D), jnp.matmul)
        out_BECD = out_EMD.reshape(here[1], here[0], C, D).swapaxes(0, 1)
        if axis:
            out_BECD = jax.lax.all_to_all(out_BECD, axis, 0, 1, tiled=True)
        y_ND = weighted(kernels.from_slots(out_BECD.reshape(B * E * C, D), slots), flat(weights_BTK))
        return y_ND.reshape(B, T, D)

    ids_NK, weights_NK = flat(ids_BTK), flat(weights_BTK)
    if axis:
        x_ND, ids_NK, weights_NK = (jax.lax.all_gather(each, axis, tiled=True) for each in (x_ND, ids_NK, weights_NK))
    slots, sizes_E = kernels.slots_by_expert(ids_NK - first, len(matrices["up"]))
    out_MD = mlp(kernels.to_slots(x_ND, slots), lambda rows, w: kernels.grouped_matmul(rows, w, sizes_E))
    y_ND = weighted(kernels.from_slots(out_MD, slots), weights_NK)
    if axis:
        y_ND = jax.lax.psum_scatter(y_ND, axis, tiled=True)
    return y_ND.reshape(B, T, D)


# --- block and stack --------------------------------------------------------------------------------------------------

class Inputs(NamedTuple):
    """What every block of a stack sees beside its input: masks and positions by layer kind, and the encoder."""

    masks: dict[str, kernels.Mask]
    ropes: dict[str, Any]
    context_BSD: Any = None
    context_mask: Any = None
    real_BT: Any = None   # False: padding, which has no expert; None: all are real
    bias_KGR: Any = None  # of relative positions, see `kernels.pair_bias`


class Block(nn.Module):
    """Attention, cross attention where the architecture has it, the mlp or experts: each with its norm and residual."""

    arch: Architecture
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD, inputs: Inputs, kind: str, key_B=None, cache=None, trunk=None, context=None):
        """Returns (x [B, T, D], cache of this layer, taps). key_B: of each row's dropout."""
        a = self.arch
        keys = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(key_B) if key_B is not None else (None,) * 3
        made = routing = None   # keys and values; what the router did
        # Few tokens, as of a step of decoding, are not cut.
        length = "between" if self.layout and x_BTD.shape[1] % self.layout.parts("between") == 0 else "length"
        dealt = lambda x: ring.deal(x, ("batch", "length", "embed"), self.layout) if _cut(self.layout) else x

        def sublayer(x, name, f, key, other=None):
            """Returns (x and what f makes of it, or of `other`; what it makes)."""
            before, read = a.norm_position in ("pre", "sandwich"), x if other is None else other
            before = before and (a.first_norm or name != "attention")
            # Placed at once, or what is kept of them for the backward pass is whole on each device of `tensor`.
            entering = Norm(a, name=f"{name}_norm")(read) if before else read
            entering = _placed(entering, self.layout, "batch", length, "embed")
            y = _kept(f(entering), self.layout, "batch", length, "embed")
            if a.norm_position in ("sandwich", "output"):
                y = Norm(a, name=f"{name}_out_norm")(y)
            y = dropout(y, a.dropout, key, dealt)
            x = x + y
            if a.norm_position == "post":
                x = Norm(a, name=f"{name}_norm")(x)
            return _placed(x, self.layout, "batch", length, "embed"), y

        def attend(x):
            nonlocal cache, made
            own = Attention(a, self.layout, name="attention")
            y, cache, made = own(x, inputs.masks[kind], inputs.ropes[kind], inputs.bias_KGR, cache=cache, trunk=trunk)
            return y

        def cross(x):
            other = Attention(a, self.layout, cross=True, name="cross")
            return other(x, inputs.context_mask, context_BSD=inputs.context_BSD, cache=context)[0]

        def mix(x):
            nonlocal routing
            y, routing = Moe(a, self.layout, name="moe")(x, inputs.real_BT)
            return y

        x, attended = sublayer(x_BTD, "attention", attend, keys[0])
        if a.cross_attention:
            x, _ = sublayer(x, "cross", cross, keys[1])
        x, added = sublayer(x, "mlp", mix if a.num_experts else Mlp(a, self.layout, name="mlp"), keys[2],
                            x_BTD if a.parallel_residual else None)
        return x, cache, {"residual": x, "attention": attended, "mlp": added, "k": made[0], "v": made[1],
                          "router": routing}


class Transformer(nn.Module):
    """The stack of blocks: x [B, T, D] in, x [B, T, D] out.

    The parameters of all layers are stacked, `layers.* [L, ...]`, or a tuple of L trees, as `unstack`
    makes it for decoding. `scan_layers` compiles one period of the layer pattern and scans it.
    """

    arch: Architecture
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD, *, positions_BT=None, segment_ids_BT=None, prefix_BT=None, context_BSD=None,
                 context_segment_ids_BS=None, cache: Cache | None = None, last_BT=None, trunk: Trunk | None = None,
                 key=None, capture=()):
        """Returns (x [B, T, D], cache, taps).

        Args:
          positions_BT: of the rotary embedding; default 0, 1, 2, ... (from the cache's length, with a cache).
          segment_ids_BT: tokens see only their own segment (packed documents; 0 marks padding).
          prefix_BT: True where a token may be seen by all of its segment (prefix LM).
          context_BSD, context_segment_ids_BS: the encoder's output, for cross attention.
          cache: attend to what it holds and to x, which is appended. Not with segments or a prefix. Rows padded at
            their right say so in its `count_B`. Its `context` (see the method) is in place of `context_BSD`.
          last_BT: each row is not one sequence but trees of tokens, depth first, each seeing itself and its ancestors;
            the index of the last token below this one (its own, where there is none). `positions_BT` says how deep.
          trunk: of trees, what comes before them. Not with segments, a prefix or a cache.
          key: of dropout; None: no dropout.
          capture: names out of TAPS to return, each [L, B, T, D]; of "k" and "v" [L, B, T, K, H]; "router" a Routing.
        """
        a, (B, T, _) = self.arch, x_BTD.shape
        if self.is_initializing():   # on a dummy, and perhaps without the chip whose kernel training asks for
            a = dataclasses.replace(a, attention_kernel="reference")
        if self.is_initializing():
            layers = {name: self.param(name, self._init_layers, name, own, n) for name, own, n in a.stacks}
        else:
            layers = {name: self.get_variable("params", name) for name, _, _ in a.stacks}

        cut = _cut(self.layout)
        if cut:
            if cache is not None or last_BT is not None or a.cross_attention:
                raise UserError("mesh.context cuts sequences in training alone; caches, trees of tokens and cross "
                                "attention need a mesh with context=1")
            deal = lambda x, *axes: None if x is None else ring.deal(x, ("batch", "length", *axes), self.layout)
            if positions_BT is None:
                positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
            x_BTD, positions_BT = deal(x_BTD, "embed"), deal(positions_BT)
            segment_ids_BT, prefix_BT = deal(segment_ids_BT), deal(prefix_BT)

        stages = pipeline.schedule(a, self.layout)
        if stages and (cache is not None or last_BT is not None):
            raise UserError(f"mesh.stage={stages.stages}: a pipeline is for training; decode and score on a mesh with "
                            "stage=1, as in --mesh fsdp=4,tensor=2")
        index_BT, places, kinds = None, {}, a.layer_kinds
        if cache is not None:
            if segment_ids_BT is not None or prefix_BT is not None:
                raise UserError("a cache cannot be combined with segment_ids or a prefix: one sequence a row")
            index_BT = cache.length_B[:, None] + jnp.arange(T)
            places = {k: _places(cache, entries.shape[2], k == "local", T) for k, entries in zip(kinds, cache.k)}
        if positions_BT is None:
            positions_BT = index_BT if index_BT is not None else jnp.broadcast_to(jnp.arange(T), (B, T))
        bias = None
        if a.has_relative_bias:
            table = param(self, "relative_bias", fan_in(a.embed_dim), a.param_dtype, position=a.relative_buckets,
                          kv_heads=a.num_kv_heads, groups=a.groups)
            bias = jnp.moveaxis(table.astype(jnp.float32)[relative_buckets(a)], 0, -1)
            bias = _placed(bias, self.layout, "kv_heads", "groups", "head")
        mask = kernels.Mask(a.causal, 0, segment_ids_BT, segment_ids_BT, prefix_BT, index_BT)
        masks = {k: mask._replace(window=a.window if k == "local" else 0,
                                  k_index_BS=places[k].k_index_BS if places else None) for k in set(kinds)}
        if last_BT is not None:
            if cache is not None or segment_ids_BT is not None or prefix_BT is not None:
                raise UserError("trees of tokens cannot be combined with a cache, segment_ids or a prefix")
            masks = {k: _tree_mask(positions_BT, last_BT, trunk, a.window if k == "local" else 0) for k in set(kinds)}
        context_mask, held = None, cache.context if cache is not None else None
        if held is not None:
            seen = held.seen_BS
            context_mask = kernels.Mask(False) if seen is None else kernels.Mask(False, 0, jnp.ones((B, T), bool), seen)
        elif a.cross_attention:
            if context_BSD is None:
                raise UserError("a stack with model.cross_attention needs context_BSD, the output of an encoder")
            if segment_ids_BT is not None and context_segment_ids_BS is None:
                raise UserError("packed segments in a stack with model.cross_attention need context_segment_ids_BS, "
                                "which say where each segment's source is")
            context_mask = kernels.Mask(False, 0, segment_ids_BT, context_segment_ids_BS)
            if segment_ids_BT is None and context_segment_ids_BS is not None:   # unpacked: only hide the padding
                context_mask = context_mask._replace(q_segments_BT=jnp.ones((B, T), context_segment_ids_BS.dtype))
        inputs = Inputs(masks,
                        {k: rope_table(a, k, positions_BT) if a.position == "rope" else None for k in set(kinds)},
                        context_BSD, context_mask, None if segment_ids_BT is None else segment_ids_BT > 0, bias)
        # Of each row: what is drawn for it does not depend on how the batch is cut into microbatches.
        keys_LB = jax.random.split(key, (a.num_layers, B)) if key is not None else None

        x, taps, made, first = x_BTD, [], [], 0
        for name, own, n in a.stacks:
            here, block = slice(first, first + n), Block(own, self.layout, parent=None)
            of_these = lambda arrays_L: jax.tree.map(lambda x: x[here], arrays_L)

            def apply(x, layer, key_B, kind, layer_cache=None, layer_trunk=None, context=None):
                x, layer_cache, taps = block.apply({"params": layer}, x, inputs, kind, key_B, layer_cache, layer_trunk,
                                                   context)
                return x, layer_cache, {name: taps[name] for name in capture}

            if cache is not None:
                given, contexts = [], [None] * n if held is None else list(zip(held.k[here], held.v[here]))
                for layer, kind, k, v, context in zip(unstack(layers[name], n), kinds[here], cache.k[here],
                                                      cache.v[here], contexts):
                    x, (k, v, _), tap = apply(x, layer, None, kind, (k, v, places[kind]), context=context)
                    made, given = [*made, (k, v)], [*given, tap]
                taps.append(jax.tree.map(lambda *t: jnp.stack(t), *given))
            elif stages and name == "layers":
                x, tap = self._through_stages(own, x, layers[name], inputs, of_these(keys_LB), capture, stages)
                taps.append(tap)
            else:
                x, tap = _through_layers(apply, x, layers[name], of_these(keys_LB), of_these(trunk and trunk[:2]),
                                         dataclasses.replace(own, num_layers=n))
                taps.append(tap)
            first += n
        if cache is not None:
            cache = Cache(*zip(*made), cache.length_B + (T if cache.count_B is None else cache.count_B), context=held)
        taps = {name: _joined([tap[name] for tap in taps if tap[name] is not None]) for name in capture}
        if cut:
            x = ring.collect(x, ("batch", "length", "embed"), self.layout)
            width = lambda name: ("kv_heads", "head") if name in ("k", "v") else ("embed",)
            taps = {name: ring.collect(tap, (None, "batch", "length", *width(name)), self.layout)
                    if name != "router" else tap for name, tap in taps.items()}
        if a.final_norm:
            x = Norm(a, name="final_norm")(x)
        return x, cache, taps

    def context(self, context_BSD, segment_ids_BS=None) -> Context:
        """Returns the keys and values that each layer's cross attention makes of an encoder's output, for a cache.

        segment_ids_BS: 0 where there is no token.
        """
        made = []
        for name, own, n in self.arch.stacks:
            cross = Attention(own, self.layout, cross=True, parent=None)
            for layer in unstack(self.get_variable("params", name), n):
                _, _, (k, v) = cross.apply({"params": layer["cross"]}, None, context_BSD=context_BSD)
                made.append((k.swapaxes(1, 2), v.swapaxes(1, 2)))
        return Context(*zip(*made), None if segment_ids_BS is None else segment_ids_BS > 0)

    def _through_stages(self, a, x_BTD, layers, inputs, keys_LB, capture, schedule):
        """Returns (x, taps [L, ...]) after layers of architecture `a`, each on its stage of the mesh."""
        if inputs.bias_KGR is not None:   # what goes to the stages has rows
            inputs = inputs._replace(bias_KGR=jnp.broadcast_to(inputs.bias_KGR, (len(x_BTD), *inputs.bias_KGR.shape)))
        leaves, treedef = jax.tree.flatten(inputs)   # those that are no arrays are the same for every row
        per_row = {"inputs": [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]}
        if keys_LB is not None:
            per_row["keys"] = jax.random.key_data(keys_LB).swapaxes(0, 1)

        def group(layers, first, x, per_row, layout):
            # What a step keeps is moved to the host once, by the policy of the step.
            own = dataclasses.replace(a, num_layers=jax.tree.leaves(layers)[0].shape[0],
                                      remat=a.remat.removeprefix("offload_"))
            inputs = treedef.unflatten([leaf if row is None else row for leaf, row in zip(leaves, per_row["inputs"])])
            if inputs.bias_KGR is not None:
                inputs = inputs._replace(bias_KGR=inputs.bias_KGR[0])
            keys = None
            if keys_LB is not None:
                keys = jax.lax.dynamic_slice_in_dim(per_row["keys"].swapaxes(0, 1), first, own.num_layers)
                keys = jax.random.wrap_key_data(keys, impl=jax.random.key_impl(keys_LB))
            block = Block(a, layout, parent=None)

            def apply(x, layer, key_B, kind, *_):
                x, _, taps = block.apply({"params": layer}, x, inputs, kind, key_B)
                return x, None, {name: taps[name] for name in capture}

            return _through_layers(apply, x, layers, keys, None, own)

        return pipeline.through_layers(group, layers, x_BTD, per_row, schedule, self.layout, pipeline.keeping(a.remat))

    def _init_layers(self, key, name: str, a: Architecture, n: int):
        """Returns the boxed parameters of n layers, stacked along the axis `name`: each layer from its own key."""
        x = jnp.zeros((1, 1, a.embed_dim), a.dtype)
        mask = kernels.Mask()
        inputs = Inputs(dict.fromkeys(("global", "local"), mask), dict.fromkeys(("global", "local")), x, mask)
        block = Block(a, None, parent=None)
        boxed = jax.vmap(lambda k: block.init(k, x, inputs, "global")["params"])(jax.random.split(key, n))
        return jax.tree.map(lambda b: b.add_axis(0, {"name": name}), boxed, is_leaf=is_boxed)


def check(arch: Architecture, length: int, layout: Layout) -> None:
    """Raises UserError where the mesh cannot train a stack on sequences of `length`, before anything is compiled."""
    if not _cut(layout):
        return
    ring.check(length, layout)
    if arch.cross_attention or arch.has_relative_bias:
        what = "model.cross_attention" if arch.cross_attention else f"model.position={arch.position!r}"
        raise UserError(f"{what} needs whole sequences, and mesh.context={layout.mesh.shape['context']} cuts them; set "
                        "mesh.context=1")
    if arch.attention_kernel != "auto":
        raise UserError(f"model.attention_kernel={arch.attention_kernel!r}: sequences that mesh.context="
                        f"{layout.mesh.shape['context']} cuts have their own kernel; set 'auto', or mesh.context=1")
    if arch.capacity_factor:
        raise UserError(f"model.capacity_factor={arch.capacity_factor}: the room of an expert is shared by a whole "
                        f"row, which mesh.context={layout.mesh.shape['context']} cuts; set capacity_factor=0, or "
                        "mesh.context=1")


def _cut(layout):
    return layout is not None and layout.parts("length") > 1


def unstack(layers, num_layers: int) -> tuple:
    """Returns the tuple of the layers' own trees from their stacked parameters (or that tuple itself)."""
    if isinstance(layers, tuple):
        return layers
    # A split's transpose is one concatenation; indexing each layer would give as many full-size additions.
    leaves, treedef = jax.tree.flatten(layers)
    parts = [[p[0] for p in jax.lax.split(leaf, [1] * num_layers)] if isinstance(leaf, jax.Array)
             else list(leaf) for leaf in leaves]
    return tuple(treedef.unflatten(layer) for layer in zip(*parts))


def _tree_mask(positions_BT, last_BT, trunk, window):
    """Returns the mask of `Transformer`'s `last_BT`: keys of the trunk, then of the tokens."""
    B, T = last_BT.shape
    places, first, last = positions_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), last_BT
    if trunk is not None:
        before = jnp.broadcast_to(jnp.arange(trunk.k.shape[1]), (B, trunk.k.shape[1]))
        places, first = jnp.concatenate([before, places], 1), jnp.concatenate([jnp.zeros_like(before), first], 1)
        last = jnp.concatenate([trunk.last_BS, last], axis=1)
    return kernels.Mask(False, window, q_index_BT=positions_BT, k_index_BS=places, k_first_BS=first, k_last_BS=last)


def _joined(taps):
    """Returns one of the stacks' taps along their layers; None of none: dense layers have no router."""
    return jax.tree.map(lambda *t: jnp.concatenate(t), *taps) if len(taps) > 1 else taps[0] if taps else None


def _through_layers(apply, x, layers, keys, trunk, a: Architecture):
    """Returns (x, taps [L, ...]) after all layers: scanned by periods of the layer pattern, or unrolled."""
    kinds, period = a.layer_kinds, len(a.layer_pattern)
    remat = lambda f: f if a.remat == "none" else jax.checkpoint(
        f, policy=REMAT_POLICIES[a.remat], prevent_cse=not a.scan_layers, static_argnums=(3,))

    def one(x, layer, key, kind, trunk):
        x = checkpoint_name(x, pipeline.BLOCK_INPUT)
        if not a.scan_layers:   # a scan keeps the gradients of a layer together by itself
            x, layer = kernels.gradients_together(x, layer)
        x, _, taps = apply(x, layer, key, kind, None, trunk)
        return x, taps

    # Under jit, layers that are unrolled are traced once for all of their kind; XLA inlines them again.
    one = jax.jit(remat(one), static_argnums=3)
    at = lambda tree_, i: None if tree_ is None else jax.tree.map(lambda p: p[i], tree_)
    scanned = a.num_layers // period * period if a.scan_layers and not isinstance(layers, tuple) else 0
    stacks = []
    if scanned:
        grouped = jax.tree.map(lambda p: p[:scanned].reshape(scanned // period, period, *p.shape[1:]),
                               (layers, keys, trunk))

        def body(x, group):
            taps = []
            for i in range(period):
                x, tap = one(x, at(group[0], i), at(group[1], i), kinds[i], at(group[2], i))
                taps.append(tap)
            return x, jax.tree.map(lambda *t: jnp.stack(t), *taps)

        x, taps = jax.lax.scan(body, x, grouped)
        stacks.append(jax.tree.map(lambda t: t.reshape(scanned, *t.shape[2:]), taps))
    if scanned < a.num_layers:
        rest = unstack(layers, a.num_layers)
        for i in range(scanned, a.num_layers):
            x, tap = one(x, rest[i], at(keys, i), kinds[i], at(trunk, i))
            stacks.append(jax.tree.map(lambda t: t[None], tap))
    return x, jax.tree.map(lambda *t: jnp.concatenate(t), *stacks)

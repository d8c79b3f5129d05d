"""Optimizers, learning-rate schedules, masks by parameter name, and EMA, built from Optax. Layer 2.

`make` turns `config.optimizer` into one pure `optax.GradientTransformation`. All of it computes in
float32, whatever the parameters' dtype. Layers are stacked in one array, so what is defined for one
matrix (Muon, Adafactor) is told by the logical axes where the matrix is: see `matrix_axes`.

Try:  python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/muon --config.optimizer.name=muon
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fm_jax import tree
from fm_jax.config import CHOICES
from fm_jax.errors import UserError, choose
from fm_jax.sharding import is_axes

STACKED = ("layers", "first_layers", "experts")  # axes over which a parameter is many independent ones
WIDTH = ("embed", "expert_embed")   # axes of the residual stream
MUON_MOMENTUM = 0.95             # Jordan et al., see `_muon`


def make(o, *, total_steps: int, warmup_steps: int, decay_steps: int, params, axes, model=None):
    """Returns (optax.GradientTransformation, schedule: step -> learning rate) of `config.optimizer`.

    params: nested dict of arrays or shape structs. axes: the same tree of tuples of logical names. model: of all
    parameters, where some do not train: their names are known to patterns too.
    The transformation clips by global norm, takes the optimizer's direction, adds `weight_decay`
    times the parameters (decoupled, all but `no_decay`), and multiplies by minus the learning rate of
    the step that `update(grads, state, params, step=)` is told. Its state is the same with clipping on or off,
    so that a run can change that.

    Raises: UserError where a name is unknown or a `no_decay` pattern matches no parameter.
    """
    lengths = dict(total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    known = tree.flatten(model or {}) | tree.flatten(params)
    kept = tree.mask(known, o.no_decay, what="config.optimizer.no_decay")
    decayed = tree.map_named(lambda n, _: not kept[n], params)
    rate = schedule(o, o.learning_rate, **lengths)

    def step_of(direction, rate):
        return optax.chain(direction, optax.add_decayed_weights(o.weight_decay, decayed), scale_by_rate(rate))

    name = choose(o.name, CHOICES["optimizer.name"], "config.optimizer.name")
    adam = optax.scale_by_adam(o.b1, o.b2, o.eps, mu_dtype=o.moment_dtype)
    if name == "adamw":
        tx = step_of(adam, rate)
    elif name == "lion":
        tx = step_of(optax.scale_by_lion(o.b1, o.b2, mu_dtype=o.moment_dtype), rate)
    elif name == "adafactor":
        tx = step_of(_adafactor(o, params, axes), rate)
    else:
        matrices = jax.tree.map(lambda a: bool(a) and a[0] in STACKED and matrix_axes(a) is not None, axes, is_leaf=is_axes)
        if not any(jax.tree.leaves(matrices)):
            raise UserError("config.optimizer.name='muon': the model has no matrix in stacked layers; use adamw")
        tx = optax.partition(
            {True: step_of(_muon(o, axes, matrices), schedule(o, o.muon_learning_rate, **lengths)),
             False: step_of(adam, rate)}, matrices)
    if o.layer_decay < 1:
        tx = optax.chain(tx, by_layer(o.layer_decay, axes))
    clip = clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    return in_float32(optax.chain(clip, tx)), rate


def schedule(o, peak: float, *, total_steps: int, warmup_steps: int, decay_steps: int):
    """Returns a function: step (int or array, from 0) -> float32 learning rate.

    With w = warmup_steps, n = total_steps, f = final_learning_rate_frac:
      warm-up    peak (t + 1) / (w + 1) while t < w: no step is spent at 0, and step w is at the peak
      cosine     from peak at step w to f peak at step n, along half a cosine
      linear     the same along a line
      wsd        peak until step n - decay_steps, then along a line to f peak at step n
      constant   peak
    Step n would be the first after the run. Later steps keep the last value.

    Raises: UserError where the parts do not fit into the run.
    """
    kind = choose(o.schedule, CHOICES["optimizer.schedule"], "config.optimizer.schedule")
    used = warmup_steps + (decay_steps if kind == "wsd" else 0)
    if used > total_steps:
        raise UserError(f"config.optimizer: warmup_steps={warmup_steps}" + f" and decay_steps={decay_steps}" * (
            kind == "wsd") + f" do not fit into the run of {total_steps} steps (config.steps)")
    start = total_steps - decay_steps if kind == "wsd" else warmup_steps
    floor = o.final_learning_rate_frac

    def rate(step):
        t = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((t - start) / max(1, total_steps - start), 0.0, float(total_steps > start))
        if kind == "constant":
            frac = jnp.ones_like(t)
        elif kind == "cosine":
            frac = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            frac = 1 - (1 - floor) * progress
        return peak * jnp.where(t < warmup_steps, (t + 1) / (warmup_steps + 1), frac)

    return rate


def matrix_axes(axes: tuple[str, ...]):
    """Returns (inputs, outputs), the positions in `axes` that make the rows and columns of a matrix, or None.

    After the `STACKED` axes, a matrix reads from or writes to the residual stream: with its width, `embed`,
    first, embed is the input and the rest the output (wq: embed -> kv_heads groups head); with
    `embed` last, the rest is the input (wo). Anything else, such as a bias or a norm, is no matrix.
    """
    free = [i for i, axis in enumerate(axes) if axis not in STACKED]
    if len(free) < 2:
        return None
    if axes[free[0]] in WIDTH:
        return tuple(free[:1]), tuple(free[1:])
    if axes[free[-1]] in WIDTH:
        return tuple(free[:-1]), tuple(free[-1:])
    return None


def global_norm(grads):
    """Returns the Euclidean norm of all gradients together, a float32 scalar, summed in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns a transformation that scales gradients down to a global norm of at most `max_norm`.

    `optax.clip_by_global_norm` sums squares in the gradients' dtype, which bfloat16 does not survive.
    """
    def clip(grads, _):
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(global_norm(grads), 1e-12))   # 1e-12: all-zero gradients
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def scale_by_rate(rate) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that multiplies by minus `rate(step)`, for the `step` that `update` is told.

    `optax.scale_by_learning_rate` counts its own updates, and so falls behind the run with each skipped step.
    """
    def update(updates, state, params=None, *, step):
        scale = -rate(step)
        return jax.tree.map(lambda u: scale * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def by_layer(decay: float, axes) -> optax.GradientTransformation:
    """Returns a transformation that multiplies the updates of each layer by `decay` once for each layer above it.

    What is below all layers, the tables of `embed`, is one layer more; norms and heads behind them have the full rate.
    Each stack of an objective counts its own layers. Source: arXiv:2003.10555, appendix A (layer-wise learning rates).

    axes: the parameters' logical axes.
    """
    def scale(updates, _):
        flat, names = tree.flatten(updates), tree.flatten(axes, is_leaf=is_axes)
        own = lambda name: name.rpartition("transformer.")[0] if "transformer." in name else name.rpartition("embed.")[0]
        depth = {}   # of each stack, what "first_layers" and "layers" are long
        for name, u in flat.items():
            if names[name][0] in ("first_layers", "layers"):
                depth.setdefault(own(name), {})[names[name][0]] = u.shape[0]

        def factor(name, u):
            layers = depth.get(own(name), {})
            total, kind = sum(layers.values()), names[name][0]
            if kind in layers:
                at = jnp.arange(u.shape[0]) + (layers.get("first_layers", 0) if kind == "layers" else 0)
                return (decay ** (total - 1 - at)).reshape(-1, *(1,) * (u.ndim - 1))
            below = "embed." in name and not name.rpartition(".")[2].startswith(("head", "transform"))
            return decay ** total if below and "transform_norm" not in name else 1.0

        return tree.map_named(lambda name, u: u * factor(name, u), updates)

    return optax.stateless(scale)


def in_float32(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with its state, inputs and updates in float32; `optax.apply_updates` casts back."""
    cast = lambda t: jax.tree.map(lambda x: x.astype(jnp.float32), t)
    return optax.GradientTransformationExtraArgs(
        lambda params: tx.init(cast(params)),
        lambda grads, state, params, **extra: tx.update(cast(grads), state, cast(params), **extra))


def _muon(o, axes, matrices):
    """Returns Muon's direction for the parameters where `matrices` is True, each layer on its own.

    Momentum 0.95 with Nesterov, five Newton-Schulz steps, times sqrt(max(1, outputs / inputs)).
    Source: Jordan et al., https://kellerjordan.github.io/posts/muon.
    """
    numbers = jax.tree.map(
        lambda is_matrix, a: optax.contrib.MuonDimensionNumbers(*matrix_axes(a)) if is_matrix else optax.MaskedNode(),
        matrices, axes)

    def scale(updates, _):
        size = lambda x, dims: math.prod(x.shape[i] for i in dims)
        return jax.tree.map(lambda u, n: u * max(1.0, size(u, n.output_axis) / size(u, n.reduction_axis)) ** 0.5,
                            updates, numbers)

    return optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, mu_dtype=o.moment_dtype, weight_dimension_numbers=numbers),
        optax.stateless(scale))


def _adafactor(o, params, axes):
    """Returns Adafactor's direction, with AdamW's learning rates: update RMS at most 1, momentum b1.

    The second moment is kept as row and column means of the matrix where both have 128 or more, so
    heads are merged first: [layers, embed, kv_heads, groups, head] has no second long axis. Its decay
    is min(b2, 1 - t^-0.8).
    Source: Shazeer and Stern, arXiv:1804.04235, algorithm 4; without the relative step size and with
    a cap on the decay as in Zhai et al., arXiv:2106.04560, section 3.4.
    """
    def view(a, p):
        """[layers, rows, columns]"""
        matrix = matrix_axes(a)
        sides = [tuple(p.shape[i] for i in side) for side in matrix or ()]
        stacked = tuple(n for n, name in zip(p.shape, a) if name in STACKED)
        return (*stacked, *map(math.prod, sides)) if matrix else p.shape

    shapes = jax.tree.map(view, axes, params, is_leaf=is_axes)
    own = jax.tree.map(lambda a: tuple(i for i, name in enumerate(a) if name not in STACKED), axes, is_leaf=is_axes)

    def clip(updates, _):
        rms = lambda u, dims: jnp.sqrt(jnp.mean(jnp.square(u), axis=dims, keepdims=True))   # of each layer
        return jax.tree.map(lambda u, dims: u / jnp.maximum(1.0, rms(u, dims)), updates, own)

    decay = lambda step, power: jnp.minimum(o.b2, 1.0 - (step + 1.0) ** -power)
    momentum = [optax.ema(o.b1, debias=False, accumulator_dtype=o.moment_dtype)] if o.b1 else []
    return optax.chain(_reshaped(optax.scale_by_factored_rms(decay_rate_fn=decay), shapes), optax.stateless(clip),
                       *momentum)


def _reshaped(tx, shapes):
    """Returns `tx` working on parameters and gradients of `shapes`."""
    into = lambda t: jax.tree.map(lambda x, shape: x.reshape(shape), t, shapes)

    def update(grads, state, params):
        updates, state = tx.update(into(grads), state, into(params))
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, grads), state

    return optax.GradientTransformation(lambda params: tx.init(into(params)), update)


def state_shardings(tx, params, shardings, replicated):
    """Returns a tree like `tx.init(params)`: the parameter's sharding for each moment of its shape, else `replicated`.

    params: arrays or shape structs; shardings: the same tree of what each parameter has. Without
    this, `jit(tx.init)(params)` replicates every moment on every device. A moment is found by its
    dict keys, which end its path, because `optax.tree_utils.tree_map_params` cannot see through
    Muon's partition or Adafactor's factors.
    """
    known = {n: (p.shape, s) for (n, p), s in zip(tree.flatten(params).items(), jax.tree.leaves(shardings))}

    def place(path, leaf):
        keys = []
        for k in reversed(path):
            if not isinstance(k, jax.tree_util.DictKey):
                break
            keys.insert(0, k)
        shape, sharding = known.get(tree.name(keys), (None, None))
        return sharding if shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def ema_init(params):
    """Returns float32 copies of the parameters, the start of their moving average."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def ema_update(ema, params, decay: float, step):
    """Returns d ema + (1 - d) params in float32, with d = min(decay, (1 + step) / (10 + step)).

    `step` counts from 0. The second term lets the average leave the random start quickly.
    Source: the num_updates rule of tf.train.ExponentialMovingAverage.
    """
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)


class SkipState(NamedTuple):
    """Of `skip_outliers`: the wrapped state, the running mean of gradient norms, and the steps not skipped."""

    inner: Any
    mean_norm: jax.Array
    taken: jax.Array


def skip_outliers(tx, factor: float, warmup_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` that changes nothing in a step whose gradient norm exceeds `factor` times its running mean.

    The mean is an average of decay 0.98 without start-up bias, in which a skipped step counts as one at the
    limit: a norm that rises for good is followed in time, and an outlier moves it little. The first
    `warmup_steps` steps, at least one, are never skipped. With a factor of 0 no step is, and the mean is kept,
    so that a run can go on with skipping or without.
    """
    def init(params):
        return SkipState(tx.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def update(grads, state, params, **extra):
        norm, limit = global_norm(grads), factor * state.mean_norm
        updates, inner = tx.update(grads, state.inner, params, **extra)
        take = True
        if factor:
            take = (state.taken < max(1, warmup_steps)) | (norm <= limit)
            updates = jax.tree.map(lambda u: jnp.where(take, u, 0), updates)
            inner = jax.tree.map(lambda a, b: jnp.where(take, a, b), inner, state.inner)
        decay = jnp.minimum(0.98, state.taken / (state.taken + 1))   # a plain mean at first
        mean = decay * state.mean_norm + (1 - decay) * jnp.where(take, norm, limit)
        return updates, SkipState(inner, mean, state.taken + take)

    return optax.GradientTransformationExtraArgs(init, update)

"""Matrices of a model in 8 or 4 bits: smaller to keep, made whole where a layer uses them. Layer 2.

Of each output, the inputs are cut into blocks along their last axis; a block has one scale, by which its largest
element takes the largest code. Embeddings, heads, routers, biases and norms stay as they are.

    python -m fm_jax.convert --workdir runs/x --quantize nf4 --to_run runs/x_nf4
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import optim, tree
from fm_jax.errors import UserError
from fm_jax.model import Derived

# NormalFloat4: 16 quantiles of a normal distribution, with an exact 0. Source: arXiv:2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# Inputs of a block at most: int8's error is small enough for one scale a row; 4 bits as llama.cpp's and bitsandbytes'.
BLOCKS = {"int8": 2 ** 30, "int4": 32, "nf4": 64}


class Quantized(Derived):
    """A matrix in blocks of codes."""

    codes: jax.Array    # of the matrix's shape, int8; of 4 bits uint8, two of them along `axis` in each, the first low
    scales: jax.Array   # float32, one for each block along `axis`
    kind: str = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)    # from the end: layers may be stacked before, or not
    dtype: str = struct.field(pytree_node=False)   # of the matrix

    def array(self):
        """Returns the matrix."""
        codes = self.codes
        axis = codes.ndim + self.axis
        if self.kind != "int8":
            codes = jnp.stack([codes & 15, codes >> 4], axis + 1)
            codes = codes.reshape(*self.codes.shape[:axis], -1, *self.codes.shape[axis + 1:])
        if self.kind == "nf4":
            values = jnp.asarray(NF4, jnp.float32)[codes]
        else:
            values = codes.astype(jnp.float32) - (8 if self.kind == "int4" else 0)
        blocks = self.scales.shape[axis]
        values = values.reshape(*values.shape[:axis], blocks, -1, *values.shape[axis + 1:])
        whole = values * jnp.expand_dims(self.scales, axis + 1)
        return whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2:]).astype(self.dtype)


def quantized(w, kind: str, axis: int) -> Quantized:
    """Returns the matrix w in blocks along `axis`, which counts from the end.

    int8 and int4: scale = largest / 127 or 7, rounded to nearest. nf4: the nearest of NF4 times the largest.
    """
    at = w.ndim + axis
    size = block(w.shape[at], kind)
    cut = w.astype(jnp.float32).reshape(*w.shape[:at], -1, size, *w.shape[at + 1:])
    top = jnp.abs(cut).max(at + 1, keepdims=True)
    scales = top if kind == "nf4" else top / (127 if kind == "int8" else 7)
    unit = cut / jnp.where(scales > 0, scales, 1)
    if kind == "nf4":
        between = jnp.asarray((np.array(NF4[1:]) + np.array(NF4[:-1])) / 2, jnp.float32)
        codes = jnp.searchsorted(between, unit)
    else:
        codes = jnp.round(unit) + (8 if kind == "int4" else 0)
    codes = codes.astype(jnp.int8 if kind == "int8" else jnp.uint8).reshape(w.shape)
    if kind != "int8":
        pairs = codes.reshape(*w.shape[:at], -1, 2, *w.shape[at + 1:])
        low, high = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in (0, 1))
        codes = low | (high << 4)
    return Quantized(codes, scales.squeeze(at + 1), kind, axis, str(w.dtype))


def block(size: int, kind: str) -> int:
    """Returns the inputs of a block, of an axis of `size`: the most that divide it, up to the kind's."""
    return max(n for n in range(1, min(size, BLOCKS[kind]) + 1) if size % n == 0)


def axis_of(axes: tuple[str, ...]) -> int | None:
    """Returns the axis, from the end, along which the parameter of these logical axes is cut into blocks.

    None where it stays as it is: what is quantised are the matrices of stacked layers.
    """
    sides = optim.matrix_axes(axes)
    if sides is None or axes[0] not in optim.STACKED or "router" in axes:
        return None
    return sides[0][-1] - len(axes)


def tree_of(params, axes: dict, kind: str):
    """Returns the parameters, a nested dict, with each matrix that can be as a dict of its `codes` and `scales`.

    axes: {dotted name: logical axes} of these parameters, or of more. kind "": they stay as they are.

    Raises:
      UserError: a matrix cannot be of 4 bits, as its inputs are an odd number.
    """
    def one(name, p):
        axis = axis_of(axes[name]) if kind else None
        if axis is None:
            return p
        if kind != "int8" and p.shape[axis] % 2:
            raise UserError(f"{name}: {p.shape[axis]} inputs cannot be kept in pairs of 4 bits, as {kind} does; take "
                            "int8")
        q = quantized(p, kind, axis)
        return {"codes": q.codes, "scales": q.scales}

    return tree.map_named(one, params)


def axes_of(axes: dict, kind: str) -> dict:
    """Returns {dotted name: logical axes} of what `tree_of` makes of parameters of these axes."""
    out = {}
    for n, own in axes.items():
        at = axis_of(own) if kind else None
        out |= {n: own} if at is None else {
            f"{n}.codes": own, f"{n}.scales": tuple("block" if i == at else a for i, a in enumerate(own, -len(own)))}
    return out


def derived(kept, model: dict, axes: dict, kind: str):
    """Returns what `tree_of` made, with a Quantized in the place of each dict. model, axes: by dotted name."""
    flat = tree.flatten(kept)
    whole = lambda n: n.removesuffix(".codes").removesuffix(".scales") if kind else n
    return tree.nest({n: flat[n] if n in flat else Quantized(
        flat[f"{n}.codes"], flat[f"{n}.scales"], kind, axis_of(axes[n]), str(model[n].dtype))
        for n in dict.fromkeys(map(whole, flat))})

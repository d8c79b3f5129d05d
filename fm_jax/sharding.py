"""The mesh, and where every array lives on it. Layer 0.

Parameters and activations carry logical axis names; RULES sends each to a mesh axis. Flax is silent
about a misspelt axis, or two logical axes on one mesh axis; here both raise before compiling, with
the parameter's name and what to change.

Try:  python -m fm_jax.plan --config configs/causal_lm.py:1b --config.mesh.fsdp=8
"""

import dataclasses
import math
from typing import Any

from flax import struct
from flax.core import meta
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from fm_jax import tree
from fm_jax.errors import UserError, choose

HOST, DEVICE = "pinned_host", "device"   # memory kinds

# From the slowest links to the fastest: `slice` runs over the network between slices or hosts (DCN), `tensor` between
# neighbours.
MESH_AXES = ("slice", "data", "stage", "fsdp", "expert", "context", "tensor")

# logical axis -> mesh axes, (of a parameter, of an activation). Parameters are cut over `fsdp`, `expert` and `context`
# along their width and over `tensor` along heads, mlp and vocabulary; activations over the batch, their length and the
# same `tensor` axes. Between sublayers (`between`) tokens are cut over `tensor` too, so that a block needs one
# reduce-scatter and one all-gather around attention and around the mlp, and norms are not computed `tensor` times
# (arXiv:2205.05198). `expert` is one more axis of the batch outside the experts, and `stage` outside the layers.
RULES = {
    "batch": ((), ("slice", "data", "stage", "fsdp", "expert")),
    "length": ((), ("context",)),
    "between": ((), ("context", "tensor")),
    "pieces": ((), ("context", "slice", "data", "stage", "fsdp", "expert")),   # of sequences, as rows
    "embed": (("fsdp", "expert", "context"), ()),
    "kv_heads": (("tensor",), ("tensor",)),
    "groups": ((), ()),
    "head": ((), ()),
    "mlp": (("tensor",), ("tensor",)),
    "experts": (("expert",), ()),
    "expert_embed": (("fsdp", "context"), ()),   # width of experts' weights, which `experts` cuts over `expert`
    "router": ((), ()),         # one score for each expert
    "vocab": (("tensor",), ("tensor",)),
    "position": ((), ()),       # rows of a position table
    "rank": ((), ()),           # of a low-rank adapter
    "block": ((), ()),          # scales of a quantised matrix, along its inputs
    "patch_rows": ((), ()), "patch_columns": ((), ()), "channels": ((), ()),   # of pixels
    "classes": ((), ()),        # few, and rarely a number that a mesh divides
    "taps": ((), ()),           # of a convolution, which reads `channels`
    "norm": ((), ()),           # scales and biases of norms: small, replicated
    # Cut in the shard_map of pipeline.py alone. By constraints, gradients went wrong silently on the CPU backend of jax
    # 0.10 and 0.11.
    "layers": (("stage",), ()),
    "first_layers": ((), ()),   # before the pipeline: `Architecture.stacks`
}


class Boxed(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with its logical axes. Lives only between `init` and `unbox`: the state is plain arrays."""

    value: Any
    axes: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self.replace(axes=(*self.axes[:index], params["name"], *self.axes[index:]))

    def remove_axis(self, index, params):
        return self.replace(axes=(*self.axes[:index], *self.axes[index + 1:]))


def is_boxed(x) -> bool:
    return isinstance(x, Boxed)


def unbox(boxed):
    """Returns (tree of arrays, matching tree of logical-axis tuples) of an initialised tree."""
    return (jax.tree.map(lambda b: b.value, boxed, is_leaf=is_boxed),
            jax.tree.map(lambda b: b.axes, boxed, is_leaf=is_boxed))


def is_axes(x) -> bool:
    """True for a leaf of a tree of logical-axis tuples."""
    return isinstance(x, tuple) and all(isinstance(a, str) for a in x)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place arrays on it. Hashable, so that modules can carry it."""

    mesh: Mesh | AbstractMesh

    def spec(self, axes, shape=None, *, activation=False, what="array") -> PartitionSpec:
        """Returns the PartitionSpec of an array with these logical axes (None: not sharded).

        Raises:
          UserError: an unknown logical axis; two logical axes on one mesh axis; a size that the
            mesh axes do not divide.
        """
        used, entries = {}, []
        for i, axis in enumerate(axes):
            mesh_axes = () if axis is None else self.mesh_axes(choose(axis, RULES, f"{what}: logical axis"), activation)
            for a in mesh_axes:
                if a in used:
                    raise UserError(f"{what}: logical axes {used[a]!r} and {axis!r} both land on mesh axis {a!r}; "
                                    "change one of them in sharding.RULES")
                used[a] = axis
            parts = math.prod(self.mesh.shape[a] for a in mesh_axes)
            if shape is not None and shape[i] % parts:
                sizes = " x ".join(f"mesh.{a}={self.mesh.shape[a]}" for a in mesh_axes)
                raise UserError(f"{what}: axis {axis!r} of size {shape[i]} is not divisible by {sizes}; "
                                f"change the mesh or make the size a multiple of {parts}")
            entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
        return PartitionSpec(*entries)

    def mesh_axes(self, axis: str, activation: bool) -> tuple[str, ...]:
        """Returns the mesh axes that cut a logical axis: of several devices, but for those of a shard_map around it."""
        return tuple(a for a in RULES[axis][int(activation)]
                     if self.mesh.shape[a] > 1 and a not in self.mesh.manual_axes)

    def sharding(self, axes, shape=None, *, activation=False, what="array") -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape, activation=activation, what=what))

    def parameters(self, params, axes):
        """Returns the tree of NamedShardings of parameters (arrays or shape structs) with logical `axes`."""
        return tree.map_named(lambda n, a, p: self.sharding(a, p.shape, what=n), axes, params, is_leaf=is_axes)

    def abstract(self, params, axes):
        """Returns the shape structs of parameters with logical `axes`, with their shardings."""
        return jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params,
                            self.parameters(params, axes))

    def batch(self, ndim: int) -> NamedSharding:
        """Returns the sharding of a batch array [batch, ...]."""
        return self.sharding(("batch",) + (None,) * (ndim - 1), activation=True)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def platform(self) -> str | None:
        """"cpu", "tpu", "cuda", or the kind of other devices, of the mesh; None for a mesh without devices.

        Not the platform of this machine: `plan` compiles for TPUs where there are none.
        """
        device = self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else self.mesh.abstract_device
        kind = None if device is None else device.device_kind
        return kind and ("tpu" if kind.startswith("TPU") else "cuda" if kind.startswith("NVIDIA") else kind)

    @property
    def batch_parts(self) -> int:
        """Into how many parts the batch axis of activations is cut."""
        return self.parts("batch")

    def parts(self, axis: str) -> int:
        """Returns into how many parts a logical axis of activations is cut."""
        return math.prod(self.mesh.shape[a] for a in self.mesh_axes(axis, activation=True))

    def constrain(self, x, *axes):
        """Returns the activation `x`, placed by its logical axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, activation=True, what="activation"))

    def on_each_device(self, f, inputs, outputs):
        """Returns f for whole arrays, run by each device on its parts of them: PartitionSpecs `inputs` and `outputs`.

        Inside a shard_map over some mesh axes, as a pipeline's, it takes the axes that are left.
        """
        return jax.shard_map(f, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False,
                             axis_names=set(self.mesh.axis_names) - set(self.mesh.manual_axes))

    def check_host_memory(self, what: str) -> None:
        """Raises UserError where `what` needs host memory that these devices cannot use. A plan's mesh is not asked."""
        if isinstance(self.mesh, Mesh):
            device = self.mesh.local_devices[0]
            kinds = sorted(m.kind for m in device.addressable_memories())
            if HOST not in kinds:
                raise UserError(f"{what} needs memory of kind {HOST!r}, and this platform ({device.platform}) has only "
                                f"{', '.join(kinds)}; take a policy that keeps everything on the device")


def make_mesh(sizes, devices=None) -> Mesh:
    """Returns the mesh with the given devices per axis; -1 takes all that remain.

    One process may use fewer devices than it has; several processes must use all of theirs.

    Raises:
      UserError: unknown axis, more than one -1, or a product that the devices do not give.
    """
    devices = list(devices if devices is not None else jax.devices())
    shape = _shape(sizes, len(devices), f"this machine ({devices[0].platform})")
    if math.prod(shape) < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh {_text(shape)} leaves some of the {len(devices)} devices unused, which several "
                        "processes cannot; change --config.mesh")
    return Mesh(arrange(shape, devices[: math.prod(shape)]), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(shape, devices) -> np.ndarray:
    """Returns the devices in a mesh's shape, neighbours in it near each other in their network, where they have one.

    Also of stand-ins, see `topology.Place`. An axis that no side of a TPU's slice fits is laid over parts of sides.

    Raises:
      UserError: several slices that the axis `slice` does not keep apart.
    """
    def within(devices, shape):
        for split in (False, True):
            try:
                return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
            except NotImplementedError:
                if split:
                    raise

    slices = sorted({slice_of(d) for d in devices}) if devices[0].platform == "tpu" else [0]
    if len(slices) == 1:
        return within(devices, shape)
    if len(slices) != shape[0]:
        raise UserError(f"mesh {_text(shape)}: its axis {MESH_AXES[0]!r} is for what a slow network joins, and the "
                        f"devices are of {len(slices)} slices; set --config.mesh.{MESH_AXES[0]}={len(slices)}")
    return np.concatenate([within([d for d in devices if slice_of(d) == s], (1, *shape[1:])) for s in slices])


def slice_of(device) -> int:
    """Returns the number of a TPU's slice; 0 where there is but one, whose devices do not say."""
    return getattr(device, "slice_index", 0)


def _shape(sizes, devices: int | None, where: str) -> tuple[int, ...]:
    """Returns the devices of each mesh axis, -1 resolved. devices: how many there are; None: as many as named."""
    for axis in sizes:
        choose(axis, MESH_AXES, "mesh axis")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh {_text(shape)}: sizes must be positive, with at most one -1 for all that remain")
    fixed = math.prod(n for n in shape if n != -1)
    if devices is None:
        devices = fixed
    if fixed > devices or (-1 in shape and devices % fixed):
        raise UserError(f"mesh {_text(shape)} needs {'a multiple of ' if -1 in shape else ''}{fixed} devices, {where} "
                        f"has {devices}; change --config.mesh")
    return tuple(devices // fixed if n == -1 else n for n in shape)


def _text(shape):
    return " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape) if n != 1) or "of one device"


def describe(mesh) -> str:
    """Returns a mesh in words: "data 2 x tensor 4", without the axes of one device."""
    return " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"


def abstract_mesh(sizes, devices: int | None = None) -> AbstractMesh:
    """Returns the mesh that `make_mesh` would, without devices: for planning on another machine.

    devices: what a -1 counts from; default as many as the other axes name.
    """
    return AbstractMesh(_shape(sizes, devices, "the plan"), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def bytes_per_device(abstract) -> int:
    """Returns the bytes that each device holds of a tree of shape structs with shardings. The host's do not count."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(abstract)
               if a.sharding.memory_kind != HOST)


def table(abstract) -> str:
    """Returns a printable table of shape structs with shardings: name, shape, dtype, spec, bytes per device; total."""
    rows = [("parameter", "shape", "dtype", "sharding", "bytes/device")]
    for n, a in tree.flatten(abstract).items():
        spec = ", ".join("-" if e is None else "+".join(e) if isinstance(e, tuple) else e for e in a.sharding.spec)
        rows.append((n, "x".join(map(str, a.shape)), str(a.dtype), f"({spec})", f"{bytes_per_device(a):,}"))
    rows.append(("total", "", "", "", f"{bytes_per_device(abstract):,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    return "\n".join("  ".join(c.rjust(w) if i == 4 else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths)))
                     for r in rows)

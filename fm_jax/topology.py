"""Accelerators that need not be here: what a chip can do, how chips are joined, their devices for a compiler. Layer 3.

    topology.parse("v5p:8x8x8")             # a slice of a TPU pod, by its shape in chips
    topology.parse("v5e:16x16", slices=2)   # two of them, joined by the data center's network
    topology.parse("h100:4x8")              # 4 hosts of 8 GPUs

Names, figures and the order of a mesh's devices need no accelerator and no compiler; `Topology.devices` needs the
compiler of the platform (libtpu, or JAX's CUDA plugin), which both run on a machine with CPUs alone.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np

from fm_jax import sharding
from fm_jax.errors import UserError, choose
from fm_jax.metrics import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device is: a chip, but half of one of tpu7x. Bytes, and seconds.

    link_bytes_per_s: one way. Of a TPU: one of its links, two to a dimension; of a GPU: all of its NVLink.
    network_bytes_per_s: one way, this device's share of its host's network, between slices or GPU hosts.
    efficiency: of its peak, what the busy part of a training step reaches: products below their best shape, and work
    that no product hides. Fitted to published figures by `tests/peers/plan_error.py`, 2026-11; of tpu7x, a100, h200
    and b200 there were none, and they have their neighbours'.
    clock_hz: what the compiler's cycles are of; its peak FLOP/s over the products of its matrix units a cycle.
    """

    kind: str                  # jax.Device.device_kind
    memory_bytes: int          # that a program can have
    memory_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    efficiency: float
    dims: int                  # of a slice's shape
    most_chips: int = 0        # in a slice
    clock_hz: float = 0.0
    devices_per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """bfloat16, dense."""
        return PEAK_FLOPS[self.kind]


_GIB = 2 ** 30
# Sources. TPU: the page of each generation at cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x; read 2026-11): a
# chip's bandwidth to its neighbours there counts both ways and all links, and is here divided by them (v5e 400 GB/s by
# 2 x 4, v5p 1,200 by 2 x 6, v6e 800 by 2 x 4, tpu7x 1,200 by 2 x 6 and by its two devices; v4: 2,400 Gb/s of 6 links,
# arXiv:2304.01433). Networks: v5p 50, v6e and tpu7x 100 Gb/s a chip; v5e 2 x 100 Gb/s a host of 8 chips; v4: 200 Gb/s a
# host of 4, jax-ml.github.io/scaling-book/tpus. Memory: what libtpu 0.0.42 says a program exceeded when it did. GPU:
# NVIDIA's data sheets (A100 80GB, H100 SXM, H200 SXM, HGX B200); networks as in its DGX systems, one port a GPU.
CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * _GIB), 1.228e12, 50e9, 6.25e9, 0.7, 3, 4096, 1.05e9),
    "v5e": Chip("TPU v5 lite", int(15.75 * _GIB), 819e9, 50e9, 3.125e9, 0.76, 2, 256, 1.5e9),
    "v5p": Chip("TPU v5", int(95.74 * _GIB), 2.765e12, 100e9, 6.25e9, 0.78, 3, 6144, 1.75e9),
    "v6e": Chip("TPU v6 lite", int(31.25 * _GIB), 1.638e12, 100e9, 12.5e9, 0.6, 2, 256, 1.75e9),
    "tpu7x": Chip("TPU7x", int(94.75 * _GIB), 3.69e12, 50e9, 6.25e9, 0.6, 3, 9216, 2.2e9, devices_per_chip=2),
    "a100": Chip("NVIDIA A100-SXM4-80GB", 84_987_740_160, 2.039e12, 300e9, 25e9, 0.45, 2),
    "h100": Chip("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12, 450e9, 50e9, 0.45, 2),
    "h200": Chip("NVIDIA H200", 150_754_820_096, 4.8e12, 450e9, 50e9, 0.45, 2),
    "b200": Chip("NVIDIA B200", 191_503_532_032, 8.0e12, 900e9, 50e9, 0.45, 2),
}
# In two dimensions a slice is one of these; in three one of these, or cubes of 4 chips a side, put together so that the
# sides do not fall. Source: the pages above.
SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Where there is no TPU, libtpu would look for one and its neighbours, ask a metadata server, and refuse a second
# process.
_LIBTPU_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                 "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Links(NamedTuple):
    """How a group of devices is joined: `inner` of them by fast links, such islands by a network to `outer` islands."""

    inner: int
    inner_bytes_per_s: float   # that one device receives, from all sides together
    longest: int               # side of the island; 4 where any two are one hop apart
    outer: int
    outer_bytes_per_s: float

    def seconds(self, kind: str, nbytes: float) -> float:
        """Returns how long a collective takes, by bandwidth alone; `nbytes` as in `hlo.Collective`.

        Gathers and reductions go round rings, first in an island and then between them, each device with its part; an
        exchange of all with all crosses the middle of the longest side. Source: jax-ml.github.io/scaling-book/sharding.
        """
        inner, outer = (self.inner - 1) / self.inner, (self.outer - 1) / self.outer
        if kind in ("all-to-all", "ragged-all-to-all"):
            return nbytes * (inner * self.longest / 4 / self.inner_bytes_per_s + outer / self.outer_bytes_per_s)
        if kind in ("collective-permute", "collective-broadcast"):
            return nbytes / (self.outer_bytes_per_s if self.outer > 1 else self.inner_bytes_per_s)
        once = nbytes * (inner / self.inner_bytes_per_s + outer / self.inner / self.outer_bytes_per_s)
        return 2 * once if kind == "all-reduce" else once


@dataclasses.dataclass(frozen=True)
class Place:
    """A device of a topology as `sharding.make_mesh` sees one: where it is, without a backend."""

    id: int
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int
    process_index: int
    device_kind: str
    platform: str


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of a pod (TPU), or hosts of GPUs; made by `parse`."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def gpu(self) -> bool:
        return self.chip.kind.startswith("NVIDIA")

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Whether the links of a dimension close to a ring.

        In 2-D, of 16 chips, the whole side of a pod; in 3-D where the slice is made of whole cubes of 4 a side, whose
        faces optical switches join. Source: jax-ml.github.io/scaling-book/tpus.
        """
        cubes = all(n % 4 == 0 for n in self.shape)
        return tuple(n == 16 if len(self.shape) == 2 else cubes for n in self.shape)

    def places(self) -> list[Place]:
        """Returns a stand-in of each device, in the order of `devices`."""
        sides = [range(n) for n in reversed((*self.shape, 1, 1)[:3])]
        each = itertools.product(range(self.slices), *sides, range(self.chip.devices_per_chip))
        if self.gpu:
            return [Place(i, (0, 0, 0), 0, 0, i // self.shape[1], self.chip.kind, "gpu")
                    for i in range(self.num_devices)]
        return [Place(i, (x, y, z), core, s, 0, self.chip.kind, "tpu") for i, (s, z, y, x, core) in enumerate(each)]

    def devices(self) -> list:
        """Returns devices to compile for, which no array can be put on.

        Raises:
          UserError: the compiler is not installed; it does not know this topology.
        """
        from jax.experimental import topologies

        if self.gpu:
            if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
                raise UserError(f"--topology {self.name}: compiling for GPUs needs JAX's CUDA plugin (pip install "
                                "jax-cuda13-plugin jax-cuda13-pjrt, of jax's version); or --analytic")
            make = dict(platform="cuda", topology_name="fm_jax", target_config=_gpu_target(self.chip),
                        topology=f"1x{self.shape[0]}x{self.shape[1]}")
        else:
            if not importlib.util.find_spec("libtpu"):
                raise UserError(f"--topology {self.name}: compiling for TPUs needs the package libtpu, also without a "
                                "TPU (pip install libtpu, of the version that jax[tpu] names); or --analytic")
            for name, value in _LIBTPU_ALONE.items():
                os.environ.setdefault(name, value)
            make = dict(platform="tpu", topology_name=self.name)
            if any(self.wrap):   # or a torus is compiled as a grid, gathers as sums: half as many bytes again
                make["wrap"] = [*self.wrap, False, False][:3]
            if self.chip.kind == "TPU v4":
                make["chip_config_name"] = "megacore"   # one device a chip, as jobs have it
            if self.slices > 1:
                make["num_slices"] = self.slices
            if math.prod(self.shape) == 1:
                make["chips_per_host_bounds"] = [1, 1, 1]
        try:
            return list(topologies.get_topology_desc(**make).devices)
        except Exception as e:   # whatever the plugin raises for a shape it does not know
            raise UserError(f"--topology {self.name}: the compiler does not take it ({str(e).splitlines()[0]})") from e

    def links(self, mesh: np.ndarray, axes: tuple[int, ...]) -> Links:
        """Returns how the devices of a mesh (an array of devices or Places) are joined along some of its axes."""
        group = mesh[tuple(slice(None) if i in axes else 0 for i in range(mesh.ndim))].ravel()
        island = {d.process_index if self.gpu else sharding.slice_of(d) for d in group}
        inner = len(group) // len(island)
        if self.gpu:
            return Links(inner, self.chip.link_bytes_per_s, 4, len(island), self.chip.network_bytes_per_s)
        spans = [len({d.coords[i] for d in group}) for i in range(len(self.shape))]
        ways = sum((2 if n == side and ring else 1) for n, side, ring in zip(spans, self.shape, self.wrap) if n > 1)
        # The two devices of a chip have a link of their own, faster than those between chips: counted as one of these.
        return Links(inner, self.chip.link_bytes_per_s * max(ways, 1), max(spans), len(island),
                     self.chip.network_bytes_per_s)

    def collective_seconds(self, collectives, mesh: np.ndarray) -> dict[str, float]:
        """Returns {"overlapped", "exposed"}: how long `hlo.Collective`s take that go on beside other work; the rest.

        mesh: devices as `sharding.make_mesh` lays them out.
        """
        seconds = {"overlapped": 0.0, "exposed": 0.0}
        for c in collectives:
            links = self.links(mesh, tuple(sharding.MESH_AXES.index(axis) for axis in c.axes))
            seconds["overlapped" if c.overlapped else "exposed"] += c.times * links.seconds(c.kind, c.nbytes)
        return seconds


@contextlib.contextmanager
def uncached():
    """A context in which nothing is written to JAX's compilation cache, nor read from it.

    It cannot read back what was compiled for `Topology.devices`.
    """
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()   # it looks at the setting once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def parse(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name: KIND:AxB or KIND:AxBxC in chips, or of GPUs KIND:HOSTSxGPUS.

    Raises:
      UserError: a kind or shape that there is not, with the nearest that there is.
    """
    kind, colon, text = str(name).partition(":")
    _explain_cloud_name(name)
    what = f"--topology {name}"
    chip = CHIPS[choose(kind, CHIPS, f"{what}: chip")]
    gpu, form = chip.kind.startswith("NVIDIA"), "x".join("ABC"[: chip.dims])
    form = "HOSTSxGPUS" if gpu else form
    if not re.fullmatch(r"\d+(x\d+)*", text) or text.count("x") + 1 != chip.dims:
        example = "4x8" if gpu else "16x16" if chip.dims == 2 else "4x4x8"
        raise UserError(f"{what}: expected {kind}:{form}, such as {kind}:{example}")
    shape = tuple(map(int, text.split("x")))
    if 0 in shape:
        raise UserError(f"{what}: every side must be at least 1")
    if slices < 1 or (gpu and slices > 1):
        raise UserError(f"--slices {slices}: " + (
            "GPUs have hosts, the first number of --topology, and no slices" if gpu else "must be at least 1"))
    if gpu:
        if shape[1] > 8:
            raise UserError(f"{what}: a host has at most 8 GPUs here; {kind}:{math.ceil(math.prod(shape) / 8)}x8 has "
                            "as many or more")
    elif chip.dims == 2:
        if text not in SHAPES_2D:
            raise UserError(f"{what}: no such slice; {_nearest(kind, shape, SHAPES_2D)}")
    elif text not in SHAPES_3D:
        whole = all(n % 4 == 0 for n in shape)
        if not whole or list(shape) != sorted(shape) or math.prod(shape) > chip.most_chips:
            raise UserError(f"{what}: no such slice: one is {', '.join(SHAPES_3D)}, or of multiples of 4 that do not "
                            f"fall, to {chip.most_chips:,} chips; {_nearest(kind, shape, _cubes(chip))}")
    return Topology(f"{kind}:{text}", chip, shape, slices)


def _cubes(chip):
    """Returns the 3-D shapes of a chip up to a side of 32."""
    sides = range(4, 33, 4)
    return [*SHAPES_3D, *("x".join(map(str, s)) for s in itertools.combinations_with_replacement(sides, 3)
                          if math.prod(s) <= chip.most_chips)]


def _nearest(kind, shape, known):
    """Returns words for the known shape of most nearly these sides; of two, the more compact."""
    sides = lambda text: sorted(int(n) for n in text.split("x"))
    far = lambda text: round(sum(abs(math.log(a / b)) for a, b in zip(sides(text), sorted(shape))), 6)
    return f"did you mean {kind}:{min(known, key=lambda text: (far(text), sides(text)[-1]))}?"


def _explain_cloud_name(name):
    """Raises UserError for names that clouds use and this program and its compiler do not."""
    other = {"ironwood": "tpu7x", "trillium": "v6e", "v5litepod": "v5e", "v5lite": "v5e"}
    kind, dash, count = str(name).partition(":")[0].lower().partition("-")
    kind = other.get(kind, kind)
    if kind not in CHIPS or (not dash and kind == str(name).partition(":")[0].lower()):
        return
    if not dash or not count.isdigit():
        raise UserError(f"--topology {name}: it is called {kind}, with a shape: {kind}:"
                        f"{'16x16' if CHIPS[kind].dims == 2 else '4x4x8'}")
    cores = 2 if kind in ("v4", "v5p") else 1   # these names count cores
    chips = max(1, int(count) // cores)
    known = SHAPES_2D if CHIPS[kind].dims == 2 else _cubes(CHIPS[kind])
    fits = [s for s in known if math.prod(map(int, s.split("x"))) == chips]
    counted = f"its {count} counts cores, two a chip" if cores == 2 else f"{count} chips"
    near = " or ".join(f"{kind}:{s}" for s in fits) or difflib.get_close_matches(str(chips), known, 1, 0)[0]
    raise UserError(f"--topology {name}: give the shape, {near} ({counted})")


def _gpu_target(chip) -> str:
    """Returns the GPU as the compiler wants it described, a text proto of `GpuTargetConfigProto`.

    Source: NVIDIA's tuning guides (Ampere, Hopper, Blackwell), tables of technical specifications.
    """
    cores, capability, cache, clock, shared = {
        "NVIDIA A100-SXM4-80GB": (108, (8, 0), 40 << 20, 1.41, 166_912),
        "NVIDIA H100 80GB HBM3": (132, (9, 0), 50 << 20, 1.98, 232_448),
        "NVIDIA H200": (132, (9, 0), 50 << 20, 1.98, 232_448),
        "NVIDIA B200": (148, (10, 0), 126 << 20, 1.965, 232_448)}[chip.kind]
    special = " feature_extension: ACCELERATED_FEATURES" if capability[0] >= 9 else ""
    return f"""platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}" gpu_device_info {{
name: "{chip.kind}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]}{special} }}
core_count: {cores} clock_rate_ghz: {clock} fpus_per_core: 128
memory_bandwidth: {int(chip.memory_bytes_per_s)} device_memory_size: {chip.memory_bytes} l2_cache_size: {cache}
shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared + 1024}
threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
registers_per_core_limit: 65536 registers_per_block_limit: 65536
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 }}"""

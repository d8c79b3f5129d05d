"""Accelerators by name: what is refused and what is meant, how meshes lie on their links, how long collectives take."""

import numpy as np
import pytest

from fm_jax import sharding, topology
from fm_jax.errors import UserError


def mesh(top, **sizes):
    return sharding.arrange(sharding.abstract_mesh(sizes).axis_sizes, top.places())


def axis(name):
    return sharding.MESH_AXES.index(name)


@pytest.mark.parametrize("name, slices, message", [
    ("v5q:8x8x8", 1, "chip: unknown 'v5q'; did you mean 'v5p'?"),
    ("v5p:8x8", 1, "expected v5p:AxBxC, such as v5p:4x4x8"),
    ("v5e:16", 1, "expected v5e:AxB, such as v5e:16x16"),
    ("v5e:32x16", 1, "no such slice; did you mean v5e:16x16?"),
    ("v6e:8x4", 1, "no such slice; did you mean v6e:4x8?"),
    ("v5p:8x8x9", 1, "did you mean v5p:8x8x8?"),
    ("v5p:8x8x4", 1, "did you mean v5p:4x8x8?"),
    ("v4:16x16x32", 1, "to 4,096 chips; did you mean v4:16x16x16?"),
    ("v5p:0x4x4", 1, "every side must be at least 1"),
    ("v5e-256", 1, "give the shape, v5e:16x16 (256 chips)"),
    ("v5litepod-16", 1, "give the shape, v5e:4x4 (16 chips)"),
    ("v5p-128", 1, "give the shape, v5p:4x4x4 (its 128 counts cores, two a chip)"),
    ("ironwood", 1, "it is called tpu7x, with a shape: tpu7x:4x4x8"),
    ("h100:4", 1, "expected h100:HOSTSxGPUS, such as h100:4x8"),
    ("h100:4x16", 1, "at most 8 GPUs here; h100:8x8 has as many"),
    ("h100:4x8", 2, "GPUs have hosts"),
    ("v5e:4x4", 0, "--slices 0: must be at least 1"),
])
def test_a_wrong_name_says_what_is_meant(name, slices, message):
    with pytest.raises(UserError) as e:
        topology.parse(name, slices)
    assert message in str(e.value)


def test_counts_of_chips_and_devices():
    def count(*name):
        top = topology.parse(*name)
        return top.num_chips, top.num_devices, len(top.places())

    assert count("v5e:16x16") == (256, 256, 256)
    assert count("v5e:16x16", 2) == (512, 512, 512)
    assert count("tpu7x:4x4x4") == (64, 128, 128)   # two devices a chip
    assert count("h100:4x8") == (32, 32, 32)


@pytest.mark.parametrize("name, wrap", [
    ("v5e:16x16", (True, True)), ("v5e:8x16", (False, True)), ("v6e:8x8", (False, False)),
    ("v5p:4x4x4", (True,) * 3), ("v5p:8x16x16", (True,) * 3), ("v4:2x4x4", (False,) * 3)])
def test_which_links_close_to_rings(name, wrap):
    assert topology.parse(name).wrap == wrap


def test_neighbours_in_the_mesh_are_neighbours_in_the_torus():
    """The axis nearest to the chips, tensor, lies along one side of the slice; two sides are left to fsdp."""
    top = topology.parse("v5p:8x8x8")
    laid = mesh(top, fsdp=64, tensor=8).reshape(64, 8)
    for row in laid[:3]:
        steps = np.diff([d.coords for d in row], axis=0) % 8
        assert (np.sort(steps, axis=1) == [0, 0, 1]).all() or (np.sort(steps, axis=1) == [0, 0, 7]).all()
    rate = lambda name: top.links(mesh(top, fsdp=64, tensor=8), (axis(name),))
    one_link = top.chip.link_bytes_per_s
    assert rate("tensor") == topology.Links(8, 2 * one_link, 8, 1, top.chip.network_bytes_per_s)
    assert rate("fsdp")[:3] == (64, 4 * one_link, 8)
    assert top.links(mesh(top, fsdp=512), (axis("fsdp"),))[:2] == (512, 6 * one_link)
    line = topology.parse("v5e:4x4")   # no ring: the last chip has one link
    assert line.links(mesh(line, fsdp=4, tensor=4), (axis("tensor"),)).inner_bytes_per_s == line.chip.link_bytes_per_s


def test_slices_and_hosts_are_kept_apart():
    top = topology.parse("v5e:4x4", slices=2)
    laid = mesh(top, slice=2, fsdp=16)
    assert [{d.slice_index for d in part.flat} for part in laid] == [{0}, {1}]
    between, within = (top.links(laid, (axis(name),)) for name in ("slice", "fsdp"))
    assert (between.inner, between.outer, within.inner, within.outer) == (1, 2, 16, 1)
    with pytest.raises(UserError, match="the devices are of 2 slices; set --config.mesh.slice=2"):
        mesh(top, fsdp=32)
    gpus = topology.parse("h100:4x8")
    assert gpus.links(mesh(gpus, fsdp=32), (axis("fsdp"),))[0::3] == (8, 4)
    assert gpus.links(mesh(gpus, data=4, fsdp=8), (axis("fsdp"),))[0::3] == (8, 1)
    assert gpus.links(mesh(gpus, data=4, fsdp=8), (axis("data"),))[0::3] == (1, 4)


def test_seconds_against_a_ring_stepped_through():
    """n devices pass pieces on in both directions of a ring until each has all: the same time."""
    n, nbytes, link = 8, 800.0, 10.0
    links = topology.Links(n, 2 * link, n, 1, 1.0)
    # In a step each device sends a piece of nbytes / n, half of it to either side.
    steps = n - 1
    gather = steps * (nbytes / n / 2) / link
    assert links.seconds("all-gather", nbytes) == links.seconds("reduce-scatter", nbytes) == pytest.approx(gather)
    assert links.seconds("all-reduce", nbytes) == pytest.approx(2 * gather)
    # Between 2 islands of 8 each device passes its eighth on, and then it goes round the ring.
    two = topology.Links(n, 2 * link, n, 2, 5.0)
    assert two.seconds("all-gather", nbytes) == pytest.approx(gather + nbytes / n / 2 / 5.0)
    assert topology.Links(1, link, 1, 1, 5.0).seconds("all-reduce", nbytes) == 0


@pytest.mark.parametrize("name, package", [("v5e:2x2", "libtpu"), ("h100:1x8", "jax-cuda13-plugin")])
def test_a_missing_compiler_is_named(name, package, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{package}.*--analytic"):
        topology.parse(name).devices()


def test_every_chip_is_whole():
    for name, chip in topology.CHIPS.items():
        figures = chip.peak_flops, chip.memory_bytes, chip.memory_bytes_per_s, chip.link_bytes_per_s
        assert all(f > 0 for f in figures) and chip.network_bytes_per_s < chip.link_bytes_per_s, name
        if chip.clock_hz:   # a cycle does a whole number of products of 128 x 128 units: 2 FLOPs each
            units = chip.peak_flops / chip.clock_hz / (2 * 128 * 128)
            assert units == pytest.approx(round(units), rel=0.02), name

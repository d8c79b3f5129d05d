"""TPU meshes without TPUs, for tests that compile ahead of time: they need the package libtpu, which is optional."""

import importlib.util

import jax
import pytest

from fm_jax import sharding, topology

needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                        reason="needs the TPU compiler: pip install libtpu")


def tpu_mesh(name: str, **sizes) -> jax.sharding.Mesh:
    """Returns a mesh of the topology, as in "v5e:2x2"; sizes as `config.mesh`, default fsdp over all devices."""
    devices = topology.parse(name).devices()
    return sharding.make_mesh(sizes or {"fsdp": len(devices)}, devices)

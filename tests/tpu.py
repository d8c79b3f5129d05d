"""TPU meshes without TPUs, for tests that compile ahead of time: they need the package libtpu, which is optional."""

import contextlib
import importlib.util
import os

import jax
from jax.experimental import topologies
import numpy as np
import pytest

from fm_jax import sharding

needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                        reason="needs the TPU compiler: pip install libtpu")


def tpu_mesh(topology: str, **sizes) -> jax.sharding.Mesh:
    """Returns a mesh of the topology, as in "v5e:2x2"; sizes as `config.mesh`, default fsdp over all devices."""
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)   # libtpu would look for a TPU and its neighbours; two workers may load it
    how = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **how).devices
    return sharding.make_mesh(sizes or {"fsdp": len(devices)}, np.array(devices))


@contextlib.contextmanager
def uncached():
    """The persistent cache cannot read back what was compiled for a topology without devices."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)

"""The compiler options of a train step: which a setting means, and that each compiler knows all of its own."""

import jax
import jax.numpy as jnp
import pytest

from fm_jax import sharding, xla_flags
from fm_jax.errors import UserError
from fm_jax.topology import uncached
from tpu import needs_tpu_compiler, tpu_mesh


def options(setting, platform="cpu"):
    class Layout:
        pass
    Layout.platform = platform
    return xla_flags.compiler_options(setting, Layout)


def test_a_setting_means_the_chips_options_and_more():
    for platform in ("cpu", "tpu", "cuda"):
        assert options("auto", platform) == xla_flags.FLAGS[platform]
        assert options("none", platform) is None
        assert options("auto, --xla_a=1,xla_b=x", platform) == {**xla_flags.FLAGS[platform], "xla_a": "1", "xla_b": "x"}
    assert options("none,xla_a=true,xla_b=False") == {"xla_a": True, "xla_b": False}
    assert options("auto", None) is options("auto", "rocm") is None   # a mesh without devices, a chip without a set


@pytest.mark.parametrize("setting, text", [("", "expected auto or none"), ("xla_a=1", "expected auto or none"),
                                           ("auto,", "'' is not of the form"), ("auto,xla_a", "'xla_a' is not of"),
                                           ("auto,a=1", "'a=1' is not of the form xla_NAME=VALUE")])
def test_other_settings_are_refused(setting, text):
    with pytest.raises(UserError, match=text):
        options(setting)


def compile_with(options, mesh=None):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=mesh and sharding.Layout(mesh).replicated)
    with uncached():
        return jax.jit(lambda x: x + 1, compiler_options=options).lower(shape).compile()


def test_the_compiler_knows_the_options_of_cpu_and_gpu():
    """The names of both are in every XLA that is not a TPU's: a CPU's compiler takes a GPU's and ignores them."""
    for platform in ("cpu", "cuda"):
        compile_with(xla_flags.FLAGS[platform])
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with({"xla_gpu_enable_everything": "true"})


@needs_tpu_compiler
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_knows_its_options(topology):
    mesh = tpu_mesh(topology)
    compile_with(xla_flags.FLAGS["tpu"], mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with({"xla_tpu_enable_everything": "true"}, mesh)

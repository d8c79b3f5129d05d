"""Where arrays live: strict resolution of logical axes, meshes, the printed table, and states that start in shards."""

import math
import pathlib
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.sharding import Boxed, Layout
from fm_jax.step import Program

TINY = f"{pathlib.Path(__file__).resolve().parent.parent / 'configs' / 'causal_lm.py'}:tiny"


def layout(data=1, fsdp=1, tensor=1):
    return Layout(sharding.make_mesh(dict(data=data, fsdp=fsdp, tensor=tensor)))


def abstract_layout(**sizes):
    return Layout(sharding.abstract_mesh(sizes))


# --- resolution -----------------------------------------------------------------------------------------------------

def test_specs_follow_the_rules():
    big = abstract_layout(data=2, fsdp=4, tensor=8)
    assert big.spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")
    wq = big.spec(("layers", "embed", "kv_heads", "groups", "head"))
    assert wq == PartitionSpec(None, "fsdp", "tensor", None, None)
    assert big.spec(("batch", "length", "embed"), activation=True) == PartitionSpec(("data", "fsdp"), None, None)
    assert big.spec((None, "mlp")) == PartitionSpec(None, "tensor")
    assert big.batch(3).spec == PartitionSpec(("data", "fsdp"), None, None) and big.batch_parts == 8
    assert big.replicated.spec == PartitionSpec()
    # Axes of size 1 are left out, so that the same program on one device has no constraint to compile.
    assert abstract_layout(fsdp=4).spec(("vocab", "embed")) == PartitionSpec(None, "fsdp")


def test_a_misspelt_axis_names_parameter_and_nearest():
    params = {"layers": {"mlp": {"w_up": jax.ShapeDtypeStruct((8, 8), "float32")}}}
    with pytest.raises(UserError, match="layers.mlp.w_up: logical axis: unknown 'embd'; did you mean 'embed'"):
        abstract_layout().parameters(params, {"layers": {"mlp": {"w_up": ("embd", "mlp")}}})


def test_two_axes_on_one_mesh_axis_name_parameter_and_both():
    params = {"moe": {"w": jax.ShapeDtypeStruct((8, 8), "float32")}}
    axes = {"moe": {"w": ("mlp", "kv_heads")}}
    with pytest.raises(UserError, match="moe.w: .* 'mlp' and 'kv_heads' both land on mesh axis 'tensor'.*RULES"):
        abstract_layout(tensor=2).parameters(params, axes)


def test_an_indivisible_size_names_parameter_mesh_and_remedy():
    params = {"embed": {"tokens": jax.ShapeDtypeStruct((510, 64), "float32")}}
    axes = {"embed": {"tokens": ("vocab", "embed")}}
    message = "embed.tokens: axis 'vocab' of size 510 is not divisible by mesh.tensor=4.*multiple of 4"
    with pytest.raises(UserError, match=message):
        abstract_layout(tensor=4).parameters(params, axes)
    assert abstract_layout(fsdp=4).parameters(params, axes)["embed"]["tokens"].spec == PartitionSpec(None, "fsdp")


def test_constrain_places_and_checks_an_activation():
    here = layout(data=2, tensor=4)
    x = jax.jit(lambda x: here.constrain(x, "batch", "length", "mlp"))(jnp.zeros((4, 3, 8)))
    assert x.sharding.shard_shape(x.shape) == (2, 3, 2)
    with pytest.raises(UserError, match="activation: axis 'mlp' of size 6"):
        jax.eval_shape(lambda x: here.constrain(x, "batch", "length", "mlp"), jnp.zeros((4, 3, 6)))


def test_boxed_axes_follow_stacking_and_vmap():
    box = Boxed(jnp.zeros((3, 4)), ("embed", "mlp"))
    assert box.add_axis(0, {"name": "layers"}).axes == ("layers", "embed", "mlp")
    assert box.add_axis(1, {"name": "layers"}).axes == ("embed", "layers", "mlp")
    back = box.add_axis(1, {"name": "layers"}).remove_axis(1, {"name": "layers"})
    assert back.axes == box.axes and back.value is box.value
    params, axes = sharding.unbox({"a": {"w": box}, "b": Boxed(jnp.zeros(2), ("norm",))})
    assert params["a"]["w"] is box.value and axes == {"a": {"w": ("embed", "mlp")}, "b": ("norm",)}

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", lambda key: Boxed(jnp.ones((3, 4)), ("embed", "mlp"))), None

    stacked = nn.vmap(Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=5,
                      metadata_params={"name": "layers"})   # Flax's own transforms keep the box, through AxisMetadata
    (_, axes) = sharding.unbox(stacked().init(jax.random.key(0), jnp.zeros((5, 2, 3)))["params"])
    assert axes == {"w": ("layers", "embed", "mlp")}


# --- meshes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [sharding.make_mesh, lambda sizes: sharding.abstract_mesh(sizes, 8)])
def test_mesh_shapes(make):
    sizes = lambda wanted: {axis: n for axis, n in make(wanted).shape.items() if n > 1}
    assert sizes(dict(data=-1)) == dict(data=8)
    assert sizes(dict(fsdp=-1, tensor=2)) == dict(fsdp=4, tensor=2)
    assert sizes(dict(data=2, fsdp=2, tensor=2)) == dict(data=2, fsdp=2, tensor=2)
    assert sizes(dict(tensor=4)) == dict(tensor=4)   # fewer than there are
    assert sharding.describe(make(dict(fsdp=4, data=2))) == "data 2 x fsdp 4"
    assert sharding.describe(make({})) == "one device"
    with pytest.raises(UserError, match="mesh axis: unknown 'tensr'; did you mean 'tensor'"):
        make(dict(tensr=2))
    with pytest.raises(UserError, match="needs 16 devices, .* has 8"):
        make(dict(data=4, tensor=4))
    with pytest.raises(UserError, match="a multiple of 3 devices, .* has 8"):
        make(dict(data=-1, tensor=3))
    with pytest.raises(UserError, match="at most one -1"):
        make(dict(data=-1, fsdp=-1))
    with pytest.raises(UserError, match="must be positive"):
        make(dict(data=0))


def test_abstract_mesh_plans_for_more_than_there_is():
    assert sharding.abstract_mesh(dict(data=16, fsdp=64, tensor=8)).size == 8192
    assert sharding.describe(sharding.abstract_mesh(dict(data=-1, fsdp=64), 1024)) == "data 16 x fsdp 64"


# --- what a plan prints ---------------------------------------------------------------------------------------------

def test_table_shows_shards_and_bytes():
    here = abstract_layout(data=2, fsdp=4)
    params = {"tokens": jax.ShapeDtypeStruct((64, 8), "float32"), "scale": jax.ShapeDtypeStruct((8,), "bfloat16")}
    placed = here.parameters(params, {"tokens": ("vocab", "embed"), "scale": ("norm",)})
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, placed)
    head, *rows, total = [re.split(r"\s{2,}", line.strip()) for line in sharding.table(placed).splitlines()]
    assert head == ["parameter", "shape", "dtype", "sharding", "bytes/device"]
    assert ["tokens", "64x8", "float32", "(-, fsdp)", str(64 * 8 * 4 // 4)] in rows
    assert ["scale", "8", "bfloat16", "(-)", "16"] in rows and len(rows) == 2
    assert total == ["total", str(512 + 16)] and sharding.bytes_per_device(placed) == 512 + 16


# --- states in shards -----------------------------------------------------------------------------------------------

def program(on, **changes):
    c = config_lib.resolve(config_lib.from_file(TINY, {"optimizer.ema_decay": 0.9, **changes}))
    return Program(c, objectives.load(c, None, on), on)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_no_large_array_of_the_state_is_replicated(name):
    """On 8 fsdp devices each holds an eighth of every parameter, its average and every moment of its shape."""
    p = program(abstract_layout(fsdp=8), **{"optimizer.name": name})
    sizes = {n: a.shape for n, a in tree.flatten(p.abstract.params).items()}
    axes = tree.flatten(p.axes, is_leaf=sharding.is_axes)
    large = {n for n in sizes if "embed" in axes[n]}
    assert sum(math.prod(sizes[n]) for n in large) > 0.95 * sum(map(math.prod, sizes.values()))
    moments = 0
    for n, a in tree.flatten(p.abstract).items():
        owner = next((k for k in large if n.endswith("." + k) and sizes[k] == a.shape), None)
        if owner:
            moments += n.startswith("opt_state")
            assert math.prod(a.sharding.shard_shape(a.shape)) * 8 == math.prod(a.shape), n
    # AdamW has two moments of a parameter's shape; Muon two of what it leaves to AdamW and one of the rest. The factors
    # of Adafactor's second moment, on merged heads, have other shapes.
    matrices = {n for n in large if "layers" in axes[n]}
    assert moments == {"adamw": 2 * len(large), "lion": len(large), "muon": 2 * len(large) - len(matrices)}.get(
        name, moments) and moments >= len(large)


def test_initialisation_never_holds_a_whole_parameter():
    """The compiled initialisation of 8 fsdp devices has no array of a parameter's whole shape, and gives eighths."""
    p = program(layout(fsdp=8))
    level = {"xla_backend_optimization_level": 1}   # as in `init`: the same partitioned program, compiled sooner
    text = jax.jit(p._init, out_shardings=p.shardings).lower().compile(level).as_text()
    axes = tree.flatten(p.axes, is_leaf=sharding.is_axes)
    written = lambda shape: f"[{','.join(map(str, shape))}]"
    for n, a in tree.flatten(p.abstract.params).items():
        if "embed" in axes[n]:
            assert written(a.shape) not in text, n
            assert written(a.sharding.shard_shape(a.shape)) in text, n
    state = p.init()
    held = np.array([sum(math.prod(a.addressable_shards[i].data.shape) * a.dtype.itemsize
                         for a in jax.tree.leaves(state)) for i in range(8)])
    assert len(set(held)) == 1 and held[0] == sharding.bytes_per_device(p.abstract) < tree.nbytes(state) / 7

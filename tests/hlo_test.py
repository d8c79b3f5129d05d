"""What is read from the text of a compiled program: against a program of known collectives, and texts by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from fm_jax import hlo, sharding

MESH = dict(data=2, fsdp=2, tensor=2)   # ids 0 to 7: tensor changes fastest


def found(text, mesh=MESH):
    return [(c.kind, c.axes, c.nbytes, c.times, c.overlapped) for c in hlo.collectives(text, mesh)]


def test_a_program_of_known_collectives():
    """One of each kind, over other axes, five times in a loop, on eight CPU devices: kind, axes, bytes and number."""
    mesh = sharding.make_mesh(MESH)

    def body(x, _):   # x: float32 [8, 16] on each device
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)                        # [16, 16]
        summed = jax.lax.psum(jnp.sin(gathered), ("data", "tensor"))                # [16, 16]
        scattered = jax.lax.psum_scatter(jnp.cos(summed), "tensor", tiled=True)     # of [16, 16]
        swapped = jax.lax.all_to_all(jnp.sin(scattered), "data", 0, 1, tiled=True)  # [4, 32]
        moved = jax.lax.ppermute(swapped.reshape(8, 16), "fsdp", [(0, 1), (1, 0)])  # [8, 16]
        return moved, None

    step = jax.jit(jax.shard_map(lambda x: jax.lax.scan(body, x, None, length=5)[0], mesh=mesh, in_specs=P(),
                                 out_specs=P(), check_vma=False))
    text = step.lower(jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile().as_text()
    sums = {}
    for c in hlo.collectives(text, mesh.shape):
        sums[c.kind, c.axes] = sums.get((c.kind, c.axes), 0) + c.nbytes * c.times
    whole, part = 5 * 16 * 16 * 4, 5 * 8 * 16 * 4
    assert sums == {("all-gather", ("fsdp",)): whole, ("all-reduce", ("data", "tensor")): whole,
                    ("reduce-scatter", ("tensor",)): whole, ("all-to-all", ("data",)): part,
                    ("collective-permute", ("fsdp",)): part}


@pytest.mark.parametrize("groups, axes", [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
    ("replica_groups={}", ("data", "fsdp", "tensor")),
    ("replica_groups=[4,2]<=[8]", ("tensor",)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
    ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'tensor','data'}", ("data", "tensor")),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", ("fsdp",)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", ("tensor",)),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, use_global_device_ids=true", ("data",)),
    ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
])
def test_groups_are_named_by_mesh_axes(groups, axes):
    """Each way of writing groups, in full or as a reshaped and transposed count, of the mesh 2 x 2 x 2."""
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add\n}}"
    assert found(text) == [("all-reduce", axes, 32, 1, False)]


@pytest.mark.parametrize("op, expected", [
    # operand and result; what is gathered is the result
    ("(f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
     ("all-gather", ("tensor",), 32, 1, True)),
    ("((f32[4], bf16[2,2]{1,0:T(8,128)}), (f32[8], bf16[4,2])) all-gather-start(%p, %q), replica_groups=[4,2]<=[8]",
     ("all-gather", ("tensor",), 32 + 16, 1, True)),
    ("f32[8]{0:T(256)S(1)} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add",
     ("all-reduce", ("tensor",), 32, 1, True)),
    ("(bf16[8], bf16[8], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}",
     ("collective-permute", ("data",), 16, 1, True)),
    ("((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add",
     ("reduce-scatter", ("tensor",), 32, 1, True)),
    ("((f32[8]{0}), f32[8]{0}) all-to-all-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
     ("all-to-all", ("tensor",), 32, 1, True)),
    # what is reduced is as large as the group's results
    ("bf16[4]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add",
     ("reduce-scatter", ("tensor",), 16, 1, False)),
    ("f8e4m3fn[8]{0} all-gather(%p), replica_groups=[4,2]<=[8], async_collective_name=\"x\"",
     ("all-gather", ("tensor",), 8, 1, True)),
])
def test_bytes_and_overlap_of_each_form(op, expected):
    assert found(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %r = {op}\n}}") == [expected]


LOOP = """
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8] fusion(%x), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"100"}
  %g = f32[8] all-gather(%f), replica_groups=[4,2]<=[8], backend_config={"estimated_cycles":"7"}
}
%inner (x: f32[8]) -> f32[8] {
  ROOT %s = f32[8] sine(%x)
}
%condition (t: (s32[], f32[8])) -> pred[] {
  %c = s32[] constant(12)
  ROOT %l = pred[] compare(%i, %c), direction=LT
}
%wrapped (x: f32[8]) -> f32[4] {
  ROOT %rs = f32[4] reduce-scatter(%x), replica_groups=[4,2]<=[8], to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %a = (f32[8], f32[4]) async-start(%p), calls=%wrapped
  %h = f32[8] fusion(%x), calls=%inner, backend_config={"estimated_cycles":"5"}
  %unknown = f32[8] fusion(%x), calls=%inner, backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_loops_multiply_and_wrapped_operations_overlap():
    """A loop's trips come from its condition's constant; the collective's own cycles are not the chip's work."""
    assert found(LOOP) == [("all-gather", ("tensor",), 32, 12, False), ("reduce-scatter", ("tensor",), 32, 1, True)]
    assert hlo.cycles(LOOP) == 12 * 100 + 5
    known = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.cycles(known) == 3 * 100 + 5


def test_sums_that_a_tpu_writes_otherwise():
    """A scattered sum is a fusion of the whole sum with its slice; one between slices is a send over the network."""
    text = """
%all-reduce-scatter.clone.1 (input: f32[8]) -> f32[2] {
  %all-reduce.5 = f32[8]{0:T(256)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = f32[2] dynamic-slice(%all-reduce.5, %i), dynamic_slice_sizes={2}
}
ENTRY %main (p: f32[8]) -> f32[2] {
  %f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %send = (f32[1,2]{1,0:T(8,128)}, u32[], token[]) send(%f, %t), is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %other = (f32[1,2], u32[], token[]) send(%f, %t), is_host_transfer=true
}
"""
    assert found(text, dict(slice=2, fsdp=4)) == [("reduce-scatter", ("fsdp",), 32, 1, False),
                                                  ("all-reduce", ("slice",), 8, 1, True)]


def test_fused_asynchronous_collectives_count_once():
    """A TPU repeats the operation in the start, each step and the end of its fusion."""
    part = lambda name, target: (f"%{name} (x: f32[8]) -> f32[8] {{\n  %a = f32[8] all-gather(%x), "
                                 f"replica_groups=[4,2]<=[8]\n  %c = () custom-call(%a), "
                                 f'custom_call_target="{target}"\n}}\n')
    text = (part("async_collective_fusion.1", "AsyncCollectiveStart") + part("async_collective_fusion.2", "Step")
            + part("done.3", "AsyncCollectiveDone") + "ENTRY %main (p: f32[8]) -> f32[8] {\n"
            + "".join(f"  %f{i} = f32[8] fusion(%p), calls=%{n}\n" for i, n in enumerate(
                ("async_collective_fusion.1", "async_collective_fusion.2", "done.3"))) + "}\n")
    assert found(text) == [("all-gather", ("tensor",), 32, 1, True)]

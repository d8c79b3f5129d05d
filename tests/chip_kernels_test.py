"""The chips' own attention kernels: the numbers they give, what they refuse, and which of them "auto" takes.

Splash attention runs here in Pallas' interpreter. cuDNN cannot run here: JAX's own einsum form takes the same
arguments, so what is tested is which mask, scale and heads they say. Inputs, masks and tolerances: kernels_test.py.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
from kernels_test import CASES, CLOSE, case, equations, normals, trace
import numpy as np
import pytest

from fm_jax import chip_kernels, config as config_lib, kernels, objectives, sharding
from fm_jax.errors import UserError
from fm_jax.kernels import Mask
from fm_jax.step import Program
from fm_jax.topology import uncached
from tpu import needs_tpu_compiler, tpu_mesh

interpreted = functools.partial(chip_kernels.splash, interpret=True)
# 640 = 5 blocks of 128, 256 = one.
SPLASH_CASES = {
    "causal": dict(T=640),
    "bidirectional": dict(T=256, causal=False),
    "window": dict(T=640, window=150, G=2),
    "bidirectional_window": dict(T=640, causal=False, window=40),
    "packed": dict(T=640, packed=True, G=3, K=2),
    "packed_window_softcap": dict(T=640, packed=True, window=33, softcap=0.8),
    "cross": dict(T=256, S=128, causal=False),
}


def own_segments(mask):
    """Returns the mask with one array for both sides' segments, as self-attention has it."""
    return mask._replace(k_segments_BS=mask.q_segments_BT)


def with_gradients(f, *args):
    """Returns (output, gradients of its weighted sum) of f(*args), jitted."""
    def run(args):
        out, pull = jax.vjp(f, *args)
        return out, pull(jnp.asarray(normals(9, out.shape)[0], out.dtype))
    return jax.jit(run)(args)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("window", "packed_window_softcap", "cross") else pytest.mark.slow)
    for name in SPLASH_CASES])
def test_splash_equals_the_reference(name):
    q, k, v, mask, how = case(B=1 if name != "packed" else 2, H=8, **SPLASH_CASES[name])
    mask = own_segments(mask)
    assert not chip_kernels.refusals("splash", q, k, mask, softcap=how["softcap"], platform="tpu", context=1)
    got = with_gradients(lambda *a: interpreted(*a, mask, **how), q, k, v)
    want = with_gradients(lambda *a: kernels.attention_reference(*a, mask, **how), q, k, v)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("f", [interpreted, functools.partial(chip_kernels.cudnn, implementation="xla")],
                         ids=["splash", "cudnn"])
def test_kernels_on_a_mesh_equal_one_device(f):
    """Rows over data and fsdp, kv heads over tensor: each device computes what it has, and nothing is gathered."""
    layout = sharding.Layout(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    q, k, v, mask, how = case(B=4, T=128, K=2, G=2, H=8, packed=True)
    mask, how = own_segments(mask), dict(scale=how["scale"])
    place = lambda a, *axes: jax.device_put(a, layout.sharding(axes, a.shape, activation=True))
    args = (place(q, "batch", "length", "kv_heads", "groups", "head"),
            *(place(a, "batch", "length", "kv_heads", "head") for a in (k, v)))
    run = jax.jit(lambda q, k, v: f(q, k, v, mask, layout=layout, **how))
    got = run(*args)
    assert got.sharding.is_equivalent_to(args[0].sharding, got.ndim)
    assert "all-gather" not in run.lower(*args).compile().as_text()
    np.testing.assert_allclose(got, kernels.attention_reference(q, k, v, mask, **how), **CLOSE)


@pytest.mark.parametrize("name", [n for n in CASES if not CASES[n].keys() & {"softcap", "farthest"}])
def test_cudnn_arguments_mean_our_masks(name):
    q, k, v, mask, how = case(**CASES[name])
    how.pop("softcap")
    got = with_gradients(lambda *a: chip_kernels.cudnn(*a, mask, implementation="xla", **how), q, k, v)
    want = with_gradients(lambda *a: kernels.attention_reference(*a, mask, **how), q, k, v)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_cudnn_gets_no_mask_array_where_its_options_say_all(monkeypatch):
    """An array of T x T would cost its memory and the blocks that causality skips."""
    given = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **options: given.append(options) or q)
    q, k, v, _, _ = case(T=16)
    for mask in (Mask(), Mask(window=5), Mask(causal=False), own_segments(case(T=16, packed=True)[3])):
        chip_kernels.cudnn(q, k, v, mask, scale=0.5)
    plain, window, all_, packed = given
    assert [g["mask"] is None for g in given] == [True, True, True, False]
    assert (plain["is_causal"], window["local_window_size"], all_["is_causal"]) == (True, (4, 0), False)
    assert packed["is_causal"] and {g["scale"] for g in given} == {0.5}


# --- what is refused, and what "auto" takes -------------------------------------------------------------------------


def refused(kernel, mask=Mask(), *, T=256, S=256, H=64, dtype=jnp.bfloat16, softcap=0.0, platform="", context=1,
            biased=False):
    shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)
    return "; ".join(chip_kernels.refusals(
        kernel, shape(2, T, 2, 1, H), shape(2, S, 2, H), mask, softcap=softcap, context=context, biased=biased,
        platform=platform or {"splash": "tpu", "cudnn": "cuda"}[kernel]))


@pytest.mark.parametrize("kernel, how, text", [
    ("splash", dict(platform="cpu"), "runs on tpu, and the mesh has devices of cpu"),
    ("cudnn", dict(platform="tpu"), "runs on cuda, and the mesh has devices of tpu"),
    ("splash", dict(dtype=jnp.float16), "takes bfloat16 and float32, not model.dtype=float16"),
    ("cudnn", dict(dtype=jnp.float32), "takes bfloat16 and float16, not model.dtype=float32"),
    ("splash", dict(H=36), "model.head_dim=36 is no multiple of 8"),
    ("splash", dict(context=2), "mesh.context=2"),
    ("splash", dict(biased=True), "no bias by distance, as model.position='relative'"),
    ("splash", dict(T=200, S=200), "multiples of 128, not 200 and 200"),
    ("splash", dict(mask=Mask(k_prefix_BS=np.ones((2, 256), bool))), "no mask with a prefix"),
    ("splash", dict(mask=Mask(q_index_BT=np.zeros((2, 256)))), "index arrays"),
    ("splash", dict(mask=Mask(False, k_first_BS=np.zeros((2, 256)), k_last_BS=np.zeros((2, 256)))), "trees"),
    ("splash", dict(mask=Mask(False, 0, np.ones((2, 256)), np.ones((2, 256)))), "without a key"),
    ("cudnn", dict(softcap=3.0), "no model.attention_softcap, which is 3.0"),
    ("cudnn", dict(T=255, S=255, mask=Mask(True, 0, np.ones((2, 255)), np.ones((2, 255)))), "must be even"),
    ("cudnn", {}, "cuDNN is not detected"),
])
def test_what_a_kernel_cannot_serve_is_refused(kernel, how, text):
    assert text in refused(kernel, **how)
    if how:   # that, and nothing else
        assert "; " not in refused(kernel, **how)


def test_a_kernel_asked_for_by_name_is_never_replaced():
    q, k, v, mask, how = case(T=130, prefix=True)
    with pytest.raises(UserError, match="model.attention_kernel='splash'.*runs on tpu.*multiples of 128, not 130.*"
                                        "prefix.*Set it to 'auto'"):
        kernels.attention(q, k, v, mask, kernel="splash", layout=sharding.Layout(sharding.make_mesh({"data": 8})),
                          **how)


@pytest.mark.parametrize("name", ["packed_window", "prefix_window_packed", "bidirectional_window", "softcap"])
def test_auto_on_a_tpu_computes_the_same(name, monkeypatch):
    """With every mask: splash where it can, and elsewhere what any device runs."""
    monkeypatch.setattr(sharding.Layout, "platform", "tpu")
    monkeypatch.setattr(chip_kernels, "splash", interpreted)
    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    q, k, v, mask, how = case(B=1, H=8, **{**CASES[name], "T": 256})
    mask = own_segments(mask)
    attend = lambda *a: kernels.attention(*a, mask, layout=layout, **how)
    took_splash = any(e.primitive.name == "pallas_call" for e in trace(attend, q, k, v))
    assert took_splash == (mask.k_prefix_BS is None)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), kernels.attention_reference(q, k, v, mask, **how), **CLOSE)


@pytest.mark.parametrize("platform, kind, capability, able", [
    ("tpu", "TPU v6 lite", None, False), ("tpu", "TPU7x", None, True), ("cuda", "NVIDIA A100-SXM4-80GB", "8.0", False),
    ("cuda", "NVIDIA L4", "8.9", True), ("cuda", "NVIDIA H100 80GB HBM3", "9.0", True), ("cpu", "cpu", None, True)])
def test_fp8_is_for_chips_that_have_it(platform, kind, capability, able):
    device = types.SimpleNamespace(device_kind=kind, **{"compute_capability": capability} if capability else {})
    layout = types.SimpleNamespace(platform=platform, mesh=types.SimpleNamespace(devices=np.array([device])))
    chip_kernels.check_matmul_dtype("int8", layout)
    if able:
        chip_kernels.check_matmul_dtype("fp8", layout)
    else:
        with pytest.raises(UserError, match=f"matmul_dtype='fp8': {kind} has no 8-bit floating point"):
            chip_kernels.check_matmul_dtype("fp8", layout)


def program(mesh=None, **changes):
    config = config_lib.defaults()
    config.model.update(vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, max_seq_len=256)
    config.batch_size, config.seq_len = 4, 256
    config = config_lib.resolve(config_lib.override(config, {"mesh.data": 1, **changes}))
    layout = sharding.Layout(mesh or sharding.make_mesh(config.mesh))
    return Program(config, objectives.load(config, None, layout), layout)


def test_the_model_takes_the_kernel_of_its_chip(monkeypatch):
    """The kernel is chosen in the whole train step, in both passes, from the mesh and not from this machine."""
    counted = lambda p: sum(e.primitive.name == "pallas_call" for e in equations(
        p.train_step.trace(p.abstract, p.batch_spec, 0).jaxpr.jaxpr))
    assert counted(program()) == 0
    monkeypatch.setattr(sharding.Layout, "platform", "tpu")
    for changes, calls in (({}, 3), ({"model.attention_kernel": "splash"}, 3),
                           ({"model.attention_kernel": "chunked"}, 0), ({"seq_len": 200}, 0)):
        assert counted(program(**changes)) == calls, changes   # forward, gradient of q, gradients of k and v


def test_a_train_step_with_another_chips_kernel_is_refused():
    with pytest.raises(UserError, match="'splash' cannot serve this attention: it runs on tpu.*devices of cpu"):
        p = program(**{"model.attention_kernel": "splash"})
        p.train_step.trace(p.abstract, p.batch_spec, 0)


# --- compiled for the chips -----------------------------------------------------------------------------------------

@needs_tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_train_step_compiles_with_splash_for_each_tpu(topology):
    """The whole step, forward and backward, over data and tensor: three kernels a layer, and no score matrix."""
    mesh = tpu_mesh(topology, data=2, tensor=2)
    p = program(mesh, **{"model.dtype": "bfloat16", "model.remat": "full", "seq_len": 512, "model.max_seq_len": 512})
    with uncached():
        text = p.train_step.lower(p.abstract, p.batch_spec, 0).compile().as_text()
    assert {name for name in ("fwd", "dq", "dkv") if f"splash_mha_{name}" in text} == {"fwd", "dq", "dkv"}
    assert not re.search(r"\[[\d,]*512,512\]", text)

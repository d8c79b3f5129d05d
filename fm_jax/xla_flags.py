"""The options that XLA compiles a train step with, for each kind of chip. Layer 1.

They go to `jax.jit` and not into the environment: `plan` compiles with what the pod will run, on any machine, and two
programs of a process can differ. The compiler refuses a name that it does not know. `config.xla_flags` is "auto": the
options below; "none"; or either with more behind it, as in "auto,xla_tpu_scoped_vmem_limit_kib=65536".
"""

import jax

from fm_jax.errors import UserError

FLAGS = {
    "cpu": {
        # The default schedule runs what it can at once; in program order a step needs a fifth less memory.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    },
    # Measured on what libtpu 0.0.42 compiles ahead of time: four mlp layers of width 2,048 under fsdp over 16 devices,
    # forward and backward, 2026-11. No TPU has run it.
    "tpu": {
        # No products cut into steps that each wait for a neighbour's piece: with the compiler's own threshold v5p
        # (2x2x4) had 660 of them and 35.6 M estimated cycles, without 9.2 M; v6e (4x4) 17.4 M and 5.9 M.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
        # All-gathers of the next weights run beside the products, some fused into them: on v5p none of 16 did, then
        # all, 8.6 M cycles. On v5e they do without. multiple_steps: one gather may last over several products.
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        # The same for all-reduces, as which gradients over one flat axis are summed: none of 4, then all.
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    },
    # From NVIDIA's guide to XLA for language models; nothing of it measured here.
    "cuda": {
        # Starts collectives early and waits for them late, which is what overlap is on a GPU.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # Moves a layer's gather of weights into the step of the loop before it, and its scatter of gradients into the
        # step after it. Else a scan over layers is a wall to the scheduler. XLA has renamed these two.
        **({f"xla_gpu_pipeline_{kind}": "COLLECTIVE_PIPELINING_MODE_ON" for kind in ("all_gather", "reduce_scatter")}
           if jax.__version_info__ >= (0, 11) else
           {f"xla_gpu_enable_pipelined_{kind}": True for kind in ("all_gather", "reduce_scatter")}),
        # Two layers a step of the loop, so that what is gathered for the next layer needs no copy.
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}


def compiler_options(xla_flags: str, layout) -> dict | None:
    """Returns the `compiler_options` of `jax.jit` for the setting `config.xla_flags` on the layout's mesh; None: none.

    Raises:
      UserError: a setting of another form.
    """
    first, *more = (part.strip() for part in xla_flags.split(","))
    if first not in ("auto", "none"):
        raise UserError(f"config.xla_flags={xla_flags!r}: expected auto or none, then NAME=VALUE after commas, as in "
                        "auto,xla_tpu_scoped_vmem_limit_kib=65536")
    options = dict(FLAGS.get(layout.platform, {})) if first == "auto" else {}
    for part in more:
        name, equals, value = part.removeprefix("--").partition("=")
        if not (name.startswith("xla_") and equals and value):
            raise UserError(f"config.xla_flags={xla_flags!r}: {part!r} is not of the form xla_NAME=VALUE")
        options[name] = {"true": True, "false": False}.get(value.lower(), value)   # XLA reads a text otherwise
    return options or None

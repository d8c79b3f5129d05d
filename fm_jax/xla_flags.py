"""The options that XLA compiles a train step with, for each kind of chip. Layer 1.

They go to `jax.jit` and not into the environment: `plan` compiles with what the pod will run, on any machine, and two
programs of a process can differ. The compiler refuses a name that it does not know. `config.xla_flags` is "auto": the
options below; "none"; or either with more behind it, as in "auto,xla_tpu_scoped_vmem_limit_kib=65536".
"""

from fm_jax.errors import UserError

FLAGS = {
    "cpu": {
        # The default schedule runs what it can at once; in program order a step needs a fifth less memory.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    },
    "tpu": {
    },
    "cuda": {
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
        options[name] = value
    return options or None

"""Measures training: tokens/s, step time, MFU and peak memory, after warm-up, waiting for the device.

    python -m fm_jax.benchmark --config configs/causal_lm.py:small
    python -m fm_jax.benchmark --config configs/causal_lm.py:bench_gpt2 --steps 20 --json

Runs the train step of the config on random tokens, so that no data is needed; of several processes, as `train` does.
Layer 5.
"""

import json
from pathlib import Path
import resource
import sys
import time

from absl import flags

from fm_jax import config as config_lib
from fm_jax import distributed


def benchmark(config, *, steps: int = 10, warmup_steps: int = 3, seed: int = 0) -> dict:
    """Returns the measured figures: rates and times are of the median step of `steps`.

    peak_memory_bytes: the largest device's peak where the device counts it, else the resident peak of the process
    during the measured steps (which on a CPU is everything: libraries, program and arrays). A device's peak, and
    that of a process elsewhere than on Linux, is since the start, initialisation and compilation included.
    """
    import jax
    import numpy as np

    from fm_jax import metrics, objectives, sharding, tree
    from fm_jax.step import Program

    config = config_lib.resolve(config, examples_per_epoch=1_000_000)
    layout = sharding.Layout(sharding.make_mesh(config.mesh))
    objective = objectives.load(config, None, layout)
    begin = time.perf_counter()
    program = Program(config, objective, layout)
    program.load_compiled(None)
    state = jax.block_until_ready(program.init())
    init_s = time.perf_counter() - begin

    rng = np.random.default_rng(seed)
    batch = program.place(objective.random_batch(len(program.rows), rng))
    times, losses = [], []
    for step in range(warmup_steps + steps):
        if step == warmup_steps:
            reset = _reset_resident_peak()
        begin = time.perf_counter()
        state, values = program.train_step(state, batch, step)
        jax.block_until_ready((state, values))
        times.append(time.perf_counter() - begin)
        losses.append(float(values["loss"][0] / values["loss"][1]))
    devices = layout.mesh.devices
    tokens = config.batch_size * objective.tokens_per_example
    step_time_s = float(np.median(times[warmup_steps:]))
    flops = config.batch_size * objective.flops_per_example
    counted = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in layout.mesh.local_devices]
    on_device = None not in counted
    return {
        "name": config.name, "device": devices.flat[0].device_kind, "devices": devices.size,
        "mesh": sharding.describe(layout.mesh), "parameters": tree.count(program.abstract.params),
        "batch_size": config.batch_size, "tokens_per_step": tokens,
        "tokens_per_s": tokens / step_time_s, "step_time_s": step_time_s,
        "step_times_s": times[warmup_steps:], "flops_per_s": flops / step_time_s,
        "mfu": metrics.mfu(tokens / step_time_s, flops / tokens, devices.size, metrics.peak_flops(devices.flat[0])),
        "peak_memory_bytes": max(counted) if on_device else _resident_peak_bytes(reset),
        "peak_memory_of": "largest device" if on_device else "process in these steps" if reset else "process",
        "init_s": init_s, "first_step_s": times[0], "losses": losses,
    }


def _reset_resident_peak() -> bool:
    """Returns whether the kernel has set the process's resident peak back to what is resident now. See proc(5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:   # not Linux, or not allowed: the peak is then since the start, and the result says so
        return False
    return True


def _resident_peak_bytes(was_reset: bool) -> int:
    if was_reset:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _flags(fv):
    config_lib.define_config(fv)
    flags.DEFINE_integer("steps", 10, "measured steps", flag_values=fv, lower_bound=1)
    flags.DEFINE_integer("warmup_steps", 3, "steps before them, compilation in the first", flag_values=fv,
                         lower_bound=1)
    flags.DEFINE_boolean("json", False, "print one line of JSON instead of the table", flag_values=fv)
    distributed.define_flags(fv)


def main(args):
    with distributed.processes(args):
        _show(benchmark(args.config, steps=args.steps, warmup_steps=args.warmup_steps), args.json)


def _show(r, as_json):
    from fm_jax import metrics

    if as_json:
        print(json.dumps(r))
        return
    times = sorted(r["step_times_s"])
    print(f"{r['name']}: {r['parameters']:,} parameters on {r['devices']} {r['device']} ({r['mesh']}), "
          f"batch {r['batch_size']}")
    print(f"  tokens/s      {metrics.quantity(r['tokens_per_s'])}")
    print(f"  step time     {r['step_time_s']:.4f} s, median of {len(times)} ({times[0]:.4f} to {times[-1]:.4f})")
    print(f"  model FLOP/s  {metrics.quantity(r['flops_per_s'])}  (causal attention at half, no recomputation)")
    print(f"  MFU           {100 * r['mfu']:.1f}%" if r["mfu"] is not None else
          f"  MFU           unknown: no peak FLOP/s for {r['device']!r} in fm_jax/metrics.py")
    print(f"  peak memory   {r['peak_memory_bytes'] / 2**30:.2f} GiB ({r['peak_memory_of']})")
    print(f"  start         {r['init_s']:.1f} s to initialise, {r['first_step_s']:.1f} s for the first step")


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""Shows what a config needs before anything runs: parameters, FLOPs, bytes per device, shardings; on a pod, its time.

    python -m fm_jax.plan --sizes
    python -m fm_jax.plan --config configs/causal_lm.py:8b --config.mesh.fsdp=8 --config.mesh.tensor=4
    python -m fm_jax.plan --config configs/causal_lm.py:8b --topology v5p:8x8x8 --mesh fsdp=512
    python -m fm_jax.plan --config configs/causal_lm.py:70b --topology v5e:16x16 --search --price_per_chip_hour 1.2

The mesh may be larger than this machine: no array is made, no device asked for. With --topology the real train step is
compiled for those chips, by their own compiler on a CPU; --analytic estimates without it. Layer 5.
"""

import json
import os
from pathlib import Path
import re

from absl import flags

from fm_jax import config as config_lib
from fm_jax.architecture import SIZES, Architecture
from fm_jax.errors import UserError, choose

GIB = 2 ** 30


def sizes_table() -> str:
    """Returns the named sizes with their shapes, parameters and training FLOPs per token, as text."""
    head = f"{'size':<6}{'parameters':>17}{'layers':>8}{'width':>7}{'heads':>7}{'kv':>5}{'mlp':>7}{'vocabulary':>12}" \
           f"{'FLOPs/token at 2,048':>22}"
    rows = []
    for name, fields in SIZES.items():
        a = Architecture(**fields)
        rows.append(f"{name:<6}{a.param_count():>17,}{a.num_layers:>8}{a.embed_dim:>7}{a.num_heads:>7}"
                    f"{a.num_kv_heads:>5}{a.mlp_dim:>7}{a.vocab_size:>12,}{a.flops_per_token(2048):>22.3g}")
    return "\n".join([head, *rows])


def plan(config, *, devices: int | None = None) -> dict:
    """Returns {"parameters", "flops_per_token", "flops_per_step", "bytes_per_device": {...}, "table", "mesh"}.

    devices: what a -1 of the mesh counts from; default as many as the mesh names.

    Raises:
      UserError: what could not train either; a length in epochs of data that is not here.
    """
    from fm_jax import forecast, sharding, tree

    config = forecast.resolved(config)
    program = forecast.program_on(config, sharding.abstract_mesh(config.mesh, devices))
    state, objective = program.abstract, program.objective
    parts = {"parameters": state.params, "frozen": state.frozen, "optimizer": state.opt_state, "ema": state.ema,
             "gradients": state.params, "batch": program.batch_spec}
    return {
        "name": config.name, "mesh": sharding.describe(program.layout.mesh), "parameters": tree.count(state.params),
        "steps": config.steps, "tokens_per_step": config.batch_size * objective.tokens_per_example,
        "flops_per_token": objective.flops_per_example / objective.tokens_per_example,
        "flops_per_step": config.batch_size * objective.flops_per_example,
        "bytes_per_device": {name: sharding.bytes_per_device(t) for name, t in parts.items() if t is not None},
        "table": sharding.table(state.params),
    }


def describe(r, price=None) -> str:
    """Returns the result of `forecast.on_topology` as text. price: of one chip and hour, in any money."""
    from fm_jax.metrics import quantity

    gib = lambda n: f"{n / GIB:>10.2f} GiB"
    room = "fits" if r["fits"] else "DOES NOT FIT"
    by = f", {abs(r['free_bytes']) / GIB:.2f} GiB {'free' if r['fits'] else 'too much'}" if r["free_bytes"] else ""
    lines = [f"{r['topology']}" + (f" x {r['slices']} slices" if r["slices"] > 1 else "") +
             f": {r['chips']:,} chips, mesh {r['mesh']}, remat {r['remat']}, "
             f"{r['accumulation_steps']} microbatch{'es' if r['accumulation_steps'] > 1 else ''}",
             f"  {room}{by} of {r['memory_bytes'] / GIB:.2f} GiB a device    ({r['source']}"
             + (f", {r['compile_s']:.0f} s" if "compile_s" in r else ", not compiled") + ")"]
    if "peak_bytes" in r:
        lines.append(f"    {'peak':<22}{gib(r['peak_bytes'])}")
    lines += [f"    {name:<22}{gib(size)}" for name, size in r["bytes_per_device"].items() if size]
    if r["source"].endswith("refuses"):
        lines.append("  no time without a program: more devices, more microbatches, or --search")
    lines += [f"  FLOPs per step        {quantity(r['flops_per_step'])}  (forward and backward, causal attention at "
              "half, no recomputation)",
              f"    done                {quantity(r['executed_flops_per_step'])}  (with recomputation"
              + (f"; {quantity(r['jaxpr_flops_per_step'])} counted in the traced program)"
                 if "jaxpr_flops_per_step" in r else ")")]
    if not r.get("chip_attention", True):
        own = "splash" if "TPU" in r["chip"] else "cudnn"
        lines.append("  attention             XLA's, not the chip's own kernel: "
                     f"--config.model.attention_kernel={own} says why")
    if not r["seconds"]:
        return "\n".join(lines)
    lines.append("  collectives of a step, bytes of the whole array on a device")
    for c in r["collectives"]:
        share = c["overlapped_bytes"] / c["bytes"] if c["bytes"] else 0
        lines.append(f"    {c['kind']:<20}{c['axes']:<16}{quantity(c['bytes']):>8}B   {share:4.0%} beside other work")
    s = r["seconds"]
    lines += [f"  estimated step        {s['step']:.3f} s = max(" +
              ", ".join(f"{k} {s[k]:.3f}" for k in ("compute", "memory", "overlapped") if k in s)
              + f") + exposed {s['exposed']:.3f}",
              f"    MFU {r['mfu']:.1%}, {quantity(r['tokens_per_day'])} tokens a day, "
              f"{quantity(r['tokens_per_day'] / 86_400 / r['chips'])} tokens/s a chip"]
    if r["source"] == "compiler":
        lines.append(f"    (the analytic model alone: {r['analytic']['step_s']:.3f} s, "
                     f"{r['analytic']['free_bytes'] / GIB:.2f} GiB free)")
    if price is not None:
        days = r["run_chip_hours"] / r["chips"] / 24
        lines.append(f"    whole run: {r['steps']:,} steps in {days:.1f} days, {r['run_chip_hours']:,.0f} chip hours, "
                     f"{r['run_chip_hours'] * price:,.0f} at {price:g} a chip and hour")
    return "\n".join(lines)


def ranking(results, price=None, most: int = 20) -> str:
    """Returns the first `most` results of `forecast.search` as a table."""
    from fm_jax.metrics import quantity

    head = f"{'mesh':<34}{'remat':<7}{'micro':>6}{'free GiB':>10}{'step s':>9}{'MFU':>7}{'tokens/day':>12}"
    head += f"{'run costs':>14}" if price is not None else ""
    rows = []
    for r in results[:most]:
        step, mfu, tokens = ((f"{r['seconds']['step']:.3f}", f"{r['mfu']:.1%}", quantity(r["tokens_per_day"]))
                             if r["seconds"] else ("-",) * 3)
        cost = f"{r['run_chip_hours'] * price:,.0f}" if price is not None and r["run_chip_hours"] else "-"
        rows.append(f"{r['mesh']:<34}{r['remat']:<7}{r['accumulation_steps']:>6}{r['free_bytes'] / GIB:>10.2f}{step:>9}"
                    f"{mfu:>7}{tokens:>12}" + (f"{cost:>14}" if price is not None else "")
                    + f"  {r['source']}" + ("" if r["fits"] else ", does not fit"))
    more = [f"and {len(results) - most} more (--output has them)"] if len(results) > most else []
    return "\n".join([head, *rows, *more])


def _decode_text(arch, topology, length):
    from fm_jax import roofline
    from fm_jax.metrics import quantity

    d = roofline.decode(arch, topology, length)
    if d is None:
        return f"  decode: the weights and one sequence of {length:,} tokens do not fit into {topology.name}"
    return (f"  decode, sequences of {length:,} tokens (analytic: memory bandwidth; weights, cache in {arch.dtype})\n"
            f"    {d.groups} group{'s' if d.groups > 1 else ''} of {d.group_devices} device"
            f"{'s' if d.group_devices > 1 else ''}: weights {d.weight_bytes_per_device / GIB:.2f} GiB a device, "
            f"{d.sequences:,} sequences of {d.cache_bytes_per_sequence / GIB:.3f} GiB\n"
            f"    a group at most {quantity(d.tokens_per_s)} tokens/s with all of them, "
            f"{quantity(d.tokens_per_s_of_one)} tokens/s with one")


def _flags(fv):
    config_lib.define_config(fv, required=False)
    flags.DEFINE_boolean("sizes", False, "print the table of named sizes", flag_values=fv)
    flags.DEFINE_string("topology", None, "chips to plan for: v5p:8x8x8, v5e:16x16 (v4, v5e, v5p, v6e, tpu7x), h100:4x8"
                        " (hosts x GPUs; a100, h100, h200, b200)", flag_values=fv)
    flags.DEFINE_integer("slices", 1, "slices of that topology, joined by mesh axis `slice`", flag_values=fv)
    flags.DEFINE_string("mesh", None, "the whole mesh, fsdp=64,tensor=8; axes not named are 1. Default: config.mesh",
                        flag_values=fv)
    flags.DEFINE_boolean("analytic", False, "estimate by shapes alone, without compiling", flag_values=fv)
    flags.DEFINE_boolean("search", False, "rank meshes and remat policies; axes in --mesh, other than its -1, stay",
                         flag_values=fv)
    flags.DEFINE_string("compiled_step", None, "also write the compiled train step to this file, for "
                        "--config.compiled_step of the run; needs its data or tokenizer", flag_values=fv)
    flags.DEFINE_integer("compile_best", 3, "of a search, compile so many", flag_values=fv, lower_bound=0)
    flags.DEFINE_float("price_per_chip_hour", None, "for the cost of the run, in any money", flag_values=fv,
                       lower_bound=0)
    flags.DEFINE_integer("decode_length", None, "tokens of a sequence in the decoding estimate; default: "
                         "config.model.max_seq_len", flag_values=fv, lower_bound=1)
    flags.DEFINE_string("output", None, "also write the figures to this JSON file", flag_values=fv)
    flags.DEFINE_integer("devices", None, "devices that a -1 of config.mesh counts from; default: as many as the mesh "
                         "names", flag_values=fv, lower_bound=1)


def main(args):
    if args.sizes:
        print(sizes_table())
        return
    if args.config is None:
        raise UserError("--config is required (or --sizes); see --help")
    named = _parse_mesh(args.mesh) if args.mesh is not None else {}
    if named:
        for axis in named:
            choose(axis, args.config.mesh, "--mesh: axis")
        config_lib.override(args.config, {f"mesh.{axis}": named.get(axis, 1) for axis in args.config.mesh})
    if args.topology is not None:
        _main_on_topology(args, named)
        return
    for flag in ("slices", "analytic", "search", "price_per_chip_hour", "decode_length", "output",
                 "compiled_step"):
        if args[flag].present:
            raise UserError(f"--{flag} needs --topology")
    from fm_jax.metrics import quantity

    p = plan(args.config, devices=args.devices)
    print(p["table"])
    print()
    print(f"{p['name']} on a mesh of " + p["mesh"])
    print(f"  parameters       {p['parameters']:,}")
    print(f"  FLOPs per token  {quantity(p['flops_per_token'])}  (forward and backward, causal attention at half, no "
          "recomputation)")
    print(f"  FLOPs per step   {quantity(p['flops_per_step'])}  ({p['tokens_per_step']:,} tokens)")
    print(f"  whole run        {quantity(p['flops_per_step'] * p['steps'])} FLOPs, {p['steps']:,} steps, "
          f"{quantity(p['steps'] * p['tokens_per_step'])} tokens")
    print("  bytes per device, activations not counted")
    for name, size in p["bytes_per_device"].items():
        print(f"    {name:<14} {size:>18,}")
    print(f"    {'total':<14} {sum(p['bytes_per_device'].values()):>18,}")


def _main_on_topology(args, named):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")   # where its own arrays live, whatever it compiles for
    from fm_jax import forecast, objectives
    from fm_jax import topology as topology_lib
    from fm_jax.data import batches

    if args.devices is not None:
        raise UserError("--devices: --topology says how many there are")
    if args.compiled_step is not None and (args.search or args.analytic):
        raise UserError(f"--compiled_step={args.compiled_step}: is of one layout that is compiled, so without "
                        f"--{'search' if args.search else 'analytic'}")
    if args.config.model.cross_attention:
        raise UserError("--topology: the analytic model is of one stack, and model.cross_attention has an encoder beside "
                        "it; plan its memory with --devices")
    topology = topology_lib.parse(args.topology, args.slices)
    config, price = args.config, args.price_per_chip_hour
    if topology.slices > 1 and config.mesh.slice == 1:
        config.mesh.slice = topology.slices
    if config.mesh.slice != topology.slices and not topology.gpu:
        raise UserError(f"mesh axis slice={config.mesh.slice} with --slices {args.slices}: they must be the same")
    if args.search:
        fixed = [axis for axis, n in named.items() if n != -1]
        results = forecast.search(config, topology, fixed=fixed, progress=lambda line: print(line, flush=True),
                                  compile_best=0 if args.analytic else args.compile_best)
        print(ranking(results, price))
        print()
    else:
        tokenizer = None
        if args.compiled_step:
            tokenizer, config = batches.load_tokenizer(config), objectives.settled(config, batches.values(config))
        results = [forecast.on_topology(config, topology, compile=not args.analytic, tokenizer=tokenizer,
                                        save_to=args.compiled_step)]
    print(f"{config.name}: {Architecture(**config.model.to_dict()).param_count():,} parameters, "
          f"{results[0]['tokens_per_step']:,} tokens a step")
    print(describe(results[0], price))
    if args.compiled_step is not None and results[0]["seconds"]:
        print(f"  compiled step         {args.compiled_step}, for --config.compiled_step on these chips")
    print(_decode_text(Architecture(**config.model.to_dict()), topology,
                       args.decode_length or config.model.max_seq_len))
    if topology.gpu:
        print("  JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more")
    if args.output:
        Path(args.output).write_text(json.dumps(results if args.search else results[0], indent=1) + "\n")


def _parse_mesh(text):
    """Returns {axis: devices} of "fsdp=64,tensor=8"."""
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise UserError(f"--mesh {text!r}: expected axis=devices, such as fsdp=64,tensor=8")
    return {pair[1]: int(pair[2]) for pair in pairs}


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

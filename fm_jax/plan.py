"""Shows what a config needs before anything runs: parameters, FLOPs, bytes per device, shardings; on a pod, its time.

    python -m fm_jax.plan --sizes
    python -m fm_jax.plan --config configs/causal_lm.py:8b --config.mesh.fsdp=8 --config.mesh.tensor=4
    python -m fm_jax.plan --config configs/causal_lm.py:8b --topology v5p:8x8x8 --mesh fsdp=512
    python -m fm_jax.plan --config configs/causal_lm.py:70b --topology v5e:16x16 --search --price_per_chip_hour 1.2

The mesh may be larger than this machine: no array is made, no device asked for. With --topology the real train step is
compiled for those chips, by their own compiler on a CPU; --analytic estimates without it. Layer 5.
"""

import copy
import json
import math
import os
from pathlib import Path
import re
import time

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
    from fm_jax import sharding, tree

    config = _resolved(config)
    program = _program(config, sharding.abstract_mesh(config.mesh, devices))
    state, objective = program.abstract, program.objective
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema, "gradients": state.params,
             "batch": program.batch_spec}
    return {
        "name": config.name, "mesh": sharding.describe(program.layout.mesh), "parameters": tree.count(state.params),
        "steps": config.steps, "tokens_per_step": config.batch_size * objective.tokens_per_example,
        "flops_per_token": objective.flops_per_example / objective.tokens_per_example,
        "flops_per_step": config.batch_size * objective.flops_per_example,
        "bytes_per_device": {name: sharding.bytes_per_device(t) for name, t in parts.items() if t is not None},
        "table": sharding.table(state.params),
    }


def _resolved(config):
    """Returns the config with its lengths in steps. Raises UserError where they need data that is not here."""
    from fm_jax.data import batches

    config = config_lib.resolve(config)
    lengths = {"steps": config.steps, "optimizer.warmup_steps": config.optimizer.warmup_steps,
               "optimizer.decay_steps": config.optimizer.decay_steps}
    epochs = [f"config.{key}={length!r}" for key, length in lengths.items() if isinstance(length, str)]
    if epochs:   # only then must the data be here
        try:
            examples = batches.examples_per_epoch(config)
        except UserError as e:
            raise UserError(f"{epochs[0]} needs the size of the data: {e}; or give steps or tokens") from None
        config = config_lib.resolve(config, examples_per_epoch=examples)
    return config


def _program(config, mesh):
    from fm_jax import objectives, sharding
    from fm_jax.step import Program

    layout = sharding.Layout(mesh)
    return Program(config, objectives.load(config, None, layout), layout)


# --- on a topology ----------------------------------------------------------------------------------------------------

def on_topology(config, topology, *, compile: bool = True) -> dict:
    """Returns what a train step of `config` is on a `topology.Topology`: memory, collectives, time, FLOPs.

    compile: the real step, by the compiler of those chips; else the analytic model alone. "source" of the result says
    which. Figures are of one device unless they say otherwise; "seconds" are estimates, see `roofline.step_seconds`.

    Raises:
      UserError: a mesh that is not of all devices; what could not train either; the compiler is not installed.
    """
    from fm_jax import roofline, sharding

    config = _resolved(config)
    mesh = sharding.abstract_mesh(config.mesh, topology.num_devices)
    if mesh.size != topology.num_devices:
        raise UserError(f"mesh {sharding.describe(mesh)} uses {mesh.size} of the {topology.num_devices} devices of "
                        f"{topology.name}; change --mesh, or give a smaller --topology")
    program = _program(config, sharding.make_mesh(dict(mesh.shape), topology.devices()) if compile else mesh)
    guess = roofline.train(config, program.abstract, program.axes, dict(mesh.shape), topology)
    return _facts(config, program.objective, topology, _analytic(guess) | (
        _compiled(program, topology, guess) if compile else {}))


def _facts(config, objective, topology, figures) -> dict:
    """Returns the figures of a step with what they are of, and what follows from them."""
    from fm_jax import sharding

    tokens, flops = objective.tokens_per_example * config.batch_size, objective.flops_per_example * config.batch_size
    step_s = figures["seconds"].get("step")
    return {
        "topology": topology.name, "slices": topology.slices, "chips": topology.num_chips,
        "devices": topology.num_devices, "memory_bytes": topology.chip.memory_bytes,
        "mesh": sharding.describe(sharding.abstract_mesh(config.mesh, topology.num_devices)),
        "remat": config.model.remat, "accumulation_steps": config.accumulation_steps, "steps": config.steps,
        "tokens_per_step": tokens, "flops_per_step": flops, **figures,
        "mfu": step_s and flops / (step_s * topology.num_devices * topology.chip.peak_flops),
        "tokens_per_day": step_s and 86_400 * tokens / step_s,
        "run_chip_hours": step_s and topology.num_chips * config.steps * step_s / 3600}


def _analytic(guess) -> dict:
    """Returns the figures of a `roofline.Estimate`."""
    return {"source": "analytic model", "fits": guess.fits, "free_bytes": guess.free_bytes,
            "bytes_per_device": guess.bytes_per_device, "executed_flops_per_step": guess.flops,
            "collectives": _summed(guess.collectives), "seconds": guess.seconds}


def _compiled(program, topology, guess) -> dict:
    """Returns what the compiled step says instead of the analytic model's `guess`."""
    import jax
    import jax.numpy as jnp

    from fm_jax import hlo, roofline, sharding

    traced = program.train_step.trace(program.abstract, program.batch_spec, jax.ShapeDtypeStruct((), jnp.int32))
    flops, _ = roofline.jaxpr_flops(traced.jaxpr)
    begin = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        return {"source": "compiler, which refuses", "compile_s": time.perf_counter() - begin, "fits": False,
                "free_bytes": -_excess_bytes(str(e)), "jaxpr_flops_per_step": flops, "collectives": [], "seconds": {}}
    compile_s, text, memory = time.perf_counter() - begin, compiled.as_text(), compiled.memory_analysis()
    mesh, chip, config = program.layout.mesh, topology.chip, program.config
    moved = hlo.collectives(text, mesh.shape)
    seconds = topology.collective_seconds(moved, mesh.devices)
    if cycles := hlo.cycles(text):
        seconds["compute"] = cycles / chip.clock_hz
        if hlo.kernels(text):   # no cycles are known of them: attention, at the efficiency of the analytic model
            a = Architecture(**config.model.to_dict())
            done = config.batch_size * config.seq_len * roofline.attention_flops_per_token(a, config.seq_len)
            seconds["kernels"] = done / topology.num_devices / chip.peak_flops / chip.efficiency
    else:                       # a GPU's compiler counts none
        seconds |= {key: guess.seconds[key] for key in ("compute", "memory")}
    busy = max(seconds["compute"], seconds.get("memory", 0)) + seconds.get("kernels", 0)
    free = chip.memory_bytes - memory.peak_memory_in_bytes
    held = {"parameters": program.abstract.params, "optimizer": program.abstract.opt_state,
            "ema": program.abstract.ema, "batch": program.batch_spec}
    return {
        "source": "compiler", "compile_s": compile_s, "jaxpr_flops_per_step": flops, "fits": free >= 0,
        "free_bytes": free, "collectives": _summed(moved),
        "seconds": seconds | {"step": roofline.step_seconds(busy, seconds)},
        "bytes_per_device": {name: sharding.bytes_per_device(part) for name, part in held.items()} | {
            "activations": memory.peak_memory_in_bytes - memory.argument_size_in_bytes},
        "peak_bytes": memory.peak_memory_in_bytes}


def _excess_bytes(message) -> int:
    """Returns by how much a program did not fit, from the TPU compiler's words; 0 where they do not say."""
    found = re.search(r"[Ee]xceed\w*[^.]*? by ([\d.]+)([KMGT]?)", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def _summed(collectives):
    """Returns [{"kind", "axes", "bytes", "overlapped_frac", "operations"}] of a step, the most bytes first."""
    sums = {}
    for c in collectives:
        entry = sums.setdefault((c.kind, c.axes), {"kind": c.kind, "axes": "+".join(c.axes), "bytes": 0.0,
                                                   "overlapped_bytes": 0.0, "operations": 0})
        entry["bytes"] += c.nbytes * c.times
        entry["overlapped_bytes"] += c.nbytes * c.times * c.overlapped
        entry["operations"] += c.times
    return sorted(sums.values(), key=lambda e: -e["bytes"])


def search(config, topology, *, fixed=(), compile_best: int = 3, progress=lambda line: None) -> list[dict]:
    """Returns layouts of `config` on a topology as `on_topology` does, the best first.

    Every mesh of all devices over data, fsdp and tensor, with the axes `fixed` as the config has them, and every remat
    policy that the analytic model knows, each with the fewest microbatches (from the config's number on) that it finds
    room for. The best `compile_best` of them are compiled, and rank before the rest; what does not fit ranks last.

    Raises:
      UserError: no mesh divides the model and the batch.
    """
    from fm_jax import roofline, sharding

    config = _resolved(config)
    free = [axis for axis in ("data", "fsdp", "tensor") if axis not in fixed]
    held = {axis: 1 if axis in free else max(1, config.mesh[axis]) for axis in sharding.MESH_AXES}
    rest, odd = divmod(topology.num_devices, math.prod(held.values()))
    base = _program(_changed(config, dict.fromkeys(sharding.MESH_AXES, 1)), sharding.abstract_mesh({}))
    found, why = [], None
    for shape in () if odd else _factored(rest, len(free)):
        sizes = held | dict(zip(free, shape))
        for policy in roofline.saved_widths(Architecture(**config.model.to_dict())):
            try:
                found.append(_roomy(_changed(config, sizes, policy), base, sizes, topology))
            except UserError as e:   # a mesh that the model or the batch does not divide
                why = e
    if not found:
        raise UserError(f"--search: no mesh of {topology.num_devices} devices suits this model"
                        + (f"; the last one: {why}" if why else f" with {held}"))
    found.sort(key=lambda pair: (not pair[1].fits, pair[1].seconds["step"]))
    results = []
    for i, (candidate, guess) in enumerate(found):
        if i < compile_best and guess.fits:
            mesh = sharding.describe(sharding.abstract_mesh(candidate.mesh))
            progress(f"compiling {i + 1} of {compile_best}: {mesh}, remat {candidate.model.remat}")
            results.append(on_topology(candidate, topology))
        else:
            results.append(_facts(candidate, base.objective, topology, _analytic(guess)))
    return sorted(results, key=lambda r: (not r["fits"], r["source"] != "compiler",
                                          r["seconds"].get("step", float("inf"))))


def _roomy(config, base, sizes, topology):
    """Returns (config, estimate) with the fewest microbatches that fit, or the most that there can be."""
    from fm_jax import roofline, sharding

    layout = sharding.Layout(sharding.abstract_mesh(sizes))
    if config.batch_size % (layout.batch_parts * config.accumulation_steps):
        raise UserError(f"config.batch_size={config.batch_size} in {config.accumulation_steps} microbatches is not "
                        f"divisible by {layout.batch_parts}")
    while True:
        guess = roofline.train(config, base.abstract, base.axes, sizes, topology)
        more = 2 * config.accumulation_steps
        if guess.fits or config.batch_size % (layout.batch_parts * more):
            return config, guess
        config = _changed(config, sizes, accumulation_steps=more)


def _changed(config, sizes, remat=None, accumulation_steps=None):
    changes = {f"mesh.{axis}": n for axis, n in sizes.items()}
    changes |= {"model.remat": remat} if remat else {}
    changes |= {"accumulation_steps": accumulation_steps} if accumulation_steps else {}
    return config_lib.override(copy.deepcopy(config), changes)


def _factored(n, parts):
    """Yields the ways to write n as a product of `parts` factors, in order."""
    if parts == 0:
        yield from [()] * (n == 1)
        return
    for first in (d for d in range(1, n + 1) if n % d == 0):
        yield from ((first, *others) for others in _factored(n // first, parts - 1))


# --- as text ----------------------------------------------------------------------------------------------------------

def describe(r, price=None) -> str:
    """Returns the result of `on_topology` as text. price: of one chip and hour, in any money."""
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
        lines[-1] += "    (analytic model)"
        lines.append("  no time without a program: more devices, more microbatches, or --search")
    lines += [f"  FLOPs per step        {quantity(r['flops_per_step'])}  (forward and backward, causal attention at "
              "half, no recomputation)",
              f"    done                {quantity(r['executed_flops_per_step'])}  (with recomputation"
              + (f"; {quantity(r['jaxpr_flops_per_step'])} counted in the traced program)"
                 if "jaxpr_flops_per_step" in r else ")")]
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
    if price is not None:
        days = r["run_chip_hours"] / r["chips"] / 24
        lines.append(f"    whole run: {r['steps']:,} steps in {days:.1f} days, {r['run_chip_hours']:,.0f} chip hours, "
                     f"{r['run_chip_hours'] * price:,.0f} at {price:g} a chip and hour")
    return "\n".join(lines)


def ranking(results, price=None, most: int = 20) -> str:
    """Returns the first `most` results of `search` as a table."""
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
    for flag in ("slices", "analytic", "search", "price_per_chip_hour", "decode_length", "output"):
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
    quiet_compilers()
    from fm_jax import topology as topology_lib

    if args.devices is not None:
        raise UserError("--devices: --topology says how many there are")
    topology = topology_lib.parse(args.topology, args.slices)
    config, price = args.config, args.price_per_chip_hour
    if topology.slices > 1 and config.mesh.slice == 1:
        config.mesh.slice = topology.slices
    if config.mesh.slice != topology.slices and not topology.gpu:
        raise UserError(f"mesh axis slice={config.mesh.slice} with --slices {args.slices}: they must be the same")
    if args.search:
        fixed = [axis for axis, n in named.items() if n != -1]
        results = search(config, topology, fixed=fixed, compile_best=0 if args.analytic else args.compile_best,
                         progress=lambda line: print(line, flush=True))
        print(ranking(results, price))
        print()
    else:
        results = [on_topology(config, topology, compile=not args.analytic)]
    print(f"{config.name}: {Architecture(**config.model.to_dict()).param_count():,} parameters, "
          f"{results[0]['tokens_per_step']:,} tokens a step")
    print(describe(results[0], price))
    print(_decode_text(Architecture(**config.model.to_dict()), topology,
                       args.decode_length or config.model.max_seq_len))
    if topology.gpu:
        print("  JAX takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more")
    if args.output:
        Path(args.output).write_text(json.dumps(results if args.search else results[0], indent=1) + "\n")


def quiet_compilers():
    """Returns nothing; sets, before jax is imported, what keeps the compilers from looking for chips."""
    # JAX's own arrays stay on the CPU. libtpu asks a metadata server and other processes unless told, and cannot read
    # an entry of the compilation cache back.
    for name, value in {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def _parse_mesh(text):
    """Returns {axis: devices} of "fsdp=64,tensor=8"."""
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part) for part in text.split(",")]
    if not all(pairs):
        raise UserError(f"--mesh {text!r}: expected axis=devices, such as fsdp=64,tensor=8")
    return {pair[1]: int(pair[2]) for pair in pairs}


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""What a train step on given chips needs and how long it takes, compiled for them or from shapes; the best layout.

    topology = topology_lib.parse("v5p:8x8x8")
    forecast.on_topology(config, topology)          # one layout, by the chips' own compiler
    forecast.search(config, topology)               # meshes and remat policies, ranked

Layer 5, below `plan`, which prints these figures.
"""

import copy
import math
import re
import time

import jax

from fm_jax import config as config_lib
from fm_jax import compiled_step, hlo, objectives, roofline, sharding
from fm_jax import topology as topology_lib
from fm_jax.architecture import Architecture
from fm_jax.data import batches
from fm_jax.errors import UserError
from fm_jax.step import Program


def resolved(config):
    """Returns the config with its lengths in steps. Raises UserError where they need data that is not here."""
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


def program_on(config, mesh, tokenizer=None) -> Program:
    """Returns the program of a resolved config on a mesh. With a tokenizer, it also counts bytes, as a run's does."""
    layout = sharding.Layout(mesh)
    return Program(config, objectives.load(config, tokenizer, layout), layout)


def on_topology(config, topology, *, compile: bool = True, tokenizer=None, save_to=None) -> dict:
    """Returns what a train step of `config` is on a `topology.Topology`: memory, collectives, time, FLOPs.

    compile: the real step, by the compiler of those chips; else the analytic model alone. "source" of the result says
    which. Figures are of one device unless they say otherwise; "seconds" are estimates, see `roofline.step_seconds`.
    save_to: a file for the compiled step, which is a run's if made with the run's tokenizer; see `compiled_step`.

    Raises:
      UserError: a mesh that is not of all devices; what could not train either; the compiler is not installed.
    """
    config = resolved(config)
    mesh = sharding.abstract_mesh(config.mesh, topology.num_devices)
    if mesh.size != topology.num_devices:
        raise UserError(f"mesh {sharding.describe(mesh)} uses {mesh.size} of the {topology.num_devices} devices of "
                        f"{topology.name}; change --mesh, or give a smaller --topology")
    real = sharding.make_mesh(dict(mesh.shape), topology.devices()) if compile else mesh
    program = program_on(config, real, tokenizer)
    guess = roofline.train(config, program.abstract, program.axes, dict(mesh.shape), topology)
    return _facts(config, program.objective, topology, _analytic(guess) | (
        _compiled(program, topology, guess, tokenizer, save_to) if compile else {}))


def _facts(config, objective, topology, figures) -> dict:
    """Returns the figures of a step with what they are of, and what follows from them."""
    tokens, flops = objective.tokens_per_example * config.batch_size, objective.flops_per_example * config.batch_size
    step_s = figures["seconds"].get("step")
    return {
        "topology": topology.name, "slices": topology.slices, "chips": topology.num_chips,
        "devices": topology.num_devices, "chip": topology.chip.kind, "memory_bytes": topology.chip.memory_bytes,
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
            "collectives": _summed(guess.collectives), "seconds": guess.seconds,
            "analytic": {"step_s": guess.seconds["step"], "free_bytes": guess.free_bytes}}


def _compiled(program, topology, guess, tokenizer, save_to) -> dict:
    """Returns what the compiled step says instead of the analytic model's `guess`."""
    traced = program.traced()
    mesh, chip, config = program.layout.mesh, topology.chip, program.config
    held = {"parameters": program.abstract.params, "optimizer": program.abstract.opt_state,
            "ema": program.abstract.ema, "batch": program.batch_spec}
    held = {name: sharding.bytes_per_device(part) for name, part in held.items()}
    facts = {"jaxpr_flops_per_step": roofline.jaxpr_flops(traced.jaxpr)[0]}
    begin = time.perf_counter()
    try:
        with topology_lib.uncached():
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed = _temporary_bytes(str(e)) or guess.bytes_per_device["activations"]
        return facts | {
            "source": "compiler, which refuses", "compile_s": time.perf_counter() - begin, "fits": False,
            "free_bytes": chip.memory_bytes - needed - sum(held.values()), "collectives": [], "seconds": {},
            "bytes_per_device": held | {"activations": needed}}
    facts["compile_s"] = time.perf_counter() - begin
    if save_to is not None:
        compiled_step.save(save_to, compiled, mesh, config, tokenizer)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    moved = hlo.collectives(text, mesh.shape)
    facts["chip_attention"] = "splash_mha" in text or "__cudnn$fmha" in text
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
    return facts | {
        "source": "compiler", "fits": free >= 0, "free_bytes": free, "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": _summed(moved), "seconds": seconds | {"step": roofline.step_seconds(busy, seconds)},
        "bytes_per_device": held | {
            "activations": memory.peak_memory_in_bytes - memory.argument_size_in_bytes}}


def _temporary_bytes(message) -> int:
    """Returns the bytes that a program needs beside its arguments, from a TPU compiler's refusal; 0 where none are."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def _summed(collectives):
    """Returns [{"kind", "axes", "bytes", "overlapped_bytes", "operations"}] of a step, the most bytes first."""
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
    policy but those that offload to the host, whose time the analytic model does not know, each with the fewest
    microbatches (from the config's number on) that it finds room for. The best are compiled until `compile_best` of
    them fit, at most twice as many; they rank before the rest, and what does not fit ranks last.

    Raises:
      UserError: no mesh divides the model and the batch.
    """
    config = resolved(config)
    free = [axis for axis in ("data", "fsdp", "tensor") if axis not in fixed]
    held = {axis: 1 if axis in free else max(1, config.mesh[axis]) for axis in sharding.MESH_AXES}
    rest, odd = divmod(topology.num_devices, math.prod(held.values()))
    base = program_on(_changed(config, dict.fromkeys(sharding.MESH_AXES, 1)), sharding.abstract_mesh({}))
    found, why = [], None
    for shape in () if odd else _factored(rest, len(free)):
        sizes = held | dict(zip(free, shape))
        for policy in roofline.saved_widths(Architecture(**config.model.to_dict())):
            if policy.startswith("offload"):
                continue
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
        if guess.fits and i < 2 * compile_best and sum(r["fits"] for r in results) < compile_best:
            mesh = sharding.describe(sharding.abstract_mesh(candidate.mesh))
            progress(f"compiling {mesh}, remat {candidate.model.remat}")
            results.append(on_topology(candidate, topology))
        else:
            results.append(_facts(candidate, base.objective, topology, _analytic(guess)))
    return sorted(results, key=lambda r: (not r["fits"], r["source"] != "compiler",
                                          r["seconds"].get("step", float("inf"))))


def _roomy(config, base, sizes, topology):
    """Returns (config, estimate) with the fewest microbatches that fit, or the most that there can be."""
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

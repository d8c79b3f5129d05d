"""Layers on several stages: each microbatch meets every layer once and in order; losses, gradients and taps are those
of one device; what cannot be cut so is refused; and memory is what the module says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.model import Cache
from fm_jax.pipeline import Schedule
from fm_jax.step import Program

BATCH, LENGTH, LAYERS = 16, 8, 8


def make(mesh=None, **changes):
    """Returns the Program of a tiny model of 8 layers on a mesh."""
    c = config_lib.defaults()
    c.model.update(vocab_size=32, num_layers=LAYERS, embed_dim=8, num_heads=2, mlp_dim=16, max_seq_len=8,
                   loss_chunk_tokens=24)
    c.batch_size, c.seq_len, c.steps = BATCH, LENGTH, 10
    c.optimizer.update(learning_rate=0.1, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    c = config_lib.resolve(config_lib.override(c, changes))
    layout = sharding.Layout(sharding.make_mesh(mesh or {"data": 1}))
    return Program(c, objectives.load(c, None, layout), layout)


def batch(program):
    """Returns packed rows of one to three documents and padding: very unequal weights and positions."""
    rng, rows = np.random.default_rng(2), program.config.batch_size
    tokens = rng.integers(0, 32, (rows, LENGTH + 1), dtype=np.int32)
    segments = np.sort(rng.integers(1, 4, (rows, LENGTH + 1), dtype=np.int32), axis=1)
    for row, length in enumerate(rng.integers(2, LENGTH + 2, rows)):
        segments[row, length:] = 0
    return program.objective.examples({"tokens": tokens, "segment_ids": segments}, np.arange(rows, dtype=np.uint64))


def params(program):
    """Returns NumPy parameters none of which is 0 or 1, the same for every mesh."""
    rng = np.random.default_rng(3)
    values = {n: (rng.normal(size=a.shape) * (0.3 if "norm" in n else a.shape[-1] ** -0.5)).astype(np.float32)
              for n, a in tree.flatten(program.abstract.params).items()}
    return tree.map_named(lambda n, _: values[n], program.abstract.params)


def loss_and_gradients(program):
    """Returns (sum of losses, {name: gradient}) of the batch, with dropout where the model has some."""
    key = jax.random.key(5) if program.config.model.dropout else None
    loss = lambda params, batch: program.objective.loss(params, batch, key).loss
    placed = jax.tree.map(lambda p, s: jax.device_put(p, s), params(program), program.shardings.params)
    value, gradients = jax.jit(jax.value_and_grad(loss), out_shardings=(program.layout.replicated,
                                                                         program.shardings.params))(
        placed, program.place(batch(program)))
    return float(value), {n: np.asarray(g) for n, g in tree.flatten(gradients).items()}


@functools.cache
def on_one_device(changes):
    return loss_and_gradients(make(**dict(changes)))


# --- the schedule -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stages, microbatches, repeats", [(2, 2, 1), (2, 6, 1), (4, 4, 1), (2, 4, 3), (4, 8, 2),
                                                           (3, 6, 4), (8, 16, 2)])
def test_every_microbatch_meets_every_layer_once_and_in_order(stages, microbatches, repeats):
    """Stages hold what the ring brings: at each step a stage gets what its neighbour had at the step before."""
    s = Schedule(stages, microbatches, repeats)
    done = dict.fromkeys(range(microbatches), 0)   # groups of layers that a microbatch has been through
    held = [None] * stages                         # the microbatch that arrives at each stage
    waiting, idle = list(range(microbatches)), 0
    for step in range(s.steps):
        for stage in range(stages):
            microbatch, turn = s.at(step, stage)
            if not 0 <= microbatch < microbatches:
                idle += 1
                assert held[stage] is None or done[held[stage]] == stages * repeats
                held[stage] = None
                continue
            if stage == 0 and turn == 0:
                assert held[0] is None or done[held[0]] == stages * repeats   # it leaves for the new one
                held[0] = waiting.pop(0)
            assert held[stage] == microbatch and done[microbatch] == turn * stages + stage
            done[microbatch] += 1
        held = held[-1:] + held[:-1]
    assert not waiting and set(done.values()) == {stages * repeats}
    assert idle == stages * (stages - 1)   # as few as can be: S - 1 steps of each stage


# --- the same as one device -------------------------------------------------------------------------------------------

LOCAL = {"model.layer_pattern": ("local", "global"), "model.window": 3}
CASES = {
    "two stages": (dict(stage=2), {}, {}),
    "four stages, more microbatches": (dict(stage=4), {"model.pipeline_microbatches": 8}, {}),
    "eight stages": (dict(stage=8), {}, {}),
    "two rounds, remat": (dict(stage=4), {"model.pipeline_repeats": 2, "model.pipeline_microbatches": 8},
                          {"model.remat": "full"}),
    "four rounds on two stages": (dict(stage=2), {"model.pipeline_repeats": 4, "model.pipeline_microbatches": 4}, {}),
    "fsdp, dropout, rounds": (dict(stage=2, fsdp=2, data=2), {"model.pipeline_repeats": 2}, {"model.dropout": 0.2}),
    "data and tensor, pattern, remat": (dict(data=2, stage=2, tensor=2), {"model.pipeline_microbatches": 4},
                                        {**LOCAL, "model.remat": "dots"}),
    "slices, expert axis, unrolled": (dict(slice=2, stage=2, expert=2), {"model.pipeline_repeats": 2},
                                      {"model.scan_layers": False}),
    "stages and tensor": (dict(stage=4, tensor=2), {}, {}),
    "context and tensor, dropout": (dict(stage=2, context=2, tensor=2), {"model.pipeline_microbatches": 4},
                                    {"model.dropout": 0.2}),
    "experts": (dict(stage=2, expert=2), {"model.pipeline_repeats": 2},
                {"model.num_experts": 4, "objective_args.load_balance_loss": 0.1, "objective_args.router_z_loss": 0.01}),
    "block inputs on the host": (dict(stage=4), {"model.remat": "offload_full"}, {}),
    "projections on the host": (dict(stage=2, fsdp=2), {"model.remat": "offload_dots"}, {}),
}


BY_DEFAULT = {"two rounds, remat", "fsdp, dropout, rounds", "data and tensor, pattern, remat",
              "block inputs on the host"}   # the rest is slow


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow)
                                  for name in CASES])
def test_losses_and_gradients_are_those_of_one_device(name):
    """Float32 in another order of sums: errors seen are below 1e-6 of the loss, and of the largest gradient."""
    mesh, cut, changes = CASES[name]
    want, got = on_one_device(tuple(changes.items())), loss_and_gradients(make(mesh, **changes, **cut))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for n, gradient in want[1].items():
        largest = np.abs(gradient).max()
        assert largest > 0, n
        np.testing.assert_allclose(got[1][n], gradient, rtol=0, atol=1e-5 * largest, err_msg=n)


def test_layers_give_out_the_same():
    """Taps come back in the order of layers and rows, from stages that each saw their own."""
    one = make(**LOCAL)
    many = make(dict(data=2, stage=2, fsdp=2), **LOCAL, **{"model.pipeline_repeats": 2})
    names = ("residual", "k")
    tokens = batch(one)["tokens"]
    hidden = [jax.jit(lambda p, t, f=program.objective.hidden: f(p, t, capture=names))(params(program), tokens)
              for program in (one, many)]
    assert hidden[0][1]["residual"].shape == (LAYERS, BATCH, LENGTH, 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), *hidden)   # order of sums


@pytest.mark.slow
def test_a_train_step_is_that_of_one_device():
    """Parameters are drawn and stored in the same order, and updated alike; in microbatches of accumulation too."""
    runs = []
    for mesh, changes in (({}, {}), (dict(stage=2, fsdp=2), {"model.pipeline_repeats": 2, "accumulation_steps": 2})):
        program = make(mesh, **changes)
        state = program.init()
        start = tree.flatten(jax.device_get(state.params))
        state, metrics = program.train_step(state, program.place(batch(program)), 0)
        evaluated = program.eval_step(state.params, None, program.place(batch(program)))
        runs.append((start, tree.flatten(jax.device_get(state.params)), float(metrics["loss"][0]),
                     float(metrics["grad_norm"][0]), float(evaluated["loss"][0])))
    (start, end, *numbers), (other_start, other_end, *other_numbers) = runs
    np.testing.assert_allclose(other_numbers, numbers, rtol=1e-5)
    for n in start:
        np.testing.assert_array_equal(other_start[n], start[n], err_msg=n)
        moved = np.abs(end[n] - start[n]).max()
        np.testing.assert_allclose(other_end[n], end[n], rtol=0, atol=1e-4 * moved + 1e-7, err_msg=n)


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mesh, changes, message", [
    (dict(stage=3), {}, "model.num_layers=8 .*mesh.stage=3 x model.pipeline_repeats=1 .*multiple of 3 layers"),
    (dict(stage=4), {"model.pipeline_repeats": 4}, "model.num_layers=8 .*pipeline_repeats=4 .*multiple of 16"),
    (dict(stage=8), LOCAL, "whole periods of 2 layers .model.layer_pattern.*multiple of 16"),
    (dict(stage=4), {"model.pipeline_microbatches": 6}, "pipeline_microbatches=6 must be a multiple of mesh.stage=4"),
    (dict(stage=2, data=4), {"model.pipeline_microbatches": 4, "batch_size": 24},
     "config.batch_size=24 / accumulation_steps=1 = 24 rows cannot be cut.*multiple of 16, or fewer microbatches"),
    ({}, {"model.pipeline_repeats": 0}, "pipeline_repeats=0 must be positive"),
    ({}, {"model.pipeline_microbatches": -1}, "pipeline_microbatches=-1 must be 0 or more"),
])
def test_what_cannot_be_cut_is_refused_before_compiling(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        make(mesh, **changes)


def test_rows_that_do_not_fill_the_microbatches_are_refused():
    objective = make(dict(stage=4), **{"model.pipeline_microbatches": 8}).objective
    shapes = jax.eval_shape(lambda: sharding.unbox(objective.init(jax.random.key(0)))[0])
    with pytest.raises(UserError, match="a pipeline of 8 microbatches .*multiple of 8 rows, not 12"):
        jax.eval_shape(lambda p: objective.hidden(p, jnp.zeros((12, 4), jnp.int32)), shapes)


def test_a_pipeline_does_not_decode_or_score():
    objective, tokens = make(dict(stage=2)).objective, jnp.zeros((2, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: sharding.unbox(objective.init(jax.random.key(0)))[0])
    with pytest.raises(UserError, match="mesh.stage=2: a pipeline is for training; .*--mesh"):
        jax.eval_shape(lambda p: objective.trees(p, tokens, tokens, tokens), shapes)
    cache = Cache.empty(objective.arch, 2, 8)
    with pytest.raises(UserError, match="mesh.stage=2: a pipeline is for training"):
        jax.eval_shape(lambda p: objective.decode(p, tokens, cache), shapes)


# --- memory -----------------------------------------------------------------------------------------------------------

SMALL = {"model.embed_dim": 32, "model.mlp_dim": 128, "model.num_heads": 4, "model.dtype": "bfloat16", "seq_len": 8}


def gradient(program):
    return lambda params, batch: jax.grad(lambda p: program.objective.loss(p, batch, None).loss)(params)


def kept_by_steps(program, steps):
    """Returns the arrays that the forward loop over steps keeps for the backward one."""
    def loops(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == "scan" and e.params["length"] == steps:
                yield e
            for value in jax.tree.leaves(list(e.params.values())):
                value = getattr(value, "jaxpr", value)
                yield from loops(value) if hasattr(value, "eqns") else ()

    first = next(loops(jax.make_jaxpr(gradient(program))(program.abstract.params, program.batch_spec).jaxpr))
    body = getattr(first.params["jaxpr"], "jaxpr", first.params["jaxpr"])   # what is carried has the shape it has there
    return [v.aval for v, of_step in zip(first.outvars, body.outvars) if v.aval.shape != of_step.aval.shape]


@pytest.mark.parametrize("repeats", [1, 2])
def test_full_remat_keeps_block_inputs_and_no_weights(repeats):
    program = make(dict(stage=2), **SMALL, **{"model.remat": "full", "model.pipeline_repeats": repeats})
    steps, layers = 2 * repeats + 1, LAYERS // 2 // repeats
    kept = [a for a in kept_by_steps(program, steps) if a.ndim > 1]
    assert [(a.shape, str(a.dtype)) for a in kept] == [((steps, layers, BATCH // 2, 8, 32), "bfloat16")]


@pytest.mark.slow
def test_without_remat_memory_grows_as_on_a_data_axis():
    """Rows added cost a stage no more than they cost a device that has all layers and half of the rows."""
    growth = {}
    for axis in ("stage", "data"):
        sizes = []
        for rows in (8, 16):
            program = make({axis: 2}, batch_size=rows, **SMALL, **{"model.pipeline_microbatches": rows // 2})
            f = jax.jit(gradient(program), out_shardings=program.shardings.params)
            compiled = f.lower(program.abstract.params, program.batch_spec).compile()
            sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        growth[axis] = sizes[1] - sizes[0]
    assert 0 < growth["stage"] < 1.1 * growth["data"], growth

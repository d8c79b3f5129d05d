"""Layers cut over the mesh axis `stage`, and the schedule by which microbatches go through them. Layer 1.

A batch is cut into M microbatches, and the layers into S stages times R rounds of groups: stage s has groups s, S + s,
2 S + s, ... A microbatch goes R times round the S stages, one group at each. Microbatches come in chunks of S: while a
chunk goes its rounds every stage is busy, and what leaves the last stage reaches the first just when it is free, so
that nothing waits anywhere (the interleaved schedule of arXiv:2104.04473, section 2.2, with all backward steps after
all forward steps, as autodiff gives them). Of the M R + S - 1 steps of a stage, S - 1 are idle: the bubble.

Before and after the layers, `stage` is one more axis of the batch, so that embedding, head and loss are computed once.
What comes in and what is done travel on a line of their own, one microbatch a stage, past stage 0 and back.

Bytes, with A the activations of a microbatch between two layers and P the parameters of a stage, on one device: a step
sends 2 A. Layers are stored in the order of the model whatever the mesh; with R > 1 each train step deals them to their
rounds, and their gradients back: 2 P more sent, P more held. Memory of activations: (M R + S - 1) / (M R) times what
the same remat policy keeps where the devices of `stage` are devices of `data`.

Try:  JAX_NUM_CPU_DEVICES=2 python -m fm_jax.benchmark --config configs/causal_lm.py:tiny --config.mesh.data=1 \
          --config.mesh.stage=2 --config.model.pipeline_microbatches=4
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from fm_jax.errors import UserError
from fm_jax.sharding import DEVICE, HOST, Layout

AXIS = "stage"
# The names that `model` gives to what enters a block, and to what its projections give: remat policies keep them.
BLOCK_INPUT, PROJECTION = "block_input", "projection"
# Views, casts and what XLA fuses into its consumer.
CHEAP = {"dynamic_slice", "slice", "squeeze", "reshape", "transpose", "broadcast_in_dim", "convert_element_type", "add",
         "sub", "mul", "div", "neg", "exp", "logistic", "tanh", "erf", "max", "select_n", "square", "integer_pow"}


class Schedule(NamedTuple):
    """Who computes what when: S stages, M microbatches, R rounds."""

    stages: int
    microbatches: int
    repeats: int

    @property
    def steps(self) -> int:
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def chunks(self) -> int:
        return self.microbatches // self.stages

    def at(self, step, stage):
        """Returns (microbatch, round) of a stage at a step, ints or arrays; out of 0 .. M - 1: the stage is idle."""
        since = step - stage
        chunk, phase = since // (self.stages * self.repeats), since % (self.stages * self.repeats)
        return chunk * self.stages + phase % self.stages, phase // self.stages


def schedule(a, layout: Layout | None) -> Schedule | None:
    """Returns the schedule of a stack `a` (Architecture) on a mesh; None where the mesh has one stage.

    Raises:
      UserError: layers or microbatches that cannot be cut so.
    """
    stages = layout.mesh.shape[AXIS] if layout else 1
    if stages == 1:
        return None
    groups, period = stages * a.pipeline_repeats, len(a.layer_pattern)
    if (a.num_layers - a.num_first_layers) % (groups * period):
        of = f" of whole periods of {period} layers (model.layer_pattern)" if period > 1 else ""
        which = "num_dense_layers" if a.num_dense_layers else "first_norm"
        dense = f" without the first {a.num_first_layers} (model.{which})" if a.num_first_layers else ""
        raise UserError(f"model.num_layers={a.num_layers}{dense} does not make mesh.stage={stages} x "
                        f"model.pipeline_repeats={a.pipeline_repeats} equal groups{of}; change one of them, or take a "
                        f"multiple of {groups * period} layers")
    microbatches = a.pipeline_microbatches or stages
    if microbatches % stages:
        raise UserError(f"model.pipeline_microbatches={microbatches} must be a multiple of mesh.stage={stages}")
    return Schedule(stages, microbatches, a.pipeline_repeats)


def check(a, layout: Layout, rows: int, what: str) -> None:
    """Raises UserError where the stages of the mesh cannot cut the layers of `a`, or `rows` rows, named `what`."""
    s = schedule(a, layout)
    if s is None:
        return
    parts = layout.batch_parts // s.stages
    if rows % (s.microbatches * parts):
        raise UserError(f"{what} cannot be cut into model.pipeline_microbatches={s.microbatches} for the {s.stages} "
                        f"stages of the mesh, and each of these into {parts} parts; take a multiple of "
                        f"{s.microbatches * parts}, or fewer microbatches (a multiple of mesh.stage={s.stages})")


def through_layers(group, layers, x_BTD, per_row, s: Schedule, layout: Layout, policy):
    """Returns (x [B, T, D] after all layers, what the layers give out [L, B, ...]).

    group(layers, first, x, per_row, layout): the same of some consecutive layers, from number `first` (traced) on, and
    of some rows; its layout leaves out `stage`. layers: arrays [L, ...]. per_row: a tree of arrays [B, ...], of which
    the group gets the rows of its x. policy: of a step's remat, see `keeping`.
    """
    multiple = layout.batch_parts // s.stages * s.microbatches
    if x_BTD.shape[0] % multiple:
        raise UserError(f"a pipeline of {s.microbatches} microbatches on {layout.batch_parts} parts of a batch takes a "
                        f"multiple of {multiple} rows, not {x_BTD.shape[0]}")
    split, join = _cut(s, layout)
    here = PartitionSpec(AXIS)

    def stages(layers, x, per_row, stage):
        stage, x = stage[0], x[0]
        layers = jax.tree.map(functools.partial(_to_rounds, stage=stage, s=s), layers)
        inner = Layout(jax.sharding.get_abstract_mesh())
        size = jax.tree.leaves(layers)[0].shape[1]

        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)   # a scan separates the steps
        def compute(layers, per_row, x, step):
            microbatch, turn = s.at(step, stage)
            microbatch = jnp.clip(microbatch, 0, s.microbatches - 1)   # an idle stage computes on what nobody reads
            rows = lambda a: _at(_at(a, microbatch % s.stages), microbatch // s.stages)
            return group(jax.tree.map(lambda p: _at(p, turn), layers), (turn * s.stages + stage) * size, x,
                         jax.tree.map(rows, per_row), inner)

        def enter(x, line, step):
            """Stage 0 takes a new microbatch from the line, and puts what came round to it for the last time there."""
            fresh = (stage == 0) & (step % (s.stages * s.repeats) < s.stages)
            return jnp.where(fresh, line, x), jnp.where(fresh, x, line)

        def one(carry, step):
            x, line, waiting = carry
            chunk, since = jnp.divmod(step, s.stages * s.repeats)
            stored = _at(waiting, chunk)   # a new chunk goes onto the line; in its place, the one before the last
            waiting = jax.lax.dynamic_update_index_in_dim(waiting, jnp.where(since == 0, line, stored), chunk, 0)
            line = jnp.where(since == 0, stored, line)
            x, line = enter(x, line, step)
            x, given = compute(layers, per_row, x, step)
            return (_send(x, s, 1), _send(line, s, -1), waiting), given

        nothing = jnp.zeros_like(x[0])
        carry = nothing, nothing, jnp.concatenate([x, nothing[None]])
        (x, line, waiting), given = jax.lax.scan(one, carry, jnp.arange(s.steps))
        line = _send(enter(x, line, s.steps)[1], s, -1)
        # A stage's own steps: [chunks, rounds, microbatches of a chunk, layers of the group, rows, ...].
        own = lambda a: jax.lax.dynamic_slice_in_dim(a, stage, s.microbatches * s.repeats).reshape(
            1, s.chunks, s.repeats, s.stages, *a.shape[1:])
        return jnp.concatenate([waiting[2:], line[None]])[None], jax.tree.map(own, given)

    run = jax.shard_map(stages, mesh=layout.mesh, in_specs=(here, here, PartitionSpec(), here), out_specs=here,
                        axis_names={AXIS}, check_vma=False)
    # The stage's number comes as an array: XLA:CPU knows no `axis_index` where other axes are left to the partitioner.
    x, given = jax.jit(run)(layers, split(x_BTD), jax.tree.map(split, per_row), jnp.arange(s.stages))

    def whole(a):
        a = a.transpose(2, 0, 4, 3, 1, *range(5, a.ndim))   # [rounds, stages, layers], [microbatch, chunk, rows], ...
        return jax.vmap(join)(a.reshape(math.prod(a.shape[:3]), *a.shape[3:]))

    return join(x), jax.tree.map(whole, given)


def keeping(remat: str):
    """Returns the policy of what a step keeps for its backward pass, for each `model.remat`.

    A step is rematerialised as a whole, by a policy that keeps what the layers' own would. Autodiff alone would keep
    the weights of a group, or their copies in the compute dtype, once for every step. So "none" computes again what is
    elementwise, casts among it, and keeps the rest.
    """
    if remat == "none":
        return lambda primitive, *_, **__: primitive.name not in CHEAP
    names = {"full": [BLOCK_INPUT], "dots": [BLOCK_INPUT, PROJECTION], "offload_full": [],
             "offload_dots": [BLOCK_INPUT]}[remat]
    offloaded = {"offload_full": [BLOCK_INPUT], "offload_dots": [PROJECTION]}.get(remat, [])
    return named(names, offloaded)


def named(kept, offloaded=()):
    """Returns the remat policy that keeps the arrays of these names, and of those `offloaded` a copy on the host."""
    if not offloaded:
        return jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept, names_which_can_be_offloaded=offloaded, offload_src=DEVICE, offload_dst=HOST)


# --- rows -----------------------------------------------------------------------------------------------------------

def _cut(s: Schedule, layout: Layout):
    """Returns (split, join): arrays [B, ...] to [stage, chunk, row, ...] and back, without moving a row.

    The stage is the one that holds the rows outside of the pipeline. Of the rows on a device, a microbatch takes every
    `chunks`-th.
    """
    mesh = layout.mesh.shape
    outer = mesh["slice"] * mesh["data"]
    batch = layout.mesh_axes("batch", activation=True)
    free = PartitionSpec.UNCONSTRAINED
    place = lambda a, *spec: jax.lax.with_sharding_constraint(a, NamedSharding(
        layout.mesh, PartitionSpec(*spec, *(free,) * (a.ndim - len(spec)))))

    def split(a):
        a = a.reshape(outer, s.stages, -1, s.chunks, *a.shape[1:])
        a = a.transpose(1, 3, 0, 2, *range(4, a.ndim))
        return place(a.reshape(s.stages, s.chunks, -1, *a.shape[4:]), AXIS, None,
                     tuple(n for n in batch if n != AXIS) or None)

    def join(a):
        a = a.reshape(s.stages, s.chunks, outer, -1, *a.shape[3:])
        a = a.transpose(2, 0, 3, 1, *range(4, a.ndim))
        return place(a.reshape(-1, *a.shape[4:]), batch)

    return split, join


def _send(x, s: Schedule, by: int):
    """Returns the x of the stage `by` places before this one; the last and the first are neighbours."""
    return jax.lax.ppermute(x, AXIS, [(i, (i + by) % s.stages) for i in range(s.stages)])


def _at(a, i):
    return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


# --- layers ---------------------------------------------------------------------------------------------------------

def _to_rounds(p, stage, s: Schedule):
    """Returns a stage's layers [rounds, layers of a group, ...] from the rows [L / stages, ...] that it stores.

    Group g is stored on stage g // R and needed by stage g % S, in round g // S. All go in R exchanges, in each of
    which every stage sends one group and gets one: group g in number g + g // lcm(R, S), modulo R.
    """
    S, _, R = s
    p = p.reshape(R, -1, *p.shape[1:])
    if R == 1:
        return p
    sent, arrival = np.zeros((R, S), np.int32), np.zeros((S, R), np.int32)
    pairs = [[] for _ in range(R)]
    for g in range(R * S):
        exchange = (g + g // math.lcm(R, S)) % R
        sent[exchange, g // R] = g % R
        arrival[g % S, g // S] = exchange
        pairs[exchange].append((g // R, g % S))
    got = jnp.stack([jax.lax.ppermute(_at(p, jnp.asarray(sent[i])[stage]), AXIS, pairs[i]) for i in range(R)])
    return got[_at(jnp.asarray(arrival), stage)]

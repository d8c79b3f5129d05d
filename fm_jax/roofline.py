"""How much memory, traffic and time a train step would take, from shapes alone: no compiler, a millisecond a layout.

    roofline.train(config, program.abstract, program.axes, mesh_sizes, topology)     # one layout
    roofline.decode(architecture, topology, length)                                  # how many sequences, how fast

It ranks layouts before any is compiled, and stands where no compiler is. What it assumes is written where it
assumes it; `tests/peers/plan_error.py` puts it beside published figures. Layer 4.
"""

import math
from typing import NamedTuple

import jax

from fm_jax import hlo, pipeline, sharding, tree
from fm_jax.architecture import Architecture
from fm_jax.errors import choose
from fm_jax.topology import Topology


def saved_widths(a: Architecture) -> dict[str, tuple[int, int]]:
    """Returns {remat policy: (channels cut by `between`, channels cut by `tensor`)} that a device keeps of a token.

    Of each layer. What a policy keeps on the host is not counted, nor the time of its way there.
    """
    D, F = a.embed_dim, a.active_mlp_dim * (2 if a.gated_mlp else 1)
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return {
        "full": (D, 0),                           # its input
        "dots": (3 * D, q + 2 * kv + F),          # and what its projections give
        "none": (4 * D, 2 * q + 2 * kv + F),      # and norms' inputs and outputs, rotated queries, attention's output
        "offload_full": (0, 0),
        "offload_dots": (D, 0),
    }


class Estimate(NamedTuple):
    """Of one train step. Bytes are of one device."""

    bytes_per_device: dict[str, int]   # parameters, optimizer, ema, batch, activations
    fits: bool
    free_bytes: int                    # below 0: by how much it does not fit
    flops: float                       # done by all devices, recomputation included
    collectives: list[hlo.Collective]
    seconds: dict[str, float]          # compute, memory, overlapped and exposed collectives, step


def train(config, state, axes, sizes: dict[str, int], topology: Topology) -> Estimate:
    """Returns the estimate of a train step of `config` (resolved) on a mesh of these sizes.

    state, axes: `Program.abstract` and `Program.axes`, for any mesh.

    Raises:
      UserError: a parameter that the mesh does not divide; a remat policy that is not modelled.
    """
    if state.frozen is not None:
        raise UserError("--topology: the analytic model is of models that train whole, and config.adapt freezes a part; "
                        "plan without --topology counts its bytes")
    a, T, acc = Architecture(**config.model.to_dict()), config.seq_len, config.accumulation_steps
    layout = sharding.Layout(sharding.abstract_mesh(sizes))
    n = {axis: layout.mesh.shape[axis] for axis in layout.mesh.axis_names}
    t, width = n["tensor"], jax.numpy.dtype(a.dtype).itemsize
    # Of one device and microbatch; the layers of a stage see them all, in `stage` pieces.
    tokens = config.batch_size * T / (n["slice"] * n["data"] * n["fsdp"] * n["expert"]) / n["context"] / acc
    layers = a.num_layers / n["stage"]
    pipe = pipeline.schedule(a, layout)
    bubble = pipe.steps / (pipe.microbatches * pipe.repeats) if pipe else 1

    placed = layout.parameters(state.params, axes)
    of_state = lambda part: 0 if part is None else tree.nbytes(part)
    # Of a device's parameters: bytes it keeps, of layers too; and as products read them, whole but for `tensor`.
    held = of_layers = gathered = 0
    for p, s, names in zip(jax.tree.leaves(state.params), jax.tree.leaves(placed),
                           jax.tree.leaves(axes, is_leaf=sharding.is_axes)):
        size = math.prod(s.shard_shape(p.shape))
        cut = [axis for name, entry in zip(names, s.spec) if name != "experts" and entry
               for axis in ((entry,) if isinstance(entry, str) else entry)]
        held += size * p.dtype.itemsize
        of_layers += size * p.dtype.itemsize * ("layers" in names)
        gathered += size * width * math.prod(n[axis] for axis in cut if axis in ("fsdp", "expert", "context"))
    share = held / of_state(state.params)
    stored = jax.numpy.dtype(a.param_dtype).itemsize

    policy = choose(a.remat, saved_widths(a), "model.remat, for the analytic model")
    bytes_of = lambda widths: width * (widths[0] / layout.parts("between") * n["context"] + widths[1] / t)
    kept, whole = bytes_of(saved_widths(a)[policy]), bytes_of(saved_widths(a)["none"])
    table, tables = a.vocab_size * a.embed_dim / t, 1 if a.tie_embeddings else 2
    # What is there beside the kept activations while the loss goes back: the head and logits with their gradient, or the
    # head's gradient in float32 with that of logits, and the last layer's weights; and while a layer does: its weights
    # and the next one's, and all it makes.
    logits, weights = min(tokens, a.loss_chunk_tokens) * a.vocab_size / t, (gathered - tables * width * table) / layers
    loss = max(width * table + (width + 4) * logits, 4 * table + width * logits) + weights
    layer = 2 * weights + 2 * tokens / n["stage"] * whole
    if a.num_experts and not a.capacity_factor:   # rows of a device's experts: room for every token of the axis
        more = n["expert"] * min(a.experts_per_token, a.num_experts // n["expert"]) / a.experts_per_token - 1
        layer += more * tokens / n["stage"] * width * a.experts_per_token * (a.embed_dim + a.expert_dim / t)
    activations = bubble * layers * tokens * kept + max(loss, layer) + 4 * held / stored   # and gradients in float32
    batch = 20 * config.batch_size * T / layout.batch_parts                       # five arrays of 4 bytes a token
    sizes_ = {"parameters": held, "optimizer": of_state(state.opt_state) * share, "ema": of_state(state.ema) * share,
              "batch": batch, "activations": activations}
    free = topology.chip.memory_bytes - sum(sizes_.values())

    flops = config.batch_size * T * executed_flops_per_token(a, T)
    moved = _collectives(a, n, policy, tokens, layers, gathered, held, of_layers, acc, width, pipe)
    seconds = topology.collective_seconds(moved, sharding.arrange(layout.mesh.axis_sizes, topology.places()))
    # Gathered weights are written and read in each pass, activations read and written once by each of a layer's
    # operations, the state once; attention keeps its scores on the chip.
    passes = 3 if policy == "full" else 2
    traffic = acc * (2 * passes * gathered + layers * tokens * whole * (passes + 2)) + 2 * sum(
        sizes_[part] for part in ("parameters", "optimizer", "ema")) + 2 * held
    seconds["compute"] = bubble * flops / topology.num_devices / (topology.chip.peak_flops * topology.chip.efficiency)
    seconds["memory"] = bubble * traffic / topology.chip.memory_bytes_per_s
    return Estimate({k: int(v) for k, v in sizes_.items()}, free >= 0, int(free), flops, moved, seconds | {
        "step": step_seconds(max(seconds["compute"], seconds["memory"]), seconds)})


def step_seconds(busy: float, seconds: dict[str, float]) -> float:
    """Returns the time of a step: what can go on beside the work of the chip does, the rest comes on top."""
    return max(busy, seconds["overlapped"]) + seconds["exposed"]


def executed_flops_per_token(a: Architecture, seq_len: int) -> float:
    """Returns the FLOPs done for a token in training, what is computed twice included.

    Of a layer made again, the last product is not: nothing in the backward pass needs what it gives.
    """
    layers = a.matmul_param_count() - a.vocab_size * a.embed_dim - a.num_layers * a.embed_dim * a.active_mlp_dim
    return (6.0 * a.matmul_param_count() + attention_flops_per_token(a, seq_len)
            + (2.0 * layers if a.remat.endswith("full") else 0))


def attention_flops_per_token(a: Architecture, seq_len: int) -> float:
    """Returns those of attention's scores and values: the backward pass makes the scores again (2 of the 12 of
    `Architecture.flops_per_token`), and rematerialised layers the whole forward pass (4 of 12)."""
    attention = a.flops_per_token(seq_len) - 6.0 * a.matmul_param_count()
    return attention * (14 if a.remat == "none" else 18) / 12


def _collectives(a, n, policy, tokens, layers, gathered, held, of_layers, acc, width, pipe):
    """Returns the collectives that a step of these sizes needs, as XLA makes them of our constraints.

    Gathers of weights and sums of gradients go on beside the products; what stands between two products of a layer,
    the exchange of activations, is waited for.
    """
    cut = tuple(axis for axis in ("fsdp", "expert", "context") if n[axis] > 1)
    copies = tuple(axis for axis in ("slice", "data") if n[axis] > 1)
    again = 1 if policy.endswith("full") else 0
    moved = []
    add = lambda kind, axes, nbytes, times, overlapped: moved.append(hlo.Collective(
        kind, axes, nbytes, int(times), overlapped)) if axes and nbytes else None
    add("all-gather", cut, gathered, 2 * acc, True)
    # Over one flat axis XLA sums the gradients whole on every device; scattered, it takes half (TPU, 2026-11).
    flat = len(cut) + len(copies) + (n["tensor"] > 1) == 1
    add("all-reduce" if flat else "reduce-scatter", cut, gathered, acc, True)
    add("all-reduce", copies, held, acc, True)
    x = tokens * a.embed_dim * width
    tensor = ("tensor",) if n["tensor"] > 1 else ()
    # Around a sublayer, its input, the same again for the backward pass, and its gradient; its output, and the input's
    # gradient. Made again, a layer needs what its attention gives, and not what it gives itself.
    add("all-gather", tensor, x, 2 * layers * 3 * acc, False)
    add("reduce-scatter", tensor, x, layers * (4 + again) * acc, False)
    kv = 2 * tokens * n["context"] * a.num_kv_heads * a.head_dim * width / n["tensor"]
    context = ("context",) if n["context"] > 1 else ()
    add("all-gather", context, kv, layers * (2 + again) * acc, False)
    add("reduce-scatter", context, kv, layers * acc, False)
    if a.num_experts and n["expert"] > 1:
        if a.capacity_factor:   # there and back
            add("all-to-all", ("expert",), x * a.experts_per_token * a.capacity_factor,
                2 * layers * (2 + again) * acc, False)
        else:
            add("all-gather", ("expert",), x * n["expert"], layers * (2 + again) * acc, False)
            add("reduce-scatter", ("expert",), x * n["expert"], layers * (2 + again) * acc, False)
    if pipe:   # what the next stage waits for; and the line of what comes and goes, which no stage does
        for overlapped in (False, True):
            add("collective-permute", ("stage",), x / pipe.microbatches, 2 * pipe.steps * acc, overlapped)
        add("collective-permute", ("stage",), of_layers if pipe.repeats > 1 else 0, 2 * acc, False)
    return moved


class Decode(NamedTuple):
    """Of generating with the weights cut over a group of chips, as small as holds them and one sequence."""

    group_devices: int
    groups: int
    weight_bytes_per_device: int
    cache_bytes_per_sequence: int
    sequences: int                  # that a group holds
    tokens_per_s: float             # of a group with as many sequences
    tokens_per_s_of_one: float      # of a group with one


def decode(a: Architecture, topology: Topology, length: int) -> Decode | None:
    """Returns what decoding sequences of `length` tokens can reach; None where the weights fit no group of chips.

    A token reads all weights and, of each sequence, its cache, on average half full; or takes the products' time if
    that is longer. Weights and cache are in the compute dtype. Steps between chips are not counted.
    """
    width, chip = jax.numpy.dtype(a.dtype).itemsize, topology.chip
    weights = a.param_count() * width
    kept = sum(min(length, a.window) if kind == "local" else length for kind in a.layer_kinds)
    cache = 2 * a.num_kv_heads * a.head_dim * kept * width
    group = 1
    # A twentieth is left for activations and the program.
    while (room := int(0.95 * group * chip.memory_bytes) - weights) < cache:
        group *= 2
        if topology.num_devices % group:
            return None
    sequences = room // cache
    bandwidth, peak = group * chip.memory_bytes_per_s, group * chip.peak_flops
    rate = lambda n: n / max((weights + n * cache / 2) / bandwidth, 2 * n * a.matmul_param_count() / peak)
    return Decode(group, topology.num_devices // group, weights // group, cache, sequences, rate(sequences), rate(1))


def jaxpr_flops(jaxpr) -> tuple[float, int]:
    """Returns (FLOPs of the matrix products of a traced program on all devices, kernels that do not tell theirs).

    An independent count of what `executed_flops_per_token` says: loops by their length, both ways of no branch but the
    larger, kernels by the estimate they carry.
    """
    total, silent = 0.0, 0
    for eqn in jaxpr.eqns:
        kind = eqn.primitive.name
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
            continue
        if kind.startswith("ragged_dot"):
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * eqn.invars[0].aval.shape[-1]
            continue
        if kind == "pallas_call":
            cost = eqn.params.get("cost_estimate")
            total, silent = total + (cost.flops if cost else 0), silent + (cost is None)
            continue
        inner = [jaxpr_flops(j) for value in eqn.params.values()
                 for v in (value if isinstance(value, (tuple, list)) else (value,))
                 if hasattr(j := getattr(v, "jaxpr", v), "eqns")]
        times = eqn.params["length"] if kind == "scan" else eqn.params["mesh"].size if kind == "shard_map" else 1
        total += times * (max(f for f, _ in inner) if kind == "cond" and inner else sum(f for f, _ in inner))
        silent += times * sum(s for _, s in inner)
    return total, silent

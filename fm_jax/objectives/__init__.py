"""The contract between an objective and everything that runs it. Layer 2.

An objective is one class in one file here, named in the config by its import path
(`config.objective = "fm_jax.objectives.causal_lm.CausalLM"`). `train`, `data`, `checkpoint`, `plan`
and `benchmark` know what `Objective` below says and nothing more. A new modality or pretext task is
one file here and one config. Nothing in this package imports another objective.
"""

import copy
import dataclasses
import importlib
import inspect
import pkgutil
import sys
from typing import Any, Callable, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import model, pipeline
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError, choose
from fm_jax.frontends import TextModel, text_vectors
from fm_jax.model import Trunk
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab


class Loss(NamedTuple):
    """Sums, never means, so that accumulation, padding, meshes and evaluation all aggregate exactly.

    The trained loss is loss / weight, each summed over the whole batch: over microbatches, devices and hosts.
    The weight must not depend on the parameters. Each metric is a pair (sum, weight), written as their quotient.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]


class Objective(Protocol):
    """What an objective supplies. Built as `cls(config, tokenizer, layout, **config.objective_args)`."""

    reads: str                     # kind of data: "packed" rows of tokens, or separate "examples" (`data.examples`)
    predict: dict[str, Callable]   # named pure functions (params, inputs, ...) for evaluators, decoding, the server
    tokens_per_example: int        # for tokens/s
    flops_per_example: float       # of training, forward and backward, without recomputation: for MFU

    # Where the loss of an example depends on the others of its batch, as in contrastive learning, an objective says
    # `examples_interact = True` and also has `embed(params, batch, key)`, arrays [n, ...] that are all that the others
    # see of each example, and `loss_of(params, embedded, batch)`, of the whole batch.

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns names, shapes and dtypes of a batch; the leading axis of each is `batch_size`."""

    def examples(self, records: Any, seeds: np.ndarray, train: bool = True) -> dict[str, np.ndarray]:
        """Returns n examples, each array [n, ...], from n raw records of a data source of the kind that it `reads`.

        Packed rows come as {name: array [n, ...]}, of zeros where they are padding; separate examples as a list of n
        dicts, None where they are padding. Padding becomes an example of weight 0.

        Host side, NumPy only. `seeds` is uint64 [n]: all randomness of example i comes from seeds[i] (see `uniform`),
        so that a batch does not depend on how many hosts make it. One call makes many examples because a
        Python call for each would cost more than the work (LOG.md).

        Where not `train`, the examples are held-out ones: the plain task, without augmentation. What the task
        itself draws, such as masks, is then the same at every validation of every run, as the seeds are.
        """

    def random_batch(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns `examples` of n random records, for benchmarks without data."""

    def init(self, key: jax.Array) -> Any:
        """Returns the initial parameters, a nested dict of `sharding.Boxed` arrays. Traceable."""

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """Returns the losses of a batch. Pure; `key` is of dropout and the like, None: deterministic (evaluation)."""

    # May be there: `check_start(means: dict[str, float])` raises UserError where the metrics of a batch before the
    # first step say that the run does not begin with what its data was made for.


class LanguageModel:
    """What the objectives of causal language models share: the module, its parameters, and its predictions."""

    reads = "packed"

    def __init__(self, config, tokenizer, layout: Layout | None):
        """Raises UserError for a model that is not causal, does not fit the rows, the tokenizer or the mesh."""
        self.arch = Architecture(**config.model.to_dict())
        self.seq_len, self.tokenizer = config.seq_len, tokenizer
        if self.seq_len > self.arch.max_seq_len:
            raise UserError(f"config.seq_len={self.seq_len} exceeds model.max_seq_len={self.arch.max_seq_len}")
        if not self.arch.causal:
            raise UserError("model.causal=False: the causal language model would see its targets")
        if layout is not None:
            model.check(self.arch, self.seq_len, layout)
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
        self.tokens_per_example = self.seq_len
        self.flops_per_example = self.seq_len * self.arch.flops_per_token(self.seq_len)
        self.module = TextModel(dataclasses.replace(self.arch, capacity_factor=0.0), layout)
        self.predict = {"hidden": self.hidden, "embed": self.embed, "logits": self.logits, "trees": self.trees,
                        "score": self.score, "decode": self.decode}

    def packed(self, tokens, segments, mask=None) -> dict[str, np.ndarray]:
        """Returns tokens, targets, positions, segment_ids (int32) and weights (float32), each [n, T], of packed rows.

        tokens, segments, mask: [n, T + 1]. A target counts where its input is of the same document and `mask` is 1.
        """
        inputs = segments[:, :-1]
        weights = ((inputs == segments[:, 1:]) & (inputs > 0)).astype(np.float32)
        if mask is not None:
            weights *= mask[:, 1:]
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": document_positions(inputs),
                "segment_ids": inputs, "weights": weights}

    def init(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        unplaced = TextModel(self.arch)   # shardings of parameters come from their axes, not from this dummy batch
        return unplaced.init(key, tokens, method=lambda m, t: m.logits(m(t)[0]))["params"]

    def hidden(self, params, tokens_BT, capture=()):
        """Returns (hidden states [B, T, D], taps); tokens after a row's end must be ignored by the caller."""
        hidden, _, taps = self.module.apply({"params": params}, tokens_BT, capture=capture)
        return hidden, taps

    def embed(self, params, tokens_BT, length_B):
        """Returns float32 [B, D]: the mean hidden state of the first `length_B` tokens of each row."""
        return text_vectors(self.hidden(params, tokens_BT)[0], length_B, "mean")

    def logits(self, params, tokens_BT):
        """Returns float32 logits [B, T, V]."""
        return self.module.apply({"params": params}, self.hidden(params, tokens_BT)[0], method="logits")

    def trees(self, params, tokens_BT, positions_BT, last_BT, trunk: Trunk | None = None, capture=()):
        """Returns (hidden states [B, T, D], taps) of rows of trees of tokens; see `Transformer`."""
        hidden, _, taps = self.module.apply({"params": params}, tokens_BT, positions_BT, last_BT=last_BT, trunk=trunk,
                                            capture=capture)
        return hidden, taps

    def score(self, params, hidden_PD, rows_N, targets_N):
        """Returns float32 (log-probability [N] of each target after hidden state `rows_N`, 1 if none is likelier)."""
        logits_PV = self.module.apply({"params": params}, hidden_PD[None], method="logits")[0]
        top_P = logits_PV.max(-1)
        lse_P = top_P + jnp.log(jnp.exp(logits_PV - top_P[:, None]).sum(-1))
        picked_N = logits_PV[rows_N, targets_N]
        return picked_N - lse_P[rows_N], (picked_N >= top_P[rows_N]).astype(jnp.float32)

    def decode(self, params, tokens_BT, cache, last_B=None):
        """Returns (float32 logits [B, V] at place `last_B` of each row (default: its end), cache)."""
        hidden, cache, _ = self.module.apply({"params": params}, tokens_BT, cache=cache)
        last_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1] - 1) if last_B is None else last_B
        last = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)
        return self.module.apply({"params": params}, last, method="logits")[:, 0], cache


def find(path: str) -> type:
    """Returns the class that `config.objective`, an import path, names.

    Raises:
      UserError: no such module or class, with the nearest name.
    """
    module_name, _, class_name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module_name:
        raise UserError(f"config.objective={path!r}: expected package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if not f"{module_name}.".startswith(f"{e.name}."):
            raise   # the module exists and something it imports does not
        package, _, missing = e.name.rpartition(".")
        if inside := [m.name for m in pkgutil.iter_modules(getattr(sys.modules.get(package), "__path__", ()))]:
            choose(missing, inside, f"config.objective: module in {package}")
        raise UserError(f"config.objective={path!r}: no module {e.name!r}; expected "
                        "package.module.Class") from None
    choose(class_name, [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name],
           f"config.objective: class in {module_name}")
    return getattr(module, class_name)


def arguments(path: str) -> dict[str, Any]:
    """Returns the `config.objective_args` that an objective takes, with their defaults. Raises UserError as `find`."""
    return {p.name: p.default for p in inspect.signature(find(path)).parameters.values() if p.kind == p.KEYWORD_ONLY}


def settled(config, values: dict[str, list]):
    """Returns a copy of the config with the objective's arguments that its data decides, such as the names of labels.

    values: of each field of the records its distinct ones in the train split (`data.batches.values`). What is decided,
    and how, says the class method `from_data(args, values)` of an objective that has one.

    Raises:
      UserError: as `find` and `from_data`.
    """
    if not hasattr(find(config.objective), "from_data"):
        return config
    config = copy.deepcopy(config)
    args = arguments(config.objective) | config.objective_args.to_dict()
    with config.unlocked():
        config.objective_args.update({k: tuple(v) for k, v in find(config.objective).from_data(args, values).items()})
    return config


def load(config, tokenizer=None, layout: Layout | None = None) -> Objective:
    """Returns the objective of a config.

    Raises:
      UserError: as `find`; no such argument, with the nearest name; one of another type than its default.
    """
    cls, known = find(config.objective), arguments(config.objective)
    for name, value in config.objective_args.items():
        choose(name, known, "config.objective_args")
        kind = type(known[name])
        fits = (int, float) if kind is float else kind
        right = isinstance(value, fits) and isinstance(value, bool) == (kind is bool)
        if kind in (bool, int, float, str) and not right:
            raise UserError(f"config.objective_args.{name}={value!r}: expected {kind.__name__}, such as "
                            f"{known[name]!r}")
    objective = cls(config, tokenizer, layout, **config.objective_args)
    if config.encoder and not hasattr(objective, "encoder"):
        raise UserError(f"config.encoder is set, and {config.objective} has one stack, config.model: leave it out")
    return objective


def uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """Returns float64 [n, count] in [0, 1), row i drawn from seeds[i] (uint64 [n]) alone.

    A NumPy generator for each example would cost more than a packed row's other work.

    Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators, figure 17 (SplitMix64).
    """
    x = seeds[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


def document_positions(segments: np.ndarray) -> np.ndarray:
    """Returns int32 [n, T]: of each token of packed rows, how many of its own segment are before it."""
    fresh = np.ones(segments.shape, bool)
    np.not_equal(segments[:, 1:], segments[:, :-1], out=fresh[:, 1:])
    first = np.flatnonzero(fresh).astype(np.int32)   # of each document's piece, counted over all rows
    lengths = np.diff(first, append=segments.size)
    return (np.arange(segments.size, dtype=np.int32) - np.repeat(first, lengths)).reshape(segments.shape)


def check_stacks(arch, encoder, source_length: int, target_length: int, layout: Layout | None, rules) -> None:
    """Returns nothing. Raises UserError where an encoder and a decoder do not go together, or not with the mesh.

    rules: (whether it holds, what to say of the config where not), of the objective.
    """
    for holds, text in [
            (arch.causal and arch.cross_attention, "model.causal and model.cross_attention must be True: it is the "
             "decoder"),
            (not encoder.causal and not encoder.cross_attention, "encoder.causal and encoder.cross_attention must be "
             "False"),
            *rules,
            (not arch.num_experts and not encoder.num_experts, "num_experts: experts are causal_lm's; set it to 0")]:
        if not holds:
            raise UserError(f"config.{text}")
    if layout is not None:
        model.check(encoder, source_length, layout)
        model.check(arch, target_length, layout)
        pipeline.schedule(encoder, layout)

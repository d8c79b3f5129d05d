"""Batch t of a run as a pure function of (config, seed, t), and its prefetching by Grain.

The data state of a run is its step: resuming is starting at a step, and any number of hosts see
rows of one and the same global batch. Nothing here knows about tokens: records come from
sources (`mixture.py`), of packed text or of separate examples as the objective reads, and examples
from the objective.

Try:  python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/x
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fm_jax import tokenizer as tokenizers
from fm_jax.data.examples import Examples
from fm_jax.data.mixture import InOrder, Mixture, hash_ints
from fm_jax.data.prepared import CHAT_FORMAT, KINDS, Rows, read_manifest, trained_and_held_out
from fm_jax.errors import UserError, choose

_HELD_OUT_SEED = 2 ** 32    # no run's, so that every run is scored on the same examples


class Batches:
    """One host's part of every batch: any of them by `batch`, or from a step on by `iterate`.

    Attributes:
      num_batches: int, or None where they are endless.
      note: for the user: what of the data is not in them; "" for nothing.
    """

    def __init__(self, examples, objective, *, batch_size: int, num_batches: int | None, seed: int, train: bool = True,
                 rows=None, prefetch_batches: int = 2, note: str = ""):
        """`examples`: a Mixture or InOrder, or what else maps example numbers [n] to records; `train`: Objective's.

        `rows`: of each batch those that this host reads, int [n]; None: all.
        """
        self._examples, self._objective, self.num_batches = examples, objective, num_batches
        self._batch_size, self._seed, self._train, self._prefetch = batch_size, seed, train, prefetch_batches
        self.note = note
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)

    def ids(self, step: int) -> np.ndarray:
        """Returns the global example numbers of this host's rows of batch `step`, int64 [n]."""
        return step * self._batch_size + self._rows

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns this host's rows of batch `step`: {name: array [n, ...]}."""
        ids = self.ids(step)
        return self._objective.examples(self._examples[ids], hash_ints(self._seed, ids), self._train)

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Returns an iterator over the batches from `start_step` on, made ahead by threads."""
        import grain
        stop = 2 ** 62 if self.num_batches is None else self.num_batches
        if start_step >= stop:
            return iter(())
        threads = min(self._prefetch, 4)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch)
        return iter(grain.MapDataset.range(start_step, stop).map(self.batch).to_iter_dataset(options))


def open_batches(config, objective, *, split: str = "train", name: str = "", rows=None) -> Batches:
    """Returns the run's `Batches`: endless and shuffled, or the held-out data once in order. `rows`: as there.

    name: of one of `held_out_sets`; default all of them. Held-out batches end with padding. Where `config.eval.batches`
    is not 0 they are so many, of rows evenly spaced over the whole.

    Raises:
      UserError: missing or damaged data, of another kind than `objective.reads`, another tokenizer than the run's,
        fewer rows than one batch, held-out documents that are trained on.
    """
    choose(split, ("train", "validation"), "split")
    train, held_out = mixtures(config)
    mixture = train if split == "train" else held_out_sets(config)[name] if name else held_out
    kind = choose(objective.reads, KINDS, "`reads` of the objective")
    manifests = {folder: read_manifest(folder, kind) for folder, _ in train + held_out}
    _check_held_out(train, held_out)
    if len(teachers := {str(manifests[folder].get("teacher")) for folder, _ in mixture}) > 1:
        raise UserError(f"{', '.join(folder for folder, _ in mixture)}: one has another teacher than the rest, or none "
                        f"({', '.join(sorted(teachers))}): annotate all with one")
    chats = any(manifests[folder]["format"] == CHAT_FORMAT for folder, _ in mixture)
    sources = [_open(folder, split, kind, config.seq_len, loss_mask=chats) for folder, _ in mixture]
    cut = sum(source.cut for source in sources) if kind == "packed" else 0
    note = f"{cut:,} chats are longer than a row, and end with it: config.seq_len={config.seq_len}" if cut else ""
    if kind == "packed":    # of separate examples the run's own tokenizer makes tokens
        _check_tokenizers(config, sources)
    shared = dict(batch_size=config.batch_size, rows=rows, prefetch_batches=config.data.prefetch_batches, note=note)
    if split == "validation":
        examples = InOrder(sources, config.eval.batches * config.batch_size or None)
        count = -(-len(examples) // config.batch_size)
        return Batches(examples, objective, num_batches=count, seed=_HELD_OUT_SEED, train=False, **shared)
    examples = Mixture(sources, [weight for _, weight in mixture], config.seed)
    if examples.examples_per_epoch < config.batch_size:
        what, remedy = ("examples", "") if kind == "examples" else (
            f"rows of {config.seq_len} tokens", " or --config.seq_len")
        raise UserError(f"--config.data.train={config.data.train} has {examples.examples_per_epoch} {what}, fewer than "
                        f"one batch of {config.batch_size}: prepare more, or set a smaller --config.batch_size{remedy}")
    return Batches(examples, objective, num_batches=None, seed=config.seed, **shared)


def examples_per_epoch(config) -> int:
    """Returns the number of training rows or examples, of all folders of the mixture together."""
    return sum(len(_open(folder, "train", read_manifest(folder)["kind"], config.seq_len))
               for folder, _ in parse_mixture(config.data.train, "data.train"))


def values(config) -> dict[str, list]:
    """Returns of each field of the training examples its distinct strings and whole numbers, as `examples` keeps them.

    {} of packed text.
    """
    mixture = parse_mixture(config.data.train, "data.train")
    known = [read_manifest(folder).get("values", {}) for folder, _ in mixture]
    return {field: list(dict.fromkeys(value for each in known for value in each[field]))
            for field in known[0] if all(field in each for each in known)}


def _open(folder, split, kind, seq_len, loss_mask=False):
    return Examples(folder, split) if kind == "examples" else Rows(folder, split, seq_len, loss_mask)


def load_tokenizer(config) -> tokenizers.Tokenizer | None:
    """Returns the run's tokenizer: `config.data.tokenizer`, or else the one stored with the training data, if any."""
    folder = parse_mixture(config.data.train, "data.train")[0][0]
    if config.data.tokenizer:
        return tokenizers.load(config.data.tokenizer)
    return tokenizers.load(Path(folder) / "tokenizer") if read_manifest(folder)["tokenizer"] else None


def fingerprints(config) -> dict[str, str]:
    """Returns {folder: fingerprint} of all prepared data that the run reads, in a mixture with its share."""
    found = {}
    for mixture in mixtures(config):
        total = sum(weight for _, weight in mixture)
        for folder, weight in mixture:
            share = "" if len(mixture) == 1 else f" x {weight / total:.4f}"
            found.setdefault(folder, read_manifest(folder)["fingerprint"] + share)
    return found


def parse_mixture(text: str, key: str) -> list[tuple[str, float]]:
    """Returns [(folder, weight)] of "data/a" or "data/a:0.7,data/b:0.3"; a missing weight is 1."""
    mixture = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        folder, colon, weight = item.rpartition(":")
        try:
            mixture.append((folder, float(weight)) if colon else (item, 1.0))
        except ValueError as error:
            raise UserError(f"--config.{key}={text}: {weight!r} after the colon is no weight (as in "
                            f"data/a:0.7,data/b:0.3)") from error
    if not mixture:
        raise UserError(f"--config.{key} is empty: name a folder made by python -m fm_jax.prepare")
    return mixture


def mixtures(config):
    """Returns what the run trains on and what it holds out, each as `parse_mixture`."""
    return (parse_mixture(config.data.train, "data.train"),
            [folder for folders in held_out_sets(config).values() for folder in folders])


def held_out_sets(config) -> dict[str, list[tuple[str, float]]]:
    """Returns {name: as `parse_mixture`} of "english=data/a,code=data/b": what is measured apart; one "" without names.

    A name that comes twice has both folders.
    """
    text = config.data.validation or config.data.train
    key, sets = "data.validation" if config.data.validation else "data.train", {}
    named = [re.fullmatch(r"\s*(\w+)=(.*)", part) for part in text.split(",") if part.strip()]
    if not config.data.validation or not any(named):
        return {"": parse_mixture(text, key)}
    if not all(named):
        raise UserError(f"--config.{key}={text}: name each folder, as in english=data/a,code=data/b, or none")
    for each in named:
        sets.setdefault(each[1], []).extend(parse_mixture(each[2], key))
    return sets


def _check_held_out(train, held_out):
    """Raises UserError where a document of `held_out` is in the train split of a folder of `train`."""
    for ours, _ in train:
        for theirs, _ in held_out:
            if shared := trained_and_held_out(ours, theirs):
                what = KINDS[read_manifest(ours)["kind"]].split()[-1].replace("text", "documents")
                raise UserError(f"{shared} {what} that {theirs} holds out are trained on in {ours}: prepare them "
                                f"with the same --validation_frac")


def _check_tokenizers(config, sources):
    wanted = load_tokenizer(config).fingerprint
    path = config.data.tokenizer or Path(parse_mixture(config.data.train, "data.train")[0][0]) / "tokenizer"
    for source in sources:
        if source.tokenizer_fingerprint != wanted:
            raise UserError(f"{source.folder} was tokenized with another tokenizer than the run's, {path}: prepare it "
                            f"again with --tokenizer={path}")

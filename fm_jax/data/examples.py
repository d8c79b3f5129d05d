"""Prepared data of separate examples: labelled texts, pairs, questions, pictures. Making and reading its folder.

    manifest.json            as of packed text, and `values`: of each field its distinct strings and whole numbers in
                             the train split, where they are a thousand at most, such as the names of its labels;
                             and `blobs`: the fields that hold bytes
    tokenizer/               what the examples are meant for; a run may take another, since nothing here is tokenized
    train/ validation/
      records.jsonl          the records as they came, one JSON object a line, so that an error can name a line; of a
                             field of bytes, where they begin in blobs.bin, and how many they are
      blobs.bin              the bytes of files, such as a PNG, one behind the other; equal ones once
      offsets.int64          where in it each record begins, and its length
      digests.uint64         hash of what each record is split by, in the order of the records

An objective that reads these says `reads = "examples"`: its `examples` gets a list of `Record`s, in which None is the
padding behind the last one and becomes an example of weight 0.

The examples lie in the order of the sources. Equal records count once. The held-out ones are given, and leave the
train split where they are in it too, or else are those whose hash is in the first `validation_frac` of its range, as
of packed text. The hash is of the fields `split_by`, so that, say, all questions on one text are on one side.

Try:  python -m fm_jax.prepare --examples --source x.jsonl --tokenizer bytes --output data/x
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import images as images_lib
from fm_jax import tokenizer as tokenizers
from fm_jax.data import prepared
from fm_jax.data.documents import Source
from fm_jax.errors import UserError, choose

_MOST_VALUES = 1000     # ImageNet's classes, among the largest sets of labels


class Record(dict):
    """A record of a prepared folder. `place`: its file and line, for errors."""

    def __init__(self, fields, place: str):
        super().__init__(fields)
        self.place = place


def place_of(record: dict) -> str:
    """Returns what an error calls a record: its place, or its beginning where it comes from no folder."""
    return getattr(record, "place", None) or json.dumps(record, ensure_ascii=False, default=repr)[:80]


def field(record: dict, key: str):
    """Returns a field of a record. Raises UserError, with the nearest name, where it has none."""
    if key not in record:
        choose(key, record, f"{place_of(record)}: field")
    return record[key]


def prepare(sources: list[Source], output, *, tokenizer: str = "", text_key: str = "text",
            validation_sources: list[Source] = (), validation_frac: float = 0.02, split_by: str = "",
            images: str = "", licence: str = "",
            progress: Callable[[str, int], None] = lambda stage, count: None) -> tuple[dict, bool]:
    """Returns the manifest of `output` and whether it was already there, made from the same sources.

    The folder appears whole or not at all.

    Args:
      tokenizer: path for `tokenizer.load`, "bytes", "sentencepiece:VOCAB_SIZE", which trains one on the fields
        `text_key` (comma-separated) of the train split, or "": none, for data without text.
      validation_sources: the held-out examples; without them `validation_frac` chooses.
      split_by: comma-separated fields; examples that are equal in them are on one side. "": all fields.
      images: comma-separated fields that hold a picture: the bytes of its file, or the file's path from the folder of
        the source. Records with one that cannot be read are left out and counted. Bytes of other fields are taken as
        they are.

    Raises:
      UserError: see the manual of the command; the output holds other data, or damaged; no space.
    """
    prepared.check_frac(validation_frac)
    fields, text_keys, pictures = (list(filter(None, text.split(","))) for text in (split_by, text_key, images))
    vocab_size, trained = prepared.trained_vocab(tokenizer)
    described = lambda sources: [[Path(s.name).name, s.size_bytes, s.sha256] for s in sources]
    request = {
        "format": prepared.FORMAT, "kind": "examples", "sources": described(sources),
        "validation_sources": described(validation_sources), "split_by": fields,
        "tokenizer": [trained, text_keys] if trained else tokenizer and tokenizers.load(tokenizer).fingerprint,
        "validation_frac": None if validation_sources else validation_frac,
        **({"images": pictures} if pictures else {}),
    }

    def write(folder):
        written = _write(folder, sources, validation_sources, validation_frac, fields, pictures, progress)
        made = None
        if vocab_size:
            for key in text_keys:
                choose(key, written["fields"], "--text_key")
            made = tokenizers.train_sentencepiece(_texts(folder, text_keys), vocab_size, folder / "tokenizer")
        elif tokenizer:
            made = tokenizers.load(tokenizer)
            made.save(folder / "tokenizer")
        return {"tokenizer": made and {"fingerprint": made.fingerprint, "vocab_size": made.vocab_size}, **written}

    return prepared.make_folder(output, "examples", request, [*sources, *validation_sources], licence, write)


class Examples:
    """The examples of a split: source[ids int64 [n]] is a list of `Record`s."""

    def __init__(self, folder, split: str):
        manifest, entry = prepared.open_split(folder, split, "examples")
        self.folder = Path(folder)
        self._offsets = np.memmap(self.folder / split / "offsets.int64", "<i8", "r")
        self._records = np.memmap(self.folder / split / "records.jsonl", np.uint8, "r")
        self._fields, blobs = manifest.get("blobs", []), self.folder / split / "blobs.bin"
        self._blobs = np.memmap(blobs, np.uint8, "r") if blobs.is_file() else None
        self._len = entry["examples"]

    def __len__(self):
        return self._len

    def __getitem__(self, ids) -> list[Record]:
        prepared.check_mapped([self._offsets, self._records, *([] if self._blobs is None else [self._blobs])])
        ids = np.asarray(ids, np.int64)
        found = [Record(json.loads(self._records[begin:end].tobytes()), f"{self._records.filename}, line {i + 1}")
                 for i, begin, end in zip(ids, self._offsets[ids], self._offsets[ids + 1])]
        for record in found:
            for name in self._fields:
                if name in record:
                    begin, size = record[name]
                    record[name] = self._blobs[begin : begin + size].tobytes() if size else b""
        return found


def _write(folder, sources, validation_sources, validation_frac, split_by, pictures, progress):
    """Returns the manifest's account of the two splits, having written them."""
    splits = {split: _Split(folder / split) for split in prepared.SPLITS}
    counts = dict.fromkeys(("read", "empty", "duplicate", "held_out", "unreadable"), 0)
    seen, values, blobs, why = set(), {}, {}, ""
    try:
        for given, source in [*((True, s) for s in validation_sources), *((False, s) for s in sources)]:
            for place, record in source.records():
                counts["read"] += 1
                progress("reading", 1)
                if not record:
                    counts["empty"] += 1
                    continue
                try:
                    record = _with_pictures(record, pictures, source, place)
                except UserError as error:
                    counts["unreadable"] += 1
                    why = why or str(error)
                    continue
                for name, value in record.items():
                    if blobs.setdefault(name, isinstance(value, bytes)) != isinstance(value, bytes):
                        raise UserError(f"{place}: {name!r} is {type(value).__name__}, and bytes of a file in other "
                                        "records, or the other way round")
                line = functools.partial(_line, record, place)
                line(lambda data: [0, 0])   # what it cannot hold is refused before anything is written of it
                whole = prepared.digest_of(_canonical(record))
                key = whole
                if split_by:
                    key = prepared.digest_of(_canonical([_field(record, f, place) for f in split_by]))
                digest = int.from_bytes(key[:8], "big")
                if whole in seen:
                    counts["duplicate"] += 1
                elif given or not validation_sources and digest < int(validation_frac * 2 ** 64):
                    splits["validation"].add(line, digest)
                elif validation_sources and digest in splits["validation"].held:
                    counts["held_out"] += 1
                else:
                    splits["train"].add(line, digest)
                    _count_values(values, record)
                seen.add(whole)
    finally:
        for split in splits.values():
            split.close()
    names = ", ".join(s.name for s in sources[:3]) + (", ..." if len(sources) > 3 else "")
    sizes = {split: len(each.held) for split, each in splits.items()}
    if not any(sizes.values()):
        raise UserError(f"no examples in {names}: {counts['read']} records, " + (
            f"none with a picture that can be read; the first: {why}" if why else "all empty"))
    empty = next((split for split in prepared.SPLITS if not sizes[split]), None)
    if empty and validation_sources:
        raise UserError(f"no example is left for the {empty} split of --source and --validation_source")
    if empty and validation_frac != {"train": 1, "validation": 0}[empty]:
        raise UserError(f"{names}: none of {sum(sizes.values())} examples falls into the {empty} split with "
                        f"--validation_frac={validation_frac}: change it (0: hold out nothing, 1: everything)")
    return {"examples_read": counts["read"], "examples_empty": counts["empty"],
            "examples_duplicate": counts["duplicate"], "examples_also_held_out": counts["held_out"],
            "examples_unreadable": counts["unreadable"], "first_unreadable": why,
            "blobs": sorted(name for name, is_blob in blobs.items() if is_blob),
            "splits": {name: {"examples": s.count, "bytes": s.size} for name, s in splits.items()},
            "fields": sorted(values),
            "values": {f: sorted(v, key=lambda x: (isinstance(x, str), x)) for f, v in sorted(values.items()) if v}}


class _Split:
    """Writes the files of a split. `held`: the digests of its examples."""

    def __init__(self, folder):
        folder.mkdir()
        self._folder = folder
        self.count, self.size, self.held = 0, 0, set()
        self._files = [open(folder / name, "wb")
                       for name in ("records.jsonl", "offsets.int64", "digests.uint64", "blobs.bin")]
        self._blobs, self._blob_bytes = {}, 0   # hash -> place

    def add(self, line, digest):
        """line: what returns a record's, of a function that puts bytes somewhere and returns where."""
        records, offsets, digests, _ = self._files
        line = line(self._put)
        records.write(line)
        offsets.write(np.array([self.size], "<i8").tobytes())
        digests.write(np.array([digest], "<u8").tobytes())
        self.count, self.size = self.count + 1, self.size + len(line)
        self.held.add(digest)

    def _put(self, data):
        digest = prepared.digest_of(data)
        if digest not in self._blobs:
            self._blobs[digest] = [self._blob_bytes, len(data)]
            self._files[3].write(data)
            self._blob_bytes += len(data)
        return self._blobs[digest]

    def close(self):
        self._files[1].write(np.array([self.size], "<i8").tobytes())
        for file in self._files:
            file.close()
        if not self._blob_bytes:
            (self._folder / "blobs.bin").unlink()


def _with_pictures(record, fields, source, place):
    """Returns a record with the bytes of its pictures' files. Raises UserError where one cannot be read."""
    for name in fields:
        value = field(Record(record, place), name)
        if isinstance(value, str):
            try:
                value = Path(source.name).parent.joinpath(value).read_bytes()
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                raise UserError(f"{place}: {name} {value!r:.200}: {why}") from None
        if not isinstance(value, bytes):
            raise UserError(f"{place}: {name} is {type(value).__name__}; expected the bytes or the path of a picture")
        images_lib.decode(value, f"{place}: {name}")
        record = record | {name: value}
    return record


def _line(record, place, put):
    record = {name: put(value) if isinstance(value, bytes) else value for name, value in record.items()}
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: has the lone surrogate U+{ord(error.object[error.start]):04X}, which is no Unicode "
                        "text") from error
    except TypeError as error:
        name = next(k for k, v in record.items() if not _is_json(v))
        raise UserError(f"{place}: {name!r} is {type(record[name]).__name__}, which JSON cannot hold; leave the column "
                        "out, or write it as text or numbers") from error


def _is_json(value):
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _canonical(value):
    of_bytes = lambda data: {"blake2b": prepared.digest_of(data).hex()}
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=of_bytes).encode()


def _field(record, name, place):
    if name not in record:
        raise UserError(f"{place}: no field {name!r} of --split_by (fields here: {', '.join(record)})")
    return record[name]


def _count_values(values, record):
    """Adds a record's strings and whole numbers to {field: set of them, None: too many or of another kind}."""
    for name, value in record.items():
        known = values.setdefault(name, set())
        if known is None:
            continue
        items = value if isinstance(value, list) else [value]
        if all(isinstance(v, (str, int)) for v in items):
            known.update(items)
        elif value is not None:
            values[name] = None
        if values[name] is not None and len(known) > _MOST_VALUES:
            values[name] = None


def _texts(folder, keys) -> Iterator[str]:
    """Yields the texts of the train split: of each record its fields `keys`, those that are text or lists of words."""
    with open(folder / "train" / "records.jsonl", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            for value in (record.get(key) for key in keys):
                if isinstance(value, list):
                    value = " ".join(v for v in value if isinstance(v, str))
                if isinstance(value, str):
                    yield value

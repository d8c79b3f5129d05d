"""Prepared data: a folder of memory-mapped token shards with a manifest. Making, checking and reading it.

    manifest.json            counts, fingerprints, licence, size and sha256 of every other file
    tokenizer/               the tokenizer that made the tokens
    train/ validation/
      00000.tokens ...       token ids, little-endian uint16 (uint32 where the vocabulary is larger)
      00000.loss_mask ...    of chats: a byte for each token, 1 where the assistant says it
      starts.int64           position of each document's first token in the split, and the split's length
      digests.uint64         hash of each document's text, ascending
      teacher.ids, teacher.logprobs   where `fm_jax.annotate` put them: of each token the likeliest next ones
    validation/text.jsonl.gz the held-out documents as text, for compressors and other baselines

Each document is BOS, its tokens, EOS. With both ends inside the document's own segment every token of
the text is predicted from something that the model has seen, and so is the end, so that the loss
summed over a split (all targets but the BOSs) over its text's bytes is exactly bits per byte. A
tokenizer with only one of the two tokens uses it at both ends.

A chat is a document that `Tokenizer.chat_tokens` makes: nothing is added at its ends, and the loss is
of what the assistant says. Its text is what its tokens say.

Documents lie in the order of a hash of their text: pseudo-random, so that neighbours are
unrelated; the same whatever the order of the sources; and the held-out ones are the first
`validation_frac` of the range of the hash, so that equal texts can never be on both sides, and a
text held out of one prepared folder is held out of all of that fraction or a larger one.

Try:  python -m fm_jax.prepare --source catalogue:tiny_shakespeare --tokenizer bytes --output data/tiny
"""

import collections
import concurrent.futures
import contextlib
import difflib
import errno
import functools
import gzip
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fm_jax import tokenizer as tokenizers
from fm_jax.data.documents import Source
from fm_jax.errors import UserError, choose

FORMAT, CHAT_FORMAT = 2, 3     # of text; with loss masks, which an older version would not heed
SPLITS = ("train", "validation")
KINDS = {"packed": "packed text", "examples": "separate examples"}
_BUCKETS = 128          # spool files: a corpus of 100 GB sorts in 0.8 GB of memory; open files stay below 256
_CHUNK_BYTES = 1 << 20  # text handed to a worker at once
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
                 errno.ENOTEMPTY)
_RECORD = struct.Struct("<16sQ")    # spool record: digest, bytes of text that follow


def prepare(sources: list[Source], tokenizer: str, output, *, text_key: str = "text", separator: str = "",
            chat: bool = False, chat_template: str | None = None, validation_frac: float = 0.02,
            shard_tokens: int = 100_000_000, licence: str = "", workers: int = 1,
            progress: Callable[[str, int], None] = lambda stage, documents: None) -> tuple[dict, bool]:
    """Returns the manifest of `output` and whether it was already there, made from the same sources.

    The folder appears whole or not at all. The result does not depend on `workers`, nor on the
    order of the sources.

    Args:
      tokenizer: path for `tokenizer.load`, "bytes", or "sentencepiece:VOCAB_SIZE", which trains one
        on the train split.
      text_key, separator, chat: how `sources` were opened; part of the fingerprint.
      chat_template: takes the place of the tokenizer's own.
      shard_tokens: a shard is closed before it would exceed this; a document is never divided.
      progress: called with a stage ("reading", "tokenizing") and the documents done since the last call.

    Raises:
      UserError: see the manual of the command; the output holds other data, or damaged; no space.
    """
    check_frac(validation_frac)
    if shard_tokens < 1 or workers < 1:
        raise UserError(f"--shard_tokens={shard_tokens} and --workers={workers} must be positive")
    vocab_size, trained = trained_vocab(tokenizer)
    given = None if trained else tokenizers.load(tokenizer)
    if chat:
        chat_template = chat_template or (given and given.chat_template)
        if chat_template is None:
            raise UserError(f"--chat: the tokenizer {tokenizer} has no chat template; give one, --chat_template=FILE, "
                            "or --chat_template=plain")
    request = {
        "format": CHAT_FORMAT if chat else FORMAT,
        "sources": sorted([os.path.basename(s.name), s.size_bytes, s.sha256] for s in sources),
        "text_key": text_key, "separator": separator,
        "tokenizer": trained or given.fingerprint,
        "validation_frac": validation_frac, "shard_tokens": shard_tokens,
    } | ({"chat_template": hashlib.sha256(chat_template.encode()).hexdigest()} if chat else {})

    def write(partial):
        spool = _Spool(partial / "spool", sources, validation_frac, progress)
        if vocab_size:
            texts = (data.decode() for _, data in spool.documents("train"))
            said = ("\n".join(m["content"] for m in json.loads(text)) for text in texts) if chat else texts
            made = tokenizers.train_sentencepiece(said, vocab_size, partial / "tokenizer")
        else:
            made = given
        if chat:
            made.chat_template = chat_template
        made.save(partial / "tokenizer")
        made = tokenizers.load(partial / "tokenizer")
        splits = {split: _write_split(partial, split, spool, made, chat, shard_tokens, workers, progress)
                  for split in SPLITS}
        shutil.rmtree(partial / "spool")
        return {
            "tokenizer": {"fingerprint": made.fingerprint, "vocab_size": made.vocab_size},
            "token_dtype": _token_dtype(made).str,
            "documents_read": spool.read, "documents_empty": spool.empty, "documents_duplicate": spool.duplicate,
            "splits": splits,
        }

    return make_folder(output, "packed", request, sources, licence, write)


def make_folder(output, kind: str, request: dict, sources: list[Source], licence: str,
                write: Callable[[Path], dict]) -> tuple[dict, bool]:
    """Returns the manifest of the prepared folder `output` and whether it was already there, made by an equal request.

    `write` fills an empty folder and returns what the manifest says beside its kind, fingerprint, request, licence,
    sources and the table of files.

    Raises:
      UserError: the output holds other data, or damaged; no space.
    """
    output = Path(output)
    if output.exists():
        return _reuse(output, kind, request, licence), True
    partial = output.parent / f".{output.name}.partial-{platform.node()}-{os.getpid()}"
    try:
        _remove_leftovers(partial)
        partial.mkdir(parents=True)
        manifest = {
            "format": request["format"], "kind": kind,
            "fingerprint": hashlib.sha256(json.dumps(request).encode()).hexdigest(),
            "request": request,
            "licence": licence or ", ".join(sorted({s.licence for s in sources if s.licence})) or "unknown",
            "sources": [{"name": s.name, "size_bytes": s.size_bytes, "sha256": s.sha256, "licence": s.licence}
                        for s in sources],
            **write(partial),
            "files": _file_table(partial),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        _sync(partial)      # a power cut must not leave a whole folder with hollow files
        os.rename(partial, output)
    except OSError as error:
        if error.errno in _WRITE_ERRORS:
            raise UserError(f"cannot write --output={output}: {error.strerror}; nothing was left behind, make room or "
                            f"choose another folder") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest, False


def check_frac(validation_frac: float) -> None:
    """Returns nothing. Raises UserError where it is no part of the data."""
    if not 0 <= validation_frac <= 1:
        raise UserError(f"--validation_frac={validation_frac} must be from 0 (nothing is held out) to 1 (everything)")


def read_manifest(folder, kind: str | None = None) -> dict:
    """Returns the manifest of a prepared folder after checking that every file is there in its full size.

    Raises:
      UserError: no such folder, not a prepared one, of another format, or a file missing or cut short; not of the
        `kind` ("packed", "examples") that is needed.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        parent = folder.parent
        near = difflib.get_close_matches(folder.name, os.listdir(parent), n=1) if parent.is_dir() else []
        hint = f"did you mean {str(parent / near[0])!r}?" if near and near[0] != folder.name else \
            "make it with python -m fm_jax.prepare"
        what = "no manifest.json in it" if folder.is_dir() else "no such folder"
        raise UserError(f"no prepared data at '{folder}' ({what}; {hint})")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): prepare the folder again") from error
    if manifest.get("format") not in (FORMAT, CHAT_FORMAT):
        raise UserError(f"{folder}: prepared in format {manifest.get('format')}, this version reads {FORMAT} and "
                        f"{CHAT_FORMAT}: prepare it again")
    manifest.setdefault("kind", "packed")   # folders made before there were others
    if kind not in (None, manifest["kind"]):
        raise UserError(f"{folder} holds {KINDS[manifest['kind']]}, and what reads it takes {KINDS[kind]}: prepare it "
                        f"{'with' if kind == 'examples' else 'without'} --examples, or set another --config.objective")
    for name, entry in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size_bytes"]:
            raise UserError(f"{file}: {'missing' if size is None else f'{size} bytes'}, the manifest says "
                            f"{entry['size_bytes']} bytes: copy or prepare the folder again")
    return manifest


def verify(folder) -> None:
    """Returns nothing. Reads every file and raises UserError for the first whose sha256 is not the manifest's."""
    for name, entry in read_manifest(folder)["files"].items():
        if _sha256(Path(folder, name)) != entry["sha256"]:
            raise UserError(f"{Path(folder, name)}: damaged, its sha256 is not the manifest's: remove the folder and "
                            f"copy or prepare it again")


def texts(folder, split: str) -> Iterator[str]:
    """Yields the documents of a split in its order: the held-out ones as they were, the others from their tokens."""
    manifest, folder = read_manifest(folder, "packed"), Path(folder)
    if choose(split, SPLITS, "split") == "validation":
        with gzip.open(folder / "validation" / "text.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]
        return
    tokenizer = tokenizers.load(folder / "tokenizer")
    starts, first = np.memmap(folder / split / "starts.int64", "<i8", "r"), 0
    for shard in manifest["splits"][split]["shards"]:
        tokens = np.memmap(folder / shard["file"], manifest["token_dtype"], "r")
        bounds = starts[first : first + shard["documents"] + 1] - starts[first]
        for begin, end in zip(bounds[:-1], bounds[1:]):
            yield tokenizer.decode(tokens[begin:end])   # its ends are special tokens and have no text
        first += shard["documents"]


def trained_and_held_out(train_folder, held_out_folder) -> int:
    """Returns how many held-out documents, or examples, of the second folder are in the train split of the first."""
    ours, theirs = (read_manifest(folder)["request"] for folder in (train_folder, held_out_folder))
    if ours.get("split_by") != theirs.get("split_by"):
        raise UserError(f"{held_out_folder} was split by {theirs.get('split_by')!r} and {train_folder} by "
                        f"{ours.get('split_by')!r}, so that nobody knows what is in both: prepare them with the same "
                        "--split_by")
    fractions = [request["validation_frac"] for request in (ours, theirs)]
    if None not in fractions and fractions[1] <= fractions[0]:    # held out there is held out here
        return 0
    digests = lambda folder, split: np.fromfile(Path(folder, split, "digests.uint64"), "<u8")
    return int(np.isin(digests(held_out_folder, "validation"), digests(train_folder, "train")).sum())


def open_split(folder, split: str, kind: str) -> tuple[dict, dict]:
    """Returns the manifest of a prepared folder of this kind and its part on a split.

    Raises:
      UserError: as `read_manifest`; the split is empty.
    """
    choose(split, SPLITS, "split")
    manifest = read_manifest(folder, kind)
    entry = manifest["splits"][split]
    if not entry[{"packed": "documents", "examples": "examples"}[kind]]:
        remedy = "smaller --validation_frac" if split == "train" else (
            "larger --validation_frac, name other data in --config.data.validation, or set --config.eval.every=0")
        raise UserError(f"{folder}: its {split} split is empty; prepare it with a {remedy}")
    return manifest, entry


def check_mapped(files) -> None:
    """Raises UserError where a memory-mapped file is shorter than at the start: reading what it lost is a bus error."""
    for file in files:
        try:
            size = os.stat(file.filename).st_size
        except OSError as error:
            raise UserError(f"{file.filename}: cannot be read any more ({error.strerror}); put the file back, and "
                            "the same command continues") from error
        if size < file.nbytes:
            raise UserError(f"{file.filename}: has {size} bytes, and had {file.nbytes} when the run began; put the "
                            "file back, and the same command continues")


class Rows:
    """Packed rows of a split: row r is tokens [r T, r T + T] of the split's stream, T = seq_len.

    Rows overlap by one token, so that inputs [:, :-1] and targets [:, 1:] meet every token once as a
    target. The last row is padded, in every split.

    Of chats, a row has as many neighbours whole as fit into T + 1 tokens, and is padded. One that is longer has a row
    of its own, and ends with it: `cut`.

    Attributes:
      seq_len, tokens: int.
      masked: whether there are loss masks: of chats.
      teacher: what the manifest says of it, None where there is none.
      cut: chats longer than a row.
      tokenizer_fingerprint: from the manifest.
    """

    def __init__(self, folder, split: str, seq_len: int, loss_mask: bool = False):
        """`loss_mask`: records have one, also those of text."""
        manifest, entry = open_split(folder, split, "packed")
        self.folder = Path(folder)
        self.seq_len, self.tokens = seq_len, entry["tokens"]
        self.tokenizer_fingerprint = manifest["tokenizer"]["fingerprint"]
        self._shards = [np.memmap(self.folder / s["file"], manifest["token_dtype"], "r") for s in entry["shards"]]
        self._bounds = np.cumsum([0] + [s["tokens"] for s in entry["shards"]])
        self._starts = np.memmap(self.folder / split / "starts.int64", "<i8", "r")
        self.teacher = manifest.get("teacher")
        if self.teacher:
            if self.teacher["seq_len"] != seq_len:
                raise UserError(f"{folder}: its teacher saw rows of {self.teacher['seq_len']} tokens, and config.seq_len="
                                f"{seq_len}: set that, or annotate the data again")
            self._taught = {name: np.memmap(self.folder / split / f"teacher.{name.removeprefix('teacher_')}", dtype, "r",
                                            shape=(self.tokens, self.teacher["top_k"]))
                            for name, dtype in (("teacher_ids", manifest["token_dtype"]), ("teacher_logprobs", "<f2"))}
        self.masked, self.cut = "loss_mask" in entry["shards"][0], 0
        self._gives_mask, self._masks = self.masked or loss_mask, None
        if self.masked:
            self._masks = [np.memmap(self.folder / s["loss_mask"], np.uint8, "r") for s in entry["shards"]]
            starts = np.array(self._starts)
            self._first = starts[_whole(starts, seq_len + 1)]
            self.cut = int((np.diff(starts) > seq_len + 1).sum())

    def __len__(self):
        return len(self._first) - 1 if self.masked else -(-(self.tokens - 1) // self.seq_len)

    def __getitem__(self, rows) -> dict[str, np.ndarray]:
        """Returns {"tokens", "segment_ids"}, int32 [n, T+1], of an array of row numbers [n].

        With them, where there are, "loss_mask", uint8 [n, T+1], "teacher_ids", int32, and "teacher_logprobs", float32
        [n, T, top_k]: what is expected behind each token. Segments count the documents of a row from 1; padding is
        segment 0 and token 0.
        """
        start, end = self.extent(rows)
        shards = np.unique(np.searchsorted(self._bounds, [start, end - 1], "right") - 1)
        files = (self._shards, self._masks) if self.masked else (self._shards,)
        check_mapped([self._starts, *(file[shard] for shard in shards for file in files)])
        found = {"tokens": self._read(self._shards, start, end), "segment_ids": self._segments(start, end)}
        if self._gives_mask:
            found["loss_mask"] = self._read(self._masks, start, end) if self.masked else np.ones(
                found["tokens"].shape, np.uint8)
        if self.teacher:
            check_mapped(self._taught.values())
            for name, there in self._taught.items():
                found[name] = np.zeros((len(start), self.seq_len, there.shape[1]),
                                       np.int32 if name == "teacher_ids" else np.float32)
                for row, (begin, last) in enumerate(zip(start, end - 1)):
                    found[name][row, : last - begin] = there[begin:last]
        return found

    def extent(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """Returns (start, end) [n] in the split's stream of the rows [n]; inputs are all but the last token."""
        rows = np.asarray(rows, np.int64)
        start, end = (self._first[rows], self._first[rows + 1]) if self.masked else (rows * self.seq_len, self.tokens)
        return start, np.minimum(start + self.seq_len + 1, end)

    def _read(self, shards, start, end):
        out = np.zeros((len(start), self.seq_len + 1), np.uint8 if shards is self._masks else np.int32)
        first = np.searchsorted(self._bounds, start, "right") - 1
        inside = start + self.seq_len < self._bounds[first + 1]
        for shard in np.unique(first[inside]):
            rows = np.flatnonzero(inside & (first == shard))
            windows = np.lib.stride_tricks.sliding_window_view(shards[shard], self.seq_len + 1)
            out[rows] = windows[start[rows] - self._bounds[shard]]
        for row in np.flatnonzero(inside & (end - start <= self.seq_len)):
            out[row, end[row] - start[row]:] = 0
        for row in np.flatnonzero(~inside):     # the few that cross into another shard, or end the split
            at = start[row]
            while at < end[row]:
                shard = np.searchsorted(self._bounds, at, "right") - 1
                to = min(end[row], self._bounds[shard + 1])
                out[row, at - start[row]:to - start[row]] = \
                    shards[shard][at - self._bounds[shard]:to - self._bounds[shard]]
                at = to
        return out

    def _segments(self, start, end):
        # Documents lo to hi start inside a row, behind its first token.
        lo, hi = np.searchsorted(self._starts, start, "right"), np.searchsorted(self._starts, end, "left")
        count = hi - lo
        row = np.repeat(np.arange(len(start)), count)
        document = np.arange(len(row)) + np.repeat(lo - (np.cumsum(count) - count), count)
        segment = np.zeros((len(start), self.seq_len + 1), np.int32)
        segment[:, 0] = 1
        segment[row, self._starts[document] - start[row]] = 1
        np.cumsum(segment, axis=1, out=segment)
        for short in np.flatnonzero(end - start <= self.seq_len):
            segment[short, end[short] - start[short]:] = 0
        return segment


def _whole(starts, room):
    """Returns int64 [rows + 1], the first document of each row: as many neighbours as fit whole, and at least one."""
    first = [0]
    while first[-1] < len(starts) - 1:
        fits = np.searchsorted(starts, starts[first[-1]] + room, "right") - 1
        first.append(max(int(fits), first[-1] + 1))
    return np.array(first)


class _Spool:
    """The documents of all sources, sorted by digest through files, so that memory holds one bucket only.

    A bucket is the documents whose digest has the same first bits; buckets in order, each sorted, are
    the whole in order.
    """

    def __init__(self, folder, sources, validation_frac, progress):
        self._folder, self._held_out = folder, int(validation_frac * 2 ** 64)
        self.read = self.empty = self.duplicate = 0
        folder.mkdir()
        files = [open(self._path(b), "wb") for b in range(_BUCKETS)]
        try:
            for source in sources:
                for text in source.texts():
                    data = text.encode()
                    self.read += 1
                    progress("reading", 1)
                    if not text.strip():
                        self.empty += 1
                        continue
                    digest = digest_of(data)
                    file = files[digest[0] * _BUCKETS // 256]
                    file.write(_RECORD.pack(digest, len(data)))
                    file.write(data)
        finally:
            for file in files:
                file.close()
        names = ", ".join(s.name for s in sources[:3]) + (", ..." if len(sources) > 3 else "")
        if self.read == self.empty:
            raise UserError(f"no text in {names}: {self.read} documents, all empty")
        self.counts = {"train": 0, "validation": 0}
        for split in SPLITS:
            for _, _ in self.documents(split):
                self.counts[split] += 1
        self.duplicate = self.read - self.empty - sum(self.counts.values())
        empty = "train" if not self.counts["train"] else "validation"
        if not self.counts[empty] and validation_frac != {"train": 1, "validation": 0}[empty]:
            raise UserError(f"{names}: none of {sum(self.counts.values())} documents falls into the {empty} split with "
                            f"--validation_frac={validation_frac}: change it (0: hold out nothing, 1: everything), or "
                            f"cut the text into more documents (--document_separator)")

    def documents(self, split):
        """Yields (digest, UTF-8 bytes) of the split's distinct documents in order."""
        for bucket in range(_BUCKETS):
            lowest, highest = (bucket << 64) // _BUCKETS, ((bucket + 1 << 64) // _BUCKETS) - 1
            if lowest >= self._held_out if split == "validation" else highest < self._held_out:
                continue
            last = None
            for digest, data in sorted(self._load(bucket)):
                held_out = int.from_bytes(digest[:8], "big") < self._held_out
                if digest != last and held_out == (split == "validation"):
                    yield digest, data
                last = digest

    def _path(self, bucket):
        return self._folder / f"{bucket:03d}"

    def _load(self, bucket):
        content, at = self._path(bucket).read_bytes(), 0
        while at < len(content):
            digest, length = _RECORD.unpack_from(content, at)
            at += _RECORD.size
            yield digest, content[at:at + length]
            at += length


def _write_split(folder, split, spool, tokenizer, chat, shard_tokens, workers, progress):
    """Returns the split's part of the manifest, having written its files."""
    (folder / split).mkdir()
    shards, position = _Shards(folder, split, shard_tokens, chat), 0
    with contextlib.ExitStack() as stack:
        stack.callback(shards.close)
        create = lambda name: stack.enter_context(open(folder / split / name, "wb"))
        starts, digests = create("starts.int64"), create("digests.uint64")
        # No name and no time in the gzip header: the same documents give the same file.
        raw = split == "validation" and stack.enter_context(
            gzip.GzipFile("", "wb", 6, create("text.jsonl.gz"), mtime=0))
        for texts, tokens, lengths, said in _tokenized(spool.documents(split), folder / "tokenizer", tokenizer, chat,
                                                       workers):
            begins = np.cumsum(lengths) - lengths
            starts.write((position + begins).astype("<i8").tobytes())
            digests.write(np.array([int.from_bytes(digest_of(t)[:8], "big") for t in texts], "<u8").tobytes())
            if chat:
                texts = [tokenizer.decode(tokens[b : b + n]).encode() for b, n in zip(begins, lengths)]
            shards.add(tokens, lengths, np.array([len(t) for t in texts], np.int64), said)
            position += len(tokens)
            if raw:
                for text in texts:
                    raw.write(json.dumps({"text": text.decode()}, ensure_ascii=False).encode() + b"\n")
            progress("tokenizing", len(texts))
        starts.write(np.array([position], "<i8").tobytes())
    total = lambda what: sum(s[what] for s in shards.entries)
    return {"documents": total("documents"), "tokens": position, "bytes": total("bytes"),
            **({"loss_tokens": total("loss_tokens")} if chat else {}), "shards": shards.entries}


def held_out(text: str, validation_frac: float) -> bool:
    """Returns whether `prepare` holds a document out."""
    return int.from_bytes(digest_of(text.encode())[:8], "big") < int(validation_frac * 2 ** 64)


def digest_of(data: bytes) -> bytes:
    """Returns the 16 bytes of a document's hash, of which the first eight, big-endian, say what is held out."""
    return hashlib.blake2b(data, digest_size=16).digest()


class _Shards:
    """Writes documents to numbered shard files of at most `limit` tokens, or of one longer document."""

    def __init__(self, folder, split, limit, masked):
        self._folder, self._split, self._limit, self._masked, self._files = folder, split, limit, masked, ()
        self.entries = []

    def add(self, tokens, lengths, nbytes, mask=None):
        """Appends documents: their tokens concatenated, int64 [n] tokens and bytes of each; a loss mask of tokens."""
        ends, done = np.cumsum(lengths), 0
        while done < len(lengths):
            if not self._files or self.entries[-1]["tokens"] + lengths[done] > self._limit:
                self.close()
                name = f"{self._split}/{len(self.entries):05d}"
                entry = {"file": f"{name}.tokens", "documents": 0, "tokens": 0, "bytes": 0}
                entry |= {"loss_mask": f"{name}.loss_mask", "loss_tokens": 0} if self._masked else {}
                self.entries.append(entry)
                self._files = [open(self._folder / entry[k], "wb") for k in ("file", "loss_mask") if k in entry]
            entry, before = self.entries[-1], ends[done] - lengths[done]
            to = max(np.searchsorted(ends, before + self._limit - entry["tokens"], "right"), done + 1)
            for file, values in zip(self._files, (tokens, mask)):
                file.write(values[before:ends[to - 1]].tobytes())
            if self._masked:
                entry["loss_tokens"] += int(mask[before:ends[to - 1]].sum())
            entry["documents"] += int(to - done)
            entry["tokens"] += int(ends[to - 1] - before)
            entry["bytes"] += int(nbytes[done:to].sum())
            done = to

    def close(self):
        for file in self._files:
            file.close()


def _tokenized(documents, folder, tokenizer, chat, workers):
    """Yields (texts, tokens, lengths, loss mask) of chunks of documents in order.

    texts: list of UTF-8 bytes; tokens: the chunk's documents with their ends, concatenated, in the
    dtype of the shards; lengths: int64 [documents]; loss mask: of chats uint8 [tokens], else None.
    """
    chunks, tokenize = _chunks(documents), _tokenize_chats if chat else _tokenize
    if workers == 1:
        for texts in chunks:
            yield texts, *tokenize(tokenizer, texts)
        return
    # Spawn, not fork: the tokenizers' libraries hold threads.
    context = multiprocessing.get_context("spawn")
    # An interrupt reaches every process of a terminal; this one answers for all.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with concurrent.futures.ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
        pending = collections.deque()
        for texts in chunks:
            pending.append((texts, pool.submit(_tokenize_in_worker, tokenize, str(folder), texts)))
            if len(pending) > 2 * workers:
                texts, future = pending.popleft()
                yield texts, *future.result()
        for texts, future in pending:
            yield texts, *future.result()


def _chunks(documents):
    chunk, size = [], 0
    for _, data in documents:
        chunk.append(data)
        size += len(data)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize(tokenizer, texts):
    bos, eos = document_ends(tokenizer)
    ids = tokenizer.encode_batch([t.decode() for t in texts])
    parts = [part for i in ids for part in ((bos,), i, (eos,))]
    tokens = np.concatenate(parts).astype(_token_dtype(tokenizer))
    return tokens, np.array([len(i) + 2 for i in ids], np.int64), None


def _tokenize_chats(tokenizer, texts):
    made = []
    for text in texts:
        messages = json.loads(text)
        try:
            made.append(tokenizer.chat_tokens(messages))
        except UserError as error:
            raise UserError(f"the chat that begins with {messages[0]['content'][:60]!r}: {error}") from error
    ids, said = zip(*made)
    return (np.concatenate(ids).astype(_token_dtype(tokenizer)), np.array([len(i) for i in ids], np.int64),
            np.concatenate(said).astype(np.uint8))


def _tokenize_in_worker(tokenize, folder, texts):
    return tokenize(_loaded(folder), texts)


@functools.lru_cache(maxsize=1)     # a worker lives for one prepared folder
def _loaded(folder):
    return tokenizers.load(folder)


def document_ends(tokenizer: tokenizers.Tokenizer) -> tuple[int, int]:
    """Returns the ids that a document begins and ends with; the one that there is, where one is missing."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None and eos is None:
        raise UserError("this tokenizer has no beginning- or end-of-text token, so documents could not be told apart: "
                        "name them in a tokenizer_config.json beside it")
    return (eos if bos is None else bos), (bos if eos is None else eos)


def _token_dtype(tokenizer):
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def trained_vocab(tokenizer):
    """Returns (vocabulary size, what defines it) of "sentencepiece:SIZE", or (None, None)."""
    if not re.fullmatch("sentencepiece(:.*)?", tokenizer):
        return None, None
    size = tokenizer.removeprefix("sentencepiece").removeprefix(":")
    if not re.fullmatch("[1-9][0-9]{0,7}", size):
        raise UserError(f"--tokenizer={tokenizer!r}: give the vocabulary size, as in sentencepiece:8192")
    return int(size), f"{tokenizer} by sentencepiece {importlib.metadata.version('sentencepiece')}"


def _remove_leftovers(partial):
    """Removes what killed processes of this machine left of the same output: a name ends in the process's number."""
    for left in partial.parent.glob(".*.partial-*"):
        name, _, process = left.name.rpartition("-")
        if name == partial.name.rpartition("-")[0] and (left == partial or not _runs(int(process))):
            shutil.rmtree(left)


def _runs(process):
    try:
        os.kill(process, 0)     # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:     # another user's
        pass
    return True


def _reuse(output, kind, request, licence):
    if not (output / "manifest.json").is_file():
        raise UserError(f"--output={output} exists and is no prepared data: choose another or remove it")
    manifest = read_manifest(output)
    differs = [k for k in request if request[k] != manifest["request"].get(k)]
    if manifest["kind"] != kind:
        differs = ["kind"]
    if licence and licence != manifest["licence"]:
        differs.append("licence")
    if differs:
        raise UserError(f"--output={output} exists and was prepared differently (in {', '.join(differs)}): choose "
                        f"another or remove it")
    verify(output)
    return manifest


def _file_table(folder):
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): {"size_bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder):
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

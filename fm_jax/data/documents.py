"""Documents from JSONL, Parquet and plain-text files, and from the catalogue, as one stream of strings or records.

Every fault of an input is one `UserError` that names file and line. A chat is the string that `chat_text` makes of it.

Try:  python -c "from fm_jax.data import documents; print(next(documents.open_sources('README.md').texts()))"
"""

import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator

from fm_jax.data import catalogue
from fm_jax.errors import UserError, choose

ROLES = ("system", "user", "assistant")
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """One file or catalogue entry.

    Attributes:
      name: path, or "catalogue:NAME".
      size_bytes, sha256: of the file as stored.
      licence: as far as it is known; else "".
      texts: returns a fresh iterator over the documents.
      records: returns one over (place, dict), the whole records; a place is what an error calls a record.
    """
    name: str
    size_bytes: int
    sha256: str
    licence: str
    texts: Callable[[], Iterator[str]]
    records: Callable[[], Iterator[tuple[str, dict]]]


def open_sources(spec: str, *, text_key: str = "text", separator: str = "", chat: bool = False,
                 cache: str = catalogue.DEFAULT_CACHE) -> list[Source]:
    """Returns the sources that a comma-separated list of globs and `catalogue:NAME`s stands for.

    Files sort by path within a glob; a file named twice counts once.

    Args:
      text_key: the field of JSONL objects or column of Parquet that holds the text.
      separator: plain text is cut into documents here; "": a file is one document.
      chat: documents are chats: the field or column holds their messages.
      cache: folder of downloaded catalogue data.

    Raises:
      UserError: a glob without a match, an unknown kind of file, a separator without plain text to cut, a failed
        download (catalogue.DownloadError).
    """
    sources = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        if item.startswith("catalogue:"):
            entry = catalogue.find(item.removeprefix("catalogue:"))
            archive = catalogue.fetch(entry, cache)
            texts = functools.partial(_catalogue_chats, entry) if chat else entry.texts
            sources[item] = Source(item, archive.size_bytes, archive.sha256, entry.licence,
                                   functools.partial(texts, archive),
                                   functools.partial(_catalogue_records, item, entry, archive))
            continue
        for path in _matches(item):
            texts, records = _readers(path)
            if chat and texts is _plain:
                raise UserError(f"--source: {path!r} is plain text, which has no chats; give them as JSONL or Parquet")
            try:
                sources[path] = Source(path, os.path.getsize(path), _file_sha256(path), "",
                                       functools.partial(texts, path, text_key, separator, chat_text if chat else _checked),
                                       functools.partial(records, path))
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not sources:
        raise UserError(f"--source={spec!r} names nothing: give globs of files, or catalogue:NAME of "
                        f"{', '.join(catalogue.NAMES)}")
    if separator and not any(s.texts.func is _plain for s in sources.values()):
        raise UserError(f"--document_separator={separator!r} cuts plain text (.txt, .md), and --source={spec!r} has "
                        f"none: leave it out")
    return list(sources.values())


def _matches(pattern):
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if paths:
        return paths
    if os.path.isdir(pattern):
        raise UserError(f"--source: {pattern!r} is a folder; name the files in it, such as "
                        f"'{pattern.rstrip('/')}/*.jsonl'")
    folder = os.path.dirname(pattern) or "."
    if os.path.isdir(folder):
        names = sorted(os.listdir(folder))
        near = difflib.get_close_matches(os.path.basename(pattern), names, n=3, cutoff=0.3) or names[:5]
        hint = f"{folder!r} has {', '.join(near)}" if near else f"{folder!r} is empty"
    else:
        hint = f"there is no folder {folder!r}"
    raise UserError(f"--source: {pattern!r} matches no file ({hint})")


def _readers(path):
    """Returns what yields the texts of a file, and what its records."""
    stem = path.lower().removesuffix(".gz").removesuffix(".zst")
    for *readers, endings in ((_jsonl, _jsonl_records, (".jsonl", ".ndjson")),
                              (_plain, _plain_records, (".txt", ".md")),
                              (_parquet, _parquet_records, (".parquet",))):
        if stem.endswith(endings) and (readers[0] is not _parquet or stem == path.lower()):
            return readers
    raise UserError(f"--source: {path!r} is of no known kind (.jsonl, .txt, .md, each also with .gz or .zst; .parquet)")


def _catalogue_chats(entry, archive):
    for key, messages in entry.chats(archive):
        yield chat_text(messages, "messages", f"catalogue:{entry.name}, {key}")


def _jsonl(path, text_key, separator, checked):
    for place, record in _jsonl_records(path):
        if text_key not in record:
            raise UserError(f"{place}: no key {text_key!r} (keys here: {', '.join(map(str, record)) or 'none'}); set "
                            "--text_key")
        yield checked(record[text_key], text_key, place)


def _jsonl_records(path):
    for number, (offset, line) in enumerate(_split(path, b"\n"), 1):
        if not line.strip():
            continue
        text = _utf8(path, line, offset, number)
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: broken JSON, {error.msg} at column {error.colno}; "
                            f"a JSONL file has one object a line") from error
        except ValueError as error:
            raise UserError(f"{path}, line {number}: a whole number of more digits than Python reads; shorten it, or "
                            f"write it as text") from error
        except RecursionError as error:
            raise UserError(f"{path}, line {number}: nested too deep to be read; flatten it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
        yield f"{path}, line {number}", record


def _plain_records(path):
    raise UserError(f"{path}: plain text has no records; --examples takes .jsonl, .parquet and catalogue:NAME")


def _catalogue_records(name, entry, archive):
    for number, record in enumerate(entry.records(archive), 1):
        yield f"{name}, record {number}", record


def _plain(path, text_key, separator, checked):
    number = 1
    for offset, document in _split(path, separator.encode()):
        yield _utf8(path, document, offset, number)
        number += document.count(b"\n") + separator.count("\n")


def _parquet(path, text_key, separator, checked):
    for place, record in _parquet_records(path, text_key):
        yield checked(record[text_key], text_key, place)


def _parquet_records(path, column=None):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column is not None and column not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {column!r} (columns: {', '.join(file.schema_arrow.names)}); "
                                f"set --text_key")
            for batch in file.iter_batches(columns=None if column is None else [column]):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:   # Arrow reports broken files as OSError without errno
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: unreadable Parquet after row {row} ({reason})") from error


def _checked(value, text_key, place):
    if not isinstance(value, str):
        raise UserError(f"{place}: {text_key!r} is {type(value).__name__}, not text; set --text_key")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {text_key!r} has the lone surrogate U+{ord(value[error.start]):04X} at character "
                        f"{error.start}, which is no Unicode text") from error
    return value


def chat_text(messages, key: str, place: str) -> str:
    """Returns a chat as JSON, a list of {"role", "content"}: equal chats give equal text, whatever else they have.

    Raises:
      UserError: no messages, a message without a role of `ROLES` or without content, or no turn of the assistant;
        `place` and `key` say where.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError(f'{place}: {key!r} is no chat, a list of {{"role": ..., "content": ...}}; set --text_key')
    for number, message in enumerate(messages, 1):
        where = f"{place}, message {number}"
        choose(message.get("role"), ROLES, f"{where}: role")
        if not _checked(message.get("content"), "content", where).strip():
            raise UserError(f"{where}, of the {message['role']}: its content is empty; leave the message out")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{place}: a chat of {len(messages)} messages without one of the assistant, from which nothing "
                        "could be learnt; leave it out")
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def _utf8(path, data, offset, number):
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}: byte 0x{data[error.start]:02X} at offset {offset + error.start} "
                        f"{'of the unpacked text ' if path.lower().endswith(('.gz', '.zst')) else ''}is not UTF-8; "
                        f"convert the file, e.g. with iconv") from error


def _split(path, separator):
    """Yields (byte offset, bytes) of each part of the unpacked file; an empty separator cuts nowhere."""
    parts, offset, seam = [], 0, b""
    for chunk in _chunks(path):
        parts.append(chunk)
        seam += chunk                   # the end of the last chunk, where a separator may begin, and this one
        if separator and separator in seam:
            *whole, rest = b"".join(parts).split(separator)
            for part in whole:
                yield offset, part
                offset += len(part) + len(separator)
            parts = [rest]
            seam = rest
        seam = seam[max(len(seam) - len(separator) + 1, 0):]
    if last := b"".join(parts):
        yield offset, last


def _chunks(path):
    """Yields the unpacked bytes of a file, in chunks of about a megabyte."""
    lower = path.lower()
    with open(path, "rb") as file:
        if lower.endswith(".zst"):
            yield from _zst_chunks(path, file)
            return
        stream = gzip.GzipFile(fileobj=file) if lower.endswith(".gz") else file
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: truncated or broken gzip file ({error})") from error


def _zst_chunks(path, file):
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: .zst needs zstandard: pip install zstandard") from error
    # Not `stream_reader`, which ends without a word where the file is cut.
    frame, data = None, b""
    try:
        while data := data or file.read(_CHUNK_BYTES):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(data)
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: broken zstd file ({error})") from error
    if frame is not None:
        raise UserError(f"{path}: truncated zstd file (its last frame has no end)")


def _file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Reading documents: every format gives the same texts, and every fault names file and line."""

import gzip
import json
import random

import pytest

from fm_jax.data import documents
from fm_jax.errors import UserError

TEXTS = ["plain", "two\nlines\n", "caf\u00e9 \u65e5\u672c \U0001f600", "  blanks\t", "line\u2028separator \x85"]


def read(spec, **kwargs):
    return [text for source in documents.open_sources(str(spec), **kwargs) for text in source.texts()]


def jsonl(texts, key="text"):
    return "".join(json.dumps({"id": n, key: t}, ensure_ascii=n % 2 == 0) + "\n" for n, t in enumerate(texts)).encode()


def write(path, data):
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_jsonl_and_its_compressed_forms_give_the_texts(tmp_path, name):
    assert read(write(tmp_path / name, jsonl(TEXTS))) == TEXTS
    assert read(write(tmp_path / name, b"\xef\xbb\xbf" + jsonl(TEXTS)[:-1] + b"\n\n")) == TEXTS     # mark, blank line
    assert read(write(tmp_path / name, jsonl(TEXTS, "body")), text_key="body") == TEXTS


def test_parquet_gives_the_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(5)), "text": TEXTS}), path, row_group_size=2)
    assert read(path) == TEXTS
    with pytest.raises(UserError, match="no column 'body'.*id, text.*--text_key"):
        read(path, text_key="body")
    with pytest.raises(UserError, match="x.parquet, row 1: 'id' is int"):
        read(path, text_key="id")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="x.parquet: unreadable Parquet"):
        read(path)


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst"])
def test_plain_text_is_one_document_or_cut_at_the_separator(tmp_path, name):
    path = write(tmp_path / name, "a\u00e9\n\nb\n\n\n\nc\n".encode())
    assert read(path) == ["a\u00e9\n\nb\n\n\n\nc\n"]
    assert read(path, separator="\n\n") == ["a\u00e9", "b", "", "c\n"]
    other = write(tmp_path / "y.jsonl", jsonl(TEXTS))
    assert read(f"{path},{other}", separator="\n\n") == ["a\u00e9", "b", "", "c\n", *TEXTS]
    for nothing_to_cut in (other, "catalogue:tiny_shakespeare"):
        with pytest.raises(UserError, match="--document_separator='\\\\n' cuts plain text .* leave it out"):
            documents.open_sources(str(nothing_to_cut), separator="\n")


def test_separators_across_chunk_borders_are_found(tmp_path, monkeypatch):
    rng = random.Random(0)
    for separator in ("\n", "\n\n", "=-=-="):
        text = "".join(rng.choice(["a", "\n", "=", "-", separator]) for _ in range(500))
        path = write(tmp_path / "x.txt", text.encode())
        wanted = text.split(separator)
        for size in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(documents, "_CHUNK_BYTES", size)
            assert read(path, separator=separator) == (wanted if wanted[-1] else wanted[:-1])


def test_globs_lists_and_fingerprints(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.jsonl", jsonl([f"text {n}"]))
    write(tmp_path / "note.txt", b"note")
    spec = f"{tmp_path}/*.jsonl, {tmp_path}/note.txt,{tmp_path}/1.jsonl"
    assert read(spec) == ["text 0", "text 1", "text 2", "note"]
    sources = documents.open_sources(spec)
    assert len({s.sha256 for s in sources}) == 4 and sources[3].size_bytes == 4


@pytest.mark.parametrize("name, data, message", [
    ("x.jsonl", jsonl(["a", "b"]) + b'{"text": "c"\n', "x.jsonl, line 3: broken JSON"),
    ("x.jsonl.gz", jsonl(["a", "b"]) + b'nonsense\n', "x.jsonl.gz, line 3: broken JSON"),
    ("x.jsonl", jsonl(["a"]) + b"[1]\n", "x.jsonl, line 2: expected a JSON object, found list"),
    ("x.jsonl", b'{"body": "a", "id": 1}\n', r"x.jsonl, line 1: no key 'text' \(keys here: body, id\); set --text_key"),
    ("x.jsonl", jsonl(["a"]) + b'{"n": ' + b"1" * 5000 + b"}\n", "x.jsonl, line 2: a whole number of more digits"),
    ("x.jsonl", jsonl(["a"]) + b'{"n": ' + b"[" * 100_000 + b"\n", "x.jsonl, line 2: nested too deep"),
    ("x.jsonl", b'\n{"text": 3}\n', "x.jsonl, line 2: 'text' is int, not text"),
    ("x.jsonl", b'{"text": "a\\ud800"}\n', "x.jsonl, line 1: 'text' has the lone surrogate U.D800 at character 1"),
    ("x.jsonl", jsonl(["a"]) + b'{"text": "\xff"}\n', "x.jsonl, line 2: byte 0xFF at offset 33 is not UTF-8"),
    ("x.txt", b"one\ntwo\nth\xe9ee", "x.txt, line 3: byte 0xE9 at offset 10 is not UTF-8"),
    ("x.txt.gz", b"one\ntwo\nth\xe9ee", "x.txt.gz, line 3: byte 0xE9 at offset 10 of the unpacked text is not UTF-8"),
])
def test_faults_name_file_line_and_offset(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, data))


def test_offset_and_line_count_over_documents(tmp_path):
    path = write(tmp_path / "x.txt", b"a\n\nb\nc\n\nd\xff")
    with pytest.raises(UserError, match="line 6: byte 0xFF at offset 9"):
        read(path, separator="\n\n")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_cut_and_damaged_archives_are_reported(tmp_path, name):
    texts = [f"text number {n}" for n in range(2000)]
    path = write(tmp_path / name, jsonl(texts))
    whole = path.read_bytes()
    assert read(path) == texts
    for cut in (len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="truncated|broken"):
            read(path)
    path.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=name):
        read(path)


def test_several_compressed_frames_are_all_read(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "x.jsonl.zst").write_bytes(pack(jsonl(["a"])) + pack(jsonl(["b"])))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(["a"])) + gzip.compress(jsonl(["b"])))
    assert read(tmp_path / "x.jsonl.zst") == read(tmp_path / "x.jsonl.gz") == ["a", "b"]


def test_what_matches_nothing_names_what_is_there(tmp_path):
    (tmp_path / "texts.jsonl").touch()
    for spec, message in ((tmp_path / "text.jsonl", "matches no file.*texts.jsonl"),
                          (tmp_path / "no" / "*.jsonl", "there is no folder"),
                          (tmp_path, r"is a folder; name the files in it, such as .*/\*.jsonl"),
                          (" , ", "names nothing"),
                          ("catalogue:wikipedia_introduction", "did you mean 'wikipedia_introductions'")):
        with pytest.raises(UserError, match=message):
            documents.open_sources(str(spec))
    (tmp_path / "x.docx").touch()
    with pytest.raises(UserError, match="x.docx' is of no known kind"):
        documents.open_sources(str(tmp_path / "x.docx"))

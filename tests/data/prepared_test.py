"""Prepared folders against a naive packing of the same documents, and their safety on disk."""

import hashlib
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from fm_jax import tokenizer as tokenizers
from fm_jax.data import documents, prepared
from fm_jax.errors import UserError


def corpus(count=60, seed=0):
    rng = random.Random(seed)
    text = lambda: "".join(rng.choice("abc \u00e9\n\U0001f600") for _ in range(rng.randrange(1, 60)))
    return [text() + str(n) for n in range(count)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return documents.open_sources(str(path))


def naive_streams(texts, validation_frac):
    """Returns {split: [(ids, bytes) of each document]} as the format's description says, for the byte tokenizer."""
    digest = {t: hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts}
    splits = {"train": [], "validation": []}
    for text in sorted(digest, key=digest.get):
        held_out = int.from_bytes(digest[text][:8], "big") / 2 ** 64 < validation_frac
        splits["validation" if held_out else "train"].append(([256, *text.encode(), 257], len(text.encode())))
    return splits


def naive_rows(docs, seq_len):
    tokens = [t for ids, _ in docs for t in ids]
    owner = [n for n, (ids, _) in enumerate(docs) for _ in ids]
    rows = []
    for start in range(0, len(tokens) - 1, seq_len):
        t, o = tokens[start:start + seq_len + 1], owner[start:start + seq_len + 1]
        pad = seq_len + 1 - len(t)
        rows.append((t + [0] * pad, [x - o[0] + 1 for x in o] + [0] * pad))
    return rows


@pytest.mark.parametrize("shard_tokens", [10 ** 8, 200, 40, 1])
@pytest.mark.parametrize("seq_len", [1, 7, 64, 10_000])
def test_rows_are_those_of_naive_packing(tmp_path, shard_tokens, seq_len):
    texts = corpus()
    manifest, _ = prepared.prepare(write(tmp_path / "x.jsonl", texts), "bytes", tmp_path / "out", validation_frac=0.3,
                                   shard_tokens=shard_tokens)
    for split, docs in naive_streams(texts, 0.3).items():
        assert manifest["splits"][split]["documents"] == len(docs)
        assert manifest["splits"][split]["bytes"] == sum(n for _, n in docs)
        rows = prepared.Rows(tmp_path / "out", split, seq_len)
        expected = naive_rows(docs, seq_len)
        assert len(rows) == len(expected) and rows.tokens == sum(len(ids) for ids, _ in docs)
        order = np.random.default_rng(0).permutation(len(rows))
        records = rows[order]
        np.testing.assert_array_equal(records["tokens"], np.array([expected[r][0] for r in order]))
        np.testing.assert_array_equal(records["segment_ids"], np.array([expected[r][1] for r in order]))
        assert records["tokens"].dtype == records["segment_ids"].dtype == np.int32


def test_scored_targets_are_the_text_exactly(tmp_path):
    """Every text token and every end is a target once, so that loss over bytes is bits per byte without a rest."""
    texts = corpus(200)
    sources = write(tmp_path / "x.jsonl", texts)
    manifest, _ = prepared.prepare(sources, "sentencepiece:300", tmp_path / "out", validation_frac=0.2)
    tokenizer = tokenizers.load(tmp_path / "out" / "tokenizer")
    table = tokenizer.token_bytes()
    for split in prepared.SPLITS:
        rows = prepared.Rows(tmp_path / "out", split, 32)
        records = rows[np.arange(len(rows))]
        tokens, segments = records["tokens"], records["segment_ids"]
        scored = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
        targets = tokens[:, 1:][scored]
        entry = manifest["splits"][split]
        assert table[targets].sum() == entry["bytes"]
        assert (targets == tokenizer.eos_id).sum() == entry["documents"] and not (targets == tokenizer.bos_id).any()
        assert len(targets) == entry["tokens"] - entry["documents"]


def test_held_out_text_is_the_validation_split(tmp_path):
    texts = corpus()
    manifest, _ = prepared.prepare(write(tmp_path / "x.jsonl", texts), "bytes", tmp_path / "out", validation_frac=0.3)
    held_out = list(prepared.texts(tmp_path / "out", "validation"))
    rows = prepared.Rows(tmp_path / "out", "validation", 16)
    entry = manifest["splits"]["validation"]
    assert sum(len(t.encode()) for t in held_out) == entry["bytes"] and len(held_out) == entry["documents"]
    tokens = rows[np.arange(len(rows))]["tokens"]
    stream = np.concatenate([tokens[:, :-1].ravel(), tokens[-1:, -1]])
    assert tokenizers.ByteTokenizer().decode(stream[:rows.tokens]) == "".join(held_out)


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:300"])
def test_texts_gives_back_every_document(tmp_path, tokenizer):
    texts = corpus()
    prepared.prepare(write(tmp_path / "x.jsonl", texts), tokenizer, tmp_path / "out", validation_frac=0.3,
                     shard_tokens=200)
    by_split = [list(prepared.texts(tmp_path / "out", split)) for split in prepared.SPLITS]
    assert sorted(by_split[0] + by_split[1]) == sorted(texts)
    starts = np.fromfile(tmp_path / "out" / "train" / "starts.int64", "<i8")
    assert len(by_split[0]) == len(starts) - 1
    if tokenizer == "bytes":    # in order: each as long as its place in the stream
        assert [len(t.encode()) + 2 for t in by_split[0]] == np.diff(starts).tolist()


def test_equal_texts_are_on_one_side_and_counted(tmp_path):
    texts = corpus(100)
    manifest, _ = prepared.prepare(write(tmp_path / "x.jsonl", texts * 3 + ["", "  \n"]), "bytes", tmp_path / "out",
                                   validation_frac=0.3)
    assert manifest["documents_duplicate"] == 200 and manifest["documents_empty"] == 2
    held_out = set(prepared.texts(tmp_path / "out", "validation"))
    # Other data that shares documents agrees on what is held out, and a larger fraction holds out more.
    prepared.prepare(write(tmp_path / "y.jsonl", texts[:50] + corpus(50, seed=1)), "bytes", tmp_path / "other",
                     validation_frac=0.3)
    assert held_out & set(texts[:50]) == set(prepared.texts(tmp_path / "other", "validation")) & set(texts[:50])
    prepared.prepare(write(tmp_path / "x.jsonl", texts), "bytes", tmp_path / "more", validation_frac=0.6)
    assert held_out < set(prepared.texts(tmp_path / "more", "validation"))
    # 100 draws at 0.3: six deviations of sqrt(100 * 0.3 * 0.7) either way.
    assert 30 - 28 < len(held_out) < 30 + 28


def tree(folder, ignore=()):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in ignore}


def test_result_depends_on_neither_workers_nor_order_of_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_CHUNK_BYTES", 300)     # many chunks for the workers to disorder
    texts = corpus(100)

    def make(name, texts, workers):
        prepared.prepare(write(tmp_path / "x.jsonl", texts), "sentencepiece:300", tmp_path / name,
                         validation_frac=0.2, shard_tokens=500, workers=workers)

    make("one", texts, 1)
    make("two", texts, 2)
    make("reversed", texts[::-1], 1)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert tree(tmp_path / "one", ["manifest.json"]) == tree(tmp_path / "reversed", ["manifest.json"])


def test_tokenizer_is_trained_on_the_train_split_only(tmp_path):
    def held_out(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big") < 0.3 * 2 ** 64

    mark = "\u0416" * 30    # a character that only held-out texts have
    texts = [t for t in corpus(80) if not held_out(t)] + [t for t in (t + mark for t in corpus(80)) if held_out(t)]
    for name, frac, seen in (("without", 0.3, False), ("with", 0.0, True)):
        prepared.prepare(write(tmp_path / "x.jsonl", texts), "sentencepiece:290", tmp_path / name, validation_frac=frac)
        pieces = tokenizers.load(tmp_path / name / "tokenizer").token_text_bytes()
        assert any("\u0416".encode() in p for p in pieces) == seen


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    import tokenizers as hf
    model = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "a": 70_000, "b": 1, "[UNK]": 2}, "[UNK]"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    manifest, _ = prepared.prepare(write(tmp_path / "x.jsonl", ["a b a"]), str(tmp_path / "tokenizer.json"),
                                   tmp_path / "out", validation_frac=0)
    assert manifest["token_dtype"] == "<u4"
    # The one special token there is stands at both ends.
    assert prepared.Rows(tmp_path / "out", "train", 4)[np.array([0])]["tokens"].tolist() == [[0, 70_000, 1, 70_000, 0]]


def test_same_sources_are_used_again_and_others_never_overwrite(tmp_path):
    sources = write(tmp_path / "x.jsonl", corpus())
    first, reused = prepared.prepare(sources, "bytes", tmp_path / "out", validation_frac=0.3, licence="CC0")
    before = tree(tmp_path)
    for licence in ("", "CC0"):
        again, reused_again = prepared.prepare(sources, "bytes", tmp_path / "out", validation_frac=0.3, licence=licence)
        assert (reused, reused_again) == (False, True) and again == first
    with pytest.raises(UserError, match=r"prepared differently \(in licence\)"):
        prepared.prepare(sources, "bytes", tmp_path / "out", validation_frac=0.3, licence="MIT")
    with pytest.raises(UserError, match=r"prepared differently \(in validation_frac\)"):
        prepared.prepare(sources, "bytes", tmp_path / "out", validation_frac=0.4)
    with pytest.raises(UserError, match=r"prepared differently \(in tokenizer\)"):
        prepared.prepare(sources, "sentencepiece:290", tmp_path / "out", validation_frac=0.3)
    assert tree(tmp_path) == before
    with pytest.raises(UserError, match=r"prepared differently \(in sources\)"):
        prepared.prepare(write(tmp_path / "x.jsonl", corpus(61)), "bytes", tmp_path / "out", validation_frac=0.3)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists and is no prepared data"):
        prepared.prepare(sources, "bytes", tmp_path / "mine")


def test_nothing_is_left_where_a_source_is_bad(tmp_path):
    good = write(tmp_path / "x.jsonl", corpus())
    (tmp_path / "y.jsonl").write_text('{"text": "a"}\nnonsense\n')
    bad = documents.open_sources(str(tmp_path / "y.jsonl"))
    with pytest.raises(UserError, match="y.jsonl, line 2"):
        prepared.prepare(good + bad, "bytes", tmp_path / "out")
    with pytest.raises(UserError, match="no text in .*empty.jsonl: 2 documents, all empty"):
        prepared.prepare(write(tmp_path / "empty.jsonl", ["", " "]), "bytes", tmp_path / "out")
    with pytest.raises(UserError, match="falls into the validation split with --validation_frac=0.02"):
        prepared.prepare(write(tmp_path / "one.jsonl", ["a single one"]), "bytes", tmp_path / "out")
    with pytest.raises(UserError, match="validation_frac=1.5 must be"):
        prepared.prepare(good, "bytes", tmp_path / "out", validation_frac=1.5)
    for size in ("", ":", ":0", ":\u00b2", ":many", ":99999999999"):
        with pytest.raises(UserError, match="give the vocabulary size"):
            prepared.prepare(good, f"sentencepiece{size}", tmp_path / "out")
    with pytest.raises(UserError, match="sentencepiece.model: no such tokenizer"):
        prepared.prepare(good, "sentencepiece.model", tmp_path / "out")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl"] * 4


@pytest.mark.parametrize("file", ["train/00000.tokens", "train/starts.int64", "validation/text.jsonl.gz",
                                  "tokenizer/bytes.json"])
def test_missing_cut_and_altered_files_are_named(tmp_path, file):
    out = tmp_path / "out"
    sources = write(tmp_path / "x.jsonl", corpus())
    prepared.prepare(sources, "bytes", out, validation_frac=0.3)
    whole = (out / file).read_bytes()
    (out / file).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{file}: {len(whole) - 1} bytes, the manifest says {len(whole)}"):
        prepared.Rows(out, "train", 8)
    (out / file).unlink()
    with pytest.raises(UserError, match=f"{file}: missing"):
        prepared.Rows(out, "train", 8)
    (out / file).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    prepared.Rows(out, "train", 8)      # sizes are checked at opening, content where a folder is used again
    with pytest.raises(UserError, match=f"{file}: damaged.* prepare it again"):
        prepared.prepare(sources, "bytes", out, validation_frac=0.3)


def test_what_is_no_prepared_folder_is_refused(tmp_path):
    prepared.prepare(write(tmp_path / "x.jsonl", corpus()), "bytes", tmp_path / "wiki", validation_frac=0)
    for folder, message in (("wikj", "no such folder; did you mean .*wiki"), ("none/x", "make it with"),
                            (".", "no manifest.json in it")):
        with pytest.raises(UserError, match=message):
            prepared.Rows(tmp_path / folder, "train", 8)
    with pytest.raises(UserError, match="validation split is empty"):
        prepared.Rows(tmp_path / "wiki", "validation", 8)
    with pytest.raises(UserError, match="did you mean 'train'"):
        prepared.Rows(tmp_path / "wiki", "trian", 8)
    manifest = tmp_path / "wiki" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2,', '"format": 0,', 1))
    with pytest.raises(UserError, match="format 0, this version reads 2"):
        prepared.Rows(tmp_path / "wiki", "train", 8)
    manifest.write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        prepared.Rows(tmp_path / "wiki", "train", 8)


def test_manifest_counts_add_up(tmp_path):
    manifest, _ = prepared.prepare(write(tmp_path / "x.jsonl", corpus()), "bytes", tmp_path / "out",
                                   validation_frac=0.3, shard_tokens=300, licence="CC0")
    kept = manifest["documents_read"] - manifest["documents_empty"] - manifest["documents_duplicate"]
    assert kept == sum(s["documents"] for s in manifest["splits"].values()) == 60
    for split, entry in manifest["splits"].items():
        assert len(entry["shards"]) == len(list((tmp_path / "out" / split).glob("*.tokens"))) > 1
        for name in ("documents", "tokens", "bytes"):
            assert entry[name] == sum(s[name] for s in entry["shards"])
        assert all(s["tokens"] <= 300 for s in entry["shards"])
    assert manifest["licence"] == "CC0" and manifest == prepared.read_manifest(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """For real: a process whose files may not grow beyond 20 kB writes 400 kB."""
    resource = pytest.importorskip("resource", reason="no file-size limits on this system")
    write(tmp_path / "x.jsonl", ["x" * 1000 + str(n) for n in range(400)])
    # Not preexec_fn: this process has threads, and a fork of it could hang.
    limited = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
               "runpy.run_module('fm_jax.prepare', run_name='__main__', alter_sys=True)")
    result = subprocess.run([sys.executable, "-c", limited, f"--source={tmp_path}/x.jsonl", "--tokenizer=bytes",
                             f"--output={tmp_path}/out", "--workers=1"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "cannot write --output" in result.stderr and "File too large" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]

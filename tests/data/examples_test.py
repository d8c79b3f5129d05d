"""Prepared folders of separate examples: what is read is what came, what is held out is so, and what is refused."""

import gzip
import io
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fm_jax import config as configs
from fm_jax.data import documents, examples, prepared
from fm_jax.data.batches import examples_per_epoch, fingerprints, load_tokenizer, open_batches
from fm_jax.errors import UserError

RECORDS = [{"text": f"caf\u00e9 number {n}", "label": "even" if n % 2 == 0 else "odd", "n": n, "score": n / 7,
            "words": ["a", str(n)], "of": n // 3} for n in range(90)]


class Numbers:
    """The least objective that reads examples; padding is 0 of weight 0."""

    reads = "examples"

    def examples(self, records, seeds, train=True):
        return {"n": np.array([0 if r is None else r["n"] for r in records]), "seed": seeds,
                "weight": np.array([float(r is not None) for r in records])}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return documents.open_sources(str(path))


def all_of(folder, split):
    source = examples.Examples(folder, split)
    return source[np.arange(len(source))]


def make_config(train, **changes):
    config = configs.defaults()
    config.batch_size, config.data.train = 8, str(train)
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("examples")
    for name, part in (("a", RECORDS[:60]), ("b", RECORDS[60:])):
        examples.prepare(write(root / f"{name}.jsonl", part), root / name, tokenizer="bytes", validation_frac=0.2)
    prepared.prepare(documents.open_sources(str(root / "a.jsonl")), "bytes", root / "packed", validation_frac=0.2)
    return root


def test_every_record_comes_back_in_order_with_its_line(folder):
    splits = {split: all_of(folder / "a", split) for split in prepared.SPLITS}
    for split, records in splits.items():
        lines = (folder / "a" / split / "records.jsonl").read_text().splitlines()
        for record in records:
            path, _, line = record.place.rpartition(", line ")
            assert path.endswith(f"a/{split}/records.jsonl") and json.loads(lines[int(line) - 1]) == record
        assert [r["n"] for r in records] == sorted(r["n"] for r in records)
    both = splits["train"] + splits["validation"]
    assert sorted(both, key=lambda r: r["n"]) == RECORDS[:60] and 3 < len(splits["validation"]) < 25
    picked = examples.Examples(folder / "a", "train")[np.array([5, 0, 5])]
    assert picked == [splits["train"][i] for i in (5, 0, 5)]
    values = prepared.read_manifest(folder / "a")["values"]
    assert values["label"] == ["even", "odd"] and "score" not in values
    assert values["n"] == [r["n"] for r in splits["train"]]


def test_batches_are_of_the_mixture_and_end_with_padding(folder):
    config = make_config(f"{folder}/a:3,{folder}/b:1")
    opened = open_batches(config, Numbers())
    first = [b["n"] for b in itertools.islice(opened.iterate(), 30)]
    resumed = [b["n"] for b in itertools.islice(opened.iterate(17), 13)]
    np.testing.assert_array_equal(first[17:], resumed)
    of = {name: {r["n"] for r in all_of(folder / name, "train")} for name in "ab"}
    drawn = np.concatenate(first).tolist()
    assert sum(n in of["a"] for n in drawn) == 180 and sum(n in of["b"] for n in drawn) == 60
    assert sorted(n for n in drawn if n in of["a"])[: 3] and examples_per_epoch(config) == len(of["a"]) + len(of["b"])
    one = np.concatenate([b["n"] for b in itertools.islice(
        open_batches(make_config(folder / "a", batch_size=1), Numbers()).iterate(), len(of["a"]))])
    assert sorted(one.tolist()) == sorted(of["a"])
    held = [r["n"] for name in "ab" for r in all_of(folder / name, "validation")]
    got = list(open_batches(config, Numbers(), split="validation").iterate())
    numbers, weights = (np.concatenate([b[k] for b in got]) for k in ("n", "weight"))
    assert weights.tolist() == [1.0] * len(held) + [0.0] * (-len(held) % 8)
    assert numbers[:len(held)].tolist() == held
    assert load_tokenizer(config).vocab_size == 262
    assert list(fingerprints(config)) == [f"{folder}/a", f"{folder}/b"]


def test_given_held_out_examples_leave_the_train_split(tmp_path):
    train, held = write(tmp_path / "x.jsonl", RECORDS + [{}, RECORDS[0]]), write(tmp_path / "y.jsonl", RECORDS[80:])
    manifest, reused = examples.prepare(train, tmp_path / "out", validation_sources=held, tokenizer="sentencepiece:290",
                                        text_key="text,words")
    assert not reused and manifest["splits"]["train"]["examples"] == 80 and manifest["tokenizer"]["vocab_size"] == 290
    assert (manifest["examples_empty"], manifest["examples_duplicate"]) == (1, 1 + 10)
    assert all_of(tmp_path / "out", "validation") == RECORDS[80:] and all_of(tmp_path / "out", "train") == RECORDS[:80]
    _, reused = examples.prepare(train, tmp_path / "out", validation_sources=held, tokenizer="sentencepiece:290",
                                 text_key="text,words")
    assert reused
    got = open_batches(make_config(tmp_path / "out"), Numbers(), split="validation").iterate()
    assert np.concatenate([b["n"] for b in got])[:10].tolist() == list(range(80, 90))
    # The same text with another label is no equal record, and yet must not be on both sides.
    other = write(tmp_path / "z.jsonl", [r | {"label": "other"} for r in RECORDS[80:]])
    manifest, _ = examples.prepare(train, tmp_path / "by_text", validation_sources=other, split_by="text")
    assert manifest["examples_also_held_out"] == 10 and manifest["tokenizer"] is None
    assert load_tokenizer(make_config(tmp_path / "by_text")) is None


def test_what_is_equal_in_split_by_is_on_one_side(tmp_path):
    examples.prepare(write(tmp_path / "x.jsonl", RECORDS), tmp_path / "out", split_by="of", validation_frac=0.3)
    train, held = ({r["of"] for r in all_of(tmp_path / "out", split)} for split in prepared.SPLITS)
    assert not train & held and len(held) > 2
    # ... also where two folders are mixed: what one holds out, the other trains on.
    examples.prepare(write(tmp_path / "x.jsonl", RECORDS), tmp_path / "all", split_by="of", validation_frac=1)
    examples.prepare(write(tmp_path / "x.jsonl", RECORDS), tmp_path / "other", validation_frac=0.3)
    config = make_config(tmp_path / "out")
    config.data.validation = str(tmp_path / "all")
    with pytest.raises(UserError, match=f"{3 * len(train)} examples that .*all holds out are trained on in .*out"):
        open_batches(config, Numbers())
    config.data.validation = str(tmp_path / "other")
    with pytest.raises(UserError, match="other was split by .* with the same --split_by"):
        open_batches(config, Numbers())


def test_the_wrong_kind_of_folder_is_one_clear_line(folder):
    packed = type("Packed", (Numbers,), {"reads": "packed"})()
    for objective, name, message in (
            (Numbers(), "packed", "packed holds packed text, and what reads it takes separate examples: prepare it "
                                  "with --examples"),
            (packed, "a", "a holds separate examples, and what reads it takes packed text: prepare it without")):
        with pytest.raises(UserError, match=message) as error:
            open_batches(make_config(folder / name), objective)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="a holds separate examples"):
        next(prepared.texts(folder / "a", "validation"))
    with pytest.raises(UserError, match=r"has \d+ examples, fewer than one batch of 500: .* --config.batch_size$"):
        open_batches(make_config(folder / "a", batch_size=500), Numbers())


def test_a_file_that_shrinks_under_a_run_is_named(tmp_path):
    examples.prepare(write(tmp_path / "x.jsonl", RECORDS), tmp_path / "out", validation_frac=0.3)
    source = examples.Examples(tmp_path / "out", "train")
    records = tmp_path / "out" / "train" / "records.jsonl"
    os.truncate(records, 100)
    with pytest.raises(UserError, match="records.jsonl: has 100 bytes"):
        source[np.array([0])]
    with pytest.raises(UserError, match="records.jsonl: 100 bytes, the manifest says"):
        examples.Examples(tmp_path / "out", "train")


def test_the_command_makes_examples_of_all_formats(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in RECORDS).encode()))
    run = lambda *flags: subprocess.run([sys.executable, "-m", "fm_jax.prepare", *flags], cwd=tmp_path,
                                        capture_output=True, text=True)
    result = run("--examples", "--source=x.jsonl.gz", "--output=out", "--validation_frac=0.2")
    assert result.returncode == 0 and "label: 2 values: even, odd" in result.stdout, result.stderr
    for flags, message in ((["--source=x.jsonl.gz"], "--tokenizer is needed to pack text"),
                           (["--source=x.jsonl.gz", "--split_by=text"], "--split_by=text is for --examples"),
                           (["--source=x.jsonl.gz", "--tokenizer=bytes"], "(in kind): choose another")):
        result = run(*flags, "--output=out")
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("lines, options, message", [
    (['{"text": "a"}', '{"label": 1}'], dict(split_by="text"), "line 2: no field 'text' of --split_by"),
    (['{"text": "\\ud800"}'], {}, "line 1: has the lone surrogate U\\+D800"),
    (["{}"], {}, "no examples in .*: 1 records, all empty"),
    (['{"text": "a"}'], {}, "none of 1 examples falls into the validation split"),
    (['{"text": "a"}'], dict(tokenizer="sentencepiece:290", text_key="txet", validation_frac=0), "did you mean 'text'"),
    (['["a"]'], {}, "line 1: expected a JSON object, found list"),
])
def test_bad_records_are_one_clear_line_and_leave_nothing(tmp_path, lines, options, message):
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        examples.prepare(documents.open_sources(str(tmp_path / "x.jsonl")), tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_parquet_rows_are_records_and_what_json_cannot_hold_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet
    plain = {k: [r[k] for r in RECORDS] for k in RECORDS[0]}
    pyarrow.parquet.write_table(pyarrow.table(plain), tmp_path / "x.parquet")
    examples.prepare(documents.open_sources(str(tmp_path / "x.parquet")), tmp_path / "out", validation_frac=0)
    assert all_of(tmp_path / "out", "train") == RECORDS
    pyarrow.parquet.write_table(pyarrow.table(plain | {"raw": [[b"\0"]] * 90}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match="y.parquet, row 1: 'raw' is list, which JSON cannot hold"):
        examples.prepare(documents.open_sources(str(tmp_path / "y.parquet")), tmp_path / "bad")


# --- bytes of files ---------------------------------------------------------------------------------------------------

def picture(colour, size=(5, 4), mode="RGB", kind="png"):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, kind)
    return out.getvalue()


def in_memory(records):
    """Returns a source of these records, as the catalogue's are."""
    of = lambda: ((f"record {i}", r) for i, r in enumerate(records))
    return [documents.Source("memory", 0, "0" * 64, "", None, of)]


def test_bytes_of_files_come_back_and_are_checked(tmp_path):
    """Equal ones are stored once, whatever else they are with; the same folder again, whatever the order; damage is
    named."""
    red, blue = picture("red"), picture("blue")
    records = [{"n": i, "image": (red, blue, b"")[i % 3]} for i in range(30)]
    manifest, _ = examples.prepare(in_memory(records), tmp_path / "a", validation_frac=0.3)
    assert manifest["blobs"] == ["image"]
    for split in prepared.SPLITS:
        for record in all_of(tmp_path / "a", split):
            assert record == records[record["n"]]
        blobs = tmp_path / "a" / split / "blobs.bin"
        assert blobs.read_bytes() in (red + blue, blue + red)
        prepared.verify(tmp_path / "a")
        kept = bytearray(blobs.read_bytes())
        kept[3] ^= 1
        blobs.write_bytes(kept)
        with pytest.raises(UserError, match=f"{split}/blobs.bin"):
            prepared.verify(tmp_path / "a")
        kept[3] ^= 1
        blobs.write_bytes(kept)
    _, reused = examples.prepare(in_memory(records), tmp_path / "a", validation_frac=0.3)
    assert reused
    with pytest.raises(UserError, match="record 1: 'image' is str, and bytes of a file in other records"):
        examples.prepare(in_memory([{"image": red}, {"image": "x.png"}]), tmp_path / "b")


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    """Given as bytes, or by their files' paths beside the source; by far too large ones are not even decoded."""
    (tmp_path / "pictures").mkdir()
    files = {"good.png": picture("red"), "grey.png": picture(7, mode="L"), "cut.png": picture("red", (50, 50))[:90],
             "one.png": picture("red", (1, 1)), "none.png": b"", "text.png": b"hello",
             "wide.png": picture(0, (10000, 3), "L"), "vast.png": picture(0, (10000, 10000), "1")}
    for name, content in files.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    records = [{"image": f"pictures/{name}", "n": i} for i, name in enumerate([*files, "absent.png"])]
    sources = write(tmp_path / "x.jsonl", records)
    manifest, _ = examples.prepare(sources, tmp_path / "a", images="image", validation_frac=0)
    assert [r["n"] for r in all_of(tmp_path / "a", "train")] == [0, 1, 3, 6]
    assert all(r["image"] == files[records[r["n"]]["image"].split("/")[1]] for r in all_of(tmp_path / "a", "train"))
    assert manifest["examples_unreadable"] == 5
    assert "x.jsonl, line 3: image: not an image" in manifest["first_unreadable"]
    with pytest.raises(UserError, match="none with a picture that can be read; the first: .*vast.*more than 50,000,000|"
                                        "10000 x 10000 pixels are more than 50,000,000"):
        examples.prepare(write(tmp_path / "y.jsonl", records[7:8]), tmp_path / "b", images="image")
    with pytest.raises(UserError, match="unknown 'imag'; did you mean 'image'"):
        examples.prepare(sources, tmp_path / "c", images="imag")

"""The command `python -m fm_jax.prepare`, as a user runs it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fm_jax.data import prepared


def run(*flags, cwd, **env):
    return subprocess.run([sys.executable, "-m", "fm_jax.prepare", *flags], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})


def jsonl(count, first=0):
    return "".join(json.dumps({"text": f"document number {n}\nof some lines"}) + "\n" for n in range(first, count))


def test_mixed_formats_become_one_folder_that_is_used_again(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text(jsonl(60))
    (tmp_path / "texts" / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(90, 40).encode()))
    (tmp_path / "note.txt").write_text("first note\n\nsecond note\n\n\n\nfourth note")
    flags = ["--source=texts/*.jsonl*,note.txt", r"--document_separator=\n\n", "--tokenizer=sentencepiece:300",
             "--output=data/x", "--validation_frac=0.2", "--licence=CC0", "--workers=2"]
    result = run(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = prepared.read_manifest(tmp_path / "data" / "x")
    assert manifest["licence"] == "CC0" and manifest["documents_duplicate"] == 20
    texts = {f"document number {n}\nof some lines" for n in range(90)} | {"first note", "second note", "fourth note"}
    assert set(prepared.texts(tmp_path / "data" / "x", "validation")) < texts
    assert sum(s["documents"] for s in manifest["splits"].values()) == len(texts)
    for word in ("data/x: prepared", "train", "validation", "bytes per token", "licence: CC0"):
        assert word in result.stdout
    before = os.stat(tmp_path / "data" / "x" / "manifest.json").st_mtime_ns
    again = run(*flags, cwd=tmp_path)
    assert again.returncode == 0 and "already prepared" in again.stdout
    assert os.stat(tmp_path / "data" / "x" / "manifest.json").st_mtime_ns == before


def test_the_embedded_text_needs_no_network(tmp_path):
    result = run("--source=catalogue:tiny_shakespeare", "--tokenizer=bytes", "--output=x", cwd=tmp_path,
                 PIP_NO_INDEX="1", FM_JAX_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "catalogue:tiny_shakespeare: public domain" in result.stdout
    rows = prepared.Rows(tmp_path / "x", "train", 256)
    assert rows[np.arange(len(rows))]["tokens"].max() < 262


@pytest.mark.parametrize("files, flags, message", [
    ({"x.jsonl": b""}, [], "no text in x.jsonl: 0 documents"),
    ({"x.jsonl": b'{"text": "a"}\n{"text": "b"\n'}, [], "x.jsonl, line 2: broken JSON"),
    ({"x.jsonl": b'{"text": "caf\xe9"}\n'}, [], "x.jsonl, line 1: byte 0xE9 at offset 13 is not UTF-8"),
    ({"x.jsonl": b'{"body": "a"}\n'}, [], "no key 'text' (keys here: body); set --text_key"),
    ({"x.parquet": b"PAR1"}, ["--source=x.parquet"], "x.parquet: unreadable Parquet"),
    ({"texts.jsonl": b""}, [], "'x.jsonl' matches no file ('.' has texts.jsonl)"),
    ({"x.jsonl": jsonl(50).encode(), "out/mine.txt": b"keep"}, [], "--output=out exists and is no prepared data"),
    ({"x.jsonl": jsonl(50).encode()}, ["--tokenizer=toknizer.model"], "toknizer.model: no such tokenizer"),
    ({"x.jsonl": jsonl(50).encode()}, ["--tokenizer=sentencepiece:100000"], "is too large for this text: at most"),
    ({"x.jsonl": jsonl(50).encode()}, [r"--document_separator=\n"], "cuts plain text (.txt, .md), and --source"),
    ({"x.jsonl": b'{"text": "\xe2\x96\x85"}\n'}, ["--tokenizer=sentencepiece:300", "--validation_frac=0"],
     "no text that SentencePiece learns from"),
    ({"x.jsonl": jsonl(50).encode()}, ["--tokeniser=bytes"], "did you mean --tokenizer"),
    ({"x.jsonl": jsonl(50).encode()}, ["--source=catalogue:wikipedia"], "catalogue: unknown 'wikipedia'"),
    ({"x.jsonl": jsonl(50).encode(), "file": b""}, ["--output=file/out"], "cannot write --output=file/out"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, files, flags, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    result = run("--source=x.jsonl", "--tokenizer=bytes", "--output=out", "--validation_frac=0.1", "--workers=1",
                 *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(files)


def until(folder, stage):
    """Returns the process of the command on x.jsonl, started in `folder`, when it has made the folder `stage`."""
    # A suite that a shell put into the background ignores SIGINT, and so would its children: a terminal's do not.
    code = ("import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "runpy.run_module('fm_jax.prepare', run_name='__main__', alter_sys=True)")
    process = subprocess.Popen([sys.executable, "-c", code, "--source=x.jsonl", "--tokenizer=bytes", "--output=out",
                                "--workers=2"], cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(folder.glob(f".out.partial-*-{process.pid}/{stage}")):
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("stage", ["spool", "train"])
def test_an_interrupt_leaves_nothing(tmp_path, stage):
    """As a terminal does it: the signal goes to the workers too. Reading makes spool/, tokenizing train/."""
    (tmp_path / "x.jsonl").write_text(jsonl(150_000))
    process = until(tmp_path, stage)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130 and stderr.splitlines()[-1] == "interrupted", stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_a_killed_command_leaves_goes_with_the_next_of_that_output(tmp_path):
    (tmp_path / "x.jsonl").write_text(jsonl(150_000))
    process = until(tmp_path, "spool")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    [left] = tmp_path.glob(".out.partial-*")
    # A process that runs, this one, another machine's of that number, and another output's keep theirs.
    name, _, number = left.name.rpartition("-")
    others = [f"{name}-{os.getpid()}", f"{name}-else-{number}", left.name.replace("out", "out2")]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "x.jsonl").write_text(jsonl(100))
    result = run("--source=x.jsonl", "--tokenizer=bytes", "--output=out", "--workers=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"x.jsonl", "out", *others}


def test_only_a_failed_download_has_an_exit_code_of_its_own(tmp_path):
    """launch/quickstart.sh takes other data where it sees it."""
    flags = ("--source=catalogue:wikipedia_introductions", "--tokenizer=bytes", "--output=x")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "FM_JAX_CACHE": str(tmp_path / "cache")}
    result = run(*flags, cwd=tmp_path, **offline)
    assert result.returncode == 69 and result.stderr.startswith("error: catalogue:wikipedia_introductions: could not")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    assert run(*flags, cwd=tmp_path, **offline | {"FM_JAX_CACHE": str(tmp_path / "file")}).returncode == 2


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path):
    code = ("import sys, fm_jax.prepare as p; from absl import flags; p._flags(flags.FlagValues()); "
            "print([m for m in ('jax', 'numpy', 'grain', 'sentencepiece', 'pyarrow') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0 and "--validation_frac" in result.stdout

"""The quickstart's script: its branches with a stand-in for Python; and, slow, all of it in small, with few steps."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Takes the place of Python: notes which command was called on what, and ends as the test says for that call.
STAND_IN = """#!/usr/bin/env bash
case "$2" in
  fm_jax.prepare) call="prepare $4" ;;
  *) call=${2#fm_jax.} ;;
esac
echo "$call" >> calls
code=$(sed -n "s|^$call=||p" codes)
if [[ $call == prepare* && -z $code ]]; then mkdir -p data/english && touch data/english/manifest.json; fi
exit ${code:-0}
"""
WIKIPEDIA, SHAKESPEARE = "prepare catalogue:wikipedia_introductions", "prepare catalogue:tiny_shakespeare"


@pytest.mark.parametrize("codes, calls, ends_with", [
    ({}, [WIKIPEDIA, "train", "report"], 0),
    ({WIKIPEDIA: 69}, [WIKIPEDIA, SHAKESPEARE, "train", "report"], 0),                  # no network
    ({WIKIPEDIA: 130}, [WIKIPEDIA], 130),                                               # Ctrl-C
    ({WIKIPEDIA: 2}, [WIKIPEDIA], 2),                                                   # a full disk
    ({WIKIPEDIA: 1}, [WIKIPEDIA], 1),                                                   # a bug
    ({WIKIPEDIA: 69, SHAKESPEARE: 130}, [WIKIPEDIA, SHAKESPEARE], 130),
    ({"train": 130}, [WIKIPEDIA, "train"], 130),
    ({"report": 2}, [WIKIPEDIA, "train", "report"], 2),
])
def test_other_text_is_taken_only_where_the_first_cannot_be_fetched(tmp_path, codes, calls, ends_with):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "quickstart.sh", tmp_path / "launch")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{call}={code}\n" for call, code in codes.items()))

    def quickstart():
        (tmp_path / "calls").write_text("")
        result = subprocess.run([tmp_path / "launch" / "quickstart.sh"], cwd="/", capture_output=True, text=True,
                                env=os.environ | {"PYTHON": str(tmp_path / "python")})
        assert ("could not be fetched" in result.stdout) == (SHAKESPEARE in calls)
        return (tmp_path / "calls").read_text().splitlines(), result.returncode

    assert quickstart() == (calls, ends_with)
    if ends_with == 0:      # the next time the data is there
        calls = ["train", "report"]
        assert quickstart() == (calls, 0)


@pytest.mark.slow
def test_quickstart_runs_continues_and_reports(tmp_path):
    for name in ("fm_jax", "configs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")}
    # No index: the script must go on with the text of the repository. Its cache is not the machine's.
    environment |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "FM_JAX_CACHE": str(tmp_path / "cache")}
    small = ["--config.model.num_layers=1", "--config.model.embed_dim=64", "--config.batch_size=8"]

    def quickstart(steps):
        result = subprocess.run([tmp_path / "launch" / "quickstart.sh", f"--config.steps={steps}", *small], cwd="/",
                                env=environment, capture_output=True, text=True, timeout=550)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    out = quickstart(20)
    run = tmp_path / "runs" / "quickstart"
    assert "Wikipedia introductions could not be fetched" in out and "fresh start" in out
    for name in ("gzip -9", "xz -9e", "order-5 n-gram", "this model"):
        assert f"  {name:<16} " in out
    assert "3-shot" in out and out.count("  > ") == 3
    assert (run / "loss.png").is_file() and "runs/quickstart/loss.png" in out
    assert json.loads((tmp_path / "data" / "english" / "manifest.json").read_text())["licence"] == "public domain"
    assert "all 20 steps are done" in quickstart(20)
    assert "from step 20" in quickstart(24)

"""`make quickstart` in small: the same script in a copy of the checkout, with the embedded text and few steps."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


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

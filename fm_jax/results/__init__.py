"""Rows of the table of results: what our models reach on real data, beside what else there is. Layer 6.

One module for each row, of its name: `TITLE`, and `run(work, note)`, which makes what it needs in the folder `work`
through the library and its commands, and returns a `Row`. `python -m fm_jax.results` runs them.
"""

import os
from pathlib import Path
import subprocess
import sys
from typing import NamedTuple

from fm_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


class Row(NamedTuple):
    """What a row found. `lines`: a line of the table each, its first column named; figures are shares of 1 or numbers.

    `seeds`: those of which the figures are means. `note`: what a reader must know to judge them.
    """

    columns: tuple[str, ...]
    lines: list[list]
    seeds: list[int]
    note: str


def command(name: str, *flags: str) -> None:
    """Runs `python -m fm_jax.NAME FLAGS`. Raises UserError, with its last line, where it fails."""
    line = [sys.executable, "-m", f"fm_jax.{name}", *flags]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"python -m fm_jax.{name} {' '.join(flags)}: {last}")


def cache() -> str:
    """Returns the folder of fetched data and weights."""
    from fm_jax.data import catalogue
    return os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE)


def minilm(work: Path) -> Path:
    """Returns the run of all-MiniLM-L6-v2, imported when first asked for."""
    return _imported(work, "minilm")


def smollm2(work: Path) -> Path:
    """Returns the run of SmolLM2-135M-Instruct, imported when first asked for."""
    return _imported(work, "smollm2")


def _imported(work, name):
    folder = work / name
    if not (folder / "checkpoints").is_dir():
        command("convert", f"--from_hf=catalogue:{name}", f"--workdir={folder}", "--dtype=float32")
    return folder

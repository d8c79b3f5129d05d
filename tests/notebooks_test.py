"""The notebooks run from top to bottom, without outputs stored in them."""

import json
import pathlib

import matplotlib
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs_on_a_run_folder(path, tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run[0])
    monkeypatch.chdir(tmp_path / "notebooks")   # where Jupyter starts a notebook
    matplotlib.use("Agg")
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in cells)
    names = {}
    for i, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {i}", "exec"), names)
    shown = capsys.readouterr().out
    assert "37,024 parameters" in shown and "bits per byte" in shown
    assert names["plt"].gca().lines   # the curve was drawn

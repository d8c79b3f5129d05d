"""The driver of the table of results: rows once, resumed, and each on its own; and what the rows count."""

import json
import sys
import types

import pytest

from fm_jax import results
from fm_jax.errors import UserError
from fm_jax.results import __main__ as driver, command
from fm_jax.results.entities import scores


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Returns the folder of two rows, one of which writes a file each time that it runs, and one that fails."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "good.py").write_text(
        "from fm_jax.results import Row\nTITLE = 'A good one'\n"
        "def run(work, note):\n    note('half way')\n    (work / f'{len(list(work.iterdir()))}').touch()\n"
        "    return Row(('', 'x'), [['ours', 0.5], ['theirs', 1]], [0, 1], 'Of nothing.')\n")
    (folder / "bad.py").write_text(
        "from fm_jax.errors import UserError\nTITLE = 'A bad one'\n"
        "def run(work, note):\n    raise UserError('no such data')\n")
    monkeypatch.setattr(results, "__path__", [str(folder)])
    yield folder
    for name in ("good", "bad"):
        sys.modules.pop(f"fm_jax.results.{name}", None)


def run(tmp_path, rows="", again=False):
    driver.main(types.SimpleNamespace(rows=rows, output=str(tmp_path / "out"), again=again))


def test_a_row_is_made_once_and_shown_again_and_a_bad_one_stops_no_other(rows, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(UserError, match="rows that failed: bad; the same command makes them again"):
            run(tmp_path)
        out = capsys.readouterr().out
        assert "| ours | 0.500 |\n| theirs | 1 |" in out and "means of 2 seeds" in out and "### A good one" in out
    assert len(list((tmp_path / "out" / "work").iterdir())) == 1
    made = json.loads((tmp_path / "out" / "good.json").read_text())
    assert made["command"] == "python -m fm_jax.results --rows good" and made["seeds"] == [0, 1]
    run(tmp_path, "good", again=True)
    assert len(list((tmp_path / "out" / "work").iterdir())) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.json", "work"]
    with pytest.raises(UserError, match="--rows: unknown 'god'; did you mean 'good'"):
        run(tmp_path, "god")


def test_a_command_that_fails_says_its_last_line(tmp_path):
    with pytest.raises(UserError, match="python -m fm_jax.prepare .*: .*'x.jsonl' matches no file"):
        command("prepare", "--examples", "--source=x.jsonl", f"--output={tmp_path / 'out'}")


def test_entity_scores_counted_by_hand():
    ours = [["B-x", "I-x", "O", "B-y"], ["O", "B-x"]]
    gold = [["B-x", "I-x", "O", "B-x"], ["B-y", "B-x"]]
    assert scores(ours, gold) == [2 * 2 / 7, 2 / 3, 2 / 4]
    assert scores([["O"]], [["O"]]) == [0, 0, 0]

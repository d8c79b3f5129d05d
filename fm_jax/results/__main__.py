"""Makes the table of results, row by row, from data and weights that it fetches.

A row that is there already, OUTPUT/ROW.json, is not made again. Each of these files has the figures, the seeds of which
they are means, the command and the seconds it took.

Examples:
  python -m fm_jax.results --output results
  python -m fm_jax.results --output results --rows few_labels,search --again
"""

import importlib
import json
import os
import pkgutil
import time
from pathlib import Path

from absl import flags

from fm_jax import config
from fm_jax import results
from fm_jax.errors import UserError, choose


def _flags(fv):
    flags.DEFINE_string("rows", "", "Comma-separated names of rows; default: all.", flag_values=fv)
    flags.DEFINE_string("output", "results", "Folder for the figures; OUTPUT/work has runs and data.", flag_values=fv)
    flags.DEFINE_boolean("again", False, "Make rows again that are there.", flag_values=fv)


def main(args):
    from tqdm import tqdm

    names = [m.name for m in pkgutil.iter_modules(results.__path__) if m.name != "__main__"]
    wanted = [choose(row.strip(), names, "--rows") for row in args.rows.split(",") if row.strip()] or names
    output, failed = Path(args.output), []
    (output / "work").mkdir(parents=True, exist_ok=True)
    bar = tqdm(wanted, unit=" rows", disable=None, leave=False)
    for name in bar:
        if (output / f"{name}.json").is_file() and not args.again:
            continue
        note = lambda text, name=name: bar.write(f"{name}: {text}")
        begun, cpu = time.monotonic(), _cpu_seconds()
        try:
            row = importlib.import_module(f"fm_jax.results.{name}").run(output / "work", note)
        except UserError as error:   # the others may do
            note(f"failed: {error}")
            failed.append(name)
            continue
        made = {"row": name, "command": f"python -m fm_jax.results --rows {name}",
                "seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(_cpu_seconds() - cpu, 1),
                **row._asdict()}
        partial = output / f".{name}.json.partial"
        partial.write_text(json.dumps(made, indent=1) + "\n")
        os.replace(partial, output / f"{name}.json")
    for name in wanted:
        if (output / f"{name}.json").is_file():
            print(table(name, json.loads((output / f"{name}.json").read_text())))
    if failed:
        raise UserError(f"rows that failed: {', '.join(failed)}; the same command makes them again")


def table(name: str, made: dict) -> str:
    """Returns a row's figures as Markdown."""
    show = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    line = lambda cells: f"| {' | '.join(map(show, cells))} |"
    title = importlib.import_module(f"fm_jax.results.{name}").TITLE
    seeds = f"; means of {len(made['seeds'])} seeds" if len(made["seeds"]) > 1 else ""
    return "\n".join([f"### {title}", "", line(made["columns"]), "|" + " --- |" * len(made["columns"]),
                      *map(line, made["lines"]), "", f"{made['note']} `{made['command']}`: {made['seconds']:.0f} s"
                      f"{seeds}.", ""])


def _cpu_seconds():
    """Returns those of this process and of the commands that it ran."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    config.run(main, _flags, __doc__)

"""Evaluates the model of a run on tasks; results go to WORKDIR/eval or --output, and to the terminal.

    python -m fm_jax.evaluate --workdir runs/x
    python -m fm_jax.evaluate --workdir runs/x --tasks perplexity,next_sentence --limit 100
    python -m fm_jax.evaluate --workdir runs/x --tasks path/to/task.yaml --num_fewshot 5 --output results/
    python -m fm_jax.evaluate --compare runs/a runs/b

Tasks: perplexity (bits per byte of the held-out text), next_sentence (multiple choice from it), patterns of these such
as "*", and files of lm-evaluation-harness, over local JSON. What was measured before with the same settings is not
measured again. Layer 5.
"""

import fnmatch
import glob
import hashlib
import inspect
import json
import os
from pathlib import Path
import re
import sys
import tempfile

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError, choose


def evaluate(workdir, tasks: list[str], *, lm=None, num_fewshot: int | None = None, step: int | None = None,
             mesh: dict | None = None, limit: int = 0, data: str = "", output: str = "") -> dict[str, dict]:
    """Returns {task: metrics}, having written a file for each, with every sample, to `workdir`/eval/STEP.

    A file is named by its task and what else decides its contents: perplexity.json, next_sentence_3shot_limit100.json,
    perplexity_NAME-FINGERPRINT.json of other data. One that is there already and was made with the same settings, of
    the same parameters, is taken as it is.

    Args:
      lm: the run's model, where it is loaded already; otherwise it is, from `step` and onto `mesh`.
      num_fewshot: worked examples before each question; default what the task says, 3 for next_sentence.
      data: a prepared folder whose held-out text is used; default the run's own.
      output: a folder for the files instead, with a table, results.md.

    Raises:
      UserError: an unknown task, a task file that cannot be honoured, no run, no held-out text, or a folder that
        cannot be written, before the evaluation.
    """
    import fm_jax
    from fm_jax.data import prepared
    from fm_jax.evals import requests, results as results_lib, yaml_task
    from fm_jax.evals.tasks import SHOTS, TASKS

    chosen = {}   # {name: a task of a file, or None of a built-in one}
    for name in named(tasks, TASKS):
        task = yaml_task.load(name, num_fewshot) if name.endswith(YAML) else None
        name = task.name if task else name
        if name in chosen:
            raise UserError(f"--tasks names two tasks {name!r}")
        chosen[name] = task
    lm = lm or fm_jax.load(workdir, step=step, mesh=mesh)
    texts, source = held_out(lm.config, data) if None in chosen.values() else ([], "")
    folder = Path(output) if output else Path(workdir, "eval", *([] if lm.step is None else [str(lm.step)]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}, where the results go: {error.strerror}") from error
    model, found = parameters_mark(lm.params), {}
    for name, task in chosen.items():
        settings = {"version": fm_jax.__version__, "model": model, "step": lm.step, "limit": limit}
        parts = [re.sub(r"[^\w-]", "_", name), *([f"limit{limit}"] if limit else [])]
        if task:
            settings |= {"num_fewshot": task.num_fewshot, "task": task.fingerprint, "task_version": task.version,
                         "higher_is_better": {m.name: m.higher_is_better for m in task.metrics},
                         "aggregations": {m.name: m.aggregation for m in task.metrics}}
            parts.insert(1, f"{task.num_fewshot}shot")
            run = lambda: requests.evaluate(lm, task, limit=limit)
        else:
            few = {}
            if "num_fewshot" in inspect.signature(TASKS[name]).parameters:
                few = {"num_fewshot": SHOTS if num_fewshot is None else num_fewshot}
                parts.insert(1, f"{few['num_fewshot']}shot")
            settings |= {**few, "data": source}
            if data:
                parts.append(f"{Path(data).resolve().name}-{prepared.read_manifest(data)['fingerprint'][:8]}")
            settings["texts"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
            run = lambda: TASKS[name](lm, texts, limit=limit, **few)
        found[name] = _measured(folder / f"{'_'.join(parts)}.json", settings, run)
    if output:
        _write(folder / "results.md", results_lib.markdown(found), "the table")
    return {name: result["metrics"] for name, result in found.items()}


YAML = (".yaml", ".yml")   # how the name of a task's file ends


def named(tasks: list[str], known) -> list[str]:
    """Returns the tasks that names and patterns of known ones or of files say, each once.

    Raises:
      UserError: an unknown name, with the nearest; a pattern of none.
    """
    out = []
    for name in tasks:
        if name.endswith(YAML):
            out += sorted(glob.glob(name)) or [name]
        elif re.search(r"[*?[]", name):
            matching = fnmatch.filter(known, name)
            if not matching:
                raise UserError(f"--tasks: no task is like {name!r} (known: {', '.join(known)})")
            out += matching
        else:
            out.append(choose(name, known, "--tasks"))
    if not out:
        raise UserError(f"--tasks is empty; known: {', '.join(known)}")
    return list(dict.fromkeys(out))


def parameters_mark(params) -> str:
    """Returns a sha256 of a checksum of each parameter array's bits: the same on any mesh, another after any change."""
    import jax
    import jax.numpy as jnp

    def checksum(array):
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
        index = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = sum(index(axis) * jnp.uint32(pow(2654435761, axis + 1, 2**32)) for axis in range(array.ndim))
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)   # odd factors: no single change is lost

    sums = jax.device_get(jax.jit(lambda params: jax.tree.map(checksum, params))(params))
    return hashlib.sha256(str(list(map(int, jax.tree.leaves(sums)))).encode()).hexdigest()


def _measured(path, settings, run):
    """Returns the results of `run()`, written to `path`, or those there where their settings are the same."""
    settings = json.loads(json.dumps(settings))
    try:
        before = json.loads(path.read_text())
        if {k: before.pop(k) for k in settings} == settings and set(before) == {"metrics", "samples"}:
            print(f"{path} is of the same model and settings: taken as it is")
            return settings | before
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass   # none there, or of something else: it is replaced
    metrics, samples = run()
    result = settings | {"metrics": metrics, "samples": samples}
    _write(path, json.dumps(result, default=lambda array: array.tolist()), f"its metrics: {metrics}")
    return result


def _write(path, text, what):
    """Writes a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; {what}") from error


def held_out(config, data: str = "") -> tuple[list[str], str]:
    """Returns (the held-out documents that a run is measured on, where they are from).

    The run's own are those that it is validated on: of config.data.validation, or else of config.data.train.

    Args:
      data: a prepared folder, to take its held-out documents instead.

    Raises:
      UserError: there are none.
    """
    from fm_jax.data import batches, prepared

    source = data or config.data.validation or config.data.train
    mixture = [(data, 1.0)] if data else batches.mixtures(config)[1]
    texts = [text for folder, _ in mixture for text in prepared.texts(folder, "validation")]
    if not texts:
        raise UserError(f"{source} has no held-out text; prepare it with a larger --validation_frac, or name other "
                        "data in --data")
    return texts, source


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv)
    flags.DEFINE_list("tasks", ["perplexity", "next_sentence"], "tasks, patterns of them, and files, separated by "
                      "commas", flag_values=fv)
    flags.DEFINE_integer("num_fewshot", None, "worked examples before each question; default what the task says, or 3",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)
    flags.DEFINE_integer("limit", 0, "only the first so many documents or questions of each task; 0: all",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_string("data", "", "prepared folder whose held-out text is used; default the run's own",
                        flag_values=fv)
    flags.DEFINE_string("output", "", "folder for the results; default WORKDIR/eval/STEP", flag_values=fv)
    flags.DEFINE_list("compare", [], "two runs or folders of results, a b or a,b: how b differs from a, by a paired "
                      "bootstrap over their samples; evaluates nothing", flag_values=fv)


def main(args):
    if args.compare:
        print(_comparison(args.compare))
        return
    if args.workdir is None:
        raise UserError("--workdir is required (see --help)")
    from fm_jax.evals import results as results_lib
    from fm_jax.pretrained import parse_mesh

    found = evaluate(args.workdir, args.tasks, num_fewshot=args.num_fewshot, step=args.step,
                     mesh=parse_mesh(args.mesh), limit=args.limit, data=args.data, output=args.output)
    for task, metrics in found.items():
        for _, _, pipeline, _, metric, _, value, error in results_lib.rows(task, {"metrics": metrics}):
            label = metric if pipeline in ("", "none") else f"{metric},{pipeline}"
            print(f"{task:<16} {label:<18} {value}" + (f" +- {error}" if error else ""))


def _comparison(folders):
    """Returns the table that --compare prints."""
    from fm_jax.evals.results import compare_folders

    if len(folders) != 2:
        raise UserError(f"--compare takes two folders, got {len(folders)}: {', '.join(folders)}")
    found, single = compare_folders(*folders)
    lines = [f"{'task':<24} {'metric':<24} {'a':>9} {'b':>9} {'b - a':>9}  95% of the bootstrap    p"]
    for task, metrics in found.items():
        lines += [f"{task:<24} {name:<24} {d.a:>9.4f} {d.b:>9.4f} {d.b - d.a:>+9.4f}  [{d.low:+.4f}, {d.high:+.4f}]  "
                  f"{d.p:>6.3f}" for name, d in metrics.items()]
    return "\n".join(lines + [f"in one folder only: {', '.join(single)}"] * bool(single))


def _joined(argv):
    """Returns a command line in which `--compare a b` is one argument."""
    at = argv.index("--compare") if "--compare" in argv else len(argv)
    two = argv[at + 1 : at + 3]
    if len(two) < 2 or two[1].startswith("-"):
        return argv
    return [*argv[:at], "--compare=" + ",".join(two), *argv[at + 3 :]]


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__, _joined(sys.argv))

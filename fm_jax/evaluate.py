"""Evaluates the model of a run on named tasks; results go to WORKDIR/eval and to the terminal.

    python -m fm_jax.evaluate --workdir runs/x
    python -m fm_jax.evaluate --workdir runs/x --tasks perplexity,next_sentence --limit 100
    python -m fm_jax.evaluate --workdir runs/x --mesh fsdp=4,tensor=2

Tasks: perplexity (bits per byte of the held-out text), next_sentence (multiple choice from it). Layer 5.
"""

import inspect
import json
import os
import tempfile
from pathlib import Path

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError, choose


def evaluate(workdir, tasks: list[str], *, lm=None, num_fewshot: int = 3, step: int | None = None,
             mesh: dict | None = None, limit: int = 0, data: str = "") -> dict[str, dict]:
    """Returns {task: metrics}, having written a file for each, with every sample, to `workdir`/eval/STEP.

    A file is named by its task and what else decides its contents: perplexity.json, next_sentence_3shot_limit100.json,
    perplexity_NAME-FINGERPRINT.json of other data.

    Args:
      lm: the run's model, where it is loaded already; otherwise it is, from `step` and onto `mesh`.
      data: a prepared folder whose held-out text is used; default the run's own.

    Raises:
      UserError: an unknown task, no run, no held-out text, or a folder that cannot be written, before the evaluation.
    """
    import fm_jax
    from fm_jax.data import prepared
    from fm_jax.evals.tasks import TASKS

    for name in tasks:
        choose(name, TASKS, "--tasks")
    if not tasks:
        raise UserError(f"--tasks is empty; known: {', '.join(TASKS)}")
    lm = lm or fm_jax.load(workdir, step=step, mesh=mesh)
    texts, source = held_out(lm.config, data)
    folder = Path(workdir) / "eval" / str(lm.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write to {folder}, where the results go: {error.strerror}") from error
    results = {}
    for name in tasks:
        few = {"num_fewshot": num_fewshot} if "num_fewshot" in inspect.signature(TASKS[name]).parameters else {}
        result = TASKS[name](lm, texts, limit=limit, **few)
        parts = [name, *([f"{num_fewshot}shot"] if few else []), *([f"limit{limit}"] if limit else [])]
        if data:
            parts.append(f"{Path(data).resolve().name}-{prepared.read_manifest(data)['fingerprint'][:8]}")
        path = folder / f"{'_'.join(parts)}.json"
        new = path.with_name(path.name + ".new")
        try:
            new.write_text(json.dumps({"step": lm.step, "limit": limit, **few, "data": source} | result._asdict()))
            os.replace(new, path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}; its metrics: {result.metrics}") from error
        results[name] = result.metrics
    return results


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
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_list("tasks", ["perplexity", "next_sentence"], "tasks, separated by commas", flag_values=fv)
    flags.DEFINE_integer("num_fewshot", 3, "worked examples before each question", flag_values=fv, lower_bound=0)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)
    flags.DEFINE_integer("limit", 0, "only the first so many documents or questions of each task; 0: all",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_string("data", "", "prepared folder whose held-out text is used; default the run's own",
                        flag_values=fv)


def main(args):
    from fm_jax.pretrained import parse_mesh

    results = evaluate(args.workdir, args.tasks, num_fewshot=args.num_fewshot, step=args.step,
                       mesh=parse_mesh(args.mesh), limit=args.limit, data=args.data)
    for task, found in results.items():
        for name, value in found.items():
            if not name.endswith("_stderr"):
                error = found.get(f"{name}_stderr")
                text = f"{value:d}" if isinstance(value, int) else f"{value:.4f}"
                print(f"{task:<16} {name:<18} {text}" + (f" +- {error:.4f}" if error is not None else ""))


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

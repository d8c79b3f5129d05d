"""Evaluates the model of a run on named tasks; results go to WORKDIR/eval and to the terminal.

    python -m fm_jax.evaluate --workdir runs/x
    python -m fm_jax.evaluate --workdir runs/x --tasks perplexity,next_sentence --limit 100

Tasks: perplexity (bits per byte of the held-out text), next_sentence (multiple choice from it). Layer 5.
"""

import json
from pathlib import Path

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError, choose


def evaluate(workdir, tasks: list[str], *, num_fewshot: int = 3, step: int | None = None, limit: int = 0,
             data: str = "") -> dict[str, dict]:
    """Returns {task: metrics}, having written {task}_{num_fewshot}shot.json with every sample to `workdir`/eval/STEP.

    data: a prepared folder whose held-out text is used; default the run's own.
    """
    import fm_jax
    from fm_jax import checkpoint
    from fm_jax.data import batches, prepared
    from fm_jax.evals.tasks import TASKS

    for name in tasks:
        choose(name, TASKS, "--tasks")
    if not tasks:
        raise UserError(f"--tasks is empty; known: {', '.join(TASKS)}")
    lm = fm_jax.load(workdir, step=step)
    step = checkpoint.steps(workdir)[-1] if step is None else step
    config = lm.config
    text_of = data or config.data.validation or config.data.train
    texts = [t for folder, _ in batches.parse_mixture(text_of, "data.validation")
             for t in prepared.texts(folder, "validation")]
    if not texts:
        raise UserError(f"{text_of} has no held-out text; prepare it with a larger --validation_frac, or name other "
                        "data in --data")
    folder = Path(workdir) / "eval" / str(step)
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in tasks:
        result = TASKS[name](lm, texts, limit, num_fewshot)
        about = {"step": step, "limit": limit, "num_fewshot": num_fewshot, "data": text_of}
        (folder / f"{name}_{num_fewshot}shot.json").write_text(json.dumps(about | result._asdict()))
        results[name] = result.metrics
    return results


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_list("tasks", ["perplexity", "next_sentence"], "tasks, separated by commas", flag_values=fv)
    flags.DEFINE_integer("num_fewshot", 3, "worked examples before each question", flag_values=fv, lower_bound=0)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_integer("limit", 0, "only the first so many documents or questions of each task; 0: all",
                         flag_values=fv, lower_bound=0)
    flags.DEFINE_string("data", "", "prepared folder whose held-out text is used; default the run's own",
                        flag_values=fv)


def main(args):
    results = evaluate(args.workdir, args.tasks, num_fewshot=args.num_fewshot, step=args.step, limit=args.limit,
                       data=args.data)
    for task, found in results.items():
        for name, value in found.items():
            if not name.endswith("_stderr"):
                error = found.get(f"{name}_stderr")
                text = f"{value:d}" if isinstance(value, int) else f"{value:.4f}"
                print(f"{task:<16} {name:<16} {text}" + (f" +- {error:.4f}" if error is not None else ""))


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

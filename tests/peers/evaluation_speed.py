"""Compares the time that fm_jax and lm-evaluation-harness take for the same requests to the same weights; a table.

Theirs is the harness's `hf` model in float32, with the batch size of --batch_sizes that is fastest for the workload in
a round before. A round answers all workloads with ours and then with theirs, each in a process of its own, the order
swapped from round to round; the figure is the median over rounds of the ratio within a round, with the lowest and the
highest, and beside it that of the CPU seconds, which a busy machine disturbs less. Loading is not timed, nor is our
compilation, which has a column. Every log-probability must agree within 1e-4
of itself or 1e-3, every greedy flag exactly, or it says so and exits with 1. The weights are a folder that
`python -m fm_jax.convert` wrote; the questions are of the catalogue. Run it with fm_jax's Python.

Try:  python tests/peers/evaluation_speed.py --model exported --peer_python .venv-lm-eval-hf/bin/python
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

HERE = Path(__file__).resolve().parent
WORKLOADS = {   # task, shots, documents
    "PIQA, 5 shots": ("piqa", 5, 32),
    "OpenBookQA, 10 shots": ("openbookqa", 10, 32),
    "BoolQ, 5 shots": ("boolq", 5, 12),
    "MMLU anatomy, 5 shots": ("mmlu_anatomy", 5, 32),
    "PIQA": ("piqa", 0, 100),
    "OpenBookQA": ("openbookqa", 0, 100),
    "BoolQ": ("boolq", 0, 32),
    "rolling, Shakespeare": ("tiny_shakespeare", 0, 5),
}


def asked(task, shots, documents):
    """Returns the requests of a task: pairs, or texts of a rolling one."""
    from fm_jax.evals import names, requests

    (task,) = names.load([task], num_fewshot=shots)[0].values()
    found = list(requests.questions(task, documents))
    if task.output_type == "loglikelihood_rolling":
        return [q.text[:20_000] for q in found]
    return [pair for q in found for pair in q.pairs]


def timed(run):
    """Returns ({"seconds": by the clock, "cpu": of all cores}, what `run` gives)."""
    started, cpu = time.perf_counter(), time.process_time()
    found = run()
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}, found


def ours(model, workloads, _):
    import fm_jax

    lm = fm_jax.load(model)
    for name, made in workloads.items():
        rolling = isinstance(made[0], str)
        run = lambda: lm.score_texts(made) if rolling else [s[:2] for s in lm.score(*zip(*made))]
        first, _ = timed(run)
        taken, answers = timed(run)
        yield name, taken | {"first": first["seconds"], "answers": answers}


def theirs(model, workloads, batch_sizes):
    import logging

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    import torch

    logging.disable(logging.WARNING)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=1)
    for name, made in workloads.items():
        rolling = isinstance(made[0], str)
        kind = "loglikelihood_rolling" if rolling else "loglikelihood"
        instances = [Instance(kind, {}, (r,) if rolling else tuple(r), i) for i, r in enumerate(made)]
        lm.batch_size_per_gpu = batch_sizes[name]
        taken, answers = timed(lambda: getattr(lm, kind)(instances, disable_tqdm=True))
        yield name, taken | {"answers": answers}


def run(python, side, model, workloads, batch_sizes):
    """Returns {workload: what a side gave}, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked_in, answered_in = Path(folder, "requests.json"), Path(folder, "answers.json")
        asked_in.write_text(json.dumps([workloads, batch_sizes]))
        done = subprocess.run([python, __file__, "--side", side, model, asked_in, answered_in], text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE.parents[1]),
                                                        "TQDM_DISABLE": "1"})
        if done.returncode:
            raise SystemExit(f"{side} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(answered_in.read_text())


def differences(ours, theirs):
    """Returns how many answers are not the same."""
    def same(a, b):
        (a, flag), (b, their_flag) = ((x if isinstance(x, list) else [x, True]) for x in (a, b))
        return flag == their_flag and (abs(a - b) <= 1e-3 or abs(a - b) <= 1e-4 * abs(b))
    return sum(not same(a, b) for a, b in zip(ours, theirs, strict=True))


def main():
    if sys.argv[1:2] == ["--side"]:
        side, model, asked_in, answered_in = sys.argv[2:]
        workloads, batch_sizes = json.loads(Path(asked_in).read_text())
        found = dict({"ours": ours, "theirs": theirs}[side](model, workloads, batch_sizes))
        Path(answered_in).write_text(json.dumps(found))
        return
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="a folder of Hugging Face weights")
    flags.add_argument("--peer_python", required=True)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--scale", type=float, default=1.0, help="of the numbers of documents")
    flags.add_argument("--workloads", help="separated by semicolons; default all: " + "; ".join(WORKLOADS))
    flags.add_argument("--batch_sizes", default="1,8", help="of the harness, separated by commas")
    args = flags.parse_args()
    workloads = {}
    for name in args.workloads.split(";") if args.workloads else WORKLOADS:
        task, shots, documents = WORKLOADS[name]
        workloads[name] = asked(task, shots, max(1, round(documents * args.scale)))
    tried, sizes = {}, list(map(int, args.batch_sizes.split(",")))
    for size in sizes if len(sizes) > 1 else ():
        found = run(args.peer_python, "theirs", args.model, workloads, dict.fromkeys(workloads, size))
        for name, got in found.items():
            tried.setdefault(name, []).append((got["seconds"], size))
    best = {name: min(tried[name])[1] if tried else sizes[0] for name in workloads}
    rounds, wrong = [], 0
    for i in range(args.rounds):
        sides = {}
        for name, python in (("ours", sys.executable), ("theirs", args.peer_python))[:: 1 if i % 2 == 0 else -1]:
            sides[name] = run(python, name, args.model, workloads, best)
        rounds.append(sides)
        print(f"round {i + 1}: " + ", ".join(f"{name} {sum(w['seconds'] for w in found.values()):.1f} s"
                                             for name, found in sides.items()), flush=True)
    print(f"{'workload':<24} {'requests':>8} {'ours/s':>8} {'theirs/s':>8} {'ratio':>6} {'[low-high]':>14} {'cpu':>6} "
          f"{'batch':>5} {'compile_s':>9} {'differ':>6}")
    for name, made in workloads.items():
        a, b = ([r[side][name] for r in rounds] for side in ("ours", "theirs"))
        ratios = sorted(y["seconds"] / x["seconds"] for x, y in zip(a, b))
        differ = max(differences(x["answers"], y["answers"]) for x, y in zip(a, b))
        wrong += differ
        rate = lambda side: len(made) / statistics.median(x["seconds"] for x in side)
        compiled = statistics.median(x["first"] - x["seconds"] for x in a)
        print(f"{name:<24} {len(made):>8} {rate(a):>8.2f} {rate(b):>8.2f} {statistics.median(ratios):>6.2f} "
              f"{f'[{ratios[0]:.2f}-{ratios[-1]:.2f}]':>14} "
              f"{statistics.median(y['cpu'] / x['cpu'] for x, y in zip(a, b)):>6.2f} {best[name]:>5} {compiled:>9.1f} "
              f"{differ:>6}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

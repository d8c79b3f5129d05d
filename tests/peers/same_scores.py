"""Shows that fm_jax and lm-evaluation-harness with transformers find the same on the same weights and tasks.

Both evaluate the tasks in float32. Every log-probability must agree within 1e-4 of itself or 1e-3, every greedy flag
and every generated text exactly, every metric exactly, or within 1e-4 of itself where it is a perplexity. What differs
is printed, and the exit is 1. The weights are a folder that `python -m fm_jax.convert` wrote; tasks are those of
`fm_jax.evaluate`, whose catalogue data is written out for the harness. Run it with fm_jax's Python.

Try:  python tests/peers/same_scores.py --model exported --peer_python .venv-lm-eval-hf/bin/python \\
        --tasks piqa,boolq,openbookqa --num_fewshot 2 --limit 50
"""

import argparse
import functools
import json
import math
import os
from pathlib import Path
import subprocess
import sys
import tempfile

HERE = Path(__file__).resolve().parent


def write(folder, names, choices):
    """Writes the tasks for the harness: their fields as they are, over files of their documents."""
    from fm_jax.data import questions

    read = functools.cache(questions.read)
    for name in names:
        fields = dict(choices[name].fields)
        kind, _, entry = str(fields["dataset_path"]).partition(":")
        if kind == "catalogue":
            splits = read(entry)[fields.pop("dataset_name", "")]
            files = {split: str(folder / f"{name}-{split}.jsonl") for split in splits}
            for split, path in files.items():
                Path(path).write_text("".join(json.dumps(doc) + "\n" for doc in splits[split]))
            fields |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        (folder / f"{name}.yaml").write_text(json.dumps(fields | {"task": name}, default=str))


def harness(folder, model, names, num_fewshot, limit, batch_size):
    """Returns {task: [metrics, samples]}, of the harness, which runs this."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": model, "dtype": "float32"}, device="cpu", batch_size=batch_size, tasks=names,
        task_manager=manager, num_fewshot=num_fewshot, limit=limit or None, bootstrap_iters=0)
    return {name: [found["results"][name], found["samples"][name]] for name in names}


def differences(ours, theirs):
    """Yields what is not equal in a task's results."""
    (metrics, samples), (their_metrics, their_samples) = ours, theirs
    for key, value in their_metrics.items():
        if "," in key and value != "N/A" and "_stderr" not in key:
            tolerance = 1e-4 if "perplexity" in key or "bits_per_byte" in key else 0.0
            if key not in metrics or not math.isclose(metrics[key], value, rel_tol=tolerance):
                yield f"{key}: {metrics.get(key)} instead of {value}"
    if len(samples) != len(their_samples):
        yield f"{len(samples)} samples instead of {len(their_samples)}"
    order = lambda s: (s["filter"], s["doc_id"])
    for a, b in zip(sorted(samples, key=order), sorted(their_samples, key=order)):
        where = f"document {a['doc_id']}, filter {a['filter']}"
        asked = [list(r) for r in b["arguments"]]
        if isinstance(a["arguments"][0], str):
            asked = [r[0] for r in asked]
        if json.loads(json.dumps(a["arguments"])) != asked:
            yield f"{where}: asked {a['arguments']!r} instead of {asked!r}"
        for x, y in zip(a["resps"], (r for request in b["resps"] for r in request), strict=True):
            if not same(x, y):
                yield f"{where}: {x!r} instead of {y!r}"


def same(a, b) -> bool:
    if isinstance(a, str):
        return a == b
    if isinstance(a, (tuple, list)):
        return bool(a[1]) == bool(b[1]) and same(a[0], b[0])
    b = float(b if not isinstance(b, (tuple, list)) else b[0])
    return abs(a - b) <= 1e-3 or abs(a - b) <= 1e-4 * abs(b)


def main():
    if sys.argv[1:2] == ["--harness"]:
        folder, model, answers, rest = sys.argv[2:]
        Path(answers).write_text(json.dumps(harness(folder, model, *json.loads(rest)), default=str))
        return
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="a folder of Hugging Face weights")
    flags.add_argument("--peer_python", required=True)
    flags.add_argument("--tasks", default="piqa,boolq,openbookqa,tiny_shakespeare,nq_open")
    flags.add_argument("--num_fewshot", type=int)
    flags.add_argument("--limit", type=int, default=20)
    flags.add_argument("--batch_size", type=int, default=4, help="of the harness")
    args = flags.parse_args()

    import fm_jax
    from fm_jax.evals import names, requests

    choices, _ = names.find(args.tasks.split(","))
    tasks, _ = names.load(args.tasks.split(","), num_fewshot=args.num_fewshot)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), list(tasks), choices)
        answers = Path(folder, "answers.json")
        rest = json.dumps([list(tasks), args.num_fewshot, args.limit, args.batch_size])
        done = subprocess.run([args.peer_python, __file__, "--harness", folder, args.model, answers, rest], text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": "", "DISABLE_MULTIPROC": "1"})
        if done.returncode:
            raise SystemExit(f"the harness ended with {done.returncode}:\n{done.stderr[-3000:]}")
        theirs = json.loads(answers.read_text())
    lm, wrong = fm_jax.load(args.model), 0
    for name, task in tasks.items():
        found = requests.evaluate(lm, task, limit=args.limit, bootstrap_iters=0)
        differ = list(differences(found, theirs[name]))
        wrong += bool(differ)
        answered = [x for sample in found.samples for x in sample["resps"]]
        figures = ", ".join(f"{k.split(',')[0]} {v:.4f}" for k, v in theirs[name][0].items()
                            if "," in k and "_stderr" not in k and v != "N/A")
        print(f"{name:<20} {len(answered):>5} answers; {figures}: " + (
            "equal" if not differ else f"{len(differ)} differ:\n  " + "\n  ".join(d[:400] for d in differ[:5])))
    print(f"{len(tasks) - wrong} of {len(tasks)} tasks equal")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

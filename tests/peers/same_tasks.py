"""Shows that the package's tasks ask what lm-evaluation-harness's own tasks of these names ask of the same documents.

For every task, at 0 and 5 shots, the requests of its first documents (contexts and continuations) are compared with
those of the harness's task file, which is given our documents in place of its data set; where it has none, with those
that it makes of our file. Then groups: both evaluate MMLU with a model that is a hash of its input, and all figures are
compared. Exits with 1 where one differs. The catalogue's data is fetched (half a gigabyte), or taken from FM_JAX_CACHE.
Run it with the harness's Python, without jax.

Try:  PYTHONPATH=. .venv-lm-eval/bin/python tests/peers/same_tasks.py piqa boolq 'mmlu_*'
"""

import functools
import json
import os
from pathlib import Path
import sys
import tempfile

import same_evaluations as same

from fm_jax.data import catalogue, questions
from fm_jax.evals import names, requests, results, yaml_task

DOCUMENTS = 50
THEIRS = {"king_james_en-fr": "wmt14-en-fr"}   # where the name is another
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# What it does with answers is code there.
JUDGED = ("metric_list", "filter_list", "process_results", "process_docs")


def local(fields, folder, read):
    """Returns a task's fields with its documents as files in the folder, which are written."""
    name, config = fields["dataset_path"].removeprefix("catalogue:"), fields.get("dataset_name", "")
    files = {}
    for split, docs in read(name)[config].items():
        files[split] = str(folder / f"{name}-{config}-{split}.jsonl")
        if not os.path.exists(files[split]):
            Path(files[split]).write_text("".join(json.dumps(d) + "\n" for d in docs))
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def harness_requests(fields, num_fewshot):
    """Returns the arguments of the requests of the first documents."""
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=fields | {"num_fewshot": num_fewshot})
    task.set_fewshot_seed(requests.FEWSHOT_SEED)
    task.build_all_requests(limit=DOCUMENTS)
    return [i.args if i.request_type == "loglikelihood" else i.args[:1] for i in task.instances]


def own_requests(task):
    return [r for q in requests.questions(task, DOCUMENTS) for r in (q.pairs or [(q.text,)])]


def tasks_differ(chosen, folder, read):
    """Returns how many tasks ask something else than the harness's."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    index, wrong = TaskManager().task_index, 0
    for name, (path, fields) in chosen.items():
        data = local(fields, folder, read)
        there = index.get(THEIRS.get(name, name))
        base = load_yaml(there.yaml_path, resolve_func=False) if there else fields
        theirs = {k: v for k, v in base.items() if k not in (*JUDGED, "tag", "group")} | {"task": name} | data
        theirs |= {k: fields.get(k) for k in SPLITS}
        notes = []
        for shots in (0, 5):
            ours = yaml_task.load(path, shots, fields=fields, catalogue=read)
            wanted, got = harness_requests(theirs, ours.num_fewshot), own_requests(ours)
            different = [(a, b) for a, b in zip(got, wanted) if tuple(a) != tuple(b)]
            if different or len(got) != len(wanted):
                notes.append(f"{shots} shots: {len(got)} requests for {len(wanted)}, {len(different)} differ"
                             + "".join(f": {a!r}\ninstead of\n{b!r}" for a, b in different[:1]))
        wrong += bool(notes)
        print(f"{name:<44} {len(got):>4} requests {'' if there else '(of our file) '}"
              + ("equal" if not notes else "\n".join(notes)), flush=True)
    return wrong


def group_differs(name, folder, read, num_fewshot=5, limit=20):
    """Returns whether a group's figures are others than the harness's, of the same files over local data."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    scratch = folder / name
    scratch.mkdir()
    tasks, groups = names.find([name])
    for task, (_, fields) in tasks.items():
        (scratch / f"{task}.yaml").write_text(json.dumps(fields | local(fields, folder, read)))
    for group in groups:
        (scratch / f"{group}.yaml").write_text((names.FOLDER / "mmlu" / f"{group}.yaml").read_text())
    found = lm_eval.simple_evaluate(same.hashed()(), tasks=[name], num_fewshot=num_fewshot, limit=limit,
                                    task_manager=TaskManager(include_path=str(scratch), include_defaults=False))
    loaded = {n: yaml_task.load(c.path, num_fewshot, fields=c.fields, catalogue=read) for n, c in tasks.items()}
    ours = {n: {"metrics": requests.evaluate(same.Model(), t, limit=limit).metrics} for n, t in loaded.items()}
    ours |= {n: {"metrics": results.aggregate(g, ours)} for n, g in groups.items()}
    wrong = [f"{n}: {key} {ours[n]['metrics'].get(key)} instead of {value}" for n, figures in found["results"].items()
             for key, value in figures.items() if "," in key and ours[n]["metrics"].get(key) != value]
    print(f"group {name}: {len(found['results'])} tasks and groups " + ("equal" if not wrong else "\n".join(wrong)))
    return bool(wrong)


def main():
    os.environ |= {"DISABLE_MULTIPROC": "1", "TQDM_DISABLE": "1"}
    read = functools.cache(
        lambda name: questions.read(name, os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE)))
    chosen, groups = names.find(sys.argv[1:] or ["*"])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))   # before `datasets` is imported
        wrong = tasks_differ(chosen, Path(folder), read)
        wrong += sum(group_differs(name, Path(folder), read) for name in groups if name == "mmlu")
    print(f"{len(chosen) - wrong} of {len(chosen)} tasks equal")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

"""Our models inside lm-evaluation-harness: its figures with them are those of our own harness. Needs the real one."""

import json
import subprocess
import sys

import pytest

from fm_jax import lm_eval as adapter
from fm_jax.evals import requests, yaml_task

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: tests/peers/requirements_lm_eval.txt")

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
DOCS = [{"q": f"To be or not {i}", "options": ["to be", f"be {i}"], "label": i % 2, "a": "the"} for i in range(5)]
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": "options", "doc_to_target": "label",
               "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info")]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}"},
    "greedy": {"output_type": "generate_until", "doc_to_target": "a",
               "generation_kwargs": {"until": ["e"], "max_gen_toks": 9}},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCS))
    for name, fields in TASKS.items():
        fields = {"task": name, "dataset_path": "json", "test_split": "test", "doc_to_text": "Q: {{q}}\nA:",
                  "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}, "num_fewshot": 0} | fields
        (folder / f"{name}.yaml").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("chat", [None, requests.Chat("Be brief.", False)])
def test_the_harness_finds_what_ours_finds(chat, tasks, tiny_run):
    import lm_eval
    from lm_eval.tasks import TaskManager

    model = adapter.model_class()(str(tiny_run[0]))
    model.lm.tokenizer.chat_template = TEMPLATE
    how = dict(apply_chat_template=True, fewshot_as_multiturn=False, system_instruction="Be brief.") if chat else {}
    theirs = lm_eval.simple_evaluate(model, tasks=list(TASKS), bootstrap_iters=0, **how,
                                     task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    for name in TASKS:
        ours = requests.evaluate(model.lm, yaml_task.load(tasks / f"{name}.yaml"), chat=chat)
        for key, value in ours.metrics.items():
            if "," in key and "_stderr" not in key:
                assert theirs["results"][name][key] == pytest.approx(value, rel=1e-6), (name, key)
        said = [[r[0] if isinstance(r, (list, tuple)) and len(r) == 1 else r for r in s["resps"]]
                for s in theirs["samples"][name]]
        assert len(said) == len(DOCS)
        if name == "greedy":
            assert said == [sample["resps"] for sample in ours.samples] and any(text for (text,) in said)


def test_the_command_line_knows_the_model(tasks, tiny_run):
    request = [sys.executable, "-m", "fm_jax.lm_eval", "--model", "fm_jax", "--tasks", "greedy", "--include_path",
               str(tasks), "--model_args"]
    done = subprocess.run([*request, f"workdir={tiny_run[0]},step=8"], capture_output=True, text=True)
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stderr[-2000:]
    done = subprocess.run([*request, f"workdir={tasks}"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: " in done.stderr and "no run here" in done.stderr

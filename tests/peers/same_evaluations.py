"""Shows that task files give lm-evaluation-harness's prompts, requests, samples, metrics and standard errors.

Both read the same YAML over the same JSON; the model is a hash of its input, so that any other prompt gives another
number. Requests, samples and figures must be equal to the last digit, and bootstrapped errors to 1e-12, as their sums
are formed in another order. Exits with 1 where they are not. Run it with the harness's Python, without jax.

Try:  PYTHONPATH=. .venv-lm-eval/bin/python tests/peers/same_evaluations.py
"""

import collections
import hashlib
import json
import math
import os
from pathlib import Path
import random
import sys
import tempfile
import types

import numpy as np

from fm_jax.evals import requests, yaml_task

WORDS = "the a fox river é runs over 12 7 blue; stone. (B) sky\nwind".split(" ")
N = 40
ITERS = 2000   # of the bootstrap, not its 100,000: F1 and MCC of 42 documents alone take the harness minutes


def digest(*parts) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


class Model:
    """Answers by a hash of what it is asked."""

    objective = types.SimpleNamespace(arch=types.SimpleNamespace(max_seq_len=10**6))
    # A character is a token.
    tokenizer = types.SimpleNamespace(bos_id=0, eos_id=0, specials={}, adds_bos=False, decode=lambda text: text)

    def encode(self, texts):
        return texts

    def score(self, contexts, continuations):
        return [types.SimpleNamespace(logprob=-(digest(a, b) % 10**6) / 3e4, is_greedy=digest(a, b, "greedy") % 2 == 0)
                for a, b in zip(contexts, continuations)]

    def score_texts(self, texts):
        return [-(digest(t) % 10**6) / 1e3 for t in texts]

    def complete(self, prompts, *, n, temperature, **how):
        texts = self.texts(["".join(prompt) for prompt in prompts for _ in range(n)], temperature)
        return [types.SimpleNamespace(tokens=text) for text in texts]

    def texts(self, prompts, temperature):
        """Sampled, the same prompt gives another text each time."""
        seen = collections.Counter()
        out = []
        for prompt in prompts:
            seen[prompt] += temperature > 0
            rng = random.Random(digest(prompt, seen[prompt]))
            out.append(" ".join(rng.choices(WORDS, k=3)) + rng.choice(["", "\n\nmore", " stop it"]))
        return out


def documents(seed, n=N):
    rng = random.Random(seed)
    text = lambda k: " ".join(rng.choices(WORDS, k=k))
    docs = [{"q": text(6), "choices": [text(2) + str(i) for i in range(3)], "label": rng.randrange(3),
             "yes": rng.randrange(2), "answer": text(1), "answers": [text(1), text(1)],
             "letter": rng.choice("ABC"), "x": rng.choice([1, 2.5]), "text": f" {text(20)}\n{text(5)} "}
            for _ in range(n)]
    return docs + docs[:2] if n > 5 else docs   # some twice


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "Q: {{q}}\nA:", "doc_to_choice": "choices",
          "doc_to_target": "label"}
GENERATE = {"output_type": "generate_until", "doc_to_text": "{{q}} {{x}}", "doc_to_target": "answer"}
METRICS = lambda *names: [{"metric": n} for n in names]
REGEX = {"function": "regex", "regex_pattern": r"(\w+) (?:fox|the)|(12)", "group_select": -1}
FIRST = {"function": "take_first"}
TASKS = {
    "plain": CHOICE,
    "five_shots_of_train": CHOICE | {"training_split": "train", "num_fewshot": 5, "description": "Choose.\n\n"},
    "shots_of_the_test": CHOICE | {"fewshot_split": "test", "num_fewshot": 4},
    "shots_of_the_validation": CHOICE | {"test_split": None, "validation_split": "test", "num_fewshot": 2},
    "first_n": CHOICE | {"fewshot_split": "train", "num_fewshot": 3, "fewshot_config": {"sampler": "first_n"}},
    "first_n_of_the_test": CHOICE | {"fewshot_split": "test", "num_fewshot": 3,
                                     "fewshot_config": {"sampler": "first_n"}},
    "written_shots": CHOICE | {"num_fewshot": 2, "fewshot_config": {
        "sampler": "first_n", "samples": documents(3, 3), "doc_to_text": "{{q | upper}}", "target_delimiter": "\n",
        "fewshot_delimiter": "\n---\n"}},
    "delimiters": CHOICE | {"target_delimiter": "", "fewshot_delimiter": "##", "num_fewshot": 2,
                            "training_split": "train", "doc_to_choice": "{{choices | map('trim') | list}}",
                            "description": "About {{q}}: ", "metric_list": METRICS("acc", "acc_norm", "acc_bytes",
                                                                                   "acc_mutual_info", "exact_match")},
    "letters": CHOICE | {"doc_to_choice": ["A", "B", "C"], "doc_to_target": "letter", "num_fewshot": 1,
                         "training_split": "train"},
    "two_classes": CHOICE | {"doc_to_choice": ["no", "yes"], "doc_to_target": "yes",
                             "metric_list": METRICS("acc", "f1", "mcc", "brier_score")},
    "any_of": CHOICE | {"doc_to_target": "{{[0, label]}}", "metric_list": METRICS("acc", "acc_norm", "exact_match")},
    "questions_as_choices": CHOICE | {"doc_to_text": "label", "doc_to_target": "answer", "num_fewshot": 2,
                                      "training_split": "train",
                                      "doc_to_choice": "{{[q, q | replace('fox', 'cat'), 'no ' + q]}}"},
    "prefixed": CHOICE | {"gen_prefix": "So {{x}}", "num_fewshot": 1, "training_split": "train"},
    "last_word": {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": " {{answer}}",
                  "num_fewshot": 1, "training_split": "train"},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                "doc_to_target": "{{text | regex_replace('(\\\\s)fox', '\\\\1cat')}}"},
    "generate": GENERATE | {"num_fewshot": 2, "training_split": "train"},
    "generate_prefixed": GENERATE | {"num_fewshot": 1, "training_split": "train", "gen_prefix": "Answer:"},
    "generate_any_of": GENERATE | {"doc_to_target": "answers", "generation_kwargs": {"until": ["\n\n", " "]}},
    "generate_number": GENERATE | {"doc_to_target": "{{x}}"},
    "pipelines": GENERATE | {
        "generation_kwargs": {"until": ["\n\n", "stop"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.7},
        "repeats": 5, "filter_list": [
            {"name": "vote", "filter": [REGEX, {"function": "majority_vote"}, FIRST]},
            {"name": "three", "filter": [{"function": "take_first_k", "k": 3}, REGEX, {"function": "majority_vote"},
                                         FIRST]},
            {"name": "raw", "filter": [{"function": "remove_whitespace"}, {"function": "lowercase"}, FIRST]},
            {"name": "letter", "filter": [{"function": "multi_choice_regex", "regex_pattern": r"(\([A-Z]\))",
                                           "ignore_case": True, "ignore_punctuation": True}, FIRST]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                         "ignore_punctuation": True, "regexes_to_ignore": [r"\s", "é"]}]},
    "corpus": GENERATE | {"doc_to_target": "q", "metric_list": METRICS("bleu", "chrf", "chrf++", "ter")},
}


def write(folder):
    """Writes the tasks and their data; returns {name: path}."""
    files = {}
    for seed, split in enumerate(("test", "train")):
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(d) + "\n" for d in documents(seed)))
    paths = {}
    for name, fields in TASKS.items():
        fields = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files},
                  "test_split": "test"} | fields
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return paths


def hashed():
    """Returns the model as a class of the harness."""
    from lm_eval.api.model import LM
    from lm_eval.models.utils import postprocess_generated_text

    class Hashed(LM):
        model = Model()

        def loglikelihood(self, asked):
            found = self.model.score(*zip(*(r.args for r in asked)))
            return [(s.logprob, s.is_greedy) for s in found]

        def loglikelihood_rolling(self, asked):
            return self.model.score_texts([r.args[0] for r in asked])

        def generate_until(self, asked):
            temperature = asked[0].args[1].get("temperature", 0)
            texts = self.model.texts([r.args[0] for r in asked], temperature)
            return [postprocess_generated_text(t, r.args[1]["until"], None) for t, r in zip(texts, asked)]

    return Hashed


def harness(folder, names):
    """Returns what lm-evaluation-harness finds: {task: (metrics, samples)}."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = {}
    for name in names:   # apart, so that equal prompts of other tasks do not count
        found = lm_eval.simple_evaluate(hashed()(), tasks=[name], task_manager=manager, bootstrap_iters=ITERS)
        out[name] = found["results"][name], found["samples"][name]
    return out


def plain(value):
    """Returns a value as JSON has it: no tuples, no NumPy."""
    return json.loads(json.dumps(value, default=lambda x: x.tolist()))


def differences(name, ours, theirs):
    """Yields what is not equal in a task's results."""
    (metrics, samples), (their_metrics, their_samples) = ours, theirs
    for key, value in their_metrics.items():
        if "," not in key or value == "N/A":
            if "," in key and key in metrics:
                yield f"{key}: {metrics[key]}, where the harness has none"
            continue
        tolerance = 1e-12 if "_stderr" in key else 0.0
        if key not in metrics or not math.isclose(metrics[key], value, rel_tol=tolerance):
            yield f"{key}: {metrics.get(key)} instead of {value}"
    if len(samples) != len(their_samples):
        yield f"{len(samples)} samples instead of {len(their_samples)}"
    order = lambda s: (s["filter"], s["doc_id"])
    for a, b in zip(sorted(samples, key=order), sorted(their_samples, key=order)):
        asked = [list(r) for r in b["arguments"]]
        if a["arguments"] and isinstance(a["arguments"][0], str):   # of one text; what follows is how to generate
            asked = [r[0] for r in asked]
        # One request has several responses there where it is repeated, and several requests one each.
        resps = [r for request in b["resps"] for r in request]
        got = {"arguments": asked, "resps": resps, "target": b["target"]} | {m: b[m] for m in b["metrics"]}
        for key, value in got.items():
            if plain(a[key]) != plain(value):
                yield f"document {a['doc_id']}, filter {a['filter']}, {key}: {a[key]!r} instead of {value!r}"
                break


def main():
    os.environ["DISABLE_MULTIPROC"] = "1"
    names = sys.argv[1:] or list(TASKS)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder))
        theirs = harness(folder, names)
        for name in names:
            ours = requests.evaluate(Model(), yaml_task.load(paths[name]), bootstrap_iters=ITERS)
            found = list(differences(name, ours, theirs[name]))
            wrong += bool(found)
            figures = sum("," in k and v != "N/A" for k, v in theirs[name][0].items())
            print(f"{name:<24} {len(ours.samples):>4} samples, {figures:>2} figures: " + (
                "equal" if not found else f"{len(found)} differ: " + found[0][:600]))
    print(f"{len(names) - wrong} of {len(names)} tasks equal")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

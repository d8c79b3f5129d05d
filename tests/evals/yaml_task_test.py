"""Task files of lm-evaluation-harness: what is read, by hand, and what is refused, with its field and file."""

import json

import pytest

from fm_jax.errors import UserError
from fm_jax.evals import yaml_task

FIELDS = {"task": "t", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
          "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "label", "doc_to_choice": "options"}
DOCS = [{"question": "one?", "label": 0, "options": ["yes", "no"]}, {"question": "two?", "label": 1,
                                                                     "options": ["a", "b"]}]


@pytest.fixture
def load(tmp_path):
    """Returns a function (changes of FIELDS, documents of the splits) -> task; a change to None drops a field."""
    def make(changes=(), num_fewshot=None, text=None, **splits):
        files = {}
        for split, docs in ({"test": DOCS} | splits).items():
            files[split] = str(tmp_path / f"{split}.jsonl")
            (tmp_path / f"{split}.jsonl").write_text(docs if isinstance(docs, str) else
                                                     "".join(json.dumps(d) + "\n" for d in docs))
        fields = {"dataset_kwargs": {"data_files": files}} | FIELDS | dict(changes)
        path = tmp_path / "t.yaml"   # JSON is YAML
        path.write_text(text or json.dumps({k: v for k, v in fields.items() if v is not None}))
        return yaml_task.load(path, num_fewshot)
    return make


def test_templates_columns_and_constants(load):
    task = load()
    assert task.text(DOCS[0]) == "Q: one?\nA:" and task.target(DOCS[1]) == 1 and task.choices(DOCS[1]) == ["a", "b"]
    task = load({"doc_to_text": "question", "doc_to_choice": ["A", "B"], "doc_to_target": "{{label}}"})
    assert task.text(DOCS[0]) == "one?" and task.choices(DOCS[0]) == ["A", "B"]
    assert task.target(DOCS[1]) == 1   # digits are the number of a choice
    task = load({"doc_to_choice": {"x": "first", "y": "second"}, "doc_to_target": 1, "doc_to_text": ""})
    assert task.choices(DOCS[0]) == ["first", "second"] and task.target(DOCS[0]) == 1 and task.text(DOCS[0]) == ""
    task = load({"doc_to_choice": "{{options | reverse | list}}", "doc_to_target": "{{['no', 'nein']}}",
                 "doc_to_text": "{{question | regex_replace('[?]', '!')}}\n"})
    assert task.choices(DOCS[0]) == ["no", "yes"] and task.target(DOCS[0]) == ["no", "nein"]
    assert task.text(DOCS[0]) == "one!\n"   # the last line end stays
    task = load({"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{label}}"})
    assert task.target(DOCS[1]) == "1"   # without choices digits are text


def test_defaults_are_the_harnesses(load):
    task = load()
    assert (task.target_delimiter, task.shots.fewshot_delimiter, task.num_fewshot, task.repeats) == (" ", "\n\n", 0, 1)
    assert [m.name for m in task.metrics] == ["acc", "acc_norm"] and task.filters[0][0] == "none"
    task = load({"output_type": "generate_until", "doc_to_choice": None, "fewshot_delimiter": "##"})
    assert task.generation == (("##",), 256, 0.0, 0, 1.0) and [m.name for m in task.metrics] == ["exact_match"]
    given = {"until": "\n", "max_tokens": 5, "max_gen_toks": 7, "temperature": "0.5"}
    both = {"output_type": "generate_until", "doc_to_choice": None}
    assert load({**both, "generation_kwargs": given}).generation == (("\n",), 7, 0.5, 0, 1.0)
    assert load({**both, "generation_kwargs": given | {"do_sample": False}}).generation.temperature == 0


def test_num_fewshot_replaces_all_but_zero(load):
    assert load({"num_fewshot": 2}, num_fewshot=1).num_fewshot == 1 and load(num_fewshot=1).num_fewshot == 1
    assert load({"num_fewshot": 0}, num_fewshot=1).num_fewshot == 0


def test_pool_of_shots_by_precedence(load):
    splits = {s: [d | {"question": s} for d in DOCS] for s in ("test", "validation", "train", "dev")}
    names = {"validation_split": "validation", "training_split": "train", "num_fewshot": 1}
    of = lambda **changes: load(names | changes, **splits).shots
    assert of().pool[0]["question"] == "train" and of(training_split=None).pool[0]["question"] == "validation"
    assert of(training_split=None, validation_split=None).pool[0]["question"] == "test"
    assert of(fewshot_split="dev").pool[0]["question"] == "dev"
    assert of(fewshot_split="dev", fewshot_config={"split": "train"}).pool[0]["question"] == "train"
    samples = [{"question": "written", "label": 0, "options": ["x"]}]
    assert of(fewshot_config={"samples": samples}).pool == samples
    # The harness compares the names of the splits, and two that are not given are equal.
    assert not of().excludes_question and of(fewshot_split="test").excludes_question
    assert of(test_split=None).excludes_question


def test_include_gives_what_the_file_does_not(load, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "common.yaml").write_text("description: from below\ntarget_delimiter: '='\n")
    task = load({"include": "sub/common.yaml", "description": "own"})
    assert (task.description, task.target_delimiter) == ("own", "=")
    (tmp_path / "sub" / "common.yaml").write_text("include: ../t.yaml\n")
    with pytest.raises(UserError, match="t.yaml includes itself"):
        load({"include": "sub/common.yaml"})


def test_documents_are_a_table(load):
    """As the harness's reader makes them: every column in every document, one kind of number in a column."""
    docs = [{"a": 1, "b": {"x": [1]}}, {"a": 2.5, "c": "new", "b": {"x": [0.5, None], "y": True}}]
    task = load({"doc_to_text": "{{a}} {{c}} {{b}}", "doc_to_target": 0, "doc_to_choice": ["x"]}, test=docs)
    assert task.docs == [{"a": 1.0, "b": {"x": [1.0], "y": None}, "c": None},
                         {"a": 2.5, "b": {"x": [0.5, None], "y": True}, "c": "new"}]
    assert task.text(task.docs[0]) == "1.0 None {'x': [1.0], 'y': None}"
    with pytest.raises(UserError, match="test.jsonl: a: one column has values of several kinds: int, str"):
        load({"doc_to_text": "{{a}}"}, test=[{"a": 1}, {"a": "one"}])


def test_a_json_list_and_odd_line_ends(load):
    assert load(test=json.dumps(DOCS, indent=1)).docs == DOCS
    odd = [DOCS[0] | {"question": "a\u2028b\x85c"}]
    assert load(test="\n" + json.dumps(odd[0], ensure_ascii=False) + "\n\n").docs == odd


def test_files_are_found_beside_the_task(load, tmp_path, monkeypatch):
    load()
    monkeypatch.chdir(tmp_path.parent)
    assert load({"dataset_kwargs": {"data_files": {"test": "te*.jsonl"}}}).docs == DOCS
    with pytest.raises(UserError, match="t.yaml: no file none.jsonl"):
        load({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}})


def test_equal_tasks_have_equal_fingerprints(load):
    first = load()
    assert load({"metadata": {"version": 2}, "tag": "x"}).fingerprint == first.fingerprint
    others = [load({"description": "d"}), load(num_fewshot=1), load(test=DOCS[:1]),
              load({"metric_list": [{"metric": "acc"}]})]
    assert len({t.fingerprint for t in (first, *others)}) == 5


GENERATE = {"output_type": "generate_until", "doc_to_choice": None}


@pytest.mark.parametrize("changes, message", [
    ({"doc_to_txt": "x"}, "field: unknown 'doc_to_txt'; did you mean 'doc_to_text'"),
    ({"output_type": "multiple_chioce"}, "output_type: unknown 'multiple_chioce'; did you mean 'multiple_choice'"),
    ({"doc_to_target": None}, "doc_to_target is missing"), ({"doc_to_choice": None}, "doc_to_choice is missing"),
    ({"doc_to_text": "question_text"}, "doc_to_text: column of .*test.jsonl: unknown 'question_text'; did you"),
    ({"process_docs": "x"}, "process_docs cannot be honoured: code in a task file is not run"),
    ({"process_results": "x"}, "process_results cannot"),
    ({"dataset_path": "piqa"}, "dataset_path 'piqa' cannot be honoured: there is no such folder"),
    ({"dataset_kwargs": {"data_file": "x"}}, "dataset_kwargs: unknown 'data_file'; did you mean 'data_files'"),
    ({"test_split": "tests"}, "unknown 'tests'; did you mean 'test'"), ({"test_split": None}, "neither test_split nor"),
    ({"num_fewshot": -1}, "num_fewshot must be a number, 0 or more, not -1"), ({"repeats": 0}, "repeats must be"),
    ({"fewshot_config": {"sampler": "balanced"}}, "fewshot_config.sampler: unknown 'balanced'"),
    ({"fewshot_config": {"fewshot_indices": [1]}}, "fewshot_indices cannot be honoured"),
    ({"metric_list": [{"metric": "acc_nrom"}]}, "metric of output_type multiple_choice: unknown 'acc_nrom'; did you"),
    ({"metric_list": [{"metric": "acc", "ignore_case": True}]}, "metric acc has no option 'ignore_case'"),
    ({"metric_list": [{"metric": "acc", "aggregation": "f1"}]}, "aggregation f1 does not fit metric acc"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate cannot be honoured"),
    ({"filter_list": [{"name": "x", "filter": [{"function": "lowercase"}]}]}, "filter_list changes texts"),
    ({"generation_kwargs": {"until": "x"}}, "generation_kwargs has no meaning"),
    (GENERATE | {"generation_kwargs": {"num_beams": 2}}, "generation_kwargs: unknown 'num_beams'"),
    (GENERATE | {"generation_kwargs": {"do_sample": True}}, "do_sample needs a temperature above 0"),
    (GENERATE | {"filter_list": [{"name": "x", "filter": [{"function": "regx"}]}]}, "unknown 'regx'; did you mean"),
    (GENERATE | {"filter_list": [{"name": "x", "filter": [{"function": "regex", "group": 1}]}]}, "unknown 'group'"),
])
def test_what_cannot_be_honoured_is_an_error(changes, message, load):
    with pytest.raises(UserError, match="t.yaml: .*" + message):
        load(changes)


def test_code_is_not_run(load):
    with pytest.raises(UserError, match="t.yaml: line 2 has !function utils.f: code in a task file is not run"):
        load(text="task: x\nprocess_docs: !function utils.f\n")
    task = load({"doc_to_text": "{{ question.__class__.__mro__ }}"})
    with pytest.raises(UserError, match="t.yaml: doc_to_text .*unsafe"):
        task.text(DOCS[0])


def test_a_missing_column_is_named_with_its_file(load):
    task = load({"doc_to_text": "{{questoin}}"})
    with pytest.raises(UserError, match="t.yaml: doc_to_text: 'questoin' is undefined in a document of .*test.jsonl, "
                                        "which has the columns question, label, options"):
        task.text(DOCS[0])
    with pytest.raises(UserError, match="doc_to_choice gives 'one.', which is no Python list"):
        load({"doc_to_choice": "{{question}}"}).choices(DOCS[0])


@pytest.mark.parametrize("content, message", [
    ('{"a": 1}\n{"a": 2', "test.jsonl, line 2: not JSON"), ("", "has no documents"), ("[1]", "document 1 is 1")])
def test_broken_data(content, message, load):
    with pytest.raises(UserError, match=message):
        load(test=content)


@pytest.mark.parametrize("text, message", [("a: [", "is no YAML"), ("- a", "a task is a table of fields")])
def test_broken_yaml(text, message, load):
    with pytest.raises(UserError, match=message):
        load(text=text)


def test_no_file():
    with pytest.raises(UserError, match="cannot read the task nowhere.yaml: No such file"):
        yaml_task.load("nowhere.yaml")

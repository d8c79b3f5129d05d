"""Names, patterns, files and groups of tasks; the task files of the package."""

import json

import pytest

from fm_jax.errors import UserError
from fm_jax.evals import names, yaml_task

TASK = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "docs.jsonl"}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_target": 0, "doc_to_choice": ["a", "b"]}


def write(folder, **files):
    """Writes task files: JSON is YAML."""
    for name, fields in files.items():
        (folder / f"{name}.yaml").write_text(fields if isinstance(fields, str) else json.dumps(fields))


def test_names_and_patterns():
    tasks, groups = names.find(["piqa", "mmlu_a*", "perp*", "piqa"], ["perplexity"])
    assert list(tasks) == ["piqa", "mmlu_abstract_algebra", "mmlu_anatomy", "mmlu_astronomy", "perplexity"]
    assert tasks["perplexity"] is None and tasks["piqa"].path.name == "piqa.yaml" and not groups
    assert tasks["mmlu_anatomy"].fields["dataset_name"] == "anatomy"


@pytest.mark.parametrize("name, message", [
    ("piqaa", "unknown 'piqaa'; did you mean 'piqa'"), ("mmlu_anatom", "did you mean 'mmlu_anatomy' or "),
    ("zzz", r"unknown 'zzz' \(--list_tasks shows"), ("x*", "no task is like 'x\\*'"),
    ("none.yaml", "cannot read the task none.yaml")])
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        names.find([name], ["perplexity"])
    with pytest.raises(UserError, match="--tasks is empty"):
        names.find([])


def test_groups_of_the_package():
    tasks, groups = names.find(["mmlu"])
    assert len(tasks) == 57 and set(groups) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences",
                                                "mmlu_humanities"}
    assert groups["mmlu"].tasks == tuple(tasks) and list(groups)[-1] == "mmlu"
    assert {len(g.tasks) for g in groups.values()} == {57, 19, 13, 12}
    assert groups["mmlu"].aggregates == (names.Aggregate("acc", None, True),) and groups["mmlu"].version == 2
    tasks, groups = names.find(["mmlu_*"])
    assert len(tasks) == 57 and "mmlu" not in groups and len(groups) == 4


def test_files_of_the_package_are_named_by_their_tasks():
    for name, entry in names.index(names.FOLDER).items():
        assert entry.path.stem == name and names.about(entry)


def test_members_by_name_tag_and_group(tmp_path):
    """Beside the group's file and in the package; what a group says holds for its tasks, and the outer one's more."""
    write(tmp_path, a=TASK | {"task": "a", "tag": "letters"}, b=TASK | {"task": "b", "tag": ["letters", "x"]},
          c=TASK | {"task": "c", "num_fewshot": 1},
          inner={"group": "inner", "task": ["letters"], "num_fewshot": 2, "target_delimiter": "="},
          outer={"group": "outer", "task": ["inner", {"task": "c", "target_delimiter": ":"}, "piqa"], "num_fewshot": 3,
                 "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False, "filter_list": "none"}],
                 "metadata": {"version": 7}})
    tasks, groups = names.find([str(tmp_path / "outer.yaml")])
    assert list(tasks) == ["a", "b", "c", "piqa"]
    of = lambda field: [tasks[n].fields.get(field) for n in "abc"]
    assert of("num_fewshot") == [3, 3, 3] and of("target_delimiter") == ["=", "=", ":"]
    assert groups["inner"] == names.Group(("a", "b"), (), None)
    assert groups["outer"] == names.Group(("a", "b", "c", "piqa"), (names.Aggregate("acc", ("none",), False),), 7)
    assert tasks["piqa"].fields["num_fewshot"] == 3


def test_members_written_out(tmp_path):
    write(tmp_path, g={"group": "g", **TASK, "task": [
        {"task": "one", "description": "1"}, {"group": "sub", "task": [{"task": "two", "description": "2"}]}]})
    tasks, groups = names.find([str(tmp_path / "g.yaml")])
    assert {n: c.fields["description"] for n, c in tasks.items()} == {"g::one": "1", "g::sub::two": "2"}
    assert groups["g"].tasks == ("g::one", "g::sub::two") and groups["g::sub"].tasks == ("g::sub::two",)
    (tmp_path / "docs.jsonl").write_text('{"q": "?"}\n')
    loaded, _ = names.load([str(tmp_path / "g.yaml")], num_fewshot=0)
    assert [t.name for t in loaded.values()] == ["g::one", "g::sub::two"] and loaded["g::one"].docs == [{"q": "?"}]


def test_tasks_of_the_package_are_read_once(tmp_path, monkeypatch):
    asked = []

    def read(name, cache):
        asked.append((name, cache))
        return {subject: {"test": [{"question": "q", "choices": list("wxyz"), "answer": 3}]}
                for subject in ("anatomy", "astronomy")}

    monkeypatch.setattr(names.questions, "read", read)
    tasks, _ = names.load(["mmlu_anatomy", "mmlu_astronomy", "perplexity"], ["perplexity"], cache=tmp_path)
    assert asked == [("mmlu", tmp_path)] and tasks["perplexity"] is None
    assert tasks["mmlu_anatomy"].text(tasks["mmlu_anatomy"].docs[0]) == "q\nA. w\nB. x\nC. y\nD. z\nAnswer:"


@pytest.mark.parametrize("fields, message", [
    ({"task": ["nothing"]}, "group 'g': unknown 'nothing'"), ({"task": []}, "group 'g' has no tasks"),
    ({"task": ["piqa"], "aggregate_metric_list": [{"metrics": "acc"}]}, "aggregate_metric_list: unknown 'metrics'"),
    ({"task": ["piqa"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "max"}]}, "its aggregation is mean"),
    ({"task": ["piqa", {"task": "piqa", "num_fewshot": 2}]}, "names two tasks 'piqa', which differ")])
def test_broken_groups(fields, message, tmp_path):
    write(tmp_path, g={"group": "g"} | fields)
    with pytest.raises(UserError, match=message):
        names.find([str(tmp_path / "g.yaml")])


def test_what_is_no_task_beside_a_group_is_passed_over(tmp_path):
    write(tmp_path, g={"group": "g", "task": ["a"]}, a=TASK | {"task": "a"}, broken="a: [", other={"x": 1},
          code="task: c\nf: !function x.y\n")
    assert list(names.find([str(tmp_path / "g.yaml")])[0]) == ["a"]
    write(tmp_path, g={"group": "g", "task": ["c"]})
    with pytest.raises(UserError, match="code.yaml: line 2 has !function x.y"):
        names.find([str(tmp_path / "g.yaml")])


def test_a_task_file_that_is_copied_and_edited(tmp_path):
    path = tmp_path / "my_piqa.yaml"
    path.write_text((names.FOLDER / "piqa.yaml").read_text().replace("Question:", "Goal:"))
    assert yaml_task.read(path)["doc_to_text"] == "Goal: {{goal}}\nAnswer:"
    assert names.find([str(path)])[0]["piqa"].path == path
    with pytest.raises(UserError, match="two tasks 'piqa', which differ"):
        names.find([str(path), "piqa"])

"""A task's documents from files and folders; folders and CSV also beside the `datasets` library, where that is."""

import json
from pathlib import Path

import pytest

from fm_jax.errors import UserError
from fm_jax.evals import tables

TASK = Path("task.yaml")


def splits(folder, **fields):
    return tables.Splits(folder / "task.yaml", {"dataset_path": str(folder), **fields})


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(d) + "\n" for d in content))


def parquet(path, docs):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(docs), path)


def one(*values):
    return [{"x": v} for v in values]


def test_shards_of_parquet(tmp_path):
    docs = [{"q": "é", "choices": ["a", "b"], "nested": {"label": [0, 1]}}, {"q": "z", "choices": [], "nested": None}]
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", docs[:1])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", docs[1:])
    parquet(tmp_path / "data" / "auxiliary_train-00000-of-00001.parquet", one(1))
    (tmp_path / "README.md").write_text("A data set.\n")
    found = splits(tmp_path)
    assert found.read("train") == docs and found.read("auxiliary_train") == one(1)
    (tmp_path / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="train-00000-of-00002.parquet: not readable as Parquet"):
        found.read("train")


def test_files_named_by_their_split(tmp_path):
    write(tmp_path, train_DOT_jsonl=one(1, 2), dev_DOT_json=json.dumps(one(3)), test_DOT_csv="x\n4\n5\n")
    found = splits(tmp_path)
    assert [found.read(s) for s in ("train", "dev", "validation", "test")] == [one(1, 2), one(3), one(3), one(4, 5)]
    with pytest.raises(UserError, match="task.yaml: split of .*: unknown 'tests'; did you mean 'test'"):
        found.read("tests")
    assert found.source("test").endswith("test.csv")


def test_folders_named_by_their_split_and_no_names_at_all(tmp_path):
    write(tmp_path / "a", train__part0_DOT_jsonl=one(1), train__part1_DOT_jsonl=one(2), val__part0_DOT_jsonl=one(3))
    found = splits(tmp_path / "a")
    assert found.read("train") == one(1, 2) and found.read("validation") == one(3)
    write(tmp_path / "b", first_DOT_jsonl=one(1), second_DOT_jsonl=one(2))
    assert splits(tmp_path / "b").read("train") == one(1, 2)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="the folder .*c has no .json, .jsonl, .csv, .tsv, .parquet files"):
        splits(tmp_path / "c")


def test_configs_of_the_readme(tmp_path):
    write(tmp_path, README_DOT_md="""---
license: mit
configs:
- config_name: anatomy
  data_files:
  - split: test
    path: one/t-*
  - split: dev
    path: [one/d.jsonl]
- config_name: law
  data_dir: two
- config_name: all
  default: true
  data_files: "**/t-*"
---
Text.
""", one__t_1_DOT_jsonl=one(0))
    (tmp_path / "one" / "t_1.jsonl").rename(tmp_path / "one" / "t-1.jsonl")
    write(tmp_path, one__d_DOT_jsonl=one(1), two__test_DOT_jsonl=one(2))
    assert splits(tmp_path, dataset_name="anatomy").read("test") == one(0)
    assert splits(tmp_path, dataset_name="anatomy").read("dev") == one(1)
    assert splits(tmp_path, dataset_name="law").read("test") == one(2)
    assert splits(tmp_path).read("train") == one(0)
    with pytest.raises(UserError, match="config of .*: unknown 'anatomi'; did you mean 'anatomy'"):
        splits(tmp_path, dataset_name="anatomi")
    (tmp_path / "one" / "d.jsonl").unlink()
    with pytest.raises(UserError, match="has no file of split dev, which its README names"):
        splits(tmp_path, dataset_name="anatomy")
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(UserError, match="README.md begins with broken YAML"):
        splits(tmp_path)


def test_configs_as_folders(tmp_path):
    write(tmp_path, anatomy__test_DOT_jsonl=one(1), law__test_DOT_jsonl=one(2))
    assert splits(tmp_path, dataset_name="law").read("test") == one(2)
    with pytest.raises(UserError, match="config, a folder in .*: unknown 'lawn'; did you mean 'law'"):
        splits(tmp_path, dataset_name="lawn")


def test_folder_beside_the_task_and_files_in_it(tmp_path, monkeypatch):
    write(tmp_path, org__name__test_DOT_jsonl=one(1), org__name__other_DOT_jsonl=one(2))
    fields = {"dataset_path": "org/name"}
    assert tables.Splits(tmp_path / "task.yaml", fields).read("test") == one(1)
    monkeypatch.chdir(tmp_path)
    assert tables.Splits(Path("elsewhere/task.yaml"), fields).read("test") == one(1)
    fields["dataset_kwargs"] = {"data_files": {"test": "oth*.jsonl"}}
    assert tables.Splits(TASK, fields).read("test") == one(2)
    with pytest.raises(UserError, match="'org/nam' cannot be honoured: there is no such folder"):
        tables.Splits(TASK, {"dataset_path": "org/nam"})


CSV = 'q,label,score,flag,maybe,code\n"a, ""b""\nc",1,1.5,True,,007\nNone,2,2,False,x,12\n'


def test_csv_by_hand(tmp_path):
    (tmp_path / "t.csv").write_text(CSV)
    found = tables.Splits(TASK, {"dataset_path": "csv", "dataset_kwargs": {"data_files": str(tmp_path / "t.csv")}})
    assert repr(found.read("train")) == repr([   # 7 and 7.0 are two things in a prompt
        {"q": 'a, "b"\nc', "label": 1, "score": 1.5, "flag": True, "maybe": None, "code": 7},
        {"q": None, "label": 2, "score": 2.0, "flag": False, "maybe": "x", "code": 12}])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="t.csv, row 3: 1 values for 2 columns"):
        found.read("train")
    (tmp_path / "t.tsv").write_text("a\tb\n1\t2\n")
    fields = {"dataset_path": "csv", "dataset_kwargs": {"data_files": str(tmp_path / "t.tsv")}}
    assert tables.Splits(TASK, fields).read("train") == [{"a": 1, "b": 2}]
    (tmp_path / "t.txt").write_text("a")
    fields["dataset_kwargs"] = {"data_files": str(tmp_path / "t.txt")}
    with pytest.raises(UserError, match="t.txt is of no known kind"):
        tables.Splits(TASK, fields).read("train")


def test_without_pyarrow_parquet_is_refused(tmp_path, monkeypatch):
    parquet(tmp_path / "test.parquet", one(1))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="test.parquet: Parquet needs pyarrow: pip install pyarrow"):
        splits(tmp_path).read("test")


def test_catalogue(tmp_path):
    read = {"x": {"": {"test": one(1)}}, "many": {"law": {"test": one(2, None)}}}.__getitem__
    assert tables.Splits(TASK, {"dataset_path": "catalogue:x"}, read).read("test") == one(1)
    found = tables.Splits(TASK, {"dataset_path": "catalogue:many", "dataset_name": "law"}, read)
    assert found.read("test") == one(2, None) and found.source("test") == "catalogue:many/law (test)"
    with pytest.raises(UserError, match="dataset_name: config of catalogue:many: unknown 'low'; did you mean 'law'"):
        tables.Splits(TASK, {"dataset_path": "catalogue:many", "dataset_name": "low"}, read)
    with pytest.raises(UserError, match="dataset_path is missing"):
        tables.Splits(TASK, {}, read)


@pytest.mark.parametrize("layout", ["csv", "keywords", "readme"])
def test_as_the_datasets_library_reads_it(layout, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is the reference")
    folder = tmp_path / "data_set"
    if layout == "csv":
        write(folder, train_DOT_csv=CSV)
    elif layout == "keywords":
        write(folder, train__a_DOT_jsonl=one(1), train__b_DOT_jsonl=one(2), my_eval_DOT_jsonl=one(3),
              dev_DOT_jsonl=one(4))
    else:
        readme = "---\nconfigs:\n- config_name: c\n  data_files:\n  - split: s\n    path: d/*\n---\n"
        write(folder, README_DOT_md=readme, d__b_DOT_jsonl=one(1), d__a_DOT_jsonl=one(2))
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    ours = splits(folder)
    for split, docs in theirs.items():
        assert ours.read(split) == docs.to_list()

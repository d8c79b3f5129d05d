"""The documents of a task: JSON, CSV and Parquet files, folders laid out as on the Hugging Face hub, the catalogue.

A document is a dict; those of a split form a table, in which each has every column. Layer 4.
"""

from collections.abc import Callable
import csv
import glob
import json
from pathlib import Path
import re

from fm_jax.data import questions
from fm_jax.errors import UserError, choose

# Words in a file's path that say its split, as the `datasets` library has them.
KEYWORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
            "dev": "validation", "val": "validation", "test": "test", "testing": "test", "eval": "test",
            "evaluation": "test"}
# What pandas, which reads CSV there, takes for no value.
MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                     "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))


class Splits:
    """The splits of a task's data. Relative paths are sought from the working folder, then beside the task file.

    dataset_path is one of: json, csv or parquet, with the files of each split in dataset_kwargs.data_files; a folder
    with the files of a Hugging Face data set; catalogue:NAME. dataset_name chooses one of several configs.
    """

    def __init__(self, path: Path, fields: dict, catalogue: Callable[[str], dict] = questions.read):
        self.path, self.files, self.tables = path, {}, {}
        kind, config = fields.get("dataset_path"), fields.get("dataset_name")
        given = {k: v for k, v in (fields.get("dataset_kwargs") or {}).items() if k != "trust_remote_code"}
        for name in given:
            choose(name, ("data_files", "data_dir"), f"{path}: dataset_kwargs")
        if not isinstance(kind, str):
            raise UserError(f"{path}: dataset_path is missing; it says where the documents are")
        if kind.startswith("catalogue:"):
            self.data = kind if config is None else f"{kind}/{config}"
            tables = catalogue(kind.removeprefix("catalogue:"))
            self.tables = tables[choose(config or "", tables, f"{path}: dataset_name: config of {kind}")]
            return
        self.data = "dataset_kwargs.data_files"
        files, below = given.get("data_files"), given.get("data_dir") or ""
        if kind in ("json", "csv", "parquet"):
            if not files:
                raise UserError(f"{path}: dataset_kwargs.data_files names no file")
        else:
            folder = next((f for f in (Path(kind), path.parent / kind) if f.is_dir()), None)
            if folder is None:
                raise UserError(f"{path}: dataset_path {kind!r} cannot be honoured: there is no such folder, and "
                                "nothing is downloaded but the catalogue; copy the data set there, or write "
                                "dataset_path: json and dataset_kwargs: {data_files: {test: FILE.jsonl}}")
            if not files:
                self.data = str(folder)
                self.files = _folder_splits(folder / below, config, path)
                return
            below = folder / below
        files = files if isinstance(files, dict) else {"train": files}
        self.files = {split: [str(Path(below, f)) for f in _list(f)] for split, f in files.items()}

    def source(self, split) -> str:
        """Returns where a split's documents are from."""
        return ", ".join(map(str, self.files[split])) if self.files else f"{self.data} ({split})"

    def read(self, split) -> list[dict]:
        """Returns a split's documents: each with every column, None where it says nothing."""
        choose(split, self.files or self.tables, f"{self.path}: split of {self.data}")
        docs = []
        if self.tables:
            docs = self.tables[split]
        else:
            for file in self.files[split]:
                docs += _file_documents(file) if isinstance(file, Path) else self._matching(file)
        return _cast(docs, _kind(docs, self.source(split)))

    def _matching(self, pattern):
        """Returns the documents of the files that a name or pattern stands for."""
        found = sorted(glob.glob(pattern)) or sorted(glob.glob(str(self.path.parent / pattern)))
        if not found:
            raise UserError(f"{self.path}: no file {pattern}, neither in the working folder nor beside the task")
        return [doc for file in found for doc in _file_documents(Path(file))]


def _list(value):
    return value if isinstance(value, list) else [value]


# --- A folder as on the hub


def _folder_splits(folder, config, path) -> dict[str, list[Path]]:
    """Returns {split: files} of a config: as the README's front matter says, else by the names of the files."""
    configs = {c.get("config_name", "default"): c for c in _front_matter(folder / "README.md").get("configs", ())}
    if configs:
        if config is None:
            marked = [name for name, c in configs.items() if c.get("default")]
            config = marked[0] if marked else "default" if "default" in configs or len(configs) > 1 else [*configs][0]
        found = configs[choose(config, configs, f"{path}: dataset_name: config of {folder}")]
        base, files = folder / found.get("data_dir", ""), found.get("data_files")
        if files is None:
            return _splits_by_name(base)
        splits = {}
        for entry in _list(files):
            split, patterns = (entry["split"], entry["path"]) if isinstance(entry, dict) else ("train", entry)
            for pattern in _list(patterns):
                splits.setdefault(split, []).extend(sorted(p for p in base.glob(pattern) if p.suffix in READERS))
        empty = [split for split, there in splits.items() if not there]
        if empty:
            raise UserError(f"{path}: {folder} has no file of split {empty[0]}, which its README names; was it copied "
                            "whole?")
        return splits
    if config is not None and config != "default":
        choose(config, sorted(p.name for p in folder.iterdir() if p.is_dir()),
               f"{path}: dataset_name: config, a folder in {folder}")
        folder /= config
    splits = _splits_by_name(folder)
    if not splits:
        raise UserError(f"{path}: the folder {folder} has no {', '.join(READERS)} files")
    return splits


def _front_matter(readme) -> dict:
    import yaml

    if not readme.is_file():
        return {}
    block = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL)
    try:
        found = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        raise UserError(f"{readme} begins with broken YAML: {error}") from error
    return found if isinstance(found, dict) else {}


def _splits_by_name(folder) -> dict[str, list[Path]]:
    """Returns {split: files}: of split NAME are NAME.json and NAME-00000-of-00002.parquet, or what a keyword says."""
    exact, by_word, unnamed = {}, {}, []
    for file in sorted(p for p in folder.rglob("*") if p.suffix in READERS and p.is_file()):
        inside = file.relative_to(folder).with_suffix("")
        if any(part.startswith(".") for part in inside.parts):
            continue
        exact.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", inside.name), []).append(file)
        word = next((w for w in re.split(r"[^a-z]+", inside.as_posix().lower()) if w in KEYWORDS), None)
        (by_word.setdefault(KEYWORDS[word], []) if word else unnamed).append(file)
    if unnamed and not by_word:
        by_word = {"train": unnamed}
    return by_word | exact


# --- Files


def _file_documents(file: Path) -> list[dict]:
    if file.suffix not in READERS:
        raise UserError(f"{file} is of no known kind ({', '.join(READERS)})")
    try:
        docs = READERS[file.suffix](file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    for number, doc in enumerate(docs, 1):
        if not isinstance(doc, dict):
            raise UserError(f"{file}: document {number} is {doc!r:.60}, not a table of columns")
    return docs


def _json(file):
    """Returns the documents of a file: JSON, one on a line or a list of them."""
    text = file.read_text(encoding="utf-8")
    # A JSON string may hold other line ends than \n, such as U+2028.
    lines = [(1, text)] if text.lstrip().startswith("[") else enumerate(text.split("\n"), 1)
    docs = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number + error.lineno - 1}: not JSON: {error.msg}") from error
        docs += found if isinstance(found, list) else [found]
    return docs


def _csv(file, delimiter=","):
    """Returns the rows below the first, which names the columns: a column of numbers as numbers."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines, delimiter=delimiter))
    header, rows = (rows[0], [r for r in rows[1:] if r]) if rows else ([], [])
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(f"{file}, row {number}: {len(row)} values for {len(header)} columns")
    columns = [_typed([None if v in MISSING else v for v in column]) for column in zip(*rows)]
    return [dict(zip(header, row)) for row in zip(*columns)]


def _typed(values):
    there = [v for v in values if v is not None]
    for pattern, of in ((r"[+-]?\d+", int), (r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", float),
                        ("True|TRUE|true|False|FALSE|false", lambda v: v[0] in "tT")):
        if there and all(re.fullmatch(pattern, v) for v in there):
            return [v if v is None else of(v) for v in values]
    return values


def _parquet(file):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not readable as Parquet: {str(error).splitlines()[0]}") from error


READERS = {".json": _json, ".jsonl": _json, ".csv": _csv, ".tsv": lambda file: _csv(file, "\t"), ".parquet": _parquet}


# --- Tables


def _kind(values, where):
    """Returns the one kind of all values but None: a type, {key: kind} of dicts, [kind] of lists, None of no value.

    The harness reads documents as tables, in which a column has one kind and whole numbers beside others are floats.
    """
    values = [v for v in values if v is not None]
    types = {type(v) for v in values}
    if types == {int, float}:
        return float
    if len(types) > 1:
        raise UserError(f"{where}: one column has values of several kinds: "
                        f"{', '.join(sorted(t.__name__ for t in types))}")
    if types == {dict}:
        keys = dict.fromkeys(key for v in values for key in v)
        return {key: _kind([v.get(key) for v in values], f"{where}: {key}") for key in keys}
    if types == {list}:
        return [_kind([item for v in values for item in v], where)]
    return types.pop() if types else None


def _cast(value, kind):
    """Returns `value` as its column has it."""
    if isinstance(value, list) and not isinstance(kind, list):   # the documents themselves
        return [_cast(v, kind) for v in value]
    if value is None:
        return None
    if isinstance(kind, dict):
        return {key: _cast(value.get(key), of) for key, of in kind.items()}
    if isinstance(kind, list):
        return [_cast(v, kind[0]) for v in value]
    return float(value) if kind is float else value

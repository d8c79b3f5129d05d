"""Which tasks there are, by name: built in, in a file of the package or of the user, and groups of them. Layer 4.

A group is a file of lm-evaluation-harness with `group`, `task` (a list of tasks, tags and groups) and
`aggregate_metric_list`; what else it says holds for its tasks.

Try:  python -m fm_jax.evaluate --list_tasks
"""

from collections.abc import Iterable
import difflib
import fnmatch
import functools
import glob
from pathlib import Path
import re
from typing import NamedTuple

from fm_jax.data import catalogue, questions
from fm_jax.errors import UserError, choose
from fm_jax.evals import yaml_task

FOLDER = Path(__file__).with_name("task_files")
YAML = (".yaml", ".yml")
GROUP = ("group", "group_alias", "task", "tag", "aggregate_metric_list", "metadata")
AGGREGATE = ("metric", "filter_list", "aggregation", "weight_by_size")


class Choice(NamedTuple):
    """A task that was asked for: its file, and its fields as the groups that it was asked for with have them."""

    path: Path
    fields: dict


class Aggregate(NamedTuple):
    """A metric of a group, the mean over its tasks. `pipelines`: of which filters; None: of all there are."""

    metric: str
    pipelines: tuple[str, ...] | None
    weight_by_size: bool


class Group(NamedTuple):
    tasks: tuple[str, ...]   # also those of groups in it
    aggregates: tuple[Aggregate, ...]
    version: object


class Entry(NamedTuple):
    """What a name in a folder of task files stands for. `tags`: what else its task can be asked for by."""

    path: Path
    fields: dict
    tags: tuple[str, ...]


def load(names: Iterable[str], built_in: Iterable[str] = (), *, num_fewshot: int | None = None,
         cache=catalogue.DEFAULT_CACHE) -> tuple[dict[str, yaml_task.Task | None], dict[str, Group]]:
    """Returns ({task: what `find` finds, its data read}, {group: its tasks}).

    num_fewshot: as in yaml_task.load. cache: folder of downloaded catalogue data.
    """
    tasks, groups = find(names, built_in)
    read = functools.cache(lambda name: questions.read(name, cache))   # 57 tasks read one archive
    return {name: choice and yaml_task.load(choice.path, num_fewshot, fields=choice.fields, catalogue=read)
            for name, choice in tasks.items()}, groups


def index(folder) -> dict[str, Entry]:
    """Returns {name: entry} of the task and group files in a folder and those below; the first of a name counts."""
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in YAML):
        try:
            fields = yaml_task.read(path, code=True)
        except UserError:   # something else than a task, or a broken one, which says so when it is asked for
            continue
        name, tags = fields.get("group") or fields.get("task"), fields.get("tag") or ()
        if isinstance(name, str):
            found.setdefault(name, Entry(path, fields, tuple([tags] if isinstance(tags, str) else tags)))
    return found


def about(entry: Entry) -> str:
    """Returns a line on a task: its metadata.about."""
    metadata = entry.fields.get("metadata")
    return str(metadata.get("about", "")) if isinstance(metadata, dict) else ""


def find(names: Iterable[str], built_in: Iterable[str] = ()) -> tuple[dict[str, Choice | None], dict[str, Group]]:
    """Returns ({task: choice}, {group: its tasks}) for names, patterns of them, and files of tasks and groups.

    A task is there once, in the order of its first name; of a built-in one the choice is None.

    Raises:
      UserError: an unknown name, with the nearest; a pattern of none; a name that stands for two tasks.
    """
    ours, found = index(FOLDER), _Found({}, {})
    known = [*built_in, *ours]
    for name in names:
        if name.endswith(YAML):
            for path in sorted(glob.glob(name)) or [name]:
                fields = yaml_task.read(path)
                beside = ours | index(Path(path).parent) if _is_group(fields) else ours
                found.add(fields.get("group") if _is_group(fields) else fields.get("task"), Path(path), fields, {},
                          beside)
            continue
        matching = [name] if name in known else fnmatch.filter(known, name) if re.search(r"[*?[]", name) else []
        if not matching:
            raise UserError(f"--tasks: {unknown(name, known)}")
        for each in matching:
            if each in ours:
                found.add(each, ours[each].path, yaml_task.read(ours[each].path), {}, ours)
            else:
                found.tasks[each] = None
    if not found.tasks:
        raise UserError(f"--tasks is empty; {_KNOWN}")
    return found.tasks, found.groups


_KNOWN = "--list_tasks shows those that there are"


def unknown(name: str, known: Iterable[str]) -> str:
    """Returns what to say of a name or pattern that none of the known is like."""
    if re.search(r"[*?[]", name):
        return f"no task is like {name!r} ({_KNOWN})"
    near = [repr(n) for n in difflib.get_close_matches(name, known, n=3)]
    return f"unknown {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "") + f" ({_KNOWN})"


def _is_group(fields):
    return "group" in fields and not isinstance(fields.get("task"), str)


class _Found(NamedTuple):
    tasks: dict
    groups: dict

    def add(self, name, path, fields, changes, known) -> list[str]:
        """Returns the tasks that a file stands for, having noted them. `changes`: fields instead of the file's."""
        if _is_group(fields):
            return self._add_group(name, path, fields, changes, known)
        if not isinstance(name, str):
            raise UserError(f"{path}: task is missing")
        choice = Choice(path, fields | changes | {"task": name})
        if self.tasks.setdefault(name, choice) != choice:
            raise UserError(f"--tasks names two tasks {name!r}, which differ; evaluate them apart")
        return [name]

    def _add_group(self, name, path, fields, changes, known):
        changes = {k: v for k, v in fields.items() if k not in GROUP} | changes
        leaves = []
        for item in _members(path, fields):
            item = dict(item) if isinstance(item, dict) else {"task": item}
            kind = "group" if "group" in item else "task"
            member = item.pop(kind, None)
            tagged = [n for n, entry in known.items() if member in entry.tags]
            if member in known:
                entry = known[member]
                leaves += self.add(member, entry.path, yaml_task.read(entry.path), changes | item, known)
            elif tagged:
                for each in sorted(tagged):
                    leaves += self.add(each, known[each].path, yaml_task.read(known[each].path), changes | item, known)
            elif kind == "group" or "doc_to_text" in changes | item:   # written out here
                leaves += self.add(f"{name}::{member}", path, item | {kind: member}, changes, known)
            else:
                raise UserError(f"{path}: group {name!r}: {unknown(str(member), known)}")
        self.groups[name] = Group(tuple(dict.fromkeys(leaves)), _aggregates(path, fields),
                                  (fields.get("metadata") or {}).get("version"))
        return leaves


def _members(path, fields):
    members = fields.get("task")
    members = [members] if isinstance(members, (str, dict)) else members
    if not isinstance(members, list) or not members:
        raise UserError(f"{path}: group {fields['group']!r} has no tasks; name them in `task`")
    return members


def _aggregates(path, fields):
    given = fields.get("aggregate_metric_list") or []
    out = []
    for each in [given] if isinstance(given, dict) else given:
        for key in each:
            choose(key, AGGREGATE, f"{path}: aggregate_metric_list")
        if "metric" not in each or each.get("aggregation", "mean") != "mean":
            raise UserError(f"{path}: aggregate_metric_list: each needs a metric, and its aggregation is mean; got "
                            f"{each}")
        pipelines = each.get("filter_list")
        out.append(Aggregate(each["metric"], tuple([pipelines] if isinstance(pipelines, str) else pipelines)
                             if pipelines else None, each.get("weight_by_size", True)))
    return tuple(out)

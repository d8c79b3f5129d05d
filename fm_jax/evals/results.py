"""What was measured, as a table, and two models' samples beside each other. Layer 4."""

from collections.abc import Mapping
import json
import math
from typing import NamedTuple

import numpy as np

from fm_jax import storage
from fm_jax.errors import UserError
from fm_jax.evals import metrics

RESAMPLES = 10_000
SKIPPED = ("metrics", "samples", "model", "step", "version", "chat_template")   # of files that compare, may differ


def read(path) -> dict:
    """Returns what `python -m fm_jax.evaluate` wrote to a file.

    Raises:
      UserError: no such file, or no such contents.
    """
    try:
        found = json.loads(storage.place(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the results {path}: {error}") from error
    if not isinstance(found, dict) or not {"metrics", "samples"} <= set(found):
        raise UserError(f"{path} holds no results of an evaluation")
    return found


def rows(name: str, result: Mapping) -> list[tuple[str, ...]]:
    """Returns (task, version, filter, shots, metric, direction, value, error) of each metric of a result, as texts."""
    out = []
    for key, value in result["metrics"].items():
        metric, _, pipeline = key.partition(",")
        if metric.endswith("_stderr") or (metric == "truncated_contexts" and not value):
            continue
        error = result["metrics"].get(f"{metric}_stderr" + (f",{pipeline}" if pipeline else ""))
        arrow = {True: "↑", False: "↓"}.get(result.get("higher_is_better", {}).get(metric), "")
        version, shots = str(result.get("task_version") or ""), str(result.get("num_fewshot", ""))
        out.append((name, version, pipeline, shots, metric, arrow,
                    f"{value:d}" if isinstance(value, int) else f"{value:.4f}",
                    "" if error is None else f"{error:.4f}"))
    return out


def markdown(results: Mapping[str, Mapping]) -> str:
    """Returns a Markdown table of {task: result}, and one of the groups among them."""
    tables = []
    for title in ("Task", "Group"):
        lines = [f"| {title} | Version | Filter | n-shot | Metric |   | Value |   | Stderr |",
                 "|---|---|---|--:|---|---|--:|---|--:|"]
        for name, result in results.items():
            for *left, value, error in rows(name, result) if ("tasks" in result) == (title == "Group") else ():
                cells = [*(c.replace("|", "\\|") for c in left), value, "±" if error else "", error]
                lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines) + "\n")
    return tables[0] + "\n" + tables[1] if any("tasks" in r for r in results.values()) else tables[0]


def aggregate(group, results: Mapping[str, Mapping]) -> dict[str, float]:
    """Returns the metrics of a group (names.Group) from {task: result}, of the tasks that have them.

    A metric is the mean over tasks, by their documents where it is weighted, and its standard error that of such a
    mean; there is none where a task has none. Source: the harness's api/group.py; of the error
    https://en.wikipedia.org/wiki/Pooled_variance.

    Raises:
      UserError: no task of the group has a metric.
    """
    out = {}
    found = [results[name]["metrics"] for name in group.tasks]
    for each in group.aggregates:
        pipelines = each.pipelines or sorted({key.partition(",")[2] for m in found for key in m
                                              if key.startswith(f"{each.metric},")})
        for pipeline in pipelines or [""]:
            key, error = f"{each.metric},{pipeline}", f"{each.metric}_stderr,{pipeline}"
            there = [m for m in found if key in m]
            if not there:
                raise UserError(f"no task of a group has the metric {key.strip(',')!r} of its aggregate_metric_list: "
                                f"{', '.join(group.tasks)}")
            sizes = [m["documents"] for m in there]
            weights = sizes if each.weight_by_size else [1] * len(there)
            out[key] = sum(m[key] * weight for m, weight in zip(there, weights)) / sum(weights)
            if not all(error in m for m in there):
                continue
            errors = [m[error] for m in there]
            if each.weight_by_size:
                pooled = sum((n - 1) * e**2 * n for n, e in zip(sizes, errors)) / (sum(sizes) - len(sizes))
                out[error] = math.sqrt(pooled / sum(sizes))
            else:
                out[error] = math.sqrt(sum(e**2 for e in errors)) / len(errors)
    return out | {"documents": sum(m["documents"] for m in found)}


def samples(group, results: Mapping[str, Mapping]) -> list[dict]:
    """Returns the items of a group's documents from {task: result}, of the metrics that are their mean over all."""
    out = []
    for task in group.tasks:
        means = [each.metric for each in group.aggregates
                 if each.weight_by_size and results[task]["aggregations"].get(each.metric) == "mean"]
        out += [{"task": task, "doc_id": s["doc_id"], "filter": s["filter"]} | {m: s[m] for m in means if m in s}
                for s in results[task]["samples"]]
    return out


# --- Two models


class Difference(NamedTuple):
    """b - a of one metric. low, high: 95% of the bootstrap; p: two-sided, that there is none."""

    a: float
    b: float
    low: float
    high: float
    p: float
    documents: int


def compare(a: Mapping, b: Mapping, seed: int = 0) -> dict[str, Difference]:
    """Returns {metric: difference} of two results of one task, by a paired bootstrap over documents.

    Both models' items of the same RESAMPLES draws of documents are aggregated; a metric that needs all texts anew for
    each draw is left out. Source: Efron and Tibshirani 1993, chapters 13 and 16; Koehn 2004.

    Raises:
      UserError: the results are not of the same questions.
    """
    for name in sorted((set(a) | set(b)) - set(SKIPPED)):
        if a.get(name) != b.get(name):
            raise UserError(f"these results do not compare: {name} is {_short(a.get(name))} here and "
                            f"{_short(b.get(name))} there")
    if len(a["samples"]) != len(b["samples"]):
        raise UserError(f"these results do not compare: {len(a['samples'])} samples here, {len(b['samples'])} there")
    out = {}
    for key, value in a["metrics"].items():
        metric, _, pipeline = key.partition(",")
        how = metrics.AGGREGATIONS[_aggregation(metric, a)]
        items = [[s[metric] for s in r["samples"] if metric in s and s.get("filter", "") == pipeline] for r in (a, b)]
        if not items[0] or how.rows is None:
            continue
        columns, n = [metrics.columns_of(x) for x in items], len(items[0])
        rng, gaps = np.random.default_rng(seed), []
        for _ in range(RESAMPLES // 100):
            index = rng.integers(0, n, (100, n))
            gaps.append(how.rows(columns[1], index) - how.rows(columns[0], index))
        gaps = np.concatenate(gaps)
        low, high = np.quantile(gaps, [0.025, 0.975])
        p = min(1.0, 2 * min((gaps <= 0).mean(), (gaps >= 0).mean()))
        out[key] = Difference(value, b["metrics"][key], float(low), float(high), float(p), n)
    return out


def _aggregation(metric, result):
    """Returns the name of a metric's aggregation: as the task says, else the one it has in METRICS, else a mean."""
    known = {name: aggregation for of in metrics.METRICS.values() for name, (aggregation, _) in of.items()}
    return result.get("aggregations", {}).get(metric, known.get(metric, "mean"))


def _short(value):
    return f"{value!r:.80}"


def compare_folders(folder_a, folder_b) -> tuple[dict[str, dict[str, Difference]], list[str]]:
    """Returns ({task file's name: differences}, names in only one) of the results below two folders.

    A run's results are those of its newest evaluated step, those of a folder of weights in its eval.

    Raises:
      UserError: a folder without results, or none in common.
    """
    found = [_files(folder) for folder in (folder_a, folder_b)]
    both = sorted(set(found[0]) & set(found[1]))
    if not both:
        raise UserError(f"{folder_a} has results of {', '.join(found[0])}, {folder_b} of {', '.join(found[1])}: none "
                        "in common")
    return ({name: compare(read(found[0][name]), read(found[1][name])) for name in both},
            sorted(set(found[0]) ^ set(found[1])))


def _files(folder):
    """Returns {name: path} of the result files of a folder, or of the newest step of a run."""
    folder = storage.place(folder)
    steps = [d for d in (folder / "eval").glob("*") if d.name.isdecimal() and any(d.glob("*.json"))]
    within = folder / "eval" if (folder / "eval").is_dir() else folder
    within = max(steps, key=lambda d: int(d.name), default=within)
    names = {p.stem: p for p in sorted(within.glob("*.json"))}
    if not names:
        raise UserError(f"{folder} has no results; make them with python -m fm_jax.evaluate")
    return names

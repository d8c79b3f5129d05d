"""The table, and the paired bootstrap beside exact answers and a naive one."""

import json

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.evals import names, results

RESULT = {"task_version": 1.0, "num_fewshot": 2, "higher_is_better": {"acc": True},
          "metrics": {"acc,none": 0.5, "acc_stderr,none": 0.25, "bits_per_byte,none": 1.0, "documents": 4},
          "samples": [{"acc": float(i % 2), "bits_per_byte": [-float(i + 1), 4], "filter": "none"} for i in range(4)]}


def test_table_by_hand():
    text = results.markdown({"t|x": RESULT})
    assert text.splitlines()[2:] == ["| t\\|x | 1.0 | none | 2 | acc | ↑ | 0.5000 | ± | 0.2500 |",
                                     "| t\\|x | 1.0 | none | 2 | bits_per_byte |  | 1.0000 |  |  |",
                                     "| t\\|x | 1.0 |  | 2 | documents |  | 4 |  |  |"]


def test_groups_have_a_table_of_their_own():
    text = results.markdown({"t": RESULT, "g": {"tasks": ["t"], "num_fewshot": 2, "metrics": {"acc,none": 0.25}}})
    tasks, groups = text.split("\n\n")
    assert "| t | 1.0 | none | 2 | acc " in tasks and "| g |" not in tasks
    assert groups.splitlines()[2:] == ["| g |  | none | 2 | acc |  | 0.2500 |  |  |"]
    text = results.markdown({"t": {"metrics": {"acc,none": 1.0, "truncated_contexts": 0}}})
    assert "truncated" not in text
    assert "truncated_contexts" in results.markdown({"t": {"metrics": {"truncated_contexts": 3}}})


def test_a_group_is_a_weighted_mean():
    """Its error is that of all documents together, once the mean of its task is taken off each."""
    rng = np.random.default_rng(0)
    hits = [rng.integers(0, 2, n) for n in (7, 20, 45)]
    task = lambda h: {"metrics": {"acc,none": h.mean(), "acc_stderr,none": h.std(ddof=1) / len(h) ** 0.5,
                                  "documents": len(h)}}
    found = {name: task(h) for name, h in zip("abc", hits)}
    group = lambda **how: names.Group(("a", "b", "c"), (names.Aggregate(**{
        "metric": "acc", "pipelines": None, "weight_by_size": True} | how),), None)
    n, together = 72, np.concatenate(hits)
    within = sum(((h - h.mean()) ** 2).sum() for h in hits) / (n - 3)
    assert results.aggregate(group(), found) == pytest.approx(
        {"acc,none": together.mean(), "acc_stderr,none": (within / n) ** 0.5, "documents": n})
    errors = [found[name]["metrics"]["acc_stderr,none"] for name in "abc"]
    assert results.aggregate(group(weight_by_size=False), found) == pytest.approx(
        {"acc,none": np.mean([h.mean() for h in hits]), "acc_stderr,none": np.linalg.norm(errors) / 3, "documents": n})
    del found["b"]["metrics"]["acc_stderr,none"]
    assert "acc_stderr,none" not in results.aggregate(group(), found)
    found["c"]["metrics"] = {"f1,none": 1.0, "documents": 45}   # of the tasks that have it
    assert results.aggregate(group(), found)["acc,none"] == pytest.approx(np.concatenate(hits[:2]).mean())
    with pytest.raises(UserError, match="no task of a group has the metric 'acc,x' of its aggregate_metric_list: a, b"):
        results.aggregate(group(pipelines=("x",)), found)


def other(hits):
    samples = [s | {"acc": h} for s, h in zip(RESULT["samples"], hits)]
    return RESULT | {"samples": samples, "metrics": RESULT["metrics"] | {"acc,none": sum(hits) / 4}}


def test_groups_are_compared_over_all_documents():
    rng = np.random.default_rng(2)

    def results_of(rng):
        found = {}
        for name, n in (("a", 30), ("b", 90)):
            found[name] = RESULT | {"aggregations": {"acc": "mean", "f1": "f1"}, "samples": [
                {"doc_id": i, "filter": "none", "acc": float(h), "f1": [1, int(h)]}
                for i, h in enumerate(rng.integers(0, 2, n))]}
            found[name]["metrics"] = {"acc,none": np.mean([s["acc"] for s in found[name]["samples"]]), "documents": n,
                                      "f1,none": 0.5}
        group = names.Group(("a", "b"), (names.Aggregate("acc", None, True), names.Aggregate("f1", None, True)), None)
        return {"tasks": ["a", "b"], "metrics": results.aggregate(group, found),
                "samples": results.samples(group, found)}
    one, other = results_of(rng), results_of(rng)
    found = results.compare(one, other)
    assert set(found) == {"acc,none"} and found["acc,none"].documents == 120   # F1 is no mean over documents
    gaps = [b["acc"] - a["acc"] for a, b in zip(one["samples"], other["samples"])]
    assert found["acc,none"].b - found["acc,none"].a == pytest.approx(np.mean(gaps))
    half = 1.96 * np.std(gaps) / 120**0.5   # of the normal interval; 10,000 draws come within a few hundredths of it
    assert found["acc,none"].high - found["acc,none"].low == pytest.approx(2 * half, rel=0.1)


def test_pairs_not_means_are_compared():
    """The same hits: no difference at all. The same mean of others' hits: a wide interval around 0."""
    same = results.compare(RESULT, other([0.0, 1.0, 0.0, 1.0]))["acc,none"]
    assert same == (0.5, 0.5, 0, 0, 1, 4)
    swapped = results.compare(RESULT, other([1.0, 0.0, 1.0, 0.0]))["acc,none"]
    assert swapped.low < -0.4 and swapped.high > 0.4 and swapped.p > 0.5
    better = results.compare(RESULT, other([1.0] * 4))["acc,none"]
    # A draw without a 0 of a's (gap 0) has probability 1/16, and p is twice it; 10,000 draws: 0.125 +- 0.005.
    assert better.a == 0.5 and better.b == 1.0 and better.low >= 0 and abs(better.p - 0.125) < 0.015


def test_interval_of_a_ratio_by_a_naive_bootstrap():
    rng = np.random.default_rng(1)
    pairs = [[(-rng.exponential(50), int(n)) for n in rng.integers(10, 90, 60)] for _ in range(2)]
    pairs[1] = [(b, n) for (b, _), (_, n) in zip(pairs[1], pairs[0])]   # the same documents
    a, b = ({"metrics": {"bits_per_byte": 0.0}, "samples": [{"bits_per_byte": x} for x in p]} for p in pairs)
    found = results.compare(a, b)["bits_per_byte"]
    gaps = []
    for _ in range(4000):
        index = rng.integers(0, 60, 60)
        bits = [-sum(p[i][0] for i in index) / sum(p[i][1] for i in index) / np.log(2) for p in pairs]
        gaps.append(bits[1] - bits[0])
    low, high = np.quantile(gaps, [0.025, 0.975])
    # Quantiles of 4,000 and 10,000 draws: three of their standard errors, about 0.1 of the half width.
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)


def test_other_questions_do_not_compare():
    with pytest.raises(UserError, match="do not compare: num_fewshot is 2 here and 3 there"):
        results.compare(RESULT, RESULT | {"num_fewshot": 3})
    with pytest.raises(UserError, match="4 samples here, 3 there"):
        results.compare(RESULT, RESULT | {"samples": RESULT["samples"][:3]})
    assert results.compare(RESULT | {"model": "x", "step": 1}, RESULT | {"model": "y", "step": 2})


def test_folders(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, names in ((a / "eval" / "9", ["old"]), (a / "eval" / "10", ["t", "one"]), (b, ["t"])):
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.json").write_text(json.dumps(RESULT))
    found, single = results.compare_folders(a, b)   # a run's newest step, and a folder of --output
    assert list(found) == ["t"] and set(found["t"]) == {"acc,none", "bits_per_byte,none"} and single == ["one"]
    (b / "t.json").rename(b / "u.json")
    with pytest.raises(UserError, match="has results of one, t, .* of u: none in common"):
        results.compare_folders(a, b)
    (b / "u.json").unlink()
    with pytest.raises(UserError, match="b has no results; make them with"):
        results.compare_folders(a, b)
    (b / "t.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the results .*t.json"):
        results.compare_folders(a, b)

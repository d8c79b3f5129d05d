"""The table, and the paired bootstrap beside exact answers and a naive one."""

import json

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.evals import results

RESULT = {"task_version": 1.0, "num_fewshot": 2, "higher_is_better": {"acc": True},
          "metrics": {"acc,none": 0.5, "acc_stderr,none": 0.25, "bits_per_byte,none": 1.0, "documents": 4},
          "samples": [{"acc": float(i % 2), "bits_per_byte": [-float(i + 1), 4], "filter": "none"} for i in range(4)]}


def test_table_by_hand():
    text = results.markdown({"t|x": RESULT})
    assert text.splitlines()[2:] == ["| t\\|x | 1.0 | none | 2 | acc | ↑ | 0.5000 | ± | 0.2500 |",
                                     "| t\\|x | 1.0 | none | 2 | bits_per_byte |  | 1.0000 |  |  |",
                                     "| t\\|x | 1.0 |  | 2 | documents |  | 4 |  |  |"]


def other(hits):
    samples = [s | {"acc": h} for s, h in zip(RESULT["samples"], hits)]
    return RESULT | {"samples": samples, "metrics": RESULT["metrics"] | {"acc,none": sum(hits) / 4}}


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

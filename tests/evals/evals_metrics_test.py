"""Metrics and standard errors by hand and by naive loops; BLEU where sacrebleu is installed."""

import itertools
import math
import random

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.evals import metrics
from fm_jax.evals.metrics import AGGREGATIONS, Metric


def test_multiple_choice_by_hand():
    """Of three choices the log-probability, that by character, by byte, and less the prior each prefer another."""
    choices, lls = ["ab", "abcdef", "éééé"], [-2.0, -3.0, -2.4]   # by character -1, -.5, -.6; by byte -1, -.5, -.3
    names = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "brier_score",
             "expected_calibration_error")
    unconditional, greedy = [-1.0, -9.0, -3.0], [False, True, False]   # differences -1, 6, .6
    of = [metrics.choice_items(names, lls, unconditional, greedy, choices, gold) for gold in (0, 1, 2)]
    assert [[o[n] for n in names[:5]] for o in of] == [[1, 0, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert [o["f1"] for o in of] == [(0, 0), (1, 0), (2, 0)]
    total = math.exp(-2) + math.exp(-3) + math.exp(-2.4)
    np.testing.assert_allclose(of[1]["brier_score"][1], [math.exp(x) / total for x in lls], rtol=1e-14)
    assert of[0]["expected_calibration_error"] == (pytest.approx(math.exp(-2) / total), 1.0)
    any_of = metrics.choice_items(names[:5], lls, unconditional, greedy, choices, [1, 2])
    assert list(any_of.values()) == [0, 1, 1, 1, 1]
    assert metrics.choice_items(["acc"], [-1, -1], None, [True] * 2, ["x", "y"], 0) == {"acc": 1.0}   # a tie: the first


def test_exact_match_ignores_what_it_is_told():
    match = metrics.exact_match
    assert match("Paris", ["Paris"]) == 1.0 and match("paris", ["Paris"]) == 0.0 and match("x", ["y", "x"]) == 1.0
    assert match("PARIS!", ["paris"], ignore_case=True, ignore_punctuation=True) == 1.0
    assert match("$1,234 ", ["1234"], regexes_to_ignore=[",", r"\$", r"\s+$"]) == 1.0
    assert match("a1", ["a2"], ignore_numbers=True) == 1.0 and match("a1", ["a2"], ignore_punctuation=True) == 0.0


def test_rolling_by_hand():
    """Words are what white space splits, its empty ends too; bytes are UTF-8's."""
    items = metrics.rolling_items(["word_perplexity", "byte_perplexity", "bits_per_byte"], -8.0, " é b\n")
    assert items == {"word_perplexity": (-8.0, 4), "byte_perplexity": (-8.0, 6), "bits_per_byte": (-8.0, 6)}
    total = lambda name, x: AGGREGATIONS[name].total(x)
    assert total("weighted_perplexity", [(-8.0, 4), (-2.0, 1)]) == pytest.approx(math.exp(2))   # of the corpus: 10 / 5
    assert total("bits_per_byte", [(-8.0, 4), (-2.0, 1)]) == pytest.approx(2 / math.log(2))


def test_aggregations_by_hand():
    total = lambda name, x: AGGREGATIONS[name].total(x)
    assert total("mean", [1, 0, 0, 1]) == 0.5 and total("median", [3, 1, 2, 9]) == 3   # the upper of the middle two
    assert total("nanmean", [1.0, math.nan, 3.0]) == 2
    assert total("perplexity", [-1.0, -3.0]) == pytest.approx(math.exp(2))
    # (gold, predicted): 2 hits of class 1, 3 predicted, 4 there: F1 = 2 * 2 / (3 + 4); one hit of class 0 in two.
    pairs = [(1, 1), (1, 1), (1, 0), (1, 0), (0, 1), (0, 0)]
    assert total("f1", pairs) == pytest.approx(4 / 7) and total("f1", [(0, 0), (0, 0)]) == 0
    assert total("matthews_corrcoef", pairs) == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3))
    assert total("matthews_corrcoef", [(0, 0), (1, 1), (2, 2)]) == 1
    assert total("matthews_corrcoef", [(0, 1), (1, 1)]) == 0
    even = np.array([0.5, 0.5])
    assert total("brier_score", [(0, even), (1, np.array([0.2, 0.8]))]) == pytest.approx((0.5 + 0.08) / 2)
    # Bins of 1/15: 0.5 and 0.52 share (7/15, 8/15], their gaps +0.5 and -0.52 almost cancel; 0.9 is alone.
    assert total("expected_calibration_error", [(0.5, 1), (0.52, 0), (0.9, 1)]) == pytest.approx((0.02 + 0.1) / 3)
    with pytest.raises(UserError, match=r"f1 is of the two classes 0 and 1, the task has \[0, 2\]"):
        total("f1", [(0, 2)])
    with pytest.raises(UserError, match=r"one number of choices in all documents, got \[1, 2\]"):
        total("brier_score", [(0, even), (0, even[:1])])


def naive_f1(items):
    tp, fp, fn = (sum(1 for g, p in items if (g, p) == case) for case in ((1, 1), (0, 1), (1, 0)))
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def naive_mcc(items):
    tp, fp, fn, tn = (sum(1 for g, p in items if (g, p) == case) for case in ((1, 1), (0, 1), (1, 0), (0, 0)))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


@pytest.mark.parametrize("name, naive", [
    ("perplexity", lambda x: math.exp(-sum(x) / len(x))), ("median", lambda x: sorted(x)[len(x) // 2]),
    ("nanmean", lambda x: sum(x) / len(x)), ("f1", naive_f1), ("matthews_corrcoef", naive_mcc)])
def test_bootstrap_is_the_referees_loop(name, naive):
    """3,000 resamples by random.Random(0), (1), (2), each 1,000 times choices(items), one at a time."""
    rng = random.Random(7)
    items = [(rng.randrange(2), rng.randrange(2)) if name in ("f1", "matthews_corrcoef") else rng.gauss(-2, 1)
             for _ in range(23)]
    values = []
    for seed in range(3):
        draw = random.Random(seed)
        values += [naive(draw.choices(items, k=len(items))) for _ in range(1000)]
    expected = math.sqrt(sum((v - sum(values) / 3000) ** 2 for v in values) / 2999)
    # Sums in another order: 1e-12.
    assert metrics.stderr(Metric("m", name, True, {}), items, iters=3000) == pytest.approx(expected, rel=1e-12)


def test_stderr_of_a_mean_and_of_none():
    mean = Metric("acc", "mean", True, {})
    by_hand = math.sqrt((3 * 0.4**2 + 2 * 0.6**2) / 4) / math.sqrt(5)
    assert metrics.stderr(mean, [1, 0, 0, 1, 1]) == pytest.approx(by_hand)
    assert metrics.stderr(mean, [1.0]) is None
    assert metrics.stderr(Metric("b", "bits_per_byte", False, {}), [(-1.0, 1), (-2.0, 3)]) is None


def test_corpus_metrics_by_sacrebleu():
    pytest.importorskip("sacrebleu", reason="BLEU, chrF and TER need the optional package sacrebleu")
    items = [("the cat is on the mat", "the cat is on the mat"), ("there is a cat here now", "a dog")]
    # Precisions of 1 to 4 words: 7/8, 5/6, 4/4, 3/3 of the two hypotheses; lengths 8 of 12.
    brevity = math.exp(1 - 12 / 8)
    assert AGGREGATIONS["bleu"].total(items) == pytest.approx(100 * brevity * (7 / 8 * 5 / 6) ** 0.25)
    assert AGGREGATIONS["chrf"].total(items[:1]) == 100 and AGGREGATIONS["ter"].total(items[:1]) == 0
    values = []
    draw = random.Random(0)
    for _ in range(100):
        values.append(AGGREGATIONS["bleu"].total(draw.choices(items, k=2)))
    expected = math.sqrt(sum((v - sum(values) / 100) ** 2 for v in values) / 99)
    assert metrics.stderr(Metric("bleu", "bleu", True, {}), items) == pytest.approx(expected, rel=1e-12)


def test_words_in_common_by_hand():
    f1 = metrics.token_f1
    assert f1("The cat sat.", ["cat sat", "dog"]) == 1.0   # no case, articles, punctuation; the best reference
    assert f1("a cat sat down", ["the cat ran"]) == pytest.approx(2 * 1 / (3 + 2))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3) and f1("", ["the"]) == 1.0 and f1("x", [""]) == 0.0
    assert metrics.rouge("the cat sat on the mat", ["the cat on mat"], 1) == pytest.approx(8 / 10)
    assert metrics.rouge("the cat sat on the mat", ["the cat on mat"], 2) == pytest.approx(2 / 8)
    assert metrics.rouge("the cat sat on the mat", ["mat on the cat", "dog"]) == pytest.approx(2 * 2 / 10)
    assert metrics.rouge("", ["x"], 1) == metrics.rouge("!", ["?"]) == 0.0 and metrics.rouge("x", ["x"], 2) == 0.0


def test_rouge_is_the_packages():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs the package rouge-score")
    scorer, rng = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]), random.Random(0)
    words = "a An the cat's cat dog-house 7 7.5 caf\u00e9 Sat, . \n".split(" ")
    text = lambda: " ".join(rng.choices(words, k=rng.randrange(9)))
    for _ in range(300):
        prediction, references = text(), [text() for _ in range(3)]
        scores = [scorer.score(reference, prediction) for reference in references]
        for name in ("rouge1", "rouge2", "rougeL"):
            want = max(score[name].fmeasure for score in scores)
            assert metrics.OF_ANSWER[name](prediction, references) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_is_the_share_of_draws_that_have_one():
    """Against all draws of k from n, one by one."""
    for n, passed, k in [(5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6), (5, 3, 1), (10, 2, 9)]:
        draws = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
        assert metrics.pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert metrics.pass_at_k(200, 1, 10) == pytest.approx(10 / 200)


def test_pass_at_k_stands_for_a_metric_of_each_k():
    make = lambda **options: metrics.from_fields([{"metric": "pass_at_k", **options}], "generate_until", "t")
    assert [m.name for m in make(k=[1, 10])] == ["pass@1", "pass@10"] and [m.name for m in make(k=2)] == ["pass@2"]
    for k in ([], [0], ["1"], [True]):
        with pytest.raises(UserError, match="t: pass_at_k: k=.* must be numbers of answers"):
            make(k=k)
    with pytest.raises(UserError, match="leave the other metrics out"):
        metrics.from_fields([{"metric": "pass_at_k"}, {"metric": "exact_match"}], "generate_until", "t")
    with pytest.raises(UserError, match="metric rouge1 has no option 'k'"):
        metrics.from_fields([{"metric": "rouge1", "k": 1}], "generate_until", "t")


def test_word_errors_by_hand():
    errors = metrics.word_errors
    assert errors("Please press 1, Mr. Smith!", "please press one mister smith") == (0, 5)
    assert errors("the cat sat", "the cat sat down") == (1, 4) and errors("the bad cat", "the cat") == (1, 2)
    assert errors("a b c", "x y") == (3, 2) and errors("", "one two") == (2, 2) and errors("it's (beep) on", "it\u2019s on") == (0, 2)
    assert metrics.character_errors("cold-hearted", "cold herted") == (1, 11)
    for seed in range(20):   # against all ways to line two short lists up
        draw = random.Random(seed)
        a, b = ([draw.choice("xyz") for _ in range(draw.randrange(5))] for _ in range(2))
        kept = max(sum(a[i] == b[j] for i, j in zip(one, other)) for k in range(min(len(a), len(b)) + 1)
                   for one in itertools.combinations(range(len(a)), k) for other in itertools.combinations(range(len(b)), k))
        fewest = min(max(len(a), len(b)), len(a) + len(b) - kept)
        assert errors(" ".join(a), " ".join(b))[0] >= max(len(a), len(b)) - kept
        assert errors(" ".join(a), " ".join(b))[0] <= fewest

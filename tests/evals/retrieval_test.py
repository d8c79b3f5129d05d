"""Metrics of rankings counted by hand, search by a loop, BM25 by its formula, entities looked up."""

import math

import numpy as np
import pytest

from fm_jax.errors import UserError
from fm_jax.evals import metrics, retrieval
from fm_jax.evals.baselines import BM25, Dictionary


def test_metrics_are_those_counted_by_hand():
    ranking = [[3, 1, 2, 0], [0, 1, 2, 3], [2, 3, 0, 1]]
    relevant = [{1}, {2, 3}, {0: 1.0, 3: 3.0, 1: 0.0}]
    assert retrieval.recall(ranking, relevant, 2) == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert retrieval.recall(ranking, relevant, 3) == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert retrieval.reciprocal_rank(ranking, relevant, 4) == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert retrieval.reciprocal_rank(ranking, relevant, 2) == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    by_hand = [1 / math.log2(3),
               (1 / math.log2(4)) / (1 + 1 / math.log2(3)),
               (3 / math.log2(3) + 1 / math.log2(4)) / (3 + 1 / math.log2(3))]
    assert retrieval.ndcg(ranking, relevant, 3) == pytest.approx(np.mean(by_hand))


def test_search_and_rank_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(300, 4)), rng.normal(size=(50, 4))
    found = retrieval.search(queries, documents, 5)
    for query, own in zip(queries, found):
        cosine = [d @ query / np.linalg.norm(d) for d in documents]
        assert own.tolist() == sorted(range(50), key=lambda i: -cosine[i])[:5]
    assert retrieval.rank([[1, 2, 2, 0]], 3).tolist() == [[1, 2, 0]]


def test_a_document_high_in_both_rankings_is_first_of_the_fused():
    fused = retrieval.fuse([np.array([[0, 1, 2]]), np.array([[3, 1, 0]])], 4)
    scores = {0: 1 / 61 + 1 / 63, 1: 2 / 62, 2: 1 / 63, 3: 1 / 61}
    assert fused.tolist() == [sorted(scores, key=lambda d: -scores[d])]


def test_bm25_is_its_formula():
    texts = ["the cat sat on the mat", "The dog, the DOG!", "a cat and a dog", "nothing here"]
    words = [["the", "cat", "sat", "on", "the", "mat"], ["the", "dog", "the", "dog"], "a cat and a dog".split(),
             ["nothing", "here"]]
    mean = sum(map(len, words)) / 4
    for query in (["dog"], ["the", "cat"], ["the", "the", "unknown"]):
        expected = [sum(math.log(1 + (4 - n + 0.5) / (n + 0.5)) * own.count(w) * 2.2 / (
            own.count(w) + 1.2 * (1 - 0.6 + 0.6 * len(own) / mean)) for w in query
            for n in [sum(w in each for each in words)] if n) for own in words]
        np.testing.assert_allclose(BM25(texts, k1=1.2, b=0.6).scores(" ".join(query)), expected, rtol=1e-12)
    assert BM25(texts).scores("dog").argmax() == 1


def test_the_dictionary_takes_the_longest_that_was_mostly_an_entity():
    texts = [t.split() for t in ("New York is big", "in new york city", "may I go", "May said so", "may be",
                                 "York won")]
    tags = [t.split() for t in ("B-loc I-loc O O", "O B-loc I-loc I-loc", "O O O", "B-per O O", "O O", "B-org O")]
    found = Dictionary(texts, tags)
    assert found.tag("near NEW YORK CITY".split()) == ["O", "B-loc", "I-loc", "I-loc"]
    assert found.tag("new york may york".split()) == ["B-loc", "I-loc", "O", "O"]   # may: once of three; york: 1 of 3
    assert found.tag([]) == []


def test_correlations():
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 10.0]
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.spearman(a, b) == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])
    assert metrics.pearson(a, [3, 3, 3, 3]) == 0
    with pytest.raises(UserError, match="a correlation of 1 values with 2"):
        metrics.spearman([1], [1, 2])


@pytest.mark.parametrize("ranking, relevant, k, message", [
    ([[0, 1]], [{0}, {1}], 1, "1 rankings for 2 queries"), ([[0, 1]], [set()], 1, "nothing belongs to query 0"),
    ([[0, 1]], [{0}], 3, "k=3, and of query 0 2 documents are ranked"),
])
def test_bad_rankings_are_one_clear_line(ranking, relevant, k, message):
    for metric in (retrieval.recall, retrieval.ndcg, retrieval.reciprocal_rank):
        with pytest.raises(UserError, match=message):
            metric(ranking, relevant, k)
    with pytest.raises(UserError, match="k=9 of 2 documents"):
        retrieval.rank([[0.0, 1.0]], 9)

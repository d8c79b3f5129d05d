"""How well what belongs to a query is found: search by vectors, and the metrics of ranked lists. Layer 4.

A ranking is int [Q, k], of each query the documents found, best first; `relevant` has of each query what belongs to it,
{document: gain} or a collection of documents, whose gain is 1.

Try:  python -c "from fm_jax.evals import retrieval; print(retrieval.recall([[3, 1, 2]], [{1}], 2))"
"""

from collections.abc import Callable, Sequence

import numpy as np

from fm_jax.errors import UserError
from fm_jax.evals.probes import unit


def rank(scores_QN, k: int) -> np.ndarray:
    """Returns int64 [Q, k], the k documents of the highest scores, best first; of equal ones the first is better."""
    scores = np.asarray(scores_QN)
    if not 1 <= k <= scores.shape[1]:
        raise UserError(f"k={k} of {scores.shape[1]} documents: from 1 to so many")
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def search(queries_QD, documents_ND, k: int) -> np.ndarray:
    """Returns int64 [Q, k], the documents with the largest cosine to each query."""
    queries, documents = unit(queries_QD), unit(documents_ND)
    return np.concatenate([rank(queries[i : i + 256] @ documents.T, k) for i in range(0, len(queries), 256)])


def fuse(rankings: Sequence[np.ndarray], k: int, *, constant: float = 60) -> np.ndarray:
    """Returns int64 [Q, k]: several rankings of the same queries as one, by the sum of 1 / (constant + place).

    Source: Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet"; places count from 1.
    """
    out = []
    for lists in zip(*rankings):
        scores = {}
        for documents in lists:
            for place, document in enumerate(documents, 1):
                scores[int(document)] = scores.get(int(document), 0.0) + 1 / (constant + place)
        out.append(sorted(scores, key=lambda d: -scores[d])[:k])
    return np.array(out)


def recall(ranking, relevant, k: int) -> float:
    """Returns the mean over queries of the share of what belongs to one that its first k documents have."""
    return _mean(ranking, relevant, k, lambda found, gains: sum(g > 0 for g in found) / sum(
        g > 0 for g in gains.values()))


def reciprocal_rank(ranking, relevant, k: int) -> float:
    """Returns the mean over queries of 1 / place of the first document that belongs to one; 0 if none of k does."""
    return _mean(ranking, relevant, k, lambda found, gains: next(
        (1 / place for place, gain in enumerate(found, 1) if gain > 0), 0.0))


def ndcg(ranking, relevant, k: int) -> float:
    """Returns the mean over queries of the gains of the first k, each over log2(1 + place), over the best possible sum.

    Source: Jaervelin and Kekaelaeinen 2002, with gains as they are, as in trec_eval and scikit-learn's ndcg_score.
    """
    total = lambda gains: sum(gain / np.log2(1 + place) for place, gain in enumerate(gains, 1))
    return _mean(ranking, relevant, k, lambda found, gains: total(found) / total(
        sorted(gains.values(), reverse=True)[:k]))


def _mean(ranking, relevant, k, value: Callable) -> float:
    """Returns the mean of value(gains of the first k, {document: gain}) over queries."""
    if len(ranking) != len(relevant) or not len(ranking):
        raise UserError(f"{len(ranking)} rankings for {len(relevant)} queries; one for each, and some")
    out = []
    for i, (documents, own) in enumerate(zip(ranking, relevant)):
        gains = own if isinstance(own, dict) else dict.fromkeys(own, 1.0)
        if not any(gain > 0 for gain in gains.values()):
            raise UserError(f"nothing belongs to query {i}: leave it out")
        if len(documents) < k:
            raise UserError(f"k={k}, and of query {i} {len(documents)} documents are ranked: rank more")
        out.append(value([gains.get(int(d), 0.0) for d in documents[:k]], gains))
    return float(np.mean(out))

"""Shows that the linear probe, nDCG and BM25 are those of scikit-learn and bm25s on random features and real titles.

The probe's scores must be within 1e-4 of the peer's, nDCG and BM25 within 1e-5 of it; else the exit is 1. Needs
scikit-learn and bm25s beside fm_jax.

Try:  python tests/peers/same_retrieval.py
"""

import sys

import bm25s
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ndcg_score

from fm_jax.data import catalogue
from fm_jax.evals import baselines, probes, retrieval


def main():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 800)
    features = rng.normal(size=(800, 16)) + 2 * np.eye(5, 16)[labels]
    ours = probes.linear_probe(features, labels, 5, l2=0.5, tol=1e-6, max_iter=5000).scores(features)
    peer = LogisticRegression(C=2, tol=1e-8, max_iter=5000).fit(features, labels).decision_function(features)
    centred = lambda scores: scores - scores.mean(1, keepdims=True)   # a softmax does not see what is added to all
    worst = {"probe": (np.abs(centred(ours) - centred(peer)).max(), 1e-4)}

    scores, gains = rng.random((50, 30)), rng.integers(0, 4, (50, 30)).astype(float)
    found = retrieval.ndcg(retrieval.rank(scores, 10), [dict(enumerate(g)) for g in gains], 10)
    worst["nDCG@10"] = (abs(found - ndcg_score(gains, scores, k=10)), 1e-5)

    entry = catalogue.find("tiny_shakespeare")
    texts = list(entry.texts(catalogue.fetch(entry)))
    peer = bm25s.BM25(k1=1.5, b=0.75, method="lucene", dtype="float64")
    peer.index([baselines.words_of(text) for text in texts], show_progress=False)
    queries = ["to be or not to be", "the king is dead", "what light"]
    model = baselines.BM25(texts)
    # Lucene leaves out the factor k1 + 1, which is the same for all texts.
    worst["BM25"] = (max(np.abs(model.scores(q) / 2.5 - peer.get_scores(baselines.words_of(q))).max() for q in queries), 1e-5)
    for name, (error, most) in worst.items():
        print(f"{name}: {error:.1e} at most, allowed {most:.0e}")
    return any(error > most for error, most in worst.values())


if __name__ == "__main__":
    sys.exit(main())

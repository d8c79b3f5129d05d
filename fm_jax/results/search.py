"""Search: the title of a Wikipedia article finds its introduction, by vectors, by words, and by both.

Try:  python -m fm_jax.results --rows search --output results
"""

import numpy as np

from fm_jax.results import Row, cache, minilm

TITLE = "Search: a title finds its introduction among 10,033"
DEPTH = 100    # of both rankings that are fused


def run(work, note) -> Row:
    """Returns recall and nDCG."""
    from fm_jax import pretrained
    from fm_jax.data import catalogue
    from fm_jax.evals import retrieval
    from fm_jax.evals.baselines import BM25

    entry = catalogue.find("wikipedia_introductions")
    pages = [record["text"].split("\n\n", 1) for record in entry.records(catalogue.fetch(entry, cache()))]
    titles, texts = zip(*pages)
    words = BM25(texts)
    by_words = np.concatenate([retrieval.rank(np.stack([words.scores(t) for t in titles[i : i + 256]]), DEPTH)
                               for i in range(0, len(titles), 256)])
    note("BM25 done")
    model = pretrained.load(minilm(work))
    by_vectors = retrieval.search(model.embed(titles), model.embed(texts), DEPTH)
    relevant = [{i} for i in range(len(titles))]
    lines = []
    for name, ranking in (("MiniLM", by_vectors), ("BM25", by_words),
                          ("both, fused", retrieval.fuse([by_vectors, by_words], 10))):
        lines.append([name, retrieval.recall(ranking, relevant, 1), retrieval.recall(ranking, relevant, 10),
                      retrieval.ndcg(ranking, relevant, 10)])
        note(f"{name}: recall@1 {lines[-1][1]:.3f}")
    return Row(("", "recall@1", "recall@10", "nDCG@10"), lines, [0],
               "Every title is a query; the introductions are without them. Fused by reciprocal ranks.")

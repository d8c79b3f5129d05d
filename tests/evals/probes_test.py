"""The probe against another optimiser in float64, neighbours by a loop."""

import numpy as np
import pytest
from scipy import optimize

from fm_jax.errors import UserError
from fm_jax.evals import probes


def blobs(n=200, classes=3, dim=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(n, dim)) + 2 * np.eye(classes, dim)[labels] + 7, labels


@pytest.mark.parametrize("l2, scale", [(1.0, 1.0), (0.01, 0.05), (10.0, 30.0)])
def test_the_probe_is_the_least_of_its_loss(l2, scale):
    """Against scipy in float64: no map has a smaller loss, to what float32 resolves; and the gradient is near 0."""
    x, y = blobs()
    x = x * scale
    found = probes.linear_probe(x, y, 3, l2=l2)

    def loss(flat):
        weight, bias = flat[:15].reshape(5, 3), flat[15:]
        scores = x @ weight + bias
        top = scores.max(1, keepdims=True)
        p = np.exp(scores - top)
        error = p / p.sum(1, keepdims=True) - np.eye(3)[y]
        value = (np.log(p.sum(1)) + top[:, 0] - scores[np.arange(len(y)), y]).sum() + l2 / 2 * (weight ** 2).sum()
        return value, np.concatenate([(x.T @ error + l2 * weight).ravel(), error.sum(0)])

    flat = np.concatenate([found.weight.ravel(), found.bias]).astype(np.float64)
    best = optimize.minimize(loss, np.zeros(18), jac=True, method="L-BFGS-B", options=dict(maxiter=5000, ftol=1e-15))
    assert loss(flat)[0] <= best.fun * (1 + 1e-4)
    accuracy = (found.scores(x).argmax(1) == y).mean()
    assert accuracy > 0.8 and accuracy == pytest.approx(
        ((x @ best.x[:15].reshape(5, 3) + best.x[15:]).argmax(1) == y).mean(), abs=0.011)


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_neighbours_vote_as_in_a_loop(temperature):
    x, y = blobs(60)
    queries = blobs(40, seed=1)[0]
    votes = probes.nearest_neighbours(x, y, queries, 3, k=7, temperature=temperature)
    for query, vote in zip(queries, votes):
        cosine = [q @ query / np.linalg.norm(q) / np.linalg.norm(query) for q in x]
        expected = np.zeros(3)
        for i in sorted(range(60), key=lambda i: -cosine[i])[:7]:
            expected[y[i]] += 1 if temperature is None else np.exp(cosine[i] / temperature)
        np.testing.assert_allclose(vote, expected / expected.sum(), rtol=1e-3)
    assert (probes.nearest_neighbours(x, y, x, 3, k=1).argmax(1) == y).all()


@pytest.mark.parametrize("changes, message", [
    (dict(labels=[0, 3]), "labels must be from 0 to 2"), (dict(labels=[0]), "expected \\[N, D\\] and \\[N\\]"),
    (dict(features=[[1.0], [np.nan]]), "not a finite number"), (dict(l2=0), "l2=0 must be positive"),
    (dict(max_iter=0), "not found in max_iter=0 steps"),
])
def test_bad_input_of_a_probe_is_one_clear_line(changes, message):
    given = dict(features=[[1.0], [2.0]], labels=[0, 1]) | changes
    with pytest.raises(UserError, match=message):
        probes.linear_probe(given.pop("features"), given.pop("labels"), 3, **given)
    with pytest.raises(UserError, match="k=3 neighbours of 2"):
        probes.nearest_neighbours([[1.0], [2.0]], [0, 1], [[1.0]], 2, k=3)

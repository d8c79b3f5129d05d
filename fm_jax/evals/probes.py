"""What frozen features are worth: a linear probe and nearest neighbours. Pure functions of arrays. Layer 4.

Try:  python -c "from fm_jax.evals import probes; help(probes)"
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_jax.errors import UserError


class Linear(NamedTuple):
    """A linear map from features to the scores of classes: weight float32 [D, C], bias [C]."""

    weight: np.ndarray
    bias: np.ndarray

    def scores(self, features_ND) -> np.ndarray:
        """Returns float32 [N, C]."""
        return np.asarray(features_ND, np.float32) @ self.weight + self.bias


def linear_probe(features_ND, labels_N, num_classes: int, *, l2: float = 1.0, max_iter: int = 500,
                 tol: float = 1e-4) -> Linear:
    """Returns the logistic regression of labels (0 to num_classes - 1) on features.

    Of all linear maps the one with the least sum over examples of -log softmax(scores)[label] + l2 / 2 |weight|^2,
    found by L-BFGS: `C` of scikit-learn's LogisticRegression is 1 / l2. Its gradient is `tol` an example at most.

    Raises:
      UserError: labels out of range, features that are not finite, an l2 that is not positive; not found in `max_iter`.
    """
    x, y = np.asarray(features_ND, np.float32), np.asarray(labels_N, np.int32)
    _check(x, y, num_classes)
    if l2 <= 0:
        raise UserError(f"l2={l2} must be positive: without it separable classes have no best map")
    # In units in which the features' spread is 1, the way is short; the map found is the same.
    centre, spread = x.mean(0), float(x.std()) or 1.0
    weight, bias, iterations, steepness = _fit(x - centre, y, num_classes, l2, max_iter, tol * len(x), spread)
    if not steepness <= tol * len(x):
        raise UserError(f"the probe is not found in max_iter={max_iter} steps (gradient {steepness / len(x):.1e} an "
                        f"example, tol={tol}): raise either, or l2")
    weight = np.asarray(weight, np.float32)
    return Linear(weight, np.asarray(bias, np.float32) - centre @ weight)


@jax.jit
def _loss(map_, x, y, l2):
    scores = x @ map_[0] + map_[1]
    own = jnp.take_along_axis(scores, y[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(scores, -1) - own).sum() + l2 / 2 * (map_[0] ** 2).sum()


def _fit(x, y, num_classes, l2, max_iter, tol, spread):
    """Returns (weight, bias, iterations, largest gradient) for centred features."""
    start = jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes)
    units = lambda map_: (map_[0] / spread, map_[1])
    f = lambda map_: _loss(units(map_), x, y, l2)
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(f)
    steepness = lambda grad: jnp.maximum(jnp.abs(grad[0] * spread).max(), jnp.abs(grad[1]).max())

    def step(carry):
        map_, state, _, i = carry
        value, grad = value_and_grad(map_, state=state)
        updates, state = solver.update(grad, state, map_, value=value, grad=grad, value_fn=f)
        return optax.apply_updates(map_, updates), state, steepness(grad), i + 1

    carry = start, solver.init(start), jnp.inf, 0
    going_on = lambda carry: (carry[2] > tol) & (carry[3] < max_iter)
    map_, _, steep, i = jax.jit(lambda carry: jax.lax.while_loop(going_on, step, carry))(carry)
    return *units(map_), int(i), float(steep)


def nearest_neighbours(features_ND, labels_N, queries_MD, num_classes: int, *, k: int = 20,
                       temperature: float | None = None) -> np.ndarray:
    """Returns float32 [M, num_classes], the votes of the k nearest features of each query by cosine, summing to 1.

    temperature: each votes with exp(cosine / temperature), as in arXiv:1805.01978, section 3.4 (0.07 there); None: all
    alike. Of equal cosines the first are nearest.
    """
    x, y, q = (np.asarray(a) for a in (features_ND, labels_N, queries_MD))
    _check(x, y, num_classes)
    if not 1 <= k <= len(x):
        raise UserError(f"k={k} neighbours of {len(x)} examples: from 1 to so many")
    votes = np.zeros((len(q), num_classes), np.float32)
    for begin in range(0, len(q), 1024):
        cosine = unit(q[begin : begin + 1024]) @ unit(x).T
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        weight = np.ones(nearest.shape) if temperature is None else np.exp(
            (np.take_along_axis(cosine, nearest, 1) - 1) / temperature)
        rows = np.arange(len(nearest))[:, None] + begin
        np.add.at(votes, (rows, y[nearest]), weight / weight.sum(1, keepdims=True))
    return votes


def unit(x_ND) -> np.ndarray:
    """Returns the vectors in float32, each divided by its length."""
    x = np.asarray(x_ND, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check(x, y, num_classes):
    if len(x) != len(y) or x.ndim != 2:
        raise UserError(f"features {list(x.shape)} and labels {list(y.shape)}: expected [N, D] and [N]")
    if not len(y) or not 0 <= y.min() <= y.max() < num_classes:
        raise UserError(f"labels must be from 0 to {num_classes - 1}, and there must be some")
    if not np.isfinite(x).all():
        raise UserError("a feature is not a finite number")

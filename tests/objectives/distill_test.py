"""The divergence against NumPy, a student that is its teacher, and the loss on meshes."""

import jax
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding
from fm_jax.errors import UserError

T, V, K = 16, 48, 5


def make(layout=None, **args):
    c = config_lib.defaults()
    c.model.update(vocab_size=V, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_seq_len=T, loss_chunk_tokens=24)
    c.seq_len, c.batch_size, c.objective = T, 4, "fm_jax.objectives.distill.Distill"
    c.objective_args.update({"top_k": K} | args)
    return objectives.load(c, None, layout)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(jax.jit(make().init)(jax.random.key(0)))[0]


@pytest.fixture(scope="module")
def records():
    """Packed rows of two documents and padding, with what a random teacher expects."""
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 1, 2, 2, 2, 0]], 4, 0).repeat(3, 1)[:, : T + 1]
    logits = rng.normal(0, 3, (4, T, V))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1)[..., : K + 2]
    return {"tokens": rng.integers(0, V, (4, T + 1), dtype=np.int32), "segment_ids": segments.astype(np.int32),
            "teacher_ids": ids.astype(np.int32), "teacher_logprobs": np.take_along_axis(logp, ids, -1).astype(np.float32)}


def by_hand(logits, records, alpha, tail, temperature):
    """Returns the mean loss in NumPy float64, place by place."""
    x, total, count = np.asarray(logits, np.float64), 0.0, 0
    for row in range(4):
        for t in range(T):
            segments = records["segment_ids"][row, t : t + 2]
            if segments[0] == 0 or segments[0] != segments[1]:
                continue
            q = np.exp(x[row, t] - x[row, t].max())
            q /= q.sum()
            ids, p = records["teacher_ids"][row, t, :K], np.exp(records["teacher_logprobs"][row, t, :K].astype(float))
            if tail:
                pairs = [*zip(p, q[ids]), (1 - p.sum(), 1 - q[ids].sum())]
            else:
                p, r = (y ** (1 / temperature) / (y ** (1 / temperature)).sum() for y in (p, q[ids]))
                pairs = zip(p, r)
            kl = sum(a * np.log(a / b) for a, b in pairs)
            total += alpha * temperature**2 * kl - (1 - alpha) * np.log(q[records["tokens"][row, t + 1]])
            count += 1
    return total / count


@pytest.mark.parametrize("args", [dict(alpha=0.7), dict(alpha=0.4, tail=False, temperature=2.0)])
def test_loss_equals_numpy_on_any_mesh(params, records, args):
    objective = make(**args)
    batch = objective.examples(records, None)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec(4).items()}
    hidden, _, _ = objective.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = objective.module.apply({"params": params}, hidden, method="logits")
    want = by_hand(logits, records, args["alpha"], args.get("tail", True), args.get("temperature", 1.0))

    def grad(objective):
        def loss(p):
            out = objective.loss(p, batch, None)
            return out.loss / out.weight
        return jax.jit(jax.value_and_grad(loss))(params)

    value, alone = grad(objective)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    if args.get("tail", True):   # the meshes of the vocabulary, and of sequences
        for mesh in ({"tensor": 2, "data": 2}, {"context": 2}):
            value, apart = grad(make(sharding.Layout(sharding.make_mesh(mesh)), **args))
            np.testing.assert_allclose(value, want, rtol=1e-5)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()), apart,
                         alone)


def test_what_does_not_go_together():
    for args, message in ((dict(temperature=2.0), "set tail=False"), (dict(top_k=V), "top_k=48"), (dict(alpha=2.0), "alpha")):
        with pytest.raises(UserError, match=message):
            make(**args)
    with pytest.raises(UserError, match="no teacher.*fm_jax.annotate"):
        make().examples({"tokens": np.zeros((1, T + 1))}, None)

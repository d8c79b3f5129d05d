"""Losses of pairs against NumPy on each answer alone, their gradient against autodiff of whole logits, the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding
from fm_jax import tokenizer as tokenizers
from fm_jax.errors import UserError

PAIRS = [{"prompt": "2+2=", "chosen": "4", "rejected": "five", "reference": {"chosen": -3.0, "rejected": -17.0}},
         {"prompt": "A long question about caf\u00e9s, is it?", "chosen": "yes, it is", "rejected": "no",
          "reference": {"chosen": -40.0, "rejected": -9.0}},
         {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello", "rejected": "Go away, please",
          "reference": {"chosen": -25.5, "rejected": -60.25}}]
T = 72


def make(**args):
    c = config_lib.defaults()
    c.model.update(vocab_size=270, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_seq_len=T,
                   loss_chunk_tokens=50)
    c.seq_len, c.batch_size, c.objective = T, 4, "fm_jax.objectives.preference.Preference"
    c.objective_args.update(args)
    tokenizer = tokenizers.load("bytes")
    tokenizer.chat_template = tokenizers.PLAIN_CHAT
    return objectives.load(c, tokenizer)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(jax.jit(make().init)(jax.random.key(0)))[0]


def by_hand(objective, logits, method, beta, margin, smoothing, nll_weight):
    """Returns (mean loss, accuracy) in NumPy float64, of each answer alone."""
    losses, right = [], []
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))
    for pair in PAIRS:
        sums, means = [], []
        for answer in ("chosen", "rejected"):
            if isinstance(pair["prompt"], str):
                prompt = [256, *pair["prompt"].encode()]
            else:
                prompt = [*b"user", 256, *b"Hi", 257, *b"assistant", 256]
            said = [*pair[answer].encode(), 257]
            ids = (prompt[-(T // 2 + 1 - len(said)) :] if len(prompt) + len(said) > T // 2 + 1 else prompt) + said
            x = np.asarray(logits(np.array([ids + [0] * (T - len(ids))], np.int32)), np.float64)[0]
            logp = x - np.log(np.exp(x).sum(-1, keepdims=True))
            each = [logp[i - 1, ids[i]] for i in range(len(ids) - len(said), len(ids))]
            sums.append(sum(each))
            means.append(sum(each) / len(said))
        reference = [pair["reference"][a] for a in ("chosen", "rejected")]
        h = (sums[0] - reference[0]) - (sums[1] - reference[1])
        odds = [np.log(np.exp(m) / (1 - np.exp(m))) for m in means]
        if method == "dpo":
            loss = -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)
        elif method == "ipo":
            loss = (h - 1 / (2 * beta)) ** 2
        elif method == "simpo":
            h = beta * (means[0] - means[1]) - margin
            loss = -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)
        else:
            loss = -means[0] - beta * log_sigmoid(odds[0] - odds[1])
        losses.append(loss - nll_weight * means[0])
        right.append(means[0] > means[1] if method in ("simpo", "orpo") else h > 0)
    return np.mean(losses), np.mean(right)


@pytest.mark.parametrize("method, beta, margin, smoothing, nll_weight", [
    ("dpo", 0.1, 0.0, 0.0, 0.0), ("dpo", 0.3, 0.0, 0.2, 0.5), ("ipo", 0.2, 0.0, 0.0, 0.0), ("simpo", 2.0, 0.7, 0.1, 0.0),
    ("orpo", 0.5, 0.0, 0.0, 0.0)])
def test_losses_equal_numpy_and_gradients_autodiff(params, method, beta, margin, smoothing, nll_weight):
    objective = make(method=method, beta=beta, margin=margin, label_smoothing=smoothing, nll_weight=nll_weight)
    batch = objective.examples([*PAIRS, None], np.zeros(4, np.uint64))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec(4).items()}

    def ours(p):
        out = objective.loss(p, batch, None)
        return out.loss, out

    (value, out), grad = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    loss, accuracy = by_hand(objective, jax.jit(lambda t: objective.predict["logits"](params, t)), method, beta, margin,
                             smoothing, nll_weight)
    assert out.weight == 3 and batch["cut"].sum() == 0
    # 1e-4: sums of float32 log-probabilities.
    np.testing.assert_allclose(value / 3, loss, rtol=1e-4)
    np.testing.assert_allclose(out.metrics["reward_accuracy"][0] / 3, accuracy, rtol=1e-6)

    def whole(p):   # the same loss, of logits that are all there
        hidden, _, _ = objective.module.apply({"params": p}, batch["tokens"], batch["positions"], batch["segment_ids"])
        logp = jax.nn.log_softmax(objective.module.apply({"params": p}, hidden, method="logits"))
        logp = jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0] * batch["weights"]
        sums = jnp.stack([(logp * (batch["segment_ids"] == s)).sum(1) for s in (1, 2)], 1)[:3]
        lengths = np.stack([(batch["weights"] * (batch["segment_ids"] == s)).sum(1) for s in (1, 2)], 1)[:3]
        losses, _ = objective._losses(sums, sums / lengths, batch["reference"][:3])
        return (losses - nll_weight * sums[:, 0] / lengths[:, 0]).sum()

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * np.abs(b).max()), grad,
                 jax.jit(jax.grad(whole))(params))


def test_the_reference_is_what_the_run_begins_with(params):
    objective = make()
    batch = objective.examples(PAIRS, np.zeros(3, np.uint64))
    batch["reference"] = np.asarray(jax.jit(objective.logprobs)(params, batch))
    loss = jax.jit(lambda p: objective.loss(p, batch, None))
    out = loss(params)
    means = {k: float(a / b) for k, (a, b) in out.metrics.items()}
    assert abs(means["reward_margin"]) < 1e-5 and float(out.loss / out.weight) == pytest.approx(np.log(2), rel=1e-5)
    objective.check_start(means)
    out = loss(sharding.unbox(jax.jit(objective.init)(jax.random.key(1)))[0])
    with pytest.raises(UserError, match="another model than the one that this run begins with"):
        objective.check_start({k: float(a / b) for k, (a, b) in out.metrics.items()})


def test_long_pairs_lose_the_beginning_and_the_end():
    long = {"prompt": "x" * 100, "chosen": "ab", "rejected": "c" * 100, "reference": {"chosen": 0, "rejected": 0}}
    batch = make().examples([long], np.zeros(1, np.uint64))
    first, second = (batch["segment_ids"][0] == s for s in (1, 2))
    assert first.sum() == second.sum() == T // 2 and batch["cut"] == 0.5
    assert bytes(batch["tokens"][0, first].astype(np.uint8)) == b"x" * (T // 2 - 2) + b"ab"
    assert batch["targets"][0, first][-1] == 257 and batch["weights"][0, first].sum() == 3
    assert batch["weights"][0, second].all() and set(batch["targets"][0, second]) == {ord("c")}


@pytest.mark.parametrize("record, message", [
    ({"prompt": "a", "chosen": "b"}, "'rejected' must be a text, got None"),
    ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be a text or a chat"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no 'reference' log-probabilities, which method='dpo' needs")])
def test_faulty_pairs_are_named(record, message):
    with pytest.raises(UserError, match=message):
        make().examples([record], np.zeros(1, np.uint64))

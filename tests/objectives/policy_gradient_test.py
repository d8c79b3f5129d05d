"""The loss of responses against NumPy loops, and its gradient against autodiff of whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding
from fm_jax.errors import UserError

T, V = 12, 40


def make(**args):
    c = config_lib.defaults()
    c.model.update(vocab_size=V, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, max_seq_len=T,
                   loss_chunk_tokens=20)
    c.seq_len, c.batch_size, c.objective = T, 6, "fm_jax.objectives.policy_gradient.PolicyGradient"
    c.objective_args.update({"group_size": 3, "max_new_tokens": 5} | args)
    return objectives.load(c)


@pytest.fixture(scope="module")
def params():
    return sharding.unbox(jax.jit(make().init)(jax.random.key(0)))[0]


@pytest.fixture(scope="module")
def responses():
    rng = np.random.default_rng(0)
    return [{"prompt": rng.integers(0, V, p), "response": rng.integers(0, V, r), "advantage": a}
            for p, r, a in zip((3, 7, 8, 4, 1), (5, 3, 5, 1, 2), (1.0, -0.5, 2.0, -1.5, 0.7))] + [None]


@pytest.mark.parametrize("args", [
    dict(), dict(average="token", clip_low=0.1, clip_high=0.3), dict(average="constant", kl=0.4)])
def test_loss_and_gradient(params, responses, args):
    objective = make(**args)
    batch, rng = objective.examples(responses, None), np.random.default_rng(1)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in objective.batch_spec(6).items()}
    current = np.asarray(jax.jit(objective.logprobs)(params, batch))
    for name, spread in (("old", 0.4), ("reference", 0.6)):   # as if other policies had said them
        batch[name] = (current + rng.normal(0, spread, current.shape)).astype(np.float32)
    batch["old"][:, ::3] = current[:, ::3]   # a ratio of 1 as well

    def whole(p):
        hidden, _, _ = objective.module.apply({"params": p}, batch["tokens"])
        logp = jax.nn.log_softmax(objective.module.apply({"params": p}, hidden, method="logits"))
        total, count, clipped, tokens = 0.0, 0, 0, 0
        for row, r in enumerate(responses[:5]):
            parts = []
            for j in range(len(r["response"])):
                at = len(r["prompt"]) - 1 + j
                l = logp[row, at, r["response"][j]]
                ratio = jnp.exp(l - batch["old"][row, at])
                low, high = args.get("clip_low", 0.2), args.get("clip_high", 0.2)
                a = r["advantage"]
                outside = jnp.where(a > 0, ratio > 1 + high, ratio < 1 - low)
                part = -jnp.where(outside, (1 + high if a > 0 else 1 - low), ratio) * a
                clipped += outside
                more = batch["reference"][row, at] - l
                parts.append(part + args.get("kl", 0.0) * (jnp.exp(more) - more - 1))
            if args.get("average", "response") == "response":
                total, count = total + sum(parts) / len(parts), count + 1
            elif args["average"] == "token":
                total, count = total + sum(parts), count + len(parts)
            else:
                total, count = total + sum(parts) / 5, count + 1
            tokens += len(parts)
        return total / count, clipped / tokens

    (want, clipped), want_grad = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    out = jax.jit(lambda p: objective.loss(p, batch, None))(params)
    np.testing.assert_allclose(out.loss / out.weight, want, rtol=1e-5)
    total, weight = out.metrics["clipped"]
    assert float(total / weight) == pytest.approx(float(clipped)) and 0 < clipped < 1
    grad = jax.jit(jax.grad(lambda p: objective.loss(p, batch, None).loss / out.weight))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()), grad, want_grad)


def test_the_first_update_is_the_plain_policy_gradient(params, responses):
    """Where the policy is the one that responded, the gradient is that of advantage * log-probability."""
    objective = make(average="token")
    batch = objective.examples(responses, None)
    batch["old"] = np.asarray(jax.jit(objective.logprobs)(params, batch))
    plain = lambda p: -(objective.logprobs(p, batch) * batch["weights"] * batch["advantages"]).sum()

    def of_logits(p):
        hidden, _, _ = objective.module.apply({"params": p}, batch["tokens"])
        logp = jax.nn.log_softmax(objective.module.apply({"params": p}, hidden, method="logits"))
        picked = jnp.take_along_axis(logp, batch["targets"][..., None], -1)[..., 0]
        return -(picked * batch["weights"] * batch["advantages"]).sum()

    assert float(of_logits(params)) == pytest.approx(float(plain(params)), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max()),
                 jax.jit(jax.grad(lambda p: objective.loss(p, batch, None).loss))(params),
                 jax.jit(jax.grad(of_logits))(params))


def test_advantages_are_within_groups():
    rewards = [1, 0, 0, 5, 5, 5]
    np.testing.assert_allclose(make().advantages(rewards), [2**0.5, -(0.5**0.5), -(0.5**0.5), 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(make(normalize_std=False).advantages(rewards), [2 / 3, -1 / 3, -1 / 3, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("args, message", [
    (dict(group_size=1), "group_size=1: at least 2"), (dict(group_size=4), "batch_size=6 a multiple"),
    (dict(average="tokens"), "did you mean 'token'"), (dict(max_new_tokens=12), "max_new_tokens=12 between"),
    (dict(reward="fm_jax.objectives.policy_gradient.equal"), "no such function"), (dict(kl=-1.0), "kl=-1.0")])
def test_refused_settings(args, message):
    with pytest.raises(UserError, match=message):
        make(**args)
    with pytest.raises(UserError, match="which python -m fm_jax.grpo samples"):
        make().examples([{"prompt": "2+2=", "answer": "4"}], None)

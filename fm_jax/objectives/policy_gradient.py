"""Reinforcement: what a model said becomes likelier where it was better than the rest of its group, as in GRPO.

`fm_jax.grpo` samples, scores and trains; this is the loss. Sources: arXiv:2402.03300 (GRPO), arXiv:2503.20783 (Dr.
GRPO), arXiv:2503.14476 (DAPO).

Try:  python -m fm_jax.grpo --config configs/grpo.py:arithmetic --init runs/arith --workdir runs/rl
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.errors import UserError, choose
from fm_jax.objectives import LanguageModel, Loss
from fm_jax.sharding import Layout

AVERAGES = ("response", "token", "constant")


class PolicyGradient(LanguageModel):
    """The objective. `config.objective_args`:

    group_size: responses to each prompt; a batch is config.batch_size responses.
    max_new_tokens: of a response; the end token counts. seq_len holds it and its prompt.
    updates: steps on one batch of responses; the ratio to the policy that said them differs from 1 after the first.
    reward: import path of the checker, a function of (text of the response, record) that returns a number.
    normalize_std: advantages are in units of the group's standard deviation (GRPO); False: in those of the reward (Dr.
      GRPO).
    average: "response": the mean over a response's tokens, then over responses (GRPO); "token": over all tokens of the
      batch (DAPO); "constant": the sum over tokens / max_new_tokens, over responses (Dr. GRPO).
    clip_low, clip_high: the ratio counts from 1 - clip_low to 1 + clip_high.
    kl: weight of the divergence from the model that the run began with (arXiv:2402.03300, equation 4); 0: that model is
      not kept.
    """

    reads = "examples"

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, group_size=8, max_new_tokens=16,
                 updates=1, reward="fm_jax.objectives.policy_gradient.equals_answer", normalize_std=True,
                 average="response", clip_low=0.2, clip_high=0.2, kl=0.0):
        super().__init__(config, tokenizer, layout)
        args = "config.objective_args"
        choose(average, AVERAGES, f"{args}.average")
        if group_size < 2 or config.batch_size % group_size:
            raise UserError(f"{args}.group_size={group_size}: at least 2, or no response would be better than the rest, "
                            f"and config.batch_size={config.batch_size} a multiple of it")
        if updates < 1 or not 0 < max_new_tokens < self.seq_len:
            raise UserError(f"{args}: updates={updates} must be at least 1, and max_new_tokens={max_new_tokens} between 0 "
                            f"and config.seq_len={self.seq_len}")
        if not 0 < clip_low <= 1 or not clip_high > 0 or kl < 0:
            raise UserError(f"{args}: clip_low={clip_low} must be a share, clip_high={clip_high} positive, and kl={kl} 0 "
                            "or more")
        self.group_size, self.max_new_tokens, self.updates = group_size, max_new_tokens, updates
        self.normalize_std, self.average, self.kl = normalize_std, average, kl
        self.clip = 1 - clip_low, 1 + clip_high
        self.reward = _function(reward)

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda dtype, n=self.seq_len: jax.ShapeDtypeStruct((batch_size, n), dtype)
        return {"tokens": make(jnp.int32), "targets": make(jnp.int32), "weights": make(jnp.float32),
                "advantages": make(jnp.float32, 1), "old": make(jnp.float32), "reference": make(jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns tokens and targets, int32, and weights, float32, [n, seq_len], 1 where the target is of the response;
        advantages, float32 [n, 1]; of the targets' log-probabilities by the policy that said them, old, and by the
        reference, zeros to be filled in: [n, seq_len].

        A record is {"prompt": ids, "response": ids, "advantage": number}; a prompt loses its beginning where it does not
        fit.
        """
        if any("response" not in record for record in records if record is not None):
            raise UserError("config.objective: PolicyGradient learns from responses, which python -m fm_jax.grpo samples; "
                            "fm_jax.train has none")
        out = {name: np.zeros((len(records), *s.shape[1:]), s.dtype) for name, s in self.batch_spec(0).items()}
        for row, record in enumerate(records):
            if record is None:
                continue
            said = np.asarray(record["response"], np.int32)
            ids = np.concatenate([np.asarray(record["prompt"], np.int32)[-(self.seq_len + 1 - len(said)) :], said])
            end = len(ids) - 1
            out["tokens"][row, :end], out["targets"][row, :end] = ids[:-1], ids[1:]
            out["weights"][row, end - len(said) : end], out["advantages"][row] = 1, record["advantage"]
        return out

    def random_batch(self, n, rng):
        prompt = self.seq_len + 1 - self.max_new_tokens
        ids = rng.integers(0, self.arch.vocab_size, (n, self.seq_len + 1))
        batch = self.examples([{"prompt": row[:prompt], "response": row[prompt:], "advantage": a}
                               for row, a in zip(ids, rng.normal(1.0, size=n))], None)
        batch["old"][:] = batch["reference"][:] = -np.log(self.arch.vocab_size)
        return batch

    def loss(self, params, batch, key=None):
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"], key=key)   # padding is behind all tokens
        said_BT, advantage_B1 = batch["weights"], batch["advantages"]
        lengths_B1 = said_BT.sum(1, keepdims=True)
        real, tokens = (lengths_B1 > 0).sum().astype(jnp.float32), said_BT.sum()
        share_BT = {"response": said_BT / jnp.maximum(lengths_B1, 1), "token": said_BT,
                    "constant": said_BT / self.max_new_tokens}[self.average]

        def f(nll_BT):
            ratio_BT = jnp.exp(jnp.where(said_BT > 0, -nll_BT - batch["old"], 0))
            clipped_BT = jnp.clip(ratio_BT, *self.clip)
            gain_BT = jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
            loss_BT, measured = -gain_BT, {"clipped": (ratio_BT * advantage_B1 > gain_BT), "ratio": ratio_BT}
            if self.kl:
                more_BT = jnp.where(said_BT > 0, batch["reference"] + nll_BT, 0)   # log of reference / policy
                measured["kl"] = jnp.exp(more_BT) - more_BT - 1   # arXiv:2402.03300, equation 4
                loss_BT += self.kl * measured["kl"]
            return (loss_BT * share_BT).sum(), {n: (x * said_BT).sum() for n, x in measured.items()}

        loss, sums = self.module.apply({"params": params}, hidden, batch["targets"], f, method="loss_of")
        weight = tokens if self.average == "token" else real
        return Loss(loss, weight, {name: (jax.lax.stop_gradient(x), tokens) for name, x in sums.items()})

    # --- of the loop ----------------------------------------------------------------------------------------------

    def logprobs(self, params, batch):
        """Returns float32 [B, T], the log-probability of each target."""
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"])
        _, (nll_BT, _, _) = self.module.apply({"params": params}, hidden, batch["targets"], batch["weights"], 0.0,
                                              method="loss_sum")
        return -nll_BT

    def advantages(self, rewards_N) -> np.ndarray:
        """Returns float32 [N]: how much better each response is than the mean of its group of neighbours."""
        groups = np.asarray(rewards_N, np.float64).reshape(-1, self.group_size)
        better = groups - groups.mean(1, keepdims=True)
        if self.normalize_std:
            better /= groups.std(1, keepdims=True) + 1e-6
        return better.ravel().astype(np.float32)


def equals_answer(text: str, record: dict) -> float:
    """Returns 1 where the response is the record's `answer`, white space around it aside; else 0."""
    if not isinstance(record.get("answer"), str):
        raise UserError(f"a problem needs a text as 'answer', to compare responses with, got {record!r:.80}")
    return float(text.strip() == record["answer"].strip())


def _function(path):
    """Returns the function that an import path names."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(f"config.objective_args.reward={path!r}: no such function ({error})") from None
    return found

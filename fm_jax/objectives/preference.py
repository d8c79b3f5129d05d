"""Preference tuning: of two answers to a prompt, the chosen one becomes likelier than the rejected one.

Try:  python -m fm_jax.annotate --model runs/sft --data data/pairs --output data/pairs_sft
      python -m fm_jax.train --config configs/preference.py:dpo --workdir runs/dpo \\
        --config.data.train=data/pairs_sft --config.checkpoint.init_from=runs/sft
"""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.data.examples import place_of
from fm_jax.errors import UserError, choose
from fm_jax.objectives import LanguageModel, Loss, document_positions
from fm_jax.sharding import Layout

WITH_REFERENCE, FREE = ("dpo", "ipo"), ("simpo", "orpo")
NATS = 0.02   # a token: what log-probabilities of one model may differ by, in bfloat16 and on other devices


class Preference(LanguageModel):
    """The objective. `config.objective_args`:

    method: of h, how much more the model prefers the chosen answer than the reference does, in nats, and of l, the mean
      log-probability of an answer's tokens:
      dpo: -log sigmoid(beta h) (arXiv:2305.18290, equation 7). ipo: (h - 1 / (2 beta))^2 (arXiv:2310.12036, equation
      17). simpo: -log sigmoid(beta (l chosen - l rejected) - margin), without reference (arXiv:2405.14734, equation 6).
      orpo: nll of the chosen one - beta log sigmoid(log odds ratio), of the odds p / (1 - p) of p = e^l, without
      reference (arXiv:2403.07691, equations 6 and 7).
    beta: as there; 0.1 for dpo and ipo, 2 for simpo, 0.1 for orpo are the papers'.
    margin: of simpo.
    label_smoothing: of dpo and simpo, the share of pairs that are taken to be the wrong way round (cDPO,
      arXiv:2305.18290's authors, https://ericmitchell.ai/cdpo.pdf).
    nll_weight: of the mean nll of the chosen answer, added to any of them (arXiv:2404.19733).

    A record has `prompt`, a text or a chat's messages, and as texts `chosen` and `rejected`. Where the method has a
    reference, it also has `reference`, {"chosen": log-probability, "rejected": ...}, which `fm_jax.annotate` puts there;
    the run begins with that model, which the first batch is asked for. A row of seq_len tokens holds both answers, each
    with the prompt before it, as two documents of half a row: a prompt that does not fit loses its beginning, and an
    answer its end, which the metric `cut` has the share of.
    """

    reads = "examples"

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, method="dpo", beta=0.1, margin=0.5,
                 label_smoothing=0.0, nll_weight=0.0):
        super().__init__(config, tokenizer, layout)
        choose(method, WITH_REFERENCE + FREE, "config.objective_args.method")
        if not beta > 0 or nll_weight < 0:
            raise UserError(f"config.objective_args: beta={beta} must be more than 0, and nll_weight={nll_weight} 0 or "
                            "more")
        if not 0 <= label_smoothing < 0.5 or label_smoothing and method in ("ipo", "orpo"):
            raise UserError(f"config.objective_args.label_smoothing={label_smoothing} is of dpo and simpo, a share below "
                            "a half")
        self.method, self.beta, self.margin = method, beta, margin
        self.label_smoothing, self.nll_weight = label_smoothing, nll_weight
        self.half = self.seq_len // 2

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda dtype, n=self.seq_len: jax.ShapeDtypeStruct((batch_size, n), dtype)
        return {"tokens": make(jnp.int32), "targets": make(jnp.int32), "positions": make(jnp.int32),
                "segment_ids": make(jnp.int32), "weights": make(jnp.float32), "reference": make(jnp.float32, 2),
                "cut": make(jnp.float32, 1)}

    def examples(self, records, seeds, train=True):
        """Returns tokens, targets, positions, segment_ids (int32) and weights (float32), each [n, seq_len]; reference,
        float32 [n, 2], and cut, float32 [n, 1].

        Segment 1 is the prompt with the chosen answer, 2 with the rejected one, 0 padding. Weights are 1 where the
        target is of an answer.
        """
        n = len(records)
        out = {name: np.zeros((n, *s.shape[1:]), s.dtype) for name, s in self.batch_spec(n).items()}
        for row, record in enumerate(records):
            if record is None:
                continue
            begin = 0
            for segment, answer in ((1, "chosen"), (2, "rejected")):
                prompt, said = self._ids(record, answer)
                room = self.half + 1
                out["cut"][row] += 0.5 * (len(said) > room - 1)
                said = said[: room - 1]
                ids = np.concatenate([prompt[max(len(prompt) + len(said) - room, 0) :], said])
                at, first = slice(begin, begin + len(ids) - 1), begin + len(ids) - 1 - len(said)
                out["tokens"][row, at], out["targets"][row, at] = ids[:-1], ids[1:]
                out["segment_ids"][row, at], out["weights"][row, first : at.stop] = segment, 1
                begin = at.stop
            if self.method in WITH_REFERENCE:
                out["reference"][row] = self._reference(record)
        out["positions"] = np.where(out["segment_ids"] > 0, document_positions(out["segment_ids"]), 0).astype(np.int32)
        return out

    def random_batch(self, n, rng):
        # Ids, not texts: a plan or a benchmark may have no tokenizer.
        out = {name: np.zeros((n, *s.shape[1:]), s.dtype) for name, s in self.batch_spec(n).items()}
        for name in ("tokens", "targets"):
            out[name][:] = rng.integers(0, self.arch.vocab_size, out[name].shape)
        out["segment_ids"][:] = 1 + (np.arange(self.seq_len) >= self.half)
        out["positions"], out["weights"][:] = document_positions(out["segment_ids"]), 1
        return out

    def loss(self, params, batch, key=None):
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
                                         key=key)
        of = jnp.stack([batch["weights"] * (batch["segment_ids"] == s) for s in (1, 2)], axis=1)   # [B, 2, T]
        lengths_B2, reference_B2 = of.sum(-1), batch["reference"]
        real_B = (lengths_B2.min(1) > 0).astype(jnp.float32)
        lengths_B2 = jnp.maximum(lengths_B2, 1)

        def f(nll_BT):
            logp_B2 = -(of * nll_BT[:, None]).sum(-1)
            loss_B, rewards_B2 = self._losses(logp_B2, logp_B2 / lengths_B2, reference_B2)
            loss_B += self.nll_weight * -logp_B2[:, 0] / lengths_B2[:, 0]
            return (loss_B * real_B).sum(), (logp_B2, rewards_B2)

        loss, (logp_B2, rewards_B2) = self.module.apply(
            {"params": params}, hidden, batch["targets"], f, method="loss_of")
        logp_B2, rewards_B2 = jax.lax.stop_gradient((logp_B2, rewards_B2))
        margin_B, pairs = rewards_B2[:, 0] - rewards_B2[:, 1], real_B.sum()
        mean = lambda x_B: ((x_B * real_B).sum(), pairs)
        metrics = {"reward_accuracy": mean((margin_B > 0).astype(jnp.float32)), "reward_margin": mean(margin_B),
                   "chosen_reward": mean(rewards_B2[:, 0]), "rejected_reward": mean(rewards_B2[:, 1]),
                   "chosen_nll": (-(logp_B2[:, 0] * real_B).sum(), (of[:, 0].sum(-1) * real_B).sum()),
                   "cut": mean(batch["cut"][:, 0])}
        if self.method in WITH_REFERENCE:
            gap = (jnp.abs(logp_B2 - reference_B2) * real_B[:, None]).sum()
            metrics["reference_gap"] = (gap, (lengths_B2 * real_B[:, None]).sum())
        return Loss(loss, pairs, metrics)

    def check_start(self, means: dict[str, float]) -> None:
        """Returns nothing. Raises UserError where the reference is not the model that the run begins with.

        means: of metrics, of a batch before the first step.
        """
        if (gap := means.get("reference_gap", 0.0)) > NATS:
            raise UserError(f"the reference of config.data.train is another model than the one that this run begins with: "
                            f"their log-probabilities are {gap:.3g} nats a token apart; annotate the pairs with the run "
                            "that --config.checkpoint.init_from names, at the same config.seq_len")

    def logprobs(self, params, batch):
        """Returns float32 [B, 2], the log-probabilities of the chosen and the rejected answer: of a reference."""
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])
        _, (nll_BT, _, _) = self.module.apply({"params": params}, hidden, batch["targets"], batch["weights"], 0.0,
                                              method="loss_sum")
        return jnp.stack([-(nll_BT * batch["weights"] * (batch["segment_ids"] == s)).sum(1) for s in (1, 2)], axis=1)

    # --- inside -------------------------------------------------------------------------------------------------

    def _losses(self, logp_B2, mean_B2, reference_B2):
        """Returns (loss [B], rewards [B, 2]) of summed and mean log-probabilities."""
        if self.method in WITH_REFERENCE:
            rewards_B2 = self.beta * (logp_B2 - reference_B2)
        else:
            rewards_B2 = self.beta * mean_B2
        h_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        if self.method == "ipo":
            return jnp.square(h_B / self.beta - 0.5 / self.beta), rewards_B2
        if self.method == "orpo":
            odds_B2 = mean_B2 - jnp.log1p(-jnp.exp(jnp.minimum(mean_B2, -1e-6)))
            return -mean_B2[:, 0] - self.beta * jax.nn.log_sigmoid(odds_B2[:, 0] - odds_B2[:, 1]), rewards_B2
        h_B -= self.margin if self.method == "simpo" else 0.0
        e = self.label_smoothing
        return -(1 - e) * jax.nn.log_sigmoid(h_B) - e * jax.nn.log_sigmoid(-h_B), rewards_B2

    def _ids(self, record, answer):
        """Returns (ids of the prompt, ids of the answer and of its end), int32."""
        prompt, said, tokenizer = record.get("prompt"), record.get(answer), self.tokenizer
        if not isinstance(said, str) or not said.strip():
            raise UserError(f"{place_of(record)}: {answer!r} must be a text, got {said!r:.40}")
        if isinstance(prompt, list):
            ids, of_answer = tokenizer.chat_tokens([*prompt, {"role": "assistant", "content": said}])
            begun = tokenizer.chat_ids(prompt)
            if ids[: len(begun)].tolist() != begun.tolist():
                raise UserError(f"{place_of(record)}: the tokens of the prompt change with the answer behind it")
            return begun, ids[len(begun) : np.flatnonzero(of_answer)[-1] + 1]
        if not isinstance(prompt, str):
            raise UserError(f"{place_of(record)}: 'prompt' must be a text or a chat's messages, got {prompt!r:.40}")
        if tokenizer.eos_id is None:
            raise UserError("this tokenizer has no end-of-text token, which ends an answer: give prompts as chats")
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        return (np.array([start, *tokenizer.encode(prompt)], np.int32),
                np.array([*tokenizer.encode(said), tokenizer.eos_id], np.int32))

    def _reference(self, record):
        reference = record.get("reference")
        if not isinstance(reference, dict) or not {"chosen", "rejected"} <= set(reference):
            raise UserError(f"{place_of(record)}: no 'reference' log-probabilities, which method={self.method!r} needs: "
                            "python -m fm_jax.annotate puts them there, or take method='simpo' or 'orpo'")
        return reference["chosen"], reference["rejected"]

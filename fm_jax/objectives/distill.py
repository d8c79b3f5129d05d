"""Distillation: next tokens of packed text, and what a teacher expected in their place, which the data has.

Try:  python -m fm_jax.annotate --model runs/teacher --data data/x --output data/x_taught --seq_len 256
      python -m fm_jax.train --config configs/distill.py --workdir runs/student --config.data.train=data/x_taught
"""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.errors import UserError
from fm_jax.objectives import LanguageModel, Loss
from fm_jax.sharding import Layout

_LEAST = 1e-6   # of what is beyond the top k: the difference of two float32 near 1


class Distill(LanguageModel):
    """The objective. `config.objective_args`:

    top_k: tokens that the teacher names in each place, as the data has them.
    alpha: share of the divergence from the teacher in the loss; the rest is of the next token.
    tail: True: all tokens beyond the top k are one more, with what is left of the probability; False: there are no
      others, to the teacher and the student.
    temperature: of both, where there is no tail; the divergence is times its square (arXiv:1503.02531, section 2).

    The divergence is KL(teacher || student). The student's tokens are the teacher's; its model may be any.
    """

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, top_k=32, alpha=0.5, tail=True,
                 temperature=1.0):
        super().__init__(config, tokenizer, layout)
        if not 0 <= alpha <= 1 or not temperature > 0 or not 0 < top_k < self.arch.vocab_size:
            raise UserError(f"config.objective_args: alpha={alpha} is a share, temperature={temperature} positive, and "
                            f"top_k={top_k} from 1 to the vocabulary less one")
        if tail and temperature != 1:
            raise UserError(f"config.objective_args.temperature={temperature}: what is beyond the top k is known at 1 "
                            "alone; set tail=False")
        self.top_k, self.alpha, self.tail, self.temperature = top_k, alpha, tail, temperature

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda dtype, *more: jax.ShapeDtypeStruct((batch_size, self.seq_len, *more), dtype)
        return {"tokens": make(jnp.int32), "targets": make(jnp.int32), "positions": make(jnp.int32),
                "segment_ids": make(jnp.int32), "weights": make(jnp.float32),
                "teacher_ids": make(jnp.int32, self.top_k), "teacher_logprobs": make(jnp.float32, self.top_k)}

    def examples(self, records, seeds, train=True):
        """Returns what `causal_lm.CausalLM` does of the same rows; teacher_ids, int32, and teacher_logprobs, float32, of
        the likeliest targets, likeliest first, [n, seq_len, top_k].
        """
        if "teacher_ids" not in records:
            raise UserError("config.data has no teacher: python -m fm_jax.annotate makes a folder that has one")
        if (k := records["teacher_ids"].shape[-1]) < self.top_k:
            raise UserError(f"config.objective_args.top_k={self.top_k}: the data has {k} tokens of its teacher")
        return self.packed(records["tokens"], records["segment_ids"], records.get("loss_mask")) | {
            name: records[name][..., : self.top_k] for name in ("teacher_ids", "teacher_logprobs")}

    def random_batch(self, n, rng):
        shape = n, self.seq_len, self.top_k
        tokens = rng.integers(0, self.arch.vocab_size, (n, self.seq_len + 1), dtype=np.int32)
        return self.packed(tokens, np.ones_like(tokens)) | {
            "teacher_ids": rng.integers(0, self.arch.vocab_size, shape, dtype=np.int32),
            "teacher_logprobs": np.full(shape, -np.log(2 * self.top_k), np.float32)}

    def loss(self, params, batch, key=None):
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
                                         key=key)
        arrays = {name: batch[name] for name in ("targets", "weights", "teacher_ids", "teacher_logprobs")}
        sums = self.module.apply({"params": params}, hidden, arrays, self._sums, method="sum_of")
        total = batch["weights"].sum()
        loss = self.alpha * self.temperature**2 * sums["kl"] + (1 - self.alpha) * sums["nll"]
        return Loss(loss, total, {n: (jax.lax.stop_gradient(x), total) for n, x in sums.items()})

    def _sums(self, logits_BTV, of):
        """Returns the sums over a piece of nll, divergence from the teacher, and right guesses."""
        lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        picked_BT = jnp.take_along_axis(logits_BTV, of["targets"][..., None], -1)[..., 0]
        kl_BT = self._divergence(jnp.take_along_axis(logits_BTV, of["teacher_ids"], -1), lse_BT, of["teacher_logprobs"])
        right_BT = (picked_BT >= logits_BTV.max(-1)).astype(jnp.float32)
        each = {"nll": lse_BT - picked_BT, "kl": kl_BT, "accuracy": right_BT}
        return {name: jnp.where(of["weights"] > 0, x * of["weights"], 0).sum() for name, x in each.items()}

    def _divergence(self, logits_BTK, lse_BT, teacher_BTK):
        if not self.tail:
            p, q = (jax.nn.log_softmax(x / self.temperature) for x in (teacher_BTK, logits_BTK))
            return (jnp.exp(p) * (p - q)).sum(-1)
        q = logits_BTK - lse_BT[..., None]
        inside = (jnp.exp(teacher_BTK) * (teacher_BTK - q)).sum(-1)
        left = lambda x: jnp.maximum(-jnp.expm1(jax.nn.logsumexp(x, axis=-1)), _LEAST)
        rest_p, rest_q = left(teacher_BTK), left(q)
        return inside + rest_p * jnp.log(rest_p / rest_q)

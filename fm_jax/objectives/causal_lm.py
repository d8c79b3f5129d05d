"""Next-token prediction on packed documents, with fill-in-the-middle for code.

Try:  python -m fm_jax.train --config configs/causal_lm.py:tiny --workdir runs/tiny
"""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import model
from fm_jax.errors import UserError
from fm_jax.frontends import TextModel
from fm_jax.objectives import LanguageModel, Loss, uniform
from fm_jax.sharding import Layout


class CausalLM(LanguageModel):
    """The objective. `config.objective_args`:

    z_loss: weight of the squared log-normaliser (arXiv:2204.02311, section 5); 0: off.
    document_mask: tokens see their own document; False: the whole row before them, with positions that count through
      it (arXiv:2005.14165, appendix B), which is quicker where an attention kernel has no segments.
    fim_rate: share of documents turned into fill-in-the-middle examples (arXiv:2207.14255); 0: off.
    fim_spm_rate: of those, the share in suffix-prefix-middle order; the rest prefix-suffix-middle.
    load_balance_loss, router_z_loss: weights of these losses of experts, summed over layers; see `model.Routing`.
    """

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, z_loss=0.0, document_mask=True,
                 fim_rate=0.0, fim_spm_rate=0.5, load_balance_loss=0.0, router_z_loss=0.0):
        super().__init__(config, tokenizer, layout)
        for name, rate in (("fim_rate", fim_rate), ("fim_spm_rate", fim_spm_rate)):
            if not 0 <= rate <= 1:
                raise UserError(f"config.objective_args.{name}={rate} is a share of documents: between 0 and 1")
        for name, weight in (("load_balance_loss", load_balance_loss), ("router_z_loss", router_z_loss)):
            if weight and not self.arch.num_experts:
                raise UserError(f"config.objective_args.{name}={weight} needs experts: set model.num_experts or leave "
                                "it out")
        if router_z_loss and self.arch.router_score != "softmax":
            raise UserError(f"config.objective_args.router_z_loss={router_z_loss} is of a softmax's normaliser, which "
                            f"model.router_score={self.arch.router_score!r} does not have; set it to 0")
        self.z_loss, self.document_mask = z_loss, document_mask
        self.fim_rate, self.fim_spm_rate = fim_rate, fim_spm_rate
        self.load_balance_loss, self.router_z_loss = load_balance_loss, router_z_loss
        if fim_rate and tokenizer is not None and tokenizer.fim_ids is None:
            raise UserError(f"objective_args.fim_rate={fim_rate}: this tokenizer has no fill-in-the-middle tokens; "
                            "train one with fm_jax.prepare --tokenizer sentencepiece:SIZE, or set fim_rate=0")
        # UTF-8 bytes of each token, for bits per byte. Without a tokenizer (plan, benchmark) there is no such metric.
        self.token_bytes = None
        if tokenizer is not None:
            self.token_bytes = np.pad(tokenizer.token_bytes(), (0, self.arch.vocab_size - tokenizer.vocab_size))
        # Only in training are tokens dropped: a prediction does not depend on what else is in its row.
        self._trained = TextModel(self.arch, layout)

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda dtype: jax.ShapeDtypeStruct((batch_size, self.seq_len), dtype)
        return {"tokens": make(jnp.int32), "targets": make(jnp.int32), "positions": make(jnp.int32),
                "segment_ids": make(jnp.int32), "weights": make(jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns tokens, targets, positions, segment_ids (int32) and weights (float32), each [n, seq_len].

        A record is a packed row: `tokens` and `segment_ids`, int32 [n, seq_len + 1]. Segments count the documents of
        the row from 1; 0 is padding. A target counts where its input is of the same document and, if there is one,
        the `loss_mask` (uint8 [n, seq_len + 1]) is 1; positions restart with each document. Held-out rows are plain
        next-token prediction, whatever the `fim_rate`: bits per byte are of the text.
        """
        tokens, segments = records["tokens"], records["segment_ids"]
        mask = records.get("loss_mask")
        if self.fim_rate and train:
            if mask is not None:
                raise UserError(f"config.objective_args.fim_rate={self.fim_rate} turns documents around, and of chats "
                                "only answers are learnt; set it to 0")
            tokens = self._fill_in_the_middle(tokens, segments, seeds)
        return self.packed(tokens, segments, mask)

    def random_batch(self, n, rng):
        tokens = rng.integers(0, self.arch.vocab_size, (n, self.seq_len + 1), dtype=np.int32)
        return self.packed(tokens, np.ones_like(tokens))   # no middle to fill in, and perhaps no tokenizer for it

    def loss(self, params, batch, key=None):
        module = self._trained if key is not None else self.module
        places = (batch["positions"], batch["segment_ids"]) if self.document_mask else ()
        hidden, _, taps = module.apply({"params": params}, batch["tokens"], *places, key=key,
                                       capture=("router",) if self.arch.num_experts else ())
        weight = batch["weights"]
        loss, (nll, _, correct) = self.module.apply({"params": params}, hidden, batch["targets"], weight, self.z_loss,
                                                    method="loss_sum")
        total, nats = weight.sum(), (nll * weight).sum()
        metrics = {"nll": (nats, total), "accuracy": ((correct * weight).sum(), total)}
        if self.token_bytes is not None:
            bytes_ = (jnp.asarray(self.token_bytes)[batch["targets"]] * weight).sum()
            metrics["bits_per_byte"] = (nats / np.log(2), bytes_)
        if self.arch.num_experts:
            balance, z, bias, routed = taps["router"].losses(weight.sum(1))
            loss += self.load_balance_loss * balance + self.router_z_loss * z + model.ROUTER_BIAS_GRADIENT * bias
            metrics |= routed
        return Loss(loss, total, metrics)

    # --- fill in the middle ------------------------------------------------------------------------------------------

    def _fill_in_the_middle(self, tokens, segments, seeds):
        """Returns the rows with some documents reordered to predict a middle from both sides, lengths kept.

        A document's last three tokens before its end make room for the three markers. Split points lie between
        tokens. What opens a document in the row (its BOS, or the token that the row before ended with) and its
        EOS stay in place.
        """
        # All documents at once: batches come at 53 to 65 M tokens/s with fim_rate 0.5, at 17 to 19 M from a loop over
        # rows and documents (one EPYC core, 2026-11).
        prefix_id, suffix_id, middle_id = self.tokenizer.fim_ids
        shape, tokens, flat = tokens.shape, tokens.ravel(), segments.ravel()
        # Draws go by the number of a document in its row, so that one document's fate does not move another's.
        draws = uniform(seeds, 4 * (flat.max() + 1)).reshape(len(seeds), -1, 4)
        fresh = np.ones(shape, bool)
        np.not_equal(segments[:, 1:], segments[:, :-1], out=fresh[:, 1:])
        bounds = np.append(np.flatnonzero(fresh), flat.size)
        start, stop = bounds[:-1], bounds[1:]
        stop = stop - (tokens[stop - 1] == self.tokenizer.eos_id)
        draws = draws[start // shape[1], flat[start]]
        start = start + 1   # of the body
        turned = (draws[:, 0] < self.fim_rate) & (flat[start - 1] > 0) & (stop - start >= 6)
        start, stop, draws = start[turned], stop[turned], draws[turned]
        length = stop - start - 3
        a, b = np.sort((draws[:, 2:] * (length + 1)[:, None]).astype(int)).T
        # <prefix> text[:a] <suffix> text[b:] <middle> text[a:b]; in suffix-prefix-middle order the prefix goes to the
        # middle, <prefix> <suffix> text[b:] <middle> text[:b], which is the same with a = 0.
        a = np.where(draws[:, 1] < self.fim_spm_rate, 0, a)
        suffix_at, middle_at = start + a + 1, start + a + length - b + 2
        # A token comes from the place behind its left neighbour's, but for the jumps at the markers and at the end.
        jump = np.ones(flat.size + 1, int)
        jump[0] = 0
        jump[start] -= 1
        jump[suffix_at] += b - a - 1
        jump[middle_at] += a - length - 1
        jump[stop] += length - b + 3
        out = tokens[np.cumsum(jump[:-1])]
        out[start], out[suffix_at], out[middle_at] = prefix_id, suffix_id, middle_id
        return out.reshape(shape)

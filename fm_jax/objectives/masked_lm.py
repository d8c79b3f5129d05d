"""Masked language modelling: an encoder that sees both sides fills in what was masked, in packed documents.

Try:  python -m fm_jax.train --config configs/masked_lm.py:tiny --workdir runs/tiny
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import model
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError, choose
from fm_jax.frontends import TextModel, real, text_vectors
from fm_jax.objectives import Loss, document_positions, uniform
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab

SPAN = 3.0   # tokens of a masked span on average; arXiv:1907.10529 cuts a geometric distribution of mean 5 to 3.8


class MaskedLM:
    """The objective. `config.objective_args`:

    mask_rate: share of a row's tokens that are predicted (arXiv:1810.04805, section 3.1), special tokens never.
    masking: "token", or "span": of neighbouring tokens, three on average (arXiv:1907.10529).
    mask_frac, random_frac: of those, the shares that the mask and a random token stand for; the rest stays as it is.
    mask_id: the mask; -1: the tokenizer's, or else the first id behind its vocabulary.
    z_loss: as of `causal_lm.CausalLM`.
    """

    reads = "packed"

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, mask_rate=0.15, masking="token",
                 mask_frac=0.8, random_frac=0.1, mask_id=-1, z_loss=0.0):
        self.arch = Architecture(**config.model.to_dict())
        self.seq_len = config.seq_len
        if self.seq_len > self.arch.max_seq_len:
            raise UserError(f"config.seq_len={self.seq_len} exceeds model.max_seq_len={self.arch.max_seq_len}")
        if self.arch.causal:
            raise UserError("model.causal=True: a masked language model sees both sides; set it to False")
        if self.arch.num_experts:
            raise UserError(f"model.num_experts={self.arch.num_experts}: experts are causal_lm's; set it to 0")
        choose(masking, ("token", "span"), "config.objective_args.masking")
        if not 0 < mask_rate < 1 or min(mask_frac, random_frac) < 0 or mask_frac + random_frac > 1:
            raise UserError(f"config.objective_args: mask_rate={mask_rate} must be between 0 and 1, and mask_frac="
                            f"{mask_frac} and random_frac={random_frac} shares of 1")
        if layout is not None:
            model.check(self.arch, self.seq_len, layout)
        self.mask_rate, self.masking, self.z_loss = mask_rate, masking, z_loss
        self.mask_frac, self.random_frac = mask_frac, random_frac
        self.never, self.vocabulary = [], self.arch.vocab_size   # ids that are never predicted; what random ones are of
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
            self.never, self.vocabulary = list(tokenizer.specials.values()), tokenizer.vocab_size
            if mask_id < 0:
                mask_id = tokenizer.vocab_size if tokenizer.mask_id is None else tokenizer.mask_id
            if mask_id >= self.arch.vocab_size:
                raise UserError(f"no id is left for the mask: the tokenizer has {tokenizer.vocab_size}, as many as the "
                                f"model; set --config.model.vocab_size={mask_id + 1} or more, or "
                                "config.objective_args.mask_id")
        self.mask_id = mask_id if mask_id >= 0 else self.arch.vocab_size - 1
        # Places of a row at most; as many parts of them as `context` makes of the row.
        parts = layout.parts("length") if layout else 1
        self.places = math.ceil(math.ceil(mask_rate * self.seq_len) / parts) * parts
        self.tokens_per_example = self.seq_len
        unseen = 6.0 * self.arch.embed_dim * (self.arch.vocab_size + self.arch.embed_dim * self.arch.head_transform)
        self.flops_per_example = (self.seq_len * self.arch.flops_per_token(self.seq_len)
                                  - (self.seq_len - self.places) * unseen)   # logits are of the masked alone
        self.module = TextModel(self.arch, layout)
        self.predict = {"hidden": self.hidden, "embed": self.embed, "logits": self.logits}

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda length, dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, length), dtype)
        return {"tokens": make(self.seq_len), "positions": make(self.seq_len), "segment_ids": make(self.seq_len),
                "places": make(self.places), "targets": make(self.places), "weights": make(self.places, jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns tokens, positions and segment_ids, int32 [n, seq_len], and of what is predicted places and targets,
        int32, and weights, float32, [n, places].

        A record is a packed row: `tokens` and `segment_ids`, int32 [n, seq_len + 1], of which the last is left out.
        Segments count the documents of the row from 1; 0 is padding. Masks depend on a row's seed alone, so that those
        of held-out rows are the same at every validation.
        """
        tokens, segments = records["tokens"][:, :-1], records["segment_ids"][:, :-1]
        n, T = tokens.shape
        draws = uniform(seeds, 3 * T).reshape(n, 3, T)
        # Units, tokens or spans, in the order of what is drawn for each, until enough tokens are taken.
        unit = np.arange(T)[None].repeat(n, 0)
        if self.masking == "span":
            unit = np.cumsum(draws[:, 2] < 1 / SPAN, axis=1)
            unit = unit.clip(max=T - 1)
        free = (segments > 0) & ~np.isin(tokens, self.never)
        order = np.argsort(np.where(free, np.take_along_axis(draws[:, 0], unit, 1), 2.0), axis=1, kind="stable")
        taken = np.minimum(np.ceil(self.mask_rate * free.sum(1)).astype(int), self.places)
        places = order[:, : self.places]
        weights = (np.arange(self.places) < taken[:, None]).astype(np.float32)
        places = np.where(weights > 0, places, 0)
        targets = np.take_along_axis(tokens, places, 1)
        how = np.take_along_axis(draws[:, 1], places, 1)
        # The draw that chose "random" is uniform within its share, so it also names the token.
        inside = (how - self.mask_frac) / max(self.random_frac, 1e-9)
        drawn = (np.clip(inside, 0, 1 - 1e-12) * self.vocabulary).astype(np.int32)
        put = np.where(how < self.mask_frac, self.mask_id, np.where(inside < 1, drawn, targets))
        row, column = np.nonzero(weights)
        masked = tokens.copy()
        masked[row, places[row, column]] = put[row, column]
        return {"tokens": masked, "positions": document_positions(segments), "segment_ids": segments,
                "places": places.astype(np.int32), "targets": targets, "weights": weights}

    def random_batch(self, n, rng):
        tokens = rng.integers(0, self.vocabulary, (n, self.seq_len + 1), dtype=np.int32)
        return self.examples({"tokens": tokens, "segment_ids": np.ones_like(tokens)},
                             rng.integers(0, 2 ** 63, n, dtype=np.uint64))

    def init(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        unplaced = TextModel(self.arch)   # shardings of parameters come from their axes, not from this dummy batch
        return unplaced.init(key, tokens, method=lambda m, t: m.logits(m(t)[0]))["params"]

    def loss(self, params, batch, key=None):
        hidden, _, _ = self.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"],
                                         key=key)
        chosen = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
        weight = batch["weights"]
        loss, (nll, _, correct) = self.module.apply({"params": params}, chosen, batch["targets"], weight, self.z_loss,
                                                    method="loss_sum")
        total = weight.sum()
        return Loss(loss, total, {"nll": ((nll * weight).sum(), total), "accuracy": ((correct * weight).sum(), total)})

    # --- predict ----------------------------------------------------------------------------------------------------

    def hidden(self, params, tokens_BT, capture=()):
        """Returns (hidden states [B, T, D], taps) of rows without padding."""
        hidden, _, taps = self.module.apply({"params": params}, tokens_BT, capture=capture)
        return hidden, taps

    def embed(self, params, tokens_BT, length_B):
        """Returns float32 [B, D]: the mean hidden state of the first `length_B` tokens of each row."""
        hidden, _, _ = self.module.apply({"params": params}, tokens_BT, segment_ids_BT=real(tokens_BT, length_B))
        return text_vectors(hidden, length_B, "mean")

    def logits(self, params, tokens_BT):
        """Returns float32 logits [B, T, V]."""
        return self.module.apply({"params": params}, self.hidden(params, tokens_BT)[0], method="logits")

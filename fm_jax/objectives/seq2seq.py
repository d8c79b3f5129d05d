"""Text to text by an encoder and a decoder: pretrained by filling in spans of packed documents, or taught by pairs.

Try:  python -m fm_jax.train --config configs/seq2seq.py:tiny --workdir runs/tiny
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import config as config_lib
from fm_jax.architecture import Architecture, encoder_decoder_flops
from fm_jax.errors import UserError, choose
from fm_jax.frontends import EncoderDecoder
from fm_jax.model import Context
from fm_jax.objectives import Loss, check_stacks, document_positions, uniform
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab


class Seq2Seq:
    """The objective. The decoder is `config.model`, the encoder `config.encoder`. `config.objective_args`:

    task: "span_corruption" of packed text (arXiv:1910.10683, section 3.1.4), or "pairs": examples of {"source",
      "target"}, one a row; a text that is too long is cut at its end.
    corruption_rate: share of a document's tokens that are taken out.
    mean_span: tokens of a span that is taken out, on average.
    sentinels: how many ids there are to mark a document's spans; where it has more spans, they are longer.
    sentinel_id: the first of them, the others are below; -1: the tokenizer's <extra_id_0>, or else they are the ids
      behind its vocabulary.
    start_id: what the decoder begins with.
    source_length, target_length: tokens of a row; 0: `config.seq_len`, of span corruption what rows of so many tokens
      become. Documents at a row's end that do not fit, as where many are short, are left out.
    z_loss: as of `causal_lm.CausalLM`.
    """

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, task="span_corruption",
                 corruption_rate=0.15, mean_span=3.0, sentinels=100, sentinel_id=-1, start_id=0, source_length=0,
                 target_length=0, z_loss=0.0):
        self.arch, self.encoder = Architecture(**config.model.to_dict()), config_lib.encoder(config)
        self.seq_len = config.seq_len
        choose(task, ("span_corruption", "pairs"), "config.objective_args.task")
        self.reads = "packed" if task == "span_corruption" else "examples"
        if not 0 < corruption_rate < 1 or not 1 <= mean_span < math.inf:
            raise UserError(f"config.objective_args: corruption_rate={corruption_rate} must be between 0 and 1, and "
                            f"mean_span={mean_span} at least 1")
        self.rate, self.mean_span, self.sentinels, self.z_loss = corruption_rate, mean_span, sentinels, z_loss
        longest = (self.seq_len, self.seq_len)
        if task == "span_corruption":   # with some room: what is rounded of each document adds up, and each has an end
            kept, taken = 1 - self.rate * (1 - 1 / mean_span), self.rate * (1 + 1 / mean_span)
            up = lambda tokens: min(math.ceil((tokens + 8) / 8) * 8, max(self.seq_len, 8))
            longest = up(kept * self.seq_len), up(1.1 * taken * self.seq_len)
        self.source_length, self.target_length = source_length or longest[0], target_length or longest[1]
        self._check_stacks(layout)
        self.tokenizer, self.vocabulary, self.eos_id = tokenizer, self.arch.vocab_size - sentinels, None
        self.start_id = start_id
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
            self.vocabulary, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
            if sentinel_id < 0:
                sentinel_id = tokenizer.specials.get("<extra_id_0>", tokenizer.vocab_size + sentinels - 1)
        self.sentinel_id = sentinel_id if sentinel_id >= 0 else self.arch.vocab_size - 1
        if not 0 <= start_id < self.arch.vocab_size:
            raise UserError(f"config.objective_args.start_id={start_id} is not in the vocabulary of "
                            f"{self.arch.vocab_size}")
        self.tokens_per_example = self.source_length + self.target_length
        self.flops_per_example = encoder_decoder_flops(self.encoder, self.arch, self.source_length,
                                                       self.target_length)
        self.module = EncoderDecoder(self.encoder, self.arch, layout)
        self.predict = {"hidden": self.hidden, "logits": self.logits, "encode": self.encode, "decode": self.decode}
        if config.data.train:
            self._check_tokenizer()

    def _check_tokenizer(self):
        """Raises UserError where no examples can be made: an imported model may be used all the same."""
        if self.tokenizer is not None and self.eos_id is None:
            raise UserError("this tokenizer has no end-of-text token, with which a target ends: name one in a "
                            "tokenizer_config.json beside it")
        if self.reads == "packed" and not self.sentinels - 1 <= self.sentinel_id < self.arch.vocab_size:
            raise UserError(f"no ids are left for objective_args.sentinels={self.sentinels}: the tokenizer has "
                            f"{self.tokenizer.vocab_size if self.tokenizer else 0}, the model {self.arch.vocab_size}; "
                            f"set --config.model.vocab_size={self.sentinel_id + 1} or more, or "
                            "config.objective_args.sentinels")

    def _check_stacks(self, layout):
        """Raises UserError where the two stacks do not go together, or not with the mesh."""
        arch, encoder = self.arch, self.encoder
        rules = [
            (encoder.embed_dim == arch.embed_dim and encoder.vocab_size == arch.vocab_size,
             f"encoder.embed_dim={encoder.embed_dim} and vocab_size={encoder.vocab_size} must be those of the model, "
             f"{arch.embed_dim} and {arch.vocab_size}: both share the table of tokens"),
            (arch.position != "learned" and (arch.position == "sinusoidal") == (encoder.position == "sinusoidal"),
             f"model.position={arch.position!r} and encoder.position={encoder.position!r}: take relative, rope or none, "
             "or sinusoidal for both"),
            (self.source_length <= encoder.max_seq_len and self.target_length <= arch.max_seq_len,
             f"sources of {self.source_length} and targets of {self.target_length} tokens exceed encoder.max_seq_len="
             f"{encoder.max_seq_len} or model.max_seq_len={arch.max_seq_len}"),
        ]
        check_stacks(arch, encoder, self.source_length, self.target_length, layout, rules)

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda length, dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, length), dtype)
        S, T = self.source_length, self.target_length
        return {"source_tokens": make(S), "source_positions": make(S), "source_segment_ids": make(S),
                "tokens": make(T), "targets": make(T), "positions": make(T), "segment_ids": make(T),
                "weights": make(T, jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns source_tokens, source_positions, source_segment_ids, int32 [n, source_length], and tokens, targets,
        positions, segment_ids, int32, and weights, float32, [n, target_length].

        Of span corruption a record is a packed row: `tokens` and `segment_ids`, int32 [n, seq_len + 1], of which the
        last is left out; of pairs a dict with `source` and `target`, texts, or None. A segment of the target is that
        of the same number in the source. Spans depend on a row's seed alone, so that those of held-out rows are the
        same at every validation.
        """
        self._check_tokenizer()
        if self.reads == "packed":
            return self._batch(*self._corrupted(records["tokens"][:, :-1], records["segment_ids"][:, :-1], seeds))
        return self._batch(*self._pairs(records))

    def _batch(self, source, target):
        (tokens, segments), (targets, of_target) = source, target
        positions = document_positions(of_target)
        inputs = np.full(targets.shape, self.start_id, np.int32)
        inputs[:, 1:] = np.where(positions[:, 1:] > 0, targets[:, :-1], self.start_id)
        return {"source_tokens": tokens, "source_positions": document_positions(segments),
                "source_segment_ids": segments, "tokens": inputs, "targets": targets, "positions": positions,
                "segment_ids": of_target, "weights": (of_target > 0).astype(np.float32)}

    def random_batch(self, n, rng):
        def draw(length):
            tokens = rng.integers(0, self.vocabulary, (n, length), dtype=np.int32)
            return tokens, np.ones_like(tokens)

        if self.reads == "packed":
            return self._batch(*self._corrupted(*draw(self.seq_len), rng.integers(0, 2 ** 63, n, dtype=np.uint64)))
        return self._batch(draw(self.source_length), draw(self.target_length))

    def init(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        unplaced = EncoderDecoder(self.encoder, self.arch)   # shardings come from the parameters' axes
        return unplaced.init(key, tokens, method=lambda m, t: m.logits(m(t, m.encode(t)[0])[0]))["params"]

    def loss(self, params, batch, key=None):
        keys = jax.random.split(key) if key is not None else (None, None)
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        segments, of_source = batch["segment_ids"], batch["source_segment_ids"]
        context, _ = apply(batch["source_tokens"], batch["source_positions"], of_source, key=keys[0], method="encode")
        hidden, _, _ = apply(batch["tokens"], context, batch["positions"], segments, of_source, key=keys[1])
        weight = batch["weights"]
        loss, (nll, _, correct) = apply(hidden, batch["targets"], weight, self.z_loss, method="loss_sum")
        total = weight.sum()
        return Loss(loss, total, {"nll": ((nll * weight).sum(), total), "accuracy": ((correct * weight).sum(), total)})

    # --- predict ----------------------------------------------------------------------------------------------------

    def hidden(self, params, tokens_BS, decoder_tokens_BT, segment_ids_BS=None, capture=()):
        """Returns (hidden states [B, T, D] of the decoder, taps). segment_ids: 0 where the source is padding."""
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        context, _ = apply(tokens_BS, None, segment_ids_BS, method="encode")
        hidden, _, taps = apply(decoder_tokens_BT, context, context_segment_ids_BS=segment_ids_BS, capture=capture)
        return hidden, taps

    def logits(self, params, tokens_BS, decoder_tokens_BT, segment_ids_BS=None):
        """Returns float32 logits [B, T, V] of what follows each of the decoder's tokens."""
        hidden, _ = self.hidden(params, tokens_BS, decoder_tokens_BT, segment_ids_BS)
        return self.module.apply({"params": params}, hidden, method="logits")

    def encode(self, params, tokens_BS, segment_ids_BS=None) -> Context:
        """Returns what a decoder's cache has of the sources: made once, whatever is decoded of them."""
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        hidden, _ = apply(tokens_BS, None, segment_ids_BS, method="encode")
        return apply(hidden, segment_ids_BS, method="context")

    def decode(self, params, tokens_BT, cache, last_B=None):
        """Returns (float32 logits [B, V] at place `last_B` of each row (default: its end), cache)."""
        hidden, cache, _ = self.module.apply({"params": params}, tokens_BT, cache=cache)
        last_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1] - 1) if last_B is None else last_B
        last = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)
        return self.module.apply({"params": params}, last, method="logits")[:, 0], cache

    # --- examples -----------------------------------------------------------------------------------------------------

    def _corrupted(self, tokens, segments, seeds):
        """Returns ((tokens, segments) of the sources, of the targets).

        In the source a sentinel stands for each span, a new one for each of a document; in the target the same
        sentinels stand before what they stand for, and an end behind it. A document's first token and its end stay.
        """
        n, L = tokens.shape
        flat, of = tokens.ravel(), segments.ravel()
        fresh = np.ones((n, L), bool)
        np.not_equal(segments[:, 1:], segments[:, :-1], out=fresh[:, 1:])
        start = np.flatnonzero(fresh)
        stop = np.append(start[1:], flat.size)
        end = self.start_id if self.eos_id is None else self.eos_id   # without a tokenizer, as of `random_batch`
        ended = (flat[stop - 1] == end) & (self.eos_id is not None)
        body = stop - start - ended
        real = (of[start] > 0) & (body > 1)
        start, body, ended = start[real], body[real], ended[real].astype(int)
        noise = np.clip(np.round(body * self.rate), 1, body - 1).astype(int)
        spans = np.clip(np.round(noise / self.mean_span), 1, np.minimum(np.minimum(noise, body - noise),
                                                                        self.sentinels)).astype(int)
        lengths = {"source": body - noise + spans + ended, "target": noise + spans + 1}
        row, room = start // L, {"source": self.source_length, "target": self.target_length}
        first = np.searchsorted(row, row)   # document of the row
        before, fits = {}, np.ones(len(row), bool)
        for side, each in lengths.items():
            total = np.cumsum(each)
            before[side] = total - each - (total - each)[first]
            fits &= before[side] + each <= room[side]
        start, body, ended, noise, spans, row = (x[fits] for x in (start, body, ended, noise, spans, row))
        at = {side: row * room[side] + before[side][fits] for side in room}

        # Token by token of these documents, and span by span.
        document, rank = _counted(body)
        draws = uniform(seeds, 2 * L).reshape(n, 2, L)
        place = start[document] + rank
        draw = lambda channel: draws[place // L, channel, place % L]
        kept = _cut(body - noise, spans, draw(0), rank < (body - noise)[document])
        taken = _cut(noise, spans, draw(1), rank < noise[document])
        of_span, number = _counted(spans)
        is_noise = np.repeat(np.tile([False, True], len(kept)), np.stack([kept, taken], 1).ravel())
        span = number[np.repeat(np.arange(len(kept)), kept + taken)]
        within = lambda each: each - each[_starts(body)][document]   # counts before the document taken off
        kept_rank, noise_rank = (within(np.cumsum(x) - x) for x in (~is_noise, is_noise))
        ahead = lambda each: np.cumsum(each) - np.append(0, np.cumsum(each))[_starts(spans)][of_span]
        marks = self.sentinel_id - number
        pieces = {
            "source": [((at["source"][document] + kept_rank + span)[~is_noise], flat[place[~is_noise]]),
                       (at["source"][of_span] + ahead(kept) + number, marks),
                       ((at["source"] + body - noise + spans)[ended > 0], end)],
            "target": [((at["target"][document] + noise_rank + span + 1)[is_noise], flat[place[is_noise]]),
                       (at["target"][of_span] + ahead(taken) - taken + number, marks),
                       (at["target"] + noise + spans, end)]}
        out = []
        for side in room:
            made, numbers = np.zeros((2, n * room[side]), np.int32)
            for where, what in pieces[side]:
                made[where] = what
            of_document, offset = _counted(lengths[side][fits])
            numbers[at[side][of_document] + offset] = of[start][of_document]
            out.append((made.reshape(n, -1), numbers.reshape(n, -1)))
        return out

    def _pairs(self, records):
        """Returns ((tokens, segments) of the sources, of the targets), each [n, length]."""
        out = []
        for field, length in (("source", self.source_length), ("target", self.target_length)):
            texts = [_text(record, field) for record in records]
            made, segments = np.zeros((2, len(records), length), np.int32)
            for i, ids in enumerate(self.tokenizer.encode_batch([text or "" for text in texts])):
                if texts[i] is not None:
                    ids = np.append(ids[: length - 1], self.eos_id)
                    made[i, : len(ids)], segments[i, : len(ids)] = ids, 1
            out.append((made, segments))
        return out


def _text(record, field):
    """Returns the text of a record's field; None of no record."""
    if record is None:
        return None
    if not isinstance(record.get(field), str):
        raise UserError(f"{getattr(record, 'place', 'a record')}: no text {field!r} (fields here: {', '.join(record)}); "
                        "objective_args.task='pairs' reads {\"source\": text, \"target\": text}")
    return record[field]


def _starts(lengths):
    """Returns where each of some runs begins, laid one after the other."""
    return np.cumsum(lengths) - lengths


def _counted(lengths):
    """Returns (number of its run, number in its run) of each element of runs of these lengths."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - _starts(lengths)[run]


def _cut(totals, parts, draws, chosen):
    """Returns the lengths, at least 1, of the parts into which each total is cut, all cuts as likely: int [sum parts].

    draws: in [0, 1), those that are `chosen` belong to the totals' elements.
    """
    run, rank = _counted(totals)
    draws = np.where(rank == 0, -1.0, draws[chosen])   # a part begins with the first, and where the lowest were drawn
    order = np.lexsort((draws, run))
    begins = np.zeros(len(run), bool)
    begins[order[_counted(totals)[1] < parts[run]]] = True
    return np.diff(np.append(np.flatnonzero(begins), len(run)))

"""Tokens one after another: prefill, steps over a batch of slots, sampling. Pure functions, no I/O. Layer 3.

`complete` answers a list of prompts. What a server needs is below them: `prefill` reads prompts of one
length bucket, `begin` draws their first tokens, `insert` puts such a row into a slot of a running batch, `steps` adds
tokens to all slots that are in use. What a row samples depends on its own seed and place alone, never on its slot or
on the other rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import distributed, tree
from fm_jax.errors import UserError
from fm_jax.model import Cache, unstack

SMALLEST_BUCKET = 16   # prompts and caches are padded to powers of two from here: few compiled shapes


# --- sampling -----------------------------------------------------------------------------------------------------

class Sampling(NamedTuple):
    """How the next token is drawn from its logits: each a number, or an array [B] with one a row."""

    temperature: float = 0.0   # 0: the most likely token
    top_k: int = 0             # only the k most likely tokens; 0: all
    top_p: float = 1.0         # only the most likely tokens that together reach this probability
    vocab_size: int = 0        # only ids below it, where the tokenizer has fewer than the model; 0: all
    min_p: float = 0.0         # only tokens at least this share as likely as the most likely
    repetition_penalty: float = 1.0   # divides positive logits of tokens that the row has, multiplies negative ones

    def check(self) -> None:
        """Returns nothing. Raises UserError for a value that is outside what it can mean."""
        finite = lambda x: x < float("inf")
        for name, rule, text in (("temperature", lambda x: (x >= 0) & finite(x), "a number of at least 0"),
                                 ("top_k", lambda x: x >= 0, "at least 0 (0: all tokens)"),
                                 ("top_p", lambda x: (x > 0) & (x <= 1), "above 0 and at most 1 (1: all tokens)"),
                                 ("min_p", lambda x: (x >= 0) & (x <= 1), "from 0 (all tokens) to 1"),
                                 ("repetition_penalty", lambda x: (x > 0) & finite(x), "a number above 0 (1: none)")):
            for value in np.ravel(getattr(self, name)).tolist():
                if not rule(value):
                    raise UserError(f"{name}={value} must be {text}")

    def rows(self, batch: int) -> "Sampling":
        """Returns the same with an array [batch] in each field."""
        kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.float32, jnp.float32)
        return Sampling(*(jnp.broadcast_to(jnp.asarray(x, kind), (batch,)) for x, kind in zip(self, kinds)))


def filtered(logits_BV, sampling: Sampling, seen_BV=None):
    """Returns float32 logits [B, V] of the distribution that `sampling` draws from; -inf for what it never draws.

    In this order, which is that of transformers: repetition_penalty, temperature, top_k, top_p, min_p. Tokens that
    tie with the last one kept are kept. seen_BV: True for the tokens of the row, its prompt's too; None: no penalty.

    Source: top_p arXiv:1904.09751, min_p arXiv:2407.01082, repetition_penalty arXiv:1909.05858, section 4.1.
    """
    sampling = sampling.rows(len(logits_BV))
    return _filtered(_allowed(logits_BV, sampling, seen_BV), sampling)


def sample(logits_BV, seeds_B, positions_B, sampling: Sampling, seen_BV=None):
    """Returns the next token of each row, int32 [B], from `filtered`.

    seeds_B: uint32, a row's own; positions_B: int32, the place of the token that is drawn. Both make its key.
    """
    sampling = sampling.rows(len(logits_BV))
    logits_BV = _allowed(logits_BV, sampling, seen_BV)
    likeliest_B = logits_BV.argmax(-1).astype(jnp.int32)
    draw = lambda: _categorical(_filtered(logits_BV, sampling), seeds_B, positions_B)
    # A batch that draws nothing skips the noise and the sort; one compiled program serves every mixture of settings.
    drawn_B = jax.lax.cond((sampling.temperature > 0).any(), draw, lambda: likeliest_B)
    return jnp.where(sampling.temperature > 0, drawn_B, likeliest_B)


def _allowed(logits_BV, sampling, seen_BV):
    """Returns the logits with the repetition penalty, and -inf for ids that the tokenizer lacks."""
    if seen_BV is not None:
        penalty_B1 = sampling.repetition_penalty[:, None]
        logits_BV = jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1),
                              logits_BV)
    V = logits_BV.shape[-1]
    size_B = jnp.where(sampling.vocab_size > 0, sampling.vocab_size, V)
    return jnp.where(jnp.arange(V) < size_B[:, None], logits_BV, -jnp.inf)


def _filtered(logits_BV, sampling):
    hot_B = sampling.temperature > 0
    # From the top down, so that a tiny temperature gives -inf and not inf.
    logits_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / jnp.where(hot_B, sampling.temperature, 1.0)[:, None]
    cut_B = hot_B & ((sampling.top_k > 0) | (sampling.top_p < 1))
    least_B = jax.lax.cond(cut_B.any(), _least_kept, lambda *_: jnp.full(hot_B.shape, -jnp.inf), logits_BV, sampling)
    least_B = jnp.maximum(least_B, jnp.log(sampling.min_p))   # the likeliest is at 0, whatever was cut
    logits_BV = jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)
    only = jax.nn.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1], dtype=bool)
    return jnp.where(hot_B[:, None] | only, logits_BV, -jnp.inf)


def _least_kept(logits_BV, sampling):
    """Returns float32 [B]: the lowest logit that top_k and then top_p keep."""
    V = logits_BV.shape[-1]
    ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    k_B = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kth_B = jnp.take_along_axis(ordered_BV, k_B[:, None] - 1, axis=-1)[:, 0]
    ordered_BV = jnp.where(ordered_BV < kth_B[:, None], -jnp.inf, ordered_BV)
    probs_BV = jax.nn.softmax(ordered_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV   # of all that are likelier; the likeliest always stays
    least_B = jnp.where(before_BV < sampling.top_p[:, None], ordered_BV, jnp.inf).min(-1)
    return jnp.where(sampling.top_p < 1, jnp.maximum(least_B, kth_B), kth_B)


def _categorical(logits_BV, seeds_B, positions_B, purpose: int | None = None):
    """Returns int32 [B]: a draw of each row from its logits. purpose: tells apart several draws for one place."""
    draw = lambda logits, seed, position: jax.random.categorical(_key(seed, position, purpose), logits)
    return jax.vmap(draw)(logits_BV, seeds_B, positions_B).astype(jnp.int32)


def _key(seed, position, purpose=None):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return key if purpose is None else jax.random.fold_in(key, purpose)


# --- a batch of rows, step by step ------------------------------------------------------------------------------------

class Slots(NamedTuple):
    """A batch of rows that are being continued. A server's requests come into its slots and leave them."""

    token_B: jax.Array       # int32, the newest, not yet in the cache
    cache: Cache
    left_B: jax.Array        # int32, tokens still to add; 0: the row has ended, or the slot is free
    seeds_B: jax.Array       # uint32
    sampling: Sampling       # arrays [B]
    stop_ids_BS: jax.Array   # int32, tokens that end the row; -1: none
    seen_BV: jax.Array | None = None   # tokens that the row has, for the repetition penalty; None: nobody asked for one

    @classmethod
    def empty(cls, arch, batch: int, max_length: int, stop_ids: int = 4, slack: int = 0) -> "Slots":
        """Returns free slots for sequences of `max_length` tokens with up to `stop_ids` stop tokens each."""
        zeros = lambda dtype: jnp.zeros(batch, dtype)
        sampling = jax.tree.map(jnp.array, Sampling().rows(batch))
        return cls(zeros(jnp.int32), Cache.empty(arch, batch, max_length, slack), zeros(jnp.int32), zeros(jnp.uint32),
                   sampling, jnp.full((batch, stop_ids), -1, jnp.int32), jnp.zeros((batch, arch.vocab_size), bool))


class Drawn(NamedTuple):
    """What some steps added: arrays [steps, B]. Log-probabilities are the model's own, before any of `Sampling`."""

    token: Any                # int32
    real: Any                 # False where the row had ended before; a stop token is real
    logprob: Any = None       # float32, natural; None: not asked for
    top_ids: Any = None       # int32 [steps, B, n], the n likeliest, in order
    top_logprobs: Any = None  # float32 [steps, B, n]


@functools.partial(jax.jit, static_argnames="decode", donate_argnames="cache")
def prefill(decode, params, tokens_BT, cache: Cache, lengths_B):
    """Returns (float32 logits [B, V] of what follows, cache) after prompts, right-padded to T, `lengths_B` long.

    `decode`: the objective's `predict["decode"]`.
    """
    return decode(params, tokens_BT, cache._replace(count_B=lengths_B), lengths_B - 1)


@functools.partial(jax.jit, static_argnames="logprobs", donate_argnames="slots")
def begin(slots: Slots, logits_BV, logprobs: int | None = None):
    """Returns (slots, Drawn) with the first token of each row, from the logits that `prefill` gave."""
    slots, drawn = _draw(slots, logits_BV, logprobs)
    return slots, jax.tree.map(lambda x: x[None], drawn)


@functools.partial(jax.jit, static_argnames=("decode", "k", "logprobs"), donate_argnames="slots")
def steps(decode, params, slots: Slots, k: int = 1, logprobs: int | None = None):
    """Returns (slots, Drawn) after k steps in one dispatch; a row that ends on the way stays as it is.

    logprobs: None, or how many of the likeliest tokens to give beside the one drawn.
    """
    def one(slots, _):
        cache = slots.cache._replace(count_B=(slots.left_B > 0).astype(jnp.int32))
        logits, cache = decode(params, slots.token_B[:, None], cache)
        return _draw(slots._replace(cache=cache), logits, logprobs)

    if k > 1:
        return jax.lax.scan(one, slots, length=k)
    slots, drawn = one(slots, None)   # a loop of one costs XLA:CPU its fast form of a matrix times a vector
    return slots, jax.tree.map(lambda x: x[None], drawn)


@functools.partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, slot, row: Slots, index=0) -> Slots:
    """Returns the slots with row `index` of another batch in place `slot`.

    The row's cache may be shorter, not longer: that of its prompt's bucket. Its slack is the same.
    """
    def put(whole, part):
        part = jax.lax.dynamic_index_in_dim(part, index, keepdims=True)
        return jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), (slot,) + (0,) * (whole.ndim - 1))
    return jax.tree.map(put, slots, row)


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, ended_B) -> Slots:
    """Returns the slots with those rows ended: cancelled, or stopped by what only the host can see."""
    return slots._replace(left_B=jnp.where(ended_B, 0, slots.left_B))


def _draw(slots: Slots, logits_BV, logprobs):
    """Returns (slots, Drawn [B]) with a token drawn for every row that goes on."""
    token_B = sample(logits_BV, slots.seeds_B, slots.cache.length_B, slots.sampling, slots.seen_BV)
    return _took(slots, token_B, slots.left_B > 0, logits_BV, logprobs)


def _took(slots: Slots, token_B, real_B, logits_BV, logprobs):
    """Returns (slots, Drawn [B]) with the token added to the rows where it is real."""
    token_B = jnp.where(real_B, token_B, slots.token_B)
    ended_B = (token_B[:, None] == slots.stop_ids_BS).any(-1)
    left_B = jnp.where(real_B, jnp.where(ended_B, 0, slots.left_B - 1), slots.left_B)
    return (slots._replace(token_B=token_B, left_B=left_B, seen_BV=_see(slots.seen_BV, token_B, real_B)),
            Drawn(token_B, real_B, *token_logprobs(logits_BV, token_B, slots.sampling.vocab_size, logprobs)))


def _see(seen_BV, token_B, real_B):
    if seen_BV is None:
        return None
    rows = jnp.arange(len(token_B))
    return seen_BV.at[rows, token_B].set(seen_BV[rows, token_B] | real_B)


def token_logprobs(logits_BV, token_B, vocab_size_B, n):
    """Returns (logprob [B], top_ids [B, n], top_logprobs [B, n]); nothing where n is None."""
    if n is None:
        return ()
    lse_B = jax.nn.logsumexp(logits_BV, axis=-1)
    V = logits_BV.shape[-1]
    known = jnp.arange(V) < jnp.where(vocab_size_B > 0, vocab_size_B, V)[:, None]
    top, ids = jax.lax.top_k(jnp.where(known, logits_BV, -jnp.inf), min(n, V))
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - lse_B, ids.astype(jnp.int32), top - lse_B[:, None]


# --- speculative decoding -----------------------------------------------------------------------------------------

# What a key at one place is used for; `_categorical` without a purpose is plain sampling.
PROPOSE, ACCEPT, CORRECT = range(3)


@functools.partial(jax.jit, static_argnames=("objectives", "k", "logprobs"), donate_argnames=("slots", "draft_cache"))
def speculate(objectives, params, draft_params, slots: Slots, draft_cache: Cache, k: int, logprobs: int | None = None):
    """Returns (slots, draft_cache, Drawn): 1 to k + 1 tokens a row, from one pass of the model over k proposals.

    The tokens are distributed as those of `steps`; greedy ones are the same. Both caches need a slack of k.

    objectives: (the model's, the draft's); the draft has the same vocabulary.

    Source: arXiv:2211.17192, algorithm 1, with both distributions as `sampling` filters them.
    """
    module, draft = (objective.module for objective in objectives)
    start_B, going_B = slots.cache.length_B, slots.left_B > 0
    batch, places_TB = jnp.arange(len(start_B)), start_B + 1 + jnp.arange(k + 1)[:, None]

    def propose(state, place_B):
        token_B, cache, seen_BV = state
        cache = cache._replace(count_B=going_B.astype(jnp.int32))
        logits_BTV, cache = _every_logit(draft, draft_params, token_B[:, None], cache)
        logits_BV = filtered(logits_BTV[:, 0], slots.sampling, seen_BV)
        token_B = _categorical(logits_BV, slots.seeds_B, place_B, PROPOSE)
        return (token_B, cache, _see(seen_BV, token_B, going_B)), (token_B, jax.nn.softmax(logits_BV), seen_BV)

    # The last proposal is not used: that step puts the one before it into the draft's cache.
    (_, draft_cache, _), (proposed_TB, q_TBV, seen_TBV) = jax.lax.scan(
        propose, (slots.token_B, draft_cache, slots.seen_BV), places_TB)
    tokens_TB = jnp.concatenate([slots.token_B[None], proposed_TB[:k]])
    cache = slots.cache._replace(count_B=jnp.where(going_B, k + 1, 0))
    logits_BTV, cache = _every_logit(module, params, tokens_TB.T, cache)
    logits_TBV = logits_BTV.swapaxes(0, 1)
    # The settings are those of the rows, whatever the place: one call over all, so that the sort is tested for once.
    flat = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
    of_places = jax.tree.map(lambda x: jnp.tile(x, k + 1), slots.sampling)
    p_TBV = jax.nn.softmax(filtered(flat(logits_TBV), of_places, flat(seen_TBV))).reshape(q_TBV.shape)

    at = lambda x_TBV: jnp.take_along_axis(x_TBV, proposed_TB[..., None], axis=-1)[..., 0]
    u_TB = jax.vmap(lambda place_B: jax.vmap(lambda *id: jax.random.uniform(_key(*id, ACCEPT)))(
        slots.seeds_B, place_B))(places_TB)
    accepted_TB = (u_TB * at(q_TBV) < at(p_TBV))[:k]
    agreed_B = jnp.cumprod(accepted_TB, axis=0, dtype=jnp.int32).sum(0)
    # Where the first was turned down, what the model has more of than the draft; behind the last, all it has.
    p_BV = p_TBV[agreed_B, batch]
    more_BV = jnp.maximum(p_BV - jnp.where((agreed_B < k)[:, None], q_TBV[agreed_B, batch], 0), 0)
    more_BV = jnp.where(more_BV.sum(-1, keepdims=True) > 0, more_BV, p_BV)   # equal but for rounding
    own_B = _categorical(jnp.log(more_BV), slots.seeds_B, places_TB[agreed_B, batch], CORRECT)

    def add(state, each):
        t, proposal_B, logits_BV = each
        slots, made_B = state
        real_B = (slots.left_B > 0) & (t <= agreed_B)
        token_B = jnp.where(t < agreed_B, proposal_B, own_B)
        slots, drawn = _took(slots, token_B, real_B, logits_BV, logprobs)
        return (slots, made_B + real_B), drawn

    (slots, made_B), drawn = jax.lax.scan(add, (slots, jnp.zeros_like(start_B)),
                                          (jnp.arange(k + 1), proposed_TB, logits_TBV))
    length_B = start_B + made_B
    return slots._replace(cache=cache._replace(length_B=length_B)), draft_cache._replace(length_B=length_B), drawn


def _every_logit(module, params, tokens_BT, cache):
    """Returns (float32 logits [B, T, V], cache)."""
    hidden, cache, _ = module.apply({"params": params}, tokens_BT, cache=cache)
    return module.apply({"params": params}, hidden, method="logits"), cache


# --- lists of prompts -------------------------------------------------------------------------------------------------

class Completion(NamedTuple):
    """The continuation of one prompt."""

    tokens: np.ndarray              # int32 [T], without the stop token that ended it
    finish: str                     # "stop": by a stop token or by `stopped`; "length": max_new_tokens
    logprobs: np.ndarray | None     # float32 [T], of the tokens; None: not asked for
    top_ids: np.ndarray | None      # int32 [T, n]
    top_logprobs: np.ndarray | None # float32 [T, n]


def complete(objective, params, prompts: list[np.ndarray], *, max_new_tokens: int, sampling: Sampling = Sampling(),
             context=None, seeds=None, stop_ids=(), n: int = 1, logprobs: int | None = None, stopped=None,
             steps_per_dispatch: int = 1, draft=None) -> list[Completion]:
    """Returns n continuations of each prompt: those of prompt i are at n * i to n * i + n - 1.

    prompts: token ids, at least one each; a prompt longer than the context allows is cut at its left.
    sampling: the same for all, or with arrays [prompts].
    context: of a decoder with an encoder, what the objective's `predict["encode"]` made of each prompt's source; it is
      used up.
    seeds: uint32, one a continuation; default 0, 1, 2, ...
    logprobs: give the log-probability of each token, and of so many of the likeliest in its place.
    stopped: a function of (number of the continuation, its tokens): whether they end it, as when their text has a
      stop string (`find_stop`). Once true it must stay true as tokens are added. The token that made it true stays.
    steps_per_dispatch: tokens between two looks of the host; the result is the same.
    draft: (objective, params) of a smaller model that proposes steps_per_dispatch tokens at a time; `speculate`.

    Raises:
      UserError: an empty prompt, a max_new_tokens that leaves no place for one, `Sampling.check`, or a draft of
        another vocabulary or a shorter context.
    """
    sampling.check()
    arch = objective.arch
    if draft is not None:
        for name, ok in (("vocab_size", draft[0].arch.vocab_size == arch.vocab_size),
                         ("max_seq_len", draft[0].arch.max_seq_len >= arch.max_seq_len)):
            if not ok:
                raise UserError(f"the draft model has {name}={getattr(draft[0].arch, name)}, the model "
                                f"{getattr(arch, name)}; take a draft with the same tokenizer and context")
    prompts = _cut(prompts, arch, max_new_tokens)
    if not prompts:
        return []
    rows = len(prompts) * n
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = _padded(prompts, min(_bucket(lengths.max()), arch.max_seq_len))
    length = min(_bucket(max(tokens.shape[1], lengths.max() + max_new_tokens)), arch.max_seq_len)
    slack = steps_per_dispatch if draft else 0
    empty = lambda arch: Cache.empty(arch, len(prompts), length, slack)._replace(context=context)
    read = lambda objective, params: prefill(objective.predict["decode"], params, tokens, empty(objective.arch), lengths)
    logits, cache = read(objective, params)
    sampling = sampling.rows(len(prompts))
    seen = None
    if (np.asarray(sampling.repetition_penalty) != 1).any():
        seen = np.zeros((len(prompts), arch.vocab_size), bool)
        for row, prompt in zip(seen, prompts):
            row[prompt] = True
    if n > 1:
        logits, cache, sampling, seen = _repeated((logits, cache, sampling, seen), n)
    stop_ids = np.unique(np.asarray(stop_ids, np.int32))
    slots = Slots(jnp.zeros(rows, jnp.int32), cache, jnp.full(rows, max_new_tokens, jnp.int32),
                  jnp.asarray(np.arange(rows) if seeds is None else seeds, jnp.uint32), sampling,
                  jnp.asarray(np.broadcast_to(stop_ids if len(stop_ids) else [-1], (rows, max(len(stop_ids), 1)))),
                  None if seen is None else jnp.asarray(seen))
    draft_cache = _repeated(read(*draft)[1], n) if draft else None
    slots, drawn = begin(slots, logits, logprobs)
    made, finish, parts = [[] for _ in range(rows)], [""] * rows, []
    while True:
        parts.append(distributed.fetch(drawn))
        for i in [i for i, how in enumerate(finish) if not how]:
            new = parts[-1].token[parts[-1].real[:, i], i]
            if _extend(made[i], new, stop_ids, stopped and functools.partial(stopped, i)):
                finish[i] = "stop"
            elif len(made[i]) == max_new_tokens:
                finish[i] = "length"
        if all(finish):
            break
        if stopped:
            slots = release(slots, np.array([bool(how) for how in finish]))
        if draft:
            slots, draft_cache, drawn = speculate((objective, draft[0]), params, draft[1], slots, draft_cache,
                                                  k=steps_per_dispatch, logprobs=logprobs)
        else:
            slots, drawn = steps(objective.predict["decode"], params, slots, k=steps_per_dispatch, logprobs=logprobs)
    drawn = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    of_row = lambda x, i: None if x is None else x[drawn.real[:, i], i][: len(made[i])]
    return [Completion(np.array(row, np.int32), how, *(of_row(x, i) for x in drawn[2:]))
            for i, (row, how) in enumerate(zip(made, finish))]


def find_stop(text: str, stop_strings) -> tuple[int, bool]:
    """Returns (how much of `text` is sure to stay, whether a stop string ends it there): the earliest one counts.

    What may be the start of a stop string that more text will complete is not sure yet: a stream holds it back.
    """
    found = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    if found:
        return min(found), True
    held = max((k for stop in stop_strings for k in range(1, len(stop)) if text.endswith(stop[:k])), default=0)
    return len(text) - held, False


def per_layer(params, other=None):
    """Returns the parameters with each layer in arrays of its own, as a decode step reads them fastest.

    Cut out of the stacked array inside the step, every layer would be copied for every token. other: (parameters, what
    this made of them): what is the same array there is not made twice.
    """
    def layers(stack, name, part):
        if other is None:
            return _unstacked(part)
        old, made = tree.flatten(other[0][stack][name]), [tree.flatten(layer) for layer in other[1][stack][name]]
        new = {n: p for n, p in tree.flatten(part).items() if p is not old.get(n)}
        apart = _unstacked(new) if new else ({},) * len(made)
        return tuple(tree.nest(before | after) for before, after in zip(made, apart))

    return {stack: {name: layers(stack, name, part) if name in ("first_layers", "layers") else part
                    for name, part in parts.items()} for stack, parts in params.items()}


@jax.jit
def _unstacked(layers):
    return unstack(layers, len(jax.tree.leaves(layers)[0]))


def _cut(prompts, arch, max_new_tokens):
    """Returns the prompts, int32, cut at their left to leave room for the new tokens."""
    room = arch.max_seq_len - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be from 1 to {arch.max_seq_len - 1}, the context of "
                        f"{arch.max_seq_len} tokens less one of prompt")
    if any(len(p) == 0 for p in prompts):
        raise UserError("an empty prompt: give at least one token, such as the tokenizer's beginning-of-text")
    return [np.asarray(p, np.int32)[-room:] for p in prompts]


def _padded(prompts, length):
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    return tokens


def _bucket(length) -> int:
    return max(SMALLEST_BUCKET, 1 << int(length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=1)
def _repeated(arrays, n):
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), arrays)


def _extend(row, new, stop_ids, stopped) -> bool:
    """Returns whether the row ends; adds the `new` tokens to it, up to where it ends.

    That is the same place whatever the number of tokens a dispatch: the fewest that `stopped` is true of.
    """
    before, at = len(row), np.flatnonzero(np.isin(new, stop_ids))
    row.extend(new[: at[0] if len(at) else None].tolist())
    if stopped is not None and len(row) > before and stopped(row):
        del row[next(j for j in range(before + 1, len(row) + 1) if stopped(row[:j])) :]
        return True
    return len(at) > 0


# --- beam search ------------------------------------------------------------------------------------------------------

class Beam(NamedTuple):
    """One continuation that beam search found."""

    tokens: np.ndarray   # int32 [T], without the stop token that ended it
    score: float         # sum of log-probabilities / number of tokens (the stop token too) ** length_penalty


def beam_search(objective, params, prompts: list[np.ndarray], *, max_new_tokens: int, num_beams: int,
                length_penalty: float = 1.0, stop_ids=(), vocab_size: int = 0, context=None,
                change=None) -> list[list[Beam]]:
    """Returns the best continuations of each prompt, num_beams at most, best first.

    A prompt is done when no unfinished beam, at its present length, has a better score than the worst of num_beams
    finished ones. length_penalty: above 0 favours long continuations, below 0 short ones. vocab_size as in `Sampling`,
    context as in `complete`.
    change: before each token, a function of (logits, float32 [beams, V], the tokens of each so far) on the host, which
      returns the logits that count, such as -inf for what may not follow.

    Source: as `generate(num_beams=..., early_stopping=False)` of transformers, with one list of finished beams.

    Raises:
      UserError: as `complete`, or num_beams below 1.
    """
    arch, W = objective.arch, num_beams
    if W < 1:
        raise UserError(f"num_beams={W} must be at least 1")
    prompts = _cut(prompts, arch, max_new_tokens)
    if not prompts:
        return []
    stop_ids = {int(i) for i in stop_ids}
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = _padded(prompts, min(_bucket(lengths.max()), arch.max_seq_len))
    cache = Cache.empty(arch, len(prompts), min(_bucket(max(tokens.shape[1], lengths.max() + max_new_tokens)),
                                                arch.max_seq_len))._replace(context=context)
    decode = objective.predict["decode"]
    logits, cache = _repeated(prefill(decode, params, tokens, cache, lengths), W)
    running = [[((), 0.0)] + [((), -np.inf)] * (W - 1) for _ in prompts]   # (tokens, sum of log-probabilities)
    finished, done = [[] for _ in prompts], np.zeros(len(prompts), bool)
    parents = np.zeros((len(prompts), W), np.int32)   # of a prompt that is done, any
    for made in range(1, max_new_tokens + 1):
        sums = np.array([[total for _, total in beams] for beams in running], np.float32)
        if change is not None:
            logits = change(np.array(distributed.fetch(logits)), [ids for beams in running for ids, _ in beams])
        # One beam ends in each of the stop tokens at most: these leave num_beams that go on.
        best = distributed.fetch(_candidates(logits, sums, (len(stop_ids) + 1) * W, vocab_size))
        for i in np.flatnonzero(~done):
            beams = []
            for rank, (total, parent, token) in enumerate(zip(*(x[i].tolist() for x in best))):
                ids = running[i][parent][0] + (token,)
                if token in stop_ids or made == max_new_tokens:
                    if rank < W and total > -np.inf:
                        kept = np.array(ids[:-1] if token in stop_ids else ids, np.int32)
                        finished[i].append(Beam(kept, total / made ** length_penalty))
                elif len(beams) < W:
                    beams.append((ids, total, parent))
            finished[i] = sorted(finished[i], key=lambda beam: -beam.score)[:W]
            worst = finished[i][-1].score if len(finished[i]) == W else -np.inf
            done[i] = not beams or beams[0][1] / made ** length_penalty <= worst
            if not done[i]:
                running[i], parents[i] = [beam[:2] for beam in beams], [parent for *_, parent in beams]
        if done.all():
            return finished
        token = np.array([ids[-1] if ids else 0 for beams in running for ids, _ in beams], np.int32)
        logits, cache = _advance(decode, params, token, cache, (parents + W * np.arange(len(prompts))[:, None]).ravel())


@functools.partial(jax.jit, static_argnums=2)
def _candidates(logits_BV, sums_PW, keep: int, vocab_size):
    """Returns (sum of log-probabilities, parent beam, token), each [P, keep], of the best ways to go on."""
    P, W = sums_PW.shape
    V = logits_BV.shape[-1]
    known = jnp.arange(V) < jnp.where(vocab_size > 0, vocab_size, V)
    totals = jnp.where(known, jax.nn.log_softmax(logits_BV), -jnp.inf).reshape(P, W, V) + sums_PW[..., None]
    best, at = jax.lax.top_k(totals.reshape(P, W * V), min(keep, W * V))
    return best, at // V, at % V


@functools.partial(jax.jit, static_argnums=0)
def _advance(decode, params, token_B, cache: Cache, parents_B):
    """Returns (logits, cache) after appending `token_B` to the rows `parents_B` of the cache."""
    own = jax.tree.map(lambda x: x[parents_B], cache._replace(context=None))   # a row's parents have its source
    return decode(params, token_B[:, None], own._replace(context=cache.context))

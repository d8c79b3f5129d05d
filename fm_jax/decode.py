"""Tokens one after another: prefill, decode step, sampling. Pure functions, no text, no I/O. Layer 3.

What a row samples depends on its own seed and place alone, never on the other rows of the batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.errors import UserError
from fm_jax.model import Cache, unstack

SMALLEST_BUCKET = 16   # prompts and caches are padded to powers of two from here: few compiled shapes


class Sampling(NamedTuple):
    """How the next token is drawn from its logits."""

    temperature: float = 0.0   # 0: the most likely token
    top_k: int = 0             # only the k most likely tokens; 0: all
    top_p: float = 1.0         # only the most likely tokens that together reach this probability
    vocab_size: int = 0        # only ids below it, where the tokenizer has fewer than the model; 0: all

    def check(self) -> None:
        """Returns nothing. Raises UserError for a value that is outside what it can mean."""
        for name, ok, rule in (("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
                               ("top_k", self.top_k >= 0, "at least 0 (0: all tokens)"),
                               ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1: all tokens)")):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)} must be {rule}")


def sample(logits_BV, seeds_B, positions_B, sampling: Sampling):
    """Returns the next token of each row, int32 [B]. top_k cuts first, then temperature, then top_p.

    seeds_B: uint32, a row's own; positions_B: int32, the place of the token that is drawn. Both make its key.
    """
    logits_BV = logits_BV[:, : sampling.vocab_size or None]
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    if sampling.top_k:
        kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs           # of all that are likelier; the likeliest always stays
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    draw = lambda logits, seed, position: jax.random.categorical(
        jax.random.fold_in(jax.random.key(seed), position), logits)
    return jax.vmap(draw)(logits_BV, seeds_B, positions_B).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=3)
def prefill(decode, params, tokens_BT, cache: Cache, lengths_B, sampling: Sampling, seeds_B):
    """Returns (next token [B], cache) after prompts that are right-padded to T and really `lengths_B` long.

    `decode`: the objective's `predict["decode"]`. What padding wrote lies behind each row's length: never seen, and
    overwritten as the row grows.
    """
    logits, cache = decode(params, tokens_BT, cache, lengths_B - 1)
    return sample(logits, seeds_B, lengths_B, sampling), cache._replace(length_B=lengths_B)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=3)
def step(decode, params, token_B, cache: Cache, sampling: Sampling, seeds_B):
    """Returns (next token [B], cache) after appending `token_B` to every row."""
    logits, cache = decode(params, token_B[:, None], cache)
    return sample(logits, seeds_B, cache.length_B, sampling), cache


def generate(objective, params, prompts: list[np.ndarray], *, max_new_tokens: int, sampling: Sampling = Sampling(),
             seeds=None, stop_ids=()) -> list[np.ndarray]:
    """Returns the new tokens of each prompt, int32 [<= max_new_tokens], without the stop token that ended it.

    prompts: token ids, at least one each; a prompt longer than the context allows is cut at its left.
    seeds: uint32, one a prompt; default 0, 1, 2, ...

    Raises:
      UserError: an empty prompt, a max_new_tokens that leaves no place for one, or `Sampling.check`.
    """
    sampling.check()
    arch = objective.arch
    room = arch.max_seq_len - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be from 1 to {arch.max_seq_len - 1}, the context of "
                        f"{arch.max_seq_len} tokens less one of prompt")
    if not prompts:
        return []
    if any(len(p) == 0 for p in prompts):
        raise UserError("an empty prompt: give at least one token, such as the tokenizer's beginning-of-text")
    prompts = [np.asarray(p, np.int32)[-room:] for p in prompts]
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(_bucket(lengths.max()), arch.max_seq_len)), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    cache = Cache.empty(arch, len(prompts), min(_bucket(max(tokens.shape[1], lengths.max() + max_new_tokens)),
                                                arch.max_seq_len))
    seeds = jnp.asarray(np.arange(len(prompts)) if seeds is None else seeds, jnp.uint32)
    decode = objective.predict["decode"]
    token, cache = prefill(decode, params, tokens, cache, lengths, sampling, seeds)
    made, ended = [], np.zeros(len(prompts), bool)
    while True:
        made.append(np.asarray(token))
        ended |= np.isin(made[-1], stop_ids)
        if ended.all() or len(made) == max_new_tokens:
            break
        token, cache = step(decode, params, token, cache, sampling, seeds)
    rows = np.stack(made, axis=1)
    ends = [np.flatnonzero(np.isin(row, stop_ids)) for row in rows]
    return [row[: end[0]] if len(end) else row for row, end in zip(rows, ends)]


def per_layer(params):
    """Returns the parameters with each layer in arrays of its own, as a decode step reads them fastest.

    Cut out of the stacked array inside the step, every layer would be copied for every token.
    """
    cut = jax.jit(lambda layers: unstack(layers, len(jax.tree.leaves(layers)[0])))
    layers = params["transformer"]["layers"]
    return {**params, "transformer": {**params["transformer"], "layers": cut(layers)}}


def _bucket(length) -> int:
    return max(SMALLEST_BUCKET, 1 << int(length - 1).bit_length())

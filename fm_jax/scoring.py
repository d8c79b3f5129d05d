"""Log-probabilities of text under a causal model: (context, continuation) pairs, and whole texts. Layer 3.

Tokenising, truncation and windows follow lm-evaluation-harness 0.4.13, so that its numbers and ours agree.
"""

from typing import NamedTuple

import jax
import numpy as np

from fm_jax.data.prepared import document_ends
from fm_jax.errors import UserError


class Score(NamedTuple):
    logprob: float      # natural, of all continuation tokens together
    is_greedy: bool     # every one of them was the most likely token
    num_tokens: int


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Returns (context ids, continuation ids) of a pair.

    Spaces at the end of the context move to the continuation; the two are tokenised as one string and cut where
    the context's own tokens end. A context without tokens becomes the beginning-of-text token, unless the
    continuation begins with it.
    """
    if not continuation:
        raise UserError("an empty continuation has no probability; give at least one character")
    kept = context.rstrip()
    if context and not kept:
        raise UserError(f"the context {context!r} is only white space; leave it empty or give it a word")
    whole = list(tokenizer.encode(context + continuation))
    ids = list(tokenizer.encode(kept)) if kept else []
    if ids:
        return ids, whole[len(ids):]
    # Empty, or of characters that the tokenizer drops, such as a zero-width space.
    prefix, _ = document_ends(tokenizer)
    return [prefix], whole[1:] if whole[:1] == [prefix] else whole


def score(objective, params, pairs, *, batch_size: int = 16) -> list[Score]:
    """Returns the scores of pairs of token-id lists, in their order; a context too long is cut at its left.

    Sorted by length, in batches padded to a multiple of 32 tokens: few compiled shapes, little padding.

    Raises:
      UserError: a context without tokens, or a continuation without any or longer than the model's context.
    """
    longest = objective.arch.max_seq_len
    rows = []
    for context, continuation in pairs:
        if not len(context):
            raise UserError("a context of 0 tokens: nothing predicts the first token of its continuation; give at "
                            "least the beginning-of-text token")
        if not 0 < len(continuation) <= longest:
            raise UserError(f"a continuation of {len(continuation)} tokens must have 1 to {longest}, the model's "
                            "context")
        rows.append((np.array([*context, *continuation][-(longest + 1):], np.int32), len(continuation)))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    run, scores = jax.jit(objective.predict["score"]), {}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = min(-(-max(len(rows[i][0]) - 1 for i in chosen) // 32) * 32, longest)
        tokens, targets = np.zeros((2, batch_size, width), np.int32)
        for row, i in enumerate(chosen):
            ids = rows[i][0]
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        logprobs, correct = jax.device_get(run(params, tokens, targets))
        for row, i in enumerate(chosen):
            ids, n = rows[i]
            at = slice(len(ids) - 1 - n, len(ids) - 1)
            scores[i] = Score(float(logprobs[row, at].sum(dtype=np.float64)), bool(correct[row, at].all()), n)
    return [scores[i] for i in range(len(rows))]


def windows(tokens, prefix: int, max_length: int):
    """Returns (context, continuation) pairs that score each token of a text once, in windows of the model's context.

    The first window follows `prefix`; each later one predicts up to `max_length` further tokens, seeing as many
    tokens before its last as fit.
    """
    tokens, n = list(map(int, tokens)), len(tokens)
    pairs = [([prefix], tokens[:max_length])] if n else []
    done = min(max_length, n)
    while done < n:
        k = min(max_length, n - done)
        pairs.append((tokens[done + k - max_length - 1 : done], tokens[done : done + k]))
        done += k
    return pairs


def score_texts(objective, params, tokenizer, texts, *, batch_size: int = 16) -> list[float]:
    """Returns the natural log-probability of each text, every token of it scored once."""
    pairs, owners = [], []
    prefix, _ = document_ends(tokenizer)
    for i, text in enumerate(texts):
        made = windows(tokenizer.encode(text), prefix, objective.arch.max_seq_len)
        pairs += made
        owners += [i] * len(made)
    totals = [0.0] * len(texts)
    for i, s in zip(owners, score(objective, params, pairs, batch_size=batch_size)):
        totals[i] += s.logprob
    return totals

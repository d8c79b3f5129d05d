"""The named tasks of `python -m fm_jax.evaluate`, on a loaded language model and its held-out text. Layer 4.

A task is a function (lm, texts, limit) -> Result. `texts`: the held-out documents.
"""

import math
import random
import re
from typing import NamedTuple

import numpy as np

from fm_jax import scoring
from fm_jax.errors import UserError

SHOTS = 3            # worked examples before each question of `next_sentence`
CHOICES = 4
LONGEST_CHARS = 250  # of a sentence: four of them and their answers fit the quickstart's context


class Result(NamedTuple):
    """metrics: {name: value}; samples: what each was made of, JSON values."""

    metrics: dict[str, float]
    samples: list[dict]


def perplexity(lm, texts: list[str], limit: int = 0) -> Result:
    """Returns bits per byte, and perplexity by byte and by word, of the documents, each from an empty context."""
    texts = texts[:limit] if limit else texts
    logprobs = scoring.score_texts(lm.objective, lm.params, lm.tokenizer, texts)
    nbytes = [len(t.encode()) for t in texts]
    nats_per_byte = -sum(logprobs) / sum(nbytes)
    words = sum(len(re.split(r"\s+", t)) for t in texts)
    metrics = {"bits_per_byte": nats_per_byte / math.log(2), "byte_perplexity": math.exp(nats_per_byte),
               "word_perplexity": math.exp(min(700, -sum(logprobs) / words)), "documents": len(texts)}
    return Result(metrics, [{"bytes": n, "logprob": l, "text": t[:80]} for t, n, l in zip(texts, nbytes, logprobs)])


def next_sentence(lm, texts: list[str], limit: int = 0) -> Result:
    """Returns how often the true second sentence of a document beats the second sentences of three others, 3-shot.

    The prompt is three other documents' first two sentences, a blank line after each, then the first sentence. acc
    compares log-probabilities, acc_norm log-probabilities by character. Chance is 1 in 4.

    Raises:
      UserError: too few documents with two sentences.
    """
    pairs = []
    for text in texts:
        found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        if len(found) >= 3 and all(20 <= len(s) <= LONGEST_CHARS for s in found[:2]):
            pairs.append(found[:2])
    if len(pairs) < SHOTS + CHOICES:
        raise UserError(f"next_sentence needs {SHOTS + CHOICES} held-out documents of three sentences or more, found "
                        f"{len(pairs)}; prepare the data with a larger --validation_frac")
    shots = "".join(f"{a} {b}\n\n" for a, b in pairs[:SHOTS])
    asked = pairs[SHOTS:][:limit] if limit else pairs[SHOTS:]
    rng = random.Random(0)
    samples = []
    for i, (first, second) in enumerate(asked):
        others = rng.sample([b for j, (_, b) in enumerate(pairs[SHOTS:]) if j != i], CHOICES - 1)
        choices = rng.sample([second, *others], CHOICES)
        samples.append({"context": shots + first, "choices": choices, "gold": choices.index(second)})
    return multiple_choice(lm, samples)


def multiple_choice(lm, samples: list[dict]) -> Result:
    """Returns acc and acc_norm of samples {"context", "choices", "gold"}, with standard errors where there are several.

    Each choice follows its context and a space. Ties go to the first.
    """
    contexts = [s["context"] for s in samples for _ in s["choices"]]
    scores = iter(lm.score(contexts, [" " + c for s in samples for c in s["choices"]]))
    done, hits, hits_norm = [], [], []
    for s in samples:
        logprobs = np.array([next(scores).logprob for _ in s["choices"]])
        by_char = logprobs / [len(c) for c in s["choices"]]
        hits.append(int(logprobs.argmax() == s["gold"]))
        hits_norm.append(int(by_char.argmax() == s["gold"]))
        done.append(s | {"logprobs": logprobs.tolist(), "acc": hits[-1], "acc_norm": hits_norm[-1]})
    metrics = {}
    for name, x in (("acc", hits), ("acc_norm", hits_norm)):
        metrics[name] = float(np.mean(x))
        if len(x) > 1:
            metrics[f"{name}_stderr"] = float(np.std(x, ddof=1) / math.sqrt(len(x)))
    return Result(metrics | {"questions": len(samples)}, done)


TASKS = {"perplexity": perplexity, "next_sentence": next_sentence}

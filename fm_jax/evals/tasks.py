"""The named tasks of `python -m fm_jax.evaluate`, on a loaded language model and its held-out text. Layer 4.

A task is a function (lm, texts, limit, num_fewshot) -> Result. `texts`: the held-out documents.
"""

import math
import random
import re
from typing import NamedTuple

import numpy as np

from fm_jax import scoring
from fm_jax.errors import UserError

SHOTS = 3            # worked examples before each question, unless said otherwise
CHOICES = 4
LONGEST_CHARS = 250  # of a sentence: four of them and their answers fit the quickstart's context


class Result(NamedTuple):
    """metrics: {name: value}; samples: what each was made of, JSON values."""

    metrics: dict[str, float]
    samples: list[dict]


def perplexity(lm, texts: list[str], limit: int = 0, num_fewshot: int = 0) -> Result:
    """Returns bits per byte, and perplexity by byte and by word, of the documents, each from an empty context.

    `num_fewshot` has no meaning here.
    """
    texts = texts[:limit] if limit else texts
    logprobs = scoring.score_texts(lm.objective, lm.params, lm.tokenizer, texts)
    nbytes = [len(t.encode()) for t in texts]
    nats_per_byte = -sum(logprobs) / sum(nbytes)
    words = sum(len(re.split(r"\s+", t)) for t in texts)
    metrics = {"bits_per_byte": nats_per_byte / math.log(2), "byte_perplexity": math.exp(nats_per_byte),
               "word_perplexity": math.exp(min(700, -sum(logprobs) / words)), "documents": len(texts)}
    return Result(metrics, [{"bytes": n, "logprob": l, "text": t[:80]} for t, n, l in zip(texts, nbytes, logprobs)])


def next_sentence(lm, texts: list[str], limit: int = 0, num_fewshot: int = SHOTS) -> Result:
    """Returns how often the true second sentence of a document beats the second sentences of three others.

    The prompt is `num_fewshot` other documents' first two sentences, a blank line after each, then the first
    sentence. The questions do not depend on `num_fewshot`, up to SHOTS. Chance is 1 in 4.

    Raises:
      UserError: too few documents with two sentences.
    """
    pairs = []
    for text in texts:
        found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        if len(found) >= 3 and all(20 <= len(s) <= LONGEST_CHARS for s in found[:2]):
            pairs.append(found[:2])
    kept = max(SHOTS, num_fewshot)
    if len(pairs) < kept + CHOICES:
        raise UserError(f"next_sentence needs {kept + CHOICES} held-out documents of three sentences or more, found "
                        f"{len(pairs)}; prepare the data with a larger --validation_frac")
    shots = "".join(f"{a} {b}\n\n" for a, b in pairs[:num_fewshot])
    asked = pairs[kept:][:limit] if limit else pairs[kept:]
    rng = random.Random(0)
    samples = []
    for i, (first, second) in enumerate(asked):
        others = rng.sample([b for j, (_, b) in enumerate(pairs[kept:]) if j != i], CHOICES - 1)
        choices = rng.sample([second, *others], CHOICES)
        samples.append({"context": shots + first, "choices": choices, "gold": choices.index(second)})
    return multiple_choice(lm, samples)


def multiple_choice(lm, samples: list[dict]) -> Result:
    """Returns accuracies of samples {"context", "choices", "gold"}, with standard errors where there are several.

    acc takes the choice with the largest log-probability after its context and a space, acc_norm by character,
    acc_mutual_info after taking off its log-probability without a context. Ties go to the first.
    """
    contexts = [s["context"] for s in samples for _ in s["choices"]]
    choices = [" " + c for s in samples for c in s["choices"]]
    scores = iter(lm.score(contexts + [""] * len(choices), choices * 2))
    given, alone = ([np.array([next(scores).logprob for _ in s["choices"]]) for s in samples] for _ in range(2))
    hits, done = {"acc": [], "acc_norm": [], "acc_mutual_info": []}, []
    for s, logprobs, unconditional in zip(samples, given, alone):
        ranked = {"acc": logprobs, "acc_norm": logprobs / [len(c) for c in s["choices"]],
                  "acc_mutual_info": logprobs - unconditional}
        hit = {name: int(values.argmax() == s["gold"]) for name, values in ranked.items()}
        done.append(s | {"logprobs": logprobs.tolist(), "unconditional": unconditional.tolist()} | hit)
        for name in hits:
            hits[name].append(hit[name])
    metrics = {}
    for name, x in hits.items():
        metrics[name] = float(np.mean(x))
        if len(x) > 1:
            metrics[f"{name}_stderr"] = float(np.std(x, ddof=1) / math.sqrt(len(x)))
    return Result(metrics | {"questions": len(samples)}, done)


TASKS = {"perplexity": perplexity, "next_sentence": next_sentence}

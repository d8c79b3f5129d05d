"""The named tasks of `python -m fm_jax.evaluate`, on a loaded language model and its held-out text. Layer 4.

A task is a function (lm, texts, *, limit) -> Result, with num_fewshot where it has a meaning. `texts`: the held-out
documents; `limit`: only so many documents or questions; 0: all.
"""

import itertools
import math
import random
import re
from typing import NamedTuple

import numpy as np

from fm_jax.errors import UserError
from fm_jax.evals.metrics import rolling_items

PERPLEXITIES = ("bits_per_byte", "byte_perplexity", "word_perplexity")
SHOTS = 3            # worked examples before each question, unless said otherwise
CHOICES = 4
LONGEST_CHARS = 250  # of a sentence: a question and its answer fit a short context, such as the quickstart's


class Result(NamedTuple):
    """metrics: {name: value}; samples: what each was made of, JSON values."""

    metrics: dict[str, float]
    samples: list[dict]


def perplexity(lm, texts: list[str], *, limit: int = 0) -> Result:
    """Returns bits per byte, and perplexity by byte and by word, of the documents, each from an empty context."""
    texts = texts[:limit] if limit else texts
    logprobs = lm.score_texts(texts)
    nbytes = [len(t.encode()) for t in texts]
    nats_per_byte = -sum(logprobs) / sum(nbytes)
    words = sum(len(re.split(r"\s+", t)) for t in texts)
    metrics = {"bits_per_byte": nats_per_byte / math.log(2), "byte_perplexity": math.exp(nats_per_byte),
               "word_perplexity": math.exp(min(700, -sum(logprobs) / words)), "documents": len(texts)}
    samples = [{"bytes": n, "logprob": l, "text": t[:80], **rolling_items(PERPLEXITIES, l, t)}
               for t, n, l in zip(texts, nbytes, logprobs)]
    return Result(metrics, samples)


def next_sentence(lm, texts: list[str], *, limit: int = 0, num_fewshot: int = SHOTS) -> Result:
    """Returns how often the true second sentence of a document beats the second sentences of three others.

    The context is `num_fewshot` other documents' first two sentences, a blank line after each, then the first
    sentence; of these shots only the first so many that fit the model's context with the longest choice.
    `mean_shots` is how many that were, `truncated_contexts` how many questions lost a part even without any. The
    questions do not depend on `num_fewshot`. Chance is 1 in 4.

    Raises:
      UserError: too few documents with two sentences.
    """
    pairs = []
    for text in texts:
        found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        if len(found) >= 3 and all(20 <= len(s) <= LONGEST_CHARS for s in found[:2]):
            pairs.append(found[:2])
    needed = max(SHOTS, num_fewshot) + CHOICES
    if len(pairs) < needed:
        raise UserError(f"next_sentence needs {needed} held-out documents of three sentences or more, found "
                        f"{len(pairs)}; prepare the data with a larger --validation_frac")
    asked = pairs[SHOTS:]   # the others are shots only
    rng, samples, truncated = random.Random(0), [], 0
    for i, (first, second) in enumerate(asked[:limit] if limit else asked):
        others = [j + (j >= i) for j in rng.sample(range(len(asked) - 1), CHOICES - 1)]
        order = rng.sample([i, *others], CHOICES)
        choices = [asked[j][1] for j in order]
        unseen = (pair for j, pair in enumerate(asked) if j not in order)   # shots must not give choices away
        shots = [f"{a} {b}\n\n" for a, b in itertools.islice(itertools.chain(pairs[:SHOTS], unseen), num_fewshot)]
        used = 0
        while used < len(shots) and _fits(lm, "".join(shots[: used + 1]) + first, choices):
            used += 1
        truncated += not used and not _fits(lm, first, choices)
        samples.append({"context": "".join(shots[:used]) + first, "choices": choices, "gold": choices.index(second),
                        "shots": used})
    result = multiple_choice(lm, samples)
    means = {"mean_shots": float(np.mean([s["shots"] for s in samples])), "truncated_contexts": truncated}
    return result._replace(metrics=result.metrics | means)


def _fits(lm, context, choices):
    """Returns whether scoring cuts nothing off: a last token is only predicted, and needs no place."""
    whole = lm.tokenizer.encode_batch([f"{context} {c}" for c in choices])
    return max(map(len, whole)) <= lm.objective.arch.max_seq_len + 1


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

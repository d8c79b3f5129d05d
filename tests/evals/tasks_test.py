"""The tasks, on language models whose log-probabilities are known."""

import math
import types

import numpy as np
import pytest

import fm_jax
from fm_jax import tokenizer as tokenizers
from fm_jax.data import prepared
from fm_jax.errors import UserError
from fm_jax.evals import tasks
from fm_jax.scoring import Score


class Oracle:
    """Stands for a loaded model; log-probabilities come from a function of (context, continuation), or its prior."""

    tokenizer = tokenizers.load("bytes")

    def __init__(self, logprob, prior=lambda continuation: 0.0, max_seq_len=100_000):
        self.logprob, self.prior, self.asked = logprob, prior, []
        self.objective = types.SimpleNamespace(arch=types.SimpleNamespace(max_seq_len=max_seq_len))

    def score(self, contexts, continuations):
        self.asked += zip(contexts, continuations)
        return [Score(self.logprob(a, b) if a else self.prior(b), False, 1) for a, b in zip(contexts, continuations)]


def test_multiple_choice_by_hand():
    samples = [{"context": "A", "choices": ["xx", "yyyy"], "gold": 0},     # -2 > -3; by character -1 < -0.75
               {"context": "B", "choices": ["xx", "yyyy"], "gold": 1},     # -2 > -3; the same, the other gold
               {"context": "C", "choices": ["xx", "yy"], "gold": 0},       # a tie: the first
               {"context": "D", "choices": ["p", "qqq", "rr"], "gold": 2}]
    known = {("A", " xx"): -2, ("A", " yyyy"): -3, ("B", " xx"): -2, ("B", " yyyy"): -3, ("C", " xx"): -1,
             ("C", " yy"): -1, ("D", " p"): -9, ("D", " qqq"): -9, ("D", " rr"): -1}
    # Without a context "xx" is so likely that "yyyy" gains more from each context.
    lm = Oracle(lambda a, b: known[a, b], {" xx": -1, " yyyy": -9, " yy": -1, " p": -9, " qqq": -9, " rr": -1}.get)
    metrics, done = tasks.multiple_choice(lm, samples)
    assert metrics["acc"] == 3 / 4 and metrics["acc_norm"] == 3 / 4 and metrics["questions"] == 4
    assert [d["acc"] for d in done] == [1, 0, 1, 1] and [d["acc_norm"] for d in done] == [0, 1, 1, 1]
    assert [d["acc_mutual_info"] for d in done] == [0, 1, 1, 0] and metrics["acc_mutual_info"] == 1 / 2
    # Source: the harness's mean_stderr, sample standard deviation over sqrt(n).
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(4 / 3 * 3 / 16) / math.sqrt(4))
    assert done[0]["logprobs"] == [-2, -3] and lm.asked[:len(known)] == list(known)
    one, _ = tasks.multiple_choice(lm, samples[:1])   # of one question there is no standard error, and no NaN for JSON
    assert one == {"acc": 1.0, "acc_norm": 0.0, "acc_mutual_info": 0.0, "questions": 1}


def documents(n):
    return [f"Document {i} begins with this sentence. Its second sentence has the number {i}. And a third one. End."
            for i in range(n)]


def test_next_sentence_asks_what_it_says():
    texts = documents(20) + ["No sentence here", "Short. Too short. Yes.", "One sentence only, of some length. "]
    lm = Oracle(lambda a, b: 0.0)
    result = tasks.next_sentence(lm, texts)
    assert result.metrics["questions"] == 17 and len(result.samples) == 17   # 20 less three shots; the others are unfit
    for i, s in enumerate(result.samples, start=3):
        true = f"Its second sentence has the number {i}."
        assert s["choices"][s["gold"]] == true and len(set(s["choices"])) == 4
        *shots, question = s["context"].split("\n\n")
        assert question == f"Document {i} begins with this sentence."
        assert shots == [f"Document {j} begins with this sentence. Its second sentence has the number {j}." for j in
                         range(3)]
        assert true not in s["context"] and not any(c in s["context"] for c in s["choices"])   # shots give nothing away
    golds = [s["gold"] for s in result.samples]
    assert len(set(golds)) == 4   # no place is favoured
    assert tasks.next_sentence(lm, texts).samples == result.samples   # the questions are fixed
    assert tasks.next_sentence(lm, texts, limit=5).metrics["questions"] == 5
    assert result.metrics["mean_shots"] == 3 and result.metrics["truncated_contexts"] == 0
    for n in (0, 1, 8):   # the same questions, of which other shots give nothing away either
        other = tasks.next_sentence(lm, texts, num_fewshot=n).samples
        assert [(s["choices"], s["gold"]) for s in other] == [(s["choices"], s["gold"]) for s in result.samples]
        for s, same in zip(other, result.samples):
            *shots, question = s["context"].split("\n\n")
            assert question == same["context"].split("\n\n")[-1] and len(set(shots)) == n == s["shots"]
            assert shots[:3] == same["context"].split("\n\n")[:-1][:n]
            assert not any(c in shot for c in s["choices"] for shot in shots)


def test_shots_that_do_not_fit_are_left_out_whole():
    """A byte is a token here; the last one of a choice is only predicted, and needs no place in the context."""
    texts = documents(20)
    shots = [f"Document {i} begins with this sentence. Its second sentence has the number {i}.\n\n" for i in range(3)]
    seen = set()
    for max_seq_len in (400, 320, 315, 314, 313, 312, 236, 235, 158, 80, 78, 77, 76, 75, 74, 60):
        result = tasks.next_sentence(Oracle(lambda a, b: 0.0, max_seq_len=max_seq_len), texts)
        cut = 0
        for i, s in enumerate(result.samples, start=3):
            question = f"Document {i} begins with this sentence."
            room = max_seq_len + 1 - len(question) - 1 - max(map(len, s["choices"]))
            fit = min(3, max(0, room // len(shots[0])))
            assert s["context"] == "".join(shots[:fit]) + question and s["shots"] == fit
            cut += room < 0
            seen.add((fit, room < 0))
        assert result.metrics["truncated_contexts"] == cut
        assert result.metrics["mean_shots"] == np.mean([s["shots"] for s in result.samples])
    assert seen == {(3, False), (2, False), (1, False), (0, False), (0, True)}


def test_an_oracle_is_always_right_and_its_opposite_never():
    number = lambda text: text.split("number ")[1] if "number" in text else text.split("Document ")[-1].split()[0]
    right = Oracle(lambda a, b: float(number(a.split("\n\n")[-1]) == number(b).rstrip(".")))
    assert tasks.next_sentence(right, documents(20)).metrics["acc"] == 1.0
    wrong = Oracle(lambda a, b: -right.logprob(a, b))
    assert tasks.next_sentence(wrong, documents(20)).metrics["acc"] == 0.0


def test_too_few_documents_are_refused():
    with pytest.raises(UserError, match="needs 7 held-out documents of three sentences or more, found 6; .*_frac"):
        tasks.next_sentence(Oracle(lambda a, b: 0.0), documents(6))


def test_perplexity_by_the_harness_formulas():
    texts, logprobs = ["one two", " é three\n"], [-10.0, -20.0]
    lm = types.SimpleNamespace(score_texts=lambda asked: logprobs[: len(asked)])
    metrics, samples = tasks.perplexity(lm, texts)
    nbytes, words = 7 + 10, 2 + 4   # the harness counts the empty words at both ends of the second text
    assert metrics["bits_per_byte"] == pytest.approx(30 / nbytes / math.log(2))
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(30 / nbytes))
    assert metrics["word_perplexity"] == pytest.approx(math.exp(30 / words))
    assert metrics["documents"] == 2 and [s["logprob"] for s in samples] == logprobs
    assert tasks.perplexity(lm, texts, limit=1).metrics["bits_per_byte"] == pytest.approx(10 / 7 / math.log(2))


def test_perplexity_of_a_trained_model_agrees_with_its_validation(tiny_run, data):
    """Both in bits per byte of the held-out text; contexts differ: 256 tokens of one document here, packed rows of 64
    there, which can only be a little worse. Knowing nothing would be 9 bits (of 512 tokens)."""
    lm = fm_jax.load(tiny_run[0])
    texts = list(prepared.texts(data, "validation"))
    metrics, _ = tasks.perplexity(lm, texts, limit=10)
    logits = lm.logits(np.array([[lm.tokenizer.bos_id, *texts[0].encode()[:255]]])).astype(np.float64)[0]
    direct = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    bits = -direct[np.arange(255), list(texts[0].encode()[:255])].sum() / 255 / math.log(2)
    assert 7.5 < bits < 9 and 7.5 < metrics["bits_per_byte"] < 9 and abs(metrics["bits_per_byte"] - bits) < 0.2


def test_tasks_do_not_depend_on_the_mesh(tiny_run, data):
    """Three devices: their batches are no multiple of a power of two."""
    one, three = fm_jax.load(tiny_run[0]), fm_jax.load(tiny_run[0], mesh={"data": 3})
    texts = list(prepared.texts(data, "validation"))
    for task in tasks.TASKS.values():
        here, there = (task(lm, texts, limit=5).metrics for lm in (one, three))
        assert here == pytest.approx(there, rel=1e-5)   # sums over devices in another order

"""Log-probabilities: the rules of lm-evaluation-harness 0.4.13, and the log-softmax of whole forward passes."""

import math

import jax
import numpy as np
import pytest
import tokenizers as hf

from fm_jax import config as config_lib
from fm_jax import objectives, scoring, sharding
from fm_jax import tokenizer as tokenizers
from fm_jax.errors import UserError

CONTEXT = 64


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """Returns a tokenizer that joins across words and spaces, so that where a string is cut matters."""
    words = "the cat sat on a mat. then there was another cat at the other mat; that cat was the other cat. ".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 30)) for _ in range(200)]
    return tokenizers.train_sentencepiece(texts, 320, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    """Returns (objective, random parameters) of a model of bytes; large ones, so that tokens differ in probability."""
    c = config_lib.defaults()
    c.model.update(vocab_size=262, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_seq_len=CONTEXT)
    c.seq_len = CONTEXT
    objective = objectives.load(config_lib.resolve(c), tokenizers.load("bytes"))
    shapes, _ = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return objective, jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)


@pytest.fixture(scope="module")
def log_softmax(model):
    """Returns a function: float64 [len(ids), V], log-probabilities of what follows each token."""
    objective, params = model
    run = jax.jit(objective.predict["logits"])

    def of(ids):
        assert len(ids) <= CONTEXT
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(run(params, padded), np.float64)[0, : len(ids)]
        return logits - logits.max(-1, keepdims=True) - np.log(
            np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    return of


# --- From text to pairs ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("context, continuation, moved_context, moved_continuation", [
    ("the cat", " sat", "the cat", " sat"),
    ("the cat ", "sat", "the cat", " sat"),                 # its space moves
    ("the cat \n\t ", "sat on", "the cat", " \n\t sat on"),  # all kinds of it
    ("the cat", "sat", "the cat", "sat"),                   # none is added
    ("  the cat", " sat", "  the cat", " sat"),             # at its beginning it stays
    ("a mat.\u3000", "then", "a mat.", "\u3000then"),       # Unicode's too
])
def test_pairs_are_cut_where_the_contexts_own_tokens_end(sentencepiece, context, continuation, moved_context,
                                                        moved_continuation):
    ids, rest = scoring.encode_pair(sentencepiece, context, continuation)
    whole = sentencepiece.encode(moved_context + moved_continuation).tolist()
    assert ids == sentencepiece.encode(moved_context).tolist() and rest == whole[len(ids):]
    assert rest and all(type(i) in (int, np.int32) for i in rest)


def test_the_cut_need_not_be_a_boundary_of_the_whole(sentencepiece):
    """The harness never checks that the context's tokens begin the whole's; "th" + "ere" joins across the cut."""
    ids, rest = scoring.encode_pair(sentencepiece, "the cat at th", "e other mat")
    whole = sentencepiece.encode("the cat at the other mat").tolist()
    assert whole[: len(ids)] != ids and rest == whole[len(ids):]


def test_an_empty_context_is_the_beginning_of_text():
    tokenizer = tokenizers.load("bytes")
    assert scoring.encode_pair(tokenizer, "", "ab") == ([tokenizer.bos_id], [97, 98])

    class NoBeginning:   # only an end; and a text that begins with it keeps it as the context
        bos_id, eos_id = None, 7
        encode = staticmethod(lambda text: np.array([7, 8, 9] if text.startswith("<") else [8, 9]))
    assert scoring.encode_pair(NoBeginning, "", "ab") == ([7], [8, 9])
    assert scoring.encode_pair(NoBeginning, "", "<ab") == ([7], [8, 9])


def test_a_context_that_the_tokenizer_drops_is_the_beginning_of_text(tmp_path):
    """Published tokenizers normalise: of a zero-width space nothing remains, and a word would follow nothing."""
    model = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "cat": 1, "sat": 2, "<unk>": 3}, unk_token="<unk>"))
    model.normalizer, model.pre_tokenizer = hf.normalizers.Replace("\u200b", ""), hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(tmp_path)
    assert scoring.encode_pair(tokenizer, "\u200b", " cat sat") == ([0], [1, 2])
    assert scoring.encode_pair(tokenizer, "cat", " sat") == ([1], [2])
    assert scoring.encode_pair(tokenizer, "", "\u200b") == ([0], [])   # which `score` refuses


@pytest.mark.parametrize("context, continuation, message", [
    ("a", "", "empty continuation"), (" \n", "a", "only white space")])
def test_pairs_without_a_probability_are_refused(context, continuation, message):
    with pytest.raises(UserError, match=message):
        scoring.encode_pair(tokenizers.load("bytes"), context, continuation)


def test_windows_follow_the_rule_and_meet_each_token_once():
    """Source of the rule: get_rolling_token_windows of the harness, in the words of its documentation.

    The first window: input [prefix] + t[:min(M, n) - 1], target t[:min(M, n)]. Then, with p tokens predicted and
    k = min(M, n - p): input t[p + k - M - 1 : p + k - 1], target t[p : p + k].
    """
    rng = np.random.default_rng(0)
    for n, longest in [(0, 4), (1, 1), (1, 8), (8, 8), (9, 8), (16, 8), (17, 8), *rng.integers(1, 60, (40, 2))]:
        t, M = rng.integers(0, 100, n).tolist(), int(longest)
        pairs = scoring.windows(np.array(t), -1, M)
        want = [([-1, *t[: min(M, n) - 1]], t[: min(M, n)])] if n else []
        p = min(M, n)
        while p < n:
            k = min(M, n - p)
            want.append((t[p + k - M - 1 : p + k - 1], t[p : p + k]))
            p += k
        inputs = [([*context, *continuation][:-1], continuation) for context, continuation in pairs]
        assert inputs == want, (n, M)
        assert sum((target for _, target in pairs), []) == t
        assert all(len(i) <= M and context for (i, _), (context, _) in zip(inputs, pairs))


# --- From pairs to log-probabilities --------------------------------------------------------------------------------

def random_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 256, a).tolist(), rng.integers(0, 256, b).tolist())
            for a, b in zip(rng.integers(1, 60, n), rng.integers(1, 20, n))]


def test_scores_equal_the_log_softmax_of_the_logits(model, log_softmax):
    pairs = random_pairs(9)
    # Continue some greedily, so that is_greedy is true of a few.
    for i in (2, 5):
        context = pairs[i][0][:40]
        made = list(context)
        for _ in range(4):
            made.append(int(log_softmax(made)[-1].argmax()))
        pairs[i] = (context, made[len(context):])
    # Cut at the left: 64 inputs at most, so 65 tokens with the last target.
    pairs.append((list(range(100)), [5, 6, 7]))
    got = scoring.score(*model, pairs, batch_size=4)
    for (context, continuation), score in zip(pairs, got):
        ids = [*context, *continuation][-(CONTEXT + 1):]
        table = log_softmax(ids[:-1])[-len(continuation):]
        want = table[np.arange(len(continuation)), continuation].sum()
        # float32 losses of up to 20 tokens, each off by about 1e-6
        assert score.logprob == pytest.approx(want, rel=1e-5, abs=1e-4)
        assert score.is_greedy == bool((table.argmax(-1) == continuation).all())
        assert score.num_tokens == len(continuation)
    assert [i for i, s in enumerate(got) if s.is_greedy] == [2, 5]


def test_scores_do_not_depend_on_the_batch(model):
    pairs = random_pairs(11, seed=1)
    want = scoring.score(*model, pairs, batch_size=16)
    for batch_size in (1, 3):
        got = scoring.score(*model, pairs, batch_size=batch_size)
        # Other widths, other order of float32 sums.
        np.testing.assert_allclose([s.logprob for s in got], [s.logprob for s in want], rtol=0, atol=1e-4)
        assert [s.is_greedy for s in got] == [s.is_greedy for s in want]
    assert scoring.score(*model, []) == []


def test_texts_are_scored_whole(model, log_softmax):
    tokenizer = tokenizers.load("bytes")
    texts = ["short", "", "a text longer than the context of the model, so that it takes three windows. " * 2, "é"]
    got = scoring.score_texts(*model, tokenizer, texts, batch_size=2)
    for text, logprob in zip(texts, got):
        t, want = list(text.encode()), 0.0
        first = log_softmax([tokenizer.bos_id, *t[: CONTEXT - 1]]) if t else None
        for i, token in enumerate(t[:CONTEXT]):
            want += first[i, token]
        p = CONTEXT
        while p < len(t):   # the same windows, one by one
            k = min(CONTEXT, len(t) - p)
            table = log_softmax(t[p + k - CONTEXT - 1 : p + k - 1])
            want += sum(table[CONTEXT - k + i, t[p + i]] for i in range(k))
            p += k
        assert logprob == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert got[1] == 0.0 and math.isclose(got[0], scoring.score(
        *model, [([tokenizer.bos_id], list(b"short"))])[0].logprob, abs_tol=1e-4)


def test_a_continuation_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match="a continuation of 65 tokens must have 1 to 64, the model's context"):
        scoring.score(*model, [([1], [2] * 65)])
    with pytest.raises(UserError, match="a continuation of 0 tokens"):
        scoring.score(*model, [([1], [])])


def test_a_continuation_of_nothing_is_refused(model):
    """The first of its tokens would have no place: they would score 0, as if they were certain."""
    for context in ([], np.zeros(0, np.int32)):
        with pytest.raises(UserError, match="a context of 0 tokens"):
            scoring.score(*model, [([1], [2]), (context, [2, 3])])


def test_a_tokenizer_without_ends_is_named(model):
    class Endless:
        bos_id = eos_id = None
        encode = staticmethod(lambda text: np.array([8, 9]))
    for score in (lambda: scoring.encode_pair(Endless, "", "ab"), lambda: scoring.score_texts(*model, Endless, ["ab"])):
        with pytest.raises(UserError, match="no beginning- or end-of-text token"):
            score()

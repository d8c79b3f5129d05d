"""Log-probabilities: the rules of lm-evaluation-harness 0.4.13, and the log-softmax of whole forward passes."""

import functools
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


def encode_pair(tokenizer, context, continuation):
    (before, after), = scoring.encode_pairs(tokenizer, [context], [continuation])
    return before.tolist(), after.tolist()


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
    ids, rest = encode_pair(sentencepiece, context, continuation)
    whole = sentencepiece.encode(moved_context + moved_continuation).tolist()
    assert ids == sentencepiece.encode(moved_context).tolist() and rest == whole[len(ids):]
    assert rest and all(type(i) in (int, np.int32) for i in rest)


def test_the_cut_need_not_be_a_boundary_of_the_whole(sentencepiece):
    """The harness never checks that the context's tokens begin the whole's; "th" + "ere" joins across the cut."""
    ids, rest = encode_pair(sentencepiece, "the cat at th", "e other mat")
    whole = sentencepiece.encode("the cat at the other mat").tolist()
    assert whole[: len(ids)] != ids and rest == whole[len(ids):]


def test_an_empty_context_is_the_beginning_of_text():
    tokenizer = tokenizers.load("bytes")
    assert encode_pair(tokenizer, "", "ab") == ([tokenizer.bos_id], [97, 98])

    class NoBeginning:   # only an end; and a text that begins with it keeps it as the context
        bos_id, eos_id, adds_bos = None, 7, False
        encode_batch = staticmethod(lambda texts, special: [np.array([7, 8, 9] if text.startswith("<") else [8, 9])
                                                            for text in texts])
    assert encode_pair(NoBeginning, "", "ab") == ([7], [8, 9])
    assert encode_pair(NoBeginning, "", "<ab") == ([7], [8, 9])


def test_a_context_that_the_tokenizer_drops_is_the_beginning_of_text(tmp_path):
    """Published tokenizers normalise: of a zero-width space nothing remains, and a word would follow nothing."""
    model = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "cat": 1, "sat": 2, "<unk>": 3}, unk_token="<unk>"))
    model.normalizer, model.pre_tokenizer = hf.normalizers.Replace("\u200b", ""), hf.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(tmp_path)
    assert encode_pair(tokenizer, "\u200b", " cat sat") == ([0], [1, 2])
    assert encode_pair(tokenizer, "cat", " sat") == ([1], [2])
    assert encode_pair(tokenizer, "", "\u200b") == ([0], [])   # which `score` refuses


@pytest.fixture(scope="module", params=[True, False], ids=["begins", "plain"])
def published(request, tmp_path_factory):
    """Returns (whether it puts <s> before every text, a tokenizer.json of words that says so)."""
    model = hf.Tokenizer(hf.models.WordLevel({"<s>": 0, "</s>": 1, "the": 2, "cat": 3, "sat": 4, "<unk>": 5},
                                             unk_token="<unk>"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<s>", "</s>"])
    if request.param:
        model.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("published")
    model.save(str(folder / "tokenizer.json"))
    return request.param, tokenizers.load(folder)


def test_special_tokens_are_read_as_the_harness_reads_them(published):
    """Its tok_encode adds what the tokenizer's file adds, but before a text that begins with the spelling of it."""
    begins, tokenizer = published
    before = [0] if begins else []
    for context, continuation, want in [
            ("the cat", " sat", (before + [2, 3], [4])),
            ("the</s> ", "sat", (before + [2, 1], [4])),                   # spelt, it is the token
            ("<s> the cat", " sat", ([0, 2, 3], [4])),                     # it is there already
            ("", "cat sat", ([0], [3, 4])), ("", "<s>cat", ([0], [3]))]:   # added by the rule for no context
        assert encode_pair(tokenizer, context, continuation) == want
    contexts, continuations = ["the cat", "", "the cat"], [" sat", "cat", " sat"]
    for pair, a, b in zip(scoring.encode_pairs(tokenizer, contexts, continuations), contexts, continuations):
        assert tuple(x.tolist() for x in pair) == encode_pair(tokenizer, a, b)
        assert all(x.dtype == np.int32 for x in pair)
    if begins:
        assert encode_pair(tokenizer, " \n", "cat") == ([0], [3])   # there is a context after all


def test_a_whole_text_is_read_with_its_beginning(published, model, monkeypatch):
    """Where the tokenizer adds it, it is a token of the text like any other and is scored, as the harness does."""
    begins, tokenizer = published
    asked = []
    monkeypatch.setattr(scoring, "score", lambda objective, params, pairs, **how: asked.extend(pairs) or [
        scoring.Score(-1.0, True, 1)] * len(pairs))
    scoring.score_texts(*model, tokenizer, ["the cat", "<s>sat"])
    assert asked == [([0], ([0] if begins else []) + [2, 3]), ([0], [0, 4])]


@pytest.mark.parametrize("context, continuation, message", [
    ("a", "", "empty continuation"), (" \n", "a", "only white space")])
def test_pairs_without_a_probability_are_refused(context, continuation, message):
    with pytest.raises(UserError, match=message):
        encode_pair(tokenizers.load("bytes"), context, continuation)


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


def naive_scores(objective, params, pairs):
    """Returns float64 log-probabilities, each request in a forward pass of its own."""
    longest, run = objective.arch.max_seq_len, jax.jit(objective.predict["logits"])
    out = []
    for context, continuation in pairs:
        ids = [*context, *continuation][-(longest + 1):]
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(ids) - 1] = ids[:-1]
        logits = np.asarray(run(params, padded), np.float64)[0, : len(ids) - 1][-len(continuation):]
        top = logits.max(-1, keepdims=True)
        table = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        out.append(table[np.arange(len(continuation)), continuation].sum())
    return np.array(out)


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


def shared_pairs(seed, vocab, longest, n=60):
    """Returns requests that share their beginnings: of all, of some, of a question; and some that share nothing."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(0, vocab, rng.integers(low, high)).tolist()
    subject, other, another, third = draw(longest // 3, longest // 2), *(draw(40, 41) for _ in range(3))
    pairs = []
    for i in range(n):
        shots = [subject, subject + other, subject + another, subject[: len(subject) // 2] + third, subject[:3], []]
        shots = shots[rng.choice(6, p=[0.1, 0.2, 0.2, 0.2, 0.2, 0.1])]
        context = shots + draw(2, longest // 4)
        answer = draw(1, 3)
        pairs += [(context, answer + draw(1, 6)) for _ in range(rng.integers(1, 5))]   # answers that begin alike
        pairs += [(context, [token]) for token in rng.integers(0, vocab, 2).tolist()]
        pairs += [(context[: -1], [*context[-1:], *answer])]                            # one within another
    pairs += pairs[:3] + [(draw(2 * longest, 2 * longest + 1), draw(1, longest)), (subject, draw(1, 9))]
    return [pairs[i] for i in rng.permutation(len(pairs))]


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("seed", range(6))
def test_batches_are_the_requests_laid_out(seed, batch_size, monkeypatch):
    """By sets instead of intervals: what a token may see, in order, is the request up to it; each is read once."""
    monkeypatch.setattr(scoring, "LONGEST_TREE", 256)   # so that trunks have several trunks on them
    longest = (96, 300, 1500)[seed % 3]
    pairs = shared_pairs(seed, (2, 50)[seed % 2], longest, n=(60, 60, 12)[seed % 3])
    inputs = [np.array([*a, *b][:-1], np.int32)[-longest:] for a, b in pairs]
    targets = [np.array(b, np.int32) for _, b in pairs]
    trunk, found, computed = [], {}, 0
    for batch in scoring.batches(inputs, targets, batch_size, 2):
        B, T = batch.tokens_BT.shape
        assert T == scoring.bucket(T) and B % 2 == 0 and (B == 2 or B * T <= batch_size * scoring.ROW // 2)
        paths = {}
        for place in np.unique(batch.places_N).tolist() + ([batch.kept - 1] if batch.kept else []):
            row, t = divmod(place, T)
            depth = (batch.trunk_BS[row] >= t).sum()
            assert depth <= len(trunk) and (batch.trunk_BS[row, :depth] >= t).all()   # the first of them, no others
            seen = np.flatnonzero(batch.last_BT[row, : t + 1] >= t)
            assert (batch.positions_BT[row, seen] == np.arange(depth, depth + len(seen))).all()
            paths[place] = trunk[:depth] + batch.tokens_BT[row, seen].tolist()
        for place, target, owner in zip(batch.places_N.tolist(), batch.targets_N.tolist(), batch.owners_N.tolist()):
            depth = len(paths[place])
            assert inputs[owner][:depth].tolist() == paths[place]
            assert (owner, depth) not in found
            found[owner, depth] = target
        if batch.kept:
            trunk = paths[batch.kept - 1]
        computed += batch.computed
    want = {(i, len(ids) - len(t) + 1 + k): t[k] for i, (ids, t) in enumerate(zip(inputs, targets))
            for k in range(len(t))}
    assert found == want
    distinct = {tuple(ids[:n]) for ids in inputs for n in range(1, len(ids) + 1)}
    assert computed <= 1.25 * len(distinct)   # beginnings shorter than SHORTEST_TRUNK are repeated


SCHEMES = {   # model_test.py has every one the core knows
    "rope, grouped": {}, "learned, unrolled": dict(position="learned", norm="layernorm", norm_bias=True,
                                                   scan_layers=False),
    "windows, softcaps": dict(layer_pattern=("local", "local", "global"), num_layers=4, window=70, qk_norm="head",
                              rope_local_theta=100.0, attention_softcap=2.0, logit_softcap=3.0),
}


@functools.cache
def scheme(name, mesh=()):
    """Returns (objective, random parameters) of a model of 40 tokens."""
    c = config_lib.defaults()
    c.model.update(**{**dict(vocab_size=40, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=32,
                             max_seq_len=192), **SCHEMES[name]})
    c.seq_len = 192
    layout = sharding.Layout(sharding.make_mesh(dict(mesh))) if mesh else None
    objective = objectives.load(config_lib.resolve(c), None, layout)
    shapes, axes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(s.dtype), shapes)
    return objective, jax.device_put(params, layout.parameters(params, axes)) if layout else params


@pytest.mark.parametrize("name", SCHEMES)
def test_packing_changes_no_score(name, monkeypatch):
    """Branches of one row, several questions in a row, a trunk before them: as each request alone, to 1e-4."""
    monkeypatch.setattr(scoring, "LONGEST_TREE", 128)   # so that a few requests need a trunk, and another within
    model, pairs, work = scheme(name), shared_pairs(1, 40, 192, n=20), scoring.Work()
    got = scoring.score(*model, pairs, work=work)
    np.testing.assert_allclose([s.logprob for s in got], naive_scores(*model, pairs), rtol=0, atol=1e-4)
    assert any(shape.kept and shape.trunk for shape in work.shapes)
    assert work.truncated == 1


def test_trunks_of_one_length_are_told_apart(monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_TREE", 128)
    model, rng, work = scheme("rope, grouped"), np.random.default_rng(3), scoring.Work()
    subjects = rng.integers(0, 40, (3, 60)).tolist()
    pairs = [(subject + rng.integers(0, 40, 20).tolist(), [1, 2]) for subject in subjects for _ in range(8)]
    got = scoring.score(*model, pairs, work=work)
    assert work.shapes[scoring.Shape(1, 64, kept=True)] == 3
    np.testing.assert_allclose([s.logprob for s in got], naive_scores(*model, pairs), rtol=0, atol=1e-4)


def test_long_trunks_have_coarser_lengths(monkeypatch):
    """By rows an eighth as long as they are: the trunk of 100 tokens takes 112 places as a row, and 128 before others."""
    for name, value in (("SMALLEST_ROW", 8), ("ROW", 32), ("LONGEST_TREE", 64)):
        monkeypatch.setattr(scoring, name, value)
    model, rng, work = scheme("rope, grouped"), np.random.default_rng(5), scoring.Work()
    subject = rng.integers(0, 40, 100).tolist()
    pairs = [(subject + rng.integers(0, 40, 20).tolist(), [1, 2]) for _ in range(8)]
    got = scoring.score(*model, pairs, work=work)
    assert {(shape.length, shape.trunk) for shape in work.shapes if shape.kept} == {(112, 0)}
    assert {shape.trunk for shape in work.shapes if not shape.kept} == {128}
    np.testing.assert_allclose([s.logprob for s in got], naive_scores(*model, pairs), rtol=0, atol=1e-4)


def test_a_mesh_or_a_batch_size_changes_no_score(monkeypatch):
    monkeypatch.setattr(scoring, "LONGEST_TREE", 128)
    pairs = shared_pairs(1, 40, 192, n=15)
    mesh = (("data", 2), ("fsdp", 2), ("tensor", 2))
    want, *others = (scoring.score(*scheme("rope, grouped", m), pairs, batch_size=n)
                     for m, n in (((), 16), ((), 3), (mesh, 16)))
    for got in others:
        np.testing.assert_allclose([s.logprob for s in got], [s.logprob for s in want], rtol=0, atol=1e-4)
        assert [s.is_greedy for s in got] == [s.is_greedy for s in want]


def test_what_requests_share_is_computed_once():
    model, work = scheme("rope, grouped"), scoring.Work()
    context, other = list(range(30)), list(range(5, 40)) * 3
    four = [(context, [token]) for token in (3, 1, 4, 1)]                    # the letters of a multiple choice
    scoring.score(*model, four + four, work=work)
    assert (work.requests, work.tokens, work.computed, work.places) == (8, 240, 30, 64)
    assert work.shapes == {scoring.Shape(1, 64): 1}
    work = scoring.Work()
    scoring.score(*model, [(context, [7, 8, 9]), (context, [7, 5]), (other, [1, 2])], work=work)
    assert work.computed == 30 + 2 + 105 + 1   # the 7 is one too; what follows the last token is not read
    assert "3 requests" in str(work) and "1x256 (1)" in str(work)
    rng, work = np.random.default_rng(0), scoring.Work()
    pairs = [(other + rng.integers(0, 40, 20).tolist(), [1, 2]) for _ in range(100)]
    scoring.score(*model, pairs, work=work)
    distinct = 105 + len({tuple(a[105 : n + 1]) for a, _ in pairs for n in range(105, 125)}) + 100
    assert distinct <= work.computed < 1.05 * distinct and work.places < 1.3 * work.computed


def test_shapes_that_are_compiled_are_preferred():
    """Ten requests of 120 tokens: five rows of 256 and one batch, unless batches of four such rows are there."""
    rng = np.random.default_rng(0)
    inputs, targets = [rng.integers(0, 40, 120) for _ in range(10)], [np.array([1])] * 10
    shapes = lambda known: {batch.tokens_BT.shape for batch in scoring.batches(inputs, targets, 16, 1, known)}
    assert shapes(()) == {(5, 256)} and shapes({scoring.Shape(4, 256)}) == {(4, 256)}
    assert shapes({scoring.Shape(4, 256, trunk=64)}) == {(5, 256)}
    inputs, targets = [], [np.array([1])] * 60   # behind trunks of 50 tokens, 13, 15, 15 and 17 of them
    for count in (13, 15, 15, 17):
        trunk = rng.integers(0, 40, 50)
        inputs += [np.concatenate([trunk, rng.integers(0, 40, 100)]) for _ in range(count)]
    assert len(shapes(())) == 2   # trunks, and one for the rows of all


def test_beginnings_too_short_for_a_trunk_are_repeated_seldom():
    rng = np.random.default_rng(0)
    for shared in (4, 8, 16, 23, 24, 40):
        beginning = rng.integers(0, 40, shared)
        inputs = [np.concatenate([beginning, rng.integers(0, 40, 49)]) for _ in range(400)]
        made = list(scoring.batches(inputs, [np.array([1])] * 400, 16, 1))
        distinct = len({tuple(ids[:n]) for ids in inputs for n in range(1, len(ids) + 1)})
        assert sum(batch.computed for batch in made) <= (1.1 if shared < scoring.SHORTEST_TRUNK else 1.02) * distinct


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
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        scoring.score(*model, [([1], [2])], batch_size=0)


def test_a_continuation_of_nothing_is_refused(model):
    """The first of its tokens would have no place: they would score 0, as if they were certain."""
    for context in ([], np.zeros(0, np.int32)):
        with pytest.raises(UserError, match="a context of 0 tokens"):
            scoring.score(*model, [([1], [2]), (context, [2, 3])])


def test_a_tokenizer_without_ends_is_named(model):
    class Endless:
        bos_id = eos_id = None
        adds_bos = False
        encode_batch = staticmethod(lambda texts, special: [np.array([8, 9]) for _ in texts])
    for score in (lambda: encode_pair(Endless, "", "ab"), lambda: scoring.score_texts(*model, Endless, ["ab"])):
        with pytest.raises(UserError, match="no beginning- or end-of-text token"):
            score()

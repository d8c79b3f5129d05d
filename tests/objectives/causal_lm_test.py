"""Packed next-token and fill-in-the-middle examples, and the loss over them, against loops and direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.model import Cache
from fm_jax.tokenizer import ByteTokenizer
import naive

TOKENIZER = ByteTokenizer()
PREFIX, SUFFIX, MIDDLE = TOKENIZER.fim_ids
T = 24


def config(**changes):
    c = config_lib.defaults()
    c.model.update(vocab_size=270, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12, max_seq_len=64,
                   loss_chunk_tokens=30)
    c.seq_len, c.batch_size = T, 3
    return config_lib.override(c, changes)


def make(tokenizer=TOKENIZER, **changes):
    return objectives.load(config(**changes), tokenizer)


def documents(n, seed=0, low=0, high=40):
    """Returns n documents: BOS, a body of distinct-looking bytes, EOS."""
    rng = np.random.default_rng(seed)
    return [np.array([TOKENIZER.bos_id, *rng.integers(0, 256, size), TOKENIZER.eos_id])
            for size in rng.integers(low, high, n)]


def pack(docs, T):
    """Returns (records [n, T + 1], place of each token in the stream or -1): rows overlap by one token."""
    stream = np.concatenate(docs)
    owner = np.repeat(np.arange(len(docs)), [len(d) for d in docs])
    starts = range(0, len(stream) - 1, T)
    tokens, segments = np.zeros((2, len(starts), T + 1), np.int32)
    place = np.full((len(starts), T + 1), -1)
    for row, start in enumerate(starts):
        part = slice(start, start + T + 1)
        n = len(stream[part])
        tokens[row, :n], place[row, :n] = stream[part], np.arange(start, start + n)
        segments[row, :n] = owner[part] - owner[start] + 1
    return {"tokens": tokens, "segment_ids": segments}, place


def seeds(n, first=0):
    return np.arange(first, first + n, dtype=np.uint64)


# --- examples -------------------------------------------------------------------------------------------------------

def test_examples_equal_loops():
    records, _ = pack(documents(12), T)
    n = len(records["tokens"])
    assert (records["segment_ids"] == 0).any() and records["segment_ids"].max() > 2
    objective = make()
    got = objective.examples(records, seeds(n))
    assert {k: ((n,) + s.shape[1:], s.dtype) for k, s in objective.batch_spec(n).items()} == {
        k: (a.shape, a.dtype) for k, a in got.items()}
    for b in range(n):
        tokens, segments = records["tokens"][b], records["segment_ids"][b]
        for t in range(T):
            position = 0
            while position < t and segments[t - position - 1] == segments[t]:
                position += 1
            scored = segments[t] != 0 and segments[t + 1] == segments[t]
            want = tokens[t], tokens[t + 1], position, segments[t], float(scored)
            assert want == tuple(got[k][b, t] for k in ("tokens", "targets", "positions", "segment_ids", "weights"))


def test_every_token_but_the_first_of_a_document_is_scored_once():
    docs = documents(30, seed=1)
    records, place = pack(docs, T)
    weights = make().examples(records, seeds(len(place)))["weights"]
    scored = np.bincount(place[:, 1:][weights > 0], minlength=sum(map(len, docs)))
    want = np.concatenate([[0] + [1] * (len(d) - 1) for d in docs])
    np.testing.assert_array_equal(scored, want)


def test_random_batches_fit_the_spec_without_a_tokenizer():
    objective = make(None, **{"objective_args.fim_rate": 0.5})
    batch = objective.random_batch(4, np.random.default_rng(0))
    assert {k: (s.shape, s.dtype) for k, s in objective.batch_spec(4).items()} == {
        k: (a.shape, a.dtype) for k, a in batch.items()}
    assert batch["weights"].all() and batch["tokens"].max() < 270
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


# --- fill in the middle ---------------------------------------------------------------------------------------------

def fim_rows(rate, spm_rate, records, row_seeds):
    """Returns the whole rows [n, T + 1] that the examples were made of."""
    objective = make(**{"model.max_seq_len": 1000, "seq_len": records["tokens"].shape[1] - 1,
                        "objective_args.fim_rate": rate,
                        "objective_args.fim_spm_rate": spm_rate})
    out = objective.examples(records, row_seeds)
    return np.concatenate([out["tokens"], out["targets"][:, -1:]], axis=1)


def read_back(doc):
    """Returns (order, prefix, middle, suffix) of a fill-in-the-middle document without its ends; None if it is plain.

    With an empty prefix both orders are the same, read as "spm".
    """
    at = {int(m): np.flatnonzero(doc == m) for m in (PREFIX, SUFFIX, MIDDLE)}
    if not any(len(where) for where in at.values()):
        return None
    assert all(len(where) == 1 for where in at.values())
    p, s, m = (int(at[i][0]) for i in (PREFIX, SUFFIX, MIDDLE))
    assert p == 0
    if s == 1:   # <prefix><suffix> suffix <middle> prefix middle: where prefix ends and middle begins is not marked
        return "spm", doc[m + 1:], doc[:0], doc[2:m]
    assert s < m
    return "psm", doc[1:s], doc[m + 1:], doc[s + 1:m]


def each_document(records, rows):
    """Yields (before, after) of every document of every row."""
    for tokens, segments, row in zip(records["tokens"], records["segment_ids"], rows):
        for segment in range(1, segments.max() + 1):
            yield tokens[segments == segment], row[segments == segment]


@pytest.mark.parametrize("spm_rate, order", [(0.0, "psm"), (1.0, "spm")])
def test_fill_in_the_middle_keeps_lengths_ends_and_tokens(spm_rate, order):
    records, _ = pack(documents(60, seed=2, high=50), 60)
    n = len(records["tokens"])
    rows = fim_rows(1.0, spm_rate, records, seeds(n))
    padding = records["segment_ids"] == 0
    np.testing.assert_array_equal(rows[padding], records["tokens"][padding])
    kinds, prefixes, middles = [], set(), set()
    for before, after in each_document(records, rows):
        assert after[0] == before[0]
        whole = before[-1] == TOKENIZER.eos_id
        assert (after[-1] == TOKENIZER.eos_id) == whole
        body, got = (d[1:-1] if whole else d[1:] for d in (before, after))
        if len(before) == 1 or len(body) < 6:
            np.testing.assert_array_equal(after, before)
            continue
        kind, prefix, middle, suffix = read_back(got)
        kinds.append(kind)
        # The text in its own order again; its last three tokens made room for the markers.
        np.testing.assert_array_equal(np.concatenate([prefix, middle, suffix]), body[:-3])
        prefixes.add(len(prefix))
        middles.add(len(middle))
    assert len(kinds) > 30 and kinds.count(order) > 0.8 * len(kinds) and (order == "psm" or set(kinds) == {"spm"})
    assert len(prefixes) > 10 and (order == "spm" or len(middles) > 10)


def test_fill_in_the_middle_keeps_targets_and_documents():
    records, _ = pack(documents(40, seed=3), T)
    n = len(records["tokens"])
    plain, turned = (make(**{"objective_args.fim_rate": r}).examples(records, seeds(n)) for r in (0.0, 1.0))
    for name in ("positions", "segment_ids", "weights"):
        np.testing.assert_array_equal(turned[name], plain[name])
    np.testing.assert_array_equal(plain["tokens"], records["tokens"][:, :-1])   # rate 0
    assert (turned["tokens"] != plain["tokens"]).any()
    held_out = make(**{"objective_args.fim_rate": 1.0}).examples(records, seeds(n), train=False)
    for name, want in plain.items():    # bits per byte are of the text itself
        np.testing.assert_array_equal(held_out[name], want)


def test_fill_in_the_middle_happens_at_its_rates():
    # Long, so that few prefixes are empty; four and a part in each row.
    records, _ = pack([np.array([TOKENIZER.bos_id, *range(200), TOKENIZER.eos_id])] * 1600, 900)
    rows = fim_rows(0.5, 0.25, records, seeds(len(records["tokens"])))
    kinds = [read_back(after[1:-1]) for before, after in each_document(records, rows) if len(after) == 202]
    orders = [k[0] for k in kinds if k]
    assert len(kinds) > 1100
    # Five standard errors of a binomial.
    assert abs(len(orders) / len(kinds) - 0.5) < 5 * (0.25 / len(kinds)) ** 0.5
    assert abs(orders.count("spm") / len(orders) - 0.25) < 5 * (0.1875 / len(orders)) ** 0.5
    # Two uniform cuts leave three pieces of one third on average, of deviation 18^-0.5.
    pieces = np.array([[len(piece) for piece in k[1:]] for k in kinds if k and k[0] == "psm"]) / 197
    np.testing.assert_allclose(pieces.mean(0), 1 / 3, atol=5 * (18 * len(pieces)) ** -0.5)


def test_an_example_depends_on_its_own_seed_only():
    records, _ = pack(documents(40, seed=4), T)
    n = len(records["tokens"])
    together = fim_rows(0.5, 0.5, records, seeds(n, 7))
    for i in range(n):
        alone = fim_rows(0.5, 0.5, {k: a[i:i + 1] for k, a in records.items()}, seeds(1, 7 + i))
        np.testing.assert_array_equal(alone[0], together[i])
    assert (fim_rows(0.5, 0.5, records, seeds(n, 1000)) != together).any()


def test_draws_are_those_of_splitmix64():
    """By Python's integers of any length."""
    def splitmix64(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
        return x ^ x >> 31

    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF     # the published generator's first after seed 0
    first = [0, 1, 2 ** 64 - 1]
    want = [[(splitmix64((seed + k * 0x9E3779B97F4A7C15) % 2 ** 64) >> 11) / 2 ** 53 for k in (1, 2, 3)]
            for seed in first]
    got = objectives.uniform(np.array(first, np.uint64), 3)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float64


def test_one_documents_fate_does_not_move_anothers():
    """Draws go by the document's number in the row, so that a shorter first document leaves the second's coin alone."""
    long, short, second = np.arange(1, 15), np.arange(1, 4), np.arange(100, 118)
    fates = []
    for first in (long, short):
        tokens = np.concatenate([first, second])[None].astype(np.int32)
        segments = np.repeat([1, 2], [len(first), len(second)])[None].astype(np.int32)
        rows = [fim_rows(0.5, 0.5, {"tokens": tokens, "segment_ids": segments}, seeds(1, s))[0, len(first):]
                for s in range(20)]
        fates.append(np.stack(rows))
    np.testing.assert_array_equal(*fates)


# --- the loss -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data():
    """Returns (parameters away from their start, a packed batch of three rows with padding)."""
    params, _ = sharding.unbox(jax.jit(make().init)(jax.random.key(0)))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda p: np.asarray(p + rng.normal(0, 0.2, p.shape), np.float32), params)
    records, _ = pack(documents(5, seed=6, low=8, high=14), T)
    return params, {k: a[-3:] for k, a in make().examples(records, seeds(len(records["tokens"]))).items()}


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loss_and_metrics_equal_direct_computation(data):
    params, batch = data
    objective = make(**{"objective_args.z_loss": 0.02})
    got = jax.jit(lambda p, b: objective.loss(p, b, None))(params, batch)
    inputs = zip(batch["tokens"], batch["segment_ids"], batch["positions"])
    logits = np.stack([naive.logits(objective.arch, params, *row) for row in inputs])
    weights, targets = batch["weights"], batch["targets"]
    assert 0 < weights.sum() < weights.size
    nll = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    z = np.log(np.exp(logits).sum(-1)) ** 2
    close = dict(rtol=2e-4)   # float32 through one layer against float64
    np.testing.assert_allclose(got.loss, ((nll + 0.02 * z) * weights).sum(), **close)
    assert got.weight == weights.sum()
    np.testing.assert_allclose(got.metrics["nll"], ((nll * weights).sum(), weights.sum()), **close)
    np.testing.assert_array_equal(got.metrics["accuracy"][0], ((logits.argmax(-1) == targets) * weights).sum())
    # Every id below 256 is one byte of text; the special tokens are none, and their nats count all the same.
    bytes_ = ((targets < 256) * weights).sum()
    assert bytes_ < weights.sum()
    total, weight = got.metrics["bits_per_byte"]
    np.testing.assert_allclose(total / weight, (nll * weights).sum() / np.log(2) / bytes_, **close)
    assert "bits_per_byte" not in jax.eval_shape(lambda p, b: make(None).loss(p, b, None), params, batch).metrics


def test_what_is_not_scored_moves_nothing(data):
    """Targets of weight 0, and the tokens of padding, change neither loss nor gradient by a single bit."""
    params, batch = data
    objective = make()
    grad = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, b, None).loss))
    other = {k: v.copy() for k, v in batch.items()}
    other["targets"][batch["weights"] == 0] = 77
    other["tokens"][batch["segment_ids"] == 0] = 99
    (a, da), (b, db) = grad(params, batch), grad(params, other)
    assert a == b
    for n, g in tree.flatten(da).items():
        np.testing.assert_array_equal(g, tree.flatten(db)[n], err_msg=n)


def test_z_loss_gradient_equals_that_of_the_log_normaliser(data):
    params, batch = data
    batch = {**batch, "segment_ids": np.ones_like(batch["segment_ids"]),   # one document a row, as `predict` has it
             "positions": np.arange(T, dtype=np.int32)[None].repeat(3, 0)}
    loss = lambda z: jax.jit(jax.grad(lambda p: make(**{"objective_args.z_loss": z}).loss(p, batch, None).loss))
    with_z, without = tree.flatten(loss(0.3)(params)), tree.flatten(loss(0.0)(params))
    term = lambda p: 0.3 * (jax.nn.logsumexp(make().logits(p, batch["tokens"]), -1) ** 2 * batch["weights"]).sum()
    for n, want in tree.flatten(jax.jit(jax.grad(term))(params)).items():
        scale = np.abs(want).max()
        assert scale > 1e-3
        np.testing.assert_allclose(with_z[n] - without[n], want, atol=1e-4 * scale, err_msg=n)   # a float32 difference


def test_predictions_agree(data):
    params, batch = data
    objective = make()
    tokens, targets = batch["tokens"], batch["targets"]
    logits = np.asarray(jax.jit(objective.predict["logits"])(params, tokens))
    want = np.stack([naive.logits(objective.arch, params, row) for row in tokens])
    np.testing.assert_allclose(logits, want, rtol=2e-4, atol=2e-4)
    hidden, _ = jax.jit(objective.predict["hidden"])(params, tokens)
    places = np.array([70, 3, 3, 24])   # of 3 rows of 24; any order, and one for two targets
    aims = np.append(targets.ravel()[places[:2]], [want[0, 3].argmax(), 5])
    logprob, greedy = jax.jit(objective.predict["score"])(params, hidden.reshape(3 * T, -1)[places[[0, 1, 3]]],
                                                          np.array([0, 1, 1, 2]), aims)
    table = log_softmax(want).reshape(3 * T, -1)[places]
    np.testing.assert_allclose(logprob, table[np.arange(4), aims], rtol=2e-4)
    np.testing.assert_array_equal(greedy, table.argmax(-1) == aims)
    positions, last = np.tile(np.arange(T), (3, 1)), np.full((3, T), T - 1)   # a sequence is a tree too
    trees, _ = jax.jit(objective.predict["trees"])(params, tokens, positions, last)
    np.testing.assert_allclose(trees, hidden, rtol=1e-4, atol=1e-5)
    decode, empty = jax.jit(objective.predict["decode"]), Cache.empty(objective.arch, 3, 30)
    last, cache = decode(params, tokens, empty, jnp.array([3, 9, 23]))
    np.testing.assert_allclose(last, want[np.arange(3), [3, 9, 23]], rtol=2e-4, atol=2e-4)
    assert cache.length_B.tolist() == [T] * 3


# --- what is refused ------------------------------------------------------------------------------------------------

class NoFim(ByteTokenizer):
    fim_ids = None


@pytest.mark.parametrize("changes, tokenizer, message", [
    (dict(seq_len=65), TOKENIZER, "config.seq_len=65 exceeds model.max_seq_len=64"),
    ({"model.causal": False}, TOKENIZER, "would see its targets"),
    ({"model.vocab_size": 261}, TOKENIZER, "model.vocab_size=262"),
    ({"objective_args.z_los": 0.1}, TOKENIZER, "objective_args: unknown 'z_los'; did you mean 'z_loss'"),
    ({"objective_args.fim_rate": 1.5}, TOKENIZER, "fim_rate=1.5 .*between 0 and 1"),
    ({"objective_args.fim_rate": 0.5}, NoFim(), "no fill-in-the-middle tokens"),
    ({"objective_args.fim_rate": "abc"}, TOKENIZER, "objective_args.fim_rate='abc': expected float, such as 0.0"),
    ({"objective_args.z_loss": "abc"}, TOKENIZER, "objective_args.z_loss='abc': expected float"),
    ({"objective_args.z_loss": "True"}, TOKENIZER, "objective_args.z_loss=True: expected float"),
    (dict(objective="fm_jax.objectives.causal_lm.CausalLMM"), TOKENIZER, "did you mean 'CausalLM'"),
    (dict(objective="fm_jax.objectives.causal.CausalLM"), TOKENIZER, "in fm_jax.objectives: .* mean 'causal_lm'"),
    (dict(objective="fm_jax.objectivs.causal_lm.CausalLM"), TOKENIZER, "in fm_jax: .* mean 'objectives'"),
    (dict(objective="fm_jax.objectives.causal_lm.x.CausalLM"), TOKENIZER, "no module 'fm_jax.objectives.causal_lm.x'"),
    (dict(objective="nopkg.a.b.C"), TOKENIZER, "no module 'nopkg'; expected package.module.Class"),
    (dict(objective="CausalLM"), TOKENIZER, "expected package.module.Class"),
    (dict(objective=".causal_lm.CausalLM"), TOKENIZER, "expected package.module.Class"),
])
def test_bad_settings_are_refused(changes, tokenizer, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer, **changes)


def test_a_row_without_document_mask_is_one_text():
    """Its loss is that of the row as a single document, at the same targets; with the mask it is another."""
    made = make()
    params = made.init(jax.random.key(0))
    split = made.examples(pack(documents(6, seed=3, low=4, high=9), T)[0], seeds(1))
    split = {name: a[:1] for name, a in split.items()}
    whole = {**split, "positions": np.arange(T, dtype=np.int32)[None], "segment_ids": np.ones((1, T), np.int32)}
    assert split["segment_ids"].max() > 1
    unmasked = make(**{"objective_args.document_mask": False})
    loss = lambda objective, batch: float(objective.loss(params, batch).loss)
    np.testing.assert_allclose(loss(unmasked, split), loss(made, whole), rtol=1e-6)
    assert abs(loss(made, split) - loss(made, whole)) > 1e-4

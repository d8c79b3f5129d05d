"""Decoding: what a loop over full forward passes would give, in any batch, and draws from the stated distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fm_jax import config as config_lib
from fm_jax import decode, objectives, sharding
from fm_jax.errors import UserError

CONTEXT, VOCAB = 32, 64


@pytest.fixture(scope="module")
def model():
    """Returns (objective, random parameters); larger than initial ones, so that the next tokens are far from even."""
    c = config_lib.defaults()
    c.model.update(vocab_size=VOCAB, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48,
                   max_seq_len=CONTEXT, layer_pattern=("local", "global"), window=5)
    c.seq_len = CONTEXT
    objective = objectives.load(config_lib.resolve(c))
    shapes, _ = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return objective, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype), shapes)


@pytest.fixture(scope="module")
def full_logits(model):
    """Returns a function: float32 [V] of what follows `ids`, by the whole forward pass without a cache."""
    objective, params = model
    run = jax.jit(objective.predict["logits"])

    def logits(ids):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(params, padded))[0, len(ids) - 1]
    return logits


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def test_greedy_equals_a_loop_over_full_forward_passes(model, full_logits):
    made = decode.generate(*model, prompts(1, 17, 5, 20), max_new_tokens=12)
    for prompt, tokens in zip(prompts(1, 17, 5, 20), made):
        ids = list(prompt)
        for token in tokens:
            assert token == full_logits(ids).argmax()
            ids.append(token)
        assert len(ids) == len(prompt) + 12 and tokens.dtype == np.int32
    assert len({tuple(m) for m in made}) == 4


def test_a_cut_out_layer_computes_the_same(model):
    objective, params = model
    want = decode.generate(objective, params, prompts(3, 9), max_new_tokens=8)
    got = decode.generate(objective, decode.per_layer(params), prompts(3, 9), max_new_tokens=8)
    np.testing.assert_array_equal(got, want)


def test_a_row_depends_on_its_prompt_and_seed_alone(model):
    """Prompts of other lengths beside it change the padding, the cache's length and the compiled program."""
    sampling = decode.Sampling(1.5, 20, 0.95)
    texts, seeds = prompts(4, 19, 7), np.array([5, 2**32 - 1, 5])
    together = decode.generate(*model, texts, max_new_tokens=10, sampling=sampling, seeds=seeds)
    for i in (0, 2):   # the long one shares its shapes with the three together
        alone, = decode.generate(*model, texts[i : i + 1], max_new_tokens=10, sampling=sampling, seeds=seeds[i : i + 1])
        np.testing.assert_array_equal(alone, together[i])
    backwards = decode.generate(*model, texts[::-1], max_new_tokens=10, sampling=sampling, seeds=seeds[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


def test_seeds_and_places_draw_independently(model):
    same = decode.generate(*model, [prompts(19)[0]] * 3, max_new_tokens=10, sampling=decode.Sampling(1.5, 20, 0.95))
    assert (same[0] != same[1]).any() and (same[1] != same[2]).any()   # seeds 0, 1, 2
    flat = jnp.zeros((2000, VOCAB))
    draw = lambda seeds, places: np.asarray(
        decode.sample(flat, jnp.uint32(seeds), jnp.int32(places), decode.Sampling(1.0)))
    first, second = draw(np.arange(2000), np.zeros(2000)), draw(np.arange(2000), np.ones(2000))
    # Two independent even draws agree once in 64: 31 of 2000, with a standard deviation of 5.5.
    assert 5 < (first == second).sum() < 60


def reference(logits, temperature, top_k, top_p):
    """Returns float64 [V]: the probabilities after top_k, temperature and top_p, token by token."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: top_k or None]
    weights = np.exp((logits[kept].astype(np.float64) - logits.max()) / temperature)
    weights /= weights.sum()
    total, nucleus = 0.0, []
    for token, weight in zip(kept, weights):
        if total >= top_p:
            break
        nucleus.append((token, weight))
        total += weight
    probs = np.zeros(len(logits))
    for token, weight in nucleus:
        probs[token] = weight / total
    return probs


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.7),
                                                       (0.8, 12, 0.8), (1.0, 0, 1e-6), (1.0, 1, 1.0), (2.0, 999, 1.0)])
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(size=40).astype(np.float32) * 1.5
    n = 20_000
    drawn = decode.sample(jnp.tile(logits, (n, 1)), jnp.arange(n, dtype=jnp.uint32), jnp.full(n, 7, jnp.int32),
                          decode.Sampling(temperature, top_k, top_p))
    probs = reference(logits, temperature, top_k, top_p)
    counts = np.bincount(np.asarray(drawn), minlength=40)
    assert not counts[probs == 0].any() and (counts[probs > 20 / n] > 0).all()   # the support is exact
    common = probs * n >= 5
    if common.sum() > 1:   # seeds are fixed: this passes or fails for good; one set of fair draws in 1000 would fail
        expected = np.append(probs[common] * n, max(1e-9, probs[~common].sum() * n))
        observed = np.append(counts[common], counts[~common].sum())
        expected, observed = (x if expected[-1] >= 5 else x[:-1] for x in (expected, observed))
        assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 2.0]])
    drawn = decode.sample(logits, jnp.arange(2, dtype=jnp.uint32), jnp.zeros(2, jnp.int32), decode.Sampling())
    assert drawn.tolist() == [1, 0]   # of a tie, the first


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    logits = jnp.tile(jnp.arange(8.0), (500, 1))   # the last ids are the likeliest
    for temperature in (0.0, 1.0):
        drawn = decode.sample(logits, jnp.arange(500, dtype=jnp.uint32), jnp.zeros(500, jnp.int32),
                              decode.Sampling(temperature, vocab_size=5))
        assert drawn.max() == 4


def test_a_stop_token_ends_its_row_and_no_other(model):
    free = decode.generate(*model, prompts(4, 9, 6), max_new_tokens=12)
    stop = int(free[0][5])
    stopped = decode.generate(*model, prompts(4, 9, 6), max_new_tokens=12, stop_ids=(stop,))
    for row, cut in zip(free, stopped):
        at = np.flatnonzero(row == stop)
        np.testing.assert_array_equal(cut, row[: at[0]] if len(at) else row)
    assert len(stopped[0]) <= 5


def test_a_prompt_longer_than_the_context_is_cut_at_its_left(model):
    long, = prompts(100)
    want = decode.generate(*model, [long[-(CONTEXT - 6):]], max_new_tokens=6)
    np.testing.assert_array_equal(decode.generate(*model, [long], max_new_tokens=6), want)
    full = decode.generate(*model, [long], max_new_tokens=CONTEXT - 1)   # one token of prompt remains
    np.testing.assert_array_equal(full, decode.generate(*model, [long[-1:]], max_new_tokens=CONTEXT - 1))


@pytest.mark.parametrize("texts, tokens, message", [
    (prompts(3), 0, "max_new_tokens=0 must be from 1 to 31"), (prompts(3), CONTEXT, "max_new_tokens=32 must be from 1"),
    ([np.zeros(0, int)], 4, "an empty prompt")])
def test_errors(model, texts, tokens, message):
    with pytest.raises(UserError, match=message):
        decode.generate(*model, texts, max_new_tokens=tokens)


@pytest.mark.parametrize("bad", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}, {"top_k": -1},
                                 {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}])
def test_sampling_outside_its_range_is_refused(model, bad):
    (name, value), = bad.items()
    for texts in (prompts(3), []):
        with pytest.raises(UserError, match=f"{name}={value} must be"):
            decode.generate(*model, texts, max_new_tokens=4, sampling=decode.Sampling(**{"temperature": 1.0, **bad}))


def test_no_prompts_give_no_texts(model):
    assert decode.generate(*model, [], max_new_tokens=4) == []

"""Masks against counts and loops, the loss against a naive NumPy encoder, and that nothing masked is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.step import Program
from fm_jax.tokenizer import ByteTokenizer
import naive

TOKENIZER = ByteTokenizer()
BOS, EOS, MASK = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.vocab_size
T = 40


def config(**changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.masked_lm.MaskedLM"
    c.model.update(vocab_size=MASK + 4, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, max_seq_len=64,
                   causal=False, loss_chunk_tokens=30, position="learned", embed_norm=True, head_transform=True, num_token_types=2)
    c.seq_len, c.batch_size = T, 4
    return config_lib.override(c, changes)


def make(tokenizer=TOKENIZER, **changes):
    return objectives.load(config(**changes), tokenizer)


def records(n, seed=0):
    """Returns n rows of several documents each, BOS and EOS around them, and padding behind the last."""
    rng = np.random.default_rng(seed)
    tokens, segments = np.zeros((2, n, T + 1), np.int32)
    for row in range(n):
        at = 0
        for number in range(1, 4):
            body = rng.integers(0, 256, rng.integers(3, 12))
            piece = np.array([BOS, *body, EOS])[: T + 1 - at]
            tokens[row, at : at + len(piece)], segments[row, at : at + len(piece)] = piece, number
            at += len(piece)
    return {"tokens": tokens, "segment_ids": segments}


def seeds(n, first=0):
    return np.arange(first, first + n, dtype=np.uint64)


def masked(batch, row):
    """Returns {place: target} of a row."""
    return {int(p): int(t) for p, t, w in zip(batch["places"][row], batch["targets"][row], batch["weights"][row]) if w}


@pytest.mark.parametrize("masking", ["token", "span"])
def test_what_is_masked(masking):
    """As many tokens as the rate says, each once, none of BOS, EOS and padding; all others stay as they are."""
    objective, r = make(**{"objective_args.masking": masking, "objective_args.mask_rate": 0.3}), records(50)
    batch = objective.examples(r, seeds(50))
    for row in range(50):
        tokens, chosen = r["tokens"][row, :T], masked(batch, row)
        free = [t for t in range(T) if r["segment_ids"][row, t] > 0 and tokens[t] not in (BOS, EOS)]
        assert len(chosen) == batch["weights"][row].sum() == min(np.ceil(0.3 * len(free)), objective.places)
        assert set(chosen) <= set(free) and all(tokens[p] == t for p, t in chosen.items())
        others = [t for t in range(T) if t not in chosen]
        np.testing.assert_array_equal(batch["tokens"][row, others], tokens[others])
        starts = [t for t in range(T) if t == 0 or r["segment_ids"][row, t] != r["segment_ids"][row, t - 1]]
        np.testing.assert_array_equal(batch["positions"][row], [t - max(s for s in starts if s <= t) for t in range(T)])


def test_what_stands_for_the_masked():
    """Of many, 8 of 10 the mask, 1 random, 1 the same: within four deviations. Random ones are of the tokenizer's."""
    tokens = np.full((400, T + 1), 7, np.int32)
    batch = make(**{"objective_args.mask_rate": 0.5}).examples({"tokens": tokens, "segment_ids": np.ones_like(tokens)},
                                                               seeds(400))
    put = np.array([batch["tokens"][row, p] for row in range(400) for p in masked(batch, row)])
    n, random = len(put), put[(put != MASK) & (put != 7)]
    for share, count in ((0.8, (put == MASK).sum()), (0.1, (put == 7).sum()), (0.1, len(random))):
        assert abs(count - share * n) < 4 * np.sqrt(n * share * (1 - share)) + n * 0.1 / 256
    assert random.min() < 8 and MASK * 0.9 < random.max() < MASK


def test_spans_are_of_neighbours():
    """Runs of masked tokens, of a long row: two and more on average, where single tokens make 1.2."""
    long = dict(**{"objective_args.mask_rate": 0.15, "seq_len": 60})
    tokens = np.random.default_rng(0).integers(0, 256, (300, 61)).astype(np.int32)
    mean = {}
    for masking in ("token", "span"):
        batch = make(**long, **{"objective_args.masking": masking}).examples(
            {"tokens": tokens, "segment_ids": np.ones_like(tokens)}, seeds(300))
        runs = [np.diff(np.flatnonzero(np.diff(np.isin(np.arange(-1, 61), list(masked(batch, row))).astype(int))))[::2]
                for row in range(300)]
        mean[masking] = np.concatenate(runs).mean()
    assert 1.1 < mean["token"] < 1.3 and 2 < mean["span"] < 3.5


def test_masks_are_of_a_rows_seed_alone():
    objective, r = make(), records(8)
    whole = objective.examples(r, seeds(8))
    part = objective.examples({k: v[5:] for k, v in r.items()}, seeds(3, first=5))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[5:], b), whole, part)
    assert any((whole[k] != objective.examples(r, seeds(8, first=100))[k]).any() for k in whole)


def params(objective, seed=3):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    return tree.map_named(lambda n, p: (rng.normal(0, 0.4, p.shape) + ("scale" in n)).astype(np.float32), shapes)


def test_the_loss_is_that_of_numpy():
    """Of packed rows: documents apart, positions from 0 in each, only masked places count."""
    objective = make(**{"objective_args.z_loss": 0.1, "objective_args.mask_rate": 0.3})
    batch, p = objective.examples(records(4), seeds(4)), params(objective)
    loss = objective.loss(p, batch)
    want, correct = 0.0, 0
    for row in range(4):
        real = int((batch["segment_ids"][row] > 0).sum())
        logits = naive.logits(objective.arch, p, batch["tokens"][row, :real].tolist(),
                              segments=batch["segment_ids"][row, :real].tolist(),
                              positions=batch["positions"][row, :real].tolist())
        for place, target in masked(batch, row).items():
            lse = np.log(np.exp(logits[place]).sum())
            want += lse - logits[place, target] + 0.1 * lse ** 2
            correct += logits[place].argmax() == target
    assert float(loss.loss) == pytest.approx(want, rel=1e-4) and float(loss.weight) == batch["weights"].sum()
    assert float(loss.metrics["accuracy"][0]) == correct


def test_nothing_masked_is_seen():
    """Logits at a masked place do not change with the token that was there; nor with another document's tokens."""
    objective, r = make(**{"objective_args.mask_frac": 1.0, "objective_args.random_frac": 0.0}), records(1)
    before = objective.examples(r, seeds(1))
    changed = {k: v.copy() for k, v in r.items()}
    for place, target in masked(before, 0).items():
        changed["tokens"][0, place] = (target + 1) % 256
    after = objective.examples(changed, seeds(1))
    assert (before["targets"] != after["targets"])[before["weights"] > 0].all()
    for name in ("tokens", "positions", "segment_ids", "places", "weights"):
        np.testing.assert_array_equal(before[name], after[name])

    def nll_of_first_document(embedded):
        """Of its masked tokens, by every place's embedding."""
        hidden = objective.module.apply({"params": p}, embedded, method=lambda m, x: m.transformer(
            x, positions_BT=before["positions"], segment_ids_BT=before["segment_ids"])[0])
        return (hidden * (before["segment_ids"] == 1)[..., None]).sum()

    p = params(objective)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 8)), jnp.float32)
    seen = np.abs(np.asarray(jax.grad(nll_of_first_document)(x)))[0].sum(-1) > 0
    np.testing.assert_array_equal(seen, before["segment_ids"][0] == 1)


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2),
                                  pytest.param(dict(fsdp=2, context=2), marks=pytest.mark.slow),
                                  pytest.param(dict(stage=2, fsdp=2), marks=pytest.mark.slow)], ids=str)
def test_every_mesh_trains_the_same(mesh):
    changes = {"seq_len": 32, "batch_size": 8, "optimizer.learning_rate": 1e-2}
    r = {k: v[:, :33] for k, v in records(8).items()}

    def losses(mesh):
        c = config_lib.resolve(config(**changes))
        layout = sharding.Layout(sharding.make_mesh(mesh))
        program = Program(c, objectives.load(c, TOKENIZER, layout), layout)
        state, out = program.init(), []
        for step in range(3):
            batch = program.place(program.objective.examples(r, seeds(8)))
            state, metrics = program.train_step(state, batch, step)
            out.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return out

    np.testing.assert_allclose(losses(mesh), losses(dict(data=1)), rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"model.causal": True}, "sees both sides; set it to False"), ({"model.vocab_size": MASK}, "no id is left"),
    ({"objective_args.masking": "spam"}, "did you mean 'span'"), ({"objective_args.mask_rate": 1.5}, "mask_rate=1.5"),
    ({"objective_args.mask_frac": 0.95}, "shares of 1"), ({"seq_len": 65}, "exceeds model.max_seq_len"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)

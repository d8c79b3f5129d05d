"""Vectors and the loss of pairs against NumPy, the same on every mesh and in microbatches; a run from records to texts."""

import functools
import json

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.data.examples import Record
from fm_jax.errors import UserError
from fm_jax.objectives.text_embedding import POOLINGS
from fm_jax.step import Program
from fm_jax.tokenizer import ByteTokenizer
import naive

TOKENIZER = ByteTokenizer()
B, S, T = 8, 3, 12


def config(**changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.text_embedding.TextEmbedding"
    c.model.update(vocab_size=TOKENIZER.vocab_size, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=12, max_seq_len=16,
                   causal=False, position="learned", embed_norm=True)
    c.seq_len, c.batch_size, c.steps = T, B, 10
    # An update nearly linear in the gradient, as in step_test.
    c.optimizer.update(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    changes = {"objective_args.negatives": S - 2, "objective_args.symmetric": True,
               "objective_args.projection_dim": 4} | changes
    return config_lib.resolve(config_lib.override(c, changes))


def make(mesh=None, **changes):
    c = config(**changes)
    layout = None if mesh is None else sharding.Layout(sharding.make_mesh(mesh))
    return c, objectives.load(c, TOKENIZER, layout), layout


def batch(weights=(1, 1, 0, 1, 1, 1, 0, 1)):
    """Returns a batch of random texts, some of them padding."""
    rng = np.random.default_rng(1)
    return {"tokens": rng.integers(0, 256, (B, S, T), dtype=np.int32), "weights": np.array(weights, np.float32),
            "lengths": rng.integers(2, T, (B, S)).astype(np.int32)}


def params(objective, seed=3):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    return tree.map_named(lambda n, p: (rng.normal(0, 0.4, p.shape) + ("scale" in n)).astype(np.float32), shapes)


def naive_vector(objective, p, tokens, pooling="mean"):
    """Returns float64 [D] of a text alone, before anything that follows the pooling."""
    p = naive._float64(p)
    xs = [p["embed"]["tokens"][t] + p["embed"]["positions"][i] for i, t in enumerate(tokens)]
    xs = [naive.norm(objective.arch, p["embed"]["norm"], x) for x in xs]
    xs = np.stack(naive.stack(objective.arch, p["transformer"], xs))
    return {"mean": xs.mean(0), "max": xs.max(0), "cls": xs[0], "last": xs[-1]}[pooling]


unit = lambda x: x / np.sqrt((x ** 2).sum())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_vector_is_that_of_the_text_alone(pooling):
    """Whatever is behind it in its row: padding has no part in attention or pooling."""
    plain = {"objective_args.projection_dim": 0, "objective_args.normalize": False}
    _, objective, _ = make(**plain, **{"objective_args.pooling": pooling})
    p, data = params(objective), batch()
    got = jax.jit(objective.predict["embed"])(p, data["tokens"][:, 0], data["lengths"][:, 0])
    want = [naive_vector(objective, p, t[:n], pooling) for t, n in zip(data["tokens"][:, 0], data["lengths"][:, 0])]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_loss_is_that_of_numpy():
    """Of sentence-transformers' formula, in both directions; padding is nobody's candidate."""
    _, objective, _ = make()
    p, data = params(objective), batch()
    vectors = np.array([[unit(np.tanh(naive_vector(objective, p, t[:n]) @ p["projection"] + p["projection_bias"]))
                         for t, n in zip(*row)] for row in zip(data["tokens"], data["lengths"])])
    np.testing.assert_allclose(jax.jit(objective.embed)(p, data), vectors, atol=1e-5)
    real = np.flatnonzero(data["weights"])
    texts, candidates = vectors[real, 0], np.concatenate([vectors[real, 1], vectors[real, 2]])
    scores, own = 20 * texts @ candidates.T, np.arange(len(real))
    there = np.log(np.exp(scores).sum(1)) - scores[own, own]
    back = np.log(np.exp(scores[:, own]).sum(0)) - scores[own, own]
    loss = objective.loss_of(p, vectors, data)
    assert float(loss.loss) == pytest.approx(((there + back) / 2).sum(), rel=1e-5) and float(loss.weight) == len(real)
    assert float(loss.metrics["accuracy"][0]) == (scores.argmax(1) == own).sum()
    one_way = make(**{"objective_args.symmetric": False})[1].loss_of(p, vectors, data)
    assert float(one_way.loss) == pytest.approx(there.sum(), rel=1e-5)
    assert (jax.grad(lambda v: objective.loss_of(p, v, batch([0] * B)).loss)(vectors) == 0).all()   # nor NaN


def run(mesh, data, **changes):
    """Returns (losses, gradient norms, initial and final parameters) of two steps."""
    c, objective, layout = make(mesh, **changes)
    program = Program(c, objective, layout)
    host = lambda t: {n: np.array(a) for n, a in tree.flatten(t).items()}
    state, losses, norms = program.init(), [], []
    start = host(state.params)
    for step, each in enumerate(data):
        state, metrics = program.train_step(state, program.place(each), step)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
    return losses, norms, start, host(state.params)


DATA = [batch(), batch((1, 0, 1, 1, 1, 1, 1, 1))]
one_device = functools.cache(lambda: run(dict(data=1), DATA))


@pytest.mark.parametrize("mesh, microbatches", [(dict(fsdp=2, tensor=2), 4), (dict(data=2, context=2), 1)],
                         ids=str)
def test_every_mesh_and_number_of_microbatches_trains_the_same(mesh, microbatches):
    """Negatives are those of the whole batch: loss, gradient norm and every parameter; sums in another order."""
    want, got = one_device(), run(mesh, DATA, accumulation_steps=microbatches)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4)
    for n in want[3]:
        moved = np.abs(want[3][n] - want[2][n]).max()
        assert moved > 0, f"{n} was not trained"
        np.testing.assert_allclose(got[3][n], want[3][n], rtol=0, atol=1e-4 * moved + 1e-6, err_msg=n)


def test_records_become_framed_texts():
    _, objective, _ = make()
    record = Record({"text": "ab", "positive": "c" * 50, "negative": "d"}, "x.jsonl, line 7")
    got = objective.examples([record, None], np.zeros(2, np.uint64))
    begin, end = TOKENIZER.bos_id, TOKENIZER.eos_id
    assert got["lengths"].tolist() == [[4, T, 3], [1, 1, 1]] and got["weights"].tolist() == [1, 0]
    assert got["tokens"][0, 0, :4].tolist() == [begin, 97, 98, end]
    assert got["tokens"][0, 1].tolist() == [begin, *[99] * (T - 2), end]
    for changes, message in [({"negative": None}, "x.jsonl, line 7: needs texts as 'text' and 'positive' and 1 as "),
                             ({"positive": ["c"]}, "needs texts"), ({"negative": ["d", "e"]}, "needs texts"),
                             ({"text": ""}, "needs texts")]:
        with pytest.raises(UserError, match=message):
            objective.examples([Record(record | changes, record.place)], np.zeros(1, np.uint64))


@pytest.mark.parametrize("changes, message", [
    ({"objective_args.pooling": "first"}, "pooling: unknown 'first'"), ({"seq_len": 17}, "seq_len=17 exceeds"),
    ({"objective_args.scale": 0.0}, "scale=0.0 must be positive"), ({"model.tie_embeddings": False}, "untied head"),
    ({"objective_args.projection_activation": "relu"}, "projection_activation: unknown 'relu'"),
    ({"seq_len": 2}, "leave no room"), ({"objective_args.text_key": 3}, "expected str"),
])
def test_a_setting_that_cannot_be_is_named(changes, message):
    with pytest.raises(UserError, match=message) as error:
        make(**changes)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="accumulation_steps=2 with mesh.context=2: "):
        make(dict(context=2), accumulation_steps=2)


def test_a_run_learns_which_texts_belong_together(inline, tmp_path):
    """From records to the vectors of texts it has not seen, by the commands; and stopped and resumed, the same."""
    animals, colours = ("cat", "dog", "hen", "pig", "owl", "fox"), ("red", "tan", "blue", "pink", "grey", "lime")
    pairs = [{"text": f"{a} {i}", "positive": f"the {a}"} for a in (*animals, *colours) for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    code, _, err = inline("prepare", "--examples", f"--source={tmp_path}/pairs.jsonl", "--tokenizer=bytes",
                          f"--output={tmp_path}/data", "--validation_frac=0.2")
    assert code == 0, err
    flags = ["--config=configs/text_embedding.py:tiny", f"--config.data.train={tmp_path}/data", "--config.steps=60",
             "--config.seq_len=16", "--config.optimizer.learning_rate=0.003", "--config.log.progress=false",
             "--config.checkpoint.every=30", "--config.eval.every=30", "--config.mesh.data=1", "--config.log.every=30"]
    for last in (["--config.steps=30"], []):   # the schedule is of 60 steps in one alone: constant
        code, _, err = inline("train", *flags, *last, "--config.optimizer.schedule=constant",
                              f"--workdir={tmp_path}/run")
        assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 60
    lm = fm_jax.load(tmp_path / "run")
    texts = ["an owl", "a fox", "all pink", "so grey", "the owl", "the fox", "the pink", "the grey"]
    vectors = lm.embed(texts)
    np.testing.assert_allclose((vectors ** 2).sum(1), 1, rtol=1e-5)
    assert ((vectors[:4] @ vectors[4:].T).argmax(1) == np.arange(4)).all()
    assert lm.embed([]).shape == (0, 32)
    long = lm.embed(["owl " * 50, "a"])   # cut, and in a row beside a short one
    np.testing.assert_allclose(long, np.concatenate([lm.embed(["owl " * 50]), lm.embed(["a"])]), atol=1e-5)
    for call in (lambda: lm.generate(["a"]), lambda: lm.score(["a"], ["b"]), lambda: lm.logits(np.zeros((1, 2), int))):
        with pytest.raises(UserError, match="TextEmbedding, which cannot .*; it has embed, hidden"):
            call()

"""The contrastive losses against NumPy, the same on every mesh and in microbatches; what becomes of records."""

import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.step import Program
from fm_jax.tokenizer import ByteTokenizer
import naive

TOKENIZER = ByteTokenizer()
B, T, SIZE = 8, 10, 12
TOWER = dict(num_layers=2, num_heads=2, mlp_dim=12, norm="layernorm", norm_bias=True, gated_mlp=False, qkv_bias=True,
             attention_out_bias=True, mlp_bias=True, activation="quick_gelu", position="learned")
KINDS = {
    "softmax": ({"model.pooling": "end", "encoder.pooling": "first", "encoder.class_token": True, "encoder.embed_norm":
                 True, "encoder.patch_bias": False, "encoder.max_seq_len": 10, "objective_args.projection_dim": 4}),
    "sigmoid": ({"model.pooling": "last", "model.causal": False, "encoder.pooling": "attention",
                 "encoder.max_seq_len": 9, "objective_args.projection_dim": 0, "objective_args.projection_bias": True}),
}


def config(kind="softmax", **changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.image_text.ImageText"
    c.model.update(vocab_size=TOKENIZER.vocab_size, embed_dim=8, max_seq_len=T, **TOWER)
    c.encoder.update(embed_dim=12, mlp_dim=20, patch_size=4)
    c.seq_len, c.batch_size, c.steps = T, B, 10
    # An update nearly linear in the gradient, as in step_test.
    c.optimizer.update(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    # Of 11 pixels a side, the last three fill no patch.
    changes = {"objective_args.loss": kind, "objective_args.image_size": SIZE + 3, "objective_args.mean": (.4, .5, .6),
               "objective_args.std": (.3, .2, .25), **KINDS[kind], **changes}
    return config_lib.resolve(config_lib.override(c, changes))


def make(kind="softmax", mesh=None, **changes):
    c = config(kind, **changes)
    layout = None if mesh is None else sharding.Layout(sharding.make_mesh(mesh))
    return c, objectives.load(c, TOKENIZER, layout), layout


def batch(weights=(1, 1, 0, 1, 1, 1, 0, 1)):
    """Returns a batch of random texts and images, some of them padding."""
    rng = np.random.default_rng(1)
    out = {"tokens": rng.integers(0, 256, (B, T), dtype=np.int32), "length": rng.integers(2, T, B).astype(np.int32),
           "weights": np.array(weights, np.float32), "cut": np.arange(B) < 3,
           "images": rng.integers(0, 256, (B, SIZE + 3, SIZE + 3, 3), dtype=np.uint8)}
    return out


def params(objective, seed=3):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    return tree.map_named(lambda n, p: (rng.normal(0, 0.4, p.shape) + ("scale" in n)).astype(np.float32), shapes)


def naive_vectors(objective, p, data):
    """Returns (image, text): unit vectors, float64 [B, U], with one patch and one head at a time."""
    p = naive._float64(p)
    text, image, out = objective.arch, objective.encoder, ([], [])
    unit = lambda x: x / np.sqrt((x ** 2).sum())
    for row in range(B):
        pixels = (data["images"][row] / 255 - [.4, .5, .6]) / [.3, .2, .25]
        e = p["image"]["embed"]
        xs = [e["class_token"]] if image.class_token else []
        for top in range(0, SIZE, 4):
            for left in range(0, SIZE, 4):
                patch = pixels[top : top + 4, left : left + 4]
                xs.append(sum(patch[i, j, c] * e["patches"][i, j, c] for i in range(4) for j in range(4)
                              for c in range(3)) + e.get("bias", 0))
        xs = [x + position for x, position in zip(xs, e["positions"], strict=True)]
        xs = [naive.norm(image, e["norm"], x) for x in xs] if image.embed_norm else xs
        xs = naive.stack(image, p["image"]["transformer"], xs)
        if image.pooling == "attention":
            pool = p["image"]["pool"]
            y, = naive.attention(image, pool["attention"], [pool["query"]], xs, lambda t, s: True, None, False, True)
            vector = y + naive.mlp(image, pool["mlp"], naive.norm(image, pool["norm"], y))
        else:
            vector = xs[0] @ p["image_projection"]
        out[0].append(unit(vector))
        length = data["length"][row]   # of "last" too: what is behind is padding of a batch
        embed = p["text"]["embed"]
        xs = [embed["tokens"][t] + embed["positions"][i] for i, t in enumerate(data["tokens"][row, :length])]
        xs = naive.stack(text, p["text"]["transformer"], xs)
        out[1].append(unit(xs[-1] @ p["text_projection"] + p.get("text_bias", 0)))
    return tuple(map(np.stack, out))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_numpy(kind):
    """And the scale of a softmax is 100 at most. Padding is in no pair."""
    _, objective, _ = make(kind)
    p, data = params(objective), batch()
    assert tree.count(p["image"]) == objective.encoder.param_count()
    p["logit_scale"] = np.float32(1.2)
    image, text = naive_vectors(objective, p, data)
    got = objective.embed(p, data)
    np.testing.assert_allclose(got[0], image, atol=1e-5)
    np.testing.assert_allclose(got[1], text, atol=1e-5)
    real = [i for i in range(B) if data["weights"][i]]
    for scale in (1.2, 6.0):
        p["logit_scale"] = np.float32(scale)
        factor = min(np.exp(scale), 100) if kind == "softmax" else np.exp(scale)
        s = image @ text.T * factor + float(p.get("logit_bias", 0))
        if kind == "softmax":
            lse = lambda scores: np.log(np.exp(scores).sum())
            want = sum((lse(s[i, real]) + lse(s[real, i])) / 2 - s[i, i] for i in real)
        else:
            want = sum(np.log1p(np.exp((-1 if i == j else 1) * s[i, j])) for i in real for j in real)
        loss = objective.loss(p, data)
        assert float(loss.loss) == pytest.approx(want, rel=1e-4) and float(loss.weight) == len(real)
        assert float(loss.metrics["cut_frac"][0]) == 2
        hits = sum(s[i, i] == s[i, real].max() for i in real), sum(s[i, i] == s[real, i].max() for i in real)
        assert tuple(float(loss.metrics[f"{n}_accuracy"][0]) for n in ("image_to_text", "text_to_image")) == hits
    unbounded = s if kind == "sigmoid" else image @ text.T * np.exp(6)
    np.testing.assert_allclose(objective.similarity(p, *got), unbounded, rtol=1e-3)


def run(kind, mesh, data, **changes):
    """Returns (losses, gradient norms, initial and final parameters) of two steps."""
    c, objective, layout = make(kind, mesh, **changes)
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
one_device = functools.cache(lambda kind: run(kind, dict(data=1), DATA))


@pytest.mark.parametrize("kind, mesh, microbatches", [
    ("softmax", dict(data=1), 4), ("softmax", dict(data=2, fsdp=2, tensor=2), 1),
    ("sigmoid", dict(fsdp=2, tensor=2), 2),
], ids=str)
def test_every_mesh_and_number_of_microbatches_trains_the_same(kind, mesh, microbatches):
    """Loss, gradient norm and every parameter after two steps; float32 sums in another order."""
    want, got = one_device(kind), run(kind, mesh, DATA, accumulation_steps=microbatches)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4)
    for n in want[3]:
        moved = np.abs(want[3][n] - want[2][n]).max()
        assert moved > 0 or n.endswith("k_bias"), f"{n} was not trained"   # softmax does not see a bias of all keys
        np.testing.assert_allclose(got[3][n], want[3][n], rtol=0, atol=1e-4 * moved + 1e-6, err_msg=n)


def test_microbatches_take_the_memory_of_one():
    """Of a wide batch in 8 parts, the step's temporaries are near those of a batch that is one part."""
    def need(size, microbatches):
        c, objective, layout = make("softmax", dict(data=1), batch_size=size, accumulation_steps=microbatches)
        program = Program(c, objective, layout)
        step = jax.jit(jax.grad(lambda params, batch: program._loss(params, batch, None).loss))
        return step.lower(program.abstract.params, program.batch_spec).compile().memory_analysis().temp_size_in_bytes
    assert need(256, 8) < need(256, 1) / 3


def png(size=(20, 14), colour=(200, 30, 30)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "png")
    return out.getvalue()


def test_examples_of_records():
    """A text of several is drawn in training, and is the first in validation; a long one keeps its end token; what
    cannot be read, and padding, count for nothing."""
    _, objective, _ = make()
    records = [{"image": png(), "text": ["ab", "c", "d"]}, {"image": png(), "text": "x" * 30},
               {"image": png()[:60], "text": "e"}, None]
    seeds = np.arange(4, dtype=np.uint64)
    held_out = objective.examples(records, seeds, train=False)
    assert {n: (a.shape[1:], a.dtype) for n, a in held_out.items()} == {
        n: (s.shape[1:], s.dtype) for n, s in objective.batch_spec(4).items()}
    end = TOKENIZER.eos_id
    assert held_out["tokens"][0, :3].tolist() == [97, 98, end] and held_out["length"].tolist() == [3, T, 2, 1]
    assert held_out["tokens"][1].tolist() == [120] * (T - 1) + [end]
    assert make("sigmoid")[1].text_ids(["ab"])[0].tolist() == [97, 98, end] + [TOKENIZER.pad_id] * (T - 3)
    assert held_out["weights"].tolist() == [1, 1, 0, 0] and held_out["cut"].tolist() == [False, True, False, False]
    assert (held_out["images"][0] == (200, 30, 30)).all()
    drawn = {int(objective.examples(records[:1], np.array([s], np.uint64))["tokens"][0, 0]) for s in range(30)}
    assert drawn == {97, 99, 100}
    with pytest.raises(UserError, match="unknown 'text'; did you mean 'txt'"):
        objective.examples([{"image": png(), "txt": "a"}], seeds[:1])


@pytest.mark.parametrize("changes, message", [
    ({"objective_args.loss": "softmx"}, "did you mean 'softmax'"), ({"model.pooling": "none"}, "pooling='none'"),
    ({"encoder.patch_size": 0, "encoder.class_token": False}, "needs a patch_size"),
    ({"encoder.max_seq_len": 11}, "square number"), ({"objective_args.std": (1.0, 0.0, 1.0)}, "each of the 3 channels"),
    ({"objective_args.image_size": 3}, "image_size=3 is below"), ({"objective_args.resize": "crp"}, "mean 'crop'"),
    ({"seq_len": 11}, "exceeds"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_a_mesh_that_cuts_sequences_is_refused():
    with pytest.raises(UserError, match="mesh.context=2 is for sequences of tokens"):
        make(mesh=dict(context=2))

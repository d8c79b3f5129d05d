"""The classifier's loss against NumPy, on a mesh, in microbatches; which labels are taken."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.errors import UserError
from fm_jax.step import Program

B, CLASSES = 8, 5


def make(mesh=None, **changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.image_classification.ImageClassification"
    c.model.update(causal=False, position="learned", num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, max_seq_len=5,
                   patch_size=4, channels=1, class_token=True, pooling="first")
    c.batch_size, c.seq_len = B, 5
    c.optimizer.update(learning_rate=1.0, schedule="constant", warmup_steps=0, eps=1.0, clip_norm=0.0)
    changes = {"objective_args.num_classes": CLASSES, "objective_args.image_size": 8, "objective_args.mean": (0.2,),
               "objective_args.std": (0.5,), "objective_args.label_smoothing": 0.2, **changes}
    c = config_lib.resolve(config_lib.override(c, changes))
    layout = None if mesh is None else sharding.Layout(sharding.make_mesh(mesh))
    return c, objectives.load(c, None, layout), layout


def batch(objective):
    out = objective.random_batch(B, np.random.default_rng(0))
    out["weights"][3] = 0
    return out


def test_the_loss_is_that_of_numpy():
    """Of the logits, whose tower is held to NumPy in image_text_test and to transformers in hf_vision_test."""
    _, objective, _ = make()
    p = sharding.unbox(objective.init(jax.random.key(0)))[0]
    p["head"] = np.random.default_rng(1).normal(size=p["head"].shape).astype(np.float32)
    data = batch(objective)
    logits, loss = np.asarray(objective.classify(p, data["images"]), np.float64), objective.loss(p, data)
    want = right = 0
    for i in range(B):
        if i != 3:
            log_p = logits[i] - np.log(np.exp(logits[i]).sum())
            want -= sum((0.8 * (c == data["labels"][i]) + 0.2 / CLASSES) * log_p[c] for c in range(CLASSES))
            right += logits[i].argmax() == data["labels"][i]
    assert float(loss.loss) == pytest.approx(want, rel=1e-5) and float(loss.weight) == B - 1
    assert float(loss.metrics["accuracy"][0]) == right
    vector, (hidden, _) = objective.embed_image(p, data["images"]), objective.hidden_image(p, data["images"])
    np.testing.assert_array_equal(vector, hidden[:, 0])
    np.testing.assert_allclose(vector @ p["head"], logits, rtol=1e-4, atol=1e-5)
    assert objective.embed_image(p, np.zeros((1, 12, 16, 1), np.uint8)).shape == (1, 8)   # positions are interpolated


def test_a_mesh_and_microbatches_train_the_same():
    def run(mesh, **changes):
        c, objective, layout = make(mesh, **changes)
        program = Program(c, objective, layout)
        state, out = program.init(), []
        for step in range(2):
            state, metrics = program.train_step(state, program.place(batch(objective)), step)
            out.append(float(metrics["loss"][0] / metrics["loss"][1]))
        return out, {n: np.array(a) for n, a in tree.flatten(state.params).items()}

    want, got = run(dict(data=1)), run(dict(data=2, fsdp=2, tensor=2), accumulation_steps=2)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for n in want[1]:
        np.testing.assert_allclose(got[1][n], want[1][n], atol=1e-5, err_msg=n)


def test_labels_are_numbers_or_names():
    out = io.BytesIO()
    Image.new("L", (9, 9), 51).save(out, "png")
    record = lambda label: {"image": out.getvalue(), "label": label}
    _, objective, _ = make(**{"objective_args.classes": ("a", "b", "c", "d", "e")})
    made = objective.examples([record(2), record("e"), None, {"image": b"", "label": 1}], np.arange(4, dtype=np.uint64))
    assert made["labels"].tolist() == [2, 4, 0, 1] and made["weights"].tolist() == [1, 1, 0, 0]
    assert made["images"].shape == (4, 8, 8, 1) and (made["images"][:2] == 51).all()
    for label in (5, -1, "f", True, 1.0, None):
        with pytest.raises(UserError, match=f"'label' is {label!r}.*below num_classes=5, or one of a, b, c, d, e"):
            objective.examples([record(label)], np.zeros(1, np.uint64))


@pytest.mark.parametrize("changes, message", [
    ({"objective_args.classes": ("a",)}, "as many as the 1 names"),
    ({"objective_args.label_smoothing": 1.0}, "label_smoothing=1.0"),
    ({"model.pooling": "end"}, "needs a patch_size, and pooling"), ({"model.channels": 2}, "1 .grey. or 3"),
    ({"model.position": "rope"}, "must be 'learned'"), ({"model.causal": True}, "must be False"),
    ({"objective_args.min_crop_area": 0.0}, "min_crop_area=0.0"),
    ({"objective_args.filter": "cubic"}, "did you mean 'bicubic'"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)

"""What a model says of data: the teacher's tokens and the reference of pairs, and who learns from them; fewer layers."""

import json

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import annotate, config as config_lib, objectives, shrink
from fm_jax.data import batches, documents, examples, prepared
from fm_jax.errors import UserError

T, K = 64, 8


@pytest.fixture(scope="module")
def lm(tiny_run):
    return fm_jax.load(tiny_run[0])


@pytest.fixture(scope="module")
def taught(data, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught") / "taught"
    annotate.annotate(tiny_run[0], data, folder, seq_len=T, top_k=K, batch_size=4)
    return folder


def config_of(lm, folder, **args):
    config = lm.config.copy_and_resolve_references()
    config.seq_len, config.data.train, config.objective = T, str(folder), "fm_jax.objectives.distill.Distill"
    with config.unlocked():
        config.objective_args = {"top_k": K} | args
    return config


def test_a_teacher_s_tokens_are_those_of_its_logits(lm, data, taught):
    for split in prepared.SPLITS:
        rows = prepared.Rows(taught, split, T)
        number = np.arange(len(rows))[[0, 3, -1]]
        found, plain = rows[number], prepared.Rows(data, split, T)[number]
        np.testing.assert_array_equal(found["tokens"], plain["tokens"])
        row, segments = 2, found["segment_ids"][2, :-1]
        for segment in range(1, segments.max() + 1):   # each document alone
            at = segments == segment
            last = at[-1] == 0 and segment == segments.max()
            logits = lm.logits(found["tokens"][row, :-1][at][None])[0]
            logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, : lm.tokenizer.vocab_size]
            upto = at.sum() - last   # a split's last token is an input to nothing
            np.testing.assert_array_equal(found["teacher_ids"][row, at][:upto], np.argsort(-logp)[:upto, :K])
            # 2e-3: float16.
            np.testing.assert_allclose(found["teacher_logprobs"][row, at][:upto], -np.sort(-logp)[:upto, :K], rtol=2e-3)
    with pytest.raises(UserError, match="its teacher saw rows of 64 tokens"):
        prepared.Rows(taught, "train", 32)


def test_a_student_that_is_its_teacher_has_no_gradient(lm, taught):
    objective = objectives.load(config_of(lm, taught, alpha=1.0), lm.tokenizer)
    batch = batches.open_batches(config_of(lm, taught), objective).batch(0)
    grad = jax.jit(jax.grad(lambda p: objective.loss(p, batch, None).loss / batch["weights"].sum()))
    size = lambda p: max(float(np.abs(g).max()) for g in jax.tree.leaves(grad(p)))
    other = jax.tree.map(lambda a: a + 0.01 * jax.random.normal(jax.random.key(1), a.shape), lm.params)
    # 1%: the teacher's log-probabilities are kept in float16.
    assert size(lm.params) < 0.01 * size(other)


def test_teachers_are_not_mixed(lm, data, taught):
    config = config_of(lm, f"{taught},{data}")
    with pytest.raises(UserError, match="another teacher than the rest"):
        batches.open_batches(config, objectives.load(config, lm.tokenizer))


def test_pairs_get_the_reference_that_training_begins_with(lm, tiny_run, inline, tmp_path):
    pairs = [{"prompt": f"{n}: ", "chosen": "a" * (1 + n % 5), "rejected": "b" * (1 + n % 3)} for n in range(24)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    examples.prepare(documents.open_sources(str(tmp_path / "x.jsonl")), tmp_path / "pairs", tokenizer="bytes",
                     validation_frac=0.25)
    flags = [f"--model={tiny_run[0]}", f"--data={tmp_path / 'pairs'}", f"--output={tmp_path / 'out'}", "--seq_len=64"]
    code, out, err = inline("annotate", *flags)
    assert code == 0 and "a reference of each pair" in out, err
    assert "already there" in inline("annotate", *flags)[1]
    assert code == 0
    for split in prepared.SPLITS:
        plain, made = examples.Examples(tmp_path / "pairs", split), examples.Examples(tmp_path / "out", split)
        assert len(plain) == len(made) > 0
        for before, record in zip(plain[np.arange(len(plain))], made[np.arange(len(made))]):
            reference = record.pop("reference")
            assert record == before
            ids = lambda text: [256, *record["prompt"].encode(), *text.encode(), 257]
            for answer in ("chosen", "rejected"):
                whole = ids(record[answer])
                logits = lm.logits(np.array([whole]))[0].astype(np.float64)
                logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                begin = len(record["prompt"]) + 1
                want = sum(logp[i - 1, whole[i]] for i in range(begin, len(whole)))
                assert reference[answer] == pytest.approx(want, rel=1e-4)
    # A run that begins with that model starts; one that begins with another does not.
    train = ["train", f"--config=configs/preference.py:dpo,{tiny_run[0]}", f"--config.data.train={tmp_path / 'out'}",
             "--config.seq_len=64", "--config.batch_size=8", "--config.mesh.data=1", "--config.steps=2",
             "--config.checkpoint.every=2", f"--workdir={tmp_path / 'dpo'}"]
    code, _, err = inline(*train, "--config.checkpoint.init_from=")
    assert code == 2 and "another model than the one that this run begins with" in err, err
    assert not (tmp_path / "dpo" / "config.json").exists()
    code, out, err = inline(*train)
    assert code == 0 and "reward_accuracy" in out, err
    assert fm_jax.load(tmp_path / "dpo").generate(["0: "], max_new_tokens=2)


def test_a_run_of_some_layers(lm, tiny_run, inline, tmp_path):
    code, out, _ = inline("shrink", f"--model={tiny_run[0]}", "--layers=1", f"--workdir={tmp_path / 'half'}")
    half = fm_jax.load(tmp_path / "half")
    assert code == 0 and half.config.model.num_layers == 1
    for name in lm.params:
        if name != "transformer":
            jax.tree.map(np.testing.assert_array_equal, half.params[name], lm.params[name])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), half.params["transformer"]["layers"],
                 lm.params["transformer"]["layers"])
    _, same = shrink.shrink(lm.config, lm.params, [0, 1])
    jax.tree.map(np.testing.assert_array_equal, same, lm.params)
    for layers, message in (("2", "numbers from 0 to 1"), ("a", "give numbers")):
        code, _, err = inline("shrink", f"--model={tiny_run[0]}", f"--layers={layers}", f"--workdir={tmp_path / 'no'}")
        assert code == 2 and message in err

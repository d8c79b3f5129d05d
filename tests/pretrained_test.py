"""What `fm_jax.load` gives: the trained model, ready to use, on any mesh."""

import json
import shutil

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import checkpoint, config as config_lib, objectives, pretrained, tree
from fm_jax.errors import UserError


@pytest.fixture(scope="module")
def lm(tiny_run):
    return fm_jax.load(tiny_run[0])


def tokens(*shape, vocab=262):
    return np.random.default_rng(0).integers(0, vocab, shape)


def test_it_has_what_the_run_had(lm, tiny_run):
    folder, _ = tiny_run
    assert lm.config.name == "causal_lm:tiny" and lm.config.steps == 12
    assert lm.tokenizer.fingerprint == json.loads((folder / "run.json").read_text())["tokenizer"]
    stored = tree.flatten(checkpoint._read_item(folder / "checkpoints" / "12" / "ema", None))
    for name, array in tree.flatten(lm.params).items():   # the average of the parameters, as this run keeps one
        np.testing.assert_array_equal(array, stored[name])
    assert set(tree.flatten(lm.params)) == set(stored) and "37,024 parameters" in repr(lm)


def test_step_and_average_can_be_chosen(lm, tiny_run):
    folder, _ = tiny_run
    raw, older = pretrained.load(folder, ema=False), fm_jax.load(folder, step=4)
    want = tree.flatten(checkpoint.restore_params(folder, 12))
    got = tree.flatten(raw.params)
    assert all((np.asarray(got[n]) == want[n]).all() for n in want)
    t = tokens(1, 8)
    assert (raw.logits(t) != lm.logits(t)).any() and (older.logits(t) != lm.logits(t)).any()
    with pytest.raises(UserError, match="unknown 5.*known: 4, 8, 12"):
        fm_jax.load(folder, step=5)


def test_logits_and_hidden_are_the_modules(lm):
    t = tokens(3, 20)
    hidden, logits = lm.hidden(t), lm.logits(t)
    assert (hidden.shape, logits.shape) == ((3, 20, 32), (3, 20, 512)) and hidden.dtype == logits.dtype == np.float32
    want, _, _ = lm.module.apply({"params": lm.params}, t)
    np.testing.assert_allclose(hidden, want, atol=1e-5)   # compiled and not: float32 sums in another order
    embedding = np.asarray(lm.params["embed"]["tokens"])   # tied
    np.testing.assert_allclose(logits, hidden @ embedding.T, atol=1e-4)
    np.testing.assert_allclose(lm.logits(t[:, :7]), logits[:, :7], atol=1e-5)   # causal


def test_scores_equal_the_logits(lm):
    (logprob, _, n), = lm.score(["To be"], [" or not"])
    ids = [*b"To be or not"]
    logits = lm.logits(np.array([ids])).astype(np.float64)[0]
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = sum(table[i - 1, ids[i]] for i in range(len("To be"), len(ids)))
    assert logprob == pytest.approx(want, abs=1e-4) and n == len(" or not")
    with pytest.raises(UserError, match="2 contexts for 1 continuations"):
        lm.score(["a", "b"], ["c"])


def test_generate_continues_text(lm):
    texts = lm.generate(["To be", "Or not to be, that is"], max_new_tokens=8, stop_at_end=False)
    ids = [lm.tokenizer.bos_id, *b"To be"]
    for _ in range(8):
        ids.append(int(lm.logits(np.array([ids]))[0, -1].argmax()))
    assert texts[0] == lm.tokenizer.decode(ids[6:]) and all(isinstance(t, str) for t in texts)
    draw = lambda seed: lm.generate(["To be"] * 2, max_new_tokens=8, temperature=1.0, seed=seed, stop_at_end=False)
    assert draw(0) == draw(0) != draw(5) and draw(0)[1] == draw(1)[0]   # prompt i draws from seed + i
    with pytest.raises(UserError, match="give a list of texts"):
        lm.generate("To be")
    assert lm.generate([]) == []


def test_embeddings_do_not_depend_on_what_is_beside_or_behind(lm):
    got = lm.embed(["a text", "another, longer text" * 20])
    assert got.shape == (2, 32) and got.dtype == np.float32
    np.testing.assert_allclose(lm.embed(["a text"])[0], got[0], atol=1e-6)
    hidden = lm.hidden(np.array([[lm.tokenizer.bos_id, *b"a text"]]))[0]
    np.testing.assert_allclose(got[0], hidden.mean(0), atol=1e-5)   # padded and not


def test_another_mesh_gives_the_same(lm, tiny_run):
    other = fm_jax.load(tiny_run[0], mesh={"data": 2, "fsdp": 2, "tensor": 2})
    shards = {len(p.sharding.device_set) for p in jax.tree.leaves(other.params)}
    assert shards == {8} and any(not p.is_fully_replicated for p in jax.tree.leaves(other.params))
    t = tokens(3, 16)   # three rows, on a mesh that cuts the batch into four
    np.testing.assert_allclose(other.logits(t), lm.logits(t), atol=1e-5)   # sums over devices in another order
    np.testing.assert_allclose(other.hidden(t[:1]), lm.hidden(t[:1]), atol=1e-5)
    np.testing.assert_allclose(other.embed(["a text"]), lm.embed(["a text"]), atol=1e-5)
    assert other.score(["To be"], [" or not"])[0].logprob == pytest.approx(lm.score(["To be"], [" or not"])[0].logprob,
                                                                          abs=1e-4)
    ours, theirs = (m.generate(["To be", "A", "Or not"], max_new_tokens=6) for m in (other, lm))
    assert ours == theirs


@pytest.mark.parametrize("bad, message", [
    (np.zeros((1, 257), int), "257 tokens exceed the model's context of 256"), (np.array([[1, 512]]), "token id 512 is "
     "outside the vocabulary of 512"), (np.array([[-1]]), "token id -1"), (np.zeros(4, int), "expected integers"),
    (np.zeros((1, 4)), r"tokens are float64\[1, 4\]; expected integers")])
def test_bad_tokens_are_named(lm, bad, message):
    for function in (lm.logits, lm.hidden):
        with pytest.raises(UserError, match=message):
            function(bad)


def test_folders_without_a_run_are_named(tmp_path, tiny_run):
    with pytest.raises(UserError, match="no run here .no config.json.; train one with"):
        fm_jax.load(tmp_path)
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoints here"):
        fm_jax.load(run)
    with pytest.raises(UserError, match="needs 16 devices, this machine .cpu. has 8"):
        fm_jax.load(tiny_run[0], mesh={"data": 16})

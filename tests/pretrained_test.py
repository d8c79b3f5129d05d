"""What `fm_jax.load` gives: the trained model, ready to use, on any mesh."""

import io
import json
import lzma
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

import fm_jax
from fm_jax import checkpoint, config as config_lib, decode, objectives, pretrained, tree
from fm_jax import tokenizer as tokenizers
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
    assert lm.step == 12 and fm_jax.load(folder, step=4).step == 4
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
    with pytest.raises(UserError, match="top_p=0 must be above 0"):
        lm.generate(["To be"], temperature=1.0, top_p=0)


def test_completions_do_not_depend_on_the_batch(lm, monkeypatch):
    """Seven prompts of many lengths, three continuations each: in batches of 16 rows, and one by one."""
    prompts = [np.array([256, *b"To be or not to be, that is the question"[:k]]) for k in (40, 3, 17, 9, 30, 1, 22)]
    how = dict(max_new_tokens=9, temperature=1.0, top_k=50, logprobs=1)
    calls, complete = [], decode.complete
    monkeypatch.setattr(decode, "complete", lambda *args, **kw: calls.append(len(args[2]) * kw["n"]) or complete(
        *args, **kw))
    together = lm.complete(prompts, n=3, seed=5, **how)
    assert len(together) == 21 and calls == [15, 15]   # the last batch is filled up: no new shape
    for i, each in enumerate(together):
        (alone,) = lm.complete([prompts[i // 3]], seed=5 + i, **how)
        np.testing.assert_array_equal(each.tokens, alone.tokens)
        np.testing.assert_allclose(each.logprobs, alone.logprobs, atol=1e-4)   # sums of other shapes
    many = lm.complete(prompts[:1], n=18, seed=5, **how)   # more than a batch
    assert [m.tokens.tolist() for m in many[:3]] == [m.tokens.tolist() for m in together[:3]] and len(many) == 18
    with pytest.raises(UserError, match="n=0 must be at least 1"):
        lm.complete(prompts, n=0)


def test_stop_strings_end_a_completion_with_the_token_that_completes_them(lm):
    prompt = [np.array([256, *b"To be"])]
    (whole,) = lm.complete(prompt, max_new_tokens=12)
    text = lm.tokenizer.decode(whole.tokens)
    stop = text[4:6]
    (ended,) = lm.complete(prompt, max_new_tokens=12, stop=["never", stop])
    assert ended.finish == "stop" and lm.tokenizer.decode(ended.tokens) == text[: text.index(stop) + 2]
    (ended,) = lm.complete(prompt, max_new_tokens=12, stop_ids=[int(whole.tokens[5])])
    assert ended.tokens.tolist() == whole.tokens[: whole.tokens.tolist().index(whole.tokens[5])].tolist()
    assert lm.generate(["To be"], max_new_tokens=12, stop=[stop], stop_at_end=False) == [text[: text.index(stop)]]
    with pytest.raises(UserError, match="an empty stop string"):
        lm.complete(prompt, stop=[""])


def test_prompts_begin_as_in_training_or_as_their_tokenizer_says(lm, monkeypatch):
    template = "{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "Hi"}]
    rendered = [256, *b"user:Hi", 257]
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    ids = lambda lm, *prompts: [i.tolist() for i in lm.prompt_ids(prompts)]
    assert ids(lm, "a<s>", chat, "") == [[256, *b"a<s>"], rendered, [256]]
    config = lm.config.copy_and_resolve_references()
    config.data.train = ""   # as of weights from elsewhere
    other = pretrained.Pretrained(config, lm.tokenizer, lm.objective, lm.params)
    assert ids(other, "a<s>", chat, "") == [[*b"a", 256], rendered, [256]]
    monkeypatch.setattr(lm.tokenizer, "adds_bos", True, raising=False)
    assert ids(other, "a", chat, "<s>a", "") == [[256, *b"a"], rendered, [256, *b"a"], [256]]
    for bad in (chat, [3]):
        with pytest.raises(UserError, match="prompts: expected texts, got"):
            lm.prompt_ids(bad)
    assert lm.generate([chat], max_new_tokens=4, stop_at_end=False) == [lm.tokenizer.decode(
        lm.complete([np.array(rendered)], max_new_tokens=4)[0].tokens)]


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_generated_text_keeps_its_spaces(kind, lm, tmp_path, monkeypatch):
    """Published tokenizers put a space before every text and take it off again."""
    shakespeare = pathlib.Path(fm_jax.__file__).parent / "data" / "shakespeare.txt.xz"
    lines = lzma.decompress(shakespeare.read_bytes())[:100_000].decode().splitlines()
    if kind == "sentencepiece":   # its default options
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=400,
                                                 minloglevel=2)
        (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    else:                         # as of Llama 2 and Gemma
        model = hf.Tokenizer(hf.models.BPE())
        model.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("\u2581"),
                                                    hf.normalizers.Replace(" ", "\u2581")])
        model.pre_tokenizer = hf.pre_tokenizers.Split("\u2581", "merged_with_next")
        model.decoder = hf.decoders.Sequence([hf.decoders.Replace("\u2581", " "), hf.decoders.Fuse(),
                                              hf.decoders.Strip(" ", 1, 0)])
        model.train_from_iterator(lines, hf.trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False))
        model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load(tmp_path)
    other = pretrained.Pretrained(lm.config, tokenizer, lm.objective, lm.params)
    # What the model says is given: a new word, or the end of one.
    word, end = tokenizer.encode("is dead"), tokenizer.encode("O, the king")[len(tokenizer.encode("O")):]
    assert tokenizer.decode(word) == "is dead"
    twice = " is dead" if kind == "tokenizer.json" else "is dead"   # SentencePiece reads "the king " as "the king"
    for prompt, new, want in [("the king", word, " is dead"), ("O", end, ", the king"), ("", word, "is dead"),
                              ("the  king", word, " is dead"), ("  the king", word, " is dead"),
                              ("\ufb01", word, " is dead"), ("the king ", word, twice)]:
        monkeypatch.setattr(decode, "complete", lambda *args, **kwargs: [types.SimpleNamespace(tokens=new)])
        assert other.generate([prompt]) == [want], prompt


def test_texts_are_lists_of_texts(lm):
    assert lm.generate([]) == lm.score([], []) == lm.score_texts([]) == []
    assert lm.embed([]).shape == (0, 32) and lm.embed([]).dtype == np.float32
    assert lm.embed(iter(["a", "b"])).shape == (2, 32)
    for call, name in [(lm.generate, "prompts"), (lm.embed, "texts"), (lm.score_texts, "texts"),
                       (lambda text: lm.score(text, ["a"] * 5), "contexts"),
                       (lambda text: lm.score(["a"] * 5, text), "continuations")]:
        for text in ("To be", b"To be"):
            with pytest.raises(UserError, match=f"{name}=.*give a list of texts"):
                call(text)
        with pytest.raises(UserError, match=f"{name}: expected texts, got 3"):
            call(["a", 3, "a", "a", "a"])


def test_new_parameters_are_used_at_once(tiny_run, lm):
    other = fm_jax.load(tiny_run[0], step=4)
    say = lambda model: model.generate(["To be", "A"], max_new_tokens=6, stop_at_end=False)
    older, newest = say(other), say(lm)
    assert older != newest
    other.params = lm.params
    assert say(other) == newest
    made = other._layers[1]
    assert say(other) == newest and other._layers[1] is made   # and not made again for nothing
    other.params = {**other.params, "embed": {**other.params["embed"]}}
    other.params["embed"]["tokens"] = -other.params["embed"]["tokens"]   # one array of them, in place
    assert say(other) != newest


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
    np.testing.assert_allclose(other.score_texts(["a text", "b" * 300]), lm.score_texts(["a text", "b" * 300]),
                               atol=1e-3)
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


@pytest.mark.parametrize("text, want", [("", None), ("fsdp=4,tensor=2", {"fsdp": 4, "tensor": 2}),
                                        ("data=-1", {"data": -1})])
def test_meshes_from_text(text, want):
    assert pretrained.parse_mesh(text) == want


@pytest.mark.parametrize("text, message", [
    ("fdsp=4", "--mesh=fdsp=4: axis: unknown 'fdsp'; did you mean 'fsdp'"), ("8", "unknown '8'"),
    ("fsdp", "as in fsdp=4,tensor=2; got 'fsdp'"), ("data=x", "got 'data=x'"), ("data=2,data=4", "got 'data=4'")])
def test_meshes_that_are_none_are_named(text, message):
    with pytest.raises(UserError, match=message):
        pretrained.parse_mesh(text)

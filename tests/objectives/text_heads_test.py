"""Heads: what a row is, losses and metrics against naive NumPy, entities against a loop, and that each learns."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding
from fm_jax.data import documents, examples
from fm_jax.data.batches import values
from fm_jax.data.examples import Record
from fm_jax.errors import UserError
from fm_jax.objectives.text_heads import best_spans, bio, count_entities, entities
from fm_jax.pretrained import Pretrained
from fm_jax.step import Program
from fm_jax.tokenizer import ByteTokenizer
from fm_jax.train import train

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
T = 24


def config(name, **changes):
    c = config_lib.defaults()
    c.objective = f"fm_jax.objectives.text_heads.{name}"
    c.model.update(vocab_size=264, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_seq_len=32, causal=False,
                   num_token_types=2)
    c.seq_len, c.batch_size = T, 8
    return config_lib.override(c, changes)


def make(name, layout=None, **args):
    c = config(name)
    c.objective_args.update(args)
    return objectives.load(c, TOKENIZER, layout)


def init(objective, seed=0):
    return sharding.unbox(jax.jit(objective.init)(jax.random.key(seed)))[0]


def batch_of(objective, records):
    return objective.examples(records, np.arange(len(records), dtype=np.uint64))


@pytest.fixture(scope="module")
def classifier():
    objective = make("TextClassification", labels=("a", "b", "c"), pair_key="other")
    return objective, init(objective)


def pair(text, other, label="a"):
    return {"text": text, "other": other, "label": label}


def test_a_row_is_both_texts_between_the_tokenizer_s_ends_and_the_longer_is_cut(classifier):
    """Of T = 24 places three are BOS and EOS, and 21 are left for both."""
    objective, _ = classifier
    for a, b in ((5, 7), (30, 4), (4, 30), (30, 30), (10, 11), (21, 1)):
        made = batch_of(objective, [pair("x" * a, "y" * b), None])
        row, n = made["tokens"][0].tolist(), made["lengths"][0]
        text = "".join(chr(i) if i < 256 else "|" for i in row[:n])
        left, right = re.fullmatch(r"\|(x+)\|(y+)\|", text).groups()
        assert len(left) + len(right) == min(a + b, 21) and not any(row[n:])
        assert (len(left), len(right)) == (a, b) or min(a, b) in (len(left), len(right)) or abs(
            len(left) - len(right)) <= 1
        assert made["types"][0].tolist() == [0] * (2 + len(left)) + [1] * (1 + len(right)) + [0] * (T - n)
        assert made["weights"].tolist() == [1, 0] and made["lengths"][1] == 1
    assert batch_of(objective, [pair("x", "y", "c")])["labels"][0] == 2


def test_loss_is_of_the_text_alone_and_padding_weighs_nothing(classifier):
    objective, params = classifier
    records = [pair("to be", "or not", "a"), pair("that", "is", "b"), pair("the", "question", "c")]
    loss = jax.jit(objective.loss)
    made = batch_of(objective, records)
    whole = loss(params, made)
    alone = [loss(params, batch_of(objective, [r])) for r in records]
    np.testing.assert_allclose(whole.loss, sum(x.loss for x in alone), rtol=1e-5)
    padded = loss(params, batch_of(objective, [*records, None, None]))
    assert padded.weight == 3
    np.testing.assert_allclose(padded.loss, whole.loss, rtol=1e-5)
    made["tokens"][0, made["lengths"][0]:] = 77     # behind the text
    np.testing.assert_array_equal(loss(params, made).loss, whole.loss)
    scores = np.asarray(jax.jit(objective.scores)(params, made), np.float64)
    nll = np.log(np.exp(scores).sum(-1)) - scores[np.arange(3), made["labels"]]
    np.testing.assert_allclose(whole.loss, nll.sum(), rtol=1e-5)
    np.testing.assert_allclose(whole.metrics["accuracy"][0], (scores.argmax(-1) == made["labels"]).sum())


@pytest.mark.parametrize("pooling, causal", [("mean", False), ("max", False), ("cls", False), ("last", True)])
def test_pooling_is_of_the_text_s_own_states(pooling, causal):
    c = config("TextRegression", **{"objective_args.pooling": pooling, "model.causal": causal})
    objective = objectives.load(c, TOKENIZER)
    params = init(objective, seed=1)
    made = batch_of(objective, [{"text": "abcdef", "value": 1.5}, {"text": "xy", "value": -2}])
    scores, hidden_of = jax.jit(objective.outputs)(params, made["tokens"], made["lengths"]), jax.jit(objective.hidden)
    for i, n in enumerate(made["lengths"]):
        hidden = np.asarray(hidden_of(params, made["tokens"][i : i + 1, :n])[0][0])
        pooled = {"mean": hidden.mean(0), "max": hidden.max(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        expected = pooled @ params["head"][:, 0] + params["head_bias"][0]
        np.testing.assert_allclose(scores[i], expected, rtol=1e-4, atol=1e-5)
    loss = jax.jit(objective.loss)(params, made)
    error = np.asarray(scores) - [1.5, -2]
    np.testing.assert_allclose(loss.loss, (error ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["absolute_error"][0], np.abs(error).sum(), rtol=1e-5)


# --- words and entities ---------------------------------------------------------------------------------------------


def test_entities_of_every_tagging_of_four_words():
    """All 5 ** 4 taggings against conlleval's rules, word by word; and counted pairwise as the sets' intersection."""
    labels = ["O", "B-x", "I-x", "B-y", "I-y"]
    begins, kinds = map(jnp.array, bio(labels))
    every = list(itertools.product(range(5), repeat=4))

    def naive(tags):
        found, begun, kind = set(), None, None
        for i in range(5):
            tag = labels[tags[i]] if i < 4 else "O"
            if begun is not None and not (tag == f"I-{kind}"):
                found.add((begun, i, kind))
                begun = None
            if begun is None and tag != "O":
                begun, kind = i, tag[2:]
        return found

    sets = [naive(tags) for tags in every]
    assert sets == [set(entities([labels[t] for t in tags])) for tags in every]
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, len(every), (2, 3000))
    got = jax.jit(count_entities)(jnp.array(every)[a], jnp.array(every)[b], begins, kinds)
    both = sum(len(sets[i] & sets[j]) for i, j in zip(a, b))
    expected = [both, sum(len(sets[i]) for i in a), sum(len(sets[j]) for j in b)]
    assert [float(x) for x in got] == expected


def test_words_meet_their_first_tokens_in_every_tokenizer(tmp_path):
    """The text of the tokens from a word's place on begins with the word; spans give back the text of every token."""
    import tokenizers as hf
    from fm_jax import tokenizer as ours
    words = ["Zo\u00eb", "went", "to", "\u6771\u4eac", ",", "OK\u2581so", "\U0001f600", "again"]
    text = " ".join(words * 20)
    spm = ours.train_sentencepiece([text, "we went to an oak tree, so to speak " * 9], 330, tmp_path / "spm")
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = hf.decoders.ByteLevel()
    bpe.train_from_iterator([text], hf.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"],
                                                           initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(tmp_path / "tokenizer.json"))
    c = config("TokenClassification", **{"model.vocab_size": 400, "model.max_seq_len": 128, "seq_len": 128})
    c.objective_args.labels = ("O", "B-x", "I-x")
    for tokenizer in (TOKENIZER, spm, ours.load(tmp_path / "tokenizer.json")):
        [(ids, spans)] = tokenizer.encode_spans([" ".join(words)])
        np.testing.assert_array_equal(ids, tokenizer.encode(" ".join(words)))
        assert (np.diff(spans[:, 0]) >= 0).all() and spans.max() == len(" ".join(words))
        row, places = objectives.load(c, tokenizer).words(words)
        assert (places >= 0).all() and (np.diff(places) > 0).all()
        for word, at in zip(words, places):
            if word.isascii():      # others may begin with a token of a part of a character
                assert tokenizer.decode(row[at:]).lstrip().startswith(word)


def tagged(words, tags):
    return {"words": words.split(), "tags": tags.split()}


def test_tags_are_counted_by_whole_entities_and_those_that_are_cut_off_as_missed():
    objective = make("TokenClassification", labels=("O", "B-x", "I-x"))
    params = init(objective)
    short = tagged("ab cd ef gh", "B-x I-x O B-x")
    # 22 bytes have room: the last three words begin behind them; more words than places are lost altogether.
    long = tagged("aaaaaaaaaa bbbbbbbbbb cc dd ee", "O B-x I-x O B-x")
    many = tagged(" ".join("a" * 30), " ".join(["B-x"] + ["O"] * 25 + ["B-x", "I-x", "O", "B-x"]))
    made = batch_of(objective, [short, long, many, None])
    assert made["places"][0, :4].tolist() == [1, 4, 7, 10] and made["weights"][:2, :6].tolist() == [
        [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert made["lost"].tolist() == [0, 0, 2, 0] and made["weights"].sum(1).tolist() == [4, 2, 11, 0]
    for answer, both, found in ((made["labels"], None, None), (np.zeros_like(made["labels"]), 0, 0)):
        # A head that says a given tag at each place: one-hot through the scores.
        right = np.zeros((4, T, 3), np.float32)
        for row, word in zip(*np.nonzero(made["weights"])):
            right[row, made["places"][row, word], answer[row, word]] = 9
        objective.scores = lambda *_: jnp.asarray(right)
        metrics = objective.loss(params, made).metrics
        both, found = (3, 4) if both is None else (both, found)
        # Gold: 2 + 2 + 3. Found of what is seen: ab cd, gh; bbb (without its cc: wrong); the first a.
        assert [float(x) for x in metrics["f1"]] == [2 * both, found + 7]
        assert [float(x) for x in metrics["recall"]] == [both, 7] and float(metrics["precision"][1]) == found


# --- answers --------------------------------------------------------------------------------------------------------


def asked(question, context, *answers):
    return {"question": question, "context": context,
            "answers": {"text": list(answers), "answer_start": [context.index(a) for a in answers]}}


def test_answers_are_where_their_characters_are():
    objective = make("QuestionAnswering")
    made = batch_of(objective, [asked("who", "it was \u00c9va.", "\u00c9va"), asked("who", "nobody"),
                                asked("who", "far " * 8 + "away", "away"), None])
    row = made["tokens"][0]
    first, last = made["first"][0], made["last"][0]
    assert bytes(row[first : last + 1].tolist()).decode() == "\u00c9va" and made["context"][0, first : last + 1].all()
    assert bytes(row[made["context"][0] > 0][1:].tolist()).decode() == "it was \u00c9va."
    assert made["weights"].tolist() == [1, 1, 0, 0] and made["counts"].tolist() == [1, 1, 1, 0]
    assert (made["first"][1], made["last"][1]) == (0, 0)     # none: the first token
    params = init(objective)
    scores = np.zeros((4, T, 2), np.float32)
    scores[0, first, 0] = scores[0, last - 1, 1] = scores[1, 0] = 9
    objective.scores = lambda *_: jnp.asarray(scores)
    metrics = objective.loss(params, made).metrics
    assert [float(x) for x in metrics["token_exact"]] == [1, 3]     # the second; the cut one counts, and is missed
    np.testing.assert_allclose(metrics["token_f1"][0], 2 * 3 / (3 + 4) + 1, rtol=1e-6)


def test_the_best_span_is_that_of_a_loop():
    scores = np.random.default_rng(0).normal(size=(5, 90, 2)).astype(np.float32)
    objective = make("QuestionAnswering")
    for row, first, last in zip(scores, *best_spans(jnp.asarray(scores))):
        every = [(row[i, 0] + row[j, 1], i, j) for i in range(90) for j in range(i, min(i + 64, 90))]
        assert max(every)[1:] == (first, last)
        assert objective.best(row, 0, 90)[:2] == (first, last)


# --- all of them ----------------------------------------------------------------------------------------------------

NAMES = ["ann", "bob", "eve", "kim"]


def learnable(n=160, seed=0):
    """Returns records from which each head can learn something: of which two words there are how many, and where."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        words = [str(w) for w in rng.choice(["go", "up", "in", "at"], 4)]
        who = str(rng.choice(NAMES))
        at = int(rng.integers(0, 4))
        words[at] = who
        text = " ".join(words)
        out.append({"text": text, "label": who, "value": float(NAMES.index(who)) - 1.5, "words": words,
                    "tags": ["B-who" if w == who else "O" for w in words], "question": "who", "context": text,
                    "answers": {"text": [who], "answer_start": [text.index(who)]}})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    (root / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in learnable()))
    examples.prepare(documents.open_sources(str(root / "x.jsonl")), root / "data", tokenizer="bytes",
                     validation_frac=0.2, split_by="text")
    return root / "data"


@pytest.mark.parametrize("name, metric", [("TextClassification", "accuracy"), ("TextRegression", "loss"),
                                          ("TokenClassification", "f1"), ("QuestionAnswering", "token_exact")])
def test_each_learns_and_predicts_from_its_folder(folder, tmp_path, name, metric):
    """One on two devices, cut by rows and by parameters; the held-out metric is what the loaded model's answers give."""
    import fm_jax
    c = config(name, **{"data.train": str(folder), "data.validation": "", "batch_size": 32, "steps": 60,
                        "optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 5, "eval.every": 60,
                        "checkpoint.every": 60, "log.every": 30, "mesh.data": 1, "model.num_layers": 1,
                        "mesh.fsdp": 2 if name == "TextClassification" else 1})
    train(c, tmp_path / name)
    last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
    got = next(json.loads(line) for line in reversed((tmp_path / name / "metrics.jsonl").read_text().splitlines())
               if f"validation/{metric}" in line)[f"validation/{metric}"]
    held = examples.Examples(folder, "validation")
    records = held[np.arange(len(held))]
    lm = fm_jax.load(tmp_path / name)
    if name == "TextClassification":
        found = lm.classify([r["text"] for r in records])
        assert list(lm.objective.labels) == NAMES and all(abs(sum(f.values()) - 1) < 1e-5 for f in found)
        mine = np.mean([max(f, key=f.get) == r["label"] for f, r in zip(found, records)])
    elif name == "TextRegression":
        mine = np.mean((np.array(lm.rate([r["text"] for r in records])) - [r["value"] for r in records]) ** 2)
    elif name == "TokenClassification":
        tags = lm.tag([r["words"] for r in records])
        pairs = [(set(entities(t)), set(entities(r["tags"]))) for t, r in zip(tags, records)]
        mine = 2 * sum(len(a & b) for a, b in pairs) / sum(len(a) + len(b) for a, b in pairs)
    else:
        answers = lm.answer(["who"] * len(records), [r["context"] for r in records])
        mine = np.mean([a == r["answers"]["text"][0] for a, r in zip(answers, records)])
        far = "at go " * 30 + records[0]["answers"]["text"][0]     # five rows long
        assert lm.answer(["who"], [far])[0] in far
    np.testing.assert_allclose(mine, got, rtol=1e-3)
    assert got < 0.7 if name == "TextRegression" else got > 0.8, last
    with pytest.raises(UserError, match="which cannot score texts; it has"):
        lm.score(["a"], ["b"])


def test_a_masked_model_s_encoder_enters_by_name(folder, tmp_path, command):
    """Its embedding and its stack become the classifier's, of the same names; the head is fresh."""
    from fm_jax import checkpoint, tree
    masked = config("TextClassification", **{"steps": 1, "eval.every": 0, "log.every": 1, "mesh.data": 1})
    masked.objective = "fm_jax.objectives.masked_lm.MaskedLM"
    masked.model.vocab_size = 300
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in learnable()))
    from fm_jax.data import prepared
    prepared.prepare(documents.open_sources(str(tmp_path / "t.jsonl")), "bytes", tmp_path / "text", validation_frac=0.2)
    masked.data.train = str(tmp_path / "text")
    train(masked, tmp_path / "masked")
    c = config("TextClassification", **{"steps": 1, "eval.every": 0, "data.train": str(folder), "log.every": 1,
                                        "mesh.data": 1, "model.vocab_size": 300, "optimizer.learning_rate": 0.0,
                                        "optimizer.weight_decay": 0.0, "checkpoint.init_from": str(tmp_path / "masked"),
                                        "checkpoint.init_pattern": "(embed|transformer).*"})
    train(c, tmp_path / "head")
    objective = objectives.load(objectives.settled(c, values(c)), TOKENIZER)
    abstract = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    ours, theirs = (tree.flatten(checkpoint.restore_params(tmp_path / name, 1, a)) for name, a in (
        ("head", abstract), ("masked", {k: v for k, v in abstract.items() if k in ("embed", "transformer")})))
    assert set(ours) - set(theirs) == {"head", "head_bias"}
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize("name, args, record, message", [
    ("TextClassification", {}, {"text": "x", "label": "d"}, "line 7: 'label' is 'd', which is none of the 3 labels"),
    ("TextClassification", {}, {"text": "x"}, "line 7: no label as 'label', but None"),
    ("TextClassification", {}, {"text": "x", "label": " "}, "line 7: no label as 'label', but ' '"),
    ("TextClassification", {}, {"text": " ", "label": "a"}, "line 7: no text as 'text', but ' '"),
    ("TextClassification", dict(pair_key="other"), {"text": "x", "label": "a"}, "no text as 'other'.*pair_key"),
    ("TextRegression", {}, {"text": "x", "value": "3"}, "line 7: 'value' is '3', not a number"),
    ("TextRegression", {}, {"text": "x", "value": float("nan")}, "line 7: 'value' is nan, not a number"),
    ("TokenClassification", {}, tagged("a b", "O"), "line 7: 'words' and 'tags' must be lists of .* got 2 and 1"),
    ("TokenClassification", {}, tagged("a b", "O B-z"), "line 7: 'B-z' in 'tags' is none of the labels"),
    ("TokenClassification", {}, {"words": ["a b"], "tags": ["O"]}, "line 7: 'a b' in 'words' is no word"),
    ("QuestionAnswering", {}, {"question": "q", "context": "c", "answers": "c"}, "line 7: 'answers' must be"),
    ("QuestionAnswering", {}, {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [2]}},
     "line 7: the answer 'b' is not at character 2 of the context"),
])
def test_a_bad_record_is_named(name, args, record, message):
    labels = {"TextClassification": ("a", "b", "c"), "TokenClassification": ("O", "B-x", "I-x")}.get(name)
    objective = make(name, **args | ({"labels": labels} if labels else {}))
    with pytest.raises(UserError, match=message) as error:
        batch_of(objective, [Record(record, "data/x/train/records.jsonl, line 7")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, args, known, message", [
    ("TextClassification", {}, {}, "label_key='label': the training data has no such field"),
    ("TextClassification", {}, {"label": ["a"]}, "labels=\\['a'\\]: two names or more"),
    ("TextClassification", dict(labels=("a", "c")), {"label": ["a", "b"]}, "labels: 'c' has no example in the train"),
    ("TextClassification", dict(labels=("a", "a")), {"label": ["a"]}, "all different"),
    ("TextClassification", dict(pooling="first"), {"label": ["a", "b"]}, "pooling: unknown 'first'"),
    ("TextClassification", dict(lables=("a",)), {"label": ["a", "b"]}, "did you mean 'labels'"),
    ("TokenClassification", {}, {"tags": ["NN", "O"]}, "the tag 'NN', and .*scheme='bio'"),
    ("TokenClassification", dict(labels=("B-x", "I-x")), {"tags": ["B-x", "I-x"]}, "there is no O"),
])
def test_bad_labels_are_one_clear_line(name, args, known, message):
    c = config(name)
    c.objective_args.update(args)
    with pytest.raises(UserError, match=message) as error:
        objectives.load(objectives.settled(c, known), TOKENIZER)
    assert "\n" not in str(error.value)


def test_tags_come_with_both_of_b_and_i_and_labels_in_the_order_of_the_data():
    c = objectives.settled(config("TokenClassification"), {"tags": ["B-y", "I-x", "O"]})
    assert c.objective_args.labels == ("O", "B-x", "I-x", "B-y", "I-y")
    c = objectives.settled(config("TextClassification"), {"label": [0, 2, 10]})
    assert c.objective_args.labels == ("0", "2", "10")


def test_inputs_of_predictions_are_checked(classifier):
    objective, params = classifier
    lm = Pretrained(config("TextClassification"), TOKENIZER, make("TextClassification", sharding.Layout(
        sharding.make_mesh({"data": 1})), labels=("a", "b", "c"), pair_key="other"), params)
    with pytest.raises(UserError, match="was trained on pairs: give the second text"):
        lm.classify(["a"])
    with pytest.raises(UserError, match="1 others for 2 texts"):
        lm.classify(["a", "b"], ["c"])
    with pytest.raises(UserError, match="which cannot tag words"):
        lm.tag([["a"]])
    assert len(lm.classify(["a", "b"], ["c", "d"])) == 2 and lm.classify([], []) == []

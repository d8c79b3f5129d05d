"""Speech: rows of examples, the rules of timestamps, and transcripts against decoding without a cache."""

import jax
import numpy as np
import pytest
import tokenizers as hf_tokenizers

from fm_jax import audio, objectives, sharding, tree
from fm_jax import config as config_lib
from fm_jax.errors import UserError
from fm_jax.pretrained import Pretrained
from fm_jax.step import Program
from fm_jax.tokenizer import HuggingFaceTokenizer

SPECIALS = ["endoftext", "startoftranscript", "en", "fr", "translate", "transcribe", "notimestamps"]
WORDS = 20
END, START, EN, FR, TRANSLATE, TRANSCRIBE, BARE = range(WORDS, WORDS + 7)
FIRST, VOCAB = BARE + 1, BARE + 1 + 61   # timestamps to 1.2 s
S = 60                                   # places that the encoder makes: 1.2 s


@pytest.fixture(scope="module")
def tokenizer():
    made = hf_tokenizers.Tokenizer(hf_tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = hf_tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([f"<|{name}|>" for name in SPECIALS])
    return HuggingFaceTokenizer(made.to_str().encode(), None, "test")


def config(**changes):
    c = config_lib.defaults()
    c.objective = "fm_jax.objectives.speech.SpeechRecognition"
    c.objective_args.num_mels = 9
    c.model.update(vocab_size=VOCAB, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=12, max_seq_len=14,
                   cross_attention=True, position="learned", norm="layernorm", norm_bias=True, qkv_bias=True,
                   key_bias=False, gated_mlp=False, activation="gelu")
    c.encoder.update(max_seq_len=S, position="none")
    c.seq_len, c.batch_size = 14, 4
    return config_lib.override(c, changes)


def params(objective, seed=3):
    rng = np.random.default_rng(seed)
    shapes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))[0]
    return tree.map_named(lambda n, p: (rng.normal(0, 0.5, p.shape) + ("scale" in n)).astype(np.float32), shapes)


def sounds(n=3):
    return [(np.random.default_rng(i).normal(size=9000 + 3000 * i) * 0.1).astype(np.float32) for i in range(n)]


def test_an_example_is_a_sound_and_what_the_decoder_is_told_and_says(tokenizer):
    objective = objectives.load(config(), tokenizer)
    records = [{"audio": sounds()[0], "text": "w3 w4"}, None,
               {"audio": sounds()[1], "text": " ".join(["w5"] * 30), "language": "fr"}]
    batch = objective.examples(records, np.arange(3, dtype=np.uint64))
    np.testing.assert_array_equal(batch["frames"][0], audio.log_mel(sounds()[0], 9, 2 * S))
    np.testing.assert_array_equal(batch["tokens"][0, :7], [START, EN, TRANSCRIBE, BARE, 3, 4, 0])
    np.testing.assert_array_equal(batch["targets"][0, :7], [EN, TRANSCRIBE, BARE, 3, 4, END, 0])
    np.testing.assert_array_equal(batch["weights"].sum(1), [6, 0, 14])
    assert batch["tokens"][2, 1] == FR and batch["targets"][2, -1] == END and not batch["frames"][1].any()
    spec = objective.batch_spec(3)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {n: (a.shape, a.dtype) for n, a in spec.items()}
    with pytest.raises(UserError, match="no field 'text' .fields here: audio."):
        objective.examples([{"audio": sounds()[0]}], np.zeros(1, np.uint64))


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_trains_the_same_and_leaves_positions_alone(mesh, tokenizer):
    records = [{"audio": sounds()[i % 3], "text": f"w{i} w7"} for i in range(8)]

    def run(mesh):
        c = config_lib.resolve(config(batch_size=8, **{
            "optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.0, "model.num_layers": 1}))
        layout = sharding.Layout(sharding.make_mesh(mesh))
        program = Program(c, objectives.load(c, tokenizer, layout), layout)
        state, out = program.init(), []
        before = np.asarray(state.params["stem"]["positions"])
        for step in range(3):
            batch = program.place(program.objective.examples(records, np.arange(8, dtype=np.uint64)))
            state, metrics = program.train_step(state, batch, step)
            out.append(float(metrics["loss"][0] / metrics["loss"][1]))
        np.testing.assert_array_equal(before, state.params["stem"]["positions"])
        return out

    want = run(dict(data=1))
    np.testing.assert_allclose(run(mesh), want, rtol=1e-5)
    assert want[-1] < want[0]


def test_timestamps_come_in_pairs_and_never_go_back(tokenizer):
    never = (3, 4, *range(END + 1, FIRST))   # as of published models: all special tokens but the end
    objective = objectives.load(config(**{"objective_args.suppress_ids": never,
                                          "objective_args.begin_suppress_ids": (END,)}), tokenizer)
    change, rng, ended = objective.allowed(True), np.random.default_rng(0), 0
    for _ in range(300):
        row, going = (), True
        while going and len(row) < 40:
            logits = change(rng.normal(0, 3, (1, VOCAB)).astype(np.float32), [row])[0]
            assert np.isfinite(logits).any()
            row += (int(logits.argmax()),)
            going = row[-1] != END
        told = [t for t in row if t >= FIRST]
        assert row[0] >= FIRST and row[0] - FIRST <= 50 and told == sorted(told) and not set(never) & set(row)
        kinds = "".join("t" if t >= FIRST else "." if t == END else "w" for t in row)
        assert "ttt" not in kinds and "wtw" not in kinds[1:]   # what ends a part begins the next by another
        ended += not going
        for text in objective.segments(row, 5.0, 1.2):
            assert 5 <= text[0] <= text[1] <= 6.21
    assert ended > 100
    bare = objective.allowed(False)(np.zeros((2, VOCAB), np.float32), [(), (1,)])
    assert np.isinf(bare[:, FIRST:]).all() and np.isinf(bare[0, END]) and bare[1, END] == 0


def test_segments_by_hand(tokenizer):
    objective = objectives.load(config(), tokenizer)
    row = [FIRST, 1, 2, FIRST + 10, FIRST + 10, 5, FIRST + 30]
    assert objective.segments(row, 30.0, 1.2) == [(30.0, 30.2, "w1 w2"), (30.2, pytest.approx(30.6), "w5")]
    assert objective.segments([FIRST + 5, 1], 0.0, 1.2) == [(0.1, 1.2, "w1")]
    assert objective.segments([1, 2], 0.0, 1.2) == [(0.0, 1.2, "w1 w2")] and objective.segments([], 0.0, 1.2) == []


@pytest.fixture(scope="module")
def lm(tokenizer):
    c = config()
    objective = objectives.load(c, tokenizer, sharding.Layout(sharding.make_mesh({"data": 1})))
    return Pretrained(c, tokenizer, objective, params(objective))


def test_a_transcript_is_the_likeliest_words(lm, tokenizer):
    heard = lm.transcribe(sounds(2), language="fr", task="translate")
    for sound, each in zip(sounds(2), heard):
        tokens, frames = [START, FR, TRANSLATE, BARE], audio.log_mel(sound, 9, 2 * S)[None]
        while len(tokens) < 14:   # without a cache
            logits = lm.logits(frames, decoder_tokens=np.array([tokens]))[0, -1]
            tokens.append(int(logits[:FIRST].argmax()))
            if tokens[-1] == END:
                break
        assert each.text == tokenizer.decode([t for t in tokens[4:] if t != END]) and each.language == "fr"
    logits = [lm.logits(audio.log_mel(x, 9, 2 * S)[None], decoder_tokens=np.array([[START]]))[0, 0] for x in sounds(2)]
    found = [each.language for each in lm.transcribe(sounds(2), num_beams=2)]
    assert found == [("en", "fr")[int(x[[EN, FR]].argmax())] for x in logits]


def test_long_sounds_go_by_windows_and_silence_says_nothing(lm):
    T = 2 * S * audio.HOP
    a, b = sounds()[2][:T], np.pad(sounds()[0], (0, T - len(sounds()[0])))
    of = lambda *which, **how: [each.text for each in lm.transcribe(which, language="en", **how)]
    parts = of(a[:T], b)
    assert of(np.concatenate([np.pad(a, (0, T - len(a))), b]))[0].split() == " ".join(parts).split()
    quiet, = lm.transcribe([np.zeros(100)], language="en")
    assert (quiet.text, quiet.notes) == ("", ("silence",))
    loud = np.stack([sounds()[0]] * 2, axis=1)
    assert lm.transcribe([loud], language="en")[0].notes == ("the mean of 2 channels",)
    assert of(loud) == of(sounds()[0])
    timed, = lm.transcribe([a], language="en", timestamps=True)
    assert " ".join(text for _, _, text in timed.segments) == timed.text


def test_what_does_not_fit_is_refused(lm, tokenizer):
    for changes, message in [({"encoder.position": "rope"}, "encoder.position='rope' must be 'none'"),
                             ({"model.cross_attention": False}, "model.cross_attention must be True"),
                             ({"encoder.embed_dim": 16}, "encoder.embed_dim=16 must be the model's"),
                             ({"objective_args.target_length": 20}, "target_length=20 exceeds"),
                             ({"objective_args.task": "sing"}, "task: unknown 'sing'")]:
        with pytest.raises(UserError, match=message):
            objectives.load(config(**changes), tokenizer)
    for f, message in [(lambda: lm.transcribe(sounds(1), language="eng"), "language: unknown 'eng'; did you mean 'en'"),
                       (lambda: lm.generate(["a"]), "reads sound, not text: use transcribe"),
                       (lambda: lm.logits(np.zeros((1, 2 * S, 8)), decoder_tokens=np.array([[START]])), r"expected \[batch"),
                       (lambda: lm.logits(np.full((1, 4, 9), np.nan), decoder_tokens=np.array([[START]])), "not finite"),
                       (lambda: lm.logits(np.zeros((1, 4, 9))), "needs decoder_tokens too")]:
        with pytest.raises(UserError, match=message):
            f()

"""Tokenizers: exact round trips, byte counts, special tokens, errors."""

import json
import random

import numpy as np
import pytest

from fm_jax import tokenizer as tokenizers
from fm_jax.errors import UserError

TEXT = ["The cat sat.\n\nThe dog (aged 12) ran  off;\tand so on.\n", "def f(x):\n    return x + 10\n",
        "caf\u00e9 na\u00efve \u00fcber\n"]
ODD = ["", " ", "   ", "\n", "\n\n\t ", " a", "a ", "\u2581", "a\u2581 b\u2581\u2581", "\u2585\0", "\ufeffx", "e\u0301",
       "\ufb01 \u2460", "<s> </s> <unk> <pad> <0x41> <fim_prefix> <|endoftext|>",
       "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\r\n", "1234567"]


def random_texts(count, seed):
    """Unicode strings from every plane, rich in blanks and in the signs that tokenizers treat specially."""
    rng = random.Random(seed)
    alphabets = ["abcdefgh  \n\t", " \u2581\u2585\0\r\n\u00a0\u3000", "<>|/s_fim", "\u00e9\u00df\u0301\u200d",
                 "\u65e5\u672c\u8a9e\ud55c", "\U0001f600\U0001f3fd\U0001f1e9", "0123456789"]
    def char():
        if rng.random() < 0.1:
            return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        return rng.choice(rng.choice(alphabets))
    return ["".join(char() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    tokenizers.train_sentencepiece(TEXT * 20, 330, folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory):
    """A GPT-2-like tokenizer.json, with a truncation left in the file as published ones have."""
    import tokenizers as hf
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                     initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(TEXT * 20, trainer)
    model.enable_truncation(4)
    folder = tmp_path_factory.mktemp("hf")
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["bytes", "sentencepiece_folder", "byte_level_folder"])
def tokenizer(request):
    return tokenizers.load("bytes" if request.param == "bytes" else request.getfixturevalue(request.param))


def test_round_trip_is_exact(tokenizer):
    texts = TEXT + ODD + random_texts(400, seed=1)
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.int32 and ids.ndim == 1
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_token_bytes_sum_to_the_bytes_of_the_text(tokenizer):
    table, pieces = tokenizer.token_bytes(), tokenizer.token_text_bytes()
    assert table.shape == (tokenizer.vocab_size,) and table.dtype == np.int32
    for text in TEXT + ODD + random_texts(200, seed=2):
        ids = tokenizer.encode(text, eos=True)
        assert table[ids].sum() == len(text.encode())
        assert b"".join(pieces[i] for i in ids) == text.encode()


def test_text_never_becomes_a_special_token(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *(tokenizer.fim_ids or ())} - {None}
    for text in ("<s></s><pad>", "<fim_prefix><fim_suffix><fim_middle>", "<|endoftext|>", "<unk>"):
        assert not special & set(tokenizer.encode(text).tolist())


def test_ends_are_added_when_asked_and_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("a cat", bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    np.testing.assert_array_equal(ids[1:-1], tokenizer.encode("a cat"))
    assert tokenizer.decode(ids) == "a cat"


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode(TEXT[0]), tokenizer.encode(TEXT[0]))


def test_streamed_bytes_give_whole_characters_only(tokenizer):
    import codecs
    text = "na\u00efve \U0001f469\u200d\U0001f467 \u65e5"
    decoder, pieces, out = codecs.getincrementaldecoder("utf-8")(), tokenizer.token_text_bytes(), []
    for i in tokenizer.encode(text):
        out.append(decoder.decode(pieces[i]))
    assert "".join(out) == text and "\ufffd" not in "".join(out)


def test_sentencepiece_ids_are_the_library_s(sentencepiece_folder):
    import sentencepiece
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ours = tokenizers.load(sentencepiece_folder)
    for text in [t for t in TEXT + random_texts(200, seed=3) if "\u2581" not in t]:
        assert ours.encode(text).tolist() == library.encode(text)
    assert ours.vocab_size == 330 and len(set(ours.fim_ids)) == 3


def test_sentencepiece_keeps_digits_apart_and_merges_indentation(tmp_path):
    ours = tokenizers.train_sentencepiece(["x = 1234\n        y = 1234\n"] * 50, 279, tmp_path)
    pieces = ours.token_text_bytes()
    assert not [p for p in pieces if sum(48 <= b < 58 for b in p) > 1]
    assert b"    " in [pieces[i] for i in ours.encode("    y")] or b"        " in pieces


def test_training_is_deterministic(sentencepiece_folder, tmp_path):
    again = tokenizers.train_sentencepiece(TEXT * 20, 330, tmp_path)
    assert again.fingerprint == tokenizers.load(sentencepiece_folder).fingerprint
    other = tokenizers.train_sentencepiece(TEXT[:1] * 20, 300, tmp_path / "other")
    assert other.fingerprint != again.fingerprint


def test_training_reads_all_of_a_long_document(tmp_path):
    # 3 MB in one document: SentencePiece itself drops a sentence beyond its limit without a word.
    text = "alpha beta\n" * 300_000 + "\u0416\u0416\u0416 gamma " * 1000
    assert "\u0416" in "".join(b.decode(errors="ignore") for b in
                          tokenizers.train_sentencepiece([text], 285, tmp_path).token_text_bytes())


def test_hugging_face_ids_are_the_library_s(byte_level_folder):
    import tokenizers as hf
    library = hf.Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    library.no_truncation()
    ours = tokenizers.load(byte_level_folder)
    for text in TEXT:
        assert ours.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    assert len(ours.encode(TEXT[0])) > 4    # the file's truncation is off
    assert ours.bos_id == ours.eos_id == library.token_to_id("<|endoftext|>") and ours.pad_id is None


def test_hugging_face_settings_name_the_special_tokens(byte_level_folder, tmp_path):
    content = (byte_level_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    named = tokenizers.load(tmp_path)
    assert named.eos_id == tokenizers.load(byte_level_folder).eos_id and named.bos_id is None
    with pytest.raises(UserError, match="no bos token"):
        named.encode("x", bos=True)


def test_metaspace_byte_fallback_counts_bytes(tmp_path):
    """Llama-like tokenizer.json: U+2581 for a space and <0xNN> for bytes."""
    import tokenizers as hf
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {"\u2581": 256, "a": 257, "\u2581a": 258, "</s>": 259}
    model = hf.Tokenizer(hf.models.BPE(vocab, [("\u2581", "a")], byte_fallback=True))
    model.normalizer = hf.normalizers.Replace(" ", "\u2581")
    model.decoder = hf.decoders.Sequence([hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(),
                                          hf.decoders.Fuse()])
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path / "tokenizer.json")
    for text in ("a a  aa", "\u00e9 a\U0001f600", "\n"):
        ids = ours.encode(text, eos=True)
        assert ours.decode(ids) == text and ours.token_bytes()[ids].sum() == len(text.encode())


def test_errors_name_the_value_and_the_remedy(sentencepiece_folder, tmp_path):
    loaded = tokenizers.load(sentencepiece_folder)
    with pytest.raises(UserError, match="id 330 is outside.*330"):
        loaded.decode([1, 330])
    with pytest.raises(UserError, match="id -1 is outside"):
        loaded.decode([-1])
    with pytest.raises(UserError, match="surrogate U\\+D800 at character 1"):
        loaded.encode("a\ud800")
    with pytest.raises(UserError, match="tokenizer.model"):
        tokenizers.load(sentencepiece_folder / "tokeniser.model")
    with pytest.raises(UserError, match="nor is there a folder"):
        tokenizers.load(tmp_path / "no" / "tokenizer.model")
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        tokenizers.load(tmp_path)
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(UserError, match=name):
            tokenizers.load(tmp_path / name)
    with pytest.raises(UserError, match="too large for this text: at most"):
        tokenizers.train_sentencepiece(TEXT, 5000, tmp_path / "x")
    with pytest.raises(UserError, match="too small"):
        tokenizers.train_sentencepiece(TEXT, 100, tmp_path / "x")
    for texts, message in (([""], "no text to train"), (["\u2585" * 9, "a\u2585"], "U.2585"), (["\0" * 9], "U.0000")):
        with pytest.raises(UserError, match=message):
            tokenizers.train_sentencepiece(texts, 300, tmp_path / "x")
    tokenizers.check_vocab(loaded, 330)
    with pytest.raises(UserError, match="--config.model.vocab_size=330"):
        tokenizers.check_vocab(loaded, 329)


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|endoftext|>!"},
        {"role": "assistant", "content": " Hello, "}]
TEMPLATE = """{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- bos_token + message.role + '\n' + message.content | trim + eos_token + '\n' }}
    {%- if message.role == 'nobody' %}{% break %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


def chatting(folder, tmp_path):
    """Returns a folder with a tokenizer and a chat template."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("last", [1, 2, 3])
def test_chats_and_their_ids_are_those_of_transformers(byte_level_folder, tmp_path, last):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' chat template")
    folder = chatting(byte_level_folder, tmp_path)
    ours, theirs = tokenizers.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for how in ({"add_generation_prompt": True}, {"add_generation_prompt": False},
                {"add_generation_prompt": False, "continue_final_message": True}):
        text = theirs.apply_chat_template(CHAT[:last], tokenize=False, **how)
        assert ours.chat(CHAT[:last], **how) == text
        assert ours.encode(text, special=True).tolist() == theirs(text, add_special_tokens=False).input_ids
    assert ours.bos_id in ours.encode(text, special=True) and ours.bos_id not in ours.encode(text)


def test_special_tokens_are_parsed_on_request_and_the_rest_is_as_without(tokenizer):
    name, i = next(iter(tokenizer.specials.items()))
    for a, b in (("The cat", " ran off"), ("", "x"), ("a", ""), ("", "")):
        ids = tokenizer.encode(f"{a}{name}{b}{name}", special=True).tolist()
        assert ids == [*tokenizer.encode(a), i, *tokenizer.encode(b), i]
    plain = TEXT + random_texts(50, seed=2)
    for a, b in zip(tokenizer.encode_batch(plain, special=True), tokenizer.encode_batch(plain)):
        assert a.tolist() == b.tolist()


def test_a_chat_template_in_a_file_of_its_own_stays_with_any_tokenizer(sentencepiece_folder, tmp_path):
    before = tokenizers.load(sentencepiece_folder)
    before.save(tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with_template = tokenizers.load(tmp_path / "a")
    with_template.save(tmp_path / "b")
    for loaded in (with_template, tokenizers.load(tmp_path / "b" / "tokenizer.model")):
        assert loaded.chat(CHAT[:2]) == "[Be brief.][Hi <|endoftext|>!]" and loaded.fingerprint == before.fingerprint


def test_a_chat_that_cannot_be_is_an_error(byte_level_folder, tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        tokenizers.load(byte_level_folder).chat(CHAT)
    ours = tokenizers.load(chatting(byte_level_folder, tmp_path))
    for messages, message in (([], "needs a message"), ([{"role": "user"}], "as content"), ([{"role": "user",
                              "content": [1]}], "as content"), ([{"role": "me", "content": "x"}], "no role me")):
        with pytest.raises(UserError, match=message):
            ours.chat(messages)
    with pytest.raises(UserError, match="one of them"):
        ours.chat(CHAT, continue_final_message=True)
    for evil in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ nothing.x }}", "{% if"):
        ours.chat_template = evil
        with pytest.raises(UserError, match="refuses this chat"):
            ours.chat(CHAT)


@pytest.mark.parametrize("single, adds", [
    ([{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], True),
    ([{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}], False)])
def test_whether_a_file_puts_bos_before_texts_is_read(byte_level_folder, tmp_path, single, adds):
    import tokenizers as hf
    content = json.loads((byte_level_folder / "tokenizer.json").read_text())
    assert not tokenizers.load(byte_level_folder).adds_bos
    specials = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single,
                                 "special_tokens": specials}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizers.load(tmp_path).adds_bos == adds
    assert (hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids[0] == 0) == adds

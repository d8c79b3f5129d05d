"""Tokenizers of Hugging Face folders, in and out."""

import json

from fm_jax import tokenizer as tokenizers
from fm_jax.hf.json_files import read_json, write_json


def read(path, ids: dict) -> tokenizers.Tokenizer:
    """Returns a folder's tokenizer. Its chat template, and special tokens that only other files name, come along.

    They go into the tokenizer's own tokenizer_config.json, as `chat_template`, `bos_token`, `eos_token`, `pad_token`.
    ids: config.json, which may name them by number.
    """
    tokenizer = tokenizers.load(path)
    if not isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
        return tokenizer
    content = (path / "tokenizer.json").read_bytes()
    optional = lambda name: read_json(path / name) if (path / name).is_file() else {}
    settings, named = map(optional, ("tokenizer_config.json", "special_tokens_map.json"))
    before = dict(settings)
    pieces = {t["id"]: t["content"] for t in json.loads(content).get("added_tokens", [])}
    for which in ("bos", "eos", "pad"):
        i = ids.get(f"{which}_token_id")
        found = named.get(f"{which}_token") or pieces.get(i[0] if isinstance(i, list) and i else i)
        # A token that is null there is one the tokenizer does without.
        if f"{which}_token" not in settings and found:
            settings[f"{which}_token"] = found
    if (path / tokenizers.CHAT_TEMPLATE).is_file():
        settings["chat_template"] = tokenizer.chat_template
    if settings == before:
        return tokenizer
    return tokenizers.HuggingFaceTokenizer(content, json.dumps(settings, ensure_ascii=False).encode(), str(path))


def save(folder, tokenizer, framed: bool = False):
    """Returns a line for the user; writes the tokenizer's files, for AutoTokenizer where it can read them.

    framed: one of ours is to put its `frame` around a text there, as a sentence encoder's does; a file from elsewhere
    has its own.
    """
    tokenizer.save(folder)
    if isinstance(tokenizer, tokenizers.ByteTokenizer):
        write_json(folder / "tokenizer.json", _bytes_json(tokenizer))
    elif isinstance(tokenizer, tokenizers.SentencePieceTokenizer):
        content = _sentencepiece_json((folder / "tokenizer.model").read_bytes())
        if content is None:
            return ("tokenizer: tokenizer.model alone, a SentencePiece model that normalises text or is not BPE, which "
                    "has no equal as tokenizer.json here")
        write_json(folder / "tokenizer.json", content)
    if framed and not isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
        write_json(folder / "tokenizer.json", _framed(read_json(folder / "tokenizer.json"), tokenizer))
    path = folder / "tokenizer_config.json"
    settings, content = read_json(path) if path.is_file() else {}, read_json(folder / "tokenizer.json")
    pieces = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
    for which in ("bos", "eos", "pad"):
        if getattr(tokenizer, f"{which}_id") in pieces:
            settings.setdefault(f"{which}_token", pieces[getattr(tokenizer, f"{which}_id")])
    # Without a class, transformers takes that of the model's family and its rules instead of the file's.
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    write_json(path, settings)
    return "tokenizer: tokenizer.json" + (", with its chat template" if tokenizer.chat_template else "")


def _framed(content, tokenizer):
    """Returns a tokenizer.json that adds the tokenizer's frame to every text."""
    names = {i: name for name, i in tokenizer.specials.items()}
    token = lambda i: {"SpecialToken": {"id": names[i], "type_id": 0}}
    before, after = ([token(i) for i in ids] for ids in tokenizer.frame)
    text = lambda which: [*before, {"Sequence": {"id": which, "type_id": 0}}, *after]
    used = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for ids in tokenizer.frame for i in ids}
    return content | {"post_processor": {"type": "TemplateProcessing", "single": text("A"),
                                         "pair": [*text("A"), *text("B")], "special_tokens": used}}


def _bytes_json(tokenizer):
    """Returns the tokenizer.json that gives the ids of `tokenizer.ByteTokenizer`: byte-level BPE without merges."""
    special = {i: name for name, i in tokenizer.specials.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocab = tokenizers.byte_level_alphabet() | {name: i for i, name in special.items()}
    return tokenizers.bpe_json(vocab, [], special, pre_tokenizer=level, decoder=level)


def _sentencepiece_json(model: bytes):
    """Returns the tokenizer.json that gives the ids of a SentencePiece BPE without normalisation, or None.

    So are those of `train_sentencepiece`. But there a U+2581 of the text, spelt in bytes here, becomes a space, and
    the name of a special token in the text that token.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trained, text = proto.trainer_spec, proto.normalizer_spec
    if (trained.model_type != trained.BPE or not trained.byte_fallback or text.precompiled_charsmap
            or text.add_dummy_prefix or text.remove_extra_whitespaces):
        return None
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # A pair is merged where the whole is a piece, the best piece first. Every way to cut a piece is such a pair.
    merges = [(-normal[whole], vocab[whole[:i]], vocab[whole[i:]], whole[:i], whole[i:])
              for whole in normal for i in range(1, len(whole)) if whole[:i] in normal and whole[i:] in normal]
    special = {i: p.piece for i, p in enumerate(proto.pieces) if p.type in (p.CONTROL, p.UNKNOWN)}
    bar = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return tokenizers.bpe_json(vocab, [m[3:] for m in sorted(merges)], special, normalizer=bar, decoder={
        "type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        unk_token=proto.pieces[trained.unk_id].piece, byte_fallback=True)

"""Chats in prepared folders: what the assistant says, whole conversations in rows, and faults that name the record."""

import json

import jax
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import objectives, sharding
from fm_jax import tokenizer as tokenizers
from fm_jax.data import batches, documents, prepared
from fm_jax.errors import UserError

CHATML = ("{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
TURNS = ("Hi \u00e9\n", "caf\u00e9 \U0001f600 ", "  blanks\t", "two\nlines", "x", "</s> spelt")


def chats(n, seed=0):
    rng, text = np.random.default_rng(seed), lambda: TURNS[rng.integers(len(TURNS))]
    said = lambda i, turn: {"role": ("user", "assistant")[turn % 2], "content": f"{text()}{i}", "id": i}
    head = [{"role": "system", "content": "Be brief."}]
    return [head * (i % 2) + [said(i, turn) for turn in range(2 + rng.integers(4))] for i in range(n)]


def write(path, records):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in records))
    return documents.open_sources(str(path), text_key="messages", chat=True)


def by_hand(messages, template):
    """Returns (ids, mask) of a chat in bytes, put together turn by turn."""
    ids, said = [], []
    for m in messages:
        answer = m["role"] == "assistant"
        begin, end = (b"<s>%s\n", b"\n") if template == CHATML else (b"%s<s>", b"")
        for part, mask in ((begin % m["role"].encode(), 0), (m["content"].encode() + b"</s>", answer), (end, 0)):
            for i, piece in enumerate(part.replace(b"<s>", b"</s>!").split(b"</s>")):   # as special tokens
                if i:
                    opens = piece.startswith(b"!")
                    ids.append(256 if opens else 257)
                    said.append(mask)
                    piece = piece[opens:]
                ids += piece
                said += [mask] * len(piece)
    return ids, said


@pytest.fixture(scope="module", params=[CHATML, tokenizers.PLAIN_CHAT], ids=["chatml", "marked"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("chats")
    sources = write(path / "x.jsonl", chats(40) + chats(3))
    manifest, _ = prepared.prepare(sources, "bytes", path / "out", text_key="messages", chat=True, validation_frac=0.3,
                                   chat_template=request.param, shard_tokens=300)
    assert manifest["documents_duplicate"] == 3
    return path / "out", request.param


def test_rows_have_whole_chats_and_their_masks(folder):
    path, template = folder
    wanted = {tuple(ids): said for ids, said in (by_hand(m, template) for m in chats(40))}
    for split in prepared.SPLITS:
        for seq_len in (40, 100, 1000):
            rows, found = prepared.Rows(path, split, seq_len), 0
            records = rows[np.arange(len(rows))]
            for tokens, segments, mask in zip(*(records[k] for k in ("tokens", "segment_ids", "loss_mask"))):
                for segment in range(1, segments.max() + 1):
                    at = segments == segment
                    whole = [ids for ids in wanted if ids[: at.sum()] == tuple(tokens[at])]
                    assert len(whole) == 1 and mask[at].tolist() == wanted[whole[0]][: at.sum()]
                    assert at.sum() == min(len(whole[0]), seq_len + 1)   # alone where it is cut
                    found += 1
                assert not tokens[segments == 0].any() and not mask[segments == 0].any()
            entry = prepared.read_manifest(path)["splits"][split]
            assert found == entry["documents"]
            assert seq_len < 1000 or rows.cut == 0 and records["loss_mask"].sum() == entry["loss_tokens"]
    train = [len(ids) for ids in wanted if any(ids == tuple(t) for t in documents_of(path, "train"))]
    assert prepared.Rows(path, "train", 40).cut == sum(n > 41 for n in train) > 0


def documents_of(path, split):
    starts, shards = np.fromfile(path / split / "starts.int64", "<i8"), sorted((path / split).glob("*.tokens"))
    tokens = np.concatenate([np.fromfile(s, "<u2") for s in shards])
    return [tokens[a:b].tolist() for a, b in zip(starts[:-1], starts[1:])]


def test_an_answer_learns_from_its_own_chat_alone(folder):
    """The gradient of a chat's loss is the same with other chats beside it in the row, and without."""
    path, _ = folder
    c = config_lib.defaults()
    c.model.update(vocab_size=262, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_seq_len=512)
    c.seq_len, c.batch_size = 300, 1
    objective = objectives.load(c, tokenizers.load("bytes"))
    params, _ = sharding.unbox(objective.init(jax.random.key(0)))
    rows = prepared.Rows(path, "train", c.seq_len)
    record = rows[np.array([r for r in range(len(rows)) if rows[np.array([r])]["segment_ids"].max() > 2][:1])]
    batch = objective.examples(record, np.zeros(1, np.uint64))
    np.testing.assert_array_equal(batch["weights"][0], record["loss_mask"][0, 1:] * (
        record["segment_ids"][0, 1:] == record["segment_ids"][0, :-1]))
    grad = jax.jit(jax.grad(lambda p, b: objective.loss(p, b).loss))
    alone = {k: np.zeros_like(v) for k, v in record.items()}
    at = record["segment_ids"][0] == 2
    for k, v in record.items():
        alone[k][0, : at.sum()] = v[0, at] if k != "segment_ids" else 1
    beside = batch | {"weights": batch["weights"] * (batch["segment_ids"] == 2)}
    both = grad(params, beside), grad(params, objective.examples(alone, np.zeros(1, np.uint64)))
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(both[1]))
    # 1e-5: the softmax of a longer row adds in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), *both)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*(jax.tree.leaves(grad(params, x)) for x in (batch, beside))))


def test_text_beside_chats_counts_whole(folder, data):
    """Replay: rows of text in a mixture with chats have their loss everywhere."""
    path, _ = folder
    c = config_lib.defaults()
    c.model.update(vocab_size=262, max_seq_len=512)
    c.seq_len, c.batch_size, c.data.train = 64, 8, f"{path},{data}"
    c.objective_args.fim_rate = 0.0
    objective = objectives.load(c, tokenizers.load("bytes"))
    batch = batches.open_batches(c, objective).batch(0)
    share = batch["weights"].sum(1) / np.maximum((batch["segment_ids"] > 0).sum(1), 1)
    assert (share > 0.95).sum() == 4 and ((0 < share) & (share < 0.9)).sum() == 4
    c.objective_args.fim_rate = 0.5
    with pytest.raises(UserError, match="of chats only answers are learnt"):
        batches.open_batches(c, objectives.load(c, tokenizers.load("bytes"))).batch(0)


@pytest.mark.parametrize("messages, message", [
    ([{"role": "user", "content": "a"}], "line 2: a chat of 1 messages without one of the assistant"),
    ([{"role": "asistant", "content": "a"}], "line 2, message 1: role: unknown 'asistant'; did you mean 'assistant'"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "message 2, of the assistant: .*empty"),
    ([{"role": "user"}], "line 2, message 1: 'content' is NoneType"),
    ("Hello", "line 2: 'messages' is no chat"), ([], "is no chat"),
])
def test_faulty_chats_are_named(tmp_path, messages, message):
    sources = write(tmp_path / "x.jsonl", chats(1) + [messages])
    with pytest.raises(UserError, match=message):
        prepared.prepare(sources, "bytes", tmp_path / "out", chat=True, chat_template=tokenizers.PLAIN_CHAT)
    assert not (tmp_path / "out").exists()


def test_chats_need_a_template_and_are_no_text(inline, tmp_path):
    write(tmp_path / "x.jsonl", chats(30))
    (tmp_path / "x.txt").write_text("Hello")
    flags = ["prepare", f"--source={tmp_path / 'x.jsonl'}", "--tokenizer=bytes", f"--output={tmp_path / 'out'}",
             "--workers=1", "--validation_frac=0.3"]
    for more, message in ((["--chat"], "no chat template; give one, --chat_template=FILE"),
                          (["--chat", f"--chat_template={tmp_path / 'none'}"], "cannot be read"),
                          (["--chat_template=plain"], "add --chat"), ([], "no key 'text'"),
                          (["--chat", "--chat_template=plain", f"--source={tmp_path / 'x.txt'}"], "is plain text"),
                          (["--chat", "--chat_template=plain", "--source=catalogue:tiny_shakespeare"], "no chats")):
        code, _, err = inline(*flags, *more)
        assert code == 2 and message in err and err.count("\n") == 1, err
    code, out, _ = inline(*flags, "--chat", "--chat_template=plain")
    assert code == 0 and "of them the assistant's" in out
    assert tokenizers.load(tmp_path / "out" / "tokenizer").chat_template == tokenizers.PLAIN_CHAT
    code, out, _ = inline(*flags, "--chat", "--chat_template=plain")
    assert code == 0 and "already prepared" in out
    (tmp_path / "other").write_text(CHATML)
    assert "differently (in chat_template)" in inline(*flags, "--chat", f"--chat_template={tmp_path / 'other'}")[2]


def test_masks_are_those_of_transformers(tmp_path):
    """A byte-level tokenizer.json, whose tokens are of several letters; the template as it is, and marked."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import tokenizers as hf
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer, model.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
                                     initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator([t for m in chats(200) for t in (x["content"] for x in m)], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizers.load(tmp_path / "tokenizer.json")
    marked = CHATML.replace("m.role + '\n' + m.content + '</s>' + '\n' }}",
                            "m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}"
                            "{% endgeneration %}{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}")
    assert marked != CHATML
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for messages in chats(60, seed=1):
        want = theirs.apply_chat_template(messages, chat_template=marked, tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True)
        for template in (CHATML, marked):
            ours.chat_template = template
            ids, said = ours.chat_tokens(messages)
            assert ids.tolist() == want["input_ids"] and said.tolist() == [bool(x) for x in want["assistant_masks"]]


def test_a_template_that_takes_turns_back_is_noticed():
    tokenizer = tokenizers.load("bytes")
    messages = [dict(role=r, content=c) for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"),
                                                     ("assistant", "d"))]
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role + (m.content if loop.last or m.role == 'user' else '') "
                               "+ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}")
    with pytest.raises(UserError, match="before turn 2 in another way.*generation"):
        tokenizer.chat_tokens(messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '!' if add_generation_prompt }}"
    with pytest.raises(UserError, match="before turn 2 in another way"):
        tokenizer.chat_tokens(messages)

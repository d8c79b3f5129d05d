"""The server as its clients see it: over real connections, against what the model gives without it."""

import asyncio
import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

from engine_test import table, tiny, wait_for
import numpy as np
import pytest
import uvicorn

from fm_jax import pretrained, serve, tree
from fm_jax.decode import find_stop
from fm_jax.engine import TOP, Engine, Made, VectorEngine
from fm_jax.errors import UserError

TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")


@contextlib.contextmanager
def running(service):
    """Gives the port of a server."""
    listener = serve._bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(serve.app(service), log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def lm():
    lm = tiny()
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="module")
def other(lm):
    """Returns the model with other parameters in a part of it, as an adapter makes it."""
    rng, parts = np.random.default_rng(5), tree.flatten(lm.params)
    name = "transformer.layers.mlp.w_up"
    parts[name] = parts[name] + rng.normal(0, 0.4, parts[name].shape).astype(np.float32)
    return pretrained.Pretrained(lm.config, lm.tokenizer, lm.objective, tree.nest(parts))


@pytest.fixture(scope="module")
def service(lm, other):
    engine = Engine(lm, slots=3, max_length=80, max_waiting=24, adapters={"loud": other.params})
    yield serve.Service(lm, engine, "tiny", max_body_bytes=20_000, adapters=("loud",))
    engine.close()


@pytest.fixture(scope="module")
def port(service):
    with running(service) as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_left_and_nothing_compiled(request):
    yield
    if "port" in request.fixturenames:
        metrics = request.getfixturevalue("service").engine.metrics
        wait_for(lambda: metrics.running._value.get() == metrics.waiting._value.get() == 0)
        assert metrics.compiles._value.get() == 0


@pytest.fixture
def slow(service, monkeypatch):
    """Slows the engine to 30 steps a second, until it is set."""
    go, stepped = threading.Event(), service.engine._stepped
    monkeypatch.setattr(service.engine, "_stepped", lambda model: (go.wait(1 / 30), stepped(model))[1])
    yield go
    go.set()


def strict(text):
    """Returns the value of a JSON text, without NaN and Infinity, which JSON does not have."""
    return json.loads(text, parse_constant=pytest.fail)


def send(port, path, body=None, method=None, **headers):
    """Returns (status, headers, bytes)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    response = connection.getresponse()
    out = response.status, response.headers, response.read()
    connection.close()
    return out


def ask(port, path, body=None, **headers):
    status, _, content = send(port, path, body, **headers)
    assert status == 200, content
    return strict(content)


def complete(port, **body):
    return ask(port, "/v1/completions", body)


def stream(port, path="/v1/completions", **body):
    """Returns the events of a stream."""
    status, headers, content = send(port, path, body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), content
    *events, done, rest = content.decode().split("\n\n")   # strictly UTF-8
    assert done == "data: [DONE]" and rest == ""
    return [strict(event.removeprefix("data: ")) for event in events]


# --- the text of tokens ---------------------------------------------------------------------------------------------

def test_text_is_never_cut_inside_a_character_or_a_stop_string():
    """Random texts byte by byte: what has been given out is at every moment what is sure."""
    rng, alphabet = np.random.default_rng(0), "ab\u00e9\u65e5\U0001f600\n"
    token_text = [bytes([i]) for i in range(256)]
    for _ in range(300):
        text = "".join(rng.choice(list(alphabet), 12))
        stops = ["".join(rng.choice(list(alphabet), rng.integers(1, 4))) for _ in range(2)]
        transcript, given, ends = serve.Transcript(token_text, stops), "", []
        for n, byte in enumerate(text.encode(), 1):
            ended = transcript.add(serve.Token(byte, 0.0, []))
            new, tokens = transcript.take(last=ended)
            given += new
            ends += tokens
            seen = text.encode()[:n].decode(errors="ignore")
            assert text.startswith(given) and given == seen[: find_stop(seen, stops)[0]]
            if ended:
                break
        if not ended:
            given += transcript.take(last=True)[0]
        first = min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)
        # The stop string that is complete first ends the text, so that it may begin behind another.
        assert (given == text) if first is None else ended and len(given) >= first
        assert not any(stop in given for stop in stops)
        assert all(token.at < len(given) for token in ends)


def test_half_a_character_at_the_end_is_shown_as_such():
    transcript = serve.Transcript([bytes([i]) for i in range(256)])
    for byte in "\u65e5".encode()[:2]:
        transcript.add(serve.Token(byte, 0.0, []))
        assert transcript.take() == ("", [])
    assert transcript.take(last=True)[0] == "\ufffd"


# --- completions ----------------------------------------------------------------------------------------------------

def test_completions_are_those_of_generate(lm, port):
    want, = lm.generate(["To be"], max_new_tokens=30)
    got = complete(port, prompt="To be", max_tokens=30, temperature=0, model="tiny", user="unknown fields are accepted",
                   nonsense={"a": [1]})
    choice, = got["choices"]
    assert choice["text"] == want and choice["index"] == 0 and choice["logprobs"] is None
    assert got["object"] == "text_completion" and got["id"].startswith("cmpl-") and got["model"] == "tiny"
    assert got["usage"] == {"prompt_tokens": 6, "completion_tokens": 30, "total_tokens": 36}
    assert choice["finish_reason"] == "length"


def test_every_form_of_prompt(lm, port):
    texts = ["To be", "or not"]
    ids = [x.tolist() for x in lm.prompt_ids(texts)]
    want = lm.generate(texts, max_new_tokens=9)
    say = lambda prompt: [c["text"] for c in complete(port, prompt=prompt, max_tokens=9, temperature=0)["choices"]]
    assert say(texts[0]) == say(ids[0]) == say([ids[0]]) == say(texts[:1]) == want[:1]
    assert say(texts) == say(ids) == want
    assert say("") == say([[]]) == say([lm.tokenizer.bos_id])   # no text: from the beginning of one
    bare = complete(port, prompt=[*b"To be"], max_tokens=1)["usage"]["prompt_tokens"]
    assert bare == 5   # nothing is added to token ids


def test_seeds_and_choices(lm, port):
    how = dict(temperature=0.9, top_k=40, top_p=0.95, n=3, seed=5)
    want = lm.generate(["To be", "or"], max_new_tokens=12, stop_at_end=False, **how)
    got = complete(port, prompt=["To be", "or"], max_tokens=12, ignore_eos=True, **how)
    assert [c["text"] for c in got["choices"]] == want and [c["index"] for c in got["choices"]] == list(range(6))
    assert got["usage"] == {"prompt_tokens": 9, "completion_tokens": 72, "total_tokens": 81}
    free = [complete(port, prompt="To be", max_tokens=12)["choices"][0]["text"] for _ in range(3)]
    assert len(set(free)) > 1   # without a seed, another text each time
    assert complete(port, prompt="a", seed=-1, max_tokens=3) and complete(port, prompt="a", seed=2**63, max_tokens=3)


@pytest.mark.parametrize("how", [{}, {"n": 3, "logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1},
                                 {"prompt": ["To be", "or not"], "stream_options": {"include_usage": True}}])
def test_a_stream_says_what_a_whole_reply_says(port, how):
    """Random bytes: characters in pieces and broken ones."""
    request = {"prompt": "To be", "max_tokens": 40, "temperature": 1.0, "seed": 3} | how
    whole, events = complete(port, **request), stream(port, **request)
    assert len({e["id"] for e in events}) == 1 and {e["object"] for e in events} == {"text_completion"}
    if "stream_options" in how:
        last = events.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"] and all(e["usage"] is None for e in events)
    for want in whole["choices"]:
        own = [c for e in events for c in e["choices"] if c["index"] == want["index"]]
        assert "".join(c["text"] for c in own) == want["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [want["finish_reason"]]
        if want["logprobs"]:
            for key in want["logprobs"]:
                assert [x for c in own for x in c["logprobs"][key]] == want["logprobs"][key]


def test_stop_strings_do_not_reach_a_stream(lm, port):
    text, = lm.generate(["To be"], max_new_tokens=40)
    stop = next(text[i : i + 2] for i in range(6, 30) if "\ufffd" not in text[i : i + 2] and text[i] != text[i + 1]
                and text.index(text[i : i + 2]) == i)
    request = dict(prompt="To be", max_tokens=40, temperature=0)
    for stops in (stop, [stop, "never there"], [stop[0] + "never", stop]):
        got, = complete(port, **request, stop=stops)["choices"]
        assert got["text"] == text[: text.index(stop)] and got["finish_reason"] == "stop"
        pieces = [e["choices"][0]["text"] for e in stream(port, **request, stop=stops)]
        assert "".join(pieces) == got["text"]
    marked = complete(port, **request, stop=stop, logprobs=0)["choices"][0]["logprobs"]
    assert all(at < text.index(stop) for at in marked["text_offset"])
    assert complete(port, **request, stop=[])["choices"][0]["text"] == text


def test_stop_tokens(lm, port):
    """The end of text ends a reply, and so does a special token that `stop` spells."""
    draw = dict(prompt="a", max_tokens=70, temperature=1.5, n=20, seed=0)
    ended = [c for c in complete(port, **draw)["choices"]]
    assert {c["finish_reason"] for c in ended} == {"stop", "length"}
    assert {c["finish_reason"] for c in complete(port, **draw, ignore_eos=True)["choices"]} == {"length"}
    spelling, number = next((s, i) for s, i in lm.tokenizer.specials.items() if i == lm.tokenizer.pad_id)
    made = lm.complete(lm.prompt_ids(["a"]), max_new_tokens=70, temperature=1.5, n=20, seed=0)
    assert any(number in m.tokens for m in made)
    got = complete(port, **draw, ignore_eos=True, stop=spelling)["choices"]
    for choice, each in zip(got, made):
        assert choice["finish_reason"] == ("stop" if number in each.tokens else "length")


def test_what_comes_behind_a_stop_string_is_not_shown(lm):
    """Though it was made, and on its way, before anyone saw the stop string."""
    class Hasty:
        max_waiting, max_length = 2, 80

        def submit(self, requests):
            none = np.zeros((1, TOP))
            for request in requests:
                for i, byte in enumerate(b"one STOP two STOP"):
                    request.deliver(Made(np.array([byte]), none[0, :1], none.astype(int), none, "length" * (i == 16)))

    class Client:
        async def receive(self):
            await asyncio.sleep(60)

    async def collect():
        service = serve.Service(lm, Hasty(), "tiny")
        job = service.completion(b'{"prompt": "a", "stop": "STOP", "max_tokens": 17, "n": 2}')
        return [piece async for piece in serve.start(service, Client(), job)]
    pieces = asyncio.run(collect())
    for choice in (0, 1):
        own = [piece for piece in pieces if piece.choice == choice]
        assert "".join(piece.text for piece in own) == "one " and sum(piece.count for piece in own) == 8
        assert [piece.finish for piece in own] == [None] * 7 + ["stop"]


# --- log-probabilities ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_log_probabilities_as_the_referee_reads_them(lm, port, max_tokens):
    """One entry a token and one for the token made, unrounded, greedy where it equals the likeliest."""
    prompts = [[*b"To be, or not"], [*"\u65e5\u672c".encode(), 257, 7, 258], [5]]
    got = complete(port, prompt=prompts, max_tokens=max_tokens, temperature=0, logprobs=1, seed=1234, echo=True,
                   model="tiny")
    assert [c["index"] for c in got["choices"]] == [0, 1, 2]
    for choice, ids in zip(got["choices"], prompts):
        want, lp = table(lm, ids)[:, : lm.tokenizer.vocab_size], choice["logprobs"]
        n = len(ids) + max_tokens
        assert {len(lp[key]) for key in lp} == {n} and lp["token_logprobs"][0] is None is lp["top_logprobs"][0]
        full = ids + [int(want[-1].argmax())]
        for i in range(1, n):
            mine, top = lp["token_logprobs"][i], lp["top_logprobs"][i]
            assert mine == pytest.approx(want[i - 1, full[i]], abs=1e-4) and mine == float(np.float32(mine))
            assert max(top.values()) == pytest.approx(want[i - 1].max(), abs=1e-4)
            assert (mine == max(top.values())) == (want[i - 1].argmax() == full[i])
        if max_tokens:
            assert lp["token_logprobs"][-1] == max(lp["top_logprobs"][-1].values())
        assert choice["text"] == lm.tokenizer.decode(full[:n])
        assert lp["text_offset"][0] == 0 and lp["text_offset"] == sorted(lp["text_offset"])
        assert choice["finish_reason"] in ("length", "stop")
    assert got["usage"]["completion_tokens"] == 3 * max_tokens


def test_tokens_without_a_text_of_their_own_keep_their_names(port):
    lp = complete(port, prompt=[[*b"a", 0xE6, 256]], max_tokens=0, logprobs=20, echo=True)["choices"][0]["logprobs"]
    assert lp["tokens"][:2] == ["a", "token_id:230"] and lp["tokens"][2] not in ("", "a")
    assert 20 <= len(lp["top_logprobs"][1]) <= 21   # no two names are the same


def test_log_probabilities_of_what_is_made(lm, port):
    ids = lm.prompt_ids(["To be"])[0].tolist()
    lp = complete(port, prompt="To be", max_tokens=8, temperature=1.0, seed=4, logprobs=3)["choices"][0]["logprobs"]
    made, = lm.complete([np.array(ids)], max_new_tokens=8, temperature=1.0, seed=4)
    want = table(lm, ids + made.tokens.tolist())[len(ids) - 1 : -1, : lm.tokenizer.vocab_size]
    for i, token in enumerate(made.tokens):
        assert lp["token_logprobs"][i] == pytest.approx(want[i, token], abs=1e-4)
        assert sorted(lp["top_logprobs"][i].values())[-3:] == pytest.approx(sorted(want[i])[-3:], abs=1e-4)
    both = complete(port, prompt="To be", max_tokens=8, temperature=1.0, seed=4, logprobs=3, echo=True)
    echoed = both["choices"][0]["logprobs"]
    np.testing.assert_allclose(echoed["token_logprobs"][5:], lp["token_logprobs"], rtol=1e-4, atol=1e-4)
    assert echoed["tokens"][:5] == list("To be") and echoed["text_offset"][:6] == list(range(6))
    assert echoed["token_logprobs"][0] == pytest.approx(table(lm, ids)[0, ord("T")], abs=1e-4)   # behind the BOS


def test_a_suffix_asks_for_the_middle(lm, port):
    before, after, middle = lm.tokenizer.fim_ids
    ids = [lm.tokenizer.bos_id, before, *b"To be", after, *b"not to be", middle]
    want, = lm.complete([np.array(ids)], max_new_tokens=12)
    got = complete(port, prompt="To be", suffix="not to be", max_tokens=12, temperature=0, ignore_eos=True)
    assert got["choices"][0]["text"] == lm.tokenizer.decode(want.tokens)
    assert got["usage"]["prompt_tokens"] == len(ids)
    tokens = complete(port, prompt=[*b"To be"], suffix="not to be", max_tokens=12, temperature=0)
    assert tokens["usage"]["prompt_tokens"] == len(ids) - 1


# --- chat -----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_chat_is_the_completion_of_its_template(lm, port):
    text = "<system>Be brief.\n<user>Hi\n<assistant>"
    want = complete(port, prompt=[*text.encode()], max_tokens=20, temperature=0)["choices"][0]
    got = ask(port, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 20, "temperature": 0})
    choice, = got["choices"]
    assert choice["message"] == {"role": "assistant", "content": want["text"], "refusal": None}
    assert choice["finish_reason"] == want["finish_reason"] and got["object"] == "chat.completion"
    assert got["usage"]["prompt_tokens"] == len(text)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
             CHAT[1]]
    again = ask(port, "/v1/chat/completions", {"messages": parts, "max_completion_tokens": 20, "temperature": 0})
    assert again["choices"][0]["message"]["content"] == want["text"]
    rest = ask(port, "/v1/chat/completions", {"messages": CHAT, "ignore_eos": True})
    assert rest["usage"]["total_tokens"] == 80   # without max_tokens, what the context has


def test_a_chat_stream(lm, port):
    request = dict(messages=CHAT, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2, n=2)
    whole = ask(port, "/v1/chat/completions", request)
    events = stream(port, "/v1/chat/completions", **request, stream_options={"include_usage": True})
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    last = events.pop()
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for want in whole["choices"]:
        own = [c for e in events for c in e["choices"] if c["index"] == want["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
        assert "".join(c["delta"].get("content", "") for c in own) == want["message"]["content"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [want["finish_reason"]]
        logprobs = [x for c in own if c["logprobs"] for x in c["logprobs"]["content"]]
        assert logprobs == want["logprobs"]["content"] and len(logprobs) == 20
        for each in logprobs:
            assert len(each["top_logprobs"]) == 2 and each["logprob"] == each["top_logprobs"][0]["logprob"]
            assert bytes(each["bytes"]).decode(errors="replace") in (each["token"], "\ufffd", "")


def test_a_last_message_is_continued(port):
    said = [*CHAT, {"role": "assistant", "content": "Hello th"}]
    tokenized = ask(port, "/tokenize", {"messages": said, "continue_final_message": True})["tokens"]
    assert bytes(tokenized).decode() == "<system>Be brief.\n<user>Hi\n<assistant>Hello th"


# --- vectors alone --------------------------------------------------------------------------------------------------

def test_a_model_that_makes_vectors_is_served_too():
    """Requests at once are read together, each text as alone; what is too long is cut, and the rest says what it is."""
    lm = tiny(objective="fm_jax.objectives.text_embedding.TextEmbedding", **{"model.causal": False, "seq_len": 40})
    engine = VectorEngine(lm, max_waiting=30)
    texts = ["To be", "or not to be, that is", "a" * 90, "!"]
    want = lm.embed(texts)
    try:
        with running(serve.Service(lm, engine, "tiny")) as port, concurrent.futures.ThreadPoolExecutor(8) as pool:
            asked = [[i % 4, (i + 1) % 4] for i in range(8)]
            got = pool.map(lambda which: ask(port, "/v1/embeddings", {"input": [texts[i] for i in which]}), asked)
            for which, each in zip(asked, got):
                np.testing.assert_allclose([x["embedding"] for x in each["data"]], want[which], atol=1e-5)
                assert each["usage"]["prompt_tokens"] == sum(min(len(texts[i]) + 2, 40) for i in which)
            ids = ask(port, "/tokenize", {"prompt": "!"})["tokens"]
            assert ids == [256, 33, 257]
            by_ids = ask(port, "/v1/embeddings", {"input": ids})
            np.testing.assert_allclose(by_ids["data"][0]["embedding"], want[3], atol=1e-5)
            for path, body in (("/v1/completions", {"prompt": "a"}),
                               ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})):
                status, _, content = send(port, path, body)
                assert status == 400 and b"'tiny' makes vectors of texts and continues none" in content
            assert send(port, "/v1/embeddings", {"input": ["a"] * 31})[0] == 400
            assert send(port, "/health")[0] == 200
    finally:
        engine.close()


# --- embeddings, tokens, models, metrics ----------------------------------------------------------------------------

def test_embeddings(lm, port):
    want = lm.embed(["To be", "or not to be"])
    got = ask(port, "/v1/embeddings", {"input": ["To be", "or not to be"], "model": "tiny"})
    assert [x["index"] for x in got["data"]] == [0, 1] and got["usage"] == {"prompt_tokens": 19, "total_tokens": 19}
    np.testing.assert_allclose([x["embedding"] for x in got["data"]], want, atol=1e-4)
    coded = ask(port, "/v1/embeddings", {"input": lm.prompt_ids(["To be"])[0].tolist(), "encoding_format": "base64"})
    raw = base64.b64decode(coded["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), want[0], atol=1e-4)


def test_tokens_and_back(lm, port):
    text = "To b\u00e9 <pad>"
    got = ask(port, "/tokenize", {"prompt": text})
    assert got["tokens"] == lm.prompt_ids([text])[0].tolist() and got["count"] == len(got["tokens"])
    bare = ask(port, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert bare == lm.tokenizer.encode_batch([text], special=True)[0].tolist()
    assert ask(port, "/detokenize", {"tokens": [*b"To b\xc3\xa9"]})["prompt"] == "To b\u00e9"
    info = ask(port, "/tokenizer_info")
    assert ask(port, "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})["tokens"] == [257]
    assert info["chat_template"] == TEMPLATE


def test_models_health_and_metrics(port):
    complete(port, prompt="To be", max_tokens=5)
    listed, _ = ask(port, "/v1/models")["data"]
    assert listed["id"] == "tiny" and listed["object"] == "model" and ask(port, "/v1/models/tiny") == listed
    assert ask(port, "/health") == {"status": "ok"}
    text = send(port, "/metrics")[2].decode()
    value = lambda name: float(re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)[1])
    for name in ("requests_running", "requests_waiting", "cache_use_ratio", "compiles_total"):
        assert value(f"fm_jax_{name}") == 0, name
    for name in ("time_to_first_token_seconds_count", "inter_token_seconds_sum", "prompt_tokens_total",
                 "generated_tokens_total", 'responses_total{path="/v1/completions",status="200"}'):
        assert value(f"fm_jax_{name}") > 0, name


# --- what is refused ------------------------------------------------------------------------------------------------

def refused(status, content, message):
    error = strict(content)["error"]
    assert set(error) == {"message", "type", "param", "code"} and re.search(message, error["message"]), error
    assert error["type"] == ("server_error" if status >= 500 else "rate_limit_error" if status == 429 else
                             "invalid_request_error")
    return error


@pytest.mark.parametrize("body, message", [
    (b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"", "not JSON"), (b"[1]", "must be a JSON object"),
    (b"[" * 10_000, "not JSON"), ({}, "prompt must be"), ({"prompt": None}, "prompt must be"),
    ({"prompt": 3}, "prompt must be"), ({"prompt": [1, "a"]}, "must be a"), ({"prompt": [[1.5]]}, "must be a text"),
    ({"prompt": [True]}, "prompt must be"), ({"prompt": {"a": 1}}, "prompt must be"),
    ({"prompt": [262]}, "token id 262 is outside the vocabulary of 262"), ({"prompt": [[1], [-1]]}, "token id -1"),
    ({"prompt": [10**30]}, "outside the vocabulary"), ({"prompt": "a\ud800"}, "lone surrogate U\\+D800"),
    ({"prompt": "a", "suffix": "\ud800"}, "lone surrogate"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens must be an integer of at least 0, not -1"),
    ({"prompt": "a", "max_tokens": 1e3}, "max_tokens must"), ({"prompt": "a", "max_tokens": True}, "max_tokens must"),
    ({"prompt": "a", "max_tokens": 10**9}, "maximum context length is 80 tokens"),
    ({"prompt": "a" * 79}, "maximum context length is 80 tokens"), ({"prompt": "a" * 5000}, "maximum context length"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature must"), ({"prompt": "a", "temperature": -1}, "temperature"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"), ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 1.1}, "top_p must be"), ({"prompt": "a", "top_k": 1.0}, "top_k must be"),
    ({"prompt": "a", "min_p": -0.1}, "min_p must be"), ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "n": 0}, "n must be"), ({"prompt": "a", "n": 25}, "at least 1 and at most 24"),
    ({"prompt": ["a"] * 25}, "25 readings and replies is more than this server's queue of 24"),
    ({"prompt": ["a"] * 13, "n": 2}, "26 readings"),
    ({"prompt": ["a"] * 13, "echo": True, "logprobs": 1, "max_tokens": 2}, "26 readings"),
    ({"prompt": "a", "logprobs": 21}, "at least 0 and at most 20"),
    ({"prompt": "a", "logprobs": True}, "logprobs must be"), ({"prompt": "a", "seed": "x"}, "seed must be"),
    ({"prompt": "a", "stop": ""}, "none of them empty"), ({"prompt": "a", "stop": [1]}, "stop must be"),
    ({"prompt": "a", "stop": ["x"] * 65}, "at most 64"), ({"prompt": "a", "echo": "yes"}, "echo must be true or false"),
    ({"prompt": "a", "stream": 1}, "stream must be"), ({"prompt": "a", "suffix": 1}, "suffix must be"),
    ({"prompt": "a", "suffix": "b", "echo": True}, "echo with a suffix"), ({"prompt": "a", "best_of": 3}, "best_of is"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias is not supported"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty"), ({"prompt": "a", "tools": [{}]}, "tools is not")])
def test_a_bad_request_gets_400_and_the_next_is_answered(port, body, message):
    status, _, content = send(port, "/v1/completions", body)
    assert status == 400, content
    refused(400, content, message)
    assert complete(port, prompt="a", max_tokens=1, best_of=1, logit_bias={}, frequency_penalty=0, stop=None)


@pytest.mark.parametrize("path, body, status, message", [
    ("/v1/chat/completions", {}, 400, "messages must be a list"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages must be a list"),
    ("/v1/chat/completions", {"messages": ["hi"]}, 400, r"messages\[0\] must have a role"),
    ("/v1/chat/completions", {"messages": [{"role": "judge", "content": "a"}]}, 400, "role"),
    ("/v1/chat/completions", {"messages": [CHAT[1], {"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     r"messages\[1\]"),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 0}, 400, "max_tokens must be an integer of at least 1"),
    ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json"}}, 400, "response_format is not"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 70}]}, 400, "maximum context length"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\udc00"}]}, 400, "lone surrogate"),
    ("/v1/chat/completions", {"messages": CHAT, "model": "gpt-5"}, 404, "'gpt-5' is not served here; this is 'tiny'"),
    ("/v1/completions", {"prompt": "a", "model": "\ud800"}, 404, "is not served here"),
    ("/v1/embeddings", {"input": []}, 400, "input must be"), ("/v1/embeddings", {"prompt": "a"}, 400, "input must be"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format: unknown 'hex'"),
    ("/v1/embeddings", {"input": "a", "dimensions": 8}, 400, "dimensions is not supported"),
    ("/v1/embeddings", {"input": "a" * 90}, 400, "maximum context length of 80"),
    ("/tokenize", {"prompt": 3}, 400, "prompt must be a text"), ("/detokenize", {"tokens": "a"}, 400, "tokens must be"),
    ("/detokenize", {"tokens": [300]}, 400, "token id 300 is outside"), ("/v1/models/x", None, 404, "not served here"),
    ("/detokenize", {"tokens": [10**30]}, 400, "tokens must be"), ("/nowhere", None, 404, "GET /nowhere: Not Found"),
    ("/v1/completions", None, 405, "GET /v1/completions: Method Not Allowed"),
    ("/v1/completions", b"{" * 20_001, 413, "a request may have 20,000 bytes"),
    ("/v1/completions", b"a" * 10_000_000, 413, "a request may have 20,000 bytes")])
def test_every_error_has_openais_form(port, path, body, status, message):
    got, headers, content = send(port, path, body)
    assert got == status, content
    refused(status, content, message)
    assert headers["content-type"] == "application/json"
    assert ask(port, "/health") == {"status": "ok"}


def test_a_model_without_templates_and_markers_says_so(lm, service, monkeypatch, port):
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    monkeypatch.setattr(lm.tokenizer, "fim_ids", None, raising=False)
    status, _, content = send(port, "/v1/chat/completions", {"messages": CHAT})
    assert status == 400 and refused(400, content, "no chat template")
    status, _, content = send(port, "/v1/completions", {"prompt": "a", "suffix": "b"})
    assert status == 400 and refused(400, content, "no fill-in-the-middle tokens")


def test_keys(service):
    guarded = serve.Service(service.lm, service.engine, "tiny", ["first key", "zw\u00f6lf"])
    with running(guarded) as port:
        for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer second"},
                            {"Authorization": "Bearer first keys"}):
                status, given, content = send(port, path, body, **headers)
                assert status == 401 and given["www-authenticate"] == "Bearer"
                assert refused(401, content, "needs an API key")["code"] == "invalid_api_key"
            for key in (b"first key", "zw\u00f6lf".encode()):
                assert ask(port, path, body, Authorization=b"Bearer " + key)
        assert ask(port, "/health") and send(port, "/metrics")[0] == 200


# --- many clients ---------------------------------------------------------------------------------------------------

def test_a_full_queue_says_when_to_come_again(service, port, slow):
    """Of 60 at once 27 find room, at least; the others hear 429, streams by their status."""
    turned_away = service.engine.metrics.responses.labels("/v1/completions", 429)._value.get
    before = turned_away()
    with concurrent.futures.ThreadPoolExecutor(60) as pool:
        request = {"prompt": "To be", "max_tokens": 60, "ignore_eos": True, "seed": 1, "temperature": 1}
        found = pool.map(lambda i: send(port, "/v1/completions", request | {"stream": i % 2 == 0}), range(60))
        wait_for(lambda: turned_away() > before)
        slow.set()
        found = list(found)
    refusals = [(headers, content) for status, headers, content in found if status == 429]
    assert 0 < len(refusals) <= 33 and {status for status, *_ in found} == {200, 429}
    for headers, content in refusals:
        assert int(headers["retry-after"]) >= 1
        refused(429, content, "the queue of 24 requests is full")
    assert {status for status, *_ in found if status != 429} == {200}


def raw(body) -> bytes:
    """Returns the bytes of a request for a completion."""
    body = json.dumps(body).encode()
    return (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body))


def test_a_client_that_goes_away_frees_its_slot(service, port, slow):
    running_ = service.engine.metrics.running._value.get
    for streams in (True, False):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(raw({"prompt": "To be", "max_tokens": 70, "ignore_eos": True, "n": 9, "stream": streams}))
        wait_for(lambda: running_() == 3)
        if streams:
            assert b"200 OK" in client.recv(1000)
        client.close()
        begin = time.monotonic()
        wait_for(lambda: running_() == 0 == service.engine.metrics.waiting._value.get())
        assert time.monotonic() - begin < 1.5   # nine of 70 tokens would take 7 s


def test_half_a_request_holds_up_nobody(port):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert complete(port, prompt="a", max_tokens=2)
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert b"400" in client.recv(1000)
    assert complete(port, prompt="a", max_tokens=2)


def test_a_thousand_connections(port):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 3000:
        pytest.skip(f"this machine allows {hard} open files, and both ends of the connections are here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    clients = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(1000)]
    try:
        for client in clients:
            client.sendall(raw({"prompt": "a", "max_tokens": 1}))
        codes = [client.recv(1 << 16).split()[1] for client in clients]
    finally:
        for client in clients:
            client.close()
    assert set(codes) <= {b"200", b"429"} and b"200" in codes
    assert complete(port, prompt="a", max_tokens=2)


def test_replies_do_not_mix(lm, port):
    """Sixteen clients, streams and not; each seeded reply is the one that the model gives to it alone."""
    def one(i):
        how = dict(prompt=f"line {i % 4}", max_tokens=5 + 7 * (i % 3), temperature=[0, 1.1][i % 2], seed=i)
        if i % 4 < 2:
            return "".join(c["text"] for e in stream(port, **how) for c in e["choices"])
        return complete(port, **how)["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        got = list(pool.map(one, range(16)))
    for i, text in enumerate(got):
        want, = lm.generate([f"line {i % 4}"], max_new_tokens=5 + 7 * (i % 3), temperature=[0, 1.1][i % 2], seed=i)
        assert text == want, i


def test_an_engine_that_fails_is_reported(service, port, monkeypatch):
    def lost(*args):
        raise RuntimeError("device lost")
    monkeypatch.setattr(service.engine, "_join", lost)
    status, _, content = send(port, "/v1/completions", {"prompt": "a"})
    assert status == 500 and refused(500, content, "the engine failed on this request")
    status, _, content = send(port, "/v1/chat/completions", {"messages": CHAT, "stream": True})
    assert status == 200 and content.endswith(b"data: [DONE]\n\n")   # it had begun
    refused(500, content.decode().split("\n\n")[1].removeprefix("data: "), "the engine failed on this request")
    monkeypatch.undo()
    assert complete(port, prompt="a", max_tokens=2)


# --- the command ----------------------------------------------------------------------------------------------------

def test_sigterm_finishes_what_runs(tiny_run):
    """The stream in hand comes to its end, nobody new is let in, and the exit is a success."""
    process = subprocess.Popen([sys.executable, "-m", "fm_jax.serve", f"--workdir={tiny_run[0]}", "--port=0",
                                "--slots=1", "--max_length=128"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "FM_JAX_API_KEY": "one,two"})
    try:
        line = process.stdout.readline()
        name, port = re.match(r"(\w+): http://127.0.0.1:(\d+)/v1, 1 slots of 128 tokens", line).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({
            "model": name, "prompt": "To be", "max_tokens": 120, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}), {"Authorization": "Bearer two"})
        response = connection.getresponse()
        head = response.readline()
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        assert head.startswith(b"data: ") and rest.endswith("data: [DONE]\n\n")
        assert json.loads(rest.split("\n\n")[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 120
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(port)))
    finally:
        process.kill()


def test_mistakes_of_the_command_line(inline, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = inline("serve", f"--workdir={tmp_path}", f"--port={port}")
        assert code == 2 and re.match(f"error: --host=127.0.0.1 --port={port}: .*; give another", err)
    code, _, err = inline("serve", f"--workdir={tmp_path}", "--port=0")
    assert code == 2 and "no run here" in err
    code, _, err = inline("serve", "--help")
    assert code == 0


# --- other people's clients -----------------------------------------------------------------------------------------

def test_the_openai_client(lm, port):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny", "loud"]
    want, = lm.generate(["To be"], max_new_tokens=12)
    made = client.completions.create(model="tiny", prompt="To be", max_tokens=12, temperature=0, logprobs=2)
    assert made.choices[0].text == want and len(made.choices[0].logprobs.token_logprobs) == 12
    parts = client.completions.create(model="tiny", prompt="To be", max_tokens=12, temperature=0, stream=True)
    assert "".join(p.choices[0].text for p in parts) == want
    how = dict(model="tiny", messages=CHAT, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
    chat = client.chat.completions.create(**how)
    parts = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].usage == chat.usage
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == chat.choices[0].message.content
    assert len(chat.choices[0].logprobs.content) == 12
    found = client.embeddings.create(model="tiny", input=["To be"])   # the client asks for base64
    np.testing.assert_allclose(found.data[0].embedding, lm.embed(["To be"])[0], atol=1e-4)
    with pytest.raises(openai.BadRequestError, match="max_tokens must be"):
        client.completions.create(model="tiny", prompt="To be", max_tokens=-1)
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(**how | {"model": "other"})
    assert error.value.code == "model_not_found"


LM_EVAL = """
import json, sys
import lm_eval.models.openai_completions as clients
from lm_eval.api.instance import Instance
port, pairs, texts, prompts = json.loads(sys.stdin.read())
def instances(kind, all_args):
    return [Instance(request_type=kind, doc={}, arguments=tuple(a), idx=i) for i, a in enumerate(all_args)]
out = {}
for batch_size in (1, 4):
    model = clients.LocalCompletionsAPI(base_url=f"http://127.0.0.1:{port}/v1/completions", model="tiny",
                                        tokenizer_backend="remote", max_length=80, batch_size=batch_size, max_retries=1)
    out[batch_size] = [model.loglikelihood(instances("loglikelihood", pairs)),
                       model.loglikelihood_rolling(instances("loglikelihood_rolling", [[t] for t in texts])),
                       model.generate_until(instances("generate_until", prompts))]
print("RESULT" + json.dumps(out))
"""


def test_lm_eval_reads_the_models_own_scores(lm, port):
    """lm-evaluation-harness's `local-completions`, with its tokens from this server, against the logits."""
    python = os.environ.get("LM_EVAL_PYTHON") or sys.executable
    if subprocess.run([python, "-c", "import lm_eval, aiohttp, tenacity"], capture_output=True).returncode:
        pytest.skip("lm_eval is not installed; LM_EVAL_PYTHON names a Python that has it")
    pairs = [("To be", " or not"), ("What is the ques", "tion"), ("", "To"), ("caf\u00e9 ", "\u65e5"), ("x " * 60, "y")]
    texts = ["To be, or not to be", "that is " * 20]
    prompts = [("To be", {"until": ["\n"], "max_gen_toks": 12}), ("or", {"until": [], "max_gen_toks": 5})]
    done = subprocess.run([python, "-c", LM_EVAL], input=json.dumps([port, pairs, texts, prompts]), text=True,
                          capture_output=True, cwd=pathlib.Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    for scores, rolling, made in json.loads(done.stdout.rpartition("RESULT")[2]).values():
        for (context, continuation), (logprob, greedy) in zip(pairs, scores):
            n = len(context) - len(context.rstrip())
            continuation = context[len(context) - n :] + continuation
            ids = [*(context.rstrip().encode() or [256]), *continuation.encode()][-79:]
            k = len(continuation.encode())
            rows = table(lm, ids)[len(ids) - k - 1 : -1]
            assert logprob == pytest.approx(rows[np.arange(k), ids[-k:]].sum(), rel=1e-4, abs=1e-3)
            assert greedy == (rows.argmax(-1) == ids[-k:]).all()
        for text, logprob in zip(texts, rolling):
            assert isinstance(logprob, float) and logprob < 0
        ids = np.array([*b"To be"])
        want, = lm.complete([ids], max_new_tokens=12, stop=["\n"], stop_ids=(256, 257))
        assert made[0] == lm.tokenizer.decode(want.tokens).split("\n")[0]


# --- a model and its adapters


def test_a_request_is_answered_by_the_model_that_it_names(port, lm, other, service):
    """Each as alone, though they run side by side; what the models share is in memory once."""
    assert [m["id"] for m in ask(port, "/v1/models")["data"]] == ["tiny", "loud"]
    assert ask(port, "/v1/models/loud")["id"] == "loud"
    prompts, models = ["To be", "or not", "that is"], {"tiny": lm, "loud": other}
    wanted = {(name, p): model.generate([p], max_new_tokens=20)[0] for name, model in models.items() for p in prompts}
    assert len(set(wanted.values())) == 6
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = {key: pool.submit(complete, port, model=key[0], prompt=key[1], max_tokens=20, temperature=0)
                   for key in wanted}
    for (name, prompt), answer in answers.items():
        assert answer.result()["model"] == name and answer.result()["choices"][0]["text"] == wanted[name, prompt]
    vectors = [ask(port, "/v1/embeddings", {"model": name, "input": "a"})["data"][0]["embedding"] for name in models]
    assert vectors[0] != vectors[1]
    status, _, content = send(port, "/v1/completions", {"model": "quiet", "prompt": "a"})
    assert status == 404 and b"'quiet' is not served here; this is 'tiny', 'loud'" in content
    own, adapted = (tree.flatten(service.engine._params[name]["transformer"]["layers"][0]) for name in ("", "loud"))
    assert {name for name in own if own[name] is not adapted[name]} == {"mlp.w_up"}


@pytest.mark.parametrize("text, message", [("a", "'a' is not of the form name=run"), ("a=,b=c", "'a=' is not of"),
                                           ("a=x,a=y", "a name is given twice")])
def test_adapters_are_named(text, message):
    with pytest.raises(UserError, match=message):
        serve._named_runs(text)

"""The engine: what each request gets alone, whatever runs beside it, fails or goes away."""

import _thread
import queue
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import config as config_lib
from fm_jax import decode, pretrained
from fm_jax import tokenizer as tokenizers
from fm_jax.engine import TOP, Busy, Engine, Made, Request
from fm_jax.errors import UserError

CONTEXT = 80


def tiny(mesh=None, **changes):
    """Returns a Pretrained with the bytes tokenizer and random parameters, large enough for uneven next tokens."""
    c = config_lib.defaults()
    c.model.update(vocab_size=272, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48,
                   max_seq_len=CONTEXT, layer_pattern=("local", "global"), window=20)
    c.seq_len = CONTEXT
    c.data.train = "none"   # trained here, so prompts begin as documents do
    config_lib.override(c, changes)
    tokenizer = tokenizers.load("bytes")
    objective, shapes, _ = pretrained._abstract(config_lib.resolve(c), tokenizer, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jax.device_put(rng.normal(0, 0.4, s.shape).astype(s.dtype), s.sharding), shapes)
    return pretrained.Pretrained(c, tokenizer, objective, params)


@pytest.fixture(scope="module")
def lm():
    return tiny()


@pytest.fixture(scope="module")
def engine(lm):
    engine = Engine(lm, slots=3, max_length=64, max_waiting=16)
    yield engine
    engine.close()


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n)


class Answer:
    """What a request gets: `made` joined, `reading`, or `error`."""

    def __init__(self, engine, prompt, **how):
        self._parts = queue.Queue()
        self.request = Request(prompt, self._parts.put, **how)
        engine.submit([self.request])

    def first(self):
        return self._parts.get(timeout=60)

    def made(self) -> Made:
        parts = [self.first()]
        while isinstance(parts[-1], Made) and not parts[-1].finish:
            parts.append(self.first())
        if isinstance(parts[-1], Exception):
            raise parts[-1]
        assert all(len(p.tokens) for p in parts)
        return Made(*(np.concatenate(x) for x in list(zip(*parts))[:4]), parts[-1].finish)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


SETTINGS = [decode.Sampling(), decode.Sampling(1.4), decode.Sampling(1.0, 7), decode.Sampling(0.8, 0, 0.9, min_p=0.02),
            decode.Sampling(repetition_penalty=1.5), decode.Sampling(1.2, 20, repetition_penalty=0.8)]


def mixture(lm):
    """Returns 14 requests (prompt, fields of a Request) of mixed lengths and settings."""
    out = []
    for i in range(14):
        how = dict(max_tokens=[11, 3, 1, 30, 12][i % 5], sampling=SETTINGS[i % 6], seed=50 + i)
        out.append((ids([3, 16, 1, 20, 9, 17, 33][i % 7], seed=i), how))
    return out


draw = jax.jit(decode.sample)


def alone(lm, prompt, max_tokens, sampling=decode.Sampling(), seed=0, stop_ids=()):
    """Returns what a loop over full forward passes draws: (tokens, float64 log-probabilities [T, V], finish)."""
    row, tables, sampling = list(prompt), [], sampling._replace(vocab_size=lm.tokenizer.vocab_size)
    while len(tables) < max_tokens:
        padded, seen = np.zeros((1, CONTEXT), int), np.zeros((1, 272), bool)
        padded[0, : len(row)], seen[0, row] = row, True
        logits = lm.logits(padded)[:, len(row) - 1]
        tables.append(logits[0] - np.logaddexp.reduce(logits[0].astype(np.float64)))
        row.append(int(draw(logits, np.uint32([seed]), np.int32([len(row)]), sampling.rows(1), seen)[0]))
        if row[-1] in stop_ids:
            break
    return row[len(prompt) :], np.array(tables), "stop" if row[-1] in stop_ids else "length"


@pytest.mark.parametrize("k", [1, 4])
def test_each_request_gets_what_it_gets_alone(lm, engine, k):
    """Fourteen at once through three slots; tokens, log-probabilities and why they ended. Nothing compiles."""
    requests = mixture(lm)
    for prompt, how in requests:
        if how["max_tokens"] > 10:
            how["stop_ids"] = (alone(lm, prompt, **how)[0][7], 271)
    own = Engine(lm, slots=3, max_length=64, max_waiting=16, steps_per_dispatch=k) if k > 1 else engine
    try:
        answers = [Answer(own, prompt, **how) for prompt, how in requests]
        for (prompt, how), answer in zip(requests, answers):
            got, (tokens, logprobs, finish) = answer.made(), alone(lm, prompt, **how)
            assert got.tokens.tolist() == tokens and got.finish == finish
            np.testing.assert_allclose(got.logprobs, logprobs[np.arange(len(tokens)), tokens], rtol=1e-4, atol=1e-4)
            best = -np.sort(-logprobs[:, : lm.tokenizer.vocab_size])[:, :TOP]
            np.testing.assert_allclose(got.top_logprobs, best, rtol=1e-4, atol=1e-4)
            at_top = np.take_along_axis(logprobs, got.top_ids, axis=-1)
            np.testing.assert_allclose(at_top, best, rtol=1e-4, atol=1e-4)
        assert own.metrics.compiles._value.get() == 0
        wait_for(lambda: own.metrics.running._value.get() == own.metrics.waiting._value.get() == 0)
    finally:
        if own is not engine:
            own.close()


def test_seeded_output_is_the_same_to_the_bit_beside_others(lm, engine):
    prompt, how = ids(9), dict(max_tokens=30, sampling=decode.Sampling(1.3), seed=7)
    want = Answer(engine, prompt, **how).made()
    others = [Answer(engine, *mixture(lm)[i][:1], **mixture(lm)[i][1]) for i in range(5)]
    got = Answer(engine, prompt, **how).made()
    np.testing.assert_array_equal(got.logprobs, want.logprobs)
    assert got.tokens.tolist() == want.tokens.tolist() and [a.made().finish for a in others]


def table(lm, ids):
    """Returns float64 log-probabilities [T, V] of what follows each of the ids."""
    logits = lm.logits(np.pad(ids, (0, CONTEXT - len(ids)))[None])[0, : len(ids)].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [1, 16, 17, 64])
def test_a_reading_is_of_the_full_forward_pass(lm, engine, n):
    """Against float64 log-softmax of the logits; of every token, and of what follows the last."""
    prompt = ids(n)
    reading = Answer(engine, prompt).first()
    want = table(lm, prompt)
    np.testing.assert_allclose(reading.logprobs, want[np.arange(n - 1), prompt[1:]], rtol=1e-4, atol=1e-4)
    known = want[:, : lm.tokenizer.vocab_size]
    np.testing.assert_allclose(np.take_along_axis(known, reading.top_ids, axis=-1), reading.top_logprobs, rtol=1e-4,
                               atol=1e-4)
    np.testing.assert_allclose(reading.top_logprobs, -np.sort(-known, axis=-1)[:, :TOP], rtol=1e-4, atol=1e-4)
    hidden = lm.hidden(np.pad(prompt, (0, CONTEXT - n))[None])[0, :n]
    np.testing.assert_allclose(reading.embedding, hidden.mean(0), atol=1e-4)
    greedy = reading.top_ids[:-1, 0] == prompt[1:]   # the same float, where the likeliest is the token itself
    np.testing.assert_array_equal(reading.logprobs[greedy], reading.top_logprobs[:-1, 0][greedy])


def test_a_full_context_is_used_to_its_last_place(lm, engine):
    assert len(Answer(engine, ids(60), max_tokens=4).made().tokens) == 4
    assert len(Answer(engine, ids(1), max_tokens=63).made().tokens) == 63
    with pytest.raises(UserError, match="60 tokens and 5 new ones exceed the maximum context length of 64"):
        Answer(engine, ids(60), max_tokens=5)


@pytest.mark.parametrize("prompt, how, message", [
    ([], {}, "a prompt of 0 tokens"), ([262], {}, "token id 262 is outside the vocabulary of 262"), ([-1], {}, "id -1"),
    ([1], {"stop_ids": range(9)}, "9 stop tokens"), ([1], {"sampling": decode.Sampling(-1.0)}, "temperature=-1.0"),
    ([1], {"sampling": decode.Sampling(float("nan"))}, "temperature=nan")])
def test_what_cannot_be_answered_is_refused(engine, prompt, how, message):
    with pytest.raises(UserError, match=message):
        Answer(engine, prompt, max_tokens=1, **how)
    assert len(Answer(engine, [1], max_tokens=1).made().tokens) == 1


@pytest.mark.parametrize("setting", [{"slots": 0}, {"max_length": 1}, {"max_waiting": 0}, {"steps_per_dispatch": 0}])
def test_settings_are_checked(lm, setting):
    (name, value), = setting.items()
    with pytest.raises(UserError, match=f"{name}={value} must be at least"):
        Engine(lm, **setting)


@pytest.fixture
def held(engine, monkeypatch):
    """Slows the engine to 30 steps a second until it is set, so that requests stay where they are."""
    go, stepped = threading.Event(), engine._stepped

    def slow(model):
        go.wait(1 / 30)
        return stepped(model)
    monkeypatch.setattr(engine, "_stepped", slow)
    yield go
    go.set()
    wait_for(lambda: engine.metrics.running._value.get() == 0 == engine.metrics.waiting._value.get())


def test_cancelled_requests_leave_their_slots_to_others(lm, engine, held):
    first = [Answer(engine, ids(5, i), max_tokens=40, seed=i) for i in range(3)]
    wait_for(lambda: all(engine._active[""]))
    waiting = [Answer(engine, ids(5, 9), max_tokens=40) for _ in range(2)]
    waiting[0].request.cancelled = first[1].request.cancelled = True
    held.set()
    for answer, prompt, seed in ((first[0], ids(5, 0), 0), (waiting[1], ids(5, 9), 0), (first[2], ids(5, 2), 2)):
        assert answer.made().tokens.tolist() == alone(lm, prompt, 40, seed=seed)[0]
    assert waiting[0]._parts.empty()
    assert first[1]._parts.qsize() < 40


def test_a_full_queue_refuses_all_of_a_submission_or_none(engine, held):
    running = [Answer(engine, ids(4), max_tokens=60) for _ in range(3)]
    wait_for(lambda: all(engine._active[""]))
    running += [Answer(engine, ids(4), max_tokens=2) for _ in range(15)]
    with pytest.raises(Busy):
        engine.submit([Request(ids(4), print, max_tokens=2) for _ in range(2)])
    running.append(Answer(engine, ids(4), max_tokens=2))   # one place was left
    assert engine.metrics.waiting._value.get() == 16
    held.set()
    assert [len(answer.made().tokens) for answer in running] == [60] * 3 + [2] * 16


def test_readings_need_no_slot(engine, held):
    running = [Answer(engine, ids(4), max_tokens=60) for _ in range(3)]
    wait_for(lambda: all(engine._active[""]))
    waiting, reading = Answer(engine, ids(4), max_tokens=50), Answer(engine, ids(30))
    assert len(reading.first().logprobs) == 29
    assert running[0]._parts.qsize() < 60 and waiting._parts.empty()


def test_a_request_that_fails_stops_nobody_else(lm, engine, monkeypatch):
    prompt, want = ids(6), alone(lm, ids(6), 30)[0]
    join, score = engine._join, engine._score

    def no_memory(*args):
        raise RuntimeError("out of memory")
    beside = Answer(engine, prompt, max_tokens=30)
    wait_for(lambda: any(engine._active[""]))
    monkeypatch.setattr(engine, "_join", no_memory)
    monkeypatch.setattr(engine, "_score", no_memory)
    bad = [Answer(engine, prompt, max_tokens=30), Answer(engine, prompt)]
    for answer in bad:
        assert "out of memory" in str(answer.first())
    monkeypatch.setattr(engine, "_join", join)
    monkeypatch.setattr(engine, "_score", score)
    assert beside.made().tokens.tolist() == want
    assert want == Answer(engine, prompt, max_tokens=30).made().tokens.tolist()

    def unreachable(part):
        raise ValueError("nobody there")
    engine.submit([Request(prompt, unreachable, max_tokens=30)])
    assert Answer(engine, prompt, max_tokens=30).made().tokens.tolist() == want and engine.alive
    assert engine.metrics.failures._value.get() == 2


def test_slots_that_a_failure_took_are_made_anew(lm, engine, held, monkeypatch):
    running = [Answer(engine, ids(6), max_tokens=30) for _ in range(2)]
    wait_for(lambda: len(engine._running()) == 2)
    stepped = engine._stepped

    def lost(model):
        stepped(model)
        jax.tree.map(lambda x: x.delete(), engine._slots[""])
        monkeypatch.setattr(engine, "_stepped", stepped)
        raise RuntimeError("device lost")
    monkeypatch.setattr(engine, "_stepped", lost)
    held.set()
    for answer in running:
        with pytest.raises(RuntimeError, match="device lost"):
            answer.made()
    assert Answer(engine, ids(6), max_tokens=30).made().tokens.tolist() == alone(lm, ids(6), 30)[0] and engine.alive
    assert engine.metrics.compiles._value.get() == 0


def test_a_compilation_is_counted(lm):
    engine, done = Engine(lm, slots=1, max_length=16), threading.Event()
    try:
        jax.jit(lambda x: x * 3.25)(jnp.ones(3))   # of another thread: not the engine's
        assert engine.metrics.compiles._value.get() == 0
        engine.submit([Request([1], lambda part: (jax.jit(lambda x: x * 4.25)(np.ones(3)), done.set()))])
        assert done.wait(60) and engine.metrics.compiles._value.get() >= 1
    finally:
        engine.close()


def test_closing_tells_those_who_wait(lm):
    engine = Engine(lm, slots=1, max_length=32)
    answers = [Answer(engine, ids(2), max_tokens=30) for _ in range(3)]
    engine.close()
    for answer in answers[1:]:
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            answer.made()
    assert not engine.alive
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        Answer(engine, ids(2), max_tokens=3)


def test_an_interrupt_while_programs_are_compiled_ends_the_thread(lm, monkeypatch):
    """A thread inside XLA when the interpreter ends would be a crash."""
    def endless(self):
        _thread.interrupt_main()
        wait_for(lambda: self._closing)
    monkeypatch.setattr(Engine, "_warm_up", endless)
    before, handler = set(threading.enumerate()), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell may have started this with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            Engine(lm, slots=1, max_length=16)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_a_mesh_changes_nothing(lm):
    """Data, fsdp and tensor axes; the same tokens, and nothing compiles."""
    with pytest.raises(UserError, match="slots=6 must be a multiple of 4, into which the mesh cuts a batch"):
        Engine(tiny({"data": 2, "fsdp": 2, "tensor": 2}), slots=6)
    engine = Engine(tiny({"data": 2, "fsdp": 2, "tensor": 2}), slots=4, max_length=64)
    try:
        answers = [Answer(engine, prompt, **how) for prompt, how in mixture(lm)]
        reading = Answer(engine, ids(20)).first()
        for (prompt, how), answer in zip(mixture(lm), answers):
            assert answer.made().tokens.tolist() == alone(lm, prompt, **how)[0]
        np.testing.assert_allclose(reading.logprobs, table(lm, ids(20))[np.arange(19), ids(20)[1:]], rtol=1e-4,
                                   atol=1e-4)
        assert engine.metrics.compiles._value.get() == 0
    finally:
        engine.close()

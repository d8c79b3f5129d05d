"""Answers many requests at once: one thread owns JAX and the slots, requests reach it through a queue. Layer 4.

    engine = Engine(fm_jax.load("runs/x"))
    engine.submit([Request(ids, print, max_tokens=8)])
    engine.close()

Its programs are three: `_score` reads tokens, `_join` reads a prompt and puts it into a free slot, `_go_on` adds tokens
to all slots. The first two have one for each prompt bucket. All are compiled at the start; what is compiled later is
counted. A base and its adapters share the programs; each has slots of its own. What a request draws depends on its
prompt, seed and settings alone: prompts are read one at a time, every dispatch has the same shape, and rows do not mix.
"""

from collections import deque
from collections.abc import Callable
import dataclasses
import logging
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import prometheus_client as prometheus

from fm_jax import decode
from fm_jax.decode import Sampling, Slots
from fm_jax.errors import UserError, choose
from fm_jax.model import Cache

TOP = 20          # likeliest tokens given in each place: the most that OpenAI's chat API allows
STOP_IDS = 8      # tokens that may end a request
SCORED = 128      # places whose logits `_score` holds at a time
COMPILED = "/jax/core/compile/backend_compile_duration"   # what jax.monitoring calls a compilation


class Busy(Exception):
    """The queue is full."""


class Made(NamedTuple):
    """Tokens added to a request, in order; a stop token, too."""

    tokens: np.ndarray         # int32 [T]
    logprobs: np.ndarray       # float32 [T], natural, the model's own
    top_ids: np.ndarray        # int32 [T, TOP], the likeliest in each place
    top_logprobs: np.ndarray   # float32 [T, TOP]
    finish: str                # "stop": by a stop token; "length": max_tokens; "": more come


class Reading(NamedTuple):
    """What the model makes of a request's n tokens."""

    logprobs: np.ndarray | None       # float32 [n - 1], of each token but the first
    top_ids: np.ndarray | None        # int32 [n, TOP], the likeliest after each token
    top_logprobs: np.ndarray | None   # float32 [n, TOP]
    embedding: np.ndarray             # float32 [D], the mean of the final hidden states, or what the model was made for


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to read (max_tokens 0: its answer is one Reading) or to continue (several Made).

    `deliver` gets the answer's parts, or an exception that ends it, on the engine's thread: it must be quick.
    """

    ids: Any                            # int [n]
    deliver: Callable[[Made | Reading | Exception], None]
    max_tokens: int = 0
    sampling: Sampling = Sampling()
    seed: int = 0                       # uint32
    stop_ids: tuple[int, ...] = ()
    model: str = ""                     # of the engine's adapters; "": the model itself
    cancelled: bool = False             # set by whoever waits no longer; nothing more is delivered
    count: int = 0                      # tokens added so far
    last_s: float = 0.0                 # when the last were delivered; before, when it was submitted


class Metrics:
    """What a server's /metrics shows, in a registry of its own."""

    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        make = lambda kind, name, text, **how: kind(f"fm_jax_{name}", text, registry=self.registry, **how)
        self.running = make(prometheus.Gauge, "requests_running", "Requests that hold a slot.")
        self.waiting = make(prometheus.Gauge, "requests_waiting", "Requests in the queue.")
        self.cache_use = make(prometheus.Gauge, "cache_use_ratio", "Share of the slots' places that hold a token.")
        self.first_s = make(prometheus.Histogram, "time_to_first_token_seconds", "From the queue to the first token.")
        self.between_s = make(prometheus.Histogram, "inter_token_seconds", "From one token of a request to the next.")
        self.prompt_tokens = make(prometheus.Counter, "prompt_tokens", "Tokens read.")
        self.made_tokens = make(prometheus.Counter, "generated_tokens", "Tokens added.")
        self.compiles = make(prometheus.Counter, "compiles", "Programs compiled after the start; more than 0 is a bug, but "
                             "of a model that makes vectors: one for each new shape.")
        self.failures = make(prometheus.Counter, "failures", "Requests that ended with an error of the engine.")
        self.responses = make(prometheus.Counter, "responses", "HTTP responses.", labelnames=["path", "status"])


class Engine:
    """A model with slots, on a thread of its own."""

    def __init__(self, lm, *, slots: int = 8, max_length: int = 2048, max_waiting: int = 128,
                 steps_per_dispatch: int = 1, adapters: dict | None = None):
        """Returns an engine whose programs are compiled.

        Args:
          lm: `fm_jax.load`'s.
          slots: requests continued at once; a multiple of what the mesh cuts batches into.
          max_length: most tokens of a prompt and its continuation; at most the model's context.
          max_waiting: requests in the queue; more are refused.
          steps_per_dispatch: tokens added between two looks of the host; the result is the same.
          adapters: {name of a request's model: parameters of the same architecture}.

        Raises:
          UserError: a setting that cannot be, or a model without a decoder.
        """
        if "encode" in lm.objective.predict:
            raise UserError(f"{lm.config.objective} has an encoder beside its decoder, which the server does not read; "
                            "use fm_jax.generate")
        if "decode" not in lm.objective.predict:
            raise UserError(f"{lm.config.objective} has no `predict[\"decode\"]`: it cannot continue text")
        self._objective, self._layout = lm.objective, lm.module.layout
        arch = self._arch = lm.objective.arch
        self.max_length = min(max_length, arch.max_seq_len)
        self._parts = self._layout.batch_parts
        for name, value, least in (("slots", slots, self._parts), ("max_length", max_length, 2),
                                   ("max_waiting", max_waiting, 1), ("steps_per_dispatch", steps_per_dispatch, 1)):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if slots % self._parts:
            raise UserError(f"slots={slots} must be a multiple of {self._parts}, into which the mesh cuts a batch")
        self.max_waiting, self._vocab_size = max_waiting, lm.tokenizer.vocab_size
        own = decode.per_layer(lm.params)
        self._params = {"": own} | {name: decode.per_layer(params, (lm.params, own))
                                    for name, params in (adapters or {}).items()}
        self._buckets = [b for b in (decode.SMALLEST_BUCKET << i for i in range(32)) if b < self.max_length]
        self._buckets.append(self.max_length)
        self.metrics = Metrics()
        self._compile(slots, steps_per_dispatch)
        self._begin({name: [None] * slots for name in self._params})

    def _begin(self, active):
        """Returns when the thread is ready."""
        self._active: dict[str, list[Request | None]] = active   # of each model, by slot
        self._waiting: deque[Request] = deque()
        self._changed, self._closing, self._warm = threading.Condition(), False, threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        try:
            self._thread.start()
            self._warm.wait()
        except BaseException:   # an interrupt: a thread that still compiles would crash the end of the interpreter
            self.close()
            raise
        if self._failure:
            self.close()
            raise self._failure

    # --- what other threads call ------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Returns nothing. Raises UserError for a request that cannot be answered, whenever it came."""
        if self._active:   # of slots
            choose(request.model, self._active, "model")
        ids, n = np.asarray(request.ids), len(request.ids)
        if not n:
            raise UserError("a prompt of 0 tokens: give at least one, such as the beginning-of-text token")
        if n + request.max_tokens > self.max_length:
            raise UserError(f"a prompt of {n} tokens and {request.max_tokens} new ones exceed the maximum context "
                            f"length of {self.max_length} tokens; shorten one of them")
        if not 0 <= ids.min() <= ids.max() < self._vocab_size:
            bad = ids[(ids < 0) | (ids >= self._vocab_size)][0]
            raise UserError(f"token id {bad} is outside the vocabulary of {self._vocab_size}")
        if len(request.stop_ids) > STOP_IDS:
            raise UserError(f"{len(request.stop_ids)} stop tokens; at most {STOP_IDS}")
        request.sampling.check()

    def submit(self, requests: list[Request]) -> None:
        """Returns nothing: puts the requests into the queue, all or none.

        Raises:
          UserError: as `check`.
          Busy: the queue has no room for them now.
        """
        for request in requests:
            self.check(request)
        with self._changed:
            if self._failure or self._closing:
                raise RuntimeError("the engine has stopped") from self._failure
            if len(self._waiting) + len(requests) > self.max_waiting:
                raise Busy
            for request in requests:
                request.last_s = time.monotonic()
            self._waiting.extend(requests)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._failure

    def close(self) -> None:
        """Returns when the thread has ended; what still runs or waits gets an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the programs -----------------------------------------------------------------------------------------------

    def _compile(self, slots, steps_per_dispatch):
        """Makes the programs, on the mesh of the parameters. The slots keep one placement whatever made them."""
        objective, arch, parts = self._objective, self._arch, self._parts
        forward, module = objective.predict["decode"], objective.module
        empty = lambda: Slots.empty(arch, slots, self.max_length, STOP_IDS)
        placed = self._slot_shardings(jax.eval_shape(empty))
        everywhere = self._layout.replicated

        def join(params, slots, slot, tokens_T, length, max_tokens, seed, sampling, stop_ids_S):
            T = len(tokens_T)
            rows = lambda x: jnp.broadcast_to(x, (parts, *jnp.shape(x)))   # the mesh cuts the batch; one row is used
            logits, cache = decode.prefill(forward, params, rows(tokens_T), Cache.empty(arch, parts, T), rows(length))
            seen_V = jnp.zeros(arch.vocab_size, bool).at[jnp.where(jnp.arange(T) < length, tokens_T, arch.vocab_size)
                                                         ].set(True, mode="drop")
            row = Slots(jnp.zeros(parts, jnp.int32), cache, rows(max_tokens), rows(seed), sampling.rows(parts),
                        rows(stop_ids_S), rows(seen_V))
            row, drawn = decode.begin(row, logits, TOP)
            return decode.insert(slots, slot, row), drawn

        def score(params, tokens_T, length):
            T, C = len(tokens_T), min(len(tokens_T), SCORED)
            hidden_BTD, _ = objective.predict["hidden"](params, jnp.broadcast_to(tokens_T, (parts, T)))
            def some(chunk):
                hidden_CD, next_C = chunk
                logits_CV = module.apply({"params": params}, hidden_CD[None], method="logits")[0]
                return decode.token_logprobs(logits_CV, next_C, jnp.full(C, self._vocab_size), TOP)
            cut = lambda x: jnp.pad(x, ((0, -T % C),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, C, *x.shape[1:])
            out = jax.lax.map(some, (cut(hidden_BTD[0]), cut(jnp.roll(tokens_T, -1))))
            real_T1 = (jnp.arange(T) < length)[:, None]
            mean_D = jnp.where(real_T1, hidden_BTD[0], 0).sum(0, dtype=jnp.float32) / length
            return *(x.reshape(-1, *x.shape[2:])[:T] for x in out), mean_D

        self._empty = jax.jit(empty, out_shardings=placed)
        self._join = jax.jit(join, donate_argnums=1, out_shardings=(placed, everywhere))
        self._score = jax.jit(score, out_shardings=everywhere)
        self._go_on = jax.jit(lambda params, slots: decode.steps(forward, params, slots, k=steps_per_dispatch,
                                                                 logprobs=TOP),
                              donate_argnums=1, out_shardings=(placed, everywhere))
        self._release = jax.jit(decode.release, donate_argnums=0, out_shardings=placed)

    def _slot_shardings(self, slots):
        batch = lambda x: self._layout.sharding(("batch",) + (None,) * (x.ndim - 1), x.shape, activation=True)
        held = lambda x: self._layout.sharding(("batch", "kv_heads", None, None), x.shape, activation=True)
        placed = jax.tree.map(batch, slots)
        return placed._replace(cache=placed.cache._replace(k=jax.tree.map(held, slots.cache.k),
                                                           v=jax.tree.map(held, slots.cache.v)))

    def _heard(self, event, seconds, **_):
        if event == COMPILED and threading.current_thread() is self._thread and self._warm.is_set():
            self.metrics.compiles.inc()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self):
        try:
            self._warm_up()
            self._warm.set()
            while (request := self._next()) is not None or not self._closing:
                self._drop()
                if request and not request.cancelled:
                    (self._admit if request.max_tokens else self._read)(request)
                for model in self._active:
                    if any(self._active[model]):
                        self._step(model)
        except BaseException as error:   # a bug, or no memory at the start: whoever waits hears of it
            self._failure = error
        finally:
            self._warm.set()
            jax.monitoring.unregister_event_duration_listener(self._heard)
            with self._changed:
                left = [*self._running(), *self._waiting]
                self._active, self._waiting = {m: [None] * len(rows) for m, rows in self._active.items()}, deque()
            for request in left:
                self._deliver(request, self._failure or RuntimeError("the engine has stopped"))

    def _warm_up(self):
        """Runs every program in every shape; twice, so that it has also met what the others hand on."""
        self._slots = {model: self._empty() for model in self._params}
        for _ in range(2):
            for bucket in self._buckets:
                if self._closing:
                    return
                ids = np.zeros(bucket, np.int32)
                self._start(Request(ids[: min(bucket, self.max_length - 1)], print, max_tokens=1), 0)
                self._scored("", ids)
                self._stepped("")
            self._let_go("", [0])

    def _running(self) -> list[Request]:
        return [request for rows in self._active.values() for request in rows if request]

    def _next(self) -> Request | None:
        """Returns the first request of the queue that can go on; waits while there is nothing at all to do."""
        with self._changed:
            while not (self._waiting or self._running() or self._closing):
                self._changed.wait()
            if self._closing:
                return None
            self._waiting = deque(r for r in self._waiting if not r.cancelled)
            free = {model for model, rows in self._active.items() if None in rows}
            request = next((r for r in self._waiting if r.model in free or not r.max_tokens), None)
            if request:
                self._waiting.remove(request)
            self.metrics.waiting.set(len(self._waiting))
            return request

    def _admit(self, request):
        """Reads a prompt into a free slot and delivers its first token."""
        slot = self._active[request.model].index(None)
        try:
            drawn = self._start(request, slot)
        except Exception as error:
            return self._fail([request], error)
        self._active[request.model][slot] = request
        now = time.monotonic()
        self.metrics.first_s.observe(now - request.last_s)
        self.metrics.prompt_tokens.inc(len(request.ids))
        self._give(request.model, slot, drawn, 0, now)

    def _read(self, request):
        try:
            reading = self._scored(request.model, np.asarray(request.ids, np.int32))
        except Exception as error:
            return self._fail([request], error)
        self.metrics.prompt_tokens.inc(len(request.ids))
        self._deliver(request, reading)

    def _step(self, model):
        """Adds tokens to every row of a model and delivers them."""
        try:
            drawn = self._stepped(model)
        except Exception as error:
            return self._fail([], error)
        now = time.monotonic()
        for slot, request in enumerate(self._active[model]):
            if request:
                self._give(model, slot, drawn, slot, now)
        self._count()

    def _drop(self):
        """Frees the slots of requests that nobody waits for."""
        for model, rows in self._active.items():
            gone = [i for i, request in enumerate(rows) if request and request.cancelled]
            if gone:
                for i in gone:
                    rows[i] = None
                try:
                    self._let_go(model, gone)
                except Exception as error:
                    self._fail([], error)
                self._count()

    def _give(self, model, slot, drawn, row, now):
        request = self._active[model][slot]
        real = drawn.real[:, row]
        made = Made(*(x[real, row] for x in (drawn.token, drawn.logprob, drawn.top_ids, drawn.top_logprobs)), "")
        n = len(made.tokens)
        request.count += n
        if made.tokens[-1] in request.stop_ids:
            made = made._replace(finish="stop")
        elif request.count == request.max_tokens:
            made = made._replace(finish="length")
        if request.count > n:
            for _ in range(n):
                self.metrics.between_s.observe((now - request.last_s) / n)
        request.last_s = now
        self.metrics.made_tokens.inc(n)
        if made.finish:
            self._active[model][slot] = None
        self._deliver(request, made)

    def _deliver(self, request, part):
        if request.cancelled:
            return
        try:
            request.deliver(part)
        except Exception:   # of one request: whoever waited for it has gone
            logging.getLogger(__name__).exception("a request's answer could not be delivered")
            request.cancelled = True

    def _fail(self, requests, error):
        """Ends the requests, and all that hold a slot if the slots went down with them; the next ones go on."""
        logging.getLogger(__name__).error("a request failed", exc_info=error)
        for model in [m for m, slots in self._slots.items() if any(x.is_deleted() for x in jax.tree.leaves(slots))]:
            requests = requests + [r for r in self._active[model] if r]
            self._active[model][:] = [None] * len(self._active[model])
            self._slots[model] = self._empty()
        for request in requests:
            self.metrics.failures.inc()
            self._deliver(request, error)
        self._count()

    def _count(self):
        running, places = self._running(), sum(map(len, self._active.values())) * self.max_length
        self.metrics.running.set(len(running))
        self.metrics.cache_use.set(sum(len(r.ids) + r.count for r in running) / places)

    # --- calls of the programs, NumPy in and out --------------------------------------------------------------------

    def _padded(self, ids):
        tokens = np.zeros(next(b for b in self._buckets if b >= len(ids)), np.int32)
        tokens[: len(ids)] = ids
        return tokens

    def _start(self, request, slot):
        stop_ids = np.full(STOP_IDS, -1, np.int32)
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        kinds = (np.float32, np.int32, np.float32, np.int32, np.float32, np.float32)
        sampling = request.sampling._replace(vocab_size=self._vocab_size)
        model = request.model
        self._slots[model], drawn = self._join(
            self._params[model], self._slots[model], np.int32(slot), self._padded(request.ids), np.int32(len(request.ids)),
            np.int32(request.max_tokens), np.uint32(request.seed), Sampling(*(k(x) for k, x in zip(kinds, sampling))),
            stop_ids)
        return jax.device_get(drawn)

    def _scored(self, model, ids):
        logprobs, top_ids, top_logprobs, embedding = jax.device_get(
            self._score(self._params[model], self._padded(ids), np.int32(len(ids))))
        n = len(ids)
        return Reading(logprobs[: n - 1], top_ids[:n], top_logprobs[:n], embedding)

    def _stepped(self, model):
        self._slots[model], drawn = self._go_on(self._params[model], self._slots[model])
        return jax.device_get(drawn)

    def _let_go(self, model, slots):
        ended = np.zeros(len(self._active[model]), bool)
        ended[slots] = True
        self._slots[model] = self._release(self._slots[model], ended)


class VectorEngine(Engine):
    """The same for a model that makes vectors of texts and continues none: all that wait are read together."""

    def __init__(self, lm, *, max_waiting: int = 128):
        """Raises UserError for a model that makes no vectors."""
        if "embed" not in lm.objective.predict:
            raise UserError(f"{lm.config.objective} can neither continue text nor make vectors of it: it has "
                            f"{', '.join(sorted(lm.objective.predict))}")
        self._lm, self._slots, self.max_length = lm, {}, lm.objective.arch.max_seq_len
        self.max_waiting, self._vocab_size, self.metrics = max_waiting, lm.tokenizer.vocab_size, Metrics()
        self._begin({})

    def check(self, request: Request) -> None:
        if request.max_tokens:
            raise UserError(f"{self._lm.config.objective} cannot continue text: it makes vectors of it")
        super().check(request)

    def _warm_up(self):
        self._lm.embed_ids([np.zeros(1, np.int32)])

    def _read(self, request):
        with self._changed:
            requests = [request, *(r for r in self._waiting if not r.cancelled)]
            self._waiting.clear()
            self.metrics.waiting.set(0)
        try:
            vectors = self._lm.embed_ids([np.asarray(r.ids, np.int32) for r in requests])
        except Exception as error:
            return self._fail(requests, error)
        for each, vector in zip(requests, vectors):
            self.metrics.prompt_tokens.inc(len(each.ids))
            self._deliver(each, Reading(None, None, None, vector))

    def _count(self):
        pass   # there are no slots

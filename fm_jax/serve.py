"""Serves the model of a run over HTTP, in the format of OpenAI's API.

    python -m fm_jax.serve --workdir runs/x --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The history of"}'
    curl -N localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

/v1/models, /v1/completions, /v1/chat/completions, /v1/embeddings; /tokenize, /detokenize, /tokenizer_info, /health,
/metrics. Beside OpenAI's fields: top_k, min_p, repetition_penalty, ignore_eos, add_generation_prompt,
continue_final_message. Where --api_key or the environment variable FM_JAX_API_KEY (several: with commas) names keys,
all but /health and /metrics need one: `Authorization: Bearer KEY`. SIGTERM and Ctrl-C finish what runs, and end; a
second Ctrl-C ends at once. Layer 5.
"""

import asyncio
import base64
import codecs
from collections.abc import AsyncIterator
import hmac
import json
import logging
import os
from pathlib import Path
import resource
import secrets
import signal
import socket
import time
from typing import Any, NamedTuple

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError, choose

LOWEST = -9999.0        # for a log-probability that JSON cannot express
OPEN_FILES = 16_384     # connections, and some
BACKLOG = 2048          # connections that wait to be taken
BODY_S = 60             # for a client to send its request
RETRY_S = 2             # after which a refused client may come again
PENALTY = 100.0         # highest temperature and repetition_penalty: float32 stays finite
ROLES = ("system", "developer", "user", "assistant")
# What a model may answer to, that this server does not do: refused where it is set to more than these.
UNSUPPORTED = {"best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
               "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
               "response_format": ({"type": "text"},), "modalities": (["text"],), "web_search_options": (), "audio": (),
               "prediction": (), "use_beam_search": (False,)}


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0: on all of the machine", flag_values=fv)
    flags.DEFINE_integer("port", 8000, "0: any that is free", flag_values=fv, lower_bound=0, upper_bound=65535)
    flags.DEFINE_multi_string("api_key", [], "accept requests with this key only; may be given several times. Or in "
                              "the environment, where other users do not see it: FM_JAX_API_KEY", flag_values=fv)
    flags.DEFINE_string("model_name", "", "the model's name; default that of the folder", flag_values=fv)
    flags.DEFINE_string("adapters", "", "runs of adapters of this model, as in polite=runs/polite,sql=runs/sql; a "
                        "request names one as its model", flag_values=fv)
    flags.DEFINE_integer("slots", 8, "requests continued at once, of each model", flag_values=fv, lower_bound=1)
    flags.DEFINE_integer("max_length", 2048, "most tokens of a prompt and its continuation; at most the model's "
                         "context", flag_values=fv, lower_bound=2)
    flags.DEFINE_integer("max_waiting", 128, "continuations in the queue; more are refused with 429", flag_values=fv,
                         lower_bound=1)
    flags.DEFINE_integer("max_body_bytes", 8 << 20, "of a request; larger ones are refused with 413", flag_values=fv,
                         lower_bound=1)
    flags.DEFINE_integer("steps_per_dispatch", 1, "tokens added between two looks of the host; more suits accelerators",
                         flag_values=fv, lower_bound=1)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)


# --- the text of tokens -------------------------------------------------------------------------------------------

class Token(NamedTuple):
    """A token as a reply shows it."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]   # (id, log-probability) of the likeliest in its place, best first
    at: int = 0                    # characters of the text before it


class Transcript:
    """The text of tokens that come one after another: never half a character, nor the beginning of a stop string."""

    def __init__(self, token_text: list[bytes], stop=(), begin: int = 0):
        self._token_text, self._stop, self._begin = token_text, stop, begin
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._sent, self._sure = "", 0, 0
        self._held: list[Token] = []
        self.stopped = False

    def add(self, token: Token) -> bool:
        """Returns whether a stop string has ended the text."""
        from fm_jax.decode import find_stop

        self._held.append(token._replace(at=len(self._text)))
        self._text += self._decoder.decode(self._token_text[token.id])
        sure, self.stopped = find_stop(self._text[self._sent :], self._stop)
        self._sure = self._sent + sure
        if self.stopped:
            self._text = self._text[: self._sure]
        return self.stopped

    def take(self, last: bool = False) -> tuple[str, list[Token]]:
        """Returns the text that is new and sure, and its tokens; last: all that remains."""
        if last and not self.stopped:
            self._text += self._decoder.decode(b"", final=True)
            self._sure = len(self._text)
        keep = len(self._held) if last and not self.stopped else sum(t.at < self._sure for t in self._held)
        text, self._sent = self._text[self._sent : self._sure], self._sure
        tokens, self._held = self._held[:keep], self._held[keep:]
        return text, [t._replace(at=self._begin + t.at) for t in tokens]


# --- requests -----------------------------------------------------------------------------------------------------

class Refused(Exception):
    """A request that gets an error: its status, message, and what OpenAI's error body says beside it."""

    def __init__(self, status: int, message: str, *, param=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


class Fields:
    """The JSON object of a request, read with checks; null is as good as absent."""

    def __init__(self, body: bytes):
        try:
            self._body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the request is not JSON: {error}") from None
        if not isinstance(self._body, dict):
            raise Refused(400, "the request must be a JSON object, with its fields by name")
        for name, allowed in UNSUPPORTED.items():
            if self._body.get(name) is not None and self._body[name] not in allowed:
                raise Refused(400, f"{name} is not supported by this server; leave it out", param=name)

    def raw(self, name):
        return self._body.get(name)

    def bool(self, name, default=False) -> bool:
        return self._read(name, default, lambda x: isinstance(x, bool), "true or false")

    def int(self, name, default, low=None, high=None):
        fits = lambda x: type(x) is int and (low is None or x >= low) and (high is None or x <= high)
        return self._read(name, default, fits, "an integer" + _between(low, high))

    def number(self, name, default, low, high) -> float:
        fits = lambda x: type(x) in (int, float) and low <= x <= high
        return float(self._read(name, default, fits, "a number" + _between(low, high)))

    def text(self, name, default=None):
        return self._read(name, default, lambda x: isinstance(x, str), "a text")

    def texts(self, name, most: int) -> list[str]:
        """Returns a list of texts, given as such or as one."""
        fits = lambda x: isinstance(x, str) or isinstance(x, list) and all(isinstance(t, str) for t in x)
        found = self._read(name, [], fits, "a text or a list of texts")
        found = [found] if isinstance(found, str) else found
        if "" in found or len(found) > most:
            raise Refused(400, f"{name}: at most {most} texts, none of them empty", param=name)
        return found

    def _read(self, name, default, fits, what):
        value = self._body.get(name)
        if value is None:
            return default
        if not fits(value):
            raise Refused(400, f"{name} must be {what}, not {json.dumps(value)[:80]}", param=name)
        return value


def _between(low, high):
    return (f" of at least {low}" if low is not None else "") + (f" and at most {high}" if high is not None else "")


class Prompt(NamedTuple):
    ids: list[int]        # what the model reads
    text: str             # as an echo gives it
    hidden: int = 0       # of the ids, the first so many are not the caller's and not echoed


class Job(NamedTuple):
    """A completion or a chat: n choices for each prompt, choice i drawn with seed + i."""

    prompts: list[Prompt]
    n: int
    max_tokens: int
    sampling: Any                # decode.Sampling
    seed: int
    stop: list[str]
    stop_ids: tuple[int, ...]
    logprobs: int | None         # likeliest tokens to show in each place; None: no log-probabilities
    echo: bool
    stream: bool
    usage: bool                  # at the end of a stream
    chat: bool
    model: str                   # its name


class Service:
    """The model and its engine, as requests see them. Its methods are quick or run in a thread of their own."""

    def __init__(self, lm, engine, name: str, keys=(), max_body_bytes: int = 8 << 20, adapters=()):
        """name: of the model. adapters: those of the engine's adapters."""
        from fm_jax.data.prepared import document_ends

        self.lm, self.engine, self.name, self.max_body_bytes = lm, engine, name, max_body_bytes
        self.models = {name: "", **{adapter: adapter for adapter in adapters}}   # -> a Request's model
        self.keys = [key.encode() for key in keys]
        self.created = int(time.time())
        self.token_text = lm.tokenizer.token_text_bytes()
        self._spelling = {i: text for text, i in lm.tokenizer.specials.items()}
        self.continues = "decode" in lm.objective.predict   # else it makes vectors alone
        self.ends = document_ends(lm.tokenizer) if self.continues else ()
        self._longest = max(1, *map(len, self.token_text))

    def named(self, name: str | None) -> str:
        """Returns the name of the model that a request means. Raises Refused for another's."""
        if name is not None and name not in self.models:
            here = ", ".join(map(repr, self.models))
            raise Refused(404, f"the model {name!r} is not served here; this is {here}", param="model",
                          code="model_not_found")
        return self.name if name is None else name

    def fields(self, body: bytes) -> Fields:
        fields = Fields(body)
        self.named(fields.text("model"))
        return fields

    def completion(self, body: bytes) -> Job:
        fields = self.fields(body)
        self._must_continue()
        prompts = self.prompts(fields, "prompt")
        suffix, echo = fields.text("suffix"), fields.bool("echo")
        if suffix is not None:
            if echo:
                raise Refused(400, "echo with a suffix is not supported", param="echo")
            prompts = [self._around(prompt, suffix) for prompt in prompts]
        return self._job(fields, prompts, fields.int("max_tokens", 16, 0), fields.int("logprobs", None, 0, _top()),
                         echo=echo, chat=False)

    def chat(self, body: bytes) -> Job:
        fields = self.fields(body)
        self._must_continue()
        ids = self.chat_ids(fields)
        rest = self.engine.max_length - len(ids)
        max_tokens = fields.int("max_completion_tokens", fields.int("max_tokens", max(rest, 1), 1), 1)
        top = fields.int("top_logprobs", None, 0, _top())
        wanted = fields.bool("logprobs")
        if top is not None and not wanted:
            raise Refused(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self._job(fields, [Prompt(ids, "")], max_tokens, (top or 0) if wanted else None, echo=False, chat=True)

    def _must_continue(self):
        if not self.continues:
            raise Refused(400, f"{self.name!r} makes vectors of texts and continues none: ask /v1/embeddings")

    def prompts(self, fields, name) -> list[Prompt]:
        """Returns the prompts of a field: a text, texts, token ids, or lists of them."""
        value = fields.raw(name)
        ids = lambda x: isinstance(x, list) and all(type(i) is int for i in x)
        if isinstance(value, str) or (ids(value) and value):
            value = [value]
        if not isinstance(value, list) or not value or not (all(isinstance(p, str) for p in value)
                                                            or all(ids(p) for p in value)):
            raise Refused(400, f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists",
                          param=name)
        self.fits(len(value))
        return [self._prompt(p, name) for p in value]

    def fits(self, requests: int) -> None:
        if requests > self.engine.max_waiting:
            raise Refused(400, f"a request for {requests} readings and replies is more than this server's queue of "
                               f"{self.engine.max_waiting}: send several")

    def _prompt(self, prompt, name) -> Prompt:
        if isinstance(prompt, list):
            vocab_size = self.lm.tokenizer.vocab_size
            if bad := [i for i in prompt if not 0 <= i < vocab_size]:
                raise Refused(400, f"{name}: token id {bad[0]} is outside the vocabulary of {vocab_size}", param=name)
            return Prompt(prompt, self.text(prompt)) if prompt else self._prompt("", name)
        if not self.continues:   # what is too long is cut
            return Prompt(self.lm.embedded_ids([prompt])[0].tolist(), prompt)
        self._short_enough(prompt)
        ids, = self.lm.prompt_ids([prompt])
        return Prompt(ids.tolist(), prompt, int(len(ids) > 0 and not self.token_text[ids[0]]))

    def _around(self, prompt, suffix) -> Prompt:
        """Returns the prompt whose continuation is what stands between `prompt` and `suffix`."""
        if self.lm.tokenizer.fim_ids is None:
            raise Refused(400, "suffix: this model's tokenizer has no fill-in-the-middle tokens", param="suffix")
        self._short_enough(suffix)
        before, after, middle = self.lm.tokenizer.fim_ids
        ids = [*prompt.ids[: prompt.hidden], before, *prompt.ids[prompt.hidden :], after,
               *self.lm.tokenizer.encode(suffix).tolist(), middle]
        return Prompt(ids, "", prompt.hidden)

    def chat_ids(self, fields) -> list[int]:
        messages = _messages(fields.raw("messages"))
        self._short_enough("".join(message["content"] for message in messages))
        within = fields.bool("continue_final_message")
        text = self.lm.tokenizer.chat(messages, continue_final_message=within,
                                      add_generation_prompt=fields.bool("add_generation_prompt", not within))
        return self.lm.encode([text])[0].tolist()

    def tokenize(self, body: bytes) -> dict:
        fields = Fields(body)
        if fields.raw("messages") is not None:
            tokens = self.chat_ids(fields)
        elif fields.bool("add_special_tokens", True):
            read = self.lm.prompt_ids if self.continues else self.lm.embedded_ids
            tokens = read([fields.text("prompt", "")])[0].tolist()
        else:
            tokens = self.lm.tokenizer.encode(fields.text("prompt", ""), special=True).tolist()
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.engine.max_length}

    def detokenize(self, body: bytes) -> dict:
        tokens = Fields(body).raw("tokens")
        if not isinstance(tokens, list) or not all(type(i) is int and abs(i) < 2**31 for i in tokens):
            raise Refused(400, "tokens must be a list of token ids", param="tokens")
        return {"prompt": self.lm.tokenizer.decode(tokens)}

    def tokenizer_info(self) -> dict:
        named = {f"{which}_token": getattr(self.lm.tokenizer, f"{which}_id") for which in ("bos", "eos", "pad")}
        return {"tokenizer_class": type(self.lm.tokenizer).__name__, "chat_template": self.lm.tokenizer.chat_template,
                "model_max_length": self.engine.max_length,
                **{name: None if i is None else self.shown(i) for name, i in named.items()}}

    def _short_enough(self, text):
        """Raises Refused for a text that cannot fit, before the work of tokenising it."""
        if len(text) > self._longest * self.engine.max_length:
            raise Refused(400, f"a text of {len(text):,} characters exceeds the maximum context length of "
                               f"{self.engine.max_length} tokens", code="context_length_exceeded")

    def _job(self, fields, prompts, max_tokens, logprobs, *, echo, chat) -> Job:
        from fm_jax.decode import Sampling

        for prompt in prompts:
            if len(prompt.ids) + max_tokens > self.engine.max_length:
                raise Refused(400, f"this model's maximum context length is {self.engine.max_length} tokens; the "
                                   f"prompt has {len(prompt.ids)} and max_tokens is {max_tokens}: shorten one of them",
                              param="prompt", code="context_length_exceeded")
        # OpenAI's temperatures end at 2; higher ones are sampled just as well.
        top_k = min(max(fields.int("top_k", 0, -1), 0), len(self.token_text))   # -1: all, as others have it
        sampling = Sampling(fields.number("temperature", 1.0, 0, PENALTY), top_k, fields.number("top_p", 1.0, 0, 1),
                            min_p=fields.number("min_p", 0.0, 0, 1),
                            repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, PENALTY))
        if sampling.top_p == 0:   # what others take for "the likeliest alone"
            sampling = sampling._replace(top_p=1.0, temperature=0.0)
        seed, n = fields.int("seed", secrets.randbits(32)), fields.int("n", 1, 1, self.engine.max_waiting)
        stop, ends = fields.texts("stop", 64), () if fields.bool("ignore_eos") else self.ends
        specials = self.lm.tokenizer.specials
        ends = [*ends, *(specials[text] for text in stop if text in specials)]   # they have no text: by their ids
        options = fields.raw("stream_options")
        usage = isinstance(options, dict) and options.get("include_usage") is True
        return Job(prompts, n, max_tokens, sampling, seed, stop, tuple(dict.fromkeys(map(int, ends))), logprobs, echo,
                   fields.bool("stream"), usage, chat, self.named(fields.text("model")))

    def text(self, ids) -> str:
        return b"".join(self.token_text[i] for i in ids).decode(errors="replace")

    def shown(self, token: int) -> str:
        """Returns a token as text or by its special spelling, and as "token_id:N" where it is neither."""
        try:
            text = self.token_text[token].decode()
        except UnicodeDecodeError:
            text = ""
        return text or self._spelling.get(token, f"token_id:{token}")


def _top():
    from fm_jax.engine import TOP

    return TOP


def _messages(messages) -> list[dict]:
    """Returns the messages of a chat, each with a role and a text. Raises Refused for what is none."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, 'messages must be a list of {"role": ..., "content": ...}, at least one', param="messages")
    out = []
    for number, message in enumerate(messages):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list):   # parts
            parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
            content = "".join(parts) if all(isinstance(p, str) for p in parts) else None
        if role not in ROLES or not isinstance(content, str):
            raise Refused(400, f"messages[{number}] must have a role ({', '.join(ROLES)}) and a content of text",
                          param=f"messages[{number}]")
        out.append({"role": "system" if role == "developer" else role, "content": content})
    return out


# --- choices --------------------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """What is new of a choice: text, its tokens, and why it ended, if it did."""

    choice: int
    text: str
    tokens: list[Token]
    finish: str | None = None
    count: int = 0        # tokens made for it


class Gone(Exception):
    """The client has closed its connection."""


class Run:
    """Requests in the engine's queue, and what comes back. They are cancelled when it is closed or the client goes."""

    def __init__(self, service, request, wanted: dict):
        """`wanted`: {key: the fields of a Request}. Raises Refused where the queue is full, or too short for them."""
        from fm_jax.engine import Busy, Request

        loop, self._parts = asyncio.get_running_loop(), asyncio.Queue()
        deliver = lambda key: lambda part: loop.call_soon_threadsafe(self._parts.put_nowait, (key, part))
        service.fits(len(wanted))
        self.requests = {key: Request(deliver=deliver(key), **what) for key, what in wanted.items()}
        try:
            service.engine.submit(list(self.requests.values()))
        except Busy:
            raise Refused(429, f"the queue of {service.engine.max_waiting} requests is full; try again later",
                          code="rate_limit_exceeded", headers={"Retry-After": str(RETRY_S)}) from None
        self._watching = asyncio.create_task(self._watch(request))

    async def _watch(self, request):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()
        self._parts.put_nowait((None, Gone()))

    async def part(self):
        """Returns (key, what the engine delivered) as it comes. Raises Gone where the client has."""
        key, part = await self._parts.get()
        if isinstance(part, Gone):
            raise part
        if isinstance(part, Exception):
            raise Refused(500, "the engine failed on this request; see the server's log") from part
        return key, part

    def _cancel(self):
        for request in self.requests.values():
            request.cancelled = True

    def close(self):
        self._watching.cancel()
        self._cancel()


def start(service, request, job: "Job") -> AsyncIterator["Piece"]:
    """Returns the pieces of every choice as they come, the last of each with its `finish`. Raises as Run."""
    scored = job.echo and job.logprobs is not None
    # A greedy token behind the prompt comes with the prompt's scores: no slot is needed for it.
    greedy = scored and job.sampling.temperature == 0 and job.sampling.repetition_penalty == 1
    continued = job.max_tokens > int(greedy)
    wanted = {}
    for i, prompt in enumerate(job.prompts):
        if scored:
            wanted["prompt", i] = {"ids": prompt.ids, "model": service.models[job.model]}
        for choice in range(i * job.n, (i + 1) * job.n) if continued else ():
            wanted["choice", choice] = {
                "ids": prompt.ids, "max_tokens": job.max_tokens, "sampling": job.sampling,
                "seed": (job.seed + choice) % 2**32, "stop_ids": job.stop_ids, "model": service.models[job.model]}
    return _pieces(service, Run(service, request, wanted), job, scored, continued)


async def _pieces(service, run: Run, job: "Job", scored: bool, continued: bool):
    try:
        readings, early = {}, []
        while scored and len(readings) < len(job.prompts):
            (kind, i), part = await run.part()
            if kind == "prompt":
                readings[i] = part
            else:
                early.append(((kind, i), part))
        transcripts = {}
        for choice in range(len(job.prompts) * job.n):
            prompt, reading = job.prompts[choice // job.n], readings.get(choice // job.n)
            transcript = Transcript(service.token_text, job.stop, len(prompt.text) if job.echo else 0)
            transcripts[choice] = transcript
            if job.echo:
                yield Piece(choice, prompt.text, _read_tokens(service, prompt, reading, job) if scored else [])
            if not continued:
                if job.max_tokens:   # the greedy one, shown even where it is a stop token
                    top = _top_of(reading.top_ids[-1], reading.top_logprobs[-1], max(job.logprobs, 1))
                    transcript.add(Token(*top[0], top[: job.logprobs]))
                text, tokens = transcript.take(last=True)
                ended = transcript.stopped or any(token.id in job.stop_ids for token in tokens)
                yield Piece(choice, text, tokens, "stop" if ended else "length", job.max_tokens)
        left = len(transcripts) if continued else 0
        while left:
            (_, choice), part = early.pop(0) if early else await run.part()
            request, transcript, finish, count = run.requests["choice", choice], transcripts[choice], part.finish, 0
            if request.cancelled:
                continue
            for token, logprob, top_ids, top_logprobs in zip(part.tokens.tolist(), *part[1:4]):
                count += 1
                if token in job.stop_ids:
                    break
                top = [] if job.logprobs is None else _top_of(top_ids, top_logprobs, job.logprobs)
                if transcript.add(Token(token, _number(logprob), top)):
                    finish, request.cancelled = "stop", True
                    break
            left -= bool(finish)
            yield Piece(choice, *transcript.take(last=bool(finish)), finish or None, count)
    finally:
        run.close()


def _read_tokens(service, prompt, reading, job) -> list[Token]:
    """Returns the tokens of a prompt that is echoed, with the model's log-probabilities."""
    transcript = Transcript(service.token_text)
    for i, token in enumerate(prompt.ids):
        if i >= prompt.hidden:
            logprob = _number(reading.logprobs[i - 1]) if i else None   # nothing predicts the first
            top = _top_of(reading.top_ids[i - 1], reading.top_logprobs[i - 1], job.logprobs) if i else []
            transcript.add(Token(token, logprob, top))
    return transcript.take(last=True)[1]


def _top_of(ids, logprobs, n) -> list[tuple[int, float]]:
    return [(i, _number(x)) for i, x in zip(ids[:n].tolist(), logprobs[:n].tolist()) if x != float("-inf")]


def _number(x) -> float:
    """Returns a log-probability as JSON has it, unrounded: the float of the float32."""
    x = float(x)
    return x if x > LOWEST else LOWEST   # not a number compares false


# --- replies --------------------------------------------------------------------------------------------------------

def _completion_logprobs(service, tokens: list[Token]):
    def top(token):   # best first: of two tokens with one spelling the likelier stays
        if token.logprob is None:
            return None
        found = {}
        for i, logprob in [*token.top, (token.id, token.logprob)]:
            found.setdefault(service.shown(i), logprob)
        return found
    return {"tokens": [service.shown(t.id) for t in tokens], "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [top(t) for t in tokens], "text_offset": [t.at for t in tokens]}


def _chat_logprobs(service, tokens: list[Token]):
    def one(i, logprob):
        return {"token": service.shown(i), "logprob": logprob, "bytes": list(service.token_text[i])}
    return {"content": [{**one(t.id, t.logprob), "top_logprobs": [one(*each) for each in t.top]} for t in tokens],
            "refusal": None}


class Format:
    """How the replies to one job look: of completions or of chats, whole or as a stream."""

    def __init__(self, service, job: Job):
        self._service, self._job = service, job
        self.prompt_tokens = sum(len(prompt.ids) for prompt in job.prompts)
        kind = ("chat.completion", "chatcmpl") if job.chat else ("text_completion", "cmpl")
        self._head = {"id": f"{kind[1]}-{secrets.token_hex(12)}", "object": kind[0], "created": int(time.time()),
                      "model": job.model}

    def usage(self, made: int) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": made,
                "total_tokens": self.prompt_tokens + made}

    def _choice(self, piece, **content):
        show = _chat_logprobs if self._job.chat else _completion_logprobs
        logprobs = None if self._job.logprobs is None else show(self._service, piece.tokens)
        return {"index": piece.choice, **content, "logprobs": logprobs, "finish_reason": piece.finish}

    def whole(self, pieces: list[Piece]) -> dict:
        own = {}
        for piece in pieces:
            own.setdefault(piece.choice, []).append(piece)
        choices = []
        for i, parts in sorted(own.items()):
            piece = Piece(i, "".join(p.text for p in parts), [t for p in parts for t in p.tokens], parts[-1].finish)
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append(self._choice(piece, **({"message": message} if self._job.chat else {"text": piece.text})))
        return {**self._head, "choices": choices, "usage": self.usage(sum(p.count for p in pieces))}

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """Yields the lines of a stream of events."""
        job, made = self._job, 0
        head = {**self._head, "object": "chat.completion.chunk"} if job.chat else self._head
        more = {"usage": None} if job.usage else {}
        event = lambda choices, **usage: _event({**head, "choices": choices, **more, **usage})
        try:
            if job.chat:
                for choice in range(job.n):
                    yield event([{"index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                  "finish_reason": None}])
            async for piece in pieces:
                made += piece.count
                if not (piece.text or piece.tokens or piece.finish):
                    continue   # a part of a character, or perhaps of a stop string
                if job.chat and piece.finish and piece.text:
                    yield event([self._choice(piece._replace(finish=None), delta={"content": piece.text})])
                    piece = piece._replace(text="", tokens=[])
                delta = {"content": piece.text} if piece.text else {}
                yield event([self._choice(piece, **({"delta": delta} if job.chat else {"text": piece.text}))])
            if job.usage:
                yield event([], usage=self.usage(made))
        except Gone:
            return
        except Refused as error:   # too late for a status
            yield _event(_error_body(str(error), "server_error"))
        yield "data: [DONE]\n\n"


def _json(content) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _event(content) -> str:
    return f"data: {_json(content)}\n\n"


def _error_body(message, kind, param=None, code=None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# --- the application ------------------------------------------------------------------------------------------------

def app(service: Service):
    """Returns the ASGI application."""
    import prometheus_client as prometheus
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    def reply(content, status=200, headers=None):
        return Response(_json(content), status, headers, media_type="application/json")

    def failure(status, message, param=None, code=None, headers=None):
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        return reply(_error_body(message, kind, param, code), status, headers)

    def authorize(request):
        if service.keys:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
            if not any([hmac.compare_digest(given, key) for key in service.keys]):   # all: no hint by the time it takes
                raise Refused(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key",
                              headers={"WWW-Authenticate": "Bearer"})

    async def body(request) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > service.max_body_bytes:
                        raise Refused(413, f"a request may have {service.max_body_bytes:,} bytes",
                                      code="request_too_large")
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive in {BODY_S} s") from None
        return b"".join(chunks)

    def endpoint(path, answer, method="POST", key=True):
        """Returns a route whose errors are OpenAI's error bodies."""
        async def handle(request):
            try:
                if key:
                    authorize(request)
                response = await answer(request)
            except Refused as error:
                response = failure(error.status, str(error), error.param, error.code, error.headers)
            except UserError as error:
                response = failure(400, str(error))
            except (Gone, ClientDisconnect):
                response = Response(status_code=499)   # nobody reads it
            service.engine.metrics.responses.labels(path, response.status_code).inc()
            return response
        return Route(path, handle, methods=[method])

    async def models(request):
        one = lambda name: {"id": name, "object": "model", "created": service.created, "owned_by": "fm_jax",
                            "max_model_len": service.engine.max_length}
        if "name" in request.path_params:
            return reply(one(service.named(request.path_params["name"])))
        return reply({"object": "list", "data": [one(name) for name in service.models]})

    def generate(parse):
        async def answer(request):
            job = await asyncio.to_thread(parse, await body(request))
            pieces, form = start(service, request, job), Format(service, job)
            if not job.stream:
                return reply(form.whole([piece async for piece in pieces]))
            return StreamingResponse(form.events(pieces), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return answer

    async def embeddings(request):
        fields = await asyncio.to_thread(service.fields, await body(request))
        if fields.raw("dimensions") is not None:
            raise Refused(400, "dimensions is not supported: this model's embeddings have one size", param="dimensions")
        form = choose(fields.text("encoding_format", "float"), ("float", "base64"), "encoding_format")
        prompts = await asyncio.to_thread(service.prompts, fields, "input")
        name = service.named(fields.text("model"))
        wanted = {i: {"ids": p.ids, "model": service.models[name]} for i, p in enumerate(prompts)}
        found, run = {}, Run(service, request, wanted)
        try:
            while len(found) < len(prompts):
                i, reading = await run.part()
                found[i] = reading.embedding
        finally:
            run.close()
        encode = (lambda x: x.tolist()) if form == "float" else (
            lambda x: base64.b64encode(x.astype("<f4").tobytes()).decode())
        tokens = sum(len(p.ids) for p in prompts)
        data = [{"object": "embedding", "index": i, "embedding": encode(found[i])} for i in sorted(found)]
        return reply({"object": "list", "model": name, "data": data,
                      "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})

    def told(answer):
        async def tell(request):
            return reply(await asyncio.to_thread(answer, *([await body(request)] if request.method == "POST" else [])))
        return tell

    async def health(request):
        if not service.engine.alive:
            raise Refused(503, "the engine has stopped; see the server's log")
        return reply({"status": "ok"})

    async def metrics(request):
        text = prometheus.generate_latest(service.engine.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    async def http_error(request, error):
        return failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)

    async def bug(request, error):
        return failure(500, "the server failed on this request; see its log")

    return Starlette(
        routes=[endpoint("/v1/models", models, "GET"), endpoint("/v1/models/{name:path}", models, "GET"),
                endpoint("/v1/completions", generate(service.completion)),
                endpoint("/v1/chat/completions", generate(service.chat)), endpoint("/v1/embeddings", embeddings),
                endpoint("/tokenize", told(service.tokenize)), endpoint("/detokenize", told(service.detokenize)),
                endpoint("/tokenizer_info", told(service.tokenizer_info), "GET"),
                endpoint("/health", health, "GET", key=False), endpoint("/metrics", metrics, "GET", key=False)],
        exception_handlers={HTTPException: http_error, Exception: bug})


def main(args):
    import uvicorn

    import fm_jax
    from fm_jax.engine import Engine, VectorEngine
    from fm_jax.pretrained import parse_mesh

    keys = [*args.api_key, *filter(None, os.environ.get("FM_JAX_API_KEY", "").split(","))]
    listener = _bind(args.host, args.port)   # before a large model is loaded
    lm = fm_jax.load(args.workdir, step=args.step, mesh=parse_mesh(args.mesh))
    name, runs = args.model_name or Path(args.workdir).resolve().name, _named_runs(args.adapters)
    if name in runs:
        raise UserError(f"--adapters={args.adapters}: {name!r} is the model itself; call the adapter something else")
    adapters = {each: lm.adapted(run).params for each, run in runs.items()}
    if "decode" in lm.objective.predict:
        engine = Engine(lm, slots=args.slots, max_length=args.max_length, max_waiting=args.max_waiting,
                        steps_per_dispatch=args.steps_per_dispatch, adapters=adapters)
        lm.params = None   # the engine holds them, layer by layer: one copy is enough
        what = f"{args.slots} slots of {engine.max_length} tokens"
    elif adapters:
        raise UserError(f"--adapters={args.adapters}: {lm.config.objective} continues no text, and its adapters are "
                        "not served beside it; serve the run of one of them")
    else:
        engine, what = VectorEngine(lm, max_waiting=args.max_waiting), "vectors of texts"
    del adapters   # the engine has them
    service = Service(lm, engine, name, keys, args.max_body_bytes, tuple(runs))
    server = uvicorn.Server(uvicorn.Config(app(service), log_level="warning", access_log=False, lifespan="off"))
    # What a second Ctrl-C cuts off is no error of the server.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: not record.exc_info or not isinstance(record.exc_info[1], asyncio.CancelledError))
    for each in (signal.SIGINT, signal.SIGTERM):   # uvicorn hands them on when it has ended: a stop is no failure
        signal.signal(each, lambda *_: setattr(server, "should_exit", True))
    _allow_connections()
    listener.listen(BACKLOG)   # what connects from now on is answered
    host, port = listener.getsockname()[:2]
    print(f"{', '.join(service.models)}: http://{f'[{host}]' if ':' in host else host}:{port}/v1, {what}", flush=True)
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()


def _named_runs(text) -> dict[str, str]:
    """Returns {name: folder} of "a=runs/a,b=runs/b". Raises UserError for anything else."""
    pairs = [item.partition("=") for item in text.split(",") if item]
    if bad := [f"{name}{equals}{folder}" for name, equals, folder in pairs if not (name and folder)]:
        raise UserError(f"--adapters={text}: {bad[0]!r} is not of the form name=run, as in polite=runs/polite")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f"--adapters={text}: a name is given twice")
    return {name: folder for name, _, folder in pairs}


def _bind(host, port) -> socket.socket:
    """Returns a socket at the address, which takes no connections yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}; give another") from None
    return listener


def _allow_connections():
    """Raises this process's limit of open files, usually 1,024: every connection is one."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= now < OPEN_FILES:   # below 0: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES if most < 0 else min(OPEN_FILES, most), most))


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

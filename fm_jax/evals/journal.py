"""A model whose answers are kept as they come, so that an interrupted evaluation goes on where it stopped. Layer 4.

The first line of the file is what decides the answers, each further one the answers to a piece of the requests.
"""

import collections
import json
from pathlib import Path

import jax
import numpy as np

from fm_jax import distributed
from fm_jax.decode import Completion
from fm_jax.errors import UserError
from fm_jax.scoring import Score

# Requests between two lines: enough to be batched well and to share prefixes, on a slow machine some minutes of work.
PAIRS, TEXTS, PROMPTS = 2048, 64, 64


class Journal:
    """A loaded model (`pretrained.Pretrained`) whose score, score_texts and complete are kept in a file.

    Opened again with equal `settings`, from which all requests and their order must follow, it gives what is there
    without asking the model.
    """

    def __init__(self, lm, path, settings: dict):
        self._lm, self._path = lm, Path(path)
        first = json.dumps(settings, sort_keys=True)
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        distributed.agree(lines, self._path)
        self._kept = collections.deque()
        for line in lines[1:] if lines[:1] == [first] else ():
            try:
                self._kept.append(json.loads(line))
            except json.JSONDecodeError:   # the last one, of a process that was killed
                break
        self._write("w", first, *map(json.dumps, self._kept))

    def __getattr__(self, name):
        return getattr(self._lm, name)

    def score(self, contexts, continuations) -> list[Score]:
        ask = lambda pairs, _: [[float(s.logprob), bool(s.is_greedy), int(s.num_tokens)]
                                for s in self._lm.score(*zip(*pairs))]
        return [Score(*kept) for kept in self._answers(list(zip(contexts, continuations, strict=True)), PAIRS, ask)]

    def score_texts(self, texts) -> list[float]:
        return self._answers(texts, TEXTS, lambda part, _: [float(x) for x in self._lm.score_texts(part)])

    def complete(self, prompts, *, n: int = 1, seed: int = 0, **how) -> list[Completion]:
        """Returns what one call would, whose continuation i draws from seed + i; without log-probabilities."""
        def ask(part, begin):
            made = self._lm.complete(part, n=n, seed=seed + n * begin, **how)
            return [[each.tokens.tolist(), each.finish] for each in made]

        return [Completion(np.array(tokens, np.int32), finish, None, None, None)
                for tokens, finish in self._answers(prompts, PROMPTS, ask)]

    def remove(self) -> None:
        """Returns nothing; removes the file: what it is for is done."""
        if jax.process_index() == 0:
            self._path.unlink()

    def _answers(self, requests, size, ask):
        """Returns the answers to all requests; `ask`: function of (a piece of them, the place of its first)."""
        out = []
        for begin in range(0, len(requests), size):
            if self._kept:
                out += self._kept.popleft()
                continue
            found = ask(requests[begin : begin + size], begin)
            self._write("a", json.dumps(found))
            out += found
        return out

    def _write(self, mode, *lines):
        if jax.process_index() != 0:   # all have the same answers, and one writes them
            return
        try:
            with open(self._path, mode) as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            raise UserError(f"cannot write {self._path}, which keeps the answers so far: {error.strerror}") from error

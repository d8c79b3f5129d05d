"""Answers kept as they come: the same as without, and none asked for twice."""

import json
import types

import numpy as np
import pytest

from fm_jax.decode import Completion
from fm_jax.errors import UserError
from fm_jax.evals import journal
from fm_jax.scoring import Score


class Model:
    """Answers by the requests alone, and by seed + place; fails after `most` requests, as if interrupted."""

    tokenizer = "its tokenizer"

    def __init__(self, most=10**9):
        self.most, self.asked = most, 0

    def _count(self, requests):
        self.asked += len(requests)
        if self.asked > self.most:
            raise KeyboardInterrupt

    def score(self, contexts, continuations):
        self._count(contexts)
        return [Score(np.float32(-len(a) / 3), np.bool_(len(b) % 2), len(b)) for a, b in zip(contexts, continuations)]

    def score_texts(self, texts):
        self._count(texts)
        return [-len(t) / 7 for t in texts]

    def complete(self, prompts, *, n, seed, temperature):
        self._count(prompts)
        return [Completion(np.array([*p, seed + i * n + j, int(temperature)], np.int32), "stop", None, None, None)
                for i, p in enumerate(prompts) for j in range(n)]


def ask(lm):
    texts = ["x" * i for i in range(200)]
    made = lm.complete([(i,) for i in range(150)], n=3, seed=7, temperature=1.0)
    return [[(c.tokens.tolist(), c.finish) for c in made], lm.score(texts, texts[::-1]), lm.score_texts(texts)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(journal, "PAIRS", 50)


def test_interrupted_at_any_place_the_answers_are_the_same(tmp_path):
    path, whole, total = tmp_path / "j", Model(), 200 + 200 + 150
    want = ask(whole)
    assert ask(journal.Journal(Model(), path, {})) == want
    path.unlink()
    done = 0
    for _ in range(20):
        lm = Model(most=130)   # three pieces, more or less
        try:
            assert ask(journal.Journal(lm, path, {"a": 1})) == want
            break
        except KeyboardInterrupt:
            assert 0 < lm.asked
            done += 1
    assert done >= 3 and lm.asked < total / 2
    lm = Model(most=0)   # all is there
    kept = journal.Journal(lm, path, {"a": 1})
    assert ask(kept) == want and lm.asked == 0 and kept.tokenizer == "its tokenizer"
    kept.remove()
    assert not path.exists()


def test_of_other_settings_nothing_is_taken(tmp_path):
    ask(journal.Journal(Model(), tmp_path / "j", {"limit": 1}))
    lm = Model()
    ask(journal.Journal(lm, tmp_path / "j", {"limit": 2}))
    assert lm.asked == 550 and json.loads((tmp_path / "j").read_text().splitlines()[0]) == {"limit": 2}


def test_half_a_line_is_asked_for_again(tmp_path):
    want = ask(journal.Journal(Model(), tmp_path / "j", {}))
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-5])
    lm = Model()
    assert ask(journal.Journal(lm, tmp_path / "j", {})) == want
    assert lm.asked == 200 % journal.TEXTS and (tmp_path / "j").read_bytes() == whole


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(UserError, match="cannot write .*j, which keeps the answers so far: No such file"):
        journal.Journal(types.SimpleNamespace(), tmp_path / "none" / "j", {})

"""Reinforcement from the command line: rewards go up, a run goes on exactly, and what cannot be is refused."""

import json

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import checkpoint, config as config_lib, grpo, metrics
from fm_jax.data import documents, examples
from fm_jax.errors import UserError


def plain(text, record):
    """A reward: the share of six letters that are there and of ASCII."""
    return sum(letter.isascii() for letter in text) / 6


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    (folder / "x.jsonl").write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n"
                                            for n in range(40)))
    examples.prepare(documents.open_sources(str(folder / "x.jsonl")), folder / "out", tokenizer="bytes",
                     validation_frac=0.25)
    return folder / "out"


def config(problems, run, **changes):
    c = config_lib.from_file("configs/grpo.py:arithmetic", {
        "data.train": str(problems), "data.tokenizer": f"{run}/tokenizer", "checkpoint.init_from": str(run),
        "mesh.data": 1, "steps": 12, "batch_size": 32, "seq_len": 16, "eval.every": 6, "checkpoint.every": 6,
        "checkpoint.keep_last": 9, "log.every": 2, "optimizer.learning_rate": 1e-2,
        "objective_args.reward": "grpo_test.plain", "objective_args.group_size": 8, "objective_args.max_new_tokens": 6,
        "objective_args.updates": 2, "objective_args.kl": 0.01, "objective_args.normalize_std": True,
        "objective_args.average": "response", "optimizer.b2": 0.95, "optimizer.warmup_steps": 1})
    c.model = config_lib.load(run / "config.json")[0].model
    return config_lib.override(c, changes)


@pytest.fixture(scope="module")
def run(problems, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "rl"
    grpo.train(config(problems, tiny_run[0]), folder)
    return folder


def rows(folder):
    return [{k: v for k, v in r.items() if k != "time_s"} for r in metrics.read(folder / "metrics.jsonl")]


def test_rewards_go_up(run):
    trained = [r for r in rows(run) if "train/reward" in r]
    assert [r["step"] for r in trained] == list(range(2, 13, 2))
    assert trained[-1]["train/reward"] > trained[0]["train/reward"] + 0.1
    # On the first of two updates the policy is the one that responded; on the second it is not.
    assert abs(trained[0]["train/ratio"] - 1) > 1e-5 and trained[-1]["train/kl"] > 0
    assert [r["step"] for r in rows(run) if "validation/reward" in r] == [0, 6, 12]
    assert fm_jax.load(run).generate(["3+1="], max_new_tokens=3)


def test_a_run_that_was_stopped_goes_on_exactly(run, problems, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.stop_signals.__wrapped__.__globals__["Stop"], "asked",
                        lambda self, seen=[]: bool(seen.append(1) or len(seen) > 3) and setattr(self, "by", "SIGTERM") is None)
    with pytest.raises(SystemExit) as stopped:
        grpo.train(config(problems, tiny_run[0]), tmp_path / "rl")
    assert stopped.value.code == 75 and checkpoint.steps(tmp_path / "rl") == [6]
    monkeypatch.undo()
    grpo.train(config(problems, tiny_run[0]), tmp_path / "rl")
    for a, b in zip(jax.tree.leaves(fm_jax.load(run).params), jax.tree.leaves(fm_jax.load(tmp_path / "rl").params)):
        np.testing.assert_array_equal(a, b)
    assert rows(run) == rows(tmp_path / "rl")


@pytest.mark.slow
def test_a_mesh_finds_the_same(run, problems, tiny_run, tmp_path):
    found = grpo.train(config(problems, tiny_run[0], **{"mesh.data": 2, "mesh.tensor": 2, "steps": 2,
                                                        "checkpoint.every": 2, "eval.every": 2}), tmp_path / "rl")
    first, here = (next(r for r in rows(f) if "train/loss" in r) for f in (run, tmp_path / "rl"))
    for name in ("train/reward", "train/response_tokens", "train/kl", "train/grad_norm"):
        assert here[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), name
    assert set(found) == {"validation/reward"}


@pytest.mark.parametrize("changes, message", [
    ({"steps": 7, "eval.every": 2, "checkpoint.every": 2}, "config.steps=7 must be a multiple"),
    ({"batch_size": 24, "mesh.data": 2}, "3 prompts are not divisible by the 2 parts"),
    ({"mesh.context": 2}, "context=2 is not for generation"),
    ({"objective": "fm_jax.objectives.causal_lm.CausalLM", "objective_args": {}}, "is not for reinforcement"),
    ({"checkpoint.init_from": ""}, "kl=0.01 needs the model"),
    ({"seq_len": 8, "objective_args.max_new_tokens": 6}, "leaves no place for max_new_tokens")])
def test_what_is_refused(problems, tiny_run, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        grpo.train(config(problems, tiny_run[0], **changes), tmp_path / "rl")

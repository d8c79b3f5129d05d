"""A run from its command line to its last checkpoint: written whole, continued exactly, stopped cleanly."""

import errno
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from fm_jax import checkpoint, config as config_lib, distributed, evaluate as evaluate_lib, metrics, objectives, sharding
from fm_jax import storage, train as train_lib, tree
from fm_jax.data import batches, documents, prepared
from fm_jax.errors import UserError
from fm_jax.step import Program

# Runs the command, and sends itself a signal when the progress of a step is shown: a real signal at a known moment.
SIGNALLED = """
import os, runpy, signal, sys
from fm_jax import metrics
name, at = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
show = metrics.Progress.show
def show_then_signal(self, step, **values):
    show(self, step, **values)
    if step == at:
        os.kill(os.getpid(), getattr(signal, name))
metrics.Progress.show = show_then_signal
runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
"""
# Runs the command, which hangs when the progress of a step is shown. Compiling is not watched: it may take long here.
HANGING = """
import runpy, threading, sys
from fm_jax import distributed, metrics
at = int(sys.argv.pop(1))
show, beat = metrics.Progress.show, distributed.Watchdog.beat
def show_then_hang(self, step, **values):
    show(self, step, **values)
    if step == at:
        threading.Event().wait()
metrics.Progress.show = show_then_hang
distributed.Watchdog.beat = lambda self, doing: beat(self, None if doing == "step 1" else doing)
runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
"""
# Runs the command, and lets no file grow beyond so many bytes once the progress of a step is shown, as a full disk.
FULL = """
import resource, runpy, sys
from fm_jax import metrics
at, room = map(int, sys.argv[1:3])
del sys.argv[1:3]
show = metrics.Progress.show
def show_then_fill(self, step, **values):
    show(self, step, **values)
    if step == at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
metrics.Progress.show = show_then_fill
runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
"""
# An objective whose examples 40 to 47, batch 5 of 8, have a weight that is not a number (or another).
POISONED = """
import numpy as np
from fm_jax.data.mixture import hash_ints
from fm_jax.objectives.causal_lm import CausalLM
class Poisoned(CausalLM):
    def examples(self, records, seeds, train=True):
        made = super().examples(records, seeds, train)
        made["weights"][np.isin(seeds, hash_ints(0, np.arange(40, 48)))] = np.nan
        return made
"""


def signalled(name, at, *flags, cwd):
    return subprocess.run([sys.executable, "-c", SIGNALLED, name, str(at), *flags], capture_output=True, text=True,
                          timeout=300, cwd=cwd)


def short_config(tiny_flags, **changes):
    """Returns the config of the shared run with changes (a__b for the key a.b), as the command would make it."""
    flags = dict(f.removeprefix("--config").split("=", 1) for f in tiny_flags)
    overrides = {k[1:]: v for k, v in flags.items() if k}
    return config_lib.from_file(flags[""], overrides | {k.replace("__", "."): v for k, v in changes.items()})


def state_of(folder, step):
    """Returns {name: bytes} of every array of a checkpoint: step, parameters, optimizer, average."""
    config, _ = config_lib.load(folder / "config.json")
    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    program = Program(config, objectives.load(config, None, layout), layout)
    state = checkpoint.restore(folder, step, program.abstract)
    return {n: np.asarray(a).tobytes() for n, a in tree.flatten(state).items()}


def rows(folder, kind=""):
    """Returns the lines of metrics.jsonl that have `kind` metrics, without what the clock says."""
    timed = ("time_s", "tokens_per_s", "step_time_s", "mfu")
    found = [{k: v for k, v in r.items() if k not in timed} for r in metrics.read(folder / "metrics.jsonl")]
    return [r for r in found if any(k.startswith(kind) for k in r)]


def contents(folder):
    """Returns {path: bytes} of every file, False for folders."""
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def test_named_validation_sets_are_written_apart(tiny_flags, data, tmp_path):
    config = short_config(tiny_flags, data__validation=f"one={data},two={data}", steps=2, eval__every=2,
                          checkpoint__every=2, checkpoint__keep_best=1, checkpoint__best_metric="validation/two/loss")
    last = train_lib.train(config, tmp_path / "run")
    written = rows(tmp_path / "run", "validation/")[-1]
    assert last == {k: v for k, v in written.items() if k.startswith("validation/")}
    for name in ("loss", "nll", "perplexity", "bits_per_byte"):
        assert written[f"validation/one/{name}"] == written[f"validation/two/{name}"] and f"validation/{name}" not in last
    meta = json.loads((tmp_path / "run" / "checkpoints" / "2" / "meta.json").read_text())
    assert meta["metrics"]["validation/two/loss"] == last["validation/two/loss"]


# --- A whole run ----------------------------------------------------------------------------------------------------

def test_a_run_describes_itself_and_learns(tiny_run, data):
    folder, out = tiny_run
    assert checkpoint.steps(folder) == [4, 8, 12]
    assert {p.name for p in folder.iterdir()} == {"config.json", "run.json", "tokenizer", "metrics.jsonl",
                                                  "tensorboard", "checkpoints", "lock"}
    config, filled = config_lib.load(folder / "config.json")
    assert not filled and config.steps == 12 and config.model.head_dim == 8   # resolved
    assert config.optimizer.warmup_steps == 1
    run = json.loads((folder / "run.json").read_text())
    assert run["data"] == batches.fingerprints(config) and run["starts"][0]["jax"] == jax.__version__
    assert (folder / "tokenizer" / "bytes.json").is_file() and list((folder / "tensorboard").iterdir())
    train, validation = rows(folder, "train/"), rows(folder, "validation/")
    assert [r["step"] for r in train] == list(range(1, 13)) and [r["step"] for r in validation] == [6, 12]
    # Knowing nothing is ln 512 nats a token; twelve steps must have left that by far more than a batch's noise.
    assert abs(train[0]["train/loss"] - math.log(512)) < 0.3 and train[-1]["train/loss"] < train[0]["train/loss"] - 0.1
    assert validation[1]["validation/loss"] < validation[0]["validation/loss"]
    for text in ("37,024 parameters", "fresh start, seed 0", "step 12/12 | loss", "step 12: validation", "tokens/s"):
        assert text in out


def test_a_run_stopped_in_every_way_ends_as_one_that_was_not(tiny_run, tiny_flags, tmp_path, command):
    flags = [*tiny_flags, "--workdir=run"]   # relative, as people write it
    # The signal comes when the values of a step are shown: one step late, or at once where a validation waits for them.
    result = signalled("SIGTERM", 2, *flags, cwd=tmp_path)
    assert result.returncode == distributed.AGAIN == 75, result.stderr   # what launch/ takes for: start it again
    assert "stopped by SIGTERM after step 3, which is saved; the same command continues from there" in result.stdout
    assert checkpoint.steps(tmp_path / "run") == [3]
    result = signalled("SIGINT", 6, *flags, cwd=tmp_path)
    assert result.returncode == 130 and result.stderr == "interrupted\n"
    assert "continuing" in result.stdout and "from step 3" in result.stdout
    # Step 6 has a validation, which a stop does not wait for: the next start makes up for it.
    assert "stopped by SIGINT after step 6, which is saved" in result.stdout and "step 6: val" not in result.stdout
    result = signalled("SIGKILL", 9, *flags, cwd=tmp_path)
    assert result.returncode == -signal.SIGKILL and "step 9/12" in result.stdout
    result = command("train", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # Nothing may differ, not in the last bit: the same program, on the same devices, on the same batches.
    straight, _ = tiny_run
    assert state_of(tmp_path / "run", 12) == state_of(straight, 12)
    assert rows(tmp_path / "run") == rows(straight)


def test_a_finished_run_says_so_and_more_steps_continue_it(tiny_run, tiny_flags, tmp_path, command):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    result = command("train", *tiny_flags, f"--workdir={run}")
    assert result.returncode == 0 and "all 12 steps are done; a longer run: --config.steps=N" in result.stdout
    assert (run / "metrics.jsonl").read_bytes() == before and checkpoint.steps(run) == [4, 8, 12]
    # What may change on the way: length, saving, microbatches.
    result = command("train", *tiny_flags, f"--workdir={run}", "--config.steps=14", "--config.accumulation_steps=2")
    assert result.returncode == 0 and "from step 12" in result.stdout, result.stderr
    assert checkpoint.steps(run) == [8, 12, 14] and [r["step"] for r in rows(run, "train/")] == list(range(1, 15))


def test_the_seed_decides_everything(tiny_run, tiny_flags, tmp_path):
    train_lib.train(short_config(tiny_flags), tmp_path / "same")   # in this process; the shared run had its own
    assert state_of(tmp_path / "same", 12) == state_of(tiny_run[0], 12)
    assert rows(tmp_path / "same") == rows(tiny_run[0])
    train_lib.train(short_config(tiny_flags, seed=1), tmp_path / "other")
    ours, theirs = rows(tmp_path / "other", "train/"), rows(tiny_run[0], "train/")
    assert all(a["train/loss"] != b["train/loss"] for a, b in zip(ours, theirs))


def test_a_run_continues_on_another_mesh(tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "12")
    last = train_lib.train(short_config(tiny_flags, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), run)
    got, want = rows(run), rows(tiny_run[0])
    assert [r["step"] for r in got] == [r["step"] for r in want] and rows(run)[:8] == want[:8]
    # Sums over devices in another order: 1e-6 a step seen, grown by Adam over four steps; a lost or doubled shard of a
    # gradient shows in the second digit of its norm.
    for a, b in zip(got, want):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a["step"])
    assert last["validation/loss"] == rows(run)[-1]["validation/loss"]


@pytest.mark.parametrize("changes", [
    dict(optimizer__name="muon"),
    pytest.param(dict(optimizer__name="lion", optimizer__learning_rate=3e-4), marks=pytest.mark.slow),
    dict(optimizer__name="adafactor", health__skip_grad_norm_factor=10.0)], ids=lambda c: c["optimizer__name"])
def test_every_optimizer_learns_and_its_state_comes_back(changes, tiny_flags, tmp_path):
    config = short_config(tiny_flags, steps=6, optimizer__ema_decay=0.0, **changes)
    last = train_lib.train(config, tmp_path)
    losses = [r["train/loss"] for r in rows(tmp_path, "train/")]
    assert losses[-1] < losses[0] - 0.02 and last["validation/loss"] < losses[0]
    assert not any(n.startswith("ema.") for n in state_of(tmp_path, 6))
    if "health__skip_grad_norm_factor" in changes:
        assert {r["train/skipped_steps"] for r in rows(tmp_path, "train/")} == {0.0}
    assert train_lib.train(config, tmp_path) == last   # all steps are done
    # Its state comes back to the last bit: from step 4, the run ends as it did.
    ended, curve = state_of(tmp_path, 6), rows(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    assert train_lib.train(config, tmp_path) == last
    assert state_of(tmp_path, 6) == ended and rows(tmp_path) == curve


def test_profile_writes_a_trace_even_of_a_short_run(inline, tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "12")
    code, _, err = inline("train", *tiny_flags, f"--workdir={run}", "--profile=2")   # from step 8: no tenth after it
    assert code == 0 and list((run / "profile").rglob("*.xplane.pb")), err
    assert state_of(run, 12) == state_of(tiny_run[0], 12)


def test_the_best_checkpoint_is_one_that_was_validated(tiny_flags, tmp_path):
    """A checkpoint between validations must not be judged by an older one."""
    # Lowest is best: of the accuracy, that of the first validations, so that the best is not simply the last.
    config = short_config(tiny_flags, checkpoint__every=3, checkpoint__keep_last=1, checkpoint__keep_best=2,
                          checkpoint__best_metric="validation/accuracy", steps=18)
    train_lib.train(config, tmp_path / "run")
    validated = {r.pop("step"): r for r in rows(tmp_path / "run", "validation/")}
    assert sorted(validated) == [6, 12, 18]
    best = sorted(validated, key=lambda step: validated[step]["validation/accuracy"])[:2]
    assert 18 not in best and checkpoint.steps(tmp_path / "run") == [*sorted(best), 18]
    for step in best:
        meta = json.loads((tmp_path / "run" / "checkpoints" / str(step) / "meta.json").read_text())
        assert meta["metrics"] == validated[step]


def test_no_validation_needs_no_held_out_text(tiny_run, tiny_flags, data, tmp_path):
    whole = tmp_path / "data"
    prepared.prepare(documents.open_sources(str(data.parent / "passages.jsonl")), "bytes", whole, validation_frac=0.0,
                     workers=1)
    config = short_config(tiny_flags, data__train=str(whole), eval__every=0, steps=3)
    assert train_lib.train(config, tmp_path / "run") == {}
    assert [r["step"] for r in rows(tmp_path / "run")] == [1, 2, 3] and not rows(tmp_path / "run", "validation/")
    assert checkpoint.steps(tmp_path / "run") == [3]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Returns a file of a group of two tasks, of choices and of generated text."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [{"q": f"{'To be ' * i}or not", "options": ["to be", f"be {i}"], "label": i % 2} for i in range(5)]
    (folder / "test.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}},
            "test_split": "test", "doc_to_text": "Q: {{q}}\nA:", "doc_to_target": "label", "num_fewshot": 0}
    kinds = {"choice": {"output_type": "multiple_choice", "doc_to_choice": "options",
                        "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]},
             "said": {"output_type": "generate_until", "metric_list": [{"metric": "rouge1"}],
                      "generation_kwargs": {"max_gen_toks": 5}}}
    for name, fields in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps(base | fields | {"task": name}))
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": list(kinds), "aggregate_metric_list": [
        {"metric": "acc"}]}))
    return folder / "both.yaml"


@pytest.mark.parametrize("mesh", [pytest.param({"mesh__data": 1}, marks=pytest.mark.slow),
                                  {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}])
def test_tasks_are_evaluated_on_the_way(mesh, tasks, tiny_flags, tmp_path, monkeypatch):
    """As the checkpoints of those steps are afterwards, on one device; and compiled once."""
    compiled, after, evaluate = [], [], train_lib._evaluate
    listen = lambda name, *_, **__: name.endswith("backend_compile_duration") and compiled.append(name)

    def counted(*args):
        before = len(compiled)
        values = evaluate(*args)
        after.append(len(compiled) - before)
        return values

    monkeypatch.setattr(train_lib, "_evaluate", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    config = short_config(tiny_flags, **mesh, eval__tasks=(str(tasks),), eval__tasks_every=4, eval__tasks_limit=4)
    train_lib.train(config, tmp_path / "run")
    found = {r.pop("step"): r for r in rows(tmp_path / "run", "eval/")}
    assert sorted(found) == [4, 8, 12] and len(after) == 3 and after[0] > 0 and after[1:] == [0, 0], after
    for step, got in found.items():
        results = evaluate_lib.evaluate(tmp_path / "run", [str(tasks)], step=step, limit=4)
        want = {f"eval/{name}/{key.partition(',')[0]}": results[name][key] for name, key in [
            ("choice", "acc,none"), ("choice", "brier_score,none"), ("said", "rouge1,none"), ("both", "acc,none")]}
        assert got == pytest.approx(want, abs=1e-6)


def test_tasks_that_a_stop_cut_short_are_evaluated_by_the_next_start(tasks, tiny_flags, tmp_path, monkeypatch):
    run, flags = tmp_path / "run", dict(eval__tasks=(str(tasks),), eval__tasks_every=3, eval__tasks_limit=2, steps=3)
    monkeypatch.setattr(train_lib, "_evaluate", lambda *args: args[-1].catch(signal.SIGTERM) or args[-1].asked() and {})
    with pytest.raises(SystemExit):
        train_lib.train(short_config(tiny_flags, **flags), run)
    assert not rows(run, "eval/") and checkpoint.steps(run) == [3]
    monkeypatch.undo()
    train_lib.train(short_config(tiny_flags, **flags), run)
    assert [r["step"] for r in rows(run, "eval/")] == [3]


def test_tasks_that_cannot_be_evaluated_are_refused_at_the_start(tasks, inline, tiny_flags, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    fields = json.loads(tasks.with_name("said.yaml").read_text())
    for changes, message in [
            (None, "cannot read the task"), ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
            ({"generation_kwargs": {"max_gen_toks": 256}}, "max_gen_toks 256 leaves no room"),
            ({"metric_list": [{"metric": "rogue1"}]}, "did you mean 'rouge1'")]:
        if changes:
            wrong.write_text(json.dumps(fields | changes))
        code, _, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'run'}", f"--config.eval.tasks={wrong}")
        assert code == 2 and "config.eval.tasks: " in err and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
    code, _, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'run'}", "--config.eval.tasks=piqaa")
    assert code == 2 and "did you mean 'piqa'" in err


def test_the_average_can_be_switched_on_and_off_on_the_way(inline, tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    code, out, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.steps=13",
                            "--config.optimizer.ema_decay=0")
    assert code == 0 and "average of the parameters is not read" in out, err
    assert not any(n.startswith("ema.") for n in state_of(run, 13))
    code, out, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.steps=14",
                            "--config.optimizer.ema_decay=0.25")
    assert code == 0 and "it has no average of the parameters: that starts from them" in out, err
    before, after = (tree.flatten(checkpoint.restore_params(run, step)) for step in (13, 14))
    for name, average in tree.flatten(checkpoint.restore_params(run, 14, ema=True)).items():
        # Decay 0.25 of what it started from: float32 roundings.
        np.testing.assert_allclose(average, 0.25 * before[name] + 0.75 * after[name], rtol=1e-5, atol=1e-7)


def test_a_second_run_in_a_folder_is_refused(inline, tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    before = contents(run)
    with checkpoint.lock(run):   # as another process would: locks are of open files
        code, _, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.steps=14")
    assert code == 2 and f"another process trains in {run}" in err and err.count("\n") == 1
    assert contents(run) == before


# --- Run health -----------------------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_is_needed(tiny_flags, tmp_path, command):
    (tmp_path / "poisoned.py").write_text(POISONED)
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--workdir={run}", "--config.objective=poisoned.Poisoned"]
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    for _ in range(2):   # the second time from the state that the first one saved
        result = command("train", *flags, PYTHONPATH=path)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert "not finite in step 5 (steps 5 to " in result.stderr
        assert "batch 5, examples 40 to 47" in result.stderr and f"the batch in {run / 'not_finite_5'}" in result.stderr
        assert checkpoint.steps(run) == [4, 5]
    assert "from step 5" in result.stdout
    params = tree.flatten(checkpoint.restore_params(run, 5))
    assert all(np.isfinite(p).all() for p in params.values())
    old = tree.flatten(checkpoint.restore_params(run, 4))
    assert any((params[n] != old[n]).any() for n in old)   # the state before the bad step, not an older one
    report = json.loads((run / "not_finite_5" / "report.json").read_text())
    assert report["step"] == 5 and report["examples"] == list(range(40, 48))
    assert report["metrics"]["loss"][0] == "nan" and report["metrics"]["finite"][0] == "0.0"   # of that step
    batch = np.load(run / "not_finite_5" / "batch.npz")
    assert np.isnan(batch["weights"]).all() and batch["tokens"].shape == (8, 64)
    with pytest.raises(UserError, match="continue from|other settings"):   # and the folder remembers its objective
        train_lib.train(short_config(tiny_flags), run)


def test_a_batch_without_a_scored_token_has_no_loss(inline, tiny_flags, tmp_path, monkeypatch):
    (tmp_path / "unscored.py").write_text(POISONED.replace("np.nan", "0"))
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'run'}", "--config.steps=7",
                            "--config.objective=unscored.Poisoned", "--config.optimizer.warmup_steps=0")
    assert code == 0 and not err and "nan" not in out, (out, err)
    assert [r["train/loss"] is None for r in rows(tmp_path / "run", "train/")] == [False] * 5 + [True, False]
    assert "step 6/7 | " in out and "step 6/7 | loss" not in out and "step 7/7 | loss" in out


def test_a_step_that_hangs_ends_the_run_with_every_stack_and_it_goes_on(tiny_run, tiny_flags, tmp_path, command):
    flags = [*tiny_flags, "--workdir=run", "--config.health.hang_timeout_s=5"]
    result = subprocess.run([sys.executable, "-c", HANGING, "6", *flags], capture_output=True, text=True, timeout=120,
                            cwd=tmp_path)
    assert result.returncode == distributed.HUNG, result.stderr
    assert "step 6 has made no progress for 5 s (config.health.hang_timeout_s)" in result.stderr
    assert "thread MainThread:" in result.stderr and "in show_then_hang" in result.stderr
    assert checkpoint.steps(tmp_path / "run") == [4]
    result = command("train", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "from step 4" in result.stdout, result.stderr
    assert rows(tmp_path / "run") == rows(tiny_run[0]) and state_of(tmp_path / "run", 12) == state_of(tiny_run[0], 12)


# --- Validation -----------------------------------------------------------------------------------------------------

def program_of(config):
    config = config_lib.resolve(config)
    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    return Program(config, objectives.load(config, batches.load_tokenizer(config), layout), layout)


def held_out_metrics(program, params):
    """Returns the means over the held-out split, by the parts of the loop."""
    sums = metrics.Sums()
    for batch in batches.open_batches(program.config, program.objective, split="validation").iterate():
        sums.add(jax.device_get(program.eval_step(params, None, program.place(batch))))
    return sums.take("validation/")


def test_validation_uses_the_average_of_the_parameters(tiny_run, tiny_flags):
    program = program_of(short_config(tiny_flags))
    state = checkpoint.restore(tiny_run[0], 12, program.abstract)
    logged = rows(tiny_run[0], "validation/")[-1]["validation/loss"]
    assert held_out_metrics(program, state.ema)["validation/loss"] == pytest.approx(logged, rel=1e-6)
    # The average lags behind while the loss falls, by far more than rounding.
    assert held_out_metrics(program, state.params)["validation/loss"] < logged - 1e-3


def test_validation_does_not_depend_on_the_batch_size_and_equals_direct_computation(tiny_flags, data):
    """Every document's piece of a row, alone through the whole model, against packed and padded batches."""
    config = short_config(tiny_flags, eval__batches=0)
    program = program_of(config)
    params = jax.tree.map(lambda p: 3 * p, program.init().params)   # larger: documents differ in their losses
    got = held_out_metrics(program, params)
    other = held_out_metrics(program_of(short_config(tiny_flags, eval__batches=0, batch_size=7)), params)
    for name in got:   # float32 sums in another order
        assert other[name] == pytest.approx(got[name], rel=1e-5), name
    source = batches.Rows(data, "validation", config.seq_len)
    nats, tokens, nbytes = 0.0, 0, 0
    logits_of = jax.jit(program.objective.predict["logits"])
    for row, segments in zip(*source[np.arange(len(source))].values()):
        for segment in range(1, segments.max() + 1):
            ids = row[segments == segment]
            if len(ids) < 2:
                continue
            padded = np.zeros((1, config.seq_len), np.int32)
            padded[0, : len(ids) - 1] = ids[:-1]
            logits = np.asarray(logits_of(params, padded), np.float64)[0, : len(ids) - 1]
            nll = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
            nats += (nll - logits[np.arange(len(ids) - 1), ids[1:]]).sum()
            tokens, nbytes = tokens + len(ids) - 1, nbytes + (ids[1:] < 256).sum()
    # Nearly every byte was a target, so the test has seen the split.
    assert nbytes > 0.9 * sum(len(text.encode()) for text in prepared.texts(data, "validation"))
    assert got["validation/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert got["validation/bits_per_byte"] == pytest.approx(nats / nbytes / math.log(2), rel=1e-5)
    assert got["validation/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


# --- What cannot start ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (["--config.model.vocab_size=200"], "the tokenizer's vocabulary of 262 is larger than the model's: set "
     "--config.model.vocab_size=262 (now 200) or more"),
    (["--config.mesh.data=4", "--config.batch_size=6"], "config.batch_size=6 in 1 microbatches of 6 is not divisible "
     "by the 4 parts into which the mesh (data 4) cuts a batch; take a multiple of 4"),
    (["--config.mesh.data=16"], "mesh data=16 needs 16 devices, this machine (cpu) has 8; change "
     "--config.mesh"),
    (["--config.mesh.tensor=8", "--config.model.num_heads=4"], "not divisible by mesh.tensor=8"),
    (["--config.batch_size=4096"], "fewer than one batch of 4096: prepare more, or set a smaller "
     "--config.batch_size or --config.seq_len"),
    (["--config.data.train={data}x"], "no prepared data at"),
    (["--config.data.train={data}x"], "prepared"),   # the nearest name
    (["--config.seq_len=512"], "config.seq_len=512 exceeds config.model.max_seq_len=256"),
    (["--config.objective=fm_jax.objectives.causal_lm.CausalML"], "did you mean 'CausalLM'?"),
    (["--config.objective=fm_jax.objectives.casual_lm.CausalLM"], "unknown 'casual_lm'; did you mean 'causal_lm'?"),
    (["--config.objective_args.zloss=1.0"], "did you mean 'z_loss'?"),
    (["--config.optimizer.learnign_rate=1"], "did you mean 'optimizer.learning_rate'?"),
    (["--config.optimizer.name=adam"], "config.optimizer.name: unknown 'adam'; did you mean 'adamw'?"),
    (["--config.checkpoint.init_from=nowhere"], "nowhere: no checkpoints here (no such folder)"),
    (["--workdri=x"], "unknown flag --workdri; did you mean --workdir?"),
    (["--learning_rate=1"], "did you mean --config.optimizer.learning_rate?"),
    (["--config={config}:tinny"], "unknown 'tinny'; did you mean 'tiny'?"),
    (["--config={configs}/causal_ml.py"], "did you mean"),
])
def test_what_cannot_start_is_one_line_and_writes_nothing(flags, message, inline, tiny_flags, data, tmp_path):
    config = tiny_flags[0].removeprefix("--config=").removesuffix(":tiny")
    flags = [f.format(data=data, config=config, configs=os.path.dirname(config)) for f in flags]
    code, _, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'run'}", *flags)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err, err
    assert not list(tmp_path.rglob("*/metrics.jsonl")) and not checkpoint.steps(tmp_path / "run")


def test_the_real_command_prints_one_line_without_a_traceback(command, tiny_flags, tmp_path):
    result = command("train", *tiny_flags, f"--workdir={tmp_path / 'run'}", "--config.data.train=nowhere")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: no prepared data at 'nowhere'")


def test_a_workdir_that_cannot_be_written_is_one_line(inline, tiny_flags, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", "/proc/fm_jax"):
        code, _, err = inline("train", *tiny_flags, f"--workdir={workdir}")
        assert code == 2 and f"--workdir={workdir}: cannot be used (" in err and err.count("\n") == 1, err


def test_a_workdir_of_another_model_is_refused_and_kept(inline, tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    before = contents(run)
    code, _, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.model.mlp_dim=128", "--config.seed=3")
    assert code == 2 and "model.mlp_dim: 64 -> 128; seed: 0 -> 3" in err and "another --workdir" in err
    assert contents(run) == before
    # Another run's parameters do not fit: which of them, and ten at most.
    code, _, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'new'}", f"--config.checkpoint.init_from={run}",
                          "--config.model.mlp_dim=128")
    assert code == 2 and "mlp" in err and "wanted float32[" in err and "found float32[" in err, err


def test_a_start_that_is_refused_changes_nothing(inline, tiny_run, tiny_flags, data, tmp_path):
    """Whatever refuses it, be it found in the last file that is read."""
    def refused(message, *flags):
        before = contents(tmp_path)
        code, _, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.log.progress=false", *flags)
        assert code == 2 and message in err and err.count("\n") == 1, err
        assert contents(tmp_path) == before

    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    refused("optimizer.moment_dtype: 'float32' -> 'bfloat16'", "--config.optimizer.moment_dtype=bfloat16")
    refused("checkpoint.best_metric: unknown 'validation/los'; did you mean 'validation/loss'?",
            "--config.checkpoint.keep_best=1", "--config.checkpoint.best_metric=validation/los",
            "--config.checkpoint.every=6")
    for flags in (["--config.checkpoint.every=4"], ["--config.eval.every=0"]):
        refused("keep_best=1 needs checkpoints of validated steps: make one of config.checkpoint.every=4 and "
                "config.eval.every=", "--config.checkpoint.keep_best=1", *flags)
    with open(run / "metrics.jsonl", "ab") as f:
        f.write(b"{\n{}\n")
    refused("metrics.jsonl:15: not a line of metrics: '{'")
    broken = next(p for p in sorted((run / "checkpoints" / "12" / "params" / "d").iterdir()))
    broken.write_bytes(broken.read_bytes()[:100])
    refused("checkpoints/12 is corrupt")
    refused("metrics.jsonl:15", "--config.checkpoint.on_corrupt=previous")   # nor is 12 set aside
    (run / "run.json").write_text("{")
    refused("run.json: damaged")


def test_another_runs_tokenizer_must_be_the_same(inline, tiny_run, tiny_flags, tmp_path):
    source = shutil.copytree(tiny_run[0], tmp_path / "source")
    run_json = json.loads((source / "run.json").read_text())
    (source / "run.json").write_text(json.dumps(run_json | {"tokenizer": "another"}))
    flags = [*tiny_flags, f"--workdir={tmp_path / 'run'}"]
    code, _, err = inline("train", *flags, f"--config.checkpoint.continue_from={source}", "--config.steps=13")
    assert code == 2 and "tokenizer: 'another' -> " in err and err.count("\n") == 1, err
    flags += [f"--config.checkpoint.init_from={source}", "--config.steps=1"]
    code, _, err = inline("train", *flags)
    assert code == 2 and "had another tokenizer ('another' -> " in err and "so the rows of embed.tokens stand" in err
    code, out, err = inline("train", *flags, r"--config.checkpoint.init_pattern=transformer\..*")
    assert code == 0 and "parameters from step 12" in out and "its tokenizer was another" in out, err


def test_a_config_of_an_older_run(inline, tiny_run, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    del stored["optimizer"]["muon_learning_rate"]
    (run / "config.json").write_text(json.dumps(stored))
    code, out, err = inline("generate", f"--workdir={run}", "--prompt=A", "--max_new_tokens=2")
    assert code == 0 and "take today's default: optimizer.muon_learning_rate" in out + err
    (run / "config.json").write_text(json.dumps(stored | {"optimiser": {"name": "adamw"}}))
    code, out, err = inline("generate", f"--workdir={run}", "--prompt=A", "--max_new_tokens=2")
    assert code == 2 and "config.json: unknown config key 'optimiser.name'; did you mean 'optimizer.name'?" in err


def test_a_corrupt_checkpoint_stops_unless_the_previous_is_asked_for(inline, tiny_run, tiny_flags, tmp_path):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    broken = next(p for p in sorted((run / "checkpoints" / "12" / "params" / "d").iterdir()))
    broken.write_bytes(broken.read_bytes()[:100])
    code, _, err = inline("train", *tiny_flags, f"--workdir={run}")
    assert code == 2 and f"{run / 'checkpoints' / '12'} is corrupt (params/d/{broken.name} has 100 bytes" in err
    assert "newest good one is step 8: add --config.checkpoint.on_corrupt=previous" in err
    code, out, err = inline("train", *tiny_flags, f"--workdir={run}", "--config.checkpoint.on_corrupt=previous")
    assert code == 0 and "from step 8" in out and "12.corrupt" in out, err
    assert state_of(run, 12) == state_of(tiny_run[0], 12)
    assert (run / "checkpoints" / "12.corrupt").is_dir()   # kept, to look into


def test_too_little_space_keeps_the_checkpoints_before(inline, tiny_run, tiny_flags, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "12")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, err = inline("train", *tiny_flags, f"--workdir={run}")
    assert code == 2 and "saving step 12 needs" in err and "earlier checkpoints are intact: 4, 8" in err
    assert checkpoint.verify(run, 8) == "" and checkpoint.steps(run) == [4, 8]


@pytest.mark.parametrize("room, message", [
    pytest.param(1, "run/metrics.jsonl: step 6 cannot be written", marks=pytest.mark.slow),
    (40_000, "saving step 8 to run/checkpoints failed")])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(room, message, tiny_run, tiny_flags, tmp_path,
                                                                       command):
    flags = [*tiny_flags, "--workdir=run", "--config.checkpoint.asynchronous=false"]   # step 4 is saved by then
    result = subprocess.run([sys.executable, "-c", FULL, "6", str(room), *flags], capture_output=True, text=True,
                            timeout=60, cwd=tmp_path, env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"})   # it is shared
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr and "File too large" in result.stderr
    assert checkpoint.steps(tmp_path / "run") == [4] and checkpoint.verify(tmp_path / "run", 4) == ""
    result = command("train", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "from step 4" in result.stdout, result.stderr
    assert state_of(tmp_path / "run", 12) == state_of(tiny_run[0], 12)
    assert rows(tmp_path / "run") == rows(tiny_run[0])


def at_step(monkeypatch, at, do):
    """Has `do()` called once, when the progress of step `at` is shown."""
    show, todo = metrics.Progress.show, [do]

    def show_then_do(self, step, **values):
        show(self, step, **values)
        if step == at and todo:
            todo.pop()()

    monkeypatch.setattr(metrics.Progress, "show", show_then_do)


@pytest.mark.parametrize("harm, message", [
    (lambda shard: shard.unlink(), "cannot be read any more (No such file or directory); put the file back"),
    (lambda shard: os.truncate(shard, 100), "has 100 bytes, and had"),   # reading on would be a bus error
])
def test_a_data_shard_that_goes_away_is_one_line_and_no_step_is_lost(harm, message, inline, tiny_run, tiny_flags, data,
                                                                     tmp_path, monkeypatch):
    there = shutil.copytree(data, tmp_path / "data")
    shard, = there.glob("train/*.tokens")
    whole = shard.read_bytes()
    flags = [*tiny_flags, f"--workdir={tmp_path / 'run'}", f"--config.data.train={there}"]
    at_step(monkeypatch, 5, lambda: harm(shard))
    code, _, err = inline("train", *flags)
    assert code == 2 and str(shard) in err and message in err and err.count("\n") == 1, err
    assert checkpoint.steps(tmp_path / "run")[-1] > 5
    shard.write_bytes(whole)
    code, _, err = inline("train", *flags)
    assert code == 0, err
    assert rows(tmp_path / "run") == rows(tiny_run[0]) and state_of(tmp_path / "run", 12) == state_of(tiny_run[0], 12)


@pytest.mark.parametrize("removed", ["run", "run/checkpoints"])
@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_folder_removed_while_running_is_one_line_and_no_step_is_lost(removed, asynchronous, inline, tiny_run,
                                                                        tiny_flags, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [*tiny_flags, f"--workdir={run}", f"--config.checkpoint.asynchronous={asynchronous}",
             "--config.log.tensorboard=false"]
    at_step(monkeypatch, 6, lambda: (tmp_path / removed).rename(tmp_path / "aside"))   # at once, whole
    code, _, err = inline("train", *flags)
    assert code == 2 and f"{run / 'checkpoints'} was removed while this run was at work" in err, err
    assert err.count("\n") == 1 and checkpoint.steps(run) == [8]
    code, out, err = inline("train", *flags)
    assert code == 0 and "from step 8" in out, err
    assert state_of(run, 12) == state_of(tiny_run[0], 12)


def test_a_bucket_out_of_reach_is_said_before_anything_is_compiled(inline, tiny_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "FIRST_RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"})
    monkeypatch.setattr(Program, "init", lambda self: pytest.fail("too late"))
    with socket.socket() as taken:   # and not listened at
        taken.bind(("127.0.0.1", 0))
        for name in ("AWS_ENDPOINT_URL", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_AUTH_TOKEN_FOR_TESTING"):
            monkeypatch.setenv(name, "x")
        for flags in (["--workdir=gs://bucket/run"], ["--workdir=s3://bucket/run"],
                      ["--workdir=run", "--config.checkpoint.continue_from=gs://bucket/run"]):
            code, _, err = inline("train", *tiny_flags, *flags)
            assert code == 2 and "bucket/run: the store did not do what was asked" in err and "be reached" in err, err
            assert err.count("\n") == 1 and not [p for p in tmp_path.rglob("*") if p.name not in ("run", "lock")]
        code, _, err = inline("generate", "--workdir=gs://bucket/run", "--prompt=a")
        assert code == 2 and err.count("\n") == 1, err


def test_a_folder_that_cannot_rename_is_refused_at_the_start(inline, tiny_flags, tmp_path, monkeypatch):
    """As some mounts of buckets: everything works until the first checkpoint is to be committed."""
    def rename(path, target):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    code, _, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and "run: cannot be used (Operation not permitted" in err and err.count("\n") == 1, err
    assert not (tmp_path / "run" / "config.json").exists()

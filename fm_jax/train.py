"""Pretrains the model of a config: the loop, from the mesh to the last checkpoint.

    python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/x
    python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/x --config.optimizer.learning_rate=3e-4

The same command continues a run that was stopped. On several hosts it is started on each: `distributed` says how they
find each other. Layer 5; `train` is also a function.
"""

import contextlib
import json
import os
import signal
import time

from absl import flags

from fm_jax import config as config_lib
from fm_jax import distributed
from fm_jax.errors import UserError, choose


def train(config, workdir, *, profile_steps: int = 0, peers: distributed.Peers | None = None) -> dict[str, float]:
    """Returns the last validation metrics of the run of `config`, trained in `workdir` to its end; {} without any.

    SIGTERM saves at the next step boundary and exits with distributed.AGAIN; so does SIGINT (Ctrl-C), which then
    raises KeyboardInterrupt; a second SIGINT does so at once. Of several processes, whichever gets the signal, all do
    so at the same step. From the signal to the end take the steps under way, two seconds of several processes'
    agreement, and one save.

    profile_steps: trace so many steps, from the tenth after the start or the last ones, into `workdir`/profile.
    peers: the other processes of the run, to be told where this one hangs.

    Raises:
      UserError: whatever cannot start, each in its own words; a loss or gradient that is not finite, after
        saving the state before it and what is needed to look into it.
    """
    import jax

    from fm_jax import checkpoint, metrics, objectives, sharding, storage, tree
    from fm_jax.data import batches
    from fm_jax.step import Program

    config = objectives.settled(config, batches.values(config))
    config = config_lib.resolve(config, examples_per_epoch=batches.examples_per_epoch(config))
    layout = sharding.Layout(sharding.make_mesh(config.mesh))
    tokenizer = batches.load_tokenizer(config)
    objective = objectives.load(config, tokenizer, layout)
    program = Program(config, objective, layout)
    program.load_compiled(tokenizer)
    data = batches.open_batches(config, objective, rows=program.rows)
    held_out = {}
    if config.eval.every:
        held_out = {f"validation/{name}/" if name else "validation/": batches.open_batches(
            config, objective, split="validation", name=name, rows=program.rows)
            for name in batches.held_out_sets(config)}
    tasks = _open_tasks(config, tokenizer, objective) if config.eval.tasks else None
    if config.checkpoint.keep_best:
        _check_best(config, program, held_out)
    described = dict(tokenizer=tokenizer, data=batches.fingerprints(config))
    progress = metrics.Progress(config.steps, every=config.log.every, bar=config.log.progress)
    devices = layout.mesh.devices
    mesh = sharding.describe(layout.mesh)
    tokens = config.batch_size * objective.tokens_per_example
    flops = config.batch_size * objective.flops_per_example
    late, clock, train_sums = metrics.Late(), metrics.Clock(), metrics.Sums()
    due = lambda every, step: every and (step % every == 0 or step == config.steps)
    tasks_every = config.eval.tasks_every if tasks else 0

    def save(state, step, values=None):
        files.push()   # first: what is written of the steps until then is there wherever the checkpoint is
        checkpoints.save(step, state, values)

    def validate(state, step):
        """Returns the held-out means, written and shown; {} where the run is told to stop: that does not wait."""
        values = {}
        for prefix, held in held_out.items():
            sums = metrics.Sums()
            for batch in held.iterate():
                if stop.asked():
                    return {}
                watchdog.beat(f"a batch of the validation after step {step}")
                found = program.eval_step(program.eval_params(state), state.frozen, program.place(batch))
                sums.add(jax.device_get(found))
            values |= sums.take(prefix)
        text = ", ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in values.items())
        progress.note(f"step {step}: validation {text}")
        writer.write(step, values)
        files.push()
        return values

    def evaluate(state, step):
        """Writes and shows what `config.eval.tasks` find, but where the run is told to stop."""
        watchdog.beat(None)   # a task may be long
        values = _evaluate(config, tokenizer, objective, program.model_params(state), tasks, stop)
        if values:
            progress.note(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
            writer.write(step, values)

    def log(late):
        """Adds up a step's metrics; writes and shows their means every `log.every` steps. Returns a bad step."""
        if late is None:
            return None
        step, values = late
        if not values["finite"][0]:
            return late
        clock.tick(step + 1, tokens)
        train_sums.add(values)
        rate = clock.rate()
        mfu = rate and metrics.mfu(rate, flops / tokens, devices.size, metrics.peak_flops(devices.flat[0]))
        if (step + 1) % config.log.every == 0 or step + 1 == config.steps:
            means = train_sums.take("train/")
            del means["train/finite"]
            speed = {"tokens_per_s": rate, "mfu": mfu, "step_time_s": rate and tokens / rate}
            writer.write(step + 1, means | {k: v for k, v in speed.items() if v is not None})
        total, weight = values["loss"]
        progress.show(step + 1, loss=float(total / weight) if weight else None, tokens_per_s=rate, mfu=mfu,
                      remaining_s=clock.remaining_s(step + 1, config.steps))
        return None

    with contextlib.ExitStack() as held:
        held.enter_context(checkpoint.lock(workdir))
        # Of a run in a bucket, a copy of what grows: that is put there whole.
        files = held.enter_context(storage.local(workdir, "metrics.jsonl", f"logs/process_{jax.process_index()}.log"))
        distributed.log_to(files.path)
        # Whatever refuses the start does so before anything in the folder changes.
        state, start, origin = checkpoint.start(workdir, config, program.abstract, program.init, axes=program.axes,
                                                model=program.adaptation.model, **described)
        if program.abstract.frozen is not None:
            frozen, described["base"] = program.adaptation.read_base(config, layout, checkpoint.base_of(workdir))
            state = state.replace(frozen=frozen)
            origin += f"; frozen ones from step {described['base']['step']} of {described['base']['folder']}" + (
                f", kept in {config.adapt.quantize}" if config.adapt.quantize else "")
        if start == 0 and hasattr(objective, "check_start"):
            sums = metrics.Sums()
            sums.add(jax.device_get(
                program.eval_step(program.eval_params(state), state.frozen, program.place(data.batch(0)))))
            objective.check_start(sums.take())
        writer = metrics.Writer(files.path, start, tensorboard=config.log.tensorboard)
        checkpoint.describe_run(workdir, config, start, **described)
        held.enter_context(writer)
        checkpoints = held.enter_context(checkpoint.Checkpoints(workdir, config.checkpoint))
        stop = held.enter_context(stop_signals())
        traced_from = max(start, min(start + 10, config.steps - profile_steps))
        traced = held.enter_context(metrics.profile(files.path / "profile", traced_from, profile_steps))
        watchdog = held.enter_context(distributed.Watchdog(config.health.hang_timeout_s, peers))

        training, whole = tree.count(program.abstract.params), tree.count(program.adaptation.model[0])
        of_model = "" if program.abstract.frozen is None else f" train, {training / whole:.2%} of the model's,"
        progress.note(f"{config.name or config.objective}: {training:,} parameters{of_model} on "
                      f"{devices.size} {devices.flat[0].device_kind} ({mesh})")
        progress.note(origin)
        if data.note:
            progress.note(data.note)
        if start >= config.steps:
            progress.note(f"all {config.steps} steps are done; a longer run: --config.steps=N")
        if jax.process_count() > 1:
            program.compile()
            distributed.wait_for_all("compiled")
        # Validation metrics: the last ones, and those of the present step, which its checkpoint keeps.
        last = here = {k: v for k, v in writer.start.items() if k.startswith("validation/")}
        if start and due(config.eval.every, start) and not last:   # a stop cut it short
            last = here = validate(state, start)
        if start and due(tasks_every, start) and not any(k.startswith("eval/") for k in writer.start):
            evaluate(state, start)
        began, step, bad, batch_at = time.monotonic(), start, None, data.iterate(start)
        while step < config.steps and not (bad or stop.asked()):
            watchdog.beat(f"step {step + 1}")
            traced(step, state.step)
            try:
                batch = next(batch_at)
            except UserError:   # its data is gone. Others of several processes are in the step by now, and cannot save
                if jax.process_count() == 1 and not log(late.flush()):
                    save(state, step, here)
                raise
            state, values = program.train_step(state, program.place(batch), step)
            if step == start:
                jax.block_until_ready(state.step)
                progress.note(f"first step after {time.monotonic() - began:.1f} s")
            bad = log(late.push(step, values))
            step, here = step + 1, {}
            if due(config.eval.every, step) or due(config.checkpoint.every, step) or due(tasks_every, step):
                bad = bad or log(late.flush())
                with clock.pause():
                    if due(config.eval.every, step) and not bad:
                        here = validate(state, step)
                        last = here or last
                    if due(tasks_every, step) and not bad:
                        evaluate(state, step)
                    if due(config.checkpoint.every, step) and not bad:
                        watchdog.beat(f"the save of step {step}, or the one before")
                        save(state, step, here)
        bad = bad or log(late.flush())
        watchdog.beat(f"the last save, of step {step}")
        if bad:
            save(state, bad[0])
            checkpoints.wait()
            raise UserError(_report_bad_step(files.path, storage.place(workdir), *bad, step - 1, data))
        if stop.by:
            save(state, step, here)
        progress.close()
    if stop.by:
        progress.note(f"stopped by {stop.by} after step {step}, which is saved; the same command continues from there")
        # What called this, a script or a notebook, is meant to stop as well.
        if stop.by == "SIGINT":
            raise KeyboardInterrupt
        raise SystemExit(distributed.AGAIN)
    return last


def _open_tasks(config, tokenizer, objective):
    """Returns ({name: task}, {name: group}) of `config.eval.tasks`. Raises UserError for what would fail later."""
    from fm_jax import pretrained
    from fm_jax.evals import names, requests

    if not {"trees", "score", "decode"} <= set(objective.predict):
        raise UserError(f"config.eval.tasks={','.join(config.eval.tasks)}: tasks are evaluated in the training of "
                        "language models; leave them out")
    try:
        tasks, groups = names.load(config.eval.tasks)
        for task in tasks.values():
            requests.prepare(pretrained.Pretrained(config, tokenizer, objective, None), task,
                             limit=config.eval.tasks_limit)
    except UserError as error:
        raise UserError(f"config.eval.tasks: {error}") from error
    return tasks, groups


def _evaluate(config, tokenizer, objective, params, opened, stop):
    """Returns {"eval/TASK/METRIC": value}, of groups too; {} where the run is told to `stop` before the last task."""
    from fm_jax import pretrained
    from fm_jax.evals import requests, results

    tasks, groups = opened
    # Made anew, so that nothing of these parameters stays behind.
    lm, found = pretrained.Pretrained(config, tokenizer, objective, params), {}
    for name, task in tasks.items():
        if stop.asked():
            return {}
        found[name] = requests.evaluate(lm, task, limit=config.eval.tasks_limit, bootstrap_iters=0)._asdict()
    found |= {name: {"metrics": results.aggregate(group, found)} for name, group in groups.items()}
    return {f"eval/{name}/{metric.removesuffix(',none')}": value for name, result in found.items()
            for metric, value in result["metrics"].items() if "," in metric and "_stderr," not in metric}


def _check_best(config, program, prefixes):
    """Returns nothing. Raises UserError where `checkpoint.keep_best` would not find what it compares."""
    import jax
    import numpy as np

    from fm_jax import metrics

    saved, validated = config.checkpoint.every, config.eval.every
    if not validated or (saved % validated and validated % saved):
        raise UserError(f"config.checkpoint.keep_best={config.checkpoint.keep_best} needs checkpoints of validated "
                        f"steps: make one of config.checkpoint.every={saved} and config.eval.every={validated} a "
                        "multiple of the other")
    sums = metrics.Sums()
    values = jax.eval_shape(program.eval_step, program.eval_params(program.abstract), program.abstract.frozen,
                            program.batch_spec)
    sums.add(jax.tree.map(lambda a: np.zeros(a.shape), values))
    names = [prefix + name for name in sums.take() for prefix in prefixes]
    choose(config.checkpoint.best_metric, names, "config.checkpoint.best_metric")


def _report_bad_step(here, workdir, bad, values, seen, data):
    """Returns the message about the step `bad` with its metrics `values`, having written its batch to `workdir`.

    `here`: the folder that stands for `workdir` on this machine. `seen`: the last step that was started.
    """
    import jax
    import numpy as np

    folder, name_there = here / f"not_finite_{bad}", workdir / f"not_finite_{bad}"
    ids = data.ids(bad)   # of several processes, each has its own
    name = "batch.npz" if jax.process_count() == 1 else f"batch_of_process_{jax.process_index()}.npz"
    numbers = {name: [str(x) for x in np.ravel(value)] for name, value in values.items()}
    report = {"step": bad, "last_step_started": seen, "examples": ids.tolist(), "metrics": numbers}
    try:
        folder.mkdir(exist_ok=True)
        np.savez(folder / name, **data.batch(bad))
        (folder / name.replace("batch", "report").replace("npz", "json")).write_text(json.dumps(report, indent=1))
        where = f"the batch in {name_there}"
    except OSError as e:
        where = f"the batch not, as {folder} cannot be written ({e.strerror})"
    return (f"loss or gradient not finite in step {bad} (steps {bad} to {seen} were not applied): batch {bad}, "
            f"examples {ids[0]} to {ids[-1]}; the state before it is saved as step {bad}, {where}; lower "
            "--config.optimizer.learning_rate, or look into that batch")


class Stop:
    """Whether the run is told to stop. Several processes ask in step with each other, and have the same answer.

    Attributes:
      by: the name of the signal, once `asked` has said so; None.
    """

    def __init__(self, processes: int = 1):
        self._processes, self._times, self._caught, self.by = processes, 0, [], None

    def asked(self) -> bool:
        """Returns whether to stop. Once it has, it does."""
        if self._processes > 1 and not self.by:
            from jax.experimental import multihost_utils

            # A notice of any process is known to all; they agree on the first time that all of them have yet to ask.
            self._times += 1
            if multihost_utils.reached_preemption_sync_point(self._times):
                self.by = "SIGTERM"
        elif self._caught:
            self.by = self._caught[0]
        return self.by is not None

    def catch(self, number, frame=None):
        """The handler of signals."""
        if self._caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._caught.append(signal.Signals(number).name)
        if self._processes > 1:   # jax's own handler of SIGTERM tells the others
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_signals():
    """Yields the `Stop` that SIGTERM and SIGINT ask for. A second SIGINT interrupts at once."""
    import jax

    stop = Stop(jax.process_count())
    try:
        caught = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        previous = {s: signal.signal(s, stop.catch) for s in caught}
    except ValueError:   # not the main thread, as in a notebook's worker: its owner handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _flags(fv):
    config_lib.define_config(fv)
    flags.DEFINE_string("workdir", None, "the run's folder; made where it is not there", flag_values=fv, required=True)
    flags.DEFINE_integer("profile", 0, "trace so many steps for XProf, into WORKDIR/profile", flag_values=fv,
                         lower_bound=0)
    distributed.define_flags(fv)


def main(args):
    with distributed.processes(args) as peers:
        train(args.config, args.workdir, profile_steps=args.profile, peers=peers)


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

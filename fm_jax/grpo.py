"""Reinforces a model on problems whose answers can be checked: samples, scores, and trains on what was better.

    python -m fm_jax.grpo --config configs/grpo.py:arithmetic --init runs/arith --workdir runs/rl
    python -m fm_jax.grpo --config configs/grpo.py:arithmetic --init runs/arith --workdir runs/rl \\
        --config.objective_args.normalize_std=True --config.objective_args.average=response     # as in GRPO's paper

Each batch: prompts of config.data.train (prepared with --examples; of a record "prompt" is a text or a chat's messages),
`group_size` responses to each at temperature 1 by the policy as it is, their rewards by the checker, and `updates` steps
of the loss in objectives/policy_gradient.py, which has all settings. Held-out prompts are answered greedily. The model is
that of --init; the same command continues a run that was stopped, from its last checkpoint. One process; the mesh axes
that generation takes: not `context` and `stage`. Layer 5.
"""

import contextlib

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError
from fm_jax.train import stop_signals


def train(config, workdir) -> dict[str, float]:
    """Returns the last held-out means of the run of `config`, trained in `workdir` to its end.

    SIGTERM and Ctrl-C save after the responses under way, and end as `train.train` says.

    Raises:
      UserError: whatever cannot start, each in its own words; a loss or gradient that is not finite.
    """
    import jax
    import numpy as np

    from fm_jax import checkpoint, distributed, metrics, objectives, sharding, storage, tree
    from fm_jax.data import batches
    from fm_jax.data.mixture import hash_ints
    from fm_jax.step import Program

    config = config_lib.resolve(config, examples_per_epoch=batches.examples_per_epoch(config))
    layout = sharding.Layout(sharding.make_mesh(config.mesh))
    tokenizer = batches.load_tokenizer(config)
    objective = objectives.load(config, tokenizer, layout)
    _check(config, objective, layout)
    program = Program(config, objective, layout)
    group, updates = objective.group_size, objective.updates
    prompts = _Prompts(config, tokenizer, objective)
    described = dict(tokenizer=tokenizer, data=batches.fingerprints(config))
    progress = metrics.Progress(config.steps, every=config.log.every, bar=config.log.progress)
    due = lambda every, step: every and (step % every == 0 or step >= config.steps)
    logprobs = jax.jit(objective.logprobs)

    # All parameters of the model as it is: the one that samples is the one that is trained, not an average.
    policy = lambda state: program.model_params(state.replace(ema=None))

    def respond(state, step):
        """Returns (batch on the host, {name: (sum, weight)} of the rewards) of new responses to the next prompts."""
        records = prompts.of_batch(step // updates)
        ids = [prompts.ids(record) for record in records]
        seeds = hash_ints(config.seed, step, np.arange(config.batch_size)) % np.uint64(2 ** 32)
        params = policy(state)
        made = _sample(objective, params, ids, prompts.end, group, seeds)
        rewards = np.array([objective.reward(tokenizer.decode(each.tokens), records[i // group])
                            for i, each in enumerate(made)], np.float64)
        advantages = objective.advantages(rewards)
        responses = [{"prompt": ids[i // group], "response": _with_end(each, prompts.end), "advantage": a}
                     for i, (each, a) in enumerate(zip(made, advantages))]
        batch = objective.examples(responses, None)
        batch["old"] = np.asarray(logprobs(params, program.place(batch)))
        if reference is not None:
            batch["reference"] = np.asarray(logprobs(reference, program.place(batch)))
        groups = rewards.reshape(-1, group)
        mean = lambda x: (np.sum(x), np.size(x))
        return batch, {"reward": mean(rewards), "reward_std": mean(groups.std(1)),
                       "flat_groups": mean(groups.std(1) == 0), "response_tokens": mean(
                           [len(r["response"]) for r in responses])}

    def validate(state, step):
        params, rewards = program.model_params(state), []
        for records in prompts.held_out():
            made = _sample(objective, params, [prompts.ids(r) for r in records], prompts.end)
            rewards += [objective.reward(tokenizer.decode(each.tokens), r) for each, r in zip(made, records)]
        values = {"validation/reward": float(np.mean(rewards))}
        progress.note(f"step {step}: validation reward {values['validation/reward']:.4f} of {len(rewards)} problems")
        writer.write(step, values)
        files.push()
        return values

    with contextlib.ExitStack() as held:
        held.enter_context(checkpoint.lock(workdir))
        files = held.enter_context(storage.local(workdir, "metrics.jsonl", "logs/process_0.log"))
        distributed.log_to(files.path)
        state, step, origin = checkpoint.start(workdir, config, program.abstract, program.init, axes=program.axes,
                                               model=program.adaptation.model, **described)
        if program.abstract.frozen is not None:
            frozen, described["base"] = program.adaptation.read_base(config, layout, checkpoint.base_of(workdir))
            state = state.replace(frozen=frozen)
        reference = None
        if objective.kl:
            reference = checkpoint.restore_params(config.checkpoint.init_from, None,
                                                  layout.abstract(*program.adaptation.model), ema=True)
        writer = metrics.Writer(files.path, step, tensorboard=config.log.tensorboard)
        checkpoint.describe_run(workdir, config, step, **described)
        held.enter_context(writer)
        checkpoints = held.enter_context(checkpoint.Checkpoints(workdir, config.checkpoint))
        stop = held.enter_context(stop_signals())
        progress.note(f"{config.name or config.objective}: {tree.count(program.abstract.params):,} parameters on "
                      f"{layout.mesh.devices.size} {layout.mesh.devices.flat[0].device_kind} "
                      f"({sharding.describe(layout.mesh)})")
        progress.note(origin)
        last = {k: v for k, v in writer.start.items() if k.startswith("validation/")}
        if config.eval.every and not last and not step:
            last = validate(state, step)   # what the run has to be better than
        sums = metrics.Sums()
        while step < config.steps and not stop.asked():
            batch, rewards = respond(state, step)
            sums.add(rewards)
            placed, here = program.place(batch), {}
            for _ in range(updates):
                state, values = program.train_step(state, placed, step)
                values = jax.device_get(values)
                if not values["finite"][0]:
                    checkpoints.save(step, state, here)
                    raise UserError(f"loss or gradient not finite in step {step}; the state before it is saved: lower "
                                    "--config.optimizer.learning_rate")
                sums.add(values)
                step += 1
            if any((step - i) % config.log.every == 0 for i in range(updates)) or step >= config.steps:
                means = sums.take("train/")
                del means["train/finite"]
                progress.note(f"step {step}/{config.steps} | reward {means['train/reward']:.4f} | "
                              f"{means['train/response_tokens']:.1f} tokens a response | groups without a difference "
                              f"{means['train/flat_groups']:.2f}")
                writer.write(step, means)
            if due(config.eval.every, step):
                here = last = validate(state, step)
            if due(config.checkpoint.every, step):
                files.push()
                checkpoints.save(step, state, here)
        if stop.by:
            checkpoints.save(step, state)
        progress.close()
    if stop.by == "SIGINT":
        raise KeyboardInterrupt
    if stop.by:
        raise SystemExit(distributed.AGAIN)
    return last


class _Prompts:
    """The records of a run: those of each batch, in a shuffled order that its seed decides; and the held-out ones."""

    reads = "examples"

    def __init__(self, config, tokenizer, objective):
        from fm_jax.data.batches import open_batches
        from fm_jax.data.prepared import document_ends

        few = config.copy_and_resolve_references()
        few.batch_size = config.batch_size // objective.group_size
        self._tokenizer, (self._start, self.end) = tokenizer, document_ends(tokenizer)
        self._room = config.seq_len + 1 - objective.max_new_tokens
        self._train = open_batches(few, self)
        self._held_out = open_batches(few, self, split="validation") if config.eval.every else None

    def examples(self, records, seeds, train=True):
        return [record for record in records if record is not None]

    def of_batch(self, number):
        return self._train.batch(number)

    def held_out(self):
        for number in range(self._held_out.num_batches):
            yield self._held_out.batch(number)

    def ids(self, record):
        """Returns the ids of a record's prompt, int32: as of a document's beginning, or of a chat."""
        import numpy as np

        from fm_jax.data.examples import place_of

        prompt = record.get("prompt")
        if isinstance(prompt, list):
            ids = self._tokenizer.chat_ids(prompt)
        elif isinstance(prompt, str):
            ids = np.array([self._start, *self._tokenizer.encode(prompt)], np.int32)
        else:
            raise UserError(f"{place_of(record)}: 'prompt' must be a text or a chat's messages, got {prompt!r:.40}")
        if len(ids) > self._room:
            raise UserError(f"{place_of(record)}: a prompt of {len(ids)} tokens leaves no place for max_new_tokens in "
                            "config.seq_len; raise that, or leave the record out")
        return ids


def _check(config, objective, layout):
    import jax

    if not hasattr(objective, "advantages"):
        raise UserError(f"config.objective={config.objective!r} is not for reinforcement: set it to "
                        "fm_jax.objectives.policy_gradient.PolicyGradient, as configs/grpo.py does")
    if jax.process_count() > 1:
        raise UserError("fm_jax.grpo is one process; give the mesh the devices of one host")
    for axis in ("context", "stage"):
        if (n := layout.mesh.shape[axis]) > 1:
            raise UserError(f"mesh axis {axis}={n} is not for generation, which this does at each step")
    prompts = config.batch_size // objective.group_size
    if prompts % layout.batch_parts:
        raise UserError(f"config.batch_size={config.batch_size} / group_size={objective.group_size} = {prompts} prompts "
                        f"are not divisible by the {layout.batch_parts} parts into which the mesh cuts a batch")
    for key in ("checkpoint.every", "eval.every", "steps"):
        value = config
        for part in key.split("."):
            value = value[part]
        if value % objective.updates:
            raise UserError(f"config.{key}={value} must be a multiple of objective_args.updates={objective.updates}: a "
                            "run stops between batches of responses")
    if objective.kl and not config.checkpoint.init_from:
        raise UserError(f"objective_args.kl={objective.kl} needs the model that it stays near: give --init")


def _sample(objective, params, prompts, end, n=1, seeds=None):
    """Returns n completions of each prompt (ids), drawn with `seeds`, one for each; without them the likeliest."""
    from fm_jax import decode

    sampling = decode.Sampling(0.0 if seeds is None else 1.0, vocab_size=objective.tokenizer.vocab_size)
    rows = prompts + prompts[-1:] * (-len(prompts) % objective.module.layout.batch_parts)   # the last batch may be short
    longest = objective.max_new_tokens
    made = decode.complete(objective, decode.per_layer(params), rows, max_new_tokens=longest, sampling=sampling,
                           seeds=seeds, n=n, stop_ids=[end], steps_per_dispatch=longest)
    return made[: len(prompts) * n]


def _with_end(completion, end):
    import numpy as np

    return np.append(completion.tokens, end) if completion.finish == "stop" else completion.tokens


def _flags(fv):
    config_lib.define_config(fv)
    flags.DEFINE_string("workdir", None, "the run's folder; made where it is not there", flag_values=fv, required=True)
    flags.DEFINE_string("init", "", "the run whose model this one begins with; sets config.checkpoint.init_from, "
                        "config.model and config.data.tokenizer", flag_values=fv)


def main(args):
    config = args.config
    if args.init:
        begun, _ = config_lib.load(f"{args.init}/config.json")
        config.model = begun.model
        config.checkpoint.init_from, config.data.tokenizer = args.init, f"{args.init}/tokenizer"
    train(config, args.workdir)


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

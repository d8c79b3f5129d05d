"""One step of training: the state, what a step does to it, and where every array of it lives. Layer 3.

    program = Program(config, objective, layout)
    state = program.init()
    state, metrics = program.train_step(state, program.place(batch), step)

`train`, `plan` and `benchmark` all run this same compiled function.
"""

import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_jax import adapt, chip_kernels, compiled_step, optim, pipeline, sharding, xla_flags
from fm_jax.architecture import Architecture
from fm_jax.errors import UserError
from fm_jax.model import merged
from fm_jax.objectives import Objective
from fm_jax.sharding import Layout


@struct.dataclass
class State:
    """All that a run is at a step, arrays only."""

    step: jax.Array     # int32, steps done
    params: Any         # what trains
    opt_state: Any
    ema: Any            # of params; None where `config.optimizer.ema_decay` is 0
    frozen: Any = None  # the parameters that do not train, as `adapt` keeps them; no checkpoint has them


class Program:
    """The functions of a run, for one config on one mesh. Building it touches no device memory.

    Attributes:
      abstract: State of shape structs with shardings: the restore target, and what `plan` reports.
      adaptation: which parameters train. axes: logical axes of these. schedule: step -> learning rate.
      train_step(state, batch, step) -> (state, metrics), jitted; donates the state.
      eval_step(params, frozen, batch) -> metrics, jitted.
    Metrics are {name: (sum, weight)}, to be added over batches before they are divided, and {name: count}; float32
    scalars.
    """

    def __init__(self, config, objective: Objective, layout: Layout):
        """`config`: resolved. Raises UserError where the batch or a parameter does not fit the mesh."""
        self.config, self.objective, self.layout = config, objective, layout
        chip_kernels.check_matmul_dtype(config.model.matmul_dtype, layout)
        micro, parts = config.batch_size // config.accumulation_steps, layout.batch_parts
        pipeline.check(Architecture(**config.model.to_dict()), layout, micro, f"config.batch_size={config.batch_size} / "
                       f"accumulation_steps={config.accumulation_steps} = {micro} rows")
        if micro % parts:
            raise UserError(
                f"config.batch_size={config.batch_size} in {config.accumulation_steps} microbatches of {micro} is not "
                f"divisible by the {parts} parts into which the mesh ({sharding.describe(layout.mesh)}) cuts a batch; "
                f"take a multiple of {parts * config.accumulation_steps}")
        # Under jit, it is traced here and not again in `_init`. The key is made inside: an array out here would start
        # the backend, which `plan` must not.
        self._init_params = jax.jit(objective.init)
        boxed = jax.eval_shape(lambda: self._init_params(jax.random.key(0)))
        self.adaptation = adapt.Adaptation(config, *sharding.unbox(boxed))
        params, self.axes = self.adaptation.params, self.adaptation.axes
        tx, self.schedule = optim.make(
            config.optimizer, total_steps=config.steps, warmup_steps=config.optimizer.warmup_steps,
            decay_steps=config.optimizer.decay_steps, params=params, axes=self.axes, model=self.adaptation.model[0])
        self.tx = optim.skip_outliers(tx, config.health.skip_grad_norm_factor,
                                      config.health.skip_grad_norm_warmup_steps)
        placed = layout.parameters(params, self.axes)
        frozen = self.adaptation.frozen and layout.parameters(self.adaptation.frozen, self.adaptation.frozen_axes)
        shapes = jax.eval_shape(self._around, params)
        self._working = working = optim.state_shardings(self.tx, params, placed, layout.replicated)
        if config.model.remat.startswith("offload"):
            layout.check_host_memory(f"model.remat={config.model.remat!r}")
        if config.optimizer.offload == "host":
            layout.check_host_memory("config.optimizer.offload='host'")
            kept = lambda kind: jax.tree.map(lambda s, a: s.with_memory_kind(kind) if a.ndim else s, working,
                                             shapes.opt_state)
            self._working, working = kept(sharding.DEVICE), kept(sharding.HOST)
        self.shardings = State(layout.replicated, placed, working, placed if config.optimizer.ema_decay else None,
                               frozen)
        self.abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                                     shapes.replace(frozen=self.adaptation.frozen), self.shardings)
        self.batch_spec = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.batch(a.ndim))
            for name, a in objective.batch_spec(config.batch_size).items()}
        batch = {name: a.sharding for name, a in self.batch_spec.items()}
        here = layout.replicated
        options = xla_flags.compiler_options(config.xla_flags, layout)
        self.train_step = jax.jit(self._train_step, donate_argnums=0, in_shardings=(self.shardings, batch, here),
                                  out_shardings=(self.shardings, here), compiler_options=options)
        self.eval_step = jax.jit(self._eval_step, in_shardings=(placed, frozen, batch), out_shardings=here,
                                 compiler_options=options)

    def init(self) -> State:
        """Returns the state at step 0 but for what is frozen, each array made in its shards, never whole on one device.
        """
        # XLA:CPU spends 7 s on the random bits of a small model, and 1 s at this level for the same values.
        options = {"xla_backend_optimization_level": 1} if self.layout.platform == "cpu" else None
        return jax.jit(self._init, out_shardings=self.shardings.replace(frozen=None), compiler_options=options)()

    def load_compiled(self, tokenizer) -> None:
        """Returns nothing; takes the train step from `config.compiled_step`, where it names a file.

        tokenizer: with which the objective was made.

        Raises:
          UserError: the file is not of this program.
        """
        if self.config.compiled_step:
            self.train_step = compiled_step.load(
                self.config.compiled_step, self.traced(), self.layout.mesh, self.config, tokenizer)

    def traced(self):
        """Returns the traced train step, to be lowered and compiled for the devices of its mesh."""
        return self.train_step.trace(self.abstract, self.batch_spec, 0)

    def compile(self) -> None:
        """Returns nothing; compiles the steps, which calls of them then find compiled."""
        if not self.config.compiled_step:
            self.traced().lower().compile()
        if self.config.eval.every:
            self.eval_step.lower(self.eval_params(self.abstract), self.abstract.frozen, self.batch_spec).compile()

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows of a batch that this process's devices hold, int64, ascending.

        Where the mesh cuts something else than the batch over processes (tensor, context), several hold the same rows.
        """
        number = np.arange(self.config.batch_size)
        held = self.layout.batch(1).addressable_devices_indices_map(number.shape)
        return np.unique(np.concatenate([number[index] for index in held.values()]))

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the global batch on the devices, from this process's `rows` of it.

        Raises:
          UserError: names, shapes or dtypes other than the objective's `batch_spec`.
        """
        found = {n: (*a.shape, str(a.dtype)) for n, a in batch.items()}
        wanted = {n: (len(self.rows), *s.shape[1:], str(s.dtype)) for n, s in self.batch_spec.items()}
        if found != wanted:
            raise UserError(f"the batch is {found}, the objective's batch_spec says {wanted}")

        def part(array, index):
            rows = np.searchsorted(self.rows, index[0].indices(self.config.batch_size)[:2])
            return array[(slice(*rows), *index[1:])]

        return {n: jax.make_array_from_callback(s.shape, s.sharding, functools.partial(part, batch[n]))
                for n, s in self.batch_spec.items()}

    def eval_params(self, state: State):
        """Returns the parameters to evaluate: their average, where the run keeps one."""
        return state.params if state.ema is None else state.ema

    def model_params(self, state: State):
        """Returns all parameters of the model, to evaluate, as plain arrays."""
        return self._merge(self.eval_params(state), state.frozen)

    @functools.cached_property
    def _merge(self):
        if self.adaptation.frozen is None:
            return lambda params, _: params
        model, axes = self.adaptation.model
        return jax.jit(lambda params, frozen: merged(self.adaptation.combined(params, frozen)),
                       out_shardings=self.layout.parameters(model, axes))

    # --- what is compiled -------------------------------------------------------------------------------------------

    def _init(self):
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        model = sharding.unbox(self._init_params(key))[0]
        return self._around(self.adaptation.init(jax.random.fold_in(key, 1), model))

    def _around(self, params):
        """Returns the state at step 0 that has these parameters."""
        ema = optim.ema_init(params) if self.config.optimizer.ema_decay else None
        return State(jnp.zeros((), jnp.int32), params, self.tx.init(params), ema)

    def _train_step(self, state: State, batch, step):
        """Returns (state, metrics) after the update of step `step` (int32 scalar, the number of steps before it).

        A step whose loss or gradient is not finite changes nothing, its number included; and neither does any
        step after it, as the state is then behind the `step` asked for. So the host, which looks one step
        late, finds the state as it was before the first bad batch. A batch without a scored token has gradient
        0: momentum and weight decay still move the parameters.
        """
        config, params, offload = self.config, state.params, self.config.optimizer.offload == "host"
        # 1: the parameters were drawn from 0.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), state.step)

        grads, sums = self._gradients(params, state.frozen, batch, key)
        total, weight = sums["loss"]
        scored = jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: g / scored, grads)
        grad_norm = optim.global_norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

        if offload:
            state = state.replace(opt_state=jax.device_put(state.opt_state, self._working))
        updates, opt_state = self.tx.update(grads, state.opt_state, params, step=state.step)
        new_params = optax.apply_updates(params, updates)
        ema = None if state.ema is None else optim.ema_update(
            state.ema, new_params, config.optimizer.ema_decay, state.step)
        new = State(state.step + 1, new_params, opt_state, ema)   # what is frozen waits outside: not a copy of it
        one = jnp.float32(1)
        metrics = sums | {"grad_norm": (grad_norm, one), "learning_rate": (self.schedule(step), one),
                          "finite": (finite.astype(jnp.float32), one)}
        if config.health.skip_grad_norm_factor:
            metrics["skipped_steps"] = one - (opt_state.taken - state.opt_state.taken)
        apply = finite & (state.step == step)
        new = jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, state.replace(frozen=None))
        if offload:
            new = new.replace(opt_state=jax.device_put(new.opt_state, self.shardings.opt_state))
        return new.replace(frozen=state.frozen), metrics

    def _gradients(self, params, frozen, batch, key):
        """Returns (the gradient of the batch's loss, metrics), both sums."""
        def loss(params, batch, key):
            out = self._loss(self.adaptation.combined(params, frozen, key), batch, key)
            return out.loss, _sums(out)

        return self._accumulated(functools.partial(jax.grad(loss, has_aux=True), params), batch, key)

    def _eval_step(self, params, frozen, batch):
        """Returns the metrics of the batch, in the microbatches of a train step: as little memory is enough."""
        params = self.adaptation.combined(params, frozen)
        return self._accumulated(lambda batch, _: _sums(self._loss(params, batch, None)), batch, None)

    def _loss(self, params, batch, key):
        """Returns the objective's Loss; where its examples interact, of the whole batch in microbatches.

        Of these, the embedded examples alone are kept for the backward pass, which computes each once more: the
        gradient of the whole batch in little more than the memory of one.

        Source: arXiv:2101.06983, section 3.2, whose steps these are.
        """
        if not self._interacting:
            return self.objective.loss(params, batch, key)
        parts = self._microbatches(batch, key)
        embedded = jax.lax.map(jax.checkpoint(lambda part: self.objective.embed(params, *part)), parts)
        whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), embedded)
        return self.objective.loss_of(params, whole, batch)

    @property
    def _interacting(self):
        return self.config.accumulation_steps > 1 and getattr(self.objective, "examples_interact", False)

    def _accumulated(self, f, batch, key):
        """Returns the sum of f(microbatch, key) over the microbatches of the batch, each with a key of its own.

        Examples that interact are in one: `_loss` takes them apart.
        """
        if self.config.accumulation_steps == 1 or self._interacting:
            return f(batch, key)

        def body(sums, part):
            return jax.tree.map(jnp.add, sums, f(*part)), None

        parts = self._microbatches(batch, key)
        shapes = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], parts))
        return jax.lax.scan(body, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), parts)[0]

    def _microbatches(self, batch, key):
        """Returns (batch, key), each array [microbatches, ...]: number i takes every n-th example from i on."""
        n = self.config.accumulation_steps   # so each device keeps its own rows
        split = jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)
        return split, None if key is None else jax.random.split(key, n)


def _sums(loss):
    return {"loss": (loss.loss, loss.weight), **loss.metrics}

"""What of a model trains, and in what form the rest is kept: freezing, low-rank adapters, quantised matrices. Layer 3.

A parameter that does not train is frozen: it comes from the base, the run that `config.checkpoint.init_from` names, and
a checkpoint here does not hold it again. So the run of an adapter is kilobytes, and needs its base. Models know
nothing of this: where they ask for a parameter, `model.param` makes the array from what stands in its place.

    python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/adapter \\
        --config.checkpoint.init_from=runs/base --config.adapt.lora='transformer.*w[qkvo]'
"""

import hashlib
import math

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import checkpoint, config as config_lib, optim, quantize, storage, tree
from fm_jax.errors import UserError
from fm_jax.model import Derived, is_derived, made
from fm_jax.sharding import is_axes

OWN_KEYS = np.uint32(2 ** 31)   # from here on folded into a key: objectives split theirs, or fold in small numbers


class Lora(Derived):
    """W + scale A B, or of DoRA magnitude times that over the norm of its columns, over the norm of W's."""

    base: jax.Array | Derived
    a: jax.Array                   # [*stacked, *inputs, rank], float32
    b: jax.Array                   # [*stacked, rank, *outputs], float32
    magnitude: jax.Array | None    # [*stacked, *outputs], float32: over the norms of W
    scale: float = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)    # how many axes of W are its inputs
    outputs: int = struct.field(pytree_node=False)   # and its outputs, which are the last ones

    def array(self):
        """Returns the matrix, in the dtype of its base.

        Source: arXiv:2106.09685, section 4.1; with a magnitude arXiv:2402.09353, equations 5 and 11.
        """
        w = made(self.base)
        ins = tuple(range(w.ndim - self.inputs - self.outputs, w.ndim - self.outputs))
        axes = "abcdefgh"[: w.ndim]   # the stacked ones, inputs, outputs
        lead, inputs, outputs = axes[: ins[0]], axes[ins[0] : ins[-1] + 1], axes[ins[-1] + 1 :]
        added = jnp.einsum(f"{lead}{inputs}r,{lead}r{outputs}->{axes}", self.a, self.b)
        whole = w.astype(jnp.float32) + self.scale * added
        if self.magnitude is not None:
            norm = lambda m: jnp.sqrt(jnp.square(m).sum(ins, keepdims=True))
            # No gradient goes through the norm: section 4.3 there.
            ratio = norm(w.astype(jnp.float32)) / jax.lax.stop_gradient(norm(whole))
            whole *= ratio * jnp.expand_dims(self.magnitude, ins)
        return whole.astype(w.dtype)


class Adaptation:
    """Which parameters of a model train, for one config: what `step`, `train` and `pretrained` need to know.

    Attributes:
      params, axes: of what trains, shape structs and logical axes: the model's own tree without what is frozen, and in
        the place of a matrix that is adapted a dict of its adapters, lora_a, lora_b and with DoRA magnitude.
      frozen, frozen_axes: the same of the rest, as it is kept here: quantised, a dict of codes and scales. None where
        all trains.
      added: dotted names in `params` that the model itself has not.
    """

    def __init__(self, config, model, axes):
        """model, axes: of all parameters of the model.

        Raises:
          UserError: a pattern that matches nothing, or no matrix; a frozen parameter that `init_from` is not to give;
            an adapter on what trains anyhow; values out of range.
        """
        self._c = c = config.adapt
        self._model, self._model_axes = tree.flatten(model), tree.flatten(axes, is_leaf=is_axes)
        self._adapted, frozen = self._chosen(config, model)
        trained = {n: p for n, p in self._model.items() if n not in frozen}
        trained_axes = {n: self._model_axes[n] for n in trained}
        for n in self._adapted:
            made_of = jax.eval_shape(lambda: self._adapters(jax.random.key(0), n))   # no key outside: it has a device
            trained |= {f"{n}.{k}": a for k, a in made_of.items()}
            trained_axes |= {f"{n}.{k}": a for k, a in self._adapter_axes(n).items()}
        self.added = set(trained) - set(self._model)
        self.params, self.axes = tree.nest(trained), tree.nest(trained_axes)
        self._base = self.frozen = self.frozen_axes = None
        if frozen:
            self._base = tree.nest({n: self._model[n] for n in frozen})
            self.frozen = jax.eval_shape(self.kept, self._base)
            frozen_axes = {n: self._model_axes[n] for n in frozen}
            self.frozen_axes = tree.nest(quantize.axes_of(frozen_axes, c.quantize))

    def _chosen(self, config, model):
        """Returns (names of the matrices that are adapted, names of the frozen parameters), in the model's order."""
        c = config.adapt
        matching = lambda patterns, what: [n for n, hit in tree.flatten(
            tree.mask(model, patterns, f"config.{what}")).items() if hit]
        given = matching([config.checkpoint.init_pattern], "checkpoint.init_pattern")
        adapted = matching(c.lora, "adapt.lora")
        frozen = matching(c.freeze, "adapt.freeze") if c.freeze or not c.lora else given
        if lost := [n for n in frozen if n not in given]:
            raise UserError(f"config.adapt.freeze matches {lost[0]}, which config.checkpoint.init_pattern="
                            f"{config.checkpoint.init_pattern!r} does not take from the base: it would stay as it was "
                            "drawn; change one of the two")
        matrices = [n for n, axes in self._model_axes.items() if optim.matrix_axes(axes)]
        if other := [n for n in adapted if n not in matrices]:
            raise UserError(f"config.adapt.lora matches {other[0]}, which is no matrix; these are: "
                            f"{', '.join(matrices)}")
        if other := [n for n in adapted if n not in frozen]:
            raise UserError(f"config.adapt.lora matches {other[0]}, which trains in full, for config.adapt.freeze does "
                            "not match it; take it out of config.adapt.lora, or freeze it")
        if c.quantize and not frozen:
            raise UserError(f"config.adapt.quantize={c.quantize!r} is of frozen matrices, and none is frozen; set "
                            "config.adapt.lora or config.adapt.freeze")
        return adapted, frozen

    @property
    def model(self):
        """All parameters of the model, shape structs, and the tree of their logical axes."""
        return tree.nest(self._model), tree.nest(self._model_axes)

    # --- parameters -------------------------------------------------------------------------------------------------

    def init(self, key, model):
        """Returns the parameters that train, from fresh ones of the whole model: adapters that change nothing yet."""
        if self.frozen is None:
            return model
        flat = tree.flatten(model)
        out = {n: flat[n] for n in tree.flatten(self.params) if n in flat}
        for n, key in zip(self._adapted, jax.random.split(key, max(1, len(self._adapted)))):
            out |= {f"{n}.{k}": a for k, a in self._adapters(key, n).items()}
        return tree.nest(out)

    def kept(self, base):
        """Returns the base's frozen parameters as they are kept here."""
        return quantize.tree_of(base, self._model_axes, self._c.quantize)

    def combined(self, params, frozen, key=None):
        """Returns the parameters of the whole model; of those that are derived, what makes them in their place.

        key: of dropout; None: no dropout.
        """
        if self.frozen is None:
            return params
        params, out = tree.flatten(params), {}
        frozen = quantize.derived(frozen, self._model, self._model_axes, self._c.quantize)
        rest = tree.flatten(frozen, is_leaf=is_derived)
        for i, n in enumerate(self._model):
            out[n] = params[n] if n in params else rest[n]
            if n in self._adapted:
                a = params[f"{n}.lora_a"]
                if key is not None and self._c.lora_dropout:
                    a = self._dropped(a, jax.random.fold_in(key, OWN_KEYS + np.uint32(i)))
                ins, outs = optim.matrix_axes(self._model_axes[n])
                out[n] = Lora(out[n], a, params[f"{n}.lora_b"], params.get(f"{n}.magnitude"), self._scale,
                              len(ins), len(outs))
        return tree.nest(out)

    def norms(self, frozen) -> dict:
        """Returns {name: float32 [L, *outputs]}: of the matrices that are adapted, of each column in the base."""
        rest = tree.flatten(quantize.derived(frozen, self._model, self._model_axes, self._c.quantize), is_derived)
        square = lambda n: jnp.square(made(rest[n]).astype(jnp.float32)).sum(optim.matrix_axes(self._model_axes[n])[0])
        return {n: np.asarray(jnp.sqrt(square(n))) for n in self._adapted}

    @property
    def _scale(self):
        return self._c.lora_alpha / (self._c.lora_rank ** 0.5 if self._c.lora_rank_stabilized else self._c.lora_rank)

    def _adapters(self, key, name):
        """Returns {name: array} of a matrix's adapters: A as PEFT draws it, uniform; B is 0."""
        p, (ins, outs) = self._model[name], optim.matrix_axes(self._model_axes[name])
        size = lambda axes: tuple(p.shape[i] for i in axes)
        lead = p.shape[: ins[0]]
        bound = math.prod(size(ins)) ** -0.5
        a = jax.random.uniform(key, (*lead, *size(ins), self._c.lora_rank), jnp.float32, -bound, bound)
        out = {"lora_a": a, "lora_b": jnp.zeros((*lead, self._c.lora_rank, *size(outs)), jnp.float32)}
        return out | {"magnitude": jnp.ones((*lead, *size(outs)), jnp.float32)} if self._c.dora else out

    def _adapter_axes(self, name):
        axes = self._model_axes[name]
        ins, outs = optim.matrix_axes(axes)
        lead, ins, outs = axes[: ins[0]], tuple(axes[i] for i in ins), tuple(axes[i] for i in outs)
        out = {"lora_a": (*lead, *ins, "rank"), "lora_b": (*lead, "rank", *outs)}
        return out | {"magnitude": (*lead, *outs)} if self._c.dora else out

    def _dropped(self, a, key):
        """Returns A with a share of its inputs left out: other ones of each layer, for a microbatch's tokens the same.

        Not of each token as in LoRA's own code: what is made here is the matrix, which sees no token.
        """
        keep = 1 - self._c.lora_dropout
        return jnp.where(jax.random.bernoulli(key, keep, (*a.shape[:-1], 1)), a / keep, 0)

    def frozen_of(self, model, run: dict, who: str, whose: str):
        """Returns what is frozen, of the parameters of the whole model. run: as in `read_base`; who, whose: for errors.

        Raises:
          UserError: these are not the parameters that the run began with.
        """
        flat = tree.flatten(model, is_leaf=is_derived)
        try:
            base = {n: flat[n] for n in tree.flatten(self._base)}
        except KeyError as e:
            raise UserError(f"{who}: an adapter of a model with {e.args[0]}, which {whose} has not") from None
        if any(map(is_derived, base.values())):
            raise UserError(f"{who}: {whose} is quantised, and an adapter is put on a model that is not; load its run")
        mark = fingerprint(tree.nest(base))
        if mark != run.get("fingerprint"):
            raise UserError(f"{who} is of another base, {run.get('folder')} (parameters "
                            f"{run.get('fingerprint', '')[:12]}), than {whose} (parameters {mark[:12]})")
        return self.kept(tree.nest(base))

    # --- the base ---------------------------------------------------------------------------------------------------

    def read_base(self, config, layout, run: dict, folder: str = ""):
        """Returns (frozen parameters on the devices, {"folder", "step", "fingerprint"} of where they came from).

        run: what the run noted of its base when it began, as returned here; {}: it begins now. folder: where the base
        is now; "": where `config.checkpoint.init_from` says.

        Raises:
          UserError: no base is named, or it is not there, or damaged; it is another than the run began with.
        """
        folder = folder or config.checkpoint.init_from
        if not folder:
            raise UserError("config.adapt keeps parameters of a base frozen, and none is named: set "
                            "--config.checkpoint.init_from to its run")
        place = storage.place(folder)
        if not (place / "config.json").is_file():
            raise UserError(f"{place}: no run here (no config.json), and this run stands on the base in it; put it "
                            "back, or name where it is now")
        stored, _ = config_lib.load(place / "config.json")
        if stored.adapt.freeze or stored.adapt.lora:
            raise UserError(f"checkpoint.init_from={folder} is itself an adapter without its base: merge them first, "
                            f"python -m fm_jax.convert --workdir {folder} --to_run MERGED")
        if stored.quantized not in ("", self._c.quantize):
            raise UserError(f"checkpoint.init_from={folder} is kept in {stored.quantized}; set --config.adapt.quantize="
                            f"{stored.quantized}")
        target = self.frozen if stored.quantized else self._base
        axes = self.frozen_axes if stored.quantized else tree.map_named(lambda n, _: self._model_axes[n], self._base)
        step = run.get("step", max(checkpoint.steps(folder), default=None))
        frozen = checkpoint.restore_params(folder, step, layout.abstract(target, axes), ema=True)
        mark = fingerprint(frozen)
        if run and run["fingerprint"] != mark:
            raise UserError(f"{folder} (parameters {mark[:12]}) is another base than the one that this run began with, "
                            f"{run['folder']} (parameters {run['fingerprint'][:12]}): put that one back")
        if not stored.quantized and self._c.quantize:
            placed = layout.parameters(self.frozen, self.frozen_axes)
            frozen = jax.jit(self.kept, out_shardings=placed)(frozen)
        return frozen, {"folder": str(folder), "step": step, "fingerprint": mark}


def adapts(config) -> bool:
    """Returns whether a run of this config holds a part of a model's parameters alone."""
    return bool(config.adapt.freeze or config.adapt.lora)


def fingerprint(params) -> str:
    """Returns a checksum of names, shapes, dtypes and bits of parameters: the same on any mesh, from any folder."""
    def one(p):
        bits = jax.lax.bitcast_convert_type(p, f"uint{8 * p.dtype.itemsize}").astype(jnp.uint32)
        places = jnp.zeros(p.shape, jnp.uint32)   # in the flat array, which a mesh would have to gather
        for axis in range(p.ndim):
            places = places * jnp.uint32(p.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, p.shape, axis)
        return (bits * ((2 * places + 1) * jnp.uint32(0x9E3779B1))).sum(dtype=jnp.uint32)   # odd: no bit is lost

    sums = tree.flatten(jax.device_get(jax.jit(lambda params: jax.tree.map(one, params))(params)))
    lines = [f"{n} {p.dtype}{list(p.shape)} {sums[n]}" for n, p in tree.flatten(params).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


"""Makes a run of some of another run's layers: what a student of distillation begins with.

    python -m fm_jax.shrink --model runs/teacher --layers 0,2,4 --workdir runs/half

The run is at step 0; one that trains begins with it by --config.checkpoint.init_from. Source of the idea: arXiv:1910.01108,
section 3 (every second layer). Layer 5.
"""

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError


def shrink(config, params, layers: list[int]):
    """Returns (config, parameters) of the model that has the `layers`, in that order, of the given one.

    Raises:
      UserError: no such layer, or a model whose layers are not all alike in shape.
    """
    import jax
    import numpy as np

    model, there = config.model, config.model.num_layers
    if model.num_dense_layers:
        raise UserError("a model with first layers of another kind (model.num_dense_layers) cannot be cut here")
    if not layers or not all(0 <= i < there for i in layers):
        raise UserError(f"--layers={','.join(map(str, layers))}: give numbers from 0 to {there - 1}, as in 0,2,4")
    config = config.copy_and_resolve_references()
    pattern = model.layer_pattern
    config.model.num_layers = len(layers)
    config.model.layer_pattern = tuple(pattern[i % len(pattern)] for i in layers) if len(pattern) > 1 else pattern
    stack = params["transformer"]
    chosen = jax.tree.map(lambda a: np.asarray(a)[np.array(layers)], stack["layers"])
    return config, {**params, "transformer": {**stack, "layers": chosen}}


def _flags(fv):
    flags.DEFINE_string("model", None, "a run's folder, a folder of Hugging Face weights, or a GGUF file",
                        flag_values=fv, required=True)
    flags.DEFINE_list("layers", None, "numbers of the layers, from 0", flag_values=fv, required=True)
    flags.DEFINE_string("workdir", None, "the run's folder to make", flag_values=fv, required=True)


def main(args):
    import jax.numpy as jnp

    from fm_jax import checkpoint, pretrained, tree
    from fm_jax.step import State

    if not all(i.isdecimal() for i in args.layers):
        raise UserError(f"--layers={','.join(args.layers)}: give numbers, as in 0,2,4")
    lm = pretrained.load(args.model)
    config, params = shrink(lm.config, lm.params, [int(i) for i in args.layers])
    with checkpoint.lock(args.workdir):
        if checkpoint.steps(args.workdir):
            raise UserError(f"--workdir={args.workdir} holds a run already; take another")
        checkpoint.describe_run(args.workdir, config, 0, tokenizer=lm.tokenizer)
        with checkpoint.Checkpoints(args.workdir, config.checkpoint) as checkpoints:
            checkpoints.save(0, State(jnp.zeros((), jnp.int32), tree.map_named(lambda _, a: jnp.asarray(a), params),
                                      {}, None))
    print(f"{args.workdir}: {tree.count(params):,} of {tree.count(lm.params):,} parameters")


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

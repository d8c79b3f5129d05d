"""Shows what a config needs before anything runs: parameters, FLOPs, bytes per device, shardings.

    python -m fm_jax.plan --sizes
    python -m fm_jax.plan --config configs/causal_lm.py:8b --config.mesh.fsdp=8 --config.mesh.tensor=4

The mesh may be larger than this machine: no array is made, no device asked for. Layer 5.
"""

from absl import flags

from fm_jax import config as config_lib
from fm_jax.architecture import SIZES, Architecture
from fm_jax.errors import UserError


def sizes_table() -> str:
    """Returns the named sizes with their shapes, parameters and training FLOPs per token, as text."""
    head = f"{'size':<6}{'parameters':>17}{'layers':>8}{'width':>7}{'heads':>7}{'kv':>5}{'mlp':>7}{'vocabulary':>12}" \
           f"{'FLOPs/token at 2,048':>22}"
    rows = []
    for name, fields in SIZES.items():
        a = Architecture(**fields)
        rows.append(f"{name:<6}{a.param_count():>17,}{a.num_layers:>8}{a.embed_dim:>7}{a.num_heads:>7}"
                    f"{a.num_kv_heads:>5}{a.mlp_dim:>7}{a.vocab_size:>12,}{a.flops_per_token(2048):>22.3g}")
    return "\n".join([head, *rows])


def plan(config, *, devices: int | None = None) -> dict:
    """Returns {"parameters", "flops_per_token", "flops_per_step", "bytes_per_device": {...}, "table", "mesh"}.

    devices: what a -1 of the mesh counts from; default as many as the mesh names.

    Raises:
      UserError: what could not train either; a length in epochs of data that is not here.
    """
    from fm_jax import objectives, sharding, tree
    from fm_jax.data import batches
    from fm_jax.step import Program

    config = config_lib.resolve(config)
    lengths = {"steps": config.steps, "optimizer.warmup_steps": config.optimizer.warmup_steps,
               "optimizer.decay_steps": config.optimizer.decay_steps}
    epochs = [f"config.{key}={length!r}" for key, length in lengths.items() if isinstance(length, str)]
    if epochs:   # only then must the data be here
        try:
            examples = batches.examples_per_epoch(config)
        except UserError as e:
            raise UserError(f"{epochs[0]} needs the size of the data: {e}; or give steps or tokens") from None
        config = config_lib.resolve(config, examples_per_epoch=examples)
    layout = sharding.Layout(sharding.abstract_mesh(config.mesh, devices))
    objective = objectives.load(config, None, layout)
    program = Program(config, objective, layout)
    state = program.abstract
    parts = {"parameters": state.params, "optimizer": state.opt_state, "ema": state.ema, "gradients": state.params,
             "batch": program.batch_spec}
    return {
        "name": config.name, "mesh": sharding.describe(layout.mesh), "parameters": tree.count(state.params),
        "steps": config.steps, "tokens_per_step": config.batch_size * objective.tokens_per_example,
        "flops_per_token": objective.flops_per_example / objective.tokens_per_example,
        "flops_per_step": config.batch_size * objective.flops_per_example,
        "bytes_per_device": {name: sharding.bytes_per_device(t) for name, t in parts.items() if t is not None},
        "table": sharding.table(state.params),
    }


def _flags(fv):
    config_lib.define_config(fv, required=False)
    flags.DEFINE_boolean("sizes", False, "print the table of named sizes", flag_values=fv)
    flags.DEFINE_integer("devices", None, "devices that a -1 of config.mesh counts from; default: as many as the mesh "
                         "names", flag_values=fv, lower_bound=1)


def main(args):
    if args.sizes:
        print(sizes_table())
        return
    if args.config is None:
        raise UserError("--config is required (or --sizes); see --help")
    from fm_jax.metrics import quantity

    p = plan(args.config, devices=args.devices)
    print(p["table"])
    print()
    print(f"{p['name']} on a mesh of " + p["mesh"])
    print(f"  parameters       {p['parameters']:,}")
    print(f"  FLOPs per token  {quantity(p['flops_per_token'])}  (forward and backward, causal attention at half, no "
          "recomputation)")
    print(f"  FLOPs per step   {quantity(p['flops_per_step'])}  ({p['tokens_per_step']:,} tokens)")
    print(f"  whole run        {quantity(p['flops_per_step'] * p['steps'])} FLOPs, {p['steps']:,} steps, "
          f"{quantity(p['steps'] * p['tokens_per_step'])} tokens")
    print("  bytes per device, activations not counted")
    for name, size in p["bytes_per_device"].items():
        print(f"    {name:<14} {size:>18,}")
    print(f"    {'total':<14} {sum(p['bytes_per_device'].values()):>18,}")


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""Prints `fm_jax.plan`'s estimate of MFU beside what MaxText publishes for the same shapes, chips and batch.

    export JAX_PLATFORMS=cpu
    python tests/peers/plan_error.py                    # the analytic model: seconds
    python tests/peers/plan_error.py --compile 16B,8B   # these compiled too: minutes each, needs libtpu

Published: github.com/AI-Hypercomputer/maxtext (README, docs/reference/models/tiering.md, configs/), read 2026-11, and
none of it reproduced. Its figures count attention in full: they are turned into our convention, causal at half, before
they are compared. Its remat policies that keep some projections on the host or the device are "full" here where they
make most of a layer again, "dots" where not. The chip, not the program, is the same: its kernels and flags are others.
"""

import argparse
import statistics

from fm_jax import config as config_lib
from fm_jax import forecast
from fm_jax.architecture import SIZES, Architecture
from fm_jax.errors import UserError
from fm_jax import topology as topology_lib


def scaled(heads, mlp, embed, layers):
    """Returns MaxText's standard model with these multiples of its sizes."""
    return dict(vocab_size=32000, num_layers=16 * layers, embed_dim=2048 * embed, num_heads=16 * heads, head_dim=128,
                mlp_dim=7168 * mlp, tie_embeddings=False, max_seq_len=8192)


LLAMA2_70B = SIZES["70b"] | dict(vocab_size=32000)
LLAMA2_7B = dict(vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=11008, tie_embeddings=False,
                 max_seq_len=4096)
# name: model, topology, mesh, tokens a sequence, sequences a chip, remat, published MFU
PUBLISHED = {
    "v5e 16B": (scaled(4, 4, 2, 2), "v5e:16x16", dict(fsdp=256), 2048, 6, "full", 0.611),
    "v5e 32B": (scaled(4, 4, 4, 2), "v5e:16x16", dict(fsdp=256), 2048, 4, "full", 0.669),
    "v5e 64B": (scaled(4, 4, 4, 4), "v5e:16x16", dict(fsdp=256), 2048, 2, "full", 0.599),
    "v5e 128B": (scaled(8, 8, 4, 4), "v5e:16x16", dict(fsdp=16, tensor=16), 2048, 1, "full", 0.561),
    "v5p 32B": (scaled(4, 4, 4, 2), "v5p:4x4x4", dict(fsdp=16, tensor=4), 2048, 6, "dots", 0.715),
    "v5p 128B": (scaled(8, 8, 4, 4), "v5p:4x4x8", dict(fsdp=16, tensor=8), 2048, 1, "dots", 0.687),
    "v5p 1024B": (scaled(16, 16, 8, 8), "v5p:8x16x16", dict(fsdp=128, tensor=16), 2048, 2, "full", 0.648),
    "v5p Llama2-70B": (LLAMA2_70B, "v5p:8x8x8", dict(fsdp=512), 4096, 4, "full", 0.654),
    "v6e Llama3.1-8B": (SIZES["8b"], "v6e:16x16", dict(fsdp=256), 8192, 4, "full", 0.455),
    "v6e Llama3.1-70B": (SIZES["70b"], "v6e:16x16", dict(fsdp=256), 8192, 5, "offload_full", 0.503),
    "v6e Llama3.1-405B": (SIZES["405b"], "v6e:16x16", dict(fsdp=64, tensor=4), 8192, 1, "offload_full", 0.386),
    "v4 22B": (dict(vocab_size=32000, num_layers=48, embed_dim=6144, num_heads=24, mlp_dim=24576, gated_mlp=False,
                    activation="relu", tie_embeddings=False), "v4:4x4x4", dict(fsdp=64), 2048, 13, "full", 0.567),
    "h100 Llama2-7B": (LLAMA2_7B, "h100:1x8", dict(fsdp=8), 4096, 4, "dots", 492 / 989.4),
    "h100 Llama2-7B x 16": (LLAMA2_7B, "h100:16x8", dict(data=16, fsdp=8), 4096, 4, "dots", 375 / 989.4),
}


def run(name, compile):
    """Returns (result of `forecast.on_topology`, published MFU in its convention) of a row."""
    fields, chips, mesh, seq_len, per_chip, remat, published = PUBLISHED[name]
    topology = topology_lib.parse(chips)
    config = config_lib.defaults()
    config.update(seq_len=seq_len, batch_size=per_chip * topology.num_chips, steps=1000)
    config.model.update(fields | dict(dtype="bfloat16", remat=remat, max_seq_len=max(seq_len, 2048)))
    config.mesh.update(dict.fromkeys(config.mesh, 1) | mesh)
    a = Architecture(**config.model.to_dict())
    full = a.flops_per_token(seq_len) + 6 * a.num_layers * a.num_heads * a.head_dim * (seq_len - 1)
    return forecast.on_topology(config, topology, compile=compile), published * a.flops_per_token(seq_len) / full


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", default="", help="rows to compile too, by parts of their names: 16B,70B")
    args = parser.parse_args()
    print(f"{'':<22}{'published':>10}{'analytic':>10}{'error':>8}   {'compiled':>8}{'error':>8}  memory, compile time")
    errors = []
    for name in PUBLISHED:
        r, published = run(name, False)
        errors.append(r["mfu"] / published - 1)
        line = f"{name:<22}{published:>10.1%}{r['mfu']:>10.1%}{r['mfu'] / published - 1:>+8.0%}"
        if any(part in name for part in filter(None, args.compile.split(","))):
            try:
                c, _ = run(name, True)
                mfu = f"{c['mfu']:>8.1%}{c['mfu'] / published - 1:>+8.0%}" if c["mfu"] else f"{'refused':>16}"
                line += f"   {mfu}  {c['free_bytes'] / 2 ** 30:+.1f} GiB free, {c['compile_s']:.0f} s"
            except UserError as e:
                line += f"   {e}"
        else:
            line += f"{'':<19}  {r['free_bytes'] / 2 ** 30:+.1f} GiB free (analytic)"
        print(line, flush=True)
    print(f"analytic: median error {statistics.median(errors):+.0%} (`Chip.efficiency` is fitted to these), "
          f"mean absolute {statistics.mean(map(abs, errors)):.0%}, largest {max(map(abs, errors)):.0%}")


if __name__ == "__main__":
    main()

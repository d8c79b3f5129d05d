"""Measures fm_jax on one GPU: training beside PyTorch (compiled, flash attention), decoding beside its bound.

Training: a Llama of 1.2B parameters at 4,096 tokens, bfloat16 matmuls on float32 parameters, AdamW. Each side first
tries batch sizes with and without recomputation and keeps its fastest; then both run in turns, each in a process of its
own, the order swapped from round to round. The figure is the median over rounds of the ratio within a round. FLOPs of
both are counted alike, causal attention at half, recomputation not.

Decoding: the same model in bfloat16, greedy, at 1, 8 and 64 rows of about 1,100 tokens. The bound is the time to read
the weights and the valid part of the cache once at the memory bandwidth of the maker's data sheet.

Try:  bash tests/peers/gpu.sh          python tests/peers/gpu.py --tiny --peer_python .venv-torch/bin/python
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def call(command):
    """Returns (what the command prints as its last line, a JSON object; "") or (None, its last words)."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, text=True, capture_output=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    words = [line for line in done.stderr.splitlines() if "memory" in line.lower() or "Error" in line]
    return None, (words or done.stderr.splitlines() or ["no message"])[-1].strip()[:150]


def sides(args):
    """Returns {side: {setting in words: command}}."""
    ours, theirs = {}, {}
    for batch in args.batches:
        for remat in ("none", "dots", "full"):
            ours[f"batch {batch}, remat {remat}"] = [
                sys.executable, "-m", "fm_jax.benchmark", "--json", "--steps", args.steps,
                "--warmup_steps", args.warmup,
                "--config", f"configs/causal_lm.py:{'tiny' if args.tiny else '1b'}",
                f"--config.batch_size={batch}",
                f"--config.seq_len={64 if args.tiny else 4096}", f"--config.model.remat={remat}",
                "--config.model.dtype=bfloat16", "--config.mesh.data=1",
                "--config.objective_args.document_mask=False", *args.ours]   # theirs has no documents either
        for recompute in ([], ["--recompute"]):
            theirs[f"batch {batch}, recompute {'blocks' if recompute else 'none'}"] = [
                args.peer_python, HERE / "train_torch.py", "--model", "tiny" if args.tiny else "1b", "--gpu",
                "--batch", batch, "--steps", args.steps + args.warmup, "--warmup", args.warmup, *recompute,
                *(["--device", "cpu"] if args.tiny else [])]
    return {"ours": ours, "PyTorch": theirs}


def train(args):
    best = {}
    for side, settings in sides(args).items():
        for words, command in settings.items():
            got, error = call(command)
            told = f"{got['tokens_per_s']:>10,.0f} tokens/s" if got else error
            print(f"  {side:<8} {words:<32} {told}", flush=True)
            if got and (side not in best or got["tokens_per_s"] > best[side][2]):
                best[side] = words, command, got["tokens_per_s"]
        if side not in best:
            raise SystemExit(f"{side}: no setting ran")
    print(f"{'round':>5} {'ours tok/s':>11} {'MFU':>6} {'GB':>6} {'PyTorch tok/s':>14} {'MFU':>6} {'GB':>6} "
          f"{'ratio':>6}")
    ratios, mfus = [], []
    for i in range(args.rounds):
        got = {}
        for side in list(best)[:: 1 if i % 2 == 0 else -1]:
            got[side], error = call(best[side][1])
            if error:
                raise SystemExit(f"{side}: {error}")
        a, b = got["ours"], got["PyTorch"]
        a["mfu"] = a["mfu"] or float("nan")   # no peak is known of a CPU
        b["mfu"] = a["mfu"] * b["tokens_per_s"] / a["tokens_per_s"]
        ratios.append(a["tokens_per_s"] / b["tokens_per_s"])
        mfus.append(a["mfu"])
        print(f"{i:>5} {a['tokens_per_s']:>11,.0f} {100 * a['mfu']:>5.1f}% {a['peak_memory_bytes'] / 1e9:>6.1f} "
              f"{b['tokens_per_s']:>14,.0f} {100 * b['mfu']:>5.1f}% {b['peak_memory_bytes'] / 1e9:>6.1f} "
              f"{ratios[-1]:>6.2f}", flush=True)
    print(f"{a['device']}: ours with {best['ours'][0]}, PyTorch {b['torch']} with {best['PyTorch'][0]}\n"
          f"speed, ours to PyTorch's: {statistics.median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]; "
          f"MFU {100 * statistics.median(mfus):.1f}%; goals 1.10 and 55% on an H100")


def decode(args):
    """Prints, as its last line, JSON of {"device", "bandwidth", "rows": [[batch, s a token, bytes a token], ...]}."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fm_jax import config as config_lib, objectives, sharding, topology
    from fm_jax import decode as decode_lib

    prompt, k, dispatches = (8, 4, 3) if args.tiny else (1024, 32, 5)
    length = prompt + k * (dispatches + 1)
    changes = {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16", "model.remat": "none",
               "model.max_seq_len": max(length, 64), "seq_len": 64, "mesh.data": 1}
    config = config_lib.resolve(config_lib.from_file(f"configs/causal_lm.py:{'tiny' if args.tiny else '1b'}", changes))
    layout = sharding.Layout(sharding.make_mesh(config.mesh))
    objective = objectives.load(config, None, layout)
    arch, forward = objective.arch, objective.predict["decode"]
    params = decode_lib.per_layer(jax.jit(lambda key: sharding.unbox(objective.init(key))[0])(jax.random.key(0)))
    rows = []
    for batch in (1, 8, 64):
        slots = decode_lib.Slots.empty(arch, batch, length)
        full = lambda n: jnp.full(batch, n, jnp.int32)
        slots = slots._replace(left_B=full(length), seen_BV=None, cache=slots.cache._replace(length_B=full(prompt)))
        times = []
        for _ in range(dispatches + 1):   # the first compiles
            begin = time.perf_counter()
            slots, drawn = decode_lib.steps(forward, params, slots, k=k)
            np.asarray(drawn.token)
            times.append((time.perf_counter() - begin) / k)
        cached = prompt + k + k * dispatches / 2   # on average over what was timed
        cache = 2 * 2 * batch * cached * arch.num_layers * arch.num_kv_heads * arch.head_dim
        size = 2 * arch.matmul_param_count() + cache
        rows.append([batch, statistics.median(times[1:]), size])
    device = jax.devices()[0].device_kind
    bandwidth = next((chip.memory_bytes_per_s for chip in topology.CHIPS.values() if chip.kind == device), 0)
    print(json.dumps({"device": device, "bandwidth": bandwidth, "rows": rows}))


def show_decode(args):
    got, error = call([sys.executable, __file__, "--side", "decode", *(["--tiny"] if args.tiny else [])])
    if error:
        raise SystemExit(f"decoding: {error}")
    bandwidth = args.bandwidth or got["bandwidth"]
    print(f"decoding on {got['device']}, " + (f"{bandwidth / 1e9:,.0f} GB/s" if bandwidth else
          "whose memory bandwidth is not in topology.CHIPS: give --bandwidth") + "; goal 80% of the bound")
    print(f"{'batch':>5} {'ms/token':>9} {'tok/s':>9} {'GB/token':>9} {'of the bound':>13}")
    for batch, seconds, size in got["rows"]:
        share = f"{100 * size / bandwidth / seconds:>12.1f}%" if bandwidth else f"{'?':>13}"
        print(f"{batch:>5} {1e3 * seconds:>9.3f} {batch / seconds:>9,.0f} {size / 1e9:>9.3f} {share}")


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--peer_python", help="of an environment with PyTorch")
    flags.add_argument("--tiny", action="store_true", help="a model of nothing, on a CPU: does every line run?")
    flags.add_argument("--batches", default="", help="rows of a training step to try; default 2,4,8,16")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=10, help="timed steps of a side in a round")
    flags.add_argument("--warmup", type=int, default=3)
    flags.add_argument("--bandwidth", type=float, default=0, help="bytes/s of the device's memory")
    flags.add_argument("--ours", action="append", default=[], help="more of our flags: --ours=--config.xla_flags=none")
    flags.add_argument("--side", choices=("decode",), help=argparse.SUPPRESS)
    args = flags.parse_args()
    args.batches = [int(b) for b in (args.batches or ("8" if args.tiny else "2,4,8,16")).split(",")]
    if args.side:
        decode(args)
        return
    if args.peer_python is None:
        flags.error("--peer_python is required")
    if args.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    train(args)
    show_decode(args)


if __name__ == "__main__":
    main()

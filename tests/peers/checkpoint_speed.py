"""Prints the time to save and restore the same 1 GB of training state, beside torch.save and torch.load.

Interleaved rounds in two processes, one an interpreter with PyTorch (requirements.txt), on one disk, files in the
page cache. Ours includes writing and checking checksums, and waits for the disk (fsync); torch.save does neither
of the last two, so it is timed with fsync as well. "blocked" is what an asynchronous save costs the train loop.

    PYTHONPATH=. python tests/peers/checkpoint_speed.py --torch_python .venv-torch/bin/python [--rounds 5] [--gb 1]
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np


def arrays(gb):
    """Returns {name: float32 array} of parameters; with their two moments they make `gb`."""
    rng = np.random.default_rng(0)
    width, layers = 1024, max(1, round(gb * 1e9 / 3 / 4 / (12 * 1024**2)))
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    return {f"layer{i}_{name}": rng.normal(size=shape).astype(np.float32)
            for i in range(layers) for name, shape in shapes.items()}


def ours(gb, folder):
    """Yields a dict of seconds for each round."""
    from typing import Any

    from flax import struct
    import jax

    from fm_jax import checkpoint, config

    @struct.dataclass
    class State:
        step: Any
        params: Any
        opt_state: Any
        ema: Any

    put = lambda x: jax.device_put(x, jax.devices()[0])
    params = {k: put(v) for k, v in arrays(gb).items()}
    moments = lambda: jax.tree.map(lambda x: put(np.asarray(x) * 0.5), params)
    state = State(put(np.int32(1)), params, {"mu": moments(), "nu": moments()}, None)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.block_until_ready(state)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        with checkpoint.Checkpoints(folder, config.defaults().checkpoint) as checkpoints:
            begin = time.perf_counter()
            checkpoints.save(1, state)
            blocked = time.perf_counter()
            checkpoints.wait()
            saved = time.perf_counter()
            assert checkpoint.verify(folder, 1) == ""
            verified = time.perf_counter()
            restored = jax.block_until_ready(checkpoint.restore(folder, 1, abstract))
            end = time.perf_counter()
        assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored)))
        del restored
        yield {"blocked": blocked - begin, "save": saved - begin, "verify": verified - saved, "restore": end - saved}


def torch_(gb, folder):
    """Yields a dict of seconds for each round."""
    import torch

    params = {k: torch.from_numpy(v) for k, v in arrays(gb).items()}
    moments = lambda: {k: v * 0.5 for k, v in params.items()}
    state = {"step": 1, "params": params, "mu": moments(), "nu": moments()}
    path = pathlib.Path(folder, "state.pt")
    path.parent.mkdir(parents=True)
    while True:
        path.unlink(missing_ok=True)
        begin = time.perf_counter()
        torch.save(state, path)
        saved = time.perf_counter()
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
        synced = time.perf_counter()
        restored = torch.load(path, weights_only=True)
        end = time.perf_counter()
        assert all(torch.equal(v, restored["params"][k]) for k, v in params.items())
        del restored
        yield {"save": saved - begin, "save and fsync": synced - begin, "restore": end - synced}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: the system's for temporaries)")
    parser.add_argument("--worker", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:   # a round for each line of standard input
        rounds = {"ours": ours, "torch": torch_}[args.worker](args.gb, args.folder)
        for _ in sys.stdin:
            print(json.dumps(next(rounds)), flush=True)
        return

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        workers = {}
        for name, python in (("ours", sys.executable), ("torch", args.torch_python)):
            command = [python, __file__, "--worker", name, "--gb", str(args.gb), "--folder", f"{folder}/{name}"]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        times = {name: [] for name in workers}
        for i in range(args.rounds + 1):   # the first is warm-up
            for name, worker in workers.items():
                print("go", file=worker.stdin, flush=True)
                line = json.loads(worker.stdout.readline())
                if i:
                    times[name].append(line)
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    for name, rounds in times.items():
        seconds = {k: [r[k] for r in rounds] for k in rounds[0]}
        show = lambda v: f"{statistics.median(v):.3f} s (best {min(v):.3f})"
        print(f"{name}: " + ", ".join(f"{k} {show(v)}" for k, v in seconds.items()))
    for save in ("save", "save and fsync"):
        ratios = sorted((t[save] + t["restore"]) / (o["save"] + o["restore"]) for o, t in zip(*times.values()))
        print(f"save + restore, torch ({save}) / ours: median {statistics.median(ratios):.2f} "
              f"[{ratios[0]:.2f}-{ratios[-1]:.2f}]")


if __name__ == "__main__":
    main()

"""Compares the training speed and memory of fm_jax with a peer's, in interleaved rounds; prints a table.

A round runs ours for some steps, then the peer's, each in a process of its own, the order swapped from
round to round; the figure is the median over rounds of the ratio within a round, so that a machine
which slows down for a while slows both. Run it with fm_jax's Python; `--peer_python` is that of the
environment of requirements.txt, or of requirements_maxtext.txt for `--model maxtext`.

Try:  python tests/peers/train_throughput.py --model gpt2 --peer_python .venv-torch/bin/python
      python tests/peers/train_throughput.py --model llama --cores 0 --peer_python .venv-torch/bin/python
      python tests/peers/train_throughput.py --model maxtext --peer_python .venv-maxtext/bin/python
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def measure(command, cores, env=()):
    """Returns what the command prints as its last line, a JSON object, having run it on these cores."""
    # On Linux a child's peak memory starts from its parent's: this process stays small, it imports neither side.
    done = subprocess.run([str(part) for part in command], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | dict(pair.split("=", 1) for pair in env),
                          preexec_fn=lambda: os.sched_setaffinity(0, cores))
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", choices=("gpt2", "llama", "maxtext"), required=True)
    flags.add_argument("--peer_python", required=True)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--steps", type=int, default=6, help="timed steps of a side in a round")
    flags.add_argument("--warmup", type=int, default=2)
    flags.add_argument("--cores", help="comma-separated; default: all. One core is the steadiest on a busy machine")
    flags.add_argument("--ours", action="append", default=[], help="more of our flags: --ours=--config.seed=1")
    flags.add_argument("--ours_env", action="append", default=[], help="NAME=VALUE in our environment only")
    flags.add_argument("--theirs", action="append", default=[], help="more of the peer's: --theirs=--remat=none")
    args = flags.parse_args()
    cores = {int(c) for c in args.cores.split(",")} if args.cores else os.sched_getaffinity(0)
    ours = [sys.executable, "-m", "fm_jax.benchmark", "--config", f"configs/causal_lm.py:bench_{args.model}", "--json",
            "--steps", args.steps, "--warmup_steps", args.warmup, *args.ours]
    theirs = [args.peer_python, HERE / ("train_maxtext.py" if args.model == "maxtext" else "train_torch.py"),
              "--steps", args.steps + args.warmup, "--warmup", args.warmup, *args.theirs]
    if args.model != "maxtext":
        theirs += ["--model", args.model, "--threads", len(cores)]
    rounds = []
    print(f"{args.model} on {len(cores)} core(s), {args.rounds} rounds of {args.steps} steps each\n"
          f"{'round':>5} {'ours tok/s':>11} {'peer tok/s':>11} {'speed':>6} {'ours GB':>8} {'peer GB':>8} "
          f"{'memory':>6}")
    for i in range(args.rounds):
        sides = {}
        for name, command in (("ours", ours), ("theirs", theirs))[:: 1 if i % 2 == 0 else -1]:
            sides[name] = measure(command, cores, args.ours_env if name == "ours" else ())
        a, b = sides["ours"], sides["theirs"]
        speed = a["tokens_per_s"] / b["tokens_per_s"]
        memory = a["peak_memory_bytes"] / b["peak_memory_bytes"]
        rounds.append((speed, memory))
        print(f"{i:>5} {a['tokens_per_s']:>11.0f} {b['tokens_per_s']:>11.0f} {speed:>6.2f} "
              f"{a['peak_memory_bytes'] / 1e9:>8.2f} {b['peak_memory_bytes'] / 1e9:>8.2f} {memory:>6.2f}", flush=True)
    for name, values in zip(("speed", "memory"), zip(*rounds)):
        print(f"{name}, ours to the peer's: {statistics.median(values):.2f} [{min(values):.2f} to {max(values):.2f}]")


if __name__ == "__main__":
    main()

"""Compares the time from command to the end of the first training step with PyTorch's; prints a table.

Ours is the real command, `python -m fm_jax.train` on prepared text, in a new run folder, with a
compilation cache that an earlier run filled: it ends at the line "first step after". The peer's is
train_torch.py, the same model from random parameters on random tokens, until it prints its first loss.
Rounds are interleaved. Run it with fm_jax's Python.

Try:  python tests/peers/startup.py --model gpt2 --peer_python .venv-torch/bin/python
"""

import argparse
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def seconds_until(text, command, env):
    """Returns the seconds from the start of the command until it prints a line that holds `text`. Ends it then."""
    begin, seen = time.perf_counter(), []
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        for line in process.stdout:
            seen.append(line)
            if text in line:
                return time.perf_counter() - begin
    finally:
        process.kill()
        process.wait()
    raise SystemExit(f"{' '.join(map(str, command))} never printed {text!r}:\n{''.join(seen[-20:])}")


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", choices=("gpt2", "llama"), default="gpt2")
    flags.add_argument("--peer_python", required=True)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--ours", action="append", default=[], help="more of our flags: --ours=--config.log.every=1")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONUNBUFFERED": "1",
                            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        # Any text will do: fm_jax's own source, as bytes, in documents of a paragraph.
        sources = sorted((ROOT / "fm_jax").rglob("*.py"))
        (folder / "text.txt").write_text("\n\n".join(p.read_text(encoding="utf-8") for p in sources), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "fm_jax.prepare", "--source", folder / "text.txt", "--tokenizer", "bytes",
                        "--document_separator", r"\n\n", "--output", folder / "data"], cwd=ROOT, env=env, check=True,
                       stdout=subprocess.DEVNULL)
        runs = iter(range(10 ** 6))
        ours = lambda: [sys.executable, "-m", "fm_jax.train", "--config", f"configs/causal_lm.py:bench_{args.model}",
                        "--workdir", folder / f"run{next(runs)}", f"--config.data.train={folder / 'data'}", *args.ours]
        theirs = [args.peer_python, HERE / "train_torch.py", "--model", args.model, "--steps", "1"]
        cold = seconds_until("first step after", ours(), env)
        print(f"{args.model}: ours with an empty cache {cold:.1f} s\n"
              f"{'round':>5} {'ours s':>8} {'torch s':>8} {'ratio':>6}")
        ratios = []
        for i in range(args.rounds):
            a = seconds_until("first step after", ours(), env)
            b = seconds_until("first_step", theirs, env)
            ratios.append(a / b)
            print(f"{i:>5} {a:>8.2f} {b:>8.2f} {a / b:>6.2f}", flush=True)
        print(f"time, ours to PyTorch's: {statistics.median(ratios):.2f} [{min(ratios):.2f} to {max(ratios):.2f}]")


if __name__ == "__main__":
    main()

"""Shows that the models train_throughput.py compares are the same: prints five losses of both, and their gaps.

Ours starts from its own initial parameters and random tokens; train_torch.py loads the same ones.
Five steps of AdamW in float32 bring out any difference in the model, the loss, the clipping or the
update. Exits with 1 where losses differ by more than 1e-3: float32 sums in another order
move the fifth loss by up to 1e-5 (measured), as Adam's first steps magnify them where a gradient is near zero.
Run it with fm_jax's Python.

Try:  PYTHONPATH=. python tests/peers/same_losses.py --model gpt2 --peer_python .venv-torch/bin/python
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile

import numpy as np

from fm_jax import config as config_lib
from fm_jax import objectives, sharding, tree
from fm_jax.step import Program

HERE = Path(__file__).resolve().parent
STEPS, LEARNING_RATE = 5, 1e-3


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", choices=("gpt2", "llama"), required=True)
    flags.add_argument("--peer_python", required=True)
    args = flags.parse_args()
    config = config_lib.resolve(config_lib.from_file(
        str(HERE.parents[1] / "configs/causal_lm.py") + f":bench_{args.model}",
        {"steps": STEPS, "optimizer.learning_rate": LEARNING_RATE, "optimizer.schedule": "constant",
         "optimizer.warmup_steps": 0}))
    layout = sharding.Layout(sharding.make_mesh({"data": 1}))
    objective = objectives.load(config, None, layout)
    program = Program(config, objective, layout)
    state = program.init()
    tokens = np.random.default_rng(0).integers(
        config.model.vocab_size, size=(STEPS, config.batch_size, config.seq_len + 1), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        weights, batches = Path(folder, "weights.npz"), Path(folder, "batches.npy")
        np.savez(weights, **{name: np.asarray(value) for name, value in tree.flatten(state.params).items()})
        np.save(batches, tokens)
        ours = []
        for step, rows in enumerate(tokens):
            records = {"tokens": rows, "segment_ids": np.ones_like(rows)}
            batch = objective.examples(records, np.arange(len(rows), dtype=np.uint64))
            state, values = program.train_step(state, program.place(batch), step)
            ours.append(float(values["loss"][0] / values["loss"][1]))
        done = subprocess.run(
            [args.peer_python, HERE / "train_torch.py", "--model", args.model, "--steps", str(STEPS),
             "--weights", weights, "--batches", batches, "--learning_rate", str(LEARNING_RATE)],
            check=True, text=True, stdout=subprocess.PIPE)
    theirs = json.loads(done.stdout.splitlines()[-1])["losses"]
    for step, (a, b) in enumerate(zip(ours, theirs)):
        print(f"step {step}: ours {a:.6f}, PyTorch's {b:.6f}, gap {abs(a - b):.1e}")
    sys.exit(int(max(abs(a - b) for a, b in zip(ours, theirs)) > 1e-3))


if __name__ == "__main__":
    main()

"""Shows what 8-bit matmuls cost in accuracy: the same small model trained in each `model.matmul_dtype`; prints a table.

Tiny Shakespeare (shipped with the package), SentencePiece 1,024, a Llama of 1.2M parameters, the same seed and batches
for all. The run in bfloat16 of another seed says what a difference is worth. On a CPU the 8-bit products are imitated:
the numbers are those of a chip but for the order of sums, the speed is not.

Try:  python tests/peers/matmul_dtypes.py --steps 400
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile

ROOT = Path(__file__).resolve().parents[2]
RUNS = {   # name -> flags
    "bfloat16": ["--config.model.dtype=bfloat16"],
    "int8": ["--config.model.dtype=bfloat16", "--config.model.matmul_dtype=int8"],
    "fp8": ["--config.model.dtype=bfloat16", "--config.model.matmul_dtype=fp8"],
    "bfloat16, another seed": ["--config.model.dtype=bfloat16", "--config.seed=1"],
    "float32": ["--config.model.dtype=float32"],
}


def command(name, *flags):
    subprocess.run([sys.executable, "-m", f"fm_jax.{name}", *map(str, flags)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--steps", type=int, default=400)
    flags.add_argument("--folder", help="where data and runs go and stay; default: a temporary one")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder or made)
        if not (folder / "data").exists():
            command("prepare", "--source", "catalogue:tiny_shakespeare", "--validation_frac", 0.1, "--tokenizer",
                    "sentencepiece:1024", "--output", folder / "data")
        places = [args.steps * i // 4 for i in range(1, 5)]
        print(f"{'':<24}" + "".join(f"{f'step {step}':>10}" for step in places) + f"{'validation':>12}")
        for name, how in RUNS.items():
            run = folder / name.replace(", ", "_").replace(" ", "_")
            command("train", f"--config={ROOT}/configs/causal_lm.py:tiny", "--workdir", run, "--config.data.train",
                    folder / "data", "--config.model.vocab_size=1024", "--config.model.num_layers=4",
                    "--config.model.embed_dim=128", "--config.model.mlp_dim=352", "--config.model.max_seq_len=128",
                    "--config.seq_len=128", "--config.batch_size=8", f"--config.steps={args.steps}",
                    f"--config.log.every={args.steps // 4}", "--config.eval.every=100%",
                    "--config.checkpoint.every=100%", "--config.mesh.data=1",
                    "--config.optimizer.learning_rate=5e-3", *how)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
            validation = [row["validation/loss"] for row in rows if "validation/loss" in row][-1]
            row = "".join(f"{losses[step]:>10.4f}" for step in places)
            print(f"{name:<24}{row}{validation:>12.4f}", flush=True)


if __name__ == "__main__":
    main()

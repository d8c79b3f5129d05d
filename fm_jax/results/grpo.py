"""Reinforcement: a small model that adds two numbers rightly now and then, before and after GRPO on checked answers.

Try:  python -m fm_jax.results --rows grpo --output results
"""

import json

from fm_jax.results import CONFIGS, Row, command

TITLE = "Reinforcement: sums of two numbers below 100, share that is right"
SEEDS = (0, 1, 2)


def run(work, note) -> Row:
    """Returns the shares of held-out problems that are answered rightly."""
    command("prepare", "--source=catalogue:arithmetic", "--tokenizer=bytes", f"--output={work / 'arithmetic'}")
    command("prepare", "--examples", "--source=catalogue:arithmetic_problems", "--tokenizer=bytes",
            "--validation_frac=0.1", f"--output={work / 'problems'}")
    command("train", f"--config={CONFIGS / 'grpo.py'}:pretrain", f"--config.data.train={work / 'arithmetic'}",
            f"--workdir={work / 'adds'}")
    lines = []
    for seed in SEEDS:
        folder = work / f"adds_rewarded_{seed}"
        command("grpo", f"--config={CONFIGS / 'grpo.py'}:arithmetic", f"--init={work / 'adds'}",
                f"--workdir={folder}", f"--config.data.train={work / 'problems'}", f"--config.seed={seed}")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        greedy = [r["validation/reward"] for r in rows if "validation/reward" in r]
        sampled = [r["train/reward"] for r in rows if "train/reward" in r]
        lines.append([seed, greedy[0], greedy[-1], sampled[0], sampled[-1]])
        note(f"seed {seed}: held out {greedy[0]:.3f} to {greedy[-1]:.3f}, sampled {sampled[0]:.3f} to {sampled[-1]:.3f}")
    return Row(("seed", "held out, before", "after", "sampled in training, steps 1 to 10", "the last 10"), lines, [],
               "478 held-out problems, the likeliest answer to each; the sums of pretraining are others again. Seeds are "
               "of reinforcement, all from one pretrained model of 0.12 M parameters.")

"""Reinforcement: a small model that adds two numbers rightly now and then, before and after GRPO on checked answers.

Try:  python -m fm_jax.results --rows grpo --output results
"""

import json

import numpy as np

from fm_jax.results import CONFIGS, Row, command

TITLE = "Reinforcement: sums of two numbers below 100, share that is right"
SEEDS = (0, 1)
DRAWN = 8       # answers to each problem


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
        before, after = (sampled(run, work / "problems") for run in (work / "adds", folder))
        lines.append([seed, before, after, greedy[0], greedy[-1]])
        note(f"seed {seed}: sampled {before:.3f} to {after:.3f}, likeliest {greedy[0]:.3f} to {greedy[-1]:.3f}")
    return Row(("seed", "sampled answers, before", "after", "likeliest answers, before", "after"), lines, [],
               "478 held-out problems, eight sampled answers to each, at temperature 1; the sums of pretraining are "
               "others again. Seeds are of reinforcement, all from one pretrained model of 0.12 M parameters.")


def sampled(run, problems) -> float:
    """Returns the share of right answers among those drawn."""
    from fm_jax import pretrained
    from fm_jax.data.examples import Examples
    from fm_jax.objectives.policy_gradient import equals_answer

    lm, held = pretrained.load(run), Examples(problems, "validation")
    records = held[np.arange(len(held))]
    texts = lm.generate([record["prompt"] for record in records], n=DRAWN, max_new_tokens=8, temperature=1.0)
    return float(np.mean([equals_answer(text, records[i // DRAWN]) for i, text in enumerate(texts)]))

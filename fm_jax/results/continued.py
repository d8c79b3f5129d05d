"""Continued pretraining: a model of English goes on with Python, and how much English it forgets, with replay and without.

Try:  python -m fm_jax.results --rows continued --output results
"""

import json

from fm_jax.results import CONFIGS, Row, command

TITLE = "Continued pretraining: bits per byte of held-out text"
MODEL = ("--config.model.num_layers=3", "--config.model.embed_dim=192", "--config.model.vocab_size=2048",
         "--config.model.max_seq_len=256", "--config.batch_size=8", "--config.data.prefetch_batches=1")
REPLAY = 0.25   # share of rows that are English


def run(work, note) -> Row:
    """Returns bits per byte of both domains, before and after."""
    english, code = work / "english_2048", work / "code_2048"
    command("prepare", "--source=catalogue:wikipedia_introductions", "--tokenizer=sentencepiece:2048",
            f"--output={english}")
    command("prepare", "--source=catalogue:python_stdlib", f"--tokenizer={english / 'tokenizer'}", f"--output={code}",
            "--validation_frac=0.02")
    both = (*MODEL, f"--config.data.validation=english={english},code={code}", "--config.eval.batches=20")
    config, base = f"--config={CONFIGS / 'causal_lm.py'}:small", work / "english"
    command("train", config, *both, f"--config.data.train={english}", "--config.steps=200", f"--workdir={base}")
    lines = [["English alone", *_bits(base)]]
    for name, mixture in (("then Python", f"{code}"),
                          ("then Python, a quarter English", f"{code}:{1 - REPLAY},{english}:{REPLAY}")):
        folder = work / f"english_{'replay' if ':' in mixture.removeprefix(str(code)) else 'python'}"
        command("train", config, *both, f"--config.data.train={mixture}", "--config.steps=100",
                f"--config.data.tokenizer={english / 'tokenizer'}", f"--config.checkpoint.init_from={base}",
                "--config.optimizer.muon_learning_rate=0.01", "--config.optimizer.learning_rate=1.5e-3",
                f"--workdir={folder}")
        lines.append([name, *_bits(folder)])
        note(f"{name}: English {lines[-1][1]:.3f}, Python {lines[-1][2]:.3f}")
    return Row(("", "English", "Python"), lines, [],
               "Wikipedia introductions and the standard library of the Python that runs; 200 steps of 2,048 tokens, then "
               "100 more, of which a run with replay sees a quarter less Python.")


def _bits(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(r for r in reversed(rows) if "validation/english/bits_per_byte" in r)
    return [last[f"validation/{name}/bits_per_byte"] for name in ("english", "code")]

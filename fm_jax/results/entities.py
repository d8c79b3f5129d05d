"""Entities in tweets: a pretrained encoder with a head for tags, fine-tuned, against a dictionary of those seen.

Try:  python -m fm_jax.results --rows entities --output results
"""

import shutil

import numpy as np

from fm_jax.results import CONFIGS, Row, command, minilm

TITLE = "Entities: ten types in tweets, F1 of whole entities"
SEEDS = (0, 1)


def run(work, note) -> Row:
    """Returns F1, precision and recall on the held-out tweets."""
    from fm_jax import pretrained
    from fm_jax.data.examples import Examples
    from fm_jax.evals.baselines import Dictionary

    run_folder, data = minilm(work), work / "tweets"
    command("prepare", "--examples", "--source=catalogue:tweet_entities", "--validation_frac=0.25", "--split_by=text",
            f"--tokenizer={run_folder / 'tokenizer'}", f"--output={data}")
    train, held = ([*each[np.arange(len(each))]] for each in (Examples(data, "train"), Examples(data, "validation")))
    words, gold = [r["words"] for r in held], [r["tags"] for r in held]
    seen = Dictionary([r["words"] for r in train], [r["tags"] for r in train])
    by_heart = scores(map(seen.tag, words), gold)
    note(f"dictionary: F1 {by_heart[0]:.3f}")
    found = []
    for seed in SEEDS:
        tuned = work / f"entities_{seed}"
        shutil.rmtree(tuned, ignore_errors=True)   # of a row that was not finished
        command("train", f"--config={CONFIGS / 'token_classification.py'}:minilm", f"--workdir={tuned}",
                f"--config.data.train={data}", f"--config.checkpoint.init_from={run_folder}", f"--config.seed={seed}",
                "--config.checkpoint.init_pattern=(embed|transformer).*", "--config.eval.every=0",
                "--config.checkpoint.every=100%", "--config.log.progress=False")
        found.append(scores(pretrained.load(tuned).tag(words), gold))
        note(f"seed {seed}: F1 {found[-1][0]:.3f}")
    return Row(("", "F1", "precision", "recall"),
               [["MiniLM fine-tuned", *(float(x) for x in np.mean(found, axis=0))],
                ["dictionary of the training tweets", *by_heart]], list(SEEDS),
               f"{len(train):,} tweets to learn from, {len(held):,} held out, which have {sum(map(_count, gold)):,} "
               "entities.")


def scores(tags, gold) -> list[float]:
    """Returns F1, precision and recall of whole entities of the same type."""
    from fm_jax.objectives.text_heads import entities

    pairs = [(set(entities(ours)), set(entities(theirs))) for ours, theirs in zip(tags, gold, strict=True)]
    both, ours, theirs = (sum(map(len, sets)) for sets in zip(*((a & b, a, b) for a, b in pairs)))
    return [2 * both / max(ours + theirs, 1), both / max(ours, 1), both / max(theirs, 1)]


def _count(tags):
    from fm_jax.objectives.text_heads import entities
    return len(entities(tags))

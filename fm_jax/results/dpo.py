"""Preferences: of two replies to a chat, people's own or one to another chat, which does the model prefer?

The chats of the catalogue. A model learns to chat from most of them. Of the others, pairs: a turn as it was, chosen, and
one of as many turns into another chat, rejected. Direct preference optimisation learns from three quarters of these.

Try:  python -m fm_jax.results --rows dpo --output results
"""

import json

import numpy as np

from fm_jax.results import CONFIGS, Row, cache, command

TITLE = "Preferences: share of held-out pairs in which the own reply is preferred"
SEEDS = (0,)
HELD_OUT = 0.4          # of the chats: from which pairs are made
PAIRS = 3               # of a chat at most
MODEL = ("--config.model.num_layers=3", "--config.model.embed_dim=192", "--config.model.vocab_size=2048",
         "--config.model.max_seq_len=256", "--config.batch_size=8", "--config.data.prefetch_batches=1")


def run(work, note) -> Row:
    """Returns the shares before and after."""
    chats, pairs, model = work / "chats", work / "pairs", work / "chatty"
    command("prepare", "--chat", "--source=catalogue:chitchat", "--tokenizer=sentencepiece:2048",
            "--chat_template=plain", f"--validation_frac={HELD_OUT}", f"--output={chats}")
    if not (work / "pairs.jsonl").exists():
        (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs()))
    command("prepare", "--examples", f"--source={work / 'pairs.jsonl'}", "--split_by=chat", "--validation_frac=0.25",
            f"--tokenizer={chats / 'tokenizer'}", f"--output={pairs}")
    command("train", f"--config={CONFIGS / 'causal_lm.py'}:small", *MODEL, f"--config.data.train={chats}",
            "--config.steps=250", "--config.eval.batches=20", f"--workdir={model}")
    command("annotate", f"--model={model}", f"--data={pairs}", f"--output={work / 'pairs_referred'}", "--seq_len=256")
    lines = []
    for seed in SEEDS:
        folder = work / f"preferred_{seed}"
        command("train", f"--config={CONFIGS / 'preference.py'}:dpo,{model}", f"--workdir={folder}",
                f"--config.data.train={work / 'pairs_referred'}", f"--config.seed={seed}", "--config.steps=2 epochs",
                "--config.optimizer.learning_rate=1e-4", "--config.seq_len=256", "--config.batch_size=16",
                "--config.data.prefetch_batches=1", "--config.eval.every=50%")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = next(r for r in reversed(rows) if "validation/reward_accuracy" in r)
        lines.append([seed, preferred(model, pairs), preferred(folder, pairs), last["validation/reward_accuracy"],
                      last["validation/reward_margin"]])
        note(f"seed {seed}: {lines[-1][1]:.3f} to {lines[-1][2]:.3f}, by the implicit reward {lines[-1][3]:.3f}")
    return Row(("seed", "likelier a token, before", "after", "by the implicit reward", "its margin, nats x beta"),
               lines, [], "Human chats of MIT's chitchat data set; the pairs' chats are not those that the model learnt "
               "to chat from. 0.5 is chance.")


def make_pairs():
    """Returns the pairs, {"chat", "prompt", "chosen", "rejected"}: prompts are the six messages before at most."""
    from fm_jax.data import catalogue, documents, prepared

    entry = catalogue.find("chitchat")
    chats = [(key, messages) for key, messages in entry.chats(catalogue.fetch(entry, cache()))
             if prepared.held_out(documents.chat_text(messages, "messages", key), HELD_OUT)]
    rng, turns = np.random.default_rng(0), {}
    for key, messages in chats:
        for at, message in enumerate(messages):
            if message["role"] == "assistant":
                turns.setdefault(at, []).append((key, message["content"]))
    pairs = []
    for key, messages in chats:
        places = [at for at, m in enumerate(messages) if m["role"] == "assistant" and len(turns[at]) > 1]
        for at in rng.permutation(places)[:PAIRS].tolist():
            others = [text for other, text in turns[at] if other != key and text != messages[at]["content"]]
            begin = max(at - 6, 0) + (at - 6) % 2 * (at > 6)   # a user's message comes first
            if others:
                pairs.append({"chat": key, "prompt": messages[begin:at], "chosen": messages[at]["content"],
                              "rejected": others[rng.integers(len(others))]})
    return pairs


def preferred(run, pairs) -> float:
    """Returns the share of the held-out pairs whose chosen reply has the higher log-probability a token."""
    from fm_jax import pretrained
    from fm_jax.data.examples import Examples

    lm, held = pretrained.load(run), Examples(pairs, "validation")
    records = held[np.arange(len(held))]
    prompts = [lm.tokenizer.chat(r["prompt"]) for r in records]
    means = []
    for answer in ("chosen", "rejected"):
        texts = [r[answer] for r in records]
        scores = lm.score(prompts, texts)
        means.append([s.logprob / max(s.num_tokens, 1) for s in scores])
    return float(np.mean(np.array(means[0]) > np.array(means[1])))

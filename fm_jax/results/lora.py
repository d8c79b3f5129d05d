"""Low-rank adapters beside full fine-tuning: SmolLM2-135M-Instruct on chats between people.

Try:  python -m fm_jax.results --rows lora --output results
"""

import json
import shutil

from fm_jax.results import CONFIGS, Row, command, smollm2

TITLE = "Adapters: SmolLM2-135M learns to chat"
EVERYWHERE = "transformer.*(attention.w[qkvo]|mlp.w_.*)"
# (name, flags). The rates are the first that were tried, as others have them for models of this size.
WAYS = (("all parameters", ("--config.optimizer.learning_rate=1e-4",)),
        ("LoRA, rank 8", (f"--config.adapt.lora={EVERYWHERE}", "--config.optimizer.learning_rate=2e-3")),
        ("LoRA over 4 bits (nf4)", (f"--config.adapt.lora={EVERYWHERE}", "--config.optimizer.learning_rate=2e-3",
                                    "--config.adapt.quantize=nf4")))
STEPS = 16


def run(work, note) -> Row:
    """Returns held-out losses of what the second speaker says, and what each way trains and stores."""
    base, data = smollm2(work), work / "chats_smollm2"
    command("prepare", "--chat", "--source=catalogue:chitchat", f"--tokenizer={base}/tokenizer", f"--output={data}")
    lines = []
    for i, (name, flags) in enumerate(WAYS):
        folder = work / f"chatty_{i}"
        shutil.rmtree(folder, ignore_errors=True)
        command("train", f"--config={CONFIGS}/finetune.py:{base}", f"--workdir={folder}", f"--config.data.train={data}",
                f"--config.steps={STEPS}", "--config.batch_size=4", "--config.seq_len=256", "--config.eval.batches=12",
                "--config.eval.every=100%", "--config.checkpoint.every=100%", "--config.log.tensorboard=false", *flags)
        loss = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        loss = next(line["validation/loss"] for line in reversed(loss) if "validation/loss" in line)
        stored = sum(p.stat().st_size for p in (folder / "checkpoints").rglob("params/**/*") if p.is_file())
        lines.append([name, _trained(folder), stored / 1e6, loss, loss / (lines[0][3] if lines else loss)])
        note(f"{name}: {loss:.3f}")
    before = _untouched(base, work / "chatty_0")
    lines.insert(0, ["none (the base)", 0.0, 0.0, before, before / lines[0][3]])
    return Row(("trained", "share of parameters", "checkpoint, MB", "held-out loss, nats/token", "to full"), lines, [0],
               f"{STEPS} steps of 4 rows of 256 tokens; the loss is of what one of two speakers says.")


def _trained(folder) -> float:
    """Returns which share of the model's parameters a run trained."""
    from fm_jax import checkpoint, pretrained, tree

    whole = tree.count(pretrained.load(folder).params)
    return tree.count(checkpoint.restore_params(folder)) / whole


def _untouched(base, run) -> float:
    """Returns the held-out loss of the base itself, on the data and in the rows of a run."""
    import jax

    from fm_jax import config as config_lib, metrics, pretrained
    from fm_jax.data import batches

    config, _ = config_lib.load(run / "config.json")
    lm, sums = pretrained.load(base), metrics.Sums()
    loss = jax.jit(lambda params, batch: lm.objective.loss(params, batch, None))
    config.model = lm.config.model
    for batch in batches.open_batches(config, lm.objective, split="validation").iterate():
        out = loss(lm.params, batch)
        sums.add({"loss": jax.device_get((out.loss, out.weight))})
    return sums.take("")["loss"]

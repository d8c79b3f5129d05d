"""Sums up a run: held-out bits per byte beside compressors and an n-gram model, few-shot, samples, loss curve.

    python -m fm_jax.report --workdir runs/quickstart

Writes WORKDIR/loss.png and WORKDIR/eval. Layer 5.
"""

from pathlib import Path

from absl import flags

from fm_jax import config as config_lib

PROMPTS = ("The", "In the", "It is")
NGRAM_ORDER = 5


def report(workdir, prompts=PROMPTS, *, seed: int = 0) -> str:
    """Returns the report as text, having written the evaluations and the plot to `workdir`."""
    import fm_jax
    from fm_jax import metrics
    from fm_jax.data import batches, prepared
    from fm_jax.evals import baselines
    from fm_jax.evaluate import evaluate

    workdir = Path(workdir)
    ours = evaluate(workdir, ["perplexity"], num_fewshot=0)["perplexity"]["bits_per_byte"]
    shots = {n: evaluate(workdir, ["next_sentence"], num_fewshot=n)["next_sentence"] for n in (0, 3)}
    lm = fm_jax.load(workdir)
    mixture = [folder for folder, _ in batches.parse_mixture(lm.config.data.train, "data.train")]
    train_texts = [t for folder in mixture for t in prepared.texts(folder, "train")]
    held_out = [t for folder in mixture for t in prepared.texts(folder, "validation")]
    others = {"gzip -9": baselines.gzip_bits_per_byte(held_out), "xz -9e": baselines.xz_bits_per_byte(held_out),
              f"order-{NGRAM_ORDER} n-gram": baselines.NGram(train_texts, NGRAM_ORDER).bits_per_byte(held_out)}
    plot = workdir / "loss.png"
    metrics.plot(workdir / "metrics.jsonl", plot, metric="bits_per_byte", baselines=others, title=str(workdir))
    size = sum(len(t.encode()) for t in held_out)
    lines = ["", f"Held-out text: {len(held_out)} documents, {size:,} bytes. Bits per byte, lower is better:"]
    ranked = sorted({**others, "this model": ours}.items(), key=lambda item: -item[1])
    lines += [f"  {name:<16} {value:.3f}" for name, value in ranked]
    lines += ["", f"Which of 4 sentences comes next in a document (chance 0.25), {shots[3]['questions']} questions,",
              "by what the context adds to each sentence's log-probability:"]
    lines += [f"  {n}-shot  accuracy {few['acc_mutual_info']:.3f} +- {few['acc_mutual_info_stderr']:.3f}"
              for n, few in shots.items()]
    room = lm.objective.arch.max_seq_len - 32
    lines += ["", "Samples (temperature 0.8, top_p 0.95):"]
    for prompt, text in zip(prompts, lm.generate(list(prompts), max_new_tokens=min(60, room), temperature=0.8,
                                                 top_p=0.95, seed=seed)):
        lines.append("  > " + " ".join((prompt + text).split()))
    lines += ["", f"Run folder  {workdir}", f"Loss curve  {plot}", ""]
    return "\n".join(lines)


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_multi_string("prompt", list(PROMPTS), "beginnings of the samples", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the samples", flag_values=fv)


def main(args):
    print(report(args.workdir, args.prompt, seed=args.seed))


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""Sums up a run: held-out bits per byte beside compressors and an n-gram model, few-shot, samples, loss curve.

    python -m fm_jax.report --workdir runs/quickstart

Writes WORKDIR/loss.png and WORKDIR/eval. Layer 5.
"""

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError

PROMPTS = ("The", "In the", "It is")
NGRAM_ORDER = 5
NGRAM_BYTES = 10_000_000   # of training text at most: 0.6 GB of memory and 3 s (one EPYC core, 2026-11-21)


def report(workdir, prompts=PROMPTS, *, seed: int = 0, mesh: dict | None = None) -> str:
    """Returns the report as text, having written the evaluations and the plot to `workdir`."""
    import fm_jax
    from fm_jax import metrics, storage
    from fm_jax.evals import baselines
    from fm_jax.evaluate import evaluate, held_out

    workdir = storage.place(workdir)
    lm = fm_jax.load(workdir, mesh=mesh)
    texts, _ = held_out(lm.config)
    train = train_texts(lm.config)
    others = {"gzip -9": baselines.gzip_bits_per_byte(texts), "xz -9e": baselines.xz_bits_per_byte(texts),
              f"order-{NGRAM_ORDER} n-gram": baselines.NGram(train, NGRAM_ORDER).bits_per_byte(texts)}
    plot = workdir / "loss.png"
    try:
        with storage.local(workdir, "metrics.jsonl") as files:
            metrics.plot(files.path / "metrics.jsonl", files.path / plot.name, metric="bits_per_byte",
                         baselines=others, title=str(workdir))
    except OSError as error:
        raise UserError(f"cannot write {plot}: {error.strerror}") from error
    ours = evaluate(workdir, ["perplexity"], lm=lm)["perplexity"]["bits_per_byte"]
    size = lambda documents: sum(len(t.encode()) for t in documents)
    lines = ["", f"Held-out text: {len(texts)} documents, {size(texts):,} bytes. Bits per byte, lower is better:"]
    ranked = sorted({**others, "this model": ours}.items(), key=lambda item: -item[1])
    lines += [f"  {name:<16} {value:.3f}" for name, value in ranked]
    lines += [f"(the n-gram model has counted {size(train):,} bytes of the training text, at most {NGRAM_BYTES:,})", ""]
    lines += few_shot(workdir, lm)
    lines += ["", "Samples (temperature 0.8, top_p 0.95):"]
    room = lm.objective.arch.max_seq_len // 2
    for prompt, text in zip(prompts, lm.generate(list(prompts), max_new_tokens=min(60, room), temperature=0.8,
                                                 top_p=0.95, seed=seed)):
        lines.append("  > " + " ".join((prompt + text).split()))
    lines += ["", f"Run folder  {workdir}", f"Loss curve  {plot}", ""]
    return "\n".join(lines)


def train_texts(config, most_bytes: int = NGRAM_BYTES) -> list[str]:
    """Returns training documents of the run, at most so many bytes, of a mixture's folders by their weights.

    The first ones, which is as good as any: prepared documents lie in the order of a hash.
    """
    from fm_jax.data import batches, prepared

    mixture = batches.parse_mixture(config.data.train, "data.train")
    texts, total = [], sum(weight for _, weight in mixture)
    for folder, weight in mixture:
        room, documents = int(most_bytes * weight / total), prepared.texts(folder, "train")
        while room > 0 and (text := next(documents, None)) is not None:
            data = text.encode()[:room]
            texts.append(data.decode(errors="ignore"))
            room -= len(data)
    return texts


def few_shot(workdir, lm) -> list[str]:
    """Returns lines on the next-sentence task, or the one that says why it cannot be measured."""
    from fm_jax.evaluate import evaluate

    lines = []
    try:
        for n in (0, 3):
            found = evaluate(workdir, ["next_sentence"], lm=lm, num_fewshot=n)["next_sentence"]
            fit = found["mean_shots"]
            lines.append(f"  {n}-shot  accuracy {found['acc_mutual_info']:.3f} +- {found['acc_mutual_info_stderr']:.3f}"
                         + (f"  (up to {n} shots, {fit:.1f} on average fit the context)" if fit < n else "")
                         + (f"  ({cut} questions are cut)" if (cut := found["truncated_contexts"]) else ""))
    except UserError as error:   # of a context or a held-out text too short for the task; the other figures stand
        return [f"Which of 4 sentences comes next in a document: not measured, as {error}"]
    return [f"Which of 4 sentences comes next in a document (chance 0.25), {found['questions']} questions,",
            "by what the context adds to each sentence's log-probability:", *lines]


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_multi_string("prompt", list(PROMPTS), "beginnings of the samples", flag_values=fv)
    flags.DEFINE_integer("seed", 0, "of the samples", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)


def main(args):
    from fm_jax.pretrained import parse_mesh

    print(report(args.workdir, args.prompt, seed=args.seed, mesh=parse_mesh(args.mesh)))


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

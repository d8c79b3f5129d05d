"""Smaller models: SmolLM2-135M-Instruct in fewer bits, and half of its layers taught by the whole.

Try:  python -m fm_jax.results --rows compress --output results
"""

import itertools
import json
import shutil

from fm_jax.results import CONFIGS, Row, cache, command, smollm2

TITLE = "Smaller: SmolLM2-135M in fewer bits and with fewer layers"
TASKS = (("piqa", 200), ("boolq", 100))   # questions of each
TAUGHT, HELD_OUT = slice(0, 200), slice(200, 240)   # of the introductions, whose first thousand letters are taken
STUDENT = ("--config.steps=24", "--config.batch_size=4", "--config.seq_len=256", "--config.eval.every=0",
           "--config.checkpoint.every=100%", "--config.optimizer.name=adamw", "--config.optimizer.learning_rate=5e-4",
           "--config.log.tensorboard=false")


def run(work, note) -> Row:
    """Returns sizes, accuracies and bits per byte."""
    from fm_jax import pretrained, tree
    from fm_jax.evals import names, requests

    base, lines = smollm2(work), []
    models = {"float32": base}
    for kind in ("int8", "int4", "nf4"):
        models[kind] = work / f"smollm2_{kind}"
        if not (models[kind] / "checkpoints").is_dir():
            command("convert", f"--workdir={base}", f"--to_run={models[kind]}", f"--quantize={kind}")
    models["15 of 30 layers, not taught"] = work / "half"
    models["15 of 30 layers, taught"] = _student(work, base, models["15 of 30 layers, not taught"])
    tasks = {name: names.load((name,))[0][name] for name, _ in TASKS}
    texts = _texts(HELD_OUT)
    for name, folder in models.items():
        lm = pretrained.load(folder)
        scores = [requests.evaluate(lm, tasks[task], limit=limit, bootstrap_iters=0)._asdict()["metrics"]["acc,none"]
                  for task, limit in TASKS]
        bits = -sum(lm.score_texts(texts)) / sum(len(t.encode()) for t in texts) / 0.6931471805599453
        lines.append([name, tree.nbytes(lm.params) / 1e6, *scores, bits])
        note(f"{name}: {lines[-1][1]:.0f} MB, PIQA {scores[0]:.3f}, BoolQ {scores[1]:.3f}, {bits:.3f} bits per byte")
    return Row(("", "MB", *(f"{task} (n={limit})" for task, limit in TASKS), "bits per byte"), lines, [0],
               "Matrices of layers alone are quantised: the table of embeddings, 113 MB, stays. The weights are those "
               "of a file of 4 bits, dequantised. The student saw 24 batches of 1,024 tokens of Wikipedia introductions; "
               "bits per byte are of held-out ones.")


def _student(work, base, half):
    """Returns the run of a model of every second layer that learnt from the whole one what it expects of text."""
    if not (half / "checkpoints").is_dir():
        command("shrink", f"--model={base}", f"--layers={','.join(map(str, range(0, 30, 2)))}", f"--workdir={half}")
    text = work / "some_introductions.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in _texts(TAUGHT)))
    command("prepare", f"--source={text}", f"--tokenizer={base}/tokenizer", "--validation_frac=0",
            f"--output={work / 'introductions'}")
    command("annotate", f"--model={base}", f"--data={work / 'introductions'}", f"--output={work / 'taught'}",
            "--seq_len=256", "--top_k=32")
    folder = work / "student"
    shutil.rmtree(folder, ignore_errors=True)
    command("train", f"--config={CONFIGS}/finetune.py:{half}", f"--workdir={folder}",
            "--config.objective=fm_jax.objectives.distill.Distill", f"--config.data.train={work / 'taught'}", *STUDENT)
    return folder


def _texts(which: slice) -> list[str]:
    """Returns these of the catalogue's introductions."""
    from fm_jax.data import catalogue

    entry = catalogue.find("wikipedia_introductions")
    texts = entry.texts(catalogue.fetch(entry, cache()))
    return [text[:1000] for text in itertools.islice(texts, which.start, which.stop)]

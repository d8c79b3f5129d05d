"""Puts beside prepared data what a model says of it, in a folder of its own, so that training needs no second model.

    python -m fm_jax.annotate --model runs/teacher --data data/x --output data/x_taught --seq_len 256 --top_k 32
    python -m fm_jax.annotate --model runs/sft --data data/pairs --output data/pairs_sft --seq_len 512

Of packed text, or chats: the tokens that the model, a teacher, expects most in each place of rows of --seq_len, with
their log-probabilities (objectives/distill.py); six bytes each at most. Of pairs prepared with --examples: the
log-probabilities of the chosen and the rejected answer, by the model that preference tuning begins with
(objectives/preference.py). What trains on the folder has the same config.seq_len. Layer 5.
"""

import json
import pathlib
import shutil

from absl import flags

from fm_jax import config as config_lib
from fm_jax.errors import UserError


def annotate(model, data, output, *, seq_len: int = 0, top_k: int = 32, batch_size: int = 8, mesh=None,
             progress=lambda stage, count: None) -> tuple[dict, bool]:
    """Returns the manifest of `output` and whether it was already there, made from the same data and model.

    model: a run's folder, or what else `fm_jax.load` takes. data: a prepared folder. seq_len: of the rows; 0: the
    model's context. mesh: as of `fm_jax.load`.

    Raises:
      UserError: no such data or model, one of another tokenizer, or one that cannot do it.
    """
    from fm_jax import pretrained
    from fm_jax.data import prepared

    manifest, lm = prepared.read_manifest(data), pretrained.load(model, mesh=mesh)
    seq_len = seq_len or lm.objective.arch.max_seq_len
    if seq_len > lm.objective.arch.max_seq_len:
        raise UserError(f"--seq_len={seq_len} exceeds the context of {model}, {lm.objective.arch.max_seq_len}")
    if not {"logits", "decode"} <= set(lm.objective.predict):
        raise UserError(f"--model={model}: not a causal language model")
    batch_size = -(-batch_size // lm.module.layout.batch_parts) * lm.module.layout.batch_parts
    made = manifest["tokenizer"]
    if made and made["fingerprint"] != lm.tokenizer.fingerprint:
        raise UserError(f"{data} was prepared with another tokenizer than that of {model}")
    if manifest["kind"] == "examples":
        return _annotate_pairs(lm, data, manifest, output, seq_len, batch_size, progress)
    if not 0 < top_k < lm.tokenizer.vocab_size:
        raise UserError(f"--top_k={top_k} must be from 1 to the vocabulary less one")
    return _annotate_rows(lm, data, manifest, output, seq_len, top_k, batch_size, progress)


def _annotate_pairs(lm, data, manifest, output, seq_len, batch_size, progress):
    import jax
    import numpy as np

    from fm_jax import objectives
    from fm_jax.data import examples
    from fm_jax.data.documents import Source

    config = lm.config.copy_and_resolve_references()
    config.seq_len, config.objective = seq_len, "fm_jax.objectives.preference.Preference"
    with config.unlocked():
        config.objective_args = {"method": "simpo"}   # one without reference, which is to be made
    objective = objectives.load(config, lm.tokenizer, lm.module.layout)
    logprobs = jax.jit(objective.logprobs)

    def records(split):
        there = examples.Examples(data, split)
        for begin in range(0, len(there), batch_size):
            found = there[np.arange(begin, min(begin + batch_size, len(there)))]
            padded = found + [None] * (batch_size - len(found))
            made = np.asarray(logprobs(lm.params, objective.examples(padded, None)))
            for record, (chosen, rejected) in zip(found, made.tolist()):
                yield record.place, dict(record) | {"reference": {"chosen": chosen, "rejected": rejected}}

    name, identity = pathlib.Path(data).name, f"{manifest['fingerprint']} {fingerprint(lm.params)} {seq_len}"
    sources = {split: [Source(f"{name}/{split}", entry["bytes"], identity, manifest["licence"], None,
                              lambda split=split: records(split))]
               for split, entry in manifest["splits"].items() if entry["examples"]}
    return examples.prepare(
        sources.get("train", []), output, tokenizer=f"{data}/tokenizer" if manifest["tokenizer"] else "",
        validation_sources=sources.get("validation", []), validation_frac=0.0, licence=manifest["licence"],
        progress=progress)


def _annotate_rows(lm, data, manifest, output, seq_len, top_k, batch_size, progress):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fm_jax.data import prepared
    from fm_jax.data.documents import Source

    if manifest.get("teacher"):
        raise UserError(f"{data} has a teacher already; annotate the folder that it was made from")
    chunk = min(128, seq_len)

    @jax.jit
    def likeliest(params, batch):
        """Returns (ids, log-probabilities) [B, T, K]."""
        hidden, _, _ = lm.module.apply({"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"])

        def one(hidden_BcD):
            logits = lm.module.apply({"params": params}, hidden_BcD, method="logits")
            top, ids = jax.lax.top_k(logits[..., : lm.tokenizer.vocab_size], top_k)   # a model may have more
            return ids, top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

        pieces = jnp.pad(hidden, [(0, 0), (0, -seq_len % chunk), (0, 0)])
        pieces = pieces.reshape(len(hidden), -1, chunk, hidden.shape[-1]).swapaxes(0, 1)
        whole = lambda x: x.swapaxes(0, 1).reshape(len(hidden), -1, top_k)[:, :seq_len]
        return jax.tree.map(whole, jax.lax.map(one, pieces))

    teacher = {"top_k": top_k, "seq_len": seq_len, "params": fingerprint(lm.params)}
    request = manifest["request"] | {"teacher": teacher}

    def write(folder):
        shutil.copytree(data, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        for split, entry in manifest["splits"].items():
            make = lambda name, dtype: np.memmap(
                folder / split / f"teacher.{name}", dtype, "w+", shape=(entry["tokens"], top_k))
            if not entry["tokens"]:
                continue
            ids, logprobs = make("ids", manifest["token_dtype"]), make("logprobs", "<f2")
            rows = prepared.Rows(data, split, seq_len)
            for begin in range(0, len(rows), batch_size):
                number = np.arange(begin, begin + batch_size).clip(max=len(rows) - 1)
                found = rows[number]
                batch = lm.objective.packed(found["tokens"], found["segment_ids"])
                top, values = map(np.asarray, likeliest(lm.params, batch))
                for i, (first, last) in enumerate(zip(*rows.extent(number))):
                    ids[first : last - 1], logprobs[first : last - 1] = top[i, : last - 1 - first], values[
                        i, : last - 1 - first]
                progress("rows", min(batch_size, len(rows) - begin))
            ids.flush()
            logprobs.flush()
        rest = {k: v for k, v in manifest.items() if k not in ("fingerprint", "request", "licence", "sources", "files")}
        return rest | {"teacher": teacher}

    sources = [Source(s["name"], s["size_bytes"], s["sha256"], s["licence"], None, None) for s in manifest["sources"]]
    return prepared.make_folder(output, "packed", request, sources, manifest["licence"], write)


def fingerprint(params) -> str:
    """Returns a hash of parameters, hexadecimal: equal for equal values under equal names."""
    import hashlib

    import numpy as np

    from fm_jax import tree

    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(tree.flatten(params).items()):
        array = np.asarray(array)
        digest.update(json.dumps([name, array.shape, str(array.dtype)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _flags(fv):
    text = lambda name, about, **how: flags.DEFINE_string(name, None, about, flag_values=fv, **how)
    text("model", "a run's folder, a folder of Hugging Face weights, or a GGUF file", required=True)
    text("data", "a folder made by fm_jax.prepare", required=True)
    text("output", "folder to make", required=True)
    flags.DEFINE_integer("seq_len", 0, "tokens of a row; 0: the model's context", flag_values=fv, lower_bound=0)
    flags.DEFINE_integer("top_k", 32, "tokens in each place, of packed text", flag_values=fv)
    flags.DEFINE_integer("batch_size", 8, "rows at once; the result does not depend on it", flag_values=fv,
                         lower_bound=1)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)


def main(args):
    from tqdm import tqdm

    from fm_jax import pretrained

    with tqdm(unit=" rows", disable=None, leave=False) as bar:
        manifest, reused = annotate(args.model, args.data, args.output, seq_len=args.seq_len, top_k=args.top_k,
                                    batch_size=args.batch_size, mesh=pretrained.parse_mesh(args.mesh),
                                    progress=lambda stage, count: bar.update(count))
    what = f"{manifest['teacher']['top_k']} tokens in each place" if "teacher" in manifest else "a reference of each pair"
    print(f"{args.output}: {'already there, ' if reused else ''}{what}, by {args.model}")


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

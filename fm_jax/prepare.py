"""Turns documents into a folder of tokenized, memory-mapped shards with a manifest.

Sources are JSONL (.jsonl, also .gz or .zst), Parquet, plain text (.txt, .md) and
catalogue:NAME; formats may be mixed. Exact duplicates and empty documents are dropped and
counted; the held-out split is chosen by a hash of the text. The folder appears whole or not at all,
and one that was made before from the same sources is used again, after a check of its files.

Exit code 69: catalogue data that is not in the cache could not be downloaded.

Examples:
  python -m fm_jax.prepare --source 'texts/*.jsonl' --tokenizer sentencepiece:8192 --output data/x
  python -m fm_jax.prepare --source catalogue:wikipedia_introductions --tokenizer bytes --output data/wiki
"""

import os
import sys

from absl import flags

from fm_jax import config


def _flags(fv):
    text = lambda name, default, about: flags.DEFINE_string(name, default, about, flag_values=fv)
    number = lambda name, default, about: flags.DEFINE_integer(name, default, about, flag_values=fv)
    text("source", None, "Comma-separated globs of files, and catalogue:NAME.")
    text("tokenizer", None, "A path (SentencePiece .model, tokenizer.json, or a folder with one), bytes, or "
         "sentencepiece:VOCAB_SIZE to train one on the train split.")
    text("output", None, "Folder to make.")
    text("text_key", "text", "Field of JSONL objects, or column of Parquet, that holds the text.")
    text("document_separator", "", r"Cuts plain text (.txt, .md), such as '\n\n'; default: a file is one document.")
    flags.DEFINE_float("validation_frac", 0.02, "Part of the documents that is held out.", flag_values=fv)
    text("licence", "", "Recorded in the manifest; default: what the catalogue says.")
    number("shard_tokens", 100_000_000, "Most tokens of a shard.")
    number("workers", os.cpu_count(), "Processes that tokenize; the result does not depend on it.")
    for name in ("source", "tokenizer", "output"):
        flags.mark_flag_as_required(name, fv)


def main(args):
    import time

    from tqdm import tqdm

    from fm_jax.data import catalogue, documents, prepared

    cache = os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE)
    # A shell passes \n as two characters.
    separator = args.document_separator.replace(r"\n", "\n").replace(r"\t", "\t")
    try:
        sources = documents.open_sources(args.source, text_key=args.text_key, separator=separator, cache=cache)
    except catalogue.DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 69   # EX_UNAVAILABLE of sysexits.h: launch/quickstart.sh takes other data then, and only then
    for source in sources:
        if source.licence:
            print(f"{source.name}: {source.licence}")
    began, bars = time.monotonic(), {}

    def progress(stage, count):
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, unit=" documents", unit_scale=True, disable=None, leave=False)
        bars[stage].update(count)

    try:
        manifest, reused = prepared.prepare(
            sources, args.tokenizer, args.output, text_key=args.text_key, separator=separator,
            validation_frac=args.validation_frac, shard_tokens=args.shard_tokens, licence=args.licence,
            workers=args.workers, progress=progress)
    finally:
        for bar in bars.values():
            bar.close()
    print(_summary(manifest, args.output, reused, time.monotonic() - began))
    return 0


def _summary(manifest, output, reused, seconds):
    lines = [f"{output}: already prepared from the same sources, used as it is" if reused else
             f"{output}: prepared in {seconds:.1f} s"]
    for split, entry in manifest["splits"].items():
        ratio = entry["bytes"] / max(entry["tokens"], 1)
        lines.append(f"  {split:<11}{entry['documents']:>10,} documents  {entry['tokens']:>13,} tokens  "
                     f"{entry['bytes'] / 1e6:>9,.2f} MB  {ratio:.2f} bytes per token")
    lines.append(f"  dropped    {manifest['documents_duplicate']:>10,} duplicates "
                 f"{manifest['documents_empty']:>14,} empty")
    lines.append(f"  vocabulary {manifest['tokenizer']['vocab_size']:,}; licence: {manifest['licence']}")
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main, _flags, __doc__)

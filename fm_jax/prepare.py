"""Turns documents into a folder of tokenized, memory-mapped shards with a manifest, or records into one of examples.

Sources are JSONL (.jsonl, also .gz or .zst), Parquet, plain text (.txt, .md) and
catalogue:NAME; formats may be mixed. Exact duplicates and empty documents are dropped and
counted; the held-out split is chosen by a hash of the text. The folder appears whole or not at all,
and one that was made before from the same sources is used again, after a check of its files.

With --examples the records of JSONL, Parquet or the catalogue stay apart and whole, labels and all, for objectives
that read separate examples. Nothing is tokenized: the tokenizer is the one that a run of them takes if it names none.

With --chat, documents are conversations, {"messages": [{"role": "user", "content": ...}, ...]}, rendered by the
tokenizer's chat template: rows have them whole, and the loss is of what the assistant says.

Exit code 69: catalogue data that is not in the cache could not be downloaded.

Examples:
  python -m fm_jax.prepare --source 'texts/*.jsonl' --tokenizer sentencepiece:8192 --output data/x
  python -m fm_jax.prepare --source catalogue:wikipedia_introductions --tokenizer bytes --output data/wiki
  python -m fm_jax.prepare --examples --source x.jsonl --tokenizer runs/base/tokenizer --output data/topics
  python -m fm_jax.prepare --examples --source catalogue:mnist_5k --images image --output data/digits
  python -m fm_jax.prepare --source chats.jsonl --chat --tokenizer runs/smol/tokenizer --output data/chats
"""

import os
import pathlib
import sys

from absl import flags

from fm_jax import config
from fm_jax.errors import UserError


def _flags(fv):
    text = lambda name, default, about: flags.DEFINE_string(name, default, about, flag_values=fv)
    number = lambda name, default, about: flags.DEFINE_integer(name, default, about, flag_values=fv)
    text("source", None, "Comma-separated globs of files, and catalogue:NAME.")
    flags.DEFINE_boolean("examples", False, "Keep the records apart, each an example with all its fields.",
                         flag_values=fv)
    text("tokenizer", "", "A path (SentencePiece .model, tokenizer.json, or a folder with one), bytes, or "
         "sentencepiece:VOCAB_SIZE to train one on the train split. Examples without text need none.")
    text("output", None, "Folder to make.")
    text("text_key", "", 'Field of JSONL objects, or column of Parquet, that holds the text; default "text", with '
         '--chat "messages". Of examples, the fields, comma-separated, that sentencepiece: learns from.')
    flags.DEFINE_boolean("chat", False, "Documents are chats.", flag_values=fv)
    text("chat_template", "", "With --chat: a file with the Jinja template of chats, or plain, for tokenizers that are "
         "not made for chats; default: the tokenizer's.")
    text("document_separator", "", r"Cuts plain text (.txt, .md), such as '\n\n'; default: a file is one document.")
    flags.DEFINE_float("validation_frac", 0.02, "Part of the documents that is held out.", flag_values=fv)
    text("validation_source", "", "Of examples, the held-out ones, as --source; instead of a --validation_frac.")
    text("split_by", "", "Of examples, comma-separated fields: those equal in them are all held out or none; default: "
         "all fields.")
    text("images", "", "Of examples, comma-separated fields that hold a picture: bytes, or the path of its file from "
         "the source's folder. Those that cannot be read are left out and counted.")
    text("licence", "", "Recorded in the manifest; default: what the catalogue says.")
    number("shard_tokens", 100_000_000, "Most tokens of a shard.")
    number("workers", os.cpu_count(), "Processes that tokenize; the result does not depend on it.")
    for name in ("source", "output"):
        flags.mark_flag_as_required(name, fv)


def main(args):
    import time

    from tqdm import tqdm

    from fm_jax.data import catalogue, documents, examples, prepared

    if args.examples and args.chat:
        raise UserError("--chat packs chats, and --examples keeps records apart: one of them")
    if not args.examples:
        if args.images:
            raise UserError(f"--images={args.images} is for --examples")
        for name, value in (("validation_source", args.validation_source), ("split_by", args.split_by)):
            if value:
                raise UserError(f"--{name}={value} is for --examples; held-out text comes from a folder of its own, "
                                "prepared with --validation_frac=1")
        if not args.tokenizer:
            raise UserError("--tokenizer is needed to pack text: a path, bytes, or sentencepiece:VOCAB_SIZE")
    cache = os.environ.get("FM_JAX_CACHE", catalogue.DEFAULT_CACHE)
    # A shell passes \n as two characters.
    separator = args.document_separator.replace(r"\n", "\n").replace(r"\t", "\t")
    text_key = args.text_key or ("messages" if args.chat else "text")
    open_sources = lambda spec: documents.open_sources(spec, text_key=text_key, separator=separator, chat=args.chat,
                                                       cache=cache)
    try:
        sources = open_sources(args.source)
        held_out = open_sources(args.validation_source) if args.validation_source else []
    except catalogue.DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 69   # EX_UNAVAILABLE of sysexits.h: launch/quickstart.sh takes other data then, and only then
    for source in sources + held_out:
        if source.licence:
            print(f"{source.name}: {source.licence}")
    began, bars = time.monotonic(), {}

    def progress(stage, count):
        if stage not in bars:
            bars[stage] = tqdm(desc=stage, unit=" documents", unit_scale=True, disable=None, leave=False)
        bars[stage].update(count)

    try:
        if args.examples:
            manifest, reused = examples.prepare(
                sources, args.output, tokenizer=args.tokenizer, text_key=text_key, validation_sources=held_out,
                validation_frac=args.validation_frac, split_by=args.split_by, images=args.images,
                licence=args.licence, progress=progress)
        else:
            manifest, reused = prepared.prepare(
                sources, args.tokenizer, args.output, text_key=text_key, separator=separator, chat=args.chat,
                chat_template=_template(args), validation_frac=args.validation_frac, shard_tokens=args.shard_tokens,
                licence=args.licence, workers=args.workers, progress=progress)
    finally:
        for bar in bars.values():
            bar.close()
    print(_summary(manifest, args.output, reused, time.monotonic() - began))
    return 0


def _template(args):
    """Returns the chat template that --chat_template names; None: the tokenizer's."""
    from fm_jax.tokenizer import PLAIN_CHAT

    if not args.chat_template:
        return None
    if not args.chat:
        raise UserError("--chat_template is of chats: add --chat")
    if args.chat_template == "plain":
        return PLAIN_CHAT
    try:
        return pathlib.Path(args.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template={args.chat_template}: cannot be read ({error}); give a file, or "
                        "plain") from None


def _summary(manifest, output, reused, seconds):
    lines = [f"{output}: already prepared from the same sources, used as it is" if reused else
             f"{output}: prepared in {seconds:.1f} s"]
    if manifest["kind"] == "examples":
        lines += [f"  {split:<11}{entry['examples']:>10,} examples  {entry['bytes'] / 1e6:>9,.2f} MB"
                  for split, entry in manifest["splits"].items()]
        lines.append(f"  dropped    {manifest['examples_duplicate']:>10,} duplicates "
                     f"{manifest['examples_empty']:>9,} empty {manifest['examples_also_held_out']:>9,} also held out")
        if manifest.get("examples_unreadable"):
            lines.append(f"  left out   {manifest['examples_unreadable']:>10,} whose picture cannot be read; the first:"
                         f" {manifest['first_unreadable']}")
        lines += [f"  {field}: {len(values)} values: {', '.join(map(str, values[:8]))}{', ...' * (len(values) > 8)}"
                  for field, values in manifest["values"].items()]
        return "\n".join([*lines, f"  licence: {manifest['licence']}"])
    for split, entry in manifest["splits"].items():
        ratio = entry["bytes"] / max(entry["tokens"], 1)
        said = f", {entry['loss_tokens']:,} of them the assistant's" if "loss_tokens" in entry else ""
        lines.append(f"  {split:<11}{entry['documents']:>10,} documents  {entry['tokens']:>13,} tokens  "
                     f"{entry['bytes'] / 1e6:>9,.2f} MB  {ratio:.2f} bytes per token{said}")
    lines.append(f"  dropped    {manifest['documents_duplicate']:>10,} duplicates "
                 f"{manifest['documents_empty']:>14,} empty")
    lines.append(f"  vocabulary {manifest['tokenizer']['vocab_size']:,}; licence: {manifest['licence']}")
    return "\n".join(lines)


if __name__ == "__main__":
    config.run(main, _flags, __doc__)

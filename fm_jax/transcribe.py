"""Writes down what is said in WAV files, and what share of the words is wrong where the right ones are given.

    python -m fm_jax.transcribe --workdir runs/whisper --audio speech.wav --audio "more/*.wav"
    python -m fm_jax.transcribe --workdir runs/whisper --list speech.jsonl --language en --output heard.jsonl

A line of --list is {"audio": "a.wav", "text": "what is said"}; a path that is not absolute is from the list's folder, and
the text may lack. The word error rate is of all words together, in lower case and without marks, single digits spelt out
(`evals.metrics.spoken_words`); the character error rate of the same words. The folder may be a run, one of Hugging Face
weights, or a CTranslate2 model of Whisper. Layer 5.
"""

import glob
import json
from pathlib import Path
import sys
import time

from absl import flags

from fm_jax import config as config_lib
from fm_jax import distributed
from fm_jax.errors import UserError


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder, or one of weights", flag_values=fv, required=True)
    flags.DEFINE_multi_string("audio", [], "WAV file, or a pattern of several; may be given several times",
                              flag_values=fv)
    flags.DEFINE_string("list", None, "file of JSON lines, see above", flag_values=fv)
    flags.DEFINE_string("language", "", "as en; default: the likeliest of each file", flag_values=fv)
    flags.DEFINE_enum("task", None, ("transcribe", "translate"), "translate: into English", flag_values=fv)
    flags.DEFINE_bool("timestamps", False, "when each part is said", flag_values=fv)
    flags.DEFINE_integer("num_beams", 1, "1: the likeliest token each time", flag_values=fv, lower_bound=1)
    flags.DEFINE_string("output", None, "file to write, one JSON object a line", flag_values=fv)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)
    distributed.define_flags(fv)


def main(args):
    with distributed.processes(args):
        _transcribe(args)


def _transcribe(args):
    import fm_jax
    from fm_jax import audio
    from fm_jax.evals import metrics
    from fm_jax.pretrained import parse_mesh

    records = _records(args)
    for record in records:
        audio.prepared(record["audio"])   # before a large model is loaded
    lm = fm_jax.load(args.workdir, step=args.step, mesh=parse_mesh(args.mesh))
    begin = time.perf_counter()
    heard = lm.transcribe([record["audio"] for record in records], language=args.language, task=args.task or "",
                          timestamps=args.timestamps, num_beams=args.num_beams)
    took_s = time.perf_counter() - begin
    lines, words, characters = [], [0, 0], [0, 0]
    for record, each in zip(records, heard):
        line = {"audio": record["audio"], "heard": each.text, "language": each.language}
        line |= {"segments": each.segments} if args.timestamps else {}
        line |= {"notes": each.notes} if each.notes else {}
        if "text" in record:
            line["text"] = record["text"]
            for sums, count in ((words, metrics.word_errors), (characters, metrics.character_errors)):
                errors, size = count(each.text, record["text"])
                sums[0], sums[1] = sums[0] + errors, sums[1] + size
                line.setdefault("word_errors", errors)
        lines.append(line)
        print(f"{record['audio']}: {each.text}" + "".join(f"\n  {a:.2f} to {b:.2f} s: {text}" for a, b, text in
                                                          each.segments))
        if each.notes:
            print(f"{record['audio']}: {', '.join(each.notes)}", file=sys.stderr)
    if words[1]:
        print(f"{sum('text' in r for r in records)} texts of {words[1]:,} words: word error rate "
              f"{words[0] / words[1]:.4f}, character error rate {characters[0] / max(characters[1], 1):.4f}")
    print(f"{len(records)} files in {took_s:.1f} s, compiling included", file=sys.stderr)
    if args.output:
        Path(args.output).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                                     encoding="utf-8")


def _records(args) -> list[dict]:
    """Returns {"audio", perhaps "text"} of each file that the flags name."""
    records = []
    for pattern in args.audio:
        found = sorted(glob.glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
        if not found:
            raise UserError(f"--audio={pattern}: no such file")
        records += [{"audio": path} for path in found]
    if args.list is not None:
        path = Path(args.list)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--list={path}: {e}; expected UTF-8 text, one JSON object a line") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                record = {"audio": str(path.parent / record["audio"]), **({"text": str(record["text"])} if "text" in record
                                                                         else {})}
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}:{number}: {type(e).__name__}: {e}; expected {{\"audio\": \"a.wav\", \"text\": "
                                "\"...\"}") from None
            records.append(record)
    if not records:
        raise UserError("no sound: give --audio, or --list with one file a line")
    return records


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

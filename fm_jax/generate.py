"""Continues prompts with the model of a run.

    python -m fm_jax.generate --workdir runs/x --prompt "The history of" --max_new_tokens 64
    python -m fm_jax.generate --workdir runs/x --prompt "Paris" --prompt "Rome" --temperature 0.8 --top_p 0.95 --n 3
    python -m fm_jax.generate --workdir runs/x --prompt_file prompts.txt --stop "\\n" --repetition_penalty 1.2
    python -m fm_jax.generate --workdir runs/x --chat --system "Answer in one sentence." --prompt "Why is the sky blue?"
    python -m fm_jax.generate --workdir runs/x --prompt "Paris" --mesh fsdp=4,tensor=2

Layer 5.
"""

import json
from pathlib import Path
import sys

from absl import flags

from fm_jax import config as config_lib
from fm_jax import distributed
from fm_jax.errors import UserError


def _flags(fv):
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=fv, required=True)
    flags.DEFINE_multi_string("prompt", None, "text to continue; may be given several times", flag_values=fv)
    flags.DEFINE_string("prompt_file", None, "prompts, one a line; in a .jsonl file the \"prompt\" of each line",
                        flag_values=fv)
    flags.DEFINE_boolean("chat", False, "a prompt is what a user says; the tokenizer's chat template makes a chat of "
                         "it", flag_values=fv)
    flags.DEFINE_string("system", "", "the system's message before each prompt, with --chat", flag_values=fv)
    flags.DEFINE_integer("max_new_tokens", 64, "most tokens to add", flag_values=fv, lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0: always the likeliest token", flag_values=fv)
    flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens; 0: all", flag_values=fv)
    flags.DEFINE_float("top_p", 1.0, "draw from the likeliest tokens that together have this probability",
                       flag_values=fv)
    flags.DEFINE_float("min_p", 0.0, "draw from tokens at least this share as likely as the likeliest",
                       flag_values=fv)
    flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens that are there already become less likely",
                       flag_values=fv)
    flags.DEFINE_multi_string("stop", [], "end a continuation before this text (\\n: a line's end); may be given "
                              "several times", flag_values=fv)
    flags.DEFINE_integer("n", 1, "continuations of each prompt", flag_values=fv, lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=fv)
    flags.DEFINE_integer("step", None, "of the checkpoint; default the newest", flag_values=fv)
    flags.DEFINE_string("mesh", "", "devices per axis, as in fsdp=4,tensor=2; default one device", flag_values=fv)
    distributed.define_flags(fv)


def main(args):
    with distributed.processes(args):
        _generate(args)


def _generate(args):
    import fm_jax
    from fm_jax.decode import Sampling
    from fm_jax.pretrained import parse_mesh

    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    Sampling(**sampling).check()   # before a large model is loaded
    prompts = texts = _prompts(args)
    if args.system and not args.chat:
        raise UserError("--system is a message of a chat: add --chat")
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [[*system, {"role": "user", "content": text}] for text in texts]
    lm = fm_jax.load(args.workdir, step=args.step, mesh=parse_mesh(args.mesh))
    room = lm.objective.arch.max_seq_len - args.max_new_tokens
    if cut := sum(len(ids) > room > 0 for ids in lm.prompt_ids(prompts)):
        print(f"{cut} of {len(prompts)} prompts are cut at their left to the {room} tokens that "
              f"--max_new_tokens={args.max_new_tokens} leaves in the model's context", file=sys.stderr)
    made = lm.generate(prompts, max_new_tokens=args.max_new_tokens, n=args.n, seed=args.seed,
                       stop=[text.replace("\\n", "\n") for text in args.stop], **sampling)
    for i, text in enumerate(made):
        alone = args.chat or "encode" in lm.objective.predict   # an answer; a continuation is behind its prompt
        before = "" if alone else texts[i // args.n]
        print(("" if i == 0 else "---\n") + before + text)


def _prompts(args) -> list[str]:
    """Returns the prompts that the flags give. Raises UserError for none, and for a file that has none."""
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        path = Path(args.prompt_file)
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompt_file={path}: {e}; expected UTF-8 text, one prompt a line") from None
        for number, line in enumerate(lines, 1):
            prompts += [_prompt(f"{path}:{number}", line) if path.suffix == ".jsonl" else line] if line.strip() else []
    if not prompts:
        raise UserError("no prompt: give --prompt, or --prompt_file with one a line" + (
            f"; {args.prompt_file} is empty" if args.prompt_file else ""))
    return prompts


def _prompt(place, line) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"{place}: not JSON ({e}); expected {{\"prompt\": \"...\"}}") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f"{place}: expected {{\"prompt\": \"...\"}}, got {line[:60]}")
    return record["prompt"]


if __name__ == "__main__":
    config_lib.run(main, _flags, __doc__)

"""Compares greedy decoding with a cache to `generate()` of transformers on the same weights; prints a table.

Two processes, one of each environment, hold the model and answer in turns; a round times each batch size on both, the
order swapped from round to round, and the figure is the median over rounds of the ratio within a round. Both must give
the same tokens. Run it with fm_jax's Python; `--peer_python` is that of requirements_lm_eval_hf.txt.

Try:  python tests/peers/decode_speed.py --model gpt2 --peer_python .venv-lm-eval-hf/bin/python
      python tests/peers/decode_speed.py --model exported/ --cores 0 --peer_python .venv-lm-eval-hf/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np


def ours(folder, prompt_tokens, new_tokens):
    """Returns a function from a batch size to (seconds, tokens [B, new_tokens])."""
    import fm_jax

    lm = fm_jax.load(folder)

    def run(batch):
        prompts = make_prompts(batch, prompt_tokens, lm.config.model.vocab_size)
        begin = time.perf_counter()
        made = lm.complete(list(prompts), max_new_tokens=new_tokens, stop_ids=())
        return time.perf_counter() - begin, [each.tokens.tolist() for each in made]
    return run


def theirs(folder, prompt_tokens, new_tokens):
    """Returns the same of transformers: float32, dynamic cache, fused attention."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None   # no early end

    def run(batch):
        prompts = torch.from_numpy(make_prompts(batch, prompt_tokens, model.config.vocab_size))
        begin = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens,
                                  do_sample=False, pad_token_id=0)
        return time.perf_counter() - begin, made[:, prompt_tokens:].tolist()
    return run


def make_prompts(batch, length, vocab_size):
    """Returns int64 [batch, length]."""
    return np.random.default_rng(0).integers(10, vocab_size, (batch, length))


def serve(run):
    """Answers batch sizes on standard input, one a line."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)   # what libraries print goes elsewhere
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=out, flush=True)


def gpt2_like(folder):
    """Writes random weights: 6 layers, width 384, 6 heads, vocabulary 8,192, context 256."""
    import jax

    from fm_jax import config as config_lib, hf, objectives, sharding, tokenizer

    config = config_lib.resolve(config_lib.from_file("configs/causal_lm.py:bench_gpt2"))
    objective = objectives.load(config)
    params, _ = sharding.unbox(objective.init(jax.random.key(0)))
    # A tokenizer with as many ids as the model: ours draws none that its tokenizer lacks.
    words = tokenizer.bpe_json({f"<{i}>": i for i in range(config.model.vocab_size)}, [], {0: "<0>"}, decoder=None)
    settings = {"bos_token": "<0>", "eos_token": "<0>"}
    named = tokenizer.HuggingFaceTokenizer(json.dumps(words).encode(), json.dumps(settings).encode(), "made up")
    hf.save(folder, config, jax.device_get(params), named)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", default="gpt2", help="a Hugging Face folder, or gpt2: random weights of that shape")
    flags.add_argument("--peer_python")
    flags.add_argument("--batches", default="1,8")
    flags.add_argument("--prompt_tokens", type=int, default=16)
    flags.add_argument("--new_tokens", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--cores", help="comma-separated; default: all")
    flags.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.side:
        serve({"ours": ours, "theirs": theirs}[args.side](args.model, args.prompt_tokens, args.new_tokens))
        return
    if args.peer_python is None:
        flags.error("--peer_python is required")
    if args.cores:
        os.sched_setaffinity(0, {int(c) for c in args.cores.split(",")})
    with tempfile.TemporaryDirectory() as made:
        if args.model == "gpt2":
            gpt2_like(f"{made}/gpt2")
        compare(args, f"{made}/gpt2" if args.model == "gpt2" else args.model)


def compare(args, folder):
    start = lambda side, python: subprocess.Popen(
        [python, __file__, "--side", side, "--model", folder, "--prompt_tokens", str(args.prompt_tokens),
         "--new_tokens", str(args.new_tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    sides = {"ours": start("ours", sys.executable), "theirs": start("theirs", args.peer_python)}

    def ask(side, batch):
        print(batch, file=sides[side].stdin, flush=True)
        answer = sides[side].stdout.readline()
        if not answer:
            raise SystemExit(f"{side}: the process has ended, see above")
        return json.loads(answer)

    batches, ratios = [int(b) for b in args.batches.split(",")], {}
    for batch in batches:   # compiles, warms up
        a, b = ask("ours", batch)[1], ask("theirs", batch)[1]
        same = sum(x == y for x, y in zip(a, b))
        print(f"batch {batch}: {same} of {batch} rows have the same {args.new_tokens} tokens")
    print(f"{'round':>5} {'batch':>5} {'ours tok/s':>11} {'theirs tok/s':>13} {'ratio':>6}")
    for i in range(args.rounds):
        for batch in batches:
            s = {side: ask(side, batch)[0] for side in list(sides)[:: 1 if i % 2 == 0 else -1]}
            tokens = batch * args.new_tokens
            ratios.setdefault(batch, []).append(s["theirs"] / s["ours"])
            print(f"{i:>5} {batch:>5} {tokens / s['ours']:>11.1f} {tokens / s['theirs']:>13.1f} "
                  f"{ratios[batch][-1]:>6.2f}", flush=True)
    for batch, r in ratios.items():
        print(f"batch {batch}, ours to theirs: {statistics.median(r):.2f} [{min(r):.2f} to {max(r):.2f}]")
    for process in sides.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()

"""Prints tokens/s of the data pipeline on one core: packed rows of 1,024 in batches of 32, end to end.

From memory-mapped shards (the standard library's source as bytes) to the examples of the causal
language model: tokens, targets, segment ids, positions, weights. The goal is 50 million.

    PYTHONPATH=. python tests/peers/data_throughput.py [--fim_rate 0.5] [--tokenizer data/x/tokenizer --texts '*.jsonl']

With --texts and --tokenizer it also prints tokens/s of tokenizing.
"""

import argparse
import os
import statistics
import tempfile
import time

from fm_jax import config as configs
from fm_jax import tokenizer as tokenizers
from fm_jax.data import documents, prepared
from fm_jax.data.batches import open_batches
from fm_jax.objectives.causal_lm import CausalLM


def rate(batches, tokens_per_batch, seconds=2.0):
    """Returns tokens/s of an iterator of batches."""
    for _ in range(20):
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count * tokens_per_batch / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fim_rate", type=float, default=0.0, help="share of documents with a middle to fill in")
    parser.add_argument("--texts")
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = configs.defaults()
    config.seq_len, config.batch_size = 1024, 32
    objective = CausalLM(config, tokenizers.load("bytes"), fim_rate=args.fim_rate)
    with tempfile.TemporaryDirectory() as folder:
        config.data.train = os.path.join(folder, "data")
        prepared.prepare(documents.open_sources("catalogue:python_stdlib"), "bytes", config.data.train)
        opened = open_batches(config, objective)
        for name, make in (("batch by batch", lambda: (opened.batch(t) for t in range(2 ** 62))),
                           ("prefetched by Grain", opened.iterate)):
            rates = [rate(make(), config.batch_size * config.seq_len) / 1e6 for _ in range(3)]
            print(f"{name}: {statistics.median(rates):.1f} M tokens/s [{min(rates):.1f}-{max(rates):.1f}]")
    if args.texts and args.tokenizer:
        texts = [t for s in documents.open_sources(args.texts) for t in s.texts()]
        tokenizer, began = tokenizers.load(args.tokenizer), time.perf_counter()
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
        print(f"tokenizing: {tokens / (time.perf_counter() - began) / 1e6:.2f} M tokens/s")


if __name__ == "__main__":
    main()

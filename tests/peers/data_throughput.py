"""Prints tokens/s of the data pipeline on one core: packed rows of 1,024 in batches of 32, end to end.

Examples are made as a causal language model needs them (tokens, targets, segment ids, positions,
weights), from the standard library's source tokenized as bytes. The goal is 50 million.

    PYTHONPATH=. python tests/peers/data_throughput.py [--tokenizer_folder data/x/tokenizer --texts 'texts/*.jsonl']

With --texts and --tokenizer_folder it also prints tokens/s of tokenizing.
"""

import argparse
import os
import statistics
import tempfile
import time

import numpy as np

from fm_jax import tokenizer as tokenizers
from fm_jax.data import documents, prepared
from fm_jax.data.batches import Batches
from fm_jax.data.mixture import Mixture


class CausalExamples:
    def examples(self, records, seeds):
        tokens, segments = records["tokens"], records["segment_ids"]
        inputs = segments[:, :-1]
        index = np.arange(inputs.shape[1], dtype=np.int32)
        starts = np.diff(inputs, axis=1, prepend=-1) != 0
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        weights = ((inputs == segments[:, 1:]) & (inputs > 0)).astype(np.float32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": inputs, "positions": positions,
                "weights": weights}


def batch_rate(rows, batch_size, prefetch, seconds=2.0):
    """Returns tokens/s of `Batches.iterate`, or of `Batches.batch` where `prefetch` is 0."""
    batches = Batches(Mixture([rows], seed=0), CausalExamples(), batch_size=batch_size, num_batches=None, seed=0,
                      prefetch_batches=prefetch)
    iterator = batches.iterate() if prefetch else (batches.batch(t) for t in range(2 ** 62))
    for _ in range(20):
        next(iterator)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(iterator)
        count += 1
    return count * batch_size * rows.seq_len / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts")
    parser.add_argument("--tokenizer_folder")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data")
        prepared.prepare(documents.open_sources("catalogue:python_stdlib"), "bytes", data)
        rows = prepared.Rows(data, "train", 1024)
        for name, prefetch in (("batch by batch", 0), ("prefetched by Grain", 2)):
            rates = [batch_rate(rows, 32, prefetch) / 1e6 for _ in range(3)]
            print(f"{name}: {statistics.median(rates):.1f} M tokens/s [{min(rates):.1f}-{max(rates):.1f}]")
    if args.texts and args.tokenizer_folder:
        texts = [t for s in documents.open_sources(args.texts) for t in s.texts()]
        tokenizer = tokenizers.load(args.tokenizer_folder)
        began = time.perf_counter()
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
        print(f"tokenizing: {tokens / (time.perf_counter() - began) / 1e6:.2f} M tokens/s")


if __name__ == "__main__":
    main()

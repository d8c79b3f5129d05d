"""The baselines: command-line compressors, and Witten-Bell n-grams against a brute-force count with dicts."""

import collections
import math
import shutil
import subprocess

import numpy as np
import pytest

from fm_jax.evals import baselines


class BruteForce:
    """Witten-Bell by its recursive definition: every history's followers in a dict. Zero bytes stand before a text."""

    def __init__(self, texts, order):
        self.order, self.after = order, collections.defaultdict(collections.Counter)
        for text in texts:
            data = bytes(order - 1) + text.encode()
            for i in range(order - 1, len(data)):
                for n in range(order):
                    self.after[data[i - n : i]][data[i]] += 1

    def p(self, byte, history):
        shorter = self.p(byte, history[1:]) if history else 1 / 256
        counts = self.after.get(history)
        if counts is None:
            return shorter
        total, different = sum(counts.values()), len(counts)
        return (counts[byte] + different * shorter) / (total + different)

    def bits_per_byte(self, texts):
        bits = size = 0
        for text in texts:
            data = bytes(self.order - 1) + text.encode()
            for i in range(self.order - 1, len(data)):
                bits -= math.log2(self.p(data[i], data[i - self.order + 1 : i]))
                size += 1
        return bits / size


def random_texts(n, seed, letters="abcd é"):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(letters)))
    return ["".join(rng.choice(list(letters), rng.integers(1, 60), p=weights)) for _ in range(n)]


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_ngrams_equal_brute_force(order):
    train, held_out = random_texts(30, 0), random_texts(10, 1) + ["zzz, never seen: ü"]
    got = baselines.NGram(train, order).bits_per_byte(held_out)
    assert got == pytest.approx(BruteForce(train, order).bits_per_byte(held_out), rel=1e-12)   # both float64


def test_ngram_probabilities_sum_to_one():
    """p(b | history) of all bytes that may come next, by scoring a text that ends in each of them.

    Texts must be UTF-8, so single bytes are scored within ASCII, and what remains is for the other 128.
    """
    train = random_texts(30, 0, "abcd")
    model, brute = baselines.NGram(train, 3), BruteForce(train, 3)
    for history in ("", "a", "ab", "dcba", "zq", "az"):
        context = (bytes(2) + history.encode())[-2:]
        before = model.bits_per_byte([history]) * len(history) if history else 0.0
        ascii_p = [2 ** (before - model.bits_per_byte([history + chr(b)]) * (len(history) + 1)) for b in range(128)]
        rest = 128 * brute.p(200, context)   # bytes never seen are all alike
        assert sum(ascii_p) + rest == pytest.approx(1, abs=1e-9)
        assert sum(brute.p(b, context) for b in range(256)) == pytest.approx(1, abs=1e-12)


def test_more_text_of_the_kind_is_better_coded():
    texts = random_texts(200, 0)
    few, many = (baselines.NGram(texts[10 : 10 + n], 3).bits_per_byte(texts[:10]) for n in (2, 190))
    assert many < few < 8


@pytest.mark.parametrize("tool, flags, ours", [("gzip", ["-9"], baselines.gzip_bits_per_byte),
                                               ("xz", ["-9e"], baselines.xz_bits_per_byte)])
def test_compressors_equal_the_command_lines(tool, flags, ours):
    if not shutil.which(tool):
        pytest.skip(f"no {tool} command here")
    texts = random_texts(200, 2, "abcdefgh .")
    data = "\n".join(texts).encode()
    size = len(subprocess.run([tool, *flags, "--stdout"], input=data, capture_output=True, check=True).stdout)
    # The formats' headers may differ by a name, a time or a checksum: a few bytes.
    assert abs(ours(texts) * len(data) / 8 - size) <= 32

"""What needs no neural network: compressors and an n-gram model, in bits per byte of held-out text. Layer 4."""

import gzip
import lzma
from collections.abc import Iterable

import numpy as np


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Returns 8 x compressed size / size of all texts together, by gzip -9."""
    data = "\n".join(texts).encode()
    return 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Returns the same by xz -9e."""
    data = "\n".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


class NGram:
    """A byte n-gram model: each order's counts, interpolated by Witten-Bell, down to 1/256 for any byte.

    p_n(b | h) = (c(h b) + u(h) p_{n-1}(b | h')) / (c(h) + u(h)), with c the counts of the history h of n - 1
    bytes, u how many different bytes followed it, and h' the history without its first byte.
    Source: Witten and Bell 1991; Chen and Goodman 1998, section 2.5.
    """

    def __init__(self, texts: Iterable[str], order: int = 5):
        """Counts on `texts`; `order` is the longest n-gram, the predicted byte included."""
        self.order = order
        grams = [self._grams(t) for t in texts]
        self._counts = []   # for n = 1..order: (sorted n-grams, counts, sorted histories, totals, different followers)
        for n in range(1, order + 1):
            grams_n, counts = np.unique(np.concatenate([g[n - 1] for g in grams]), return_counts=True)
            histories, first = np.unique(grams_n >> np.uint64(8), return_index=True)
            totals = np.add.reduceat(counts, first)
            followers = np.diff(np.append(first, len(grams_n)))
            self._counts.append((grams_n, counts, histories, totals, followers))

    def bits_per_byte(self, texts: Iterable[str]) -> float:
        """Returns the mean of -log2 p(byte | the order - 1 bytes before it in its text), over all texts."""
        bits, size = 0.0, 0
        for text in texts:
            p = np.full(len(text.encode()), 1 / 256)
            for grams, (known, counts, histories, totals, followers) in zip(self._grams(text), self._counts):
                c, _ = _look_up(known, counts, grams)
                total, seen = _look_up(histories, totals, grams >> np.uint64(8))
                u, _ = _look_up(histories, followers, grams >> np.uint64(8))
                p = np.where(seen, (c + u * p) / np.maximum(total + u, 1), p)
            bits -= np.log2(p).sum()
            size += len(p)
        return bits / size

    def _grams(self, text):
        """Returns for n = 1..order (at most 8) the n-gram ending at each byte, uint64; zeros stand before the text."""
        data = np.frombuffer(text.encode(), np.uint8).astype(np.uint64)
        padded = np.concatenate([np.zeros(self.order - 1, np.uint64), data])
        out, gram = [], np.zeros(len(data), np.uint64)
        for n in range(self.order):
            gram = gram | (padded[self.order - 1 - n : len(padded) - n] << np.uint64(8 * n))
            out.append(gram)
        return out


def _look_up(keys, values, wanted):
    """Returns (value or 0, whether it is there) of each wanted key among sorted keys."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[at] == wanted
    return np.where(there, values[at], 0).astype(np.float64), there

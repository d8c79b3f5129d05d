"""What needs no neural network. Layer 4.

Compressors and an n-gram model, in bits per byte of held-out text; BM25, which finds texts by their words; a dictionary
of the entities that were seen.
"""

import collections
import gzip
import lzma
import re
from collections.abc import Iterable, Sequence

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


class BM25:
    """Texts by the words of a query: the sum over its words of idf * tf (k1 + 1) / (tf + k1 (1 - b + b length / mean)).

    idf = ln(1 + (N - n + 1/2) / (n + 1/2)) of N texts, n of which have the word. Words are lower case, of letters,
    digits and underscores.
    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework", equation 3.15, with the idf of Lucene,
    which is never negative.
    """

    def __init__(self, texts: Iterable[str], *, k1: float = 1.5, b: float = 0.75):
        counts = [collections.Counter(words_of(text)) for text in texts]
        self._size, lengths = len(counts), np.array([sum(c.values()) for c in counts], np.float64)
        found = collections.defaultdict(list)
        for document, words in enumerate(counts):
            for word, tf in words.items():
                found[word].append((document, tf))
        part = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        self._found = {}    # word: (its texts, what it adds to the score of each)
        for word, pairs in found.items():
            documents, tf = np.array(pairs).T
            idf = np.log(1 + (self._size - len(pairs) + 0.5) / (len(pairs) + 0.5))
            self._found[word] = documents, idf * tf * (k1 + 1) / (tf + part[documents])

    def scores(self, query: str) -> np.ndarray:
        """Returns float64 [N], the score of each text."""
        out = np.zeros(self._size)
        for word in words_of(query):
            if word in self._found:
                documents, values = self._found[word]
                out[documents] += values
        return out


def words_of(text: str) -> list[str]:
    """Returns the words that `BM25` knows of a text."""
    return re.findall(r"\w+", text.lower())


class Dictionary:
    """Entities by looking them up: the longest runs of words that were one in half of their places or more.

    Case does not count. Tags are O, B-type and I-type.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]):
        entities, seen = collections.defaultdict(collections.Counter), collections.Counter()
        for words, own in zip(texts, tags):
            words, i = [w.lower() for w in words], 0
            while i < len(own):
                j = i + 1
                while own[i] != "O" and j < len(own) and own[j] == f"I-{own[i][2:]}":
                    j += 1
                if own[i] != "O":
                    entities[tuple(words[i:j])][own[i][2:]] += 1
                i = j
        self._longest = max(map(len, entities), default=0)
        for words in texts:
            for run, _, _ in self._runs(words):
                seen[run] += run in entities
        self._kind = {run: kinds.most_common(1)[0][0] for run, kinds in entities.items()
                      if 2 * kinds.most_common(1)[0][1] >= seen[run]}

    def tag(self, words: Sequence[str]) -> list[str]:
        """Returns the tag of each word."""
        tags = ["O"] * len(words)
        for run, i, j in sorted(self._runs(words), key=lambda run: (run[1] - run[2], run[1])):   # the longest first
            if run in self._kind and all(tag == "O" for tag in tags[i:j]):
                tags[i:j] = [f"B-{self._kind[run]}"] + [f"I-{self._kind[run]}"] * (j - i - 1)
        return tags

    def _runs(self, words):
        """Returns (lower-case words, first, one behind the last) of every run that could be an entity."""
        low = [word.lower() for word in words]
        return [(tuple(low[i:j]), i, j) for i in range(len(low))
                for j in range(i + 1, min(i + self._longest, len(low)) + 1)]

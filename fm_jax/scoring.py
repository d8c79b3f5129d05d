"""Log-probabilities of text under a causal model: (context, continuation) pairs, and whole texts. Layer 3.

Tokenising, truncation and windows follow lm-evaluation-harness 0.4.13, so that its numbers and ours agree. What is
computed does not: the requests are one tree of tokens, in which equal beginnings are one branch, and each token of it
goes through the model once. `batches` cuts the tree into rows of a few lengths. A beginning that too many requests
share for one row, as the worked examples of a subject, is a trunk: it is computed first, and rows attend to its keys
and values.
"""

import bisect
from collections.abc import Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.data.prepared import document_ends
from fm_jax.errors import UserError
from fm_jax.model import Trunk

SMALLEST_ROW = 64     # tokens: rows and trunks have this length (rows if they hold all there is), or
ROW = 256             # this, 384, 512, 640 and so on
LONGEST_TREE = 1024   # tokens of a tree that many requests share; longer ones are cut behind a trunk, or in pieces
SHORTEST_TRUNK = 32   # a shorter beginning is repeated in each piece rather than computed before
# Attention to so many keys takes as long as the rest of a token. SmolLM2-135M, float32, 2 EPYC cores, 2026-11: 1,900.
KEYS_PER_TOKEN = 2000


class Score(NamedTuple):
    logprob: float      # natural, of all continuation tokens together
    is_greedy: bool     # every one of them was the most likely token
    num_tokens: int


@dataclasses.dataclass
class Work:
    """What `score` did; it adds to the one it is given."""

    requests: int = 0
    tokens: int = 0      # of the requests
    computed: int = 0    # of their tree: each once, but for beginnings that pieces of it repeat
    places: int = 0      # of all rows, padding included
    truncated: int = 0   # requests longer than the model's context, which lost tokens at their left
    shapes: dict[str, int] = dataclasses.field(default_factory=dict)   # forward passes of each compiled shape

    def __str__(self):
        shapes = ", ".join(f"{shape} ({n})" for shape, n in self.shapes.items())
        return (f"{self.requests:,} requests of {self.tokens:,} tokens, {self.truncated:,} cut at their left: "
                f"{self.computed:,} tokens computed, {1 - self.computed / max(self.places, 1):.0%} padding, "
                f"{len(self.shapes)} shapes: {shapes}")


# --- from text to pairs -----------------------------------------------------------------------------------------------

def encode(tokenizer, texts) -> list[np.ndarray]:
    """Returns the token ids of each text, int32 [n], as the harness reads it with the same tokenizer.

    A special token that a text spells is that token. The beginning-of-text token comes first where the tokenizer's
    file puts it there, unless the text begins with it.
    """
    ids = tokenizer.encode_batch(texts, special=True)
    if not tokenizer.adds_bos:
        return ids
    return [i if i[:1].tolist() == [tokenizer.bos_id] else np.array([tokenizer.bos_id, *i], np.int32) for i in ids]


def encode_pairs(tokenizer, contexts, continuations) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (context ids, continuation ids), int32, of each pair of texts.

    White space at the end of a context moves to its continuation; the two are tokenised as one text and cut where
    the context's own tokens end. A context without tokens becomes the beginning-of-text token, unless the
    continuation begins with it. Equal texts are tokenised once, all together.

    Raises:
      UserError: an empty continuation, or a context of white space alone.
    """
    kept = [context.rstrip() for context in contexts]
    for context, stripped, continuation in zip(contexts, kept, continuations):
        if not continuation:
            raise UserError("an empty continuation has no probability; give at least one character")
        if context and not stripped and not tokenizer.adds_bos:
            raise UserError(f"the context {context!r} is only white space; leave it empty or give it a word")
    whole = [a + b for a, b in zip(contexts, continuations) if a]
    texts = list(dict.fromkeys([*whole, *(k for a, k in zip(contexts, kept) if a)]))
    alone = list(dict.fromkeys(b for a, b in zip(contexts, continuations) if not a))
    ids = dict(zip(texts, encode(tokenizer, texts)))
    ids_alone = dict(zip(alone, tokenizer.encode_batch(alone, special=True)))
    prefix, pairs = None, []
    for context, stripped, continuation in zip(contexts, kept, continuations):
        both = ids[context + continuation] if context else ids_alone[continuation]
        before = ids[stripped] if context else both[:0]
        if len(before):
            pairs.append((before, both[len(before):]))
            continue
        # Empty, or of characters that the tokenizer drops, such as a zero-width space.
        prefix = document_ends(tokenizer)[0] if prefix is None else prefix
        pairs.append((np.array([prefix], np.int32), both[both[:1].tolist() == [prefix]:]))
    return pairs


def windows(tokens, prefix: int, max_length: int):
    """Returns (context, continuation) pairs that score each token of a text once, in windows of the model's context.

    The first window follows `prefix`; each later one predicts up to `max_length` further tokens, seeing as many
    tokens before its last as fit.
    """
    tokens, n = list(map(int, tokens)), len(tokens)
    pairs = [([prefix], tokens[:max_length])] if n else []
    done = min(max_length, n)
    while done < n:
        k = min(max_length, n - done)
        pairs.append((tokens[done + k - max_length - 1 : done], tokens[done : done + k]))
        done += k
    return pairs


# --- from pairs to log-probabilities ----------------------------------------------------------------------------------

def score(objective, params, pairs, *, batch_size: int = 16, work: Work | None = None) -> list[Score]:
    """Returns the scores of pairs of token-id lists, in their order; a context too long is cut at its left.

    Args:
      batch_size: rows of 128 tokens in a forward pass, and as many fewer of longer ones. The scores do not depend on
        it, nor on the other pairs. Of SmolLM2-135M on two cores, 2,048 tokens take 5% less time each than 1,024.
      work: to this is added what was computed.

    Raises:
      UserError: a context without tokens, or a continuation without any or longer than the model's context.
    """
    arch, layout = objective.arch, objective.module.layout
    longest, parts = arch.max_seq_len, layout.batch_parts if layout else 1
    work = Work() if work is None else work
    inputs, targets = [], []
    for context, continuation in pairs:
        if not len(context):
            raise UserError("a context of 0 tokens: nothing predicts the first token of its continuation; give at "
                            "least the beginning-of-text token")
        if not 0 < len(continuation) <= longest:
            raise UserError(f"a continuation of {len(continuation)} tokens must have 1 to {longest}, the model's "
                            "context")
        inputs.append(np.concatenate([context, continuation[:-1]]).astype(np.int32)[-longest:])
        targets.append(np.asarray(continuation, np.int32))
        work.truncated += len(context) + len(continuation) > longest + 1
    work.requests += len(pairs)
    work.tokens += sum(map(len, inputs))
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    trees, head = objective.predict["trees"], objective.predict["score"]
    trunk = held = None
    before = []   # (owners, what `head` gave): fetched one pass late, so that the host never holds up the device

    def fetch(owners, found):
        logprobs, correct = (np.asarray(x)[: len(owners)] for x in found)
        np.add.at(sums, owners, logprobs)   # float64
        greedy[owners[correct == 0]] = False

    made = list(batches(inputs, targets, batch_size, parts))
    room = max((b.trunk + b.tokens_BT.shape[1] for b in made if b.kept), default=0)
    for batch in made:
        if batch.trunk and (held is None or held.length != batch.trunk):
            held = _cut(trunk, bucket(batch.trunk))._replace(length=np.int32(batch.trunk))
        hidden, taps = _trees(trees, params, batch.tokens_BT, batch.positions_BT, batch.last_BT,
                              held if batch.trunk else None, ("k", "v") if batch.kept else ())
        if batch.kept:
            if trunk is None:
                shape = arch.num_layers, bucket(room), arch.num_kv_heads, arch.head_dim
                trunk = Trunk(*(jnp.zeros(shape, arch.dtype) for _ in "kv"), np.int32(0))
            trunk, held = _joined(trunk, taps["k"], taps["v"], np.int32(batch.trunk)), None
        if n := len(batch.owners_N):
            padded = [np.pad(x, (0, bucket(n) - n)) for x in (batch.places_N, batch.targets_N)]
            before.append((batch.owners_N, _score(head, params, hidden, *padded)))
        work.computed += batch.computed
        work.places += batch.tokens_BT.size
        shape = "x".join(map(str, batch.tokens_BT.shape)) + (f" on {bucket(batch.trunk)}" if batch.trunk else "") + (
            " kept" if batch.kept else "")
        work.shapes[shape] = work.shapes.get(shape, 0) + 1
        while len(before) > 1:
            fetch(*before.pop(0))
    for each in before:
        fetch(*each)
    return [Score(float(s), bool(g), len(t)) for s, g, t in zip(sums, greedy, targets)]


def score_texts(objective, params, tokenizer, texts, *, batch_size: int = 16, work: Work | None = None) -> list[float]:
    """Returns the natural log-probability of each text, every token of it scored once."""
    pairs, owners = [], []
    prefix, _ = document_ends(tokenizer)
    for i, ids in enumerate(encode(tokenizer, texts)):
        made = windows(ids, prefix, objective.arch.max_seq_len)
        pairs += made
        owners += [i] * len(made)
    totals = [0.0] * len(texts)
    for i, s in zip(owners, score(objective, params, pairs, batch_size=batch_size, work=work)):
        totals[i] += s.logprob
    return totals


@functools.partial(jax.jit, static_argnames=("trees", "capture"))
def _trees(trees, params, tokens_BT, positions_BT, last_BT, trunk, capture):
    return trees(params, tokens_BT, positions_BT, last_BT, trunk, capture=capture)


@functools.partial(jax.jit, static_argnames="score")
def _score(score, params, hidden_BTD, places_N, targets_N):
    return score(params, hidden_BTD, places_N, targets_N)


@functools.partial(jax.jit, donate_argnums=0)
def _joined(trunk, k_LBTKH, v_LBTKH, start):
    """Returns the trunk with the first row's keys and values from place `start` on."""
    put = lambda held, new: jax.lax.dynamic_update_slice_in_dim(held, new[:, 0].astype(held.dtype), start, axis=1)
    return Trunk(put(trunk.k, k_LBTKH), put(trunk.v, v_LBTKH), trunk.length)


@functools.partial(jax.jit, static_argnums=1)
def _cut(trunk, length):
    """Returns the trunk's first `length` places."""
    return trunk._replace(k=trunk.k[:, :length], v=trunk.v[:, :length])


# --- from requests to rows --------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One forward pass: rows of trees, and what to read from it."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    last_BT: np.ndarray     # as in `model.Transformer`
    trunk: int              # so many tokens come before them all: those that earlier batches kept
    kept: int               # so many tokens of the first row are a trunk, or more of it, for later batches
    computed: int           # tokens that are not padding
    places_N: np.ndarray    # in [B * T]: where a target is predicted
    targets_N: np.ndarray
    owners_N: np.ndarray    # the request that the target belongs to


def bucket(n: int) -> int:
    """Returns the length of a row or trunk for n tokens: 64, 256, then multiples of 128, then four in a doubling."""
    if n <= ROW:
        return SMALLEST_ROW if n <= SMALLEST_ROW else ROW
    step = max(ROW // 2, 1 << (n - 1).bit_length() - 3)
    return -(-n // step) * step


def batches(inputs, targets, batch_size: int, parts: int) -> Iterator[Batch]:
    """Yields the forward passes over requests that read tokens `inputs` and predict `targets` with the last of them.

    inputs, targets: int32 arrays, one a request. parts: rows come in multiples of it.
    """
    tree = _Tree(inputs, targets)
    budget = batch_size * ROW // 2
    groups = [(0, len(tree.leaves), 0, 0)] if inputs else []
    while groups:
        low, high, start, end = groups.pop()
        for begin in range(start, end, budget):   # what the leaves low to high share, from place start to end
            stop = min(begin + budget, end)
            rows = _Rows(tree, begin, parts, bucket(stop - begin))
            rows.add(0, low, low + 1, stop)
            for leaf in range(low + 1, high):
                rows.read(leaf, begin, stop, np.arange(stop - begin))
            yield rows.batch(kept=stop - begin)
        pieces, inner = tree.pieces(low, high, end)
        groups += inner[::-1]
        # The longest rows first: what is to run out of memory does so at once.
        for length, packed in sorted(_packed([tree.size(*piece, end) for piece in pieces], end).items(), reverse=True):
            most = max(budget // length // parts, 1) * parts
            for first in range(0, len(packed), most):
                chosen = packed[first : first + most]
                fewest = 1 << (-(-len(chosen) // parts) - 1).bit_length()
                rows = _Rows(tree, end, min(fewest * parts, most), length)
                for row, numbers in enumerate(chosen):
                    for number in numbers:
                        rows.add(row, *pieces[number])
                yield rows.batch()


def _packed(sizes: list[int], trunk: int) -> dict[int, list[list[int]]]:
    """Returns {length: rows of that length}, a row being the numbers of the trees in it, given their sizes in tokens.

    First fit, the largest first, each row of the length at which a token takes the least time.
    """
    left, rows, total = sorted((size, number) for number, size in enumerate(sizes) if size), {}, sum(sizes)
    while left:
        best = None
        length = bucket(left[-1][0] if total <= SMALLEST_ROW else max(left[-1][0], ROW))
        while True:
            room, taken, at = length, [], len(left)
            while at := bisect.bisect_left(left, (room + 1,), 0, at):
                at -= 1
                taken.append(at)
                room -= left[at][0]
            cost = length * (1 + (length / 2 + trunk) / KEYS_PER_TOKEN) / (length - room)
            if best is None or cost < best[0]:
                best = cost, length, taken, room
            if length >= LONGEST_TREE or len(taken) == len(left):
                break
            length = bucket(length + 1)
        _, length, taken, room = best
        total -= length - room
        rows.setdefault(length, []).append([left[at][1] for at in taken])
        for at in taken:   # from the back
            del left[at]
    return rows


class _Tree:
    """The distinct inputs of all requests in their lexical order: that of the leaves of the tree of their tokens."""

    def __init__(self, inputs, targets):
        keys = [ids.astype(">i4").tobytes() for ids in inputs]   # bytes in their order, as the ids they are of
        leaves = sorted(set(keys))
        number = {key: leaf for leaf, key in enumerate(leaves)}
        self.leaves = [np.frombuffer(key, ">i4").astype(np.int32) for key in leaves]
        self.lengths = np.array([len(ids) for ids in self.leaves])
        # Tokens that a leaf has in common with the one before it.
        self.shared = np.array([0] + [_common(a, b) for a, b in zip(self.leaves, self.leaves[1:])])
        self._added = np.concatenate([[0], np.cumsum(self.lengths - self.shared[: len(leaves)])])
        self.requests = [[] for _ in leaves]   # of each leaf: (request, first place that predicts, targets)
        for request, (key, wanted) in enumerate(zip(keys, targets)):
            leaf = number[key]
            self.requests[leaf].append((request, int(self.lengths[leaf]) - len(wanted), wanted))
        # The first place that is read.
        self.first = np.array([min(begin for _, begin, _ in found) for found in self.requests])

    def size(self, low, high, depth) -> int:
        """Returns the tokens of the leaves low to high behind the first `depth`, which they share."""
        return int(self.lengths[low] - depth + self._added[high] - self._added[low + 1])

    def pieces(self, low, high, depth):
        """Returns (trees, groups) of the leaves low to high: what one row can hold, and what needs a trunk first.

        A tree is (low, high); a group (low, high, start and end of its trunk).
        """
        trees, groups, todo = [], [], [(low, high)]
        while todo:
            a, b = todo.pop()
            size, longest = self.size(a, b, depth), int(self.lengths[a:b].max()) - depth
            if size <= max(LONGEST_TREE, longest * 5 // 4):   # mostly one sequence, of whatever length: it has no waste
                trees.append((a, b))
                continue
            end = int(self.shared[a + 1 : b].min())
            if end - depth >= SHORTEST_TRUNK:
                groups.append((a, b, depth, end))
                continue
            starts = [a, *(a + 1 + np.flatnonzero(self.shared[a + 1 : b] == end)).tolist()]
            branches = list(zip(starts, [*starts[1:], b]))
            if end > depth:   # branches that share a few tokens: so many in a tree that repeating them costs little
                most, joined = min(32 * (end - depth), ROW), branches[:1]
                for c, d in branches[1:]:
                    whole = joined[-1][0], d
                    joined[-1:] = [whole] if self.size(*whole, depth) <= most else [joined[-1], (c, d)]
                branches = joined
            todo += branches
        return trees, groups


def _common(a, b) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class _Rows:
    """The arrays of a batch, being filled with trees that all go on from the first `trunk` tokens of their leaves."""

    def __init__(self, tree, trunk, B, T):
        self._tree, self._trunk, self._used = tree, trunk, np.zeros(B, int)
        self._tokens, self._positions = np.zeros((2, B, T), np.int32)
        self._last = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        self._reads = []

    def add(self, row, low, high, stop=None):
        """Adds the tree of the leaves low to high, or one leaf's tokens up to place `stop`."""
        tree, trunk, last = self._tree, self._trunk, self._last[row]
        at = np.zeros(tree.lengths[low:high].max() - trunk, int)   # of the present leaf's tokens
        end, before = self._used[row], 0
        for leaf in range(low, high):
            ids = tree.leaves[leaf][trunk:stop]
            shared = int(tree.shared[leaf]) - trunk if leaf > low else 0
            last[at[shared:before]] = end - 1   # what this leaf does not share is over
            new = slice(end, end + len(ids) - shared)
            self._tokens[row, new] = ids[shared:]
            self._positions[row, new] = np.arange(trunk + shared, trunk + len(ids))
            at[shared : len(ids)] = np.arange(new.start, new.stop)
            end, before = new.stop, len(ids)
            self.read(leaf, trunk, trunk + len(ids), self._last.shape[1] * row + at)
        last[at[:before]] = end - 1
        self._used[row] = end

    def read(self, leaf, start, stop, at):
        """Notes what the leaf's requests predict from places start to stop, which are at `at` of the batch."""
        if self._tree.first[leaf] >= stop:
            return
        for request, first, targets in self._tree.requests[leaf]:
            a, b = max(first, start), min(first + len(targets), stop)
            if a < b:
                self._reads.append((at[a - start : b - start], targets[a - first : b - first],
                                    np.full(b - a, request)))

    def batch(self, kept=0) -> Batch:
        nothing = np.zeros(0, int)
        places, targets, owners = (np.concatenate(x) for x in zip((nothing,) * 3, *self._reads))
        return Batch(self._tokens, self._positions, self._last, self._trunk, kept, int(self._used.sum()),
                     places.astype(np.int32), targets.astype(np.int32), owners)

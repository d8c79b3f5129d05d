"""Log-probabilities of text under a causal model: (context, continuation) pairs, and whole texts. Layer 3.

Tokenising, truncation and windows follow lm-evaluation-harness 0.4.13, so that its numbers and ours agree. What is
computed does not: the requests are one tree of tokens, in which equal beginnings are one branch, and each token of it
goes through the model once, but for beginnings of a few tokens. `batches` cuts the tree into rows of a few lengths. A
beginning that too many requests share for one row, as the worked examples of a subject, is a trunk: it is computed
first, and rows attend to the keys and values of as much of it as is theirs.
"""

import bisect
from collections.abc import Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import distributed
from fm_jax.data.prepared import document_ends
from fm_jax.errors import UserError
from fm_jax.model import Trunk

SMALLEST_ROW = 64     # tokens: rows have this length, or
ROW = 256             # this, 384, 512, 640 and so on; the trunks before them this, 384, 512, 768 and so on
LONGEST_TREE = 1024   # tokens of a tree that many requests share; longer ones are cut behind a trunk, or in pieces
SHORTEST_TRUNK = 24   # a shorter beginning is repeated in each piece rather than computed before
HEAD = 128            # places whose logits there are at a time: so many of 49,152 tokens stay in the processor's cache
# Time in that of a token, of SmolLM2-135M, float32, 2 EPYC cores, 2026-11. Attention to so many keys:
KEYS_PER_TOKEN = 2000
PASS = 32             # a forward pass, whatever is in it
COMPILED = 1024       # a shape to compile; it takes longer here, and nothing the next time, from jax's cache


class Score(NamedTuple):
    logprob: float      # natural, of all continuation tokens together
    is_greedy: bool     # every one of them was the most likely token
    num_tokens: int


class Shape(NamedTuple):
    """What a compiled forward pass is for."""

    rows: int
    length: int
    trunk: int = 0       # places of a trunk that the rows go on from
    kept: bool = False   # it gives keys and values: the first row is a trunk

    def __str__(self):
        return f"{self.rows}x{self.length}" + f" on {self.trunk}" * bool(self.trunk) + " kept" * self.kept


@dataclasses.dataclass
class Work:
    """What `score` did; it adds to the one it is given."""

    requests: int = 0
    tokens: int = 0      # of the requests
    computed: int = 0    # of their tree: each once, but for beginnings that pieces of it repeat
    places: int = 0      # of all rows, padding included
    truncated: int = 0   # requests longer than the model's context, which lost tokens at their left
    shapes: dict[Shape, int] = dataclasses.field(default_factory=dict)   # forward passes of each

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
    return [tokenizer.begun(ids) for ids in tokenizer.encode_batch(texts, special=True)]


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
      work: to this is added what was computed. Shapes that it has already are preferred.

    Raises:
      UserError: a context without tokens, or a continuation without any or longer than the model's context.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
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
    trunk = held = None   # (keys, values) [L, S, K, H], and as many places of it as the last batch went on from
    before = []   # (owners, what `head` gave): fetched one pass late, so that the host never holds up the device

    def fetch(owners, found):
        logprobs, correct = (x[: len(owners)] for x in distributed.fetch(found))
        np.add.at(sums, owners, logprobs)   # float64
        greedy[owners[correct == 0]] = False

    made = list(batches(inputs, targets, batch_size, parts, work.shapes))
    room = max((b.trunk_BS.shape[1] + b.tokens_BT.shape[1] * bool(b.kept) for b in made), default=0)
    for batch in made:
        S = batch.trunk_BS.shape[1]
        if S and (held is None or held[0].shape[1] != S):
            held = _cut(trunk, S)
        hidden, taps = _trees(trees, params, batch.tokens_BT, batch.positions_BT, batch.last_BT,
                              Trunk(*held, batch.trunk_BS) if S else None, ("k", "v") if batch.kept else ())
        if batch.kept:
            held = None
            if trunk is None:
                trunk = _zeros((arch.num_layers, room, arch.num_kv_heads, arch.head_dim), arch.dtype)
            trunk = _extended(trunk, taps["k"], taps["v"], np.int32(batch.positions_BT[0, 0]))
        late, before = before, []
        for places, rows, wanted, owners in _pieces(batch):
            before.append((owners, _score(head, params, _gathered(hidden, places), rows, wanted)))
        for each in late:
            fetch(*each)
        work.computed += batch.computed
        work.places += batch.tokens_BT.size
        shape = Shape(*batch.tokens_BT.shape, S, batch.kept > 0)
        work.shapes[shape] = work.shapes.get(shape, 0) + 1
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


def _pieces(batch):
    """Yields (places, rows, targets, owners) of what is read from a batch: HEAD places at most, each once.

    rows: of each target, the number of its place in `places`. All but the owners are padded to few lengths.
    """
    places_P, rows_N = np.unique(batch.places_N, return_inverse=True)
    for begin in range(0, len(places_P), HEAD):
        chosen = np.flatnonzero((begin <= rows_N) & (rows_N < begin + HEAD))
        places = places_P[begin : begin + HEAD]
        size = HEAD // 2 if len(places) <= HEAD // 2 else HEAD
        length = size << max(-(-len(chosen) // size) - 1, 0).bit_length()
        pad = lambda x, n: np.pad(x, (0, n - len(x))).astype(np.int32)
        yield (pad(places, size), pad(rows_N[chosen] - begin, length), pad(batch.targets_N[chosen], length),
               batch.owners_N[chosen])


@functools.partial(jax.jit, static_argnames=("trees", "capture"))
def _trees(trees, params, tokens_BT, positions_BT, last_BT, trunk, capture):
    return trees(params, tokens_BT, positions_BT, last_BT, trunk, capture=capture)


@jax.jit
def _gathered(hidden_BTD, places_P):
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places_P]


@functools.partial(jax.jit, static_argnames="score")
def _score(score, params, hidden_PD, rows_N, targets_N):
    return score(params, hidden_PD, rows_N, targets_N)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape, dtype):
    return tuple(jnp.zeros(shape, dtype) for _ in "kv")


@functools.partial(jax.jit, donate_argnums=0)
def _extended(trunk, k_LBTKH, v_LBTKH, start):
    """Returns the trunk's keys and values with those of the first row from place `start` on."""
    put = lambda held, new: jax.lax.dynamic_update_slice_in_dim(held, new[:, 0].astype(held.dtype), start, axis=1)
    return put(trunk[0], k_LBTKH), put(trunk[1], v_LBTKH)


@functools.partial(jax.jit, static_argnums=1)
def _cut(trunk, length):
    """Returns the first `length` places of the trunk."""
    return jax.tree.map(lambda held: held[:, :length], trunk)


# --- from requests to rows --------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One forward pass: rows of trees, and what to read from it."""

    tokens_BT: np.ndarray
    positions_BT: np.ndarray
    last_BT: np.ndarray     # as in `model.Transformer`
    trunk_BS: np.ndarray    # as `last_BS` in `model.Trunk`: what earlier batches kept and these trees go on from
    kept: int               # so many tokens of the first row are a trunk, or more of it, for later batches
    computed: int           # tokens that are not padding
    places_N: np.ndarray    # in [B * T]: where a target is predicted
    targets_N: np.ndarray
    owners_N: np.ndarray    # the request that the target belongs to


class Piece(NamedTuple):
    """The leaves low to high of the tree of all requests, from token `depth` on, up to which they are the same."""

    low: int
    high: int
    depth: int


def bucket(n: int, steps: int = 4) -> int:
    """Returns the length of a row for n tokens: 64, 256, then multiples of 128, then `steps` in a doubling."""
    if n <= ROW:
        return SMALLEST_ROW if n <= SMALLEST_ROW else ROW
    step = max(ROW // 2, (1 << (n - 1).bit_length() - 1) // steps)
    return -(-n // step) * step


def _trunk_bucket(n: int) -> int:
    return bucket(n, 2) if n else 0


def batches(inputs, targets, batch_size: int, parts: int, known=()) -> Iterator[Batch]:
    """Yields the forward passes over requests that read tokens `inputs` and predict `targets` with the last of them.

    inputs, targets: int32 arrays, one a request. parts: rows come in multiples of it. known: shapes to prefer.
    """
    tree, known = _Tree(inputs, targets), set(known)
    budget = batch_size * ROW // 2
    todo = [Piece(0, len(tree.leaves), 0)] if inputs else []
    while todo:
        piece = todo.pop()
        leaf, end, trees, groups = tree.plan(piece)
        for begin in range(piece.depth, end, budget):   # the trunk: tokens of one leaf, which others share up to
            stop = min(begin + budget, end)             # where they leave it
            rows = _Rows(tree, parts, bucket(stop - begin), _trunk_bucket(begin))
            rows.add(0, Piece(leaf, leaf + 1, begin), stop)
            for low, high, depth in trees + groups:
                for other in range(low, high):
                    if other != leaf:
                        rows.read(other, begin, min(stop, depth), np.arange(stop - begin))
            yield rows.batch(kept=stop - begin)
        # What needs a trunk of its own: the deepest first, as it writes over this one from its depth on.
        todo += sorted(groups, key=lambda group: group.depth)
        trees = [small for each in trees for small in tree.cut(each)]
        trees.sort(key=lambda each: -each.depth)   # in each row, as `trunk_BS` needs it
        trunk = _trunk_bucket(max((each.depth for each in trees), default=0))
        for shape, packed in _packed([tree.size(*each) for each in trees], trunk, budget, parts, known):
            known.add(shape)
            for first in range(0, len(packed), shape.rows):
                rows = _Rows(tree, *shape[:3])
                for row, numbers in enumerate(packed[first : first + shape.rows]):
                    for number in sorted(numbers):
                        rows.add(row, trees[number])
                yield rows.batch()


def _packed(sizes: list[int], trunk: int, budget: int, parts: int, known) -> list[tuple[Shape, list[list[int]]]]:
    """Returns (shape of its batches, rows) of each length of rows, the longest first.

    sizes: of trees, in tokens, behind a trunk of so many. A row is the numbers of the trees in it: the largest are
    placed first, each where the least room is left. A batch has at most `budget` tokens, four times that with the
    places of the trunk in each row, or `parts` rows. Of the lengths that rows can have, those are taken that make the
    time of all batches least.
    """
    order = sorted((size, number) for number, size in enumerate(sizes) if size)[::-1]
    if not order:
        return []
    (longest, _), (least, _) = order[0], order[-1]

    def filled(lengths):
        """Returns {length: rows}."""
        rooms, rows = [], {length: [] for length in lengths}
        for size, number in order:
            at = bisect.bisect_left(rooms, (size,))
            if at < len(rooms):
                room, length, row = rooms.pop(at)
            else:
                room = length = lengths[bisect.bisect_left(lengths, size)]
                row = len(rows[length])
                rows[length].append([])
            rows[length][row].append(number)
            if room - size >= least:
                bisect.insort(rooms, (room - size, length, row))
        return rows

    def batched(length, count):
        """Returns (time in tokens, shape) of the batches of so many rows."""
        row = length * (1 + (length / 2 + trunk) / KEYS_PER_TOKEN)
        most = min(budget // length, 4 * budget // (length + trunk))
        shapes = (Shape(n, length, trunk) for n in range(parts, max(most, parts) + 1, parts))
        return min((-(-count // shape.rows) * (PASS + shape.rows * row) + COMPILED * (shape not in known), shape)
                   for shape in shapes)

    def cost(rows):
        return sum(batched(length, len(each))[0] for length, each in rows.items() if each)

    candidates = {bucket(size) for size, _ in order} | {bucket(n) for n in range(1, LONGEST_TREE, SMALLEST_ROW)}
    tried = {(length,): filled([length]) for length in candidates if length >= longest}
    lengths, rows = min(tried.items(), key=lambda each: cost(each[1]))
    while len(lengths) < len(candidates):
        tried = {each: filled(each) for each in (tuple(sorted({*lengths, n})) for n in candidates - {*lengths})}
        better = min(tried.items(), key=lambda each: cost(each[1]))
        if cost(better[1]) >= cost(rows):
            break
        lengths, rows = better
    return [(batched(length, len(rows[length]))[1], rows[length]) for length in lengths[::-1] if rows[length]]


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

    def plan(self, piece):
        """Returns (leaf, end, trees, groups), pieces both: what a row can hold, and what needs a trunk first.

        They hang on a trunk: on the tokens of `leaf` from the piece's depth to `end`, each from its own depth on. The
        trunk goes where most tokens are. There is none, end is the piece's depth, where it would be short.
        """
        low, high, end = piece
        leaf, found = low, []
        while self._large(low, high, end):
            branches, end = self._branches(low, high)
            *light, (low, high) = sorted(branches, key=lambda each: self.size(*each, end))
            found += [Piece(*each, end) for each in light]
            leaf = low
        found.append(Piece(low, high, end))
        if end - piece.depth < SHORTEST_TRUNK and len(found) > 1:
            found, end = self._runs(*piece), piece.depth
        trees, groups = [], []
        for each in found:
            if not self._large(*each):
                trees.append(each)
                continue
            _, stop, within, further = self.plan(each)
            if stop > each.depth:
                groups.append(each)
            else:
                trees, groups = trees + within, groups + further
        return leaf, end, trees, groups

    def cut(self, piece):
        """Returns the piece as smaller ones that repeat few tokens and fill rows better, where there are such."""
        if self.size(*piece) <= ROW // 2:
            return [piece]
        _, end = self._branches(*piece[:2])
        if piece.high - piece.low == 1 or 32 * (end - piece.depth) > ROW // 2:
            return [piece]
        return [small for each in self._runs(*piece) for small in self.cut(each)]

    def _large(self, low, high, depth):
        size, longest = self.size(low, high, depth), int(self.lengths[low:high].max()) - depth
        return size > max(LONGEST_TREE, longest * 5 // 4)   # mostly one sequence, of whatever length, has no waste

    def _branches(self, low, high):
        """Returns ((low, high) of each branch of the leaves low to high, how many tokens all of them share)."""
        shared = self.shared[low + 1 : high]
        end = int(shared.min()) if len(shared) else int(self.lengths[low])
        starts = [low, *(low + 1 + np.flatnonzero(shared == end)).tolist()]
        return list(zip(starts, [*starts[1:], high])), end

    def _runs(self, low, high, depth):
        """Returns the branches of a piece as pieces: so many in each that repeating what they share costs little."""
        branches, end = self._branches(low, high)
        most, runs = min(32 * (end - depth), ROW, LONGEST_TREE), []
        for a, b in branches:
            if runs and self.size(runs[-1].low, b, depth) <= most:
                a = runs.pop().low
            runs.append(Piece(a, b, depth))
        return runs


def _common(a, b) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class _Rows:
    """The arrays of a batch, being filled with trees; in a row they come by their depths, the deepest first."""

    def __init__(self, tree, B, T, trunk):
        self._tree, self._used = tree, np.zeros(B, int)
        self._tokens, self._positions = np.zeros((2, B, T), np.int32)
        self._last = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        self._trunk = np.full((B, trunk), -1, np.int32)
        self._reads = []

    def add(self, row, piece, stop=None):
        """Adds a tree, or of one leaf the tokens up to place `stop`."""
        (low, high, depth), tree, last = piece, self._tree, self._last[row]
        at = np.zeros(tree.lengths[low:high].max() - depth, int)   # of the present leaf's tokens
        end, before = self._used[row], 0
        for leaf in range(low, high):
            ids = tree.leaves[leaf][depth:stop]
            shared = int(tree.shared[leaf]) - depth if leaf > low else 0
            last[at[shared:before]] = end - 1   # what this leaf does not share is over
            new = slice(end, end + len(ids) - shared)
            self._tokens[row, new] = ids[shared:]
            self._positions[row, new] = np.arange(depth + shared, depth + len(ids))
            at[shared : len(ids)] = np.arange(new.start, new.stop)
            end, before = new.stop, len(ids)
            self.read(leaf, depth, depth + len(ids), self._last.shape[1] * row + at)
        last[at[:before]] = end - 1
        self._used[row] = end
        self._trunk[row, :depth] = end - 1

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

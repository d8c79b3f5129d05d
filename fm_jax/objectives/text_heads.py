"""Heads on a text model: classes, values and tags of texts, and answers found in them.

Each is an encoder or decoder, whose parameters `embed` and `transformer` are those of `masked_lm`, `text_embedding` and
`causal_lm`, and one linear map of its states. Each example has a row of its own.

Try:  python -m fm_jax.train --config configs/text_classification.py:tiny --workdir runs/topics \\
          --config.data.train=data/topics --config.checkpoint.init_from=runs/masked \\
          --config.checkpoint.init_pattern='(embed|transformer).*'
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import model
from fm_jax.architecture import Architecture
from fm_jax.data.examples import place_of
from fm_jax.errors import UserError, choose
from fm_jax.frontends import POOLINGS, TextModel, real, text_vectors
from fm_jax.model import dropout, normal, param, zeros
from fm_jax.objectives import Loss
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab

_ARGS = "config.objective_args"
LONGEST = 64      # tokens of an answer at most: its two ends are scored apart, and could lie anywhere
_UNSEEN = -1e30   # score of a place that cannot be chosen: finite, so that it times weight 0 is 0


class _TextHead:
    """What the heads share. `outputs`: numbers of the linear map; `pooling`: of a text's states, "": each has its own.

    A head says what it `gives`, the name among its predictions, and by which `activation` of its linear map.
    """

    reads = "examples"
    gives: str

    def __init__(self, config, tokenizer, layout, outputs: int, pooling: str, pairs: bool):
        self.arch = Architecture(**config.model.to_dict())
        self.seq_len, self.tokenizer, self.layout = config.seq_len, tokenizer, layout
        if self.seq_len > self.arch.max_seq_len:
            raise UserError(f"config.seq_len={self.seq_len} exceeds model.max_seq_len={self.arch.max_seq_len}")
        if self.arch.num_experts:
            raise UserError(f"model.num_experts={self.arch.num_experts}: experts are causal_lm's; set it to 0")
        if self.arch.head_transform or not self.arch.tie_embeddings:
            raise UserError("model.head_transform and an untied head are of a vocabulary's logits, which this has none "
                            "of: set head_transform=False and tie_embeddings=True")
        if layout is not None:
            model.check(self.arch, self.seq_len, layout)
        if pooling:
            auto = "last" if self.arch.causal else "mean"
            pooling = auto if pooling == "auto" else choose(pooling, POOLINGS, f"{_ARGS}.pooling")
            if self.arch.causal and pooling == "cls":
                raise UserError(f"{_ARGS}.pooling='cls': the first token of a decoder (model.causal=True) sees nothing "
                                "of the text; take 'last' or 'mean'")
        self.before, self.after, self.between = [], [], []
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
            self.before, self.after = tokenizer.frame
            ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            self.between = self.after or ends
            if self.seq_len <= len(self.before) + len(self.between) + len(self.after) + pairs:
                raise UserError(f"config.seq_len={self.seq_len}: the tokenizer's own tokens around a text leave no "
                                "room for it")
        self.typed = pairs and self.arch.num_token_types > 1
        self.tokens_per_example = self.seq_len
        unused = 6.0 * self.arch.embed_dim * (self.arch.vocab_size - outputs * (1 / self.seq_len if pooling else 1))
        self.flops_per_example = self.seq_len * (self.arch.flops_per_token(self.seq_len) - unused)
        self._fields = dict(outputs=outputs, pooling=pooling)
        self.module = Headed(self.arch, layout, **self._fields)
        self.predict = {self.gives: self.outputs, "hidden": self.hidden} | ({"embed": self.embed} if pooling else {})

    def batch_spec(self, batch_size):
        make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        types = {"types": make(self.seq_len)} if self.typed else {}
        return {"tokens": make(self.seq_len), "lengths": make(), **types, **self._targets_spec(make)}

    def random_batch(self, n, rng):
        made = {name: np.zeros(s.shape, s.dtype) for name, s in self.batch_spec(n).items()}
        made |= {"tokens": rng.integers(0, self.arch.vocab_size, (n, self.seq_len), dtype=np.int32),
                 "lengths": np.full(n, self.seq_len, np.int32), "weights": np.ones_like(made["weights"])}
        return made | self._random_targets(made, rng)

    def init(self, key):
        unplaced = Headed(self.arch, **self._fields)   # shardings come from the axes, not from this dummy batch
        return unplaced.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), method="scores")["params"]

    def scores(self, params, batch, key=None):
        """Returns float32 [B, outputs], or [B, T, outputs] where each token has its own."""
        return self.module.apply({"params": params}, batch["tokens"], batch["lengths"], batch.get("types"), key,
                                 method="scores")

    # --- predict ----------------------------------------------------------------------------------------------------

    def outputs(self, params, tokens_BT, length_B, types_BT=None):
        """Returns what is said of each row's first `length_B` tokens, float32: see the class."""
        return self.activation(self.module.apply({"params": params}, tokens_BT, length_B, types_BT, method="scores"))

    def embed(self, params, tokens_BT, length_B):
        """Returns float32 [B, D], what the linear map is of, where states are pooled."""
        return self.module.apply({"params": params}, tokens_BT, length_B, method="states")

    def encode(self, texts) -> list[np.ndarray]:
        """Returns the token ids, int32 [n], of which `embed` makes the vector of each text."""
        return self.encode_rows(texts)[0]

    def hidden(self, params, tokens_BT, capture=()):
        """Returns (hidden states [B, T, D], taps) of rows without padding."""
        hidden, _, taps = self.module.apply({"params": params}, tokens_BT, capture=capture)
        return hidden, taps

    def encode_rows(self, texts, others=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Returns the token ids of each text, with the one it is paired with, and their types, int32 [n] each.

        The longer of a pair is cut first.
        """
        ids = self.tokenizer.encode_batch(list(texts))
        if others is None:
            room = self.seq_len - len(self.before) - len(self.after)
            rows = [np.array([*self.before, *a[:room], *self.after], np.int32) for a in ids]
            return rows, [np.zeros_like(row) for row in rows]
        rows, types = [], []
        room = self.seq_len - len(self.before) - len(self.between) - len(self.after)
        for a, b in zip(ids, self.tokenizer.encode_batch(list(others))):
            first = max(room - len(b), min(len(a), room // 2))
            first = min(first, len(a))
            a, b = a[:first], b[: room - first]
            rows.append(np.array([*self.before, *a, *self.between, *b, *self.after], np.int32))
            types.append((np.arange(len(rows[-1])) >= len(self.before) + len(a) + len(self.between)).astype(np.int32))
        return rows, types

    # --- records ----------------------------------------------------------------------------------------------------

    def _rows(self, rows, types, there):
        """Returns the tokens, lengths and types of a batch, from those of its records that are `there`."""
        tokens, kinds = (np.zeros((len(there), self.seq_len), np.int32) for _ in range(2))
        lengths = np.ones(len(there), np.int32)
        for i, row, kind in zip(np.flatnonzero(there), rows, types):
            tokens[i, : len(row)], kinds[i, : len(row)], lengths[i] = row, kind, len(row)
        return {"tokens": tokens, "lengths": lengths} | ({"types": kinds} if self.typed else {})

    def _text_rows(self, records, key, pair_key):
        """Returns (the rows of the texts of records, which records are no padding)."""
        real_ones = [r for r in records if r is not None]
        texts = [_text(r, key, "text_key") for r in real_ones]
        others = [_text(r, pair_key, "pair_key") for r in real_ones] if pair_key else None
        there = np.array([r is not None for r in records])
        return self._rows(*self.encode_rows(texts, others), there), there


class TextClassification(_TextHead):
    """The class of a text, or of two: softmax cross-entropy. `config.objective_args`:

    labels: the names of the classes; (): all that the train split has as `label_key`.
    text_key, pair_key, label_key: fields of a record; pair_key "": one text.
    pooling: of the states, "mean", "max", "cls" (the first), "last"; "auto": the mean of an encoder, a decoder's last.

    `predict["classes"]`: the probabilities [B, labels].
    """

    gives = "classes"
    activation = staticmethod(jax.nn.softmax)

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, labels=(), text_key="text", pair_key="",
                 label_key="label", pooling="auto"):
        self.labels = _names(labels, tokenizer, f"{_ARGS}.label_key={label_key!r}")
        self.text_key, self.pair_key, self.label_key = text_key, pair_key, label_key
        super().__init__(config, tokenizer, layout, len(self.labels), pooling, bool(pair_key))

    @classmethod
    def from_data(cls, args, values):
        return {"labels": _labels(args["labels"], values, args["label_key"], "label_key")}

    def _targets_spec(self, make):
        return {"labels": make(), "weights": make(dtype=jnp.float32)}

    def _random_targets(self, made, rng):
        return {"labels": rng.integers(0, len(self.labels), made["labels"].shape, dtype=np.int32)}

    def examples(self, records, seeds, train=True):
        """Returns tokens [n, seq_len], lengths, labels, all int32, and weights [n]; of pairs also types."""
        made, there = self._text_rows(records, self.text_key, self.pair_key)
        labels = [0 if r is None else self._label(r) for r in records]
        return made | {"labels": np.array(labels, np.int32), "weights": there.astype(np.float32)}

    def _label(self, record):
        if (label := _name(record, self.label_key, "label_key")) not in self.labels:
            names = ", ".join(self.labels[:8]) + ", ..." * (len(self.labels) > 8)
            raise UserError(f"{place_of(record)}: {self.label_key!r} is {label!r}, which is none of the "
                            f"{len(self.labels)} labels ({names}): add it to {_ARGS}.labels, or mend the record")
        return self.labels.index(label)

    def loss(self, params, batch, key=None):
        scores, weight = self.scores(params, batch, key), batch["weights"]
        nll = _nll(scores, batch["labels"])
        total, right = weight.sum(), (scores.argmax(-1) == batch["labels"]).astype(jnp.float32)
        return Loss((nll * weight).sum(), total, {"accuracy": ((right * weight).sum(), total)})


class TextRegression(_TextHead):
    """A number for a text, or for two: squared error. `config.objective_args` as of `TextClassification`, but:

    value_key: the field of a record with the number.

    `predict["values"]`: the values [B].
    """

    gives = "values"
    activation = staticmethod(lambda scores: scores[..., 0])

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, text_key="text", pair_key="",
                 value_key="value", pooling="auto"):
        self.text_key, self.pair_key, self.value_key = text_key, pair_key, value_key
        super().__init__(config, tokenizer, layout, 1, pooling, bool(pair_key))

    def _targets_spec(self, make):
        return {"values": make(dtype=jnp.float32), "weights": make(dtype=jnp.float32)}

    def _random_targets(self, made, rng):
        return {"values": rng.normal(size=made["values"].shape).astype(np.float32)}

    def examples(self, records, seeds, train=True):
        """Returns tokens [n, seq_len] and lengths, int32, values and weights, float32 [n]; of pairs also types."""
        made, there = self._text_rows(records, self.text_key, self.pair_key)
        values = [0.0 if r is None else self._value(r) for r in records]
        return made | {"values": np.array(values, np.float32), "weights": there.astype(np.float32)}

    def _value(self, record):
        value = record.get(self.value_key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{place_of(record)}: {self.value_key!r} is {value!r}, not a number (fields: "
                            f"{', '.join(record)}): name it by {_ARGS}.value_key, or mend the record")
        return value

    def loss(self, params, batch, key=None):
        error, weight = self.scores(params, batch, key)[:, 0] - batch["values"], batch["weights"]
        total = weight.sum()
        loss = (error ** 2 * weight).sum()
        return Loss(loss, total, {"absolute_error": ((jnp.abs(error) * weight).sum(), total)})


class TokenClassification(_TextHead):
    """The tag of each word of a text: softmax cross-entropy at the first token of each. `config.objective_args`:

    labels: the tags; (): all that the train split has as `tags_key`, of each entity type both its B- and its I-.
    words_key, tags_key: fields of a record, lists of equal length.
    scheme: "bio": tags are O, B-type and I-type, and F1 is of whole entities; "none": each stands for itself.

    `predict["tags"]`: the probabilities [B, T, labels] of each token.

    A word behind `config.seq_len` tokens, or of which the tokenizer makes none, is not trained on; in held-out examples
    it is O, and an entity of it is missed.

    Source: arXiv:1810.04805, section 5.3; F1 as conlleval's: an I- that nothing of its type precedes begins an entity.
    """

    gives = "tags"
    activation = staticmethod(jax.nn.softmax)

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, labels=(), words_key="words",
                 tags_key="tags", scheme="bio"):
        choose(scheme, ("bio", "none"), f"{_ARGS}.scheme")
        if scheme == "bio" and not labels and tokenizer is None:
            labels = ("O", "B-X", "I-X")
        self.labels = _names(labels, tokenizer, f"{_ARGS}.tags_key={tags_key!r}")
        self.words_key, self.tags_key, self.scheme = words_key, tags_key, scheme
        if scheme == "bio":
            self._begins, self._kinds = bio(self.labels)
        super().__init__(config, tokenizer, layout, len(self.labels), "", False)

    @classmethod
    def from_data(cls, args, values):
        labels = _labels(args["labels"], values, args["tags_key"], "tags_key")
        if args["scheme"] == "bio" and not args["labels"]:
            kinds = sorted({label[2:] for label in labels if label != "O"})
            odd = next((label for label in labels if label != "O" and label[:2] not in ("B-", "I-")), None)
            if odd is not None:
                raise UserError(f"{args['tags_key']!r} has the tag {odd!r}, and {_ARGS}.scheme='bio' knows O, B-type "
                                "and I-type: set scheme='none' for other tags")
            labels = ["O", *(f"{b}-{kind}" for kind in kinds for b in "BI")]
        return {"labels": labels}

    def _targets_spec(self, make):
        T = self.seq_len
        return {"places": make(T), "labels": make(T), "weights": make(T, dtype=jnp.float32),
                "lost": make(dtype=jnp.float32)}

    def _random_targets(self, made, rng):
        shape = made["labels"].shape
        return {"labels": rng.integers(0, len(self.labels), shape, dtype=np.int32),
                "places": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)}

    def words(self, words):
        """Returns (token ids with their ends int32 [t], place in them of each word's first token, -1: it has none)."""
        ids, spans = self.tokenizer.encode_spans([" ".join(words)])[0]
        ends = np.cumsum([len(word) + 1 for word in words])     # one behind each word
        # A token may begin with the space before its word: what it is of ends it.
        of = np.searchsorted(ends, np.maximum(spans[:, 1] - 1, spans[:, 0]), "right")
        places = np.full(len(words), -1)
        room = self.seq_len - len(self.before) - len(self.after)
        for token in np.flatnonzero((np.arange(len(ids)) < room) & (of < len(words)))[::-1]:
            places[of[token]] = token + len(self.before)
        return np.array([*self.before, *ids[:room], *self.after], np.int32), places

    def examples(self, records, seeds, train=True):
        """Returns tokens, and of the words the places of their first tokens and their labels, int32 [n, seq_len],
        weights [n, seq_len], lengths [n], and float32 lost [n], entities of words for which there was no room.
        """
        n, T = len(records), self.seq_len
        rows, there = [], np.array([r is not None for r in records])
        made = {name: np.zeros(s.shape, s.dtype) for name, s in self.batch_spec(n).items()}
        made["labels"][:] = self.outside
        for i in np.flatnonzero(there):
            words, tags = self._tagged(records[i])
            row, places = self.words(words)
            rows.append(row)
            if self.scheme == "bio":
                made["lost"][i] = len(entities([self.labels[t] for t in tags])) - len(
                    entities([self.labels[t] for t in tags[:T]]))
            places = places[:T]
            made["labels"][i, : len(places)] = tags[:T]
            made["places"][i, : len(places)] = np.maximum(places, 0)
            made["weights"][i, : len(places)] = places >= 0
        return made | self._rows(rows, [np.zeros_like(r) for r in rows], there)

    @property
    def outside(self) -> int:
        """What a word is where nothing is said of it."""
        return self.labels.index("O") if "O" in self.labels else 0

    def _tagged(self, record):
        words, tags = record.get(self.words_key), record.get(self.tags_key)
        if not all(isinstance(each, list) and each for each in (words, tags)) or len(words) != len(tags):
            sizes = [len(each) if isinstance(each, list) else type(each).__name__ for each in (words, tags)]
            raise UserError(f"{place_of(record)}: {self.words_key!r} and {self.tags_key!r} must be lists of equal "
                            f"length, got {sizes[0]} and {sizes[1]} (fields: {', '.join(record)}): name them by "
                            f"{_ARGS}.words_key and tags_key, or mend the record")
        for word in words:
            if not isinstance(word, str) or not word.strip() or word.split() != [word]:
                raise UserError(f"{place_of(record)}: {word!r} in {self.words_key!r} is no word: no text, or with a "
                                "space")
        unknown = next((tag for tag in map(str, tags) if tag not in self.labels), None)
        if unknown is not None:
            raise UserError(f"{place_of(record)}: {unknown!r} in {self.tags_key!r} is none of the labels "
                            f"({', '.join(self.labels)}): add it to {_ARGS}.labels, or mend the record")
        return words, [self.labels.index(str(tag)) for tag in tags]

    def loss(self, params, batch, key=None):
        places, weight, labels = batch["places"], batch["weights"], batch["labels"]
        scores = jnp.take_along_axis(self.scores(params, batch, key), places[..., None], axis=1)
        nll, found = _nll(scores, labels), scores.argmax(-1)
        loss, total = (nll * weight).sum(), weight.sum()
        right = ((found == labels) * weight).sum()
        metrics = {"accuracy": (right, total)}
        if self.scheme == "bio":
            found = jnp.where(weight > 0, found, self.outside)
            both, ours, theirs = count_entities(found, labels, jnp.array(self._begins), jnp.array(self._kinds))
            theirs += batch["lost"].sum()
            metrics |= {"f1": (2 * both, ours + theirs), "precision": (both, ours), "recall": (both, theirs)}
        return Loss(loss, total, metrics)


class QuestionAnswering(_TextHead):
    """The part of a text that answers a question: cross-entropy of its first and its last token.
    `config.objective_args`:

    question_key, context_key: fields of a record.
    answers_key: {"text": [...], "answer_start": [...]}, as of SQuAD, where in the context each answer is, in
      characters. No answers: there is none, which is the place of the first token. Trained on is the first.

    `predict["answers"]`: scores [B, T, 2] of each token as the first and the last; others than the context's and the
    first are not to be chosen.

    Where the answer is cut off by `config.seq_len`, nothing is trained, and held-out examples count as missed.

    Source: arXiv:1810.04805, sections 4.2 and 4.3.
    """

    gives = "answers"
    activation = staticmethod(lambda scores: scores)

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, question_key="question",
                 context_key="context", answers_key="answers"):
        self.question_key, self.context_key, self.answers_key = question_key, context_key, answers_key
        super().__init__(config, tokenizer, layout, 2, "", True)

    def _targets_spec(self, make):
        return {"first": make(), "last": make(), "context": make(self.seq_len), "weights": make(dtype=jnp.float32),
                "counts": make(dtype=jnp.float32)}

    def _random_targets(self, made, rng):
        first, last = np.sort(rng.integers(0, self.seq_len, (2, len(made["first"])), dtype=np.int32), axis=0)
        return {"first": first, "last": last, "context": np.ones_like(made["context"]), "counts": made["weights"]}

    def row(self, question, context, start: int = 0):
        """Returns (token ids int32 [t], where the context begins in them, the characters of each of its tokens).

        start: of the context's tokens the first that is taken. Half of the row is the question's at most.
        """
        ids, spans = self.tokenizer.encode_spans([context])[0]
        room = self.seq_len - len(self.before) - len(self.between) - len(self.after)
        asked = self.tokenizer.encode_batch([question])[0][: room // 2]
        ids, spans = ids[start : start + room - len(asked)], spans[start : start + room - len(asked)]
        row = np.array([*self.before, *asked, *self.between, *ids, *self.after], np.int32)
        return row, len(self.before) + len(asked) + len(self.between), spans

    def best(self, scores, begin: int, count: int) -> tuple[int, int, float]:
        """Returns the first and last token, and their score, of the answer in `count` tokens from `begin`, by the
        scores [t, 2] of a row. The first token of the row says that there is none.
        """
        scores = np.asarray(scores, np.float64)
        (first, second), none = scores[begin : begin + count].T, float(scores[0].sum())
        both = np.where(np.triu(np.tri(count, count, LONGEST - 1)), first[:, None] + second[None], -np.inf)
        at = np.unravel_index(both.argmax(), both.shape) if count else (0, 0)
        return (0, 0, none) if not count or none > both[at] else (begin + at[0], begin + at[1], float(both[at]))

    def examples(self, records, seeds, train=True):
        """Returns tokens, types (where the model has them) and context, 1 at what may be answered, int32 [n, seq_len],
        lengths, first and last, int32 [n], and weights and counts [n]: what is trained on, and what is counted.
        """
        there = np.array([r is not None for r in records])
        made = {name: np.zeros(s.shape, s.dtype) for name, s in self.batch_spec(len(records)).items()}
        rows, types = [], []
        for i in np.flatnonzero(there):
            question, context, answer = self._asked(records[i])
            row, begin, spans = self.row(question, context)
            made["context"][i, 0] = 1
            made["context"][i, begin : begin + len(spans)] = 1
            made["counts"][i] = made["weights"][i] = 1
            if answer is not None:
                inside = np.flatnonzero((spans[:, 1] > answer[0]) & (spans[:, 0] < answer[1]))
                whole = len(inside) and spans[inside[-1], 1] >= answer[1] and spans[inside[0], 0] <= answer[0]
                made["weights"][i] = float(whole)
                made["first"][i], made["last"][i] = (begin + inside[[0, -1]]) if whole else (-1, -1)
            rows.append(row)
            types.append((np.arange(len(row)) >= begin).astype(np.int32))
        return made | self._rows(rows, types, there)

    def _asked(self, record):
        question = _text(record, self.question_key, "question_key")
        context = _text(record, self.context_key, "context_key")
        answers = record.get(self.answers_key)
        given = answers if isinstance(answers, dict) else {}
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError(f"{place_of(record)}: {self.answers_key!r} must be {{'text': [...], 'answer_start': "
                            f"[...]}}, lists of equal length, got {answers!r:.60} (fields: {', '.join(record)})")
        for text, start in zip(texts, starts):
            if not text or not isinstance(start, int) or context[max(start, 0) : start + len(text)] != text:
                raise UserError(f"{place_of(record)}: the answer {text!r} is not at character {start!r} of the "
                                "context: mend answer_start, which counts characters from 0")
        return question, context, (starts[0], starts[0] + len(texts[0])) if texts else None

    def loss(self, params, batch, key=None):
        scores = jnp.where(batch["context"][..., None] > 0, self.scores(params, batch, key), _UNSEEN)
        first, last, weight, count = batch["first"], batch["last"], batch["weights"], batch["counts"]
        nll = (_nll(scores[..., 0], jnp.maximum(first, 0)) + _nll(scores[..., 1], jnp.maximum(last, 0))) / 2
        ours = best_spans(scores)
        exact = ((ours[0] == first) & (ours[1] == last)).astype(jnp.float32)
        common = jnp.maximum(jnp.minimum(ours[1], last) - jnp.maximum(ours[0], first) + 1, 0)
        f1 = jnp.where(first < 0, 0.0, 2 * common / (ours[1] - ours[0] + last - first + 2))
        loss, total, counted = (nll * weight).sum(), weight.sum(), count.sum()
        return Loss(loss, total, {"token_exact": ((exact * count).sum(), counted),
                                  "token_f1": ((f1 * count).sum(), counted)})


class Headed(TextModel):
    """A text model and a linear map of its states: pooled, or each."""

    outputs: int = 2
    pooling: str = ""

    def setup(self):
        super().setup()
        a = self.arch
        self.head = param(self, "head", normal(0.02), a.param_dtype, embed=a.embed_dim, norm=self.outputs)
        self.bias = param(self, "head_bias", zeros, a.param_dtype, norm=self.outputs)

    def states(self, tokens_BT, length_B, types_BT=None, key=None):
        """Returns float32 [B, D], pooled, or [B, T, D]."""
        x, _, _ = self(tokens_BT, segment_ids_BT=real(tokens_BT, length_B), types_BT=types_BT, key=key)
        return text_vectors(x, length_B, self.pooling) if self.pooling else x.astype(jnp.float32)

    def scores(self, tokens_BT, length_B, types_BT=None, key=None):
        """Returns float32 [B, outputs], without pooling [B, T, outputs]."""
        key, head_key = jax.random.split(key) if key is not None else (None, None)
        x = self.states(tokens_BT, length_B, types_BT, key)
        x = dropout(x, self.arch.dropout, None if head_key is None else jax.random.split(head_key, len(x)))
        weight, bias = self.head.astype(jnp.float32), self.bias.astype(jnp.float32)
        return jnp.einsum("...d,de->...e", x, weight, precision=jax.lax.Precision.HIGHEST) + bias


# --- entities and spans ---------------------------------------------------------------------------------------------


def entities(tags) -> list[tuple[int, int, str]]:
    """Returns (first word, one behind the last, type) of each entity of a text's BIO tags."""
    found, open_ = [], None
    for i, tag in enumerate([*tags, "O"]):
        kind = tag[2:] if tag != "O" else None
        if open_ is not None and (kind != open_[1] or tag.startswith("B-")):
            found.append((open_[0], i, open_[1]))
            open_ = None
        if kind is not None and open_ is None:
            open_ = i, kind
    return found


def bio(labels) -> tuple[list[bool], list[int]]:
    """Returns of each label whether it begins an entity, and the number of its type, 0: none.

    Raises:
      UserError: a label that is not O, B-type or I-type.
    """
    odd = next((x for x in labels if x != "O" and (x[:2] not in ("B-", "I-") or not x[2:])), None)
    if odd is not None or "O" not in labels:
        raise UserError(f"{_ARGS}.labels: {'there is no O' if odd is None else repr(odd)}; with scheme='bio' labels "
                        "are O, B-type and I-type, and scheme='none' takes others")
    kinds = sorted({label[2:] for label in labels if label != "O"})
    return ([label.startswith("B-") for label in labels],
            [0 if label == "O" else 1 + kinds.index(label[2:]) for label in labels])


def count_entities(ours_BT, theirs_BT, begins_V, kinds_V):
    """Returns float32 (entities in both, in the first, in the second) of two taggings of the same words.

    begins_V, kinds_V: as `bio`'s. An entity counts as in both where first word, last word and type are the same.
    """
    def spans(tags_BT):
        """Returns (whether an entity begins, its type, its last word), each [B, T]."""
        kind = kinds_V[tags_BT]
        before = jnp.pad(kind, ((0, 0), (1, 0)))[:, :-1]
        starts = (kind > 0) & (begins_V[tags_BT] | (kind != before))
        ends = (kind > 0) & jnp.pad(starts | (kind == 0), ((0, 0), (0, 1)), constant_values=True)[:, 1:]
        place = jnp.where(ends, jnp.arange(tags_BT.shape[1]), tags_BT.shape[1])
        return starts, kind, jax.lax.cummin(place, axis=1, reverse=True)

    (a_starts, a_kind, a_last), (b_starts, b_kind, b_last) = spans(ours_BT), spans(theirs_BT)
    both = a_starts & b_starts & (a_kind == b_kind) & (a_last == b_last)
    return tuple(x.sum().astype(jnp.float32) for x in (both, a_starts, b_starts))


def best_spans(scores_BT2):
    """Returns int32 (first, last) [B] of the spans of LONGEST tokens at most whose two scores have the largest sum."""
    T = scores_BT2.shape[1]
    first, last = scores_BT2[..., 0], scores_BT2[..., 1]
    gap = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    both = jnp.where((gap >= 0) & (gap < LONGEST), first[:, :, None] + last[:, None, :], 2 * _UNSEEN)
    best = both.reshape(len(both), -1).argmax(-1)
    return best // T, best % T


# --- labels and fields ----------------------------------------------------------------------------------------------


def _nll(scores, labels):
    return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


def _names(labels, tokenizer, where):
    """Returns the labels as a list of names; without any, and without a tokenizer as of `plan`, two of no meaning."""
    labels = [str(label) for label in (labels.split(",") if isinstance(labels, str) else labels)]
    if not labels and tokenizer is None:
        return ["0", "1"]
    if len(labels) < 2 or len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise UserError(f"{_ARGS}.labels={labels}: two names or more are needed, all different and none of them empty "
                        f"({where})")
    return labels


def _labels(given, values, key, argument):
    """Returns the labels of the train split, or those given, which must each have an example there."""
    if key not in values:
        raise UserError(f"{_ARGS}.{argument}={key!r}: the training data has no such field of a thousand different "
                        f"names at most (it has {', '.join(values) or 'none'}); name the right one")
    found = [str(value) for value in values[key]]
    for label in map(str, given):
        if label not in found:
            raise UserError(f"{_ARGS}.labels: {label!r} has no example in the train split, whose {key!r} is one of "
                            f"{', '.join(found[:20])}{', ...' * (len(found) > 20)}")
    return list(map(str, given)) or found


def _name(record, key, argument):
    value = record.get(key)
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise UserError(f"{place_of(record)}: no label as {key!r}, but {value!r} (fields: {', '.join(record)}): name "
                        f"it by {_ARGS}.{argument}, or mend the record")
    return str(value)


def _text(record, key, argument):
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place_of(record)}: no text as {key!r}, but {value!r:.60} (fields: {', '.join(record)}): "
                        f"name it by {_ARGS}.{argument}, or mend the record")
    return value

"""Text embeddings: an encoder (or a decoder) whose states of a text become one vector, near those of like texts.

Trained on pairs: a text and one that belongs to it, told apart from those of the other pairs of the batch.

Try:  python -m fm_jax.train --config configs/text_embedding.py:tiny --workdir runs/tiny --config.data.train=data/pairs
"""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import model
from fm_jax.architecture import Architecture
from fm_jax.data.examples import place_of
from fm_jax.errors import UserError, choose
from fm_jax.frontends import POOLINGS, TextModel, real, text_vectors
from fm_jax.model import fan_in, param, zeros
from fm_jax.objectives import Loss
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab

PROJECTION_ACTIVATIONS = {"none": lambda x: x, "tanh": jnp.tanh}
_UNSEEN = -1e30   # score of a candidate that is padding: finite, so that it times weight 0 is 0


class TextEmbedding:
    """The objective. `config.objective_args`:

    pooling: of a text's hidden states "mean", "max" of each channel, "cls" (the first) or "last".
    normalize: vectors have length 1.
    projection_dim: of a linear map after the pooling; 0: none. projection_activation: "none", "tanh".
    projection_bias: whether it adds one.
    prompt: begins every text that `embed` gets, such as "query: "; those of the training data bring their own.
    scale: of the cosines in the softmax over the batch's candidates, one over its temperature.
    symmetric: a text is also to be found from what belongs to it.
    negatives: so many texts of each record that do not belong to it, candidates like the other pairs' texts.
    text_key, positive_key, negative_key: fields of a record; of several negatives, a list.

    Texts are cut at `config.seq_len` tokens, those that the tokenizer puts around a text included.

    Source: the loss is arXiv:1807.03748, equation 4, with cosines as in arXiv:1705.00652, section 4.4; the values of
    sentence-transformers' MultipleNegativesRankingLoss.
    """

    reads = "examples"
    examples_interact = True

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, pooling="mean", normalize=True,
                 projection_dim=0, projection_activation="tanh", projection_bias=True, prompt="", scale=20.0,
                 symmetric=False, negatives=0, text_key="text", positive_key="positive", negative_key="negative"):
        self.arch = Architecture(**config.model.to_dict())
        self.seq_len, self.tokenizer, self.layout = config.seq_len, tokenizer, layout
        args = "config.objective_args"
        if self.seq_len > self.arch.max_seq_len:
            raise UserError(f"config.seq_len={self.seq_len} exceeds model.max_seq_len={self.arch.max_seq_len}")
        if self.arch.num_experts:
            raise UserError(f"model.num_experts={self.arch.num_experts}: experts are causal_lm's; set it to 0")
        if self.arch.head_transform or not self.arch.tie_embeddings:
            raise UserError("model.head_transform and an untied head are of logits, which an embedding has none of: "
                            "set head_transform=False and tie_embeddings=True")
        choose(pooling, POOLINGS, f"{args}.pooling")
        choose(projection_activation, PROJECTION_ACTIVATIONS, f"{args}.projection_activation")
        if scale <= 0 or negatives < 0 or projection_dim < 0:
            raise UserError(f"{args}: scale={scale} must be positive, negatives={negatives} and projection_dim="
                            f"{projection_dim} 0 or more")
        if layout is not None:
            model.check(self.arch, self.seq_len, layout)
            # XLA:CPU (jax 0.10.2) lets the ring's collectives of two microbatches meet: gradients wrong, or a crash.
            if config.accumulation_steps > 1 and layout.parts("length") > 1:
                raise UserError(f"config.accumulation_steps={config.accumulation_steps} with mesh.context="
                                f"{layout.parts('length')}: microbatches of pairs cannot be cut along their length; "
                                "set one of them to 1")
        self.before, self.after, self.prompt = [], [], prompt
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
            self.before, self.after = tokenizer.frame
            if self.seq_len <= len(self.before) + len(self.after):
                raise UserError(f"config.seq_len={self.seq_len}: the tokenizer's {len(self.before) + len(self.after)} "
                                "tokens around a text leave no room for it")
        self.scale, self.symmetric, self.negatives = scale, symmetric, negatives
        self.keys = text_key, positive_key, negative_key
        self.texts = 2 + negatives    # of an example
        self.dim = projection_dim or self.arch.embed_dim
        self.tokens_per_example = self.texts * self.seq_len
        head = 6.0 * self.arch.embed_dim * (self.arch.vocab_size - projection_dim / self.seq_len)
        self.flops_per_example = self.tokens_per_example * (self.arch.flops_per_token(self.seq_len) - head)
        self._fields = dict(pooling=pooling, normalize=normalize, projection_dim=projection_dim,
                            projection_activation=projection_activation, projection_bias=projection_bias)
        self.module = Embedder(self.arch, layout, **self._fields)
        self.predict = {"embed": self.vectors, "hidden": self.hidden}

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        return {"tokens": make(self.texts, self.seq_len), "lengths": make(self.texts),
                "weights": make(dtype=jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns of each record the tokens, int32 [n, 2 + negatives, seq_len], of its text, of the one that belongs to
        it and of those that do not, the lengths of each, and weights [n].
        """
        texts = [text for record in records if record is not None for text in self._texts(record)]
        ids = self._framed(self.tokenizer.encode_batch(texts))
        there = np.array([record is not None for record in records])
        tokens = np.zeros((len(records), self.texts, self.seq_len), np.int32)
        lengths = np.ones((len(records), self.texts), np.int32)
        for row, own in zip(np.flatnonzero(there), range(0, len(ids), self.texts)):
            for i, each in enumerate(ids[own : own + self.texts]):
                tokens[row, i, : len(each)], lengths[row, i] = each, len(each)
        return {"tokens": tokens, "lengths": lengths, "weights": there.astype(np.float32)}

    def random_batch(self, n, rng):
        shape = (n, self.texts, self.seq_len)
        return {"tokens": rng.integers(0, self.arch.vocab_size, shape, dtype=np.int32),
                "lengths": np.full(shape[:2], self.seq_len, np.int32), "weights": np.ones(n, np.float32)}

    def init(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        unplaced = Embedder(self.arch, **self._fields)   # shardings come from the axes, not from this dummy batch
        return unplaced.init(key, tokens, jnp.ones(1, jnp.int32), method="embed")["params"]

    def loss(self, params, batch, key=None):
        return self.loss_of(params, self.embed(params, batch, key), batch)

    def embed(self, params, batch, key=None):
        """Returns float32 [n, 2 + negatives, D], of length 1: all that other examples of the batch see of each."""
        n, S, T = batch["tokens"].shape
        vectors = self.module.apply({"params": params}, batch["tokens"].reshape(n * S, T),
                                    batch["lengths"].reshape(n * S), key, method="embed")
        return _unit(vectors).reshape(n, S, -1)

    def loss_of(self, params, vectors, batch):
        """Returns the losses of a whole batch whose examples are `vectors`. One of weight 0 is no candidate."""
        S, weight = self.texts, batch["weights"]
        # Every pair sees the texts of all others: of all devices.
        whole = lambda x: self.layout.constrain(x, *(None,) * x.ndim) if self.layout else x
        texts, candidates = vectors[:, 0], whole(vectors[:, 1:].swapaxes(0, 1).reshape(-1, vectors.shape[-1]))
        dot = lambda a, b: self.scale * jnp.einsum("ae,be->ab", a, b, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where(jnp.tile(whole(weight), S - 1) > 0, dot(texts, candidates), _UNSEEN)
        own = jnp.diagonal(scores)
        loss = jax.nn.logsumexp(scores, axis=1) - own
        if self.symmetric:
            back = jnp.where(whole(weight) > 0, dot(vectors[:, 1], whole(texts)), _UNSEEN)
            loss = (loss + jax.nn.logsumexp(back, axis=1) - own) / 2
        total = weight.sum()
        found = (own >= scores.max(1)).astype(jnp.float32)
        return Loss((loss * weight).sum(), total, {"accuracy": ((found * weight).sum(), total)})

    # --- predict ----------------------------------------------------------------------------------------------------

    def text_ids(self, texts) -> list[np.ndarray]:
        """Returns the token ids, int32 [n], of which `embed` makes the vector of each text; one spelt as a special
        token is that token, as in other libraries.
        """
        return self._framed(self.tokenizer.encode_batch([self.prompt + text for text in texts], special=True))

    def vectors(self, params, tokens_BT, length_B):
        """Returns float32 [B, D], of the first `length_B` tokens of each row."""
        return self.module.apply({"params": params}, tokens_BT, length_B, method="embed")

    def hidden(self, params, tokens_BT, capture=()):
        """Returns (hidden states [B, T, D], taps) of rows without padding."""
        hidden, _, taps = self.module.apply({"params": params}, tokens_BT, capture=capture)
        return hidden, taps

    # --- records ----------------------------------------------------------------------------------------------------

    def _texts(self, record):
        text, positive, negative = self.keys
        found = [record.get(text), record.get(positive)]
        if self.negatives:
            given = record.get(negative)
            found += given if isinstance(given, list) else [given]
        if len(found) != self.texts or not all(isinstance(each, str) and each for each in found):
            names = f"{text!r} and {positive!r}" + (f" and {self.negatives} as {negative!r}" if self.negatives else "")
            raise UserError(f"{place_of(record)}: needs texts as {names}; it has {', '.join(map(repr, record))}: name "
                            "the fields by config.objective_args.text_key, positive_key, negative_key, negatives")
        return found

    def _framed(self, ids):
        room = self.seq_len - len(self.before) - len(self.after)
        return [np.array([*self.before, *each[:room], *self.after], np.int32) for each in ids]


class Embedder(TextModel):
    """A text's vector: its hidden states, pooled, and projected where `projection_dim` says so."""

    pooling: str = "mean"
    normalize: bool = True
    projection_dim: int = 0
    projection_activation: str = "tanh"
    projection_bias: bool = True

    def setup(self):
        super().setup()
        a = self.arch
        if self.projection_dim:
            self.projection = param(self, "projection", fan_in(a.embed_dim), a.param_dtype, embed=a.embed_dim,
                                    norm=self.projection_dim)
            if self.projection_bias:
                self.bias = param(self, "projection_bias", zeros, a.param_dtype, norm=self.projection_dim)

    def embed(self, tokens_BT, length_B, key=None):
        """Returns float32 [B, D]."""
        hidden, _, _ = self(tokens_BT, segment_ids_BT=real(tokens_BT, length_B), key=key)
        x = text_vectors(hidden, length_B, self.pooling)
        if self.projection_dim:
            x = jnp.einsum("bd,de->be", x, self.projection.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            x = PROJECTION_ACTIVATIONS[self.projection_activation](
                x + self.bias.astype(jnp.float32) if self.projection_bias else x)
        return _unit(x) if self.normalize else x


def _unit(x):
    return x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))

"""Contrastive learning of images and their texts: two encoders whose vectors agree for what belongs together.

`config.model` is the tower of texts, `config.encoder` what that of images has otherwise.

Try:  python -m fm_jax.train --config configs/image_text.py:tiny --workdir runs/tiny --config.data.train=data/emoji
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import config as config_lib
from fm_jax import images
from fm_jax.architecture import Architecture
from fm_jax.data.examples import field, place_of
from fm_jax.errors import UserError, choose
from fm_jax.frontends import ImageModel, TextModel, normalised, real, text_vectors
from fm_jax.model import fan_in, param, zeros
from fm_jax.objectives import Loss, uniform
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab

MOST_LOGIT_SCALE = np.log(100)   # arXiv:2103.00020, section 2.5: larger ones made training unstable
# Logarithm of the scale of similarities, and the bias, at the start: arXiv:2103.00020, section 2.4; 2303.15343, 3.2.
AT_START = {"softmax": (np.log(1 / 0.07), 0.0), "sigmoid": (np.log(10), -10.0)}


class Towers(nn.Module):
    """The two encoders, the projections of their vectors to one width, and the scale and bias of similarities."""

    text_arch: Architecture
    image_arch: Architecture
    objective: str             # softmax or sigmoid
    projection_dim: int        # 0: the image tower's width, without a projection of images
    projection_bias: bool
    layout: Layout | None = None

    def setup(self):
        text, image = self.text_arch, self.image_arch
        self.text, self.image = TextModel(text, self.layout), ImageModel(image, self.layout)
        width = self.projection_dim or image.embed_dim
        project = lambda name, D: param(self, name, fan_in(D), text.param_dtype, embed=D, norm=width)
        bias = lambda name: param(self, name, zeros, text.param_dtype, norm=width) if self.projection_bias else None
        self.text_projection, self.text_bias = project("text_projection", text.embed_dim), bias("text_bias")
        if self.projection_dim:
            self.image_projection = project("image_projection", image.embed_dim)
            self.image_bias = bias("image_bias")
        constant = lambda value: lambda key, shape, dtype: jnp.full(shape, value, dtype)
        scale, shift = AT_START[self.objective]
        self.logit_scale = param(self, "logit_scale", constant(scale))
        self.logit_bias = param(self, "logit_bias", constant(shift)) if self.objective == "sigmoid" else 0.0

    def embed_text(self, tokens_BT, length_B, key=None, capture=()):
        """Returns (vectors of length 1, float32 [B, U], hidden states [B, T, D], taps).

        length_B: of each row so many tokens are seen; the last of them is a text's end, or a place behind it.
        """
        a = self.text_arch
        segments = None if a.causal else real(tokens_BT, length_B)
        hidden, _, taps = self.text(tokens_BT, segment_ids_BT=segments, key=key, capture=capture)
        vector = text_vectors(hidden, length_B, "mean" if a.pooling == "mean" else "last").astype(hidden.dtype)
        return _unit(vector, self.text_projection, self.text_bias), hidden, taps

    def embed_image(self, images_BHWC, key=None, capture=()):
        """Returns (vectors of length 1, float32 [B, U], hidden states [B, T, D], taps) of normalised images."""
        vector, hidden, taps = self.image(images_BHWC, key, capture)
        if self.projection_dim:
            return _unit(vector, self.image_projection, self.image_bias), hidden, taps
        return _unit(vector), hidden, taps

    def logits(self, image_BU, text_CU, most_scale=jnp.inf):
        """Returns float32 [B, C], the similarity of each image to each text."""
        scale = jnp.exp(jnp.minimum(self.logit_scale.astype(jnp.float32), most_scale))
        # The highest precision: on TPU, float32 products are of bfloat16 otherwise, and the scale may be 100.
        return jnp.matmul(image_BU, text_CU.T, precision=jax.lax.Precision.HIGHEST) * scale + self.logit_bias

    def everything(self, tokens_BT, length_B, images_BHWC):
        """Returns nothing; uses every parameter, for `init`."""
        self.logits(self.embed_image(images_BHWC)[0], self.embed_text(tokens_BT, length_B)[0])


def _unit(x_BD, projection_DU=None, bias_U=None):
    """Returns x, projected, at length 1, in float32."""
    x = x_BD if projection_DU is None else x_BD @ projection_DU.astype(x_BD.dtype)
    x = x.astype(jnp.float32) + (0.0 if bias_U is None else bias_U.astype(jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


class ImageText:
    """The objective. `config.objective_args`:

    loss: "softmax" over the batch's texts of an image and its images of a text (CLIP, arXiv:2103.00020, figure 3), or
      "sigmoid" of each pair (SigLIP, arXiv:2303.15343, equation 1).
    projection_dim: width of the vectors that are compared; 0: that of the image tower, whose vectors are as they are.
    projection_bias: the projections add a bias.
    image_key, text_key: fields of a record. A text may be a list, of which training draws one and validation takes the
      first.
    image_size, resize, filter, min_crop_area, flip: see `images.View`.
    mean, std: of each channel, by which pixels in [0, 1] are normalised.

    A text is the tokenizer's beginning token, where other libraries put one, the text's, and the end token, up to
    `config.seq_len`: of a longer one the beginning, and the end token all the same (`cut_frac` says how many).
    Records whose image cannot be read count for nothing.
    """

    reads = "examples"
    examples_interact = True

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, loss="softmax", projection_dim=512,
                 projection_bias=False, image_key="image", text_key="text", image_size=224, resize="crop",
                 filter="bicubic", min_crop_area=1.0, flip=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        self.arch, self.encoder = Architecture(**config.model.to_dict()), config_lib.encoder(config)
        text, image = self.arch, self.encoder
        self.seq_len = config.seq_len
        if self.seq_len > text.max_seq_len:
            raise UserError(f"config.seq_len={self.seq_len} exceeds model.max_seq_len={text.max_seq_len}")
        choose(loss, AT_START, "config.objective_args.loss")
        self.view = images.View(image_size, resize, filter, image.channels, min_crop_area, flip)
        self.mean, self.std = images.check_tower(image, self.view, mean, std, layout, "encoder")
        if text.patch_size or text.pooling not in ("end", "last", "mean"):
            raise UserError(f"config.model.patch_size={text.patch_size}, pooling={text.pooling!r}: config.model is the "
                            "tower of texts, with pooling 'end', 'last' or 'mean'; that of images is config.encoder")
        if projection_dim < 0:
            raise UserError(f"config.objective_args.projection_dim={projection_dim} must be 0 or more")
        if tokenizer is not None:
            check_vocab(tokenizer, text.vocab_size)
            if tokenizer.eos_id is None:
                raise UserError("a text needs an end token, which this tokenizer does not have")
        self.tokenizer, self.image_key, self.text_key, self.loss_kind = tokenizer, image_key, text_key, loss
        patches = image.class_token + (image_size // image.patch_size) ** 2
        self.tokens_per_example = self.seq_len + patches
        # No logits are made of the text's vocabulary.
        self.flops_per_example = (self.seq_len * (text.flops_per_token(self.seq_len) - 6.0 * text.vocab_size
                                                  * text.embed_dim) + patches * image.flops_per_token(patches))
        make = lambda layout: Towers(text, image, loss, projection_dim, projection_bias, layout)
        self.module, self._unplaced = make(layout), make(None)
        self.dim = projection_dim or image.embed_dim
        self.predict = {"hidden": self.hidden, "embed": self.embed_text, "embed_image": self.embed_image,
                        "similarity": self.similarity, "ensemble": self.ensemble}

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        size, channels = self.view.size, self.view.channels
        return {"tokens": make(self.seq_len), "length": make(), "cut": make(dtype=bool),
                "weights": make(dtype=jnp.float32),
                "images": make(size, size, channels, dtype=jnp.uint8)}

    def examples(self, records, seeds, train=True):
        """Returns tokens, int32 [n, seq_len], length, int32 [n], cut, bool [n], whether a text was longer, images,
        uint8 [n, H, W, C], and weights, float32 [n].

        A record has an image, bytes of a file, and a text. Randomness: which text, how the image is cropped.
        """
        draws, texts, n = uniform(seeds, 5), [], len(records)
        pixels = np.zeros((n, self.view.size, self.view.size, self.view.channels), np.uint8)
        weights = np.zeros(n, np.float32)
        for i, record in enumerate(records):
            texts.append("")
            if record is None:
                continue
            texts[-1] = self._text(record, draws[i, 4] if train else 0.0)
            weights[i] = images.into(pixels[i], field(record, self.image_key), place_of(record), self.view,
                                     draws[i] if train else None)
        tokens, length = np.zeros((n, self.seq_len), np.int32), np.zeros(n, np.int32)
        made, cut = self._text_ids(texts)
        for i, ids in enumerate(made):
            tokens[i, : len(ids)], length[i] = ids, len(ids)
        return {"tokens": tokens, "length": length, "cut": cut, "images": pixels, "weights": weights}

    def text_ids(self, texts) -> list[np.ndarray]:
        """Returns the token ids, int32 [n], of which the tower makes the vector of each text.

        Where it takes the last place of `seq_len`, whatever is there, all of them.
        """
        return self._text_ids(texts)[0]

    def _text_ids(self, texts):
        """Returns (the ids of each text, bool [n], whether it was longer)."""
        t, room = self.tokenizer, self.seq_len - 1
        padding = [t.eos_id if t.pad_id is None else t.pad_id] * (self.seq_len if self.arch.pooling == "last" else 0)
        whole = [[t.bos_id] * t.adds_bos + own.tolist() for own in t.encode_batch(texts)]
        ids = [own[:room] + [t.eos_id] for own in whole]
        ids = [np.array(own + padding[len(own) :], np.int32) for own in ids]
        return ids, np.array([len(own) > room for own in whole])

    def _text(self, record, draw):
        text = field(record, self.text_key)
        if isinstance(text, list) and text:
            text = text[int(draw * len(text))]
        if not isinstance(text, str):
            raise UserError(f"{place_of(record)}: {self.text_key!r} is {text!r:.40}; expected a text or a list "
                            "of texts")
        return text

    def random_batch(self, n, rng):
        size = self.view.size
        return {"tokens": rng.integers(0, self.arch.vocab_size, (n, self.seq_len), dtype=np.int32),
                "length": np.full(n, self.seq_len, np.int32), "cut": np.zeros(n, bool),
                "weights": np.ones(n, np.float32),
                "images": rng.integers(0, 256, (n, size, size, self.view.channels), dtype=np.uint8)}

    def init(self, key):
        size = self.encoder.patch_size * round(self.encoder.patch_positions ** 0.5)
        dummy = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jnp.zeros((1, size, size, self.view.channels))
        return self._unplaced.init(key, *dummy, method="everything")["params"]

    def embed(self, params, batch, key=None):
        """Returns (image, text), float32 [n, U]: all that other examples of the batch see of each."""
        keys = jax.random.split(key) if key is not None else (None, None)
        pixels = normalised(batch["images"], self.mean, self.std)
        return (self._apply(params, pixels, keys[0], method="embed_image")[0],
                self._apply(params, batch["tokens"], batch["length"], keys[1], method="embed_text")[0])

    def loss_of(self, params, embedded, batch):
        """Returns the losses of a whole batch whose examples are `embedded`. An example of weight 0 is in no pair."""
        (image_BU, text_CU), weight_B = embedded, batch["weights"]
        layout = self.module.layout
        rows = (lambda x: layout.constrain(x, "batch", None)) if layout else lambda x: x
        if layout:   # each device has its images' similarities to all texts
            image_BU, text_CU = rows(image_BU), layout.constrain(text_CU, None, None)
        most = MOST_LOGIT_SCALE if self.loss_kind == "softmax" else jnp.inf
        logits_BC = rows(self._apply(params, image_BU, text_CU, most, method="logits"))
        real_B = weight_B > 0
        same_BC = jnp.eye(len(weight_B), dtype=bool)
        agree_B = jnp.where(same_BC, logits_BC, 0).sum(1)
        among = lambda axis: jnp.where(jnp.expand_dims(real_B, 1 - axis), logits_BC, -jnp.inf)
        if self.loss_kind == "softmax":
            # A column or row of padding alone would have the gradient of log 0.
            lse = lambda axis: jax.nn.logsumexp(jnp.where(same_BC, logits_BC, among(axis)), axis=axis)
            nll_B = (lse(1) + lse(0)) / 2 - agree_B
        else:
            pair_BC = jax.nn.softplus(jnp.where(same_BC, -logits_BC, logits_BC))
            nll_B = jnp.where(real_B, pair_BC, 0).sum(1)
        nll_B = jnp.where(real_B, nll_B * weight_B, 0)
        total = weight_B.sum()
        hit = lambda axis: (((agree_B >= among(axis).max(axis)) * weight_B).sum(), total)
        return Loss(nll_B.sum(), total, {
            "image_to_text_accuracy": hit(1), "text_to_image_accuracy": hit(0),
            "cut_frac": ((batch["cut"] * weight_B).sum(), total)})

    def loss(self, params, batch, key=None):
        return self.loss_of(params, self.embed(params, batch, key), batch)

    # --- predict ----------------------------------------------------------------------------------------------------

    def _apply(self, params, *inputs, method, **how):
        return self.module.apply({"params": params}, *inputs, method=method, **how)

    def hidden(self, params, tokens_BT, capture=()):
        """Returns (hidden states [B, T, D], taps) of texts without padding."""
        length = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1])
        return self._apply(params, tokens_BT, length, method="embed_text", capture=capture)[1:]

    def embed_text(self, params, tokens_BT, length_B):
        """Returns float32 [B, U], vectors of length 1, of the first `length_B` tokens of each row; see `text_ids`."""
        return self._apply(params, tokens_BT, length_B, method="embed_text")[0]

    def embed_image(self, params, images_BHWC):
        """Returns float32 [B, U], vectors of length 1, of images uint8, or float in [0, 1]; of any size."""
        return self._apply(params, normalised(images_BHWC, self.mean, self.std), method="embed_image")[0]

    def similarity(self, params, image_BU, text_CU):
        """Returns float32 logits [B, C] of each image with each text, from their vectors."""
        return self._apply(params, image_BU, text_CU, method="logits")

    def ensemble(self, params, text_CNU):
        """Returns float32 [C, U]: of each class one vector, of the vectors of N texts on it.

        Source: arXiv:2103.00020, section 3.1.4.
        """
        return _unit(text_CNU.mean(1))

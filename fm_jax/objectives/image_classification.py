"""Classification of images by an encoder of patches (a Vision Transformer) and one matrix on its pooled vector.

Try:  python -m fm_jax.train --config configs/image_classification.py:tiny --workdir runs/x --config.data.train=data/x
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import images
from fm_jax.architecture import Architecture
from fm_jax.data.examples import field, place_of
from fm_jax.errors import UserError
from fm_jax.frontends import ImageModel, normalised
from fm_jax.model import normal, param, zeros
from fm_jax.objectives import Loss, uniform
from fm_jax.sharding import Layout


class Classifier(nn.Module):
    """The encoder, and the logits of its vector."""

    arch: Architecture
    num_classes: int           # 0: without logits
    layout: Layout | None = None

    def setup(self):
        a, n = self.arch, self.num_classes
        self.image = ImageModel(a, self.layout)
        if n:
            self.head = param(self, "head", normal(0.02), a.param_dtype, embed=a.embed_dim, classes=n)
            self.head_bias = param(self, "head_bias", zeros, a.param_dtype, classes=n)

    def __call__(self, images_BHWC, key=None, capture=()):
        """Returns (pooled [B, D], hidden states [B, T, D], taps) of normalised images."""
        return self.image(images_BHWC, key, capture)

    def logits(self, vector_BD):
        """Returns float32 [B, classes]."""
        if not self.num_classes:
            return None
        y = jnp.matmul(vector_BD, self.head.astype(vector_BD.dtype), preferred_element_type=jnp.float32)
        return y + self.head_bias.astype(jnp.float32)


class ImageClassification:
    """The objective; `config.model` is the encoder. `config.objective_args`:

    num_classes: labels are whole numbers below it. 0: there is no head, for weights that came without.
    classes: their names, where labels are texts.
    label_smoothing: this share of the target is spread over all classes (arXiv:1512.00567, section 7).
    image_key, label_key: fields of a record.
    image_size, resize, filter, min_crop_area, flip: see `images.View`.
    mean, std: of each channel, by which pixels in [0, 1] are normalised.

    Records whose image cannot be read count for nothing.
    """

    reads = "examples"

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, num_classes=1000, classes=(),
                 label_smoothing=0.0, image_key="image", label_key="label", image_size=224, resize="crop",
                 filter="bilinear", min_crop_area=1.0, flip=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        self.arch = Architecture(**config.model.to_dict())
        self.view = images.View(image_size, resize, filter, self.arch.channels, min_crop_area, flip)
        self.mean, self.std = images.check_tower(self.arch, self.view, mean, std, layout, "model")
        if num_classes < 0 or classes and len(classes) != num_classes:
            raise UserError(f"config.objective_args: num_classes={num_classes} must be 0 or more, and as many as the "
                            f"{len(classes)} names of classes")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"config.objective_args.label_smoothing={label_smoothing} must be in [0, 1)")
        self.num_classes, self.classes, self.label_smoothing = num_classes, tuple(classes), label_smoothing
        self.tokenizer, self.image_key, self.label_key = tokenizer, image_key, label_key
        self.tokens_per_example = T = self.arch.class_token + (image_size // self.arch.patch_size) ** 2
        self.flops_per_example = T * self.arch.flops_per_token(T) + 6.0 * self.arch.embed_dim * num_classes
        self.module, self._unplaced = (Classifier(self.arch, num_classes, where) for where in (layout, None))
        self.predict = {"classify": self.classify, "embed_image": self.embed_image, "hidden_image": self.hidden_image}

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        size = self.view.size
        return {"images": jax.ShapeDtypeStruct((batch_size, size, size, self.view.channels), jnp.uint8),
                "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
                "weights": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns images, uint8 [n, H, W, C], labels, int32 [n], and weights, float32 [n].

        A record has an image, bytes of a file, and a label.
        """
        draws, n, size = uniform(seeds, 4), len(records), self.view.size
        out = {"images": np.zeros((n, size, size, self.view.channels), np.uint8), "labels": np.zeros(n, np.int32),
               "weights": np.zeros(n, np.float32)}
        for i, record in enumerate(records):
            if record is not None:
                out["labels"][i] = self._label(record)
                out["weights"][i] = images.into(out["images"][i], field(record, self.image_key), place_of(record),
                                                self.view, draws[i] if train else None)
        return out

    def _label(self, record):
        label = field(record, self.label_key)
        if self.classes and label in self.classes:
            return self.classes.index(label)
        if type(label) is not int or not 0 <= label < self.num_classes:
            names = f", or one of {', '.join(map(str, self.classes))[:200]}" if self.classes else ""
            raise UserError(f"{place_of(record)}: {self.label_key!r} is {label!r:.40}; expected a whole number "
                            f"below num_classes={self.num_classes}{names}")
        return label

    def random_batch(self, n, rng):
        size = self.view.size
        return {"images": rng.integers(0, 256, (n, size, size, self.view.channels), dtype=np.uint8),
                "labels": rng.integers(0, max(self.num_classes, 1), n, dtype=np.int32),
                "weights": np.ones(n, np.float32)}

    def init(self, key):
        size = self.arch.patch_size * round(self.arch.patch_positions ** 0.5)
        dummy = jnp.zeros((1, size, size, self.view.channels))
        return self._unplaced.init(key, dummy, method=lambda m, x: m.logits(m(x)[0]))["params"]

    def loss(self, params, batch, key=None):
        if not self.num_classes:
            raise UserError("config.objective_args.num_classes=0: an encoder without a head has no loss to train with")
        vector, _, _ = self.module.apply({"params": params}, normalised(batch["images"], self.mean, self.std), key)
        logits = self.module.apply({"params": params}, vector, method="logits")
        log_p, weight = jax.nn.log_softmax(logits), batch["weights"]
        nll = -jnp.take_along_axis(log_p, batch["labels"][:, None], axis=1)[:, 0]
        smooth = self.label_smoothing
        total = weight.sum()
        correct = logits.argmax(1) == batch["labels"]
        return Loss((((1 - smooth) * nll - smooth * log_p.mean(1)) * weight).sum(), total,
                    {"cross_entropy": ((nll * weight).sum(), total), "accuracy": ((correct * weight).sum(), total)})

    # --- predict: images are uint8, or float in [0, 1], of any size --------------------------------------------------

    def _encoded(self, params, images_BHWC, capture=()):
        return self.module.apply({"params": params}, normalised(images_BHWC, self.mean, self.std), capture=capture)

    def classify(self, params, images_BHWC):
        """Returns float32 logits [B, classes]."""
        return self.module.apply({"params": params}, self.embed_image(params, images_BHWC), method="logits")

    def embed_image(self, params, images_BHWC):
        """Returns the pooled vectors [B, D]."""
        return self._encoded(params, images_BHWC)[0]

    def hidden_image(self, params, images_BHWC, capture=()):
        """Returns (hidden states [B, T, D], taps)."""
        return self._encoded(params, images_BHWC, capture)[1:]

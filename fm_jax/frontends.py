"""What turns a medium into x [B, T, D] for the Transformer, and hidden states back into logits; the models of text and
of images.

Layer 1. Text tokens and patches of images today; log-mel frames, series, actions and timesteps find their place here.
Letters as in `model.py`; of images, H and W pixels, C channels.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import kernels
from fm_jax.architecture import Architecture
from fm_jax.model import (ACTIVATIONS, Attention, Cache, Context, Mlp, Norm, Transformer, Trunk, dropout, fan_in,
                          normal, param, zeros)
from fm_jax.sharding import Layout


def sinusoidal_positions(positions_BT, dim: int):
    """Returns float32 [B, T, dim]: sines in the first half, cosines in the second.

    Source: arXiv:1706.03762, section 3.5, with the channels grouped instead of interleaved.
    """
    freqs = 10000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angles = positions_BT[..., None].astype(jnp.float32) * freqs
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :dim]


class TokenEmbed(nn.Module):
    """Token ids to x and hidden states to logits, through one table (tied) or two."""

    arch: Architecture
    layout: Layout | None = None

    def setup(self):
        a = self.arch
        table = lambda name: param(self, name, normal(0.02), a.param_dtype, vocab=a.vocab_size, embed=a.embed_dim)
        self.tokens = table("tokens")
        self.head = self.tokens if a.tie_embeddings else table("head")
        if a.has_position_table:
            self.positions = param(self, "positions", normal(0.02), a.param_dtype,
                                   position=a.max_seq_len + a.position_offset, embed=a.embed_dim)
        if a.num_token_types:
            self.types = param(self, "types", normal(0.02), a.param_dtype,
                               position=a.num_token_types, embed=a.embed_dim)
        if a.embed_norm:
            self.norm = Norm(a)
        self.bias = None
        if a.head_transform:
            self.transform = param(self, "transform", fan_in(a.embed_dim), a.param_dtype, embed=a.embed_dim,
                                   norm=a.embed_dim)
            if a.mlp_bias:
                self.transform_bias = param(self, "transform_bias", zeros, a.param_dtype, norm=a.embed_dim)
            self.transform_norm = Norm(a)
            self.bias = param(self, "head_bias", zeros, a.param_dtype, vocab=a.vocab_size)

    def __call__(self, tokens_BT, positions_BT, key=None, types_BT=None):
        """Returns x [B, T, D] in the compute dtype. Ids and positions outside their tables are the caller's error.

        types_BT: rows of the table of token types; default the first.
        """
        a = self.arch
        rows = self._gatherable(self.tokens)[tokens_BT].astype(a.dtype) * jnp.asarray(a.embed_scale, a.dtype)
        if a.has_position_table:
            rows += self._gatherable(self.positions, "position")[positions_BT + a.position_offset].astype(a.dtype)
        elif a.position == "sinusoidal":
            rows += sinusoidal_positions(positions_BT, a.embed_dim).astype(a.dtype)
        if a.num_token_types:
            types = self._gatherable(self.types, "position").astype(a.dtype)
            rows += types[0] if types_BT is None else types[types_BT]
        x = dropout(self.norm(rows) if a.embed_norm else rows, a.dropout, key)
        return self.layout.constrain(x, "batch", "length", "embed") if self.layout else x

    def _gatherable(self, table, axis="vocab"):
        """Returns the table gathered over fsdp: a gather from its cut width makes XLA rematerialise the activations."""
        return jax.lax.with_sharding_constraint(table, self.layout.sharding((axis, None), table.shape)) if (
            self.layout) else table

    def logits(self, x_BTD):
        """Returns float32 logits [B, T, V]."""
        return kernels.logits(self._transformed(x_BTD), self.head, self.bias, softcap=self.arch.logit_softcap)

    def _transformed(self, x_BTD):
        if self.arch.logit_scale != 1:
            x_BTD = x_BTD * jnp.asarray(self.arch.logit_scale, x_BTD.dtype)
        if not self.arch.head_transform:
            return x_BTD
        y = kernels.linear(x_BTD, self.transform)
        y = y + self.transform_bias.astype(y.dtype) if self.arch.mlp_bias else y
        return self.transform_norm(ACTIVATIONS[self.arch.activation](y))

    def sum_of(self, x_BTD, arrays, f):
        """Returns the sum over pieces of f(float32 logits [b, t, V], the same piece of each of `arrays` [B, T, ...]).

        f returns a tree of scalars, 0 for arrays of zeros. All logits are never there at once: going back makes them
        again.
        """
        a, (B, T) = self.arch, x_BTD.shape[:2]
        apart, n = _rows_of_pieces(self.layout, B, T)
        parts = self.layout.parts("pieces") if self.layout else 1
        cut = lambda x: kernels.chunks(apart(x), max(1, a.loss_chunk_tokens * parts // (n * B)))
        head, bias, softcap = self.head, self.bias, a.logit_softcap
        one = jax.checkpoint(lambda piece: f(kernels.logits(piece[0], head, bias, softcap=softcap), piece[1]))
        pieces = cut(self._transformed(x_BTD)), jax.tree.map(cut, arrays)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(lambda sums, piece: (jax.tree.map(jnp.add, sums, one(piece)), None), zero, pieces)[0]

    def loss_sum(self, x_BTD, labels_BT, weights_BT, z_loss: float):
        """Returns (sum of weight * (nll + z_loss lse^2), (nll, lse, correct) [B, T] without gradient).

        All logits are never there at once.
        """
        a, layout, (B, T) = self.arch, self.layout, labels_BT.shape
        apart, n = _rows_of_pieces(layout, B, T)
        parts = layout.parts("pieces") if layout else 1
        together = lambda x: x.reshape(n, B, T // n).swapaxes(0, 1).reshape(B, T)
        rows = [apart(x) for x in (self._transformed(x_BTD), labels_BT, weights_BT)]
        total, tokens = kernels.cross_entropy_sum(
            rows[0], self.head, rows[1], rows[2], self.bias, z_loss=z_loss, softcap=a.logit_softcap,
            chunk_length=max(1, a.loss_chunk_tokens * parts // (n * B)))
        return total, tuple(map(together, tokens)) if n > 1 else tokens


def _rows_of_pieces(layout, B, T):
    """Returns (rows [B, T, ...] -> rows of pieces, pieces): where sequences are cut, what a device has stays on it."""
    n = layout.parts("length") if layout else 1

    def apart(x):
        if n == 1:
            return x
        pieces = x.reshape(B, n, T // n, *x.shape[2:]).swapaxes(0, 1).reshape(n * B, T // n, *x.shape[2:])
        return layout.constrain(pieces, "pieces", *(None,) * (x.ndim - 1))
    return apart, n


def real(tokens_BT, length_B):
    """Returns int32 [B, T], 1 in the first `length_B` places of each row and 0 in its padding, as segments are."""
    return (jnp.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)


POOLINGS = ("mean", "max", "cls", "last")


def text_vectors(hidden_BTD, length_B, how: str):
    """Returns float32 [B, D]: of the first `length_B` states of each row the mean, the largest of each channel, the
    first ("cls") or the last.
    """
    x = hidden_BTD.astype(jnp.float32)
    if how == "cls":
        return x[:, 0]
    if how == "last":
        return jnp.take_along_axis(x, length_B[:, None, None] - 1, axis=1)[:, 0]
    seen = real(hidden_BTD, length_B)[..., None] > 0
    if how == "max":
        return jnp.where(seen, x, -jnp.inf).max(1)
    return jnp.where(seen, x, 0).sum(1) / length_B[:, None]


class TextModel(nn.Module):
    """Token embedding, stack and head: a decoder or an encoder of text."""

    arch: Architecture
    layout: Layout | None = None

    def setup(self):
        self.embed = TokenEmbed(self.arch, self.layout)
        self.transformer = Transformer(self.arch, self.layout)

    def __call__(self, tokens_BT, positions_BT=None, segment_ids_BT=None, cache: Cache | None = None, last_BT=None,
                 trunk: Trunk | None = None, types_BT=None, key=None, capture=()):
        """Returns (hidden states [B, T, D], cache, taps)."""
        B, T = tokens_BT.shape
        if positions_BT is None:
            start = 0 if cache is None else cache.length_B[:, None]
            positions_BT = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        embed_key, key = jax.random.split(key) if key is not None else (None, None)
        x = self.embed(tokens_BT, positions_BT, embed_key, types_BT)
        return self.transformer(x, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache,
                                last_BT=last_BT, trunk=trunk, key=key, capture=capture)

    def loss_sum(self, hidden_BTD, targets_BT, weights_BT, z_loss):
        return self.embed.loss_sum(hidden_BTD, targets_BT, weights_BT, z_loss)

    def sum_of(self, hidden_BTD, arrays, f):
        return self.embed.sum_of(hidden_BTD, arrays, f)

    def loss_of(self, hidden_BTD, targets_BT, f):
        """Returns f(nll_BT), (scalar, aux), of the negative log-likelihood of each target, with its whole gradient.

        All logits are never there at once: the gradient of a sum with weights df/dnll is that of f. So logits are made
        twice, first without gradient.
        """
        nll_BT = jax.lax.stop_gradient(self.loss_sum(hidden_BTD, targets_BT, jnp.zeros(targets_BT.shape), 0.0)[1][0])
        (value, aux), weights_BT = jax.value_and_grad(f, has_aux=True)(nll_BT)
        total, _ = self.loss_sum(hidden_BTD, targets_BT, jax.lax.stop_gradient(weights_BT), 0.0)
        return jax.lax.stop_gradient(value) + total - jax.lax.stop_gradient(total), aux

    def logits(self, hidden_BTD):
        return self.embed.logits(hidden_BTD)


class EncoderDecoder(nn.Module):
    """Text to text: an encoder and a decoder that share the table of tokens, and the head. Neither has learned positions.
    """

    encoder_arch: Architecture
    arch: Architecture          # of the decoder
    layout: Layout | None = None

    def setup(self):
        self.embed = TokenEmbed(self.arch, self.layout)
        self.encoder = Transformer(self.encoder_arch, self.layout)
        self.decoder = Transformer(self.arch, self.layout)

    def encode(self, tokens_BS, positions_BS=None, segment_ids_BS=None, key=None, capture=()):
        """Returns (hidden states [B, S, D], taps)."""
        x, positions_BS, key = self._embedded(tokens_BS, positions_BS, None, key)
        hidden, _, taps = self.encoder(x, positions_BT=positions_BS, segment_ids_BT=segment_ids_BS, key=key,
                                       capture=capture)
        return hidden, taps

    def context(self, hidden_BSD, segment_ids_BS=None) -> Context:
        """Returns what a decoder's cache has of the encoder's output."""
        return self.decoder.context(hidden_BSD, segment_ids_BS)

    def __call__(self, tokens_BT, context_BSD=None, positions_BT=None, segment_ids_BT=None,
                 context_segment_ids_BS=None, cache: Cache | None = None, key=None, capture=()):
        """Returns (hidden states [B, T, D] of the decoder, cache, taps)."""
        x, positions_BT, key = self._embedded(tokens_BT, positions_BT, cache, key)
        return self.decoder(x, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, context_BSD=context_BSD,
                            context_segment_ids_BS=context_segment_ids_BS, cache=cache, key=key, capture=capture)

    def _embedded(self, tokens_BT, positions_BT, cache, key):
        """Returns (x [B, T, D], positions [B, T], key of the stack)."""
        B, T = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to((0 if cache is None else cache.length_B[:, None]) + jnp.arange(T), (B, T))
        embed_key, key = jax.random.split(key) if key is not None else (None, None)
        return self.embed(tokens_BT, positions_BT, embed_key), positions_BT, key

    def loss_sum(self, hidden_BTD, targets_BT, weights_BT, z_loss):
        return self.embed.loss_sum(hidden_BTD, targets_BT, weights_BT, z_loss)

    def logits(self, hidden_BTD):
        return self.embed.logits(hidden_BTD)


# --- images -----------------------------------------------------------------------------------------------------------

def cubic(old: int, new: int) -> np.ndarray:
    """Returns float64 [new, old]: what makes a row of `new` values of one of `old` by cubic convolution.

    As PyTorch's, from which published position tables were interpolated: ends are repeated, nothing is smoothed where
    the row gets shorter, and a = -0.75 (`jax.image.resize` has -0.5).

    Source: Keys 1981, Cubic convolution interpolation for digital image processing, equation 15.
    """
    a, out = -0.75, np.zeros((new, old))
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for k in np.floor(at)[None] + np.arange(-1, 3)[:, None]:
        d = np.abs(at - k)
        weight = np.where(d <= 1, (a + 2) * d ** 3 - (a + 3) * d ** 2 + 1, a * (d ** 3 - 5 * d ** 2 + 8 * d - 4))
        np.add.at(out, (np.arange(new), k.clip(0, old - 1).astype(int)), weight)
    return out


def normalised(images_BHWC, mean, std):
    """Returns float32 (image - mean) / std by channel, of images uint8, or float in [0, 1]."""
    x = images_BHWC.astype(jnp.float32)
    x = x / 255 if images_BHWC.dtype == jnp.uint8 else x
    return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


class PatchEmbed(nn.Module):
    """Images to x: squares of pixels through one matrix, a class token before them, learned positions."""

    arch: Architecture
    layout: Layout | None = None

    @nn.compact
    def __call__(self, images_BHWC, key=None):
        """Returns x [B, T, D] in the compute dtype, of normalised images; patches row by row.

        Pixels at the right and below that fill no patch are left out. The positions are of a square image; those of
        another size are interpolated (arXiv:2010.11929, section 3.2).
        """
        a, (B, height, width, C) = self.arch, images_BHWC.shape
        P, D, dtype = a.patch_size, a.embed_dim, a.dtype
        w = param(self, "patches", fan_in(P * P * C), a.param_dtype, patch_rows=P, patch_columns=P, channels=C, embed=D)
        rows, columns, side = height // P, width // P, round(a.patch_positions ** 0.5)
        pixels = images_BHWC[:, : rows * P, : columns * P].reshape(B, rows, P, columns, P, C)
        x = kernels.linear(pixels.swapaxes(2, 3).reshape(B, rows * columns, P, P, C).astype(dtype), w, 3)
        if a.patch_bias:
            x += param(self, "bias", zeros, a.param_dtype, norm=D).astype(dtype)
        positions = param(self, "positions", normal(0.02), a.param_dtype, position=a.max_seq_len, embed=D)
        if self.layout:   # as of `TokenEmbed`'s tables
            positions = jax.lax.with_sharding_constraint(positions, self.layout.sharding((None, None)))
        first, grid = positions[: a.class_token], positions[a.class_token :]
        if (rows, columns) != (side, side):
            grid = jnp.einsum("rh,cw,hwd->rcd", cubic(side, rows), cubic(side, columns), grid.reshape(side, side, D),
                              preferred_element_type=jnp.float32).reshape(rows * columns, D)
        x += grid.astype(dtype)
        if a.class_token:
            token = param(self, "class_token", normal(0.02), a.param_dtype, norm=D)
            x = jnp.concatenate([jnp.broadcast_to((token + first).astype(dtype), (B, 1, D)), x], axis=1)
        x = dropout(Norm(a, name="norm")(x) if a.embed_norm else x, a.dropout, key)
        return self.layout.constrain(x, "batch", "length", "embed") if self.layout else x


class AttentionPool(nn.Module):
    """One vector of a sequence: what a learned query attends to, through an mlp with a residual.

    Source: arXiv:2303.15343 (SigLIP), whose head is that of arXiv:2106.04560, section 3.4.
    """

    arch: Architecture
    layout: Layout | None = None

    @nn.compact
    def __call__(self, x_BTD):
        """Returns [B, D]."""
        a, (B, _, D) = self.arch, x_BTD.shape
        query = param(self, "query", normal(D ** -0.5), a.param_dtype, norm=D).astype(x_BTD.dtype)
        attend = Attention(a, self.layout, cross=True, name="attention")
        y = attend(jnp.broadcast_to(query, (B, 1, D)), kernels.Mask(False), context_BSD=x_BTD)[0]
        return (y + Mlp(a, self.layout, name="mlp")(Norm(a, name="norm")(y)))[:, 0]


class ImageModel(nn.Module):
    """Patches, stack and pooling: an encoder of images."""

    arch: Architecture
    layout: Layout | None = None

    def setup(self):
        self.embed = PatchEmbed(self.arch, self.layout)
        self.transformer = Transformer(self.arch, self.layout)
        if self.arch.pooling == "attention":
            self.pool = AttentionPool(self.arch, self.layout)

    def __call__(self, images_BHWC, key=None, capture=()):
        """Returns (pooled [B, D], hidden states [B, T, D], taps) of normalised images."""
        embed_key, key = jax.random.split(key) if key is not None else (None, None)
        hidden, _, taps = self.transformer(self.embed(images_BHWC, embed_key), key=key, capture=capture)
        vector = {"attention": lambda: self.pool(hidden), "first": lambda: hidden[:, 0],
                  "mean": lambda: hidden.mean(1, dtype=jnp.float32).astype(hidden.dtype)}[self.arch.pooling]()
        return vector, hidden, taps


# --- sound ------------------------------------------------------------------------------------------------------------

class AudioStem(nn.Module):
    """Log-mel frames to x [B, frames / 2, D]: two convolutions over three frames, and fixed positions.

    Source: arXiv:2212.04356, section 2.2.
    """

    arch: Architecture          # of the encoder; it hears 2 max_seq_len frames
    num_mels: int
    layout: Layout | None = None

    @nn.compact
    def __call__(self, frames_BFC):
        a, x = self.arch, frames_BFC.astype(self.arch.dtype)
        for number, (channels, stride) in enumerate(((self.num_mels, 1), (a.embed_dim, 2)), 1):
            w = param(self, f"conv{number}", fan_in(3 * channels), a.param_dtype, taps=3, channels=channels,
                      embed=a.embed_dim)
            bias = param(self, f"conv{number}_bias", zeros, a.param_dtype, norm=a.embed_dim)
            x = jax.lax.conv_general_dilated(x, w.astype(x.dtype), (stride,), ((1, 1),),
                                             dimension_numbers=("NWC", "WIO", "NWC"))
            x = jax.nn.gelu(x + bias.astype(x.dtype), approximate=False)
        table = param(self, "positions", _sinusoids, a.param_dtype, position=a.max_seq_len, norm=a.embed_dim)
        x += jax.lax.stop_gradient(table)[: x.shape[1]].astype(x.dtype)   # fixed, but files have it
        return self.layout.constrain(x, "batch", "length", "embed") if self.layout else x


def _sinusoids(key, shape, dtype):
    """Returns Whisper's positions: sines and then cosines of wavelengths from 2 pi to 10,000 times that."""
    half = shape[1] // 2
    angles = jnp.arange(shape[0])[:, None] * jnp.exp(-np.log(10000) / (half - 1) * jnp.arange(half))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)


class SpeechModel(EncoderDecoder):
    """Speech to text: an encoder of log-mel frames, a decoder with its table of tokens, and the head."""

    num_mels: int = 80

    def setup(self):
        self.embed = TokenEmbed(self.arch, self.layout)
        self.stem = AudioStem(self.encoder_arch, self.num_mels, self.layout)
        self.encoder = Transformer(self.encoder_arch, self.layout)
        self.decoder = Transformer(self.arch, self.layout)

    def encode(self, frames_BFC, key=None, capture=()):
        """Returns (hidden states [B, S, D], taps) of log-mel frames, S = F / 2."""
        hidden, _, taps = self.encoder(self.stem(frames_BFC), key=key, capture=capture)
        return hidden, taps

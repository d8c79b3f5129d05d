"""What turns a medium into x [B, T, D] for the Transformer, and hidden states back into logits; the model of text.

Layer 1. Text tokens today; patches, log-mel frames, series, actions and timesteps find their place here.
Letters as in `model.py`.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from fm_jax import kernels
from fm_jax.architecture import Architecture
from fm_jax.model import (ACTIVATIONS, Cache, Context, Norm, Transformer, Trunk, dropout, fan_in, normal, param,
                          zeros)
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

    def loss_sum(self, x_BTD, labels_BT, weights_BT, z_loss: float):
        """Returns (sum of weight * (nll + z_loss lse^2), (nll, lse, correct) [B, T] without gradient).

        All logits are never there at once.
        """
        a, layout, (B, T) = self.arch, self.layout, labels_BT.shape
        n, parts = (layout.parts("length"), layout.parts("pieces")) if layout else (1, 1)
        # Where sequences are cut, the pieces that a device has are rows of their own, and stay on it.
        apart = lambda x: x.reshape(B, n, T // n, *x.shape[2:]).swapaxes(0, 1).reshape(n * B, T // n, *x.shape[2:])
        together = lambda x: x.reshape(n, B, T // n).swapaxes(0, 1).reshape(B, T)
        rows = [self._transformed(x_BTD), labels_BT, weights_BT]
        if n > 1:
            rows = [layout.constrain(apart(x), "pieces", *(None,) * (x.ndim - 1)) for x in rows]
        total, tokens = kernels.cross_entropy_sum(
            rows[0], self.head, rows[1], rows[2], self.bias, z_loss=z_loss, softcap=a.logit_softcap,
            chunk_length=max(1, a.loss_chunk_tokens * parts // (n * B)))
        return total, tuple(map(together, tokens)) if n > 1 else tokens


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

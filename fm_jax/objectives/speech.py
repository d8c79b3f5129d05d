"""Speech to text by an encoder of log-mel frames and a decoder that language, task and timestamp tokens steer.

Try:  python -m fm_jax.transcribe --workdir runs/whisper --audio speech.wav
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import audio
from fm_jax import config as config_lib
from fm_jax.architecture import Architecture, encoder_decoder_flops
from fm_jax.errors import UserError, choose
from fm_jax.frontends import SpeechModel
from fm_jax.model import Context
from fm_jax.objectives import Loss, check_stacks
from fm_jax.sharding import Layout
from fm_jax.tokenizer import check_vocab

TIMESTAMP_S = 0.02     # from one timestamp token to the next
FIRST_TIMESTAMP = 50   # the latest that a text may begin with: of a second


class SpeechRecognition:
    """The objective. The decoder is `config.model`, the encoder `config.encoder`; it hears twice its max_seq_len frames
    of 10 ms. Examples are {"audio": path of a WAV file or samples [n] at `rate` (16,000), "text"}, and, where it is not
    `language`, "language". `config.objective_args`:

    num_mels: frequency bands of a frame.
    language, task: what the decoder is told where an example does not say: "en", "fr", ...; "transcribe", "translate".
    suppress_ids, begin_suppress_ids: ids that are never written, or never first.
    target_length: tokens of a row; 0: model.max_seq_len. Longer texts are cut.
    z_loss: as of `causal_lm.CausalLM`.

    Source: arXiv:2212.04356 (Whisper).
    """

    reads = "examples"

    def __init__(self, config, tokenizer=None, layout: Layout | None = None, *, num_mels=80, language="en",
                 task="transcribe", suppress_ids=(), begin_suppress_ids=(), target_length=0, z_loss=0.0):
        self.arch, self.encoder = Architecture(**config.model.to_dict()), config_lib.encoder(config)
        self.num_mels, self.frames, self.z_loss = num_mels, 2 * self.encoder.max_seq_len, z_loss
        self.target_length = target_length or self.arch.max_seq_len
        self.language, self.task = language, choose(task, ("transcribe", "translate"), "config.objective_args.task")
        self.suppress_ids, self.begin_suppress_ids = list(suppress_ids), list(begin_suppress_ids)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            check_vocab(tokenizer, self.arch.vocab_size)
        self._check_stacks(layout)
        self.tokens_per_example = self.target_length
        stem = 6.0 * 3 * self.encoder.embed_dim * (2 * num_mels + self.encoder.embed_dim)   # of one place
        self.flops_per_example = self.encoder.max_seq_len * stem + encoder_decoder_flops(
            self.encoder, self.arch, self.encoder.max_seq_len, self.target_length)
        self.module = SpeechModel(self.encoder, self.arch, layout, num_mels)
        self.predict = {"hidden": self.hidden, "logits": self.logits, "encode": self.encode, "decode": self.decode}

    def _check_stacks(self, layout):
        """Raises UserError where the two stacks do not go together, or not with the mesh."""
        arch, encoder = self.arch, self.encoder
        rules = [
            (encoder.embed_dim == arch.embed_dim, f"encoder.embed_dim={encoder.embed_dim} must be the model's, "
             f"{arch.embed_dim}"),
            (encoder.embed_dim % 2 == 0 and encoder.position == "none", f"encoder.position={encoder.position!r} must be "
             "'none', and its width even: the frames come with sines and cosines"),
            (self.target_length <= arch.max_seq_len, f"objective_args.target_length={self.target_length} exceeds "
             f"model.max_seq_len={arch.max_seq_len}"),
        ]
        check_stacks(arch, encoder, encoder.max_seq_len, self.target_length, layout, rules)

    # --- the contract -------------------------------------------------------------------------------------------

    def batch_spec(self, batch_size):
        make = lambda dtype=jnp.int32: jax.ShapeDtypeStruct((batch_size, self.target_length), dtype)
        return {"frames": jax.ShapeDtypeStruct((batch_size, self.frames, self.num_mels), jnp.float32),
                "tokens": make(), "targets": make(), "weights": make(jnp.float32)}

    def examples(self, records, seeds, train=True):
        """Returns frames, float32 [n, frames, num_mels], and tokens, targets, int32, weights, float32 [n, target_length].
        """
        frames = np.zeros((len(records), self.frames, self.num_mels), np.float32)
        tokens, targets = np.zeros((2, len(records), self.target_length), np.int32)
        weights = np.zeros(tokens.shape, np.float32)
        for i, record in enumerate(records):
            if record is None:
                continue
            place = getattr(record, "place", "a record")
            for field in ("audio", "text"):
                if field not in record:
                    raise UserError(f"{place}: no field {field!r} (fields here: {', '.join(record)})")
            samples, _ = audio.prepared(record["audio"], record.get("rate", audio.RATE))
            frames[i] = audio.log_mel(samples, self.num_mels, self.frames)
            ids = np.concatenate([self.prompt(record.get("language", self.language), self.task),
                                  self.tokenizer.encode(record["text"])])[: self.target_length]
            ids = np.append(ids, self.tokenizer.eos_id)
            tokens[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
            weights[i, : len(ids) - 1] = 1
        return {"frames": frames, "tokens": tokens, "targets": targets, "weights": weights}

    def random_batch(self, n, rng):
        tokens = rng.integers(0, self.arch.vocab_size, (n, self.target_length + 1), dtype=np.int32)
        return {"frames": rng.normal(size=(n, self.frames, self.num_mels)).astype(np.float32), "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:], "weights": np.ones((n, self.target_length), np.float32)}

    def init(self, key):
        frames, tokens = jnp.zeros((1, 2, self.num_mels)), jnp.zeros((1, 1), jnp.int32)
        unplaced = SpeechModel(self.encoder, self.arch, None, self.num_mels)
        return unplaced.init(key, frames, tokens, method=lambda m, f, t: m.logits(m(t, m.encode(f)[0])[0]))["params"]

    def loss(self, params, batch, key=None):
        keys = jax.random.split(key) if key is not None else (None, None)
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        context, _ = apply(batch["frames"], key=keys[0], method="encode")
        hidden, _, _ = apply(batch["tokens"], context, key=keys[1])
        weight = batch["weights"]
        loss, (nll, _, correct) = apply(hidden, batch["targets"], weight, self.z_loss, method="loss_sum")
        total = weight.sum()
        return Loss(loss, total, {"nll": ((nll * weight).sum(), total), "accuracy": ((correct * weight).sum(), total)})

    # --- predict ----------------------------------------------------------------------------------------------------

    def hidden(self, params, frames_BFC, decoder_tokens_BT, capture=()):
        """Returns (hidden states [B, T, D] of the decoder, taps)."""
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        context, _ = apply(frames_BFC, method="encode")
        hidden, _, taps = apply(decoder_tokens_BT, context, capture=capture)
        return hidden, taps

    def logits(self, params, frames_BFC, decoder_tokens_BT):
        """Returns float32 logits [B, T, V] of what follows each of the decoder's tokens."""
        hidden, _ = self.hidden(params, frames_BFC, decoder_tokens_BT)
        return self.module.apply({"params": params}, hidden, method="logits")

    def encode(self, params, frames_BFC) -> Context:
        """Returns what a decoder's cache has of the sound: made once, whatever is decoded of it."""
        apply = lambda *args, **how: self.module.apply({"params": params}, *args, **how)
        return apply(apply(frames_BFC, method="encode")[0], method="context")

    def decode(self, params, tokens_BT, cache, last_B=None):
        """Returns (float32 logits [B, V] at place `last_B` of each row (default: its end), cache)."""
        hidden, cache, _ = self.module.apply({"params": params}, tokens_BT, cache=cache)
        last_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1] - 1) if last_B is None else last_B
        last = jnp.take_along_axis(hidden, last_B[:, None, None], axis=1)
        return self.module.apply({"params": params}, last, method="logits")[:, 0], cache

    # --- tokens -------------------------------------------------------------------------------------------------------

    @property
    def languages(self) -> dict[str, int]:
        """Languages that the decoder can be told, with their ids."""
        found = {name[2:-2]: i for name, i in self.tokenizer.specials.items() if re.fullmatch(r"<\|[a-z]{2,3}\|>", name)}
        return found

    def special(self, name: str) -> int:
        """Returns the id of <|name|>."""
        return self.tokenizer.specials[choose(f"<|{name}|>", self.tokenizer.specials, "this tokenizer's special token")]

    def prompt(self, language: str, task: str, timestamps: bool = False) -> np.ndarray:
        """Returns the ids that a decoder begins with. A tokenizer without languages is of English alone.

        Raises:
          UserError: a language that the tokenizer does not know, or another task than "transcribe" and "translate".
        """
        choose(task, ("transcribe", "translate"), "task")
        ids = [self.special("startoftranscript")]
        if self.languages:
            ids += [self.languages[choose(language, self.languages, "language")], self.special(task)]
        elif (language, task) != ("en", "transcribe"):
            raise UserError(f"language={language!r}, task={task!r}: this model is of English alone")
        return np.array(ids + [self.special("notimestamps")] * (not timestamps), np.int32)

    def allowed(self, timestamps: bool):
        """Returns the `change` of `decode.beam_search` that keeps a decoder to what it may write.

        With timestamps they come in pairs and never go back, and one comes where all of them together are likelier
        than any word. Source: the code of arXiv:2212.04356, `ApplyTimestampRules`.
        """
        end, bare = self.tokenizer.eos_id, self.special("notimestamps")
        first = self.first_timestamp

        def change(logits_RV, rows):
            logits_RV[:, [i for i in self.suppress_ids if i < logits_RV.shape[1]]] = -np.inf
            for logits, row in zip(logits_RV, rows):
                if not row:
                    logits[self.begin_suppress_ids] = -np.inf
                if not timestamps:
                    logits[first:] = -np.inf
                    continue
                logits[bare] = -np.inf
                told = [t for t in row if t >= first]
                closing = bool(row) and row[-1] >= first
                paired = len(row) < 2 or row[-2] >= first
                if closing and paired:
                    logits[first:] = -np.inf
                elif closing:
                    logits[:end] = -np.inf
                if told:
                    logits[first : told[-1] + (not closing or paired)] = -np.inf
                if not row:
                    logits[:first] = -np.inf
                    logits[first + FIRST_TIMESTAMP + 1 :] = -np.inf
                top = logits.max()
                if np.log(np.exp(logits[first:] - top).sum() + 1e-38) + top > logits[:first].max():
                    logits[:first] = -np.inf
            return logits_RV

        return change

    def segments(self, tokens, begin_s: float, window_s: float) -> list[tuple[float, float, str]]:
        """Returns (start, end, text) of what was written of a window that begins at `begin_s`: one without timestamps."""
        first, out, start, words = self.first_timestamp, [], 0.0, []

        def close(end):
            text = self.tokenizer.decode([t for t in words if t < first]).strip()
            if text:
                out.append((begin_s + start, begin_s + end, text))

        for token in map(int, tokens):
            if token < first:
                words.append(token)
                continue
            at = (token - first) * TIMESTAMP_S
            if words:
                close(at)
            start, words = at, []
        close(window_s)
        return out

    @property
    def first_timestamp(self) -> int:
        """The id of 0.00 s; the others follow."""
        return self.special("notimestamps") + 1

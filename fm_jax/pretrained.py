"""A trained model, ready to use, from the folder of its run: what `fm_jax.load` returns. Layer 4.

    lm = fm_jax.load("runs/quickstart")          # or a folder with Hugging Face weights
    lm.logits(tokens)  lm.hidden(tokens)  lm.score(contexts, continuations)  lm.generate(prompts)  lm.embed(texts)
    lm.score_texts(texts)  lm.complete(token_ids)  lm.encode(texts)
    lm.classify(texts)  lm.rate(texts)  lm.tag(words)  lm.answer(questions, contexts)   # by what it was trained to do
    lm.embed_images(images)  lm.classify_images(images, classes)
    lm.params  lm.config  lm.tokenizer  lm.module  lm.step
"""

import operator
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax import adapt, audio, checkpoint, config as config_lib, decode, distributed, hf, objectives, quantize
from fm_jax import images as images_lib, scoring, sharding, storage, tree
from fm_jax.data.prepared import document_ends
from fm_jax.errors import UserError, choose
from fm_jax.model import Cache, is_derived, made, merged

EMBED_TOKENS = 4096   # of the texts in one call
STEPS = 8   # tokens between two looks of the host; with 1 a GPT-2-like model is 1.2 times slower at 8 rows, 1.05 at 1


def load(folder, *, step: int | None = None, mesh: dict | None = None, ema: bool = True,
         base: str = "") -> "Pretrained":
    """Returns the model in a run folder, in a folder of Hugging Face weights, or in a GGUF file.

    Of a run that trained adapters or a part of a model, that is the whole model, with its adapters merged.

    Args:
      folder: what `--workdir` was.
      step: of the checkpoint; default the newest.
      mesh: devices per axis, as `config.mesh`, whatever mesh it was trained on; default one device, and of several
        processes, which must use all that they have, data=-1.
      ema: take the average of the parameters where the run keeps one.
      base: the run with the parameters that this one did not train; default where it was then.

    Raises:
      UserError: no run there, no readable checkpoint, another tokenizer than theirs, or a mesh that does not fit.
    """
    folder = storage.place(folder)
    is_hf = not isinstance(folder, storage.Url) and hf.is_folder(folder)
    if not (folder / "config.json").is_file() and not is_hf:
        raise UserError(f"{folder}: no run here (no config.json); train one with python -m fm_jax.train "
                        f"--workdir {folder}")
    if is_hf:
        if step is not None:
            raise UserError(f"{folder}: step={step}: a folder of Hugging Face weights has no checkpoints")
        return load_hf(folder, mesh=mesh)
    config, filled = config_lib.load(folder / "config.json")
    if filled:
        print(f"{folder / 'config.json'} is of an older version; these keys take today's default: {', '.join(filled)}")
    config.model.attention_kernel = "auto"   # the run's was for the machine that trained it
    tokenizer = checkpoint.load_tokenizer(folder)
    objective, model, axes = _abstract(config, tokenizer, mesh)
    layout, here = objective.module.layout, adapt.Adaptation(config, model, axes)
    if base and here.frozen is None:
        raise UserError(f"base={base!r}: the run in {folder} has all parameters of its model")
    step = max(checkpoint.steps(folder), default=None) if step is None else step
    flat_axes, kind = tree.flatten(here.axes, is_leaf=sharding.is_axes), config.quantized
    stored = jax.eval_shape(lambda: quantize.tree_of(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), here.params),
                                                     flat_axes, kind))
    abstract = layout.abstract(stored, tree.nest(quantize.axes_of(flat_axes, kind)))
    params = checkpoint.restore_params(folder, step, abstract, ema=ema)
    if kind:
        params = quantize.derived(params, tree.flatten(model), flat_axes, kind)
    if here.frozen is not None:
        frozen, _ = here.read_base(config, layout, checkpoint.base_of(folder), base)
        params = jax.jit(lambda params, frozen: merged(here.combined(params, frozen)),
                         out_shardings=layout.parameters(model, axes))(params, frozen)
    return Pretrained(config, tokenizer, objective, params, step)


def load_hf(folder, *, mesh: dict | None = None, dtype: str = "") -> "Pretrained":
    """Returns the model in a folder of Hugging Face weights (config.json, safetensors, tokenizer) or a GGUF file.

    `mesh`: as in `load`. `dtype`: of activations; default that of the weights.

    Raises:
      UserError: a family, setting or tensor that this model does not have, a damaged file, or a mesh that does not fit.
    """
    there = hf.open_folder(folder)
    config, tokenizer = hf.read_config(there, dtype=dtype), hf.read_tokenizer(there)
    objective, abstract, _ = _abstract(config, tokenizer, mesh)
    return Pretrained(config, tokenizer, objective, hf.read_params(there, abstract))


def _abstract(config, tokenizer, mesh):
    """Returns (objective on the mesh, its parameters as shape structs with shardings, the tree of their axes)."""
    layout = sharding.Layout(sharding.make_mesh(mesh or {"data": -1 if jax.process_count() > 1 else 1}))
    objective = objectives.load(config, tokenizer, layout)
    params, axes = sharding.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
    return objective, layout.abstract(params, axes), axes


def parse_mesh(text: str) -> dict[str, int] | None:
    """Returns the devices per axis that `--mesh` names, as in "fsdp=4,tensor=2"; None for an empty text."""
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        choose(axis, sharding.MESH_AXES, f"--mesh={text}: axis")
        if axis in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh={text}: give each axis one number of devices, as in fsdp=4,tensor=2; got {item!r}")
        sizes[axis] = int(size)
    return sizes or None


class Transcript(NamedTuple):
    """What `Pretrained.transcribe` heard."""

    text: str
    language: str                                      # that it was told or found
    segments: tuple[tuple[float, float, str], ...]     # start and end in seconds, and text, with timestamps
    notes: tuple[str, ...]                             # what was done to the sound first; "silence"


class Pretrained:
    """A language model with its parameters and tokenizer. Inputs and outputs are NumPy or Python values."""

    def __init__(self, config, tokenizer, objective, params, step: int | None = None):
        self.config, self.tokenizer, self.objective, self.params = config, tokenizer, objective, params
        self.step = step   # of its checkpoint
        self.work = scoring.Work()   # what score and score_texts have done so far
        self.module = objective.module
        for axis in ("context", "stage"):
            if (n := self.module.layout.mesh.shape[axis]) > 1:
                raise UserError(f"mesh axis {axis}={n} is for training; evaluate, generate and serve on the others")
        self._parts = self.module.layout.batch_parts   # the mesh cuts every batch into so many: rows are added to fit
        self._batch_size = -(-16 // self._parts) * self._parts
        self._has_encoder = "encode" in objective.predict
        self._hears = self._has_encoder and hasattr(objective, "num_mels")
        jitted = ("logits", "hidden", "embed", "encode", "classes", "values", "tags", "answers")
        self._jitted = {name: jax.jit(f) for name, f in objective.predict.items() if name in jitted}
        self._layers = [], None   # (arrays of params, what decode.per_layer made of them), when first needed

    def __repr__(self):
        count = tree.count(jax.eval_shape(merged, self.params))
        return f"<{self.config.name or self.config.objective}: {count:,} parameters>"

    def adapted(self, folder, *, step: int | None = None) -> "Pretrained":
        """Returns this model with the adapters of the run in `folder`, which stands on it. Other parameters are shared.

        Raises:
          UserError: no such run, or one of another base.
        """
        config, _ = config_lib.load(storage.place(folder) / "config.json")
        if not adapt.adapts(config):
            raise UserError(f"{folder}: not a run of adapters; fm_jax.load gives its model")
        model, axes = sharding.unbox(jax.eval_shape(self.objective.init, jax.random.key(0)))
        here, layout = adapt.Adaptation(config, model, axes), self.module.layout
        frozen = here.frozen_of(self.params, checkpoint.base_of(folder), str(folder), self.config.name or "this model")
        step = max(checkpoint.steps(folder), default=None) if step is None else step
        params = checkpoint.restore_params(folder, step, layout.abstract(here.params, here.axes), ema=True)
        combined = tree.flatten(here.combined(params, frozen), is_leaf=is_derived)
        return Pretrained(config, self.tokenizer, self.objective,
                          tree.nest({n: jax.jit(made)(p) if is_derived(p) else p for n, p in combined.items()}), step)

    def logits(self, tokens, decoder_tokens=None, segment_ids=None) -> np.ndarray:
        """Returns float32 [B, T, V] for int tokens [B, T]: what the model expects after each token.

        Of a model with an encoder, that reads `tokens` [B, S], after each of `decoder_tokens` [B, T], which begin with
        `objective.start_id`. segment_ids [B, S]: 0 where a source is padding. Of one that hears, `tokens` are log-mel
        frames [B, F, C] (`audio.log_mel`).
        """
        self._must("give logits", "logits")
        logits = distributed.fetch(self._jitted["logits"](self.params, *self._inputs(tokens, decoder_tokens, segment_ids)))
        return logits[: len(tokens)].astype(np.float32)

    def hidden(self, tokens, decoder_tokens=None, segment_ids=None) -> np.ndarray:
        """Returns float32 [B, T, D], arguments as of `logits`: hidden states after the (decoder's) final norm."""
        inputs = self._inputs(tokens, decoder_tokens, segment_ids)
        hidden = distributed.fetch(self._jitted["hidden"](self.params, *inputs)[0])
        return hidden[: len(tokens)].astype(np.float32)

    def score(self, contexts, continuations) -> list[scoring.Score]:
        """Returns (logprob, is_greedy, num_tokens) of each continuation (text) after its context (text).

        Of a model with an encoder, of each target, its end included, for its source.
        """
        contexts, continuations = _texts("contexts", contexts), _texts("continuations", continuations)
        if len(contexts) != len(continuations):
            raise UserError(f"{len(contexts)} contexts for {len(continuations)} continuations; give one for each")
        if self._has_encoder:
            return self._score_targets(contexts, continuations)
        self._must("score texts", "trees", "score")
        pairs = scoring.encode_pairs(self.tokenizer, contexts, continuations)
        return scoring.score(self.objective, self.params, pairs, batch_size=self._batch_size, work=self.work)

    def score_texts(self, texts) -> list[float]:
        """Returns the natural log-probability of each text, from an empty context, every token of it scored once."""
        self._must("score texts", "trees", "score")
        return scoring.score_texts(self.objective, self.params, self.tokenizer, _texts("texts", texts),
                                   batch_size=self._batch_size, work=self.work)

    def complete(self, prompts, *, max_new_tokens: int = 64, temperature: float = 0.0, top_k: int = 0,
                 top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, n: int = 1, seed: int = 0,
                 stop=(), stop_ids=(), logprobs: int | None = None, text=None) -> list[decode.Completion]:
        """Returns n continuations of each prompt (token ids): those of a prompt follow each other.

        temperature 0 takes the likeliest token each time. Continuation i draws from seed + i, whatever is beside it.
        A prompt that leaves no room for max_new_tokens in the model's context is cut at its left. Where the model has
        an encoder, a prompt is what that reads, cut at its right, and the continuation what the decoder makes of it.

        Args:
          stop: strings that end a continuation; the token that completes one stays.
          stop_ids: tokens that end a continuation and do not stay.
          logprobs: as in `decode.complete`.
          text: function of (i, its tokens): the text in which `stop` is sought; default `tokenizer.decode`.
        """
        self._must("continue text", "decode")
        if n < 1:
            raise UserError(f"n={n} must be at least 1")
        if "" in (stop := _texts("stop", stop)):
            raise UserError("stop='': an empty stop string would end every text at once; leave it out")
        text = text or (lambda i, new: self.tokenizer.decode(new))
        params = self._per_layer()
        sampling = decode.Sampling(temperature, top_k, top_p, self.tokenizer.vocab_size, min_p, repetition_penalty)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))   # like lengths together: little padding
        at_once = min(n, self._batch_size)              # continuations of a prompt in a batch
        width = max(self._batch_size // at_once, self._parts)   # prompts in a batch
        out = [None] * (len(prompts) * n)
        for begin in range(0, len(order), width):
            chosen = order[begin : begin + width]
            # As many rows as the mesh needs; a last batch as many as those before it, which is no new shape.
            rows = width if len(order) > width else -(-len(chosen) // self._parts) * self._parts
            padded = chosen + chosen[-1:] * (rows - len(chosen))
            for first in range(0, n, at_once):
                which = [i * n + j for i in padded for j in range(first, min(first + at_once, n))]
                stopped = lambda row, new: decode.find_stop(text(which[row], new), stop)[1]
                read = [prompts[i] for i in padded]
                context = None
                if self._has_encoder:
                    context, read = self._encoded(read), [np.array([self.objective.start_id])] * len(read)
                made = decode.complete(
                    self.objective, params, read, context=context, max_new_tokens=max_new_tokens, sampling=sampling,
                    seeds=(seed + np.array(which)) % 2**32, n=len(which) // rows, logprobs=logprobs,
                    stopped=stopped if stop else None, stop_ids=stop_ids,
                    steps_per_dispatch=min(STEPS, max_new_tokens))
                for i, each in zip(which, made):
                    out[i] = each
        return out

    def generate(self, prompts, *, n: int = 1, stop=(), stop_at_end: bool = True, **how) -> list[str]:
        """Returns n texts that continue each prompt, without the prompt: those of a prompt follow each other.

        Of a model with an encoder, the texts that it makes of each prompt. A prompt is a text, or a chat: a list of
        {"role": ..., "content": ...} that the tokenizer's template renders.

        Args:
          stop: strings that end a text and are not part of it.
          stop_at_end: the end-of-text token ends a text early.
          how: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, as in `complete`.
        """
        prompts = prompts if isinstance(prompts, (str, bytes)) else list(prompts)
        ids, stop = self.prompt_ids(prompts), _texts("stop", stop)
        text = lambda i, new: self._continuation(prompts[i // n], ids[i // n], new)
        made = self.complete(ids, n=n, stop=stop, text=text, **how,
                             stop_ids=document_ends(self.tokenizer) if stop_at_end else ())
        texts = [text(i, each.tokens) for i, each in enumerate(made)]
        ends = [decode.find_stop(text, stop) for text in texts]
        return [text[:at] if found else text for text, (at, found) in zip(texts, ends)]

    def transcribe(self, sounds, *, language: str = "", task: str = "", timestamps: bool = False, num_beams: int = 1,
                   max_new_tokens: int = 0, rate: int = audio.RATE) -> list[Transcript]:
        """Returns what is said in each sound: the path of a WAV file, or samples [n] or [n, channels] at `rate`.

        Windows of as much sound as the model hears follow each other, each on its own; a word that the end of one cuts
        may be lost. What of silence has no text. Other rates and channels are brought to one of 16 kHz: `notes` say it.

        Args:
          language: as "en"; "": the likeliest, by the first window of each sound.
          task: "translate" (into English), or "" as in training, which is "transcribe".
          timestamps: also give `segments`, in seconds.
          num_beams: 1: the likeliest token each time.

        Raises:
          UserError: not a model of speech, a sound that cannot be heard (`audio.prepared`), an unknown language.
        """
        if not self._hears:
            raise UserError(f"{self.config.objective} hears nothing: transcribe is of a model of speech")
        if isinstance(sounds, (str, bytes, os.PathLike)):
            raise UserError(f"sounds={str(sounds)[:60]!r}: give a list of sounds, [sound] for one")
        objective = self.objective
        window_s, T = objective.frames * audio.HOP / audio.RATE, objective.frames * audio.HOP
        prepared = [audio.prepared(sound, rate) for sound in sounds]
        windows = [(i, at) for i, (x, _) in enumerate(prepared) for at in range(0, len(x), T)
                   if np.abs(x[at : at + T]).max() >= audio.SILENCE]
        told = {i: language for i in range(len(sounds))} if language else {}
        parts, beams = {}, {}
        for begin in range(0, len(windows), self._batch_size):
            chosen = windows[begin : begin + self._batch_size]
            frames = np.stack([audio.log_mel(prepared[i][0][at : at + T], objective.num_mels, objective.frames)
                               for i, at in chosen])
            rows = -(-len(frames) // self._parts) * self._parts
            context = self._jitted["encode"](self.params, self._checked_frames(frames))
            if not language:
                for (i, _), found in zip(chosen, self._languages(context, rows)):
                    told.setdefault(i, found)
            prompts = [objective.prompt(told[i], task or objective.task, timestamps) for i, _ in chosen]
            prompts += prompts[:1] * (rows - len(prompts))
            room = objective.arch.max_seq_len - len(prompts[0])
            made = decode.beam_search(
                objective, self._per_layer(), prompts, max_new_tokens=min(max_new_tokens or room, room),
                num_beams=num_beams, stop_ids=[self.tokenizer.eos_id],
                context=context, change=objective.allowed(timestamps))
            beams |= {key: each[0] for key, each in zip(chosen, made)}
        for (i, at), beam in beams.items():
            parts.setdefault(i, []).extend(objective.segments(beam.tokens, at / audio.RATE, window_s))
        return [Transcript(" ".join(text for _, _, text in parts.get(i, []) if text), told.get(i, language),
                           tuple(parts.get(i, [])) if timestamps else (), tuple(notes))
                for i, (_, notes) in enumerate(prepared)]

    def _languages(self, context, rows):
        """Returns the likeliest language of each row."""
        known = self.objective.languages
        if not known:
            return ["en"] * rows
        start = np.full((rows, 1), self.objective.special("startoftranscript"), np.int32)
        cache = Cache.empty(self.objective.arch, rows, 16)._replace(context=context)
        logits, _ = jax.jit(self.objective.predict["decode"])(self.params, start, cache)
        ids = np.array(list(known.values()))
        return [list(known)[i] for i in distributed.fetch(logits)[:, ids].argmax(-1)]

    def encode(self, texts) -> list[np.ndarray]:
        """Returns the token ids of each text, int32 [n], as other libraries read it; see `scoring.encode`."""
        return scoring.encode(self.tokenizer, _texts("texts", texts))

    def prompt_ids(self, prompts) -> list[np.ndarray]:
        """Returns the token ids, int32 [n], that `generate` continues for each prompt, text or chat.

        A text follows the token that documents began with in training, where that was here; a chat, and all prompts
        of weights from elsewhere, are what `encode` makes of them. What an encoder reads is a text and its end.
        """
        if not isinstance(prompts, (str, bytes)):
            prompts = list(prompts)
            chats = [isinstance(p, list) for p in prompts]
            prompts = [self.tokenizer.chat(p) if chat else p for p, chat in zip(prompts, chats)]
        texts, (start, end) = _texts("prompts", prompts), document_ends(self.tokenizer)
        if self._hears:
            raise UserError(f"{self.config.objective} reads sound, not text: use transcribe")
        if self._has_encoder:
            return [np.append(ids, end).astype(np.int32) for ids in self.tokenizer.encode_batch(texts, special=True)]
        begun = lambda text: np.array([start, *self.tokenizer.encode(text)], np.int32)
        return [begun(text) if (self.config.data.train and not chat) or not len(ids) else ids
                for text, chat, ids in zip(texts, chats, self.encode(texts))]

    def embed(self, texts) -> np.ndarray:
        """Returns float32 [n, D], a vector of each text: what the objective was trained to give.

        Of a language model, the mean hidden state over the text's tokens (the first that fit the context).
        """
        self._must("embed texts", "embed")
        return self.embed_ids(self.embedded_ids(texts))

    def embed_ids(self, ids) -> np.ndarray:
        """Returns float32 [n, D], the vectors of texts given as token ids, int [n] each; see `embedded_ids`."""
        out, dim = self._by_length("embed", ids), getattr(self.objective, "dim", self.objective.arch.embed_dim)
        return np.array(out, np.float32).reshape(len(out), dim)

    def classify(self, texts, others=None) -> list[dict[str, float]]:
        """Returns of each text, paired with the one of `others` where it was trained so, {label: its probability}."""
        self._must("classify texts", "classes")
        probabilities = self._by_length("classes", *self._rows(texts, others))
        return [dict(zip(self.objective.labels, row.tolist())) for row in probabilities]

    def rate(self, texts, others=None) -> list[float]:
        """Returns the value of each text, paired as in `classify`."""
        self._must("give values of texts", "values")
        return [float(value) for value in self._by_length("values", *self._rows(texts, others))]

    def tag(self, texts) -> list[list[str]]:
        """Returns the tag of each word of texts that are lists of words, "O" for those that do not fit."""
        self._must("tag words", "tags")
        for words in texts:
            if isinstance(words, str) or not all(isinstance(w, str) and w.split() == [w] for w in words):
                raise UserError(f"texts: expected lists of words without spaces, got {words!r:.80}")
        made = [self.objective.words(words) for words in texts]
        labels, outside = self.objective.labels, self.objective.outside
        found = self._by_length("tags", [ids for ids, _ in made])
        return [[labels[outside if at < 0 else row[at].argmax()] for at in places]
                for row, (_, places) in zip(found, made)]

    def answer(self, questions, contexts) -> list[str]:
        """Returns the part of each context that answers its question; "": there is none.

        A context that is too long is read in pieces, each of which begins in the middle of the one before.
        """
        self._must("answer questions", "answers")
        questions, contexts = _texts("questions", questions), _texts("contexts", contexts)
        if len(questions) != len(contexts):
            raise UserError(f"{len(questions)} questions for {len(contexts)} contexts; give one for each")
        pieces = []   # (which, row, where the context begins in it, spans)
        for i, (question, context) in enumerate(zip(questions, contexts)):
            start, count = 0, len(self.tokenizer.encode(context))
            while True:
                row, begin, spans = self.objective.row(question, context, start)
                pieces.append((i, row, begin, spans))
                if start + len(spans) >= count:
                    break
                start += max(len(spans) // 2, 1)
        types = [(np.arange(len(row)) >= begin).astype(np.int32) for _, row, begin, _ in pieces]
        best, answers = [-np.inf] * len(questions), [""] * len(questions)
        for scores, (i, _, begin, spans) in zip(self._by_length("answers", [p[1] for p in pieces], types), pieces):
            first, last, score = self.objective.best(scores, begin, len(spans))
            if score > best[i]:
                best[i] = score
                answers[i] = contexts[i][spans[first - begin, 0] : spans[last - begin, 1]] if first >= begin else ""
        return answers

    def _rows(self, texts, others):
        """Returns the token ids and types of texts, or pairs, as the objective was trained on."""
        paired, texts = bool(self.objective.pair_key), _texts("texts", texts)
        if paired != (others is not None):
            raise UserError(f"{self.config.name or 'this model'} was trained on "
                            f"{'pairs' if paired else 'single texts'}: "
                            f"{'give the second text of each as others' if paired else 'leave others out'}")
        others = None if others is None else _texts("others", others)
        if others is not None and len(others) != len(texts):
            raise UserError(f"{len(others)} others for {len(texts)} texts; give one for each")
        return self.objective.encode_rows(texts, others)

    def _by_length(self, name, ids, types=None) -> list[np.ndarray]:
        """Returns what the prediction `name` says of each row of token ids; of each of its tokens, where it does so."""
        out, most = [None] * len(ids), self.objective.arch.max_seq_len
        typed = types is not None and self.objective.typed
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))   # like lengths together: little padding
        while order:
            length = min(_near(len(ids[order[0]])), most)
            chosen, order = np.split(np.array(order), [1 << (max(EMBED_TOKENS // length, 1).bit_length() - 1)])
            rows = _near(len(chosen), 1)   # few compiled shapes
            rows += -rows % self._parts
            tokens, kinds, lengths = *np.zeros((2, rows, length), np.int32), np.ones(rows, np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : len(ids[i])], lengths[row] = ids[i], len(ids[i])
                kinds[row, : len(ids[i])] = types[i] if typed else 0
            made = distributed.fetch(self._jitted[name](self.params, tokens, lengths, *([kinds] if typed else [])))
            for row, i in enumerate(chosen):
                out[i] = made[row, : len(ids[i])] if name in ("tags", "answers") else made[row]
            order = order.tolist()
        return out

    def embed_images(self, images) -> np.ndarray:
        """Returns float32 [n, D], a vector of each image; of a model of images and texts, in the space of `embed`.

        An image is a path, the bytes of a file, or an array, uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
        """
        self._must("embed images", "embed_image")
        return self._of_images("embed_image", images)

    def classify_images(self, images, classes=None) -> np.ndarray:
        """Returns float32 [n, C], the probabilities of each image's classes.

        classes: of a model of images and texts, a list that has of each class a text, or several, whose vectors'
          mean is taken. A classifier knows its own.
        """
        if "classify" in self.objective.predict:
            if classes is not None:
                raise UserError(f"classes={classes!r:.80}: this model has {self.objective.num_classes} of its own")
            return _softmax(self._of_images("classify", images))
        self._must("classify images", "embed_image", "similarity", "ensemble")
        if not classes or isinstance(classes, str):
            raise UserError(f"classes={classes!r}: give a list that has of each class a text, or a list of texts")
        predict, texts = self.objective.predict, [[c] if isinstance(c, str) else list(c) for c in classes]
        vectors = [predict["ensemble"](self.params, self.embed(each)[None])[0] for each in texts]
        return _softmax(np.asarray(predict["similarity"](self.params, self.embed_images(images), np.stack(vectors))))

    def _of_images(self, name, images):
        """Returns what the prediction `name` makes of each image, float32 [n, ...]."""
        if isinstance(images, (str, bytes, bytearray, os.PathLike)) or getattr(images, "ndim", 4) < 4:
            raise UserError("images: give a list of images, [image] for one")
        view, out = self.objective.view, []
        predict = self._jitted.setdefault(name, jax.jit(self.objective.predict[name]))
        images = list(images)
        for begin in range(0, len(images) or 1, self._batch_size):
            chosen = images[begin : begin + self._batch_size]
            pixels = np.zeros((self._batch_size, view.size, view.size, view.channels), np.uint8)
            for i, image in enumerate(chosen):
                place = f"images[{begin + i}]"
                if isinstance(image, (str, os.PathLike)):
                    place, image = str(image), _bytes_of(image)
                pixels[i] = images_lib.square(images_lib.decode(image, place), view)
            out.append(distributed.fetch(predict(self.params, pixels))[: len(chosen)].astype(np.float32))
        return np.concatenate(out)

    def embedded_ids(self, texts) -> list[np.ndarray]:
        """Returns the token ids, int32 [n], of which `embed` makes the vector of each text."""
        texts = _texts("texts", texts)
        if hasattr(self.objective, "text_ids"):
            return self.objective.text_ids(texts)
        start, _ = document_ends(self.tokenizer)
        return [np.array([start, *ids], np.int32)[: self.objective.arch.max_seq_len]
                for ids in self.tokenizer.encode_batch(texts)]

    def _continuation(self, prompt, ids, new):
        """Returns the text of the tokens `new` behind `ids`, those of the prompt (text or chat).

        Decoded alone they would lose the space before the first word, where a tokenizer adds one to every text and
        takes it off again. Where it does not give the prompt back as it was, its own version of it is cut off.
        """
        if self._has_encoder:
            return self.tokenizer.decode(new)
        whole = self.tokenizer.decode(np.concatenate([ids, new]))
        same = isinstance(prompt, str) and whole.startswith(prompt)
        before = prompt if same else os.path.commonprefix([whole, self.tokenizer.decode(ids)])
        return whole[len(before):]

    def _per_layer(self):
        """Returns the parameters as `decode.per_layer` makes them: once, until there are others."""
        arrays = jax.tree.leaves(self.params)
        if len(arrays) != len(self._layers[0]) or any(map(operator.is_not, arrays, self._layers[0])):
            self._layers = arrays, decode.per_layer(self.params)
        return self._layers[1]

    def _must(self, what, *names):
        """Raises UserError where the objective's predictions do not allow for `what`."""
        if not set(names) <= set(self.objective.predict):
            raise UserError(f"{self.config.name or 'this model'} was trained by {self.config.objective}, which cannot "
                            f"{what}; it has {', '.join(sorted(self.objective.predict))}")

    def _inputs(self, tokens, decoder_tokens, segment_ids):
        """Returns what `logits` and `hidden` of the objective take, in rows as the mesh needs them."""
        if not self._has_encoder:
            if decoder_tokens is not None or segment_ids is not None:
                raise UserError(f"decoder_tokens and segment_ids are of a model with an encoder, and "
                                f"{self.config.objective} has none")
            return self._checked(tokens),
        if decoder_tokens is None or len(decoder_tokens) != len(tokens):
            raise UserError("a model with an encoder needs decoder_tokens too, a row for each of tokens")
        if self._hears:
            if segment_ids is not None:
                raise UserError("segment_ids are of tokens; what a model of sound hears has none")
            return self._checked_frames(tokens), self._checked(decoder_tokens)
        encoder = self.objective.encoder
        segments = np.ones(np.shape(tokens), np.int32) if segment_ids is None else np.asarray(segment_ids)
        if segments.shape != np.shape(tokens):
            raise UserError(f"segment_ids are {list(segments.shape)}, and tokens {list(np.shape(tokens))}")
        return self._checked(tokens, encoder), self._checked(decoder_tokens), self._checked(segments, encoder)

    def _checked_frames(self, frames):
        """Returns float32 [B + what the mesh needs, F, C]."""
        frames, objective = np.asarray(frames, np.float32), self.objective
        if frames.ndim != 3 or frames.shape[2] != objective.num_mels or not 0 < frames.shape[1] <= objective.frames:
            raise UserError(f"frames are {list(frames.shape)}; expected [batch, at most {objective.frames}, "
                            f"{objective.num_mels}]")
        if not np.isfinite(frames).all():
            raise UserError("frames have values that are not finite")
        return np.pad(frames, ((0, -len(frames) % self._parts), (0, 0), (0, 0)))

    def _sources(self, sources):
        """Returns (tokens, segment_ids [B, S]) of lists of token ids for the encoder, cut at its context, right-padded."""
        longest = self.objective.encoder.max_seq_len
        length = min(-(-max(map(len, sources)) // 16) * 16, longest)   # few compiled shapes
        tokens, segments = np.zeros((2, len(sources), length), np.int32)
        for i, ids in enumerate(sources):
            ids = ids if len(ids) <= longest else np.append(ids[: longest - 1], ids[-1])   # its end stays
            tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
        return tokens, segments

    def _encoded(self, sources):
        """Returns the `Context` of lists of token ids, as many as the mesh takes."""
        return self._jitted["encode"](self.params, *self._sources(sources))

    def _score_targets(self, sources, targets):
        sources, targets = self.prompt_ids(sources), self.prompt_ids(targets)
        order, out = sorted(range(len(targets)), key=lambda i: len(targets[i])), [None] * len(targets)
        for begin in range(0, len(order), self._batch_size):
            chosen = order[begin : begin + self._batch_size]
            length = min(-(-len(targets[chosen[-1]]) // 16) * 16, self.objective.arch.max_seq_len)
            inputs = np.zeros((len(chosen), length), np.int32)
            for row, i in zip(inputs, chosen):
                if len(targets[i]) > length:
                    raise UserError(f"a target of {len(targets[i])} tokens exceeds the model's context of {length}")
                row[: len(targets[i])] = [self.objective.start_id, *targets[i][:-1]]
            tokens, segments = self._sources([sources[i] for i in chosen])
            for logits, i in zip(self.logits(tokens, inputs, segments), chosen):
                logits = logits[: len(targets[i])].astype(np.float64)
                top = logits.max(-1)
                picked = logits[np.arange(len(logits)), targets[i]]
                total = (picked - top - np.log(np.exp(logits - top[:, None]).sum(-1))).sum()
                out[i] = scoring.Score(float(total), bool((picked >= top).all()), len(logits))
        return out

    def _checked(self, tokens, arch=None):
        """Returns int32 [B + what the mesh needs, T]. arch: of the stack that reads them."""
        tokens, arch = np.asarray(tokens), arch or self.objective.arch
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}; expected integers [batch, length]")
        if tokens.shape[1] > arch.max_seq_len:
            raise UserError(f"{tokens.shape[1]} tokens exceed the model's context of {arch.max_seq_len}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < arch.vocab_size:
            bad = tokens[(tokens < 0) | (tokens >= arch.vocab_size)][0]
            raise UserError(f"token id {bad} is outside the vocabulary of {arch.vocab_size}")
        return np.pad(tokens.astype(np.int32), ((0, -len(tokens) % self._parts), (0, 0)))


def _softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _bytes_of(path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None


def _near(n: int, least: int = 16) -> int:
    """Returns the smallest of 2^k and 3 * 2^k, from `least` on, that is not below n: a third of it is waste at most."""
    power = 1 << max(n - 1, 0).bit_length()
    return max(power if n > power * 3 // 4 or power < 4 else power * 3 // 4, least)


def _texts(name, texts) -> list[str]:
    """Returns `texts` as a list. Raises UserError for a single text, which would be read letter by letter."""
    if isinstance(texts, (str, bytes)):
        raise UserError(f"{name}={texts[:40]!r}: give a list of texts, [text] for one")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{name}: expected texts, got {text!r}")
    return texts

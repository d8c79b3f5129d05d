"""Writes `tests/hf_models/`: tiny random models of transformers' families, and what transformers computes with them.

Of each: config.json and model.safetensors as transformers writes them, and expected.npz: `tokens` [2, 23], and of them
`hidden` [2, 23, D] (after the last norm) and `logits` [2, 23, V]; where there is an encoder, of `decoder_tokens`
[2, 17] behind it, where `mask` [2, 23] is 0 at the padding, or of log-mel `frames` [2, 46, C] in place of tokens. Sizes
are odd in some way: kv heads are not heads, head sizes not the width over the heads, windows shorter than the input. Of
the models of images: `images` uint8 [2, 17, 17, 3], whose last pixels fill no patch, the hidden states and vectors of the
towers, and the vectors of larger images, for which positions are interpolated. Weights are drawn in bfloat16 and stored
in float32: half of their bytes compress away. Run it with a Python that has torch 2.13.0, transformers 5.23.0 and, for
`sentence_*`, sentence-transformers 6.2.0; the tests that read them, in `tests/hf_test.py`, need none of these.

Try:  .venv-lm-eval-hf/bin/python tests/peers/make_hf_models.py            # all; or the names of some
"""

import json
from pathlib import Path
import sys
import tempfile

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).resolve().parent.parent / "hf_models"
VOCAB, LENGTH = 41, 23
SIZES = dict(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=48,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
KV = dict(num_key_value_heads=2, intermediate_size=28)
HEADS = dict(KV, head_dim=6)
NEOX = dict(SIZES, hidden_size=24, intermediate_size=28, rotary_pct=0.34)
LLAMA3 = dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
DECODERS = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=20, n_layer=2, n_head=4, n_positions=48, bos_token_id=None,
                          eos_token_id=None)),
    "llama": ("Llama", dict(SIZES, **HEADS, attention_bias=True, mlp_bias=True)),
    "llama3": ("Llama", dict(SIZES, **HEADS, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(SIZES, **HEADS, sliding_window=5)),
    "mixtral": ("Mixtral", dict(SIZES, **HEADS, num_local_experts=5, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", dict(SIZES, **KV, hidden_size=24)),
    "qwen2_window": ("Qwen2", dict(SIZES, **KV, num_hidden_layers=3, use_sliding_window=True, sliding_window=5,
                                   max_window_layers=2) | {"hidden_size": 24}),
    "qwen3": ("Qwen3", dict(SIZES, **HEADS, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3Moe", dict(SIZES, **KV, head_dim=8, num_experts=5, num_experts_per_tok=2,
                                   moe_intermediate_size=16, norm_topk_prob=True) | {"hidden_size": 32}),
    "gemma2": ("Gemma2", dict(SIZES, **HEADS, sliding_window=5, query_pre_attn_scalar=12, num_hidden_layers=3)),
    "gemma3": ("Gemma3Text", dict(SIZES, **HEADS, sliding_window=5, query_pre_attn_scalar=12, sliding_window_pattern=3,
                                  num_hidden_layers=4)),
    "phi3": ("Phi3", dict(SIZES, **KV, sliding_window=5) | {"hidden_size": 24}),
    "olmo2": ("Olmo2", dict(SIZES, **KV) | {"hidden_size": 24}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_sequential": ("GPTNeoX", dict(NEOX, use_parallel_residual=False, tie_word_embeddings=True)),
}
BERT = dict(SIZES, intermediate_size=28)
ENCODERS = {
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", dict(BERT, pad_token_id=1, max_position_embeddings=50)),
    "distilbert": ("DistilBert", dict(vocab_size=VOCAB, dim=20, n_layers=2, n_heads=4, hidden_dim=28,
                                      max_position_embeddings=48)),
    "mpnet": ("MPNet", dict(BERT, pad_token_id=1, max_position_embeddings=50)),
    "modernbert": ("ModernBert", dict(BERT, hidden_size=24, num_hidden_layers=5, local_attention=8, pad_token_id=0,
                                      cls_token_id=None, sep_token_id=None)),
}
# Of sentence-transformers: the model, the pooling, the width of a projection (0: none), whether vectors are normalised.
SENTENCES = {
    "sentence_bert": ("Bert", BERT, "mean", 14, True),
    "sentence_roberta": ("Roberta", ENCODERS["roberta"][1], "cls", 0, False),
    "sentence_distilbert": ("DistilBert", ENCODERS["distilbert"][1], "max", 0, True),
    "sentence_mpnet": ("MPNet", ENCODERS["mpnet"][1], "mean", 0, True),
    "sentence_modernbert": ("ModernBert", ENCODERS["modernbert"][1], "mean", 0, False),
    "sentence_qwen3": ("Qwen3", DECODERS["qwen3"][1], "lasttoken", 0, True),
}

T5 = dict(vocab_size=VOCAB, d_model=20, d_kv=6, d_ff=28, num_layers=2, num_decoder_layers=3, num_heads=4,
          relative_attention_num_buckets=8, relative_attention_max_distance=14)
SEQ2SEQ = {"t5": ("T5", T5), "t5_gated": ("T5", dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))}
SPEECH = {"whisper": ("Whisper", dict(
    vocab_size=VOCAB, num_mel_bins=7, d_model=20, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
    decoder_attention_heads=5, encoder_ffn_dim=28, decoder_ffn_dim=36, max_source_positions=LENGTH,
    max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=2,
    suppress_tokens=[3, 5], begin_suppress_tokens=[7]))}
ALL = DECODERS | ENCODERS | SEQ2SEQ | SPEECH

IMAGES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=30, image_size=17,
              patch_size=5)
TEXTS = dict(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=28,
             max_position_embeddings=11)
# Means and deviations by which pixels in [0, 1] are normalised; the rest as transformers' own processors have it.
SQUARE, SHORTEST = {"size": {"height": 17, "width": 17}}, {"size": {"shortest_edge": 17}, "do_center_crop": True,
                                                          "crop_size": {"height": 17, "width": 17}}
PREPROCESSING = dict(do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
                     image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.25])
OF_IMAGES = {
    "vit": ("ViTForImageClassification", dict(IMAGES, num_labels=5), dict(SQUARE, resample=2)),
    "clip": ("CLIPModel", dict(text_config=dict(TEXTS, bos_token_id=37, eos_token_id=38, pad_token_id=39),
                               vision_config=IMAGES, projection_dim=14), dict(SHORTEST, resample=3)),
    "clip_old": ("CLIPModel", dict(text_config=dict(TEXTS, bos_token_id=0, eos_token_id=2, pad_token_id=1),
                                   vision_config=IMAGES, projection_dim=14), dict(SHORTEST, resample=3)),
    "siglip": ("SiglipModel", dict(text_config=dict(TEXTS, projection_size=24, bos_token_id=0, eos_token_id=1,
                                                    pad_token_id=1),
                                   vision_config=IMAGES), dict(SQUARE, resample=3)),
}


def draw(model):
    """Gives every parameter random values, norms around 1 (around 0 where a family stores them less 1)."""
    centre = 0.0 if "Gemma" in type(model).__name__ else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = any(part in name.lower() for part in ("norm", "ln_"))
            around = centre if norm and name.endswith("weight") else 0.0
            p.copy_((torch.randn_like(p) * 0.3 + around).bfloat16().float())


def make(name):
    kind, settings = ALL[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, kind + "Config")(**settings)
    auto = getattr(transformers, "AutoModelFor" + (
        "CausalLM" if name in DECODERS else "MaskedLM" if name in ENCODERS else "SpeechSeq2Seq" if name in SPEECH else
        "Seq2SeqLM"))
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    if settings.get("tie_word_embeddings") is False and name in SEQ2SEQ:   # transformers 5 ties what files have apart
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    draw(model)
    if name == "t5":   # its logits are scaled
        model.shared.weight.data *= 4
    tokens = torch.randint(2, VOCAB, (2, LENGTH))   # RoBERTa counts no positions for token 1
    given, more = {}, {}
    if name in SEQ2SEQ:
        more = {"decoder_tokens": torch.randint(2, VOCAB, (2, 17)), "mask": torch.ones_like(tokens)}
        more["mask"][1, 15:] = 0
        given = {"decoder_input_ids": more["decoder_tokens"], "attention_mask": more["mask"]}
    read = tokens
    if name in SPEECH:
        read = torch.randn(2, settings["num_mel_bins"], 2 * LENGTH)
        given = {"decoder_input_ids": tokens}
        more = {"frames": read.transpose(1, 2), "decoder_tokens": tokens}
    with torch.no_grad():
        out = model(read, output_hidden_states=True, **given)
        hidden = out.decoder_hidden_states[-1] if given else out.hidden_states[-1]
        if name in ENCODERS:   # of two texts alone, which ours are to have in one row
            alone = lambda text: model(text, output_hidden_states=True).hidden_states[-1][0].numpy()
            texts = {"first": alone(tokens[:1, :13]), "second": alone(tokens[1:, :10])}
        else:
            texts = {}
    folder = save(name, model)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32),
                        hidden=hidden.numpy(), logits=out.logits.numpy(), **texts,
                        **{key: value.numpy().astype(np.float32 if key == "frames" else np.int32)
                           for key, value in more.items()})
    print(name, sum(f.stat().st_size for f in folder.iterdir()))


def save(name, model) -> Path:
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        settings = json.loads(Path(made, "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        (folder / "model.safetensors").write_bytes(Path(made, "model.safetensors").read_bytes())
    return folder


def make_sentences(name):
    """Of expected.npz: `tokens` [2, 23], `lengths` [2], and what sentence-transformers makes of them, `vectors`."""
    from sentence_transformers import models

    kind, settings, pooling, width, normalize = SENTENCES[name]
    torch.manual_seed(sum(map(ord, name)))
    config = getattr(transformers, kind + "Config")(**settings)
    # A pooler is no part of the sentence's vector.
    bare = {"add_pooling_layer": False} if kind in ("Bert", "Roberta", "MPNet") else {}
    model = transformers.AutoModel.from_config(config, attn_implementation="eager", **bare).float().eval()
    size = model.get_input_embeddings().embedding_dim
    modules = [("1_Pooling", models.Pooling(size, pooling_mode=pooling))]
    if width:
        modules.append(("2_Dense", models.Dense(size, width)))
    if normalize:
        modules.append((f"{len(modules) + 1}_Normalize", models.Normalize()))
    for each in (model, *(module for _, module in modules)):
        draw(each)
    tokens, lengths = torch.randint(2, VOCAB, (2, LENGTH)), torch.tensor([LENGTH, 11])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens = torch.where(mask > 0, tokens, settings.get("pad_token_id") or 0)
    with torch.no_grad():
        features = {"token_embeddings": model(tokens, attention_mask=mask).last_hidden_state, "attention_mask": mask}
        for _, module in modules:
            features = module(features)
    folder, listed = save(name, model), [("", "sentence_transformers.models.Transformer")]
    for path, module in modules:
        (folder / path).mkdir(exist_ok=True)
        module.save(str(folder / path))
        listed.append((path, f"{type(module).__module__}.{type(module).__name__}"))
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(listed)]
    (folder / "modules.json").write_text(json.dumps(listed, indent=1) + "\n")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 30}\n')
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32),
                        lengths=lengths.numpy().astype(np.int32), vectors=features["sentence_embedding"].numpy())
    print(name, sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))


def texts(name):
    """Returns (tokens [2, 11] with an end token and padding, length [2])."""
    tokens = torch.randint(3, 36, (2, 11))
    # By number 2, older files of CLIP mean that the highest of a text is its end.
    end, pad = {"clip": (38, 39), "clip_old": (VOCAB - 1, 1), "siglip": (1, 1)}[name]
    length = torch.tensor([6, 11])
    for row, n in enumerate(length):
        tokens[row, n - 1], tokens[row, n:] = end, pad
    return tokens, length


def make_of_images(name):
    kind, settings, preprocessing = OF_IMAGES[name]
    torch.manual_seed(sum(map(ord, name)))
    cls = getattr(transformers, kind)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"
    model = cls(config).float().eval()
    draw(model)
    if hasattr(model, "logit_scale"):
        model.logit_scale.data.fill_(2.5)
    preprocessing |= PREPROCESSING
    mean, std = (torch.tensor(preprocessing[f"image_{one}"])[:, None, None] for one in ("mean", "std"))
    images, large = (torch.randint(0, 256, (2, *shape, 3), dtype=torch.uint8) for shape in ((17, 17), (27, 21)))
    normal = lambda x: (x.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        if name == "vit":
            out = model(normal(images), output_hidden_states=True)
            hidden = model.vit.layernorm(out.hidden_states[-1])
            arrays = dict(image_hidden=hidden, image_vectors=hidden[:, 0], logits=out.logits,
                          large_logits=model(normal(large), interpolate_pos_encoding=True).logits)
        else:
            tokens, length = texts(name)
            out = model(input_ids=tokens, pixel_values=normal(images))
            bigger = model(input_ids=tokens, pixel_values=normal(large), interpolate_pos_encoding=True)
            hidden = out.vision_model_output.last_hidden_state
            if name != "siglip":   # whose norm is not in it
                hidden = model.vision_model.post_layernorm(hidden)
            arrays = dict(tokens=tokens.int(), length=length.int(), text_hidden=out.text_model_output.last_hidden_state,
                          image_hidden=hidden, text_vectors=out.text_embeds, image_vectors=out.image_embeds,
                          logits=out.logits_per_image, large_logits=bigger.logits_per_image)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        settings = json.loads(Path(made, "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        (folder / "model.safetensors").write_bytes(Path(made, "model.safetensors").read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
    np.savez_compressed(folder / "expected.npz", images=images.numpy(), large=large.numpy(),
                        **{n: a.numpy() for n, a in arrays.items()})
    print(name, sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    for each in sys.argv[1:] or ALL | SENTENCES | OF_IMAGES:
        (make_sentences if each in SENTENCES else make_of_images if each in OF_IMAGES else make)(each)

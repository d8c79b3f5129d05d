"""Pairs of images and texts, two towers with one space: CLIP and SigLIP.

    python -m fm_jax.prepare --examples --source catalogue:emoji_google --validation_source catalogue:emoji_twitter \\
        --images image --tokenizer sentencepiece:1024 --output data/emoji
    python -m fm_jax.train --config configs/image_text.py:demo --workdir runs/emoji --config.data.train=data/emoji

`demo` learns the names of one design of emoji and is validated on another. `base` and `large` are CLIP's B/16 and L/14
(arXiv:2103.00020, table 20), `so400m` is SigLIP's (arXiv:2303.15343; 384 pixels). Of a batch that does not fit, set
`accumulation_steps`: the gradient is that of the whole batch all the same.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_TOWER = dict(norm="layernorm", norm_bias=True, norm_eps=1e-5, activation="quick_gelu", gated_mlp=False, qkv_bias=True,
              attention_out_bias=True, mlp_bias=True, position="learned", dtype="bfloat16", remat="dots")
_CLIP = dict(_TOWER, vocab_size=49408, max_seq_len=77, pooling="end", num_layers=12)
_CLASS_TOKEN = dict(class_token=True, pooling="first", embed_norm=True, patch_bias=False)
_CLIP_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_SO400M = dict(_TOWER, norm_eps=1e-6, activation="gelu_tanh", num_layers=27, embed_dim=1152, num_heads=16, mlp_dim=4304)
_SMALL = dict(position="learned", norm="layernorm", gated_mlp=False, activation="gelu", pooling="end")
# Of each: the tower of texts, what that of images has otherwise, and the objective's arguments.
SIZES = {
    "tiny": (dict(_SMALL, vocab_size=1024, num_layers=1, embed_dim=32, num_heads=2, max_seq_len=16),
             dict(max_seq_len=16, patch_size=4, pooling="mean"), dict(image_size=16, projection_dim=16)),
    "demo": (dict(_SMALL, vocab_size=1024, num_layers=2, embed_dim=128, num_heads=4, max_seq_len=24),
             dict(num_layers=4, max_seq_len=36, patch_size=8, pooling="mean"),
             dict(image_size=48, projection_dim=64, min_crop_area=0.6, flip=True)),
    "base": (dict(_CLIP, embed_dim=512, num_heads=8),
             dict(_CLASS_TOKEN, embed_dim=768, num_heads=12, max_seq_len=197, patch_size=16),
             dict(_CLIP_PIXELS, image_size=224, projection_dim=512)),
    "large": (dict(_CLIP, embed_dim=768, num_heads=12),
              dict(_CLASS_TOKEN, num_layers=24, embed_dim=1024, num_heads=16, max_seq_len=257, patch_size=14),
              dict(_CLIP_PIXELS, image_size=224, projection_dim=768)),
    "so400m": (dict(_SO400M, vocab_size=32000, max_seq_len=64, causal=False, pooling="last"),
               dict(max_seq_len=729, patch_size=14, pooling="attention"),
               dict(loss="sigmoid", image_size=384, resize="stretch", projection_dim=0, projection_bias=True)),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, base, large, so400m."""
    choose(size, SIZES, "size of configs/image_text.py")
    text, image, args = SIZES[size]
    c = fm_config.defaults()
    c.name = f"image_text:{size}"
    c.objective = "fm_jax.objectives.image_text.ImageText"
    # c.objective_args: loss ("softmax"), projection_dim, projection_bias, image_key, text_key, image_size, resize
    # ("crop"), filter ("bicubic"), min_crop_area (1), flip (False), mean, std; see the class.
    c.objective_args.update(args)
    c.data.train = "data/emoji"
    c.model.update(text)
    c.encoder.update(image)
    c.seq_len = text["max_seq_len"]
    if size == "tiny":
        c.steps, c.batch_size, c.log.every = 20, 16, 5
    elif size == "demo":
        c.steps, c.batch_size = "30 epochs", 128
        c.eval.every = c.checkpoint.every = "25%"
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
    else:
        c.steps, c.batch_size = "12.8e9 examples", 32768
        c.optimizer.learning_rate, c.optimizer.b2, c.optimizer.weight_decay = 5e-4, 0.98, 0.2
        c.optimizer.warmup_steps, c.optimizer.final_learning_rate_frac = 2000, 0.0
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c

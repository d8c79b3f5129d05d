"""Vision Transformers that tell what is in an image.

    python -m fm_jax.prepare --examples --source catalogue:mnist_5k --images image --validation_frac 0.1 \\
        --output data/digits
    python -m fm_jax.train --config configs/image_classification.py:demo --workdir runs/digits \\
        --config.data.train=data/digits

`base`, `large` and `huge` are ViT's B/16, L/16 and H/14 (arXiv:2010.11929, table 1), trained as in arXiv:2106.10270 on
ImageNet-1k.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_VIT = dict(norm="layernorm", norm_bias=True, norm_eps=1e-6, activation="gelu", gated_mlp=False, qkv_bias=True,
            attention_out_bias=True, mlp_bias=True, class_token=True, pooling="first", dtype="bfloat16", remat="dots")
_DIGITS = dict(norm="layernorm", gated_mlp=False, activation="gelu", channels=1, pooling="mean")
SIZES = {
    "tiny": dict(_DIGITS, num_layers=1, embed_dim=32, num_heads=2, max_seq_len=16, patch_size=7),
    "demo": dict(_DIGITS, num_layers=4, embed_dim=96, num_heads=4, max_seq_len=49, patch_size=4),
    "base": dict(_VIT, num_layers=12, embed_dim=768, num_heads=12, max_seq_len=197, patch_size=16),
    "large": dict(_VIT, num_layers=24, embed_dim=1024, num_heads=16, max_seq_len=197, patch_size=16),
    "huge": dict(_VIT, num_layers=32, embed_dim=1280, num_heads=16, max_seq_len=257, patch_size=14),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, base, large, huge."""
    choose(size, SIZES, "size of configs/image_classification.py")
    c = fm_config.defaults()
    c.name = f"image_classification:{size}"
    c.objective = "fm_jax.objectives.image_classification.ImageClassification"
    # c.objective_args: num_classes (1000), classes, label_smoothing (0), image_key, label_key, image_size (224), resize
    # ("crop"), filter ("bilinear"), min_crop_area (1), flip (False), mean, std; see the class.
    c.data.train = "data/digits"
    c.model.update(causal=False, position="learned", **SIZES[size])
    c.seq_len = SIZES[size]["max_seq_len"]
    if size in ("tiny", "demo"):
        c.objective_args.update(num_classes=10, image_size=28, mean=(0.13,), std=(0.31,))
        c.steps, c.batch_size, c.log.every = (20, 32, 5) if size == "tiny" else ("12 epochs", 64, 10)
        c.optimizer.learning_rate = 1e-3
    if size == "demo":
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
        c.objective_args.update(label_smoothing=0.1, min_crop_area=0.7)
        c.eval.every = c.checkpoint.every = "25%"
    if size not in ("tiny", "demo"):
        c.objective_args.update(min_crop_area=0.05, flip=True, label_smoothing=0.1)
        c.steps, c.batch_size = "300 epochs", 4096
        c.optimizer.learning_rate, c.optimizer.b2, c.optimizer.weight_decay = 1e-3, 0.999, 0.3
        c.optimizer.warmup_steps = 10_000
        c.mesh.data, c.mesh.fsdp = 1, -1
    return c

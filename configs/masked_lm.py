"""Masked language models on packed text.

    python -m fm_jax.train --config configs/masked_lm.py:demo --workdir runs/masked --config.data.train=data/english

`base` and `large` are the shapes of BERT (arXiv:1810.04805), with its norms and positions; `demo` is a modern encoder of
a size for two CPU cores. The vocabulary has one id more than the tokenizer's: the mask.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_BERT = dict(vocab_size=30592, mlp_dim=3072, max_seq_len=512, norm="layernorm", norm_bias=True, norm_eps=1e-12,
             norm_position="post", final_norm=False, activation="gelu", gated_mlp=False, qkv_bias=True,
             attention_out_bias=True, mlp_bias=True, position="learned", num_token_types=2, embed_norm=True,
             head_transform=True, dropout=0.1, dtype="bfloat16", remat="dots")
SIZES = {
    "tiny": dict(vocab_size=513, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64),
    "demo": dict(vocab_size=4097, num_layers=4, embed_dim=256, num_heads=4, max_seq_len=256, qk_norm="head"),
    "base": dict(_BERT, num_layers=12, embed_dim=768, num_heads=12),
    "large": dict(_BERT, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, base, large."""
    choose(size, SIZES, "size of configs/masked_lm.py")
    c = fm_config.defaults()
    c.name = f"masked_lm:{size}"
    c.objective = "fm_jax.objectives.masked_lm.MaskedLM"
    # c.objective_args: mask_rate (0.15), masking ("token"), mask_frac (0.8), random_frac (0.1), mask_id, z_loss (0).
    c.data.train = "data/english"
    c.model.update(causal=False, **SIZES[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 64, 5
    elif size == "demo":
        c.steps, c.batch_size, c.seq_len = 180, 16, 256
        c.eval.every = c.checkpoint.every = "25%"
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
    else:
        c.steps, c.batch_size, c.seq_len = "137e9 tokens", 256, 512   # a million steps of 256 rows, as there
        c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 1e-4, 10_000, "linear"
    return c

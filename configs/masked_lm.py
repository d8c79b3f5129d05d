"""Masked language models on packed text.

    python -m fm_jax.train --config configs/masked_lm.py:demo --workdir runs/masked --config.data.train=data/english

`base` and `large` are the shapes of BERT (arXiv:1810.04805), with its norms and positions; `demo` is a modern encoder of
a size for two CPU cores. The vocabulary has one id more than the tokenizer's: the mask.
"""

from fm_jax import config as fm_config
from fm_jax.architecture import ENCODERS
from fm_jax.errors import choose

_POD = dict(vocab_size=30592, head_transform=True, dtype="bfloat16", remat="dots")
SIZES = {
    "tiny": dict(ENCODERS["tiny"], vocab_size=513),
    "demo": ENCODERS["demo"],
    "base": dict(ENCODERS["base"], **_POD),
    "large": dict(ENCODERS["large"], **_POD),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, base, large."""
    choose(size, SIZES, "size of configs/masked_lm.py")
    c = fm_config.defaults()
    c.name = f"masked_lm:{size}"
    c.objective = "fm_jax.objectives.masked_lm.MaskedLM"
    # c.objective_args: mask_rate (0.15), masking ("token"), mask_frac (0.8), random_frac (0.1), mask_id, z_loss (0).
    c.data.train = "data/english"
    c.model.update(SIZES[size])
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

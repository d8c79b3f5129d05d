"""A small model that learns from a larger one on the same text.

    python -m fm_jax.annotate --model runs/teacher --data data/english --output data/taught --seq_len 256
    python -m fm_jax.shrink --model runs/teacher --layers 0,2 --workdir runs/half
    python -m fm_jax.train --config configs/distill.py --workdir runs/student --config.checkpoint.init_from=runs/half \\
        --config.data.train=data/taught

The student is the quickstart's model with two layers instead of four; another one begins anew or from what fits.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose


def get_config(size: str = "small"):
    """Returns the config of a student: tiny (tests), small."""
    choose(size, ("tiny", "small"), "size of configs/distill.py")
    c = fm_config.defaults()
    c.name = f"distill:{size}"
    c.objective = "fm_jax.objectives.distill.Distill"
    # c.objective_args: top_k (32), alpha (0.5), tail (True), temperature (1); see the objective's file.
    c.data.train = "data/taught"
    c.model.update(vocab_size=4096, num_layers=2, embed_dim=256, num_heads=4, max_seq_len=256, qk_norm="head")
    c.steps, c.batch_size, c.seq_len = 180, 16, 256
    c.eval.every = c.checkpoint.every = "25%"
    c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
    if size == "tiny":
        c.model.update(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64)
        c.objective_args.top_k = 8
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 64, 5
    return c

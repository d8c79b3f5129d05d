"""Reinforcement on additions, whose answers can be checked: a small model learns some, and is rewarded for right ones.

    python -m fm_jax.prepare --source catalogue:arithmetic --tokenizer bytes --output data/arithmetic
    python -m fm_jax.prepare --examples --source catalogue:arithmetic_problems --tokenizer bytes \\
        --validation_frac 0.1 --output data/problems
    python -m fm_jax.train --config configs/grpo.py:pretrain --workdir runs/arith
    python -m fm_jax.grpo --config configs/grpo.py:arithmetic --init runs/arith --workdir runs/rl
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose


def get_config(name: str = "arithmetic"):
    """Returns the config of a stage: pretrain, or arithmetic, whose model is that of --init; tiny (tests)."""
    choose(name, ("pretrain", "arithmetic", "tiny"), "config of configs/grpo.py")
    c = fm_config.defaults()
    c.name = f"grpo:{name}"
    if name == "pretrain":
        c.data.train = "data/arithmetic"
        c.model.update(vocab_size=262, num_layers=2, embed_dim=64, num_heads=4, max_seq_len=64, qk_norm="head",
                       scan_layers=False)
        c.steps, c.batch_size, c.seq_len = 200, 64, 64
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
        return c
    c.objective = "fm_jax.objectives.policy_gradient.PolicyGradient"
    # group_size (8), max_new_tokens (16), updates (1), reward, normalize_std (True), average ("response"), clip_low
    # (0.2), clip_high (0.2), kl (0): see the objective's file.
    c.objective_args.update(group_size=16, max_new_tokens=8, normalize_std=False, average="constant")   # Dr. GRPO
    c.data.train = "data/problems"
    # Of 256 responses the gradient is mostly noise, and nothing is learnt; of 2,048 it is the exact one's to a cosine of
    # 0.85 (2026-11).
    c.steps, c.batch_size, c.seq_len = 60, 2048, 16
    c.eval.every = c.checkpoint.every = 20
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.weight_decay = 4e-4, "constant", 0.0
    c.optimizer.b2, c.optimizer.warmup_steps = 0.99, 5
    if name == "tiny":
        c.model.update(vocab_size=262, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64)
        c.objective_args.group_size, c.batch_size, c.optimizer.learning_rate = 4, 8, 1e-3
    return c

"""Mixtures of experts on packed text: the objective of configs/causal_lm.py, with experts in place of each mlp.

    python -m fm_jax.train --config configs/moe.py:tiny --workdir runs/moe --config.data.train=data/english
    python -m fm_jax.plan --config configs/moe.py:mixtral-8x7b --config.mesh.expert=8 --config.mesh.fsdp=8

Experts are cut over --config.mesh.expert; --config.model.capacity_factor=1.25 drops tokens instead of waiting for the
most loaded expert. metrics.jsonl has the router's losses, entropy, load and dropped share.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_LARGE = dict(dtype="bfloat16", remat="full", tie_embeddings=False, loss_chunk_tokens=4096)
# The first two are published shapes, the others near published ones.
SHAPES = {
    # arXiv:2401.04088 and the model's config.json.
    "mixtral-8x7b": dict(_LARGE, vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8,
                         mlp_dim=14336, max_seq_len=32768, rope_theta=1e6, norm_eps=1e-5, num_experts=8,
                         experts_per_token=2),
    # arXiv:2505.09388 and the model's config.json.
    "qwen3-30b-a3b": dict(_LARGE, vocab_size=151936, num_layers=48, embed_dim=2048, num_heads=32, num_kv_heads=4,
                          head_dim=128, qk_norm="head", max_seq_len=40960, rope_theta=1e6, norm_eps=1e-6,
                          num_experts=128, experts_per_token=8, expert_dim=768),
    # arXiv:2401.06066 and the config.json of deepseek-moe-16b-base.
    "deepseek-moe-16b": dict(_LARGE, vocab_size=102400, num_layers=28, embed_dim=2048, num_heads=16, mlp_dim=10944,
                             max_seq_len=4096, norm_eps=1e-6, num_experts=64, num_dense_layers=1, experts_per_token=6,
                             expert_dim=1408, num_shared_experts=2, router_renormalize=False),
    # Router and experts of arXiv:2412.19437. Of its own there: latent attention, for which this has grouped queries,
    # and a choice of experts within 4 of 8 groups of devices.
    "deepseek-v3-like": dict(_LARGE, vocab_size=129280, num_layers=61, embed_dim=7168, num_heads=128, num_kv_heads=16,
                             head_dim=128, mlp_dim=18432, max_seq_len=4096, norm_eps=1e-6, num_experts=256,
                             num_dense_layers=3, experts_per_token=8, expert_dim=2048, num_shared_experts=1,
                             router_score="sigmoid", router_bias=True, router_scale=2.5),
}


def get_config(size: str = "tiny"):
    """Returns the config of a shape of `SHAPES`, or of `tiny` (tests)."""
    choose(size, ("tiny", *SHAPES), "size of configs/moe.py")
    c = fm_config.defaults()
    c.name = f"moe:{size}"
    c.data.train = "data/english"
    c.objective_args.load_balance_loss = 1e-3   # of the first three's releases: 0.02, 0.001, 0.001
    if size == "tiny":
        c.model.update(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, max_seq_len=64, num_experts=8,
                       experts_per_token=2, expert_dim=32, num_shared_experts=1)
        c.objective_args.load_balance_loss, c.objective_args.router_z_loss = 1e-2, 1e-3   # arXiv:2202.08906
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 64, 5
        return c
    c.model.update(**SHAPES[size])
    if c.model.router_bias:
        c.objective_args.load_balance_loss = 1e-4   # beside the bias, arXiv:2412.19437, section 4.2
    c.seq_len, c.batch_size, c.steps = 4096, 1024, "1e12 tokens"
    c.optimizer.learning_rate = 3e-4
    return c

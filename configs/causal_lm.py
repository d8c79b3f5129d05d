"""Causal language models on packed text.

    python -m fm_jax.train --config configs/causal_lm.py:small --workdir runs/small

`small` is the quickstart: README.md says what it reaches. Sizes 1m to 405b are `SIZES` of
fm_jax/architecture.py; `python -m fm_jax.plan --config configs/causal_lm.py:8b` shows one. Every key
can be set on the command line: --config.optimizer.name=muon, --config.model.num_layers=12.
"""

from fm_jax import config as fm_config
from fm_jax.architecture import SIZES
from fm_jax.errors import choose

# Models of the peers' benchmarks (tests/peers): the same shapes there.
BENCH = {
    "bench_gpt2": dict(vocab_size=8192, num_layers=6, embed_dim=384, num_heads=6, mlp_dim=1536, max_seq_len=256,
                       norm="layernorm", norm_eps=1e-5, norm_bias=True, activation="gelu_tanh", gated_mlp=False,
                       qkv_bias=True, attention_out_bias=True, mlp_bias=True, position="learned", scan_layers=False),
    "bench_llama": dict(vocab_size=8192, num_layers=8, embed_dim=512, num_heads=8, num_kv_heads=4, mlp_dim=1408,
                        max_seq_len=512, norm_eps=1e-5, scan_layers=False),
    "bench_maxtext": dict(vocab_size=8192, num_layers=4, embed_dim=256, num_heads=4, mlp_dim=1024, max_seq_len=512,
                          remat="full"),
}
SHAPES = {"bench_gpt2": (16, 256), "bench_llama": (8, 512), "bench_maxtext": (8, 512)}   # batch_size, seq_len


def get_config(size: str = "small"):
    """Returns the config of a named size: tiny (tests), small (quickstart), 1m to 405b, or a benchmark's model."""
    choose(size, ("tiny", "small", *SIZES, *BENCH), "size of configs/causal_lm.py")
    c = fm_config.defaults()
    c.name = f"causal_lm:{size}"
    c.objective = "fm_jax.objectives.causal_lm.CausalLM"
    c.data.train = "data/english"
    # c.objective_args: z_loss (0), document_mask (True), fim_rate (0), fim_spm_rate (0.5); see the objective's file.
    if size == "tiny":
        c.model.update(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64,
                       max_seq_len=64)
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 64, 5
    elif size == "small":
        c.model.update(vocab_size=4096, num_layers=4, embed_dim=256, num_heads=4, max_seq_len=256, qk_norm="head")
        c.steps, c.batch_size, c.seq_len = 180, 16, 256   # three minutes on two quiet cores
        c.eval.every = c.checkpoint.every = "25%"
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
        c.optimizer.schedule, c.optimizer.decay_steps, c.optimizer.final_learning_rate_frac = "wsd", "40%", 0.0
    elif size in BENCH:
        c.model.update(**BENCH[size])
        c.batch_size, c.seq_len = SHAPES[size]
        c.steps, c.data.train = 1000, ""
    else:
        c.model.update(**SIZES[size])
        c.seq_len = min(2048, SIZES[size].get("max_seq_len", 2048))
        c.batch_size = 256 if _params(size) < 5e9 else 1024   # 0.5 and 2 M tokens
        c.steps = f"{20 * _params(size):.2g} tokens"   # arXiv:2203.15556: about 20 tokens a parameter
        c.optimizer.learning_rate = round(3e-3 * (1e7 / _params(size)) ** 0.3, 6)
    return c


def _params(size):
    from fm_jax.architecture import Architecture
    return Architecture(**SIZES[size]).param_count()


def sweep():
    """Yields the learning rates of a small sweep; see fm_jax.config.sweep."""
    for rate in (3e-4, 1e-3, 3e-3):
        yield {"optimizer.learning_rate": rate}

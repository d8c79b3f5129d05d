"""Text to text: an encoder and a decoder, pretrained by filling in spans of packed text.

    python -m fm_jax.train --config configs/seq2seq.py:demo --workdir runs/seq2seq --config.data.train=data/english
    python -m fm_jax.train --config configs/seq2seq.py:demo --workdir runs/pairs --config.objective_args.task=pairs \
        --config.data.train=data/pairs --config.checkpoint.init_from=runs/seq2seq

`small` to `xxl` are the shapes of T5 v1.1 (arXiv:1910.10683; its gate arXiv:2002.05202); `demo` is a modern model of a
size for two CPU cores. The encoder is as the decoder but for what `c.encoder` names: here nothing. The vocabulary has a
hundred ids more than the tokenizer's: the sentinels.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_T5 = dict(vocab_size=32128, head_dim=64, max_seq_len=1024, activation="gelu_tanh", position="relative",
           attention_scale=1.0, tie_embeddings=False, dtype="bfloat16", remat="dots")
SIZES = {
    "tiny": dict(vocab_size=612, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64,
                 position="relative"),
    "demo": dict(vocab_size=4196, num_layers=3, embed_dim=256, num_heads=4, max_seq_len=256, position="relative",
                 qk_norm="head"),
    "small": dict(_T5, num_layers=8, embed_dim=512, num_heads=6, mlp_dim=1024),
    "base": dict(_T5, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=2048),
    "large": dict(_T5, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=2816),
    "xl": dict(_T5, num_layers=24, embed_dim=2048, num_heads=32, mlp_dim=5120),
    "xxl": dict(_T5, num_layers=24, embed_dim=4096, num_heads=64, mlp_dim=10240),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, small, base, large, xl, xxl."""
    choose(size, SIZES, "size of configs/seq2seq.py")
    c = fm_config.defaults()
    c.name = f"seq2seq:{size}"
    c.objective = "fm_jax.objectives.seq2seq.Seq2Seq"
    # c.objective_args: task ("span_corruption"), corruption_rate (0.15), mean_span (3), sentinels (100), sentinel_id,
    # start_id (0), source_length, target_length, z_loss (0); see the objective's file.
    c.data.train = "data/english"
    c.model.update(cross_attention=True, **SIZES[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 64, 5
    elif size == "demo":
        c.steps, c.batch_size, c.seq_len = 240, 16, 256
        c.eval.every = c.checkpoint.every = "25%"
        c.optimizer.name, c.optimizer.learning_rate = "muon", 3e-3
    else:
        c.steps, c.batch_size, c.seq_len = 2 ** 19, 128, 568   # sources of 512 tokens, as there
        c.optimizer.name, c.optimizer.learning_rate = "adafactor", 1e-3
    return c

"""Text embeddings, trained on pairs of texts that belong together.

    python -m fm_jax.prepare --examples --source pairs.jsonl --tokenizer runs/minilm/tokenizer --output data/pairs
    python -m fm_jax.train --config configs/text_embedding.py:minilm --workdir runs/pairs --config.data.train=data/pairs \\
        --config.checkpoint.init_from=runs/minilm

A line of pairs.jsonl is {"text": ..., "positive": ...}, and "negative" where `config.objective_args.negatives` says so.
`minilm` and `base` are the shapes of all-MiniLM-L6-v2 and of BERT-base.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_BERT = dict(vocab_size=30522, max_seq_len=512, norm="layernorm", norm_bias=True, norm_eps=1e-12, norm_position="post",
             final_norm=False, activation="gelu", gated_mlp=False, qkv_bias=True, attention_out_bias=True, mlp_bias=True,
             position="learned", num_token_types=2, embed_norm=True)
SIZES = {
    "tiny": dict(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64),
    "minilm": dict(_BERT, num_layers=6, embed_dim=384, num_heads=12, mlp_dim=1536),
    "base": dict(_BERT, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072, dropout=0.1),
}


def get_config(size: str = "minilm"):
    """Returns the config of a size: tiny (tests), minilm, base."""
    choose(size, SIZES, "size of configs/text_embedding.py")
    c = fm_config.defaults()
    c.name = f"text_embedding:{size}"
    c.objective = "fm_jax.objectives.text_embedding.TextEmbedding"
    # c.objective_args: pooling ("mean"), normalize (True), projection_dim (0), projection_activation, projection_bias,
    # prompt, scale (20), symmetric (False), negatives (0), text_key, positive_key, negative_key.
    c.data.train = "data/pairs"
    c.model.update(causal=False, **SIZES[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 32, 5
    else:
        c.steps, c.batch_size, c.seq_len = "1 epochs", 64, 128
        c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 2e-5, "10%", "linear"
    return c

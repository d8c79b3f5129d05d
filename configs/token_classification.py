"""Tags of words, such as entities, by a pretrained encoder with a linear map; the held-out metric is F1 of entities.

    python -m fm_jax.convert --from_hf path/to/all-MiniLM-L6-v2 --workdir runs/minilm
    python -m fm_jax.prepare --examples --source catalogue:tweet_entities --validation_frac 0.25 \\
        --tokenizer runs/minilm/tokenizer --output data/tweets
    python -m fm_jax.train --config configs/token_classification.py:minilm --workdir runs/tweets \\
        --config.data.train=data/tweets --config.checkpoint.init_from=runs/minilm \\
        --config.checkpoint.init_pattern='(embed|transformer).*'

Sizes as in configs/text_classification.py.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_BERT = dict(vocab_size=30522, max_seq_len=512, norm="layernorm", norm_bias=True, norm_eps=1e-12, norm_position="post",
             final_norm=False, activation="gelu", gated_mlp=False, qkv_bias=True, attention_out_bias=True,
             mlp_bias=True, position="learned", num_token_types=2, embed_norm=True, dropout=0.1)
SIZES = {
    "tiny": dict(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64),
    "demo": dict(vocab_size=4097, num_layers=4, embed_dim=256, num_heads=4, max_seq_len=256, qk_norm="head"),
    "minilm": dict(_BERT, num_layers=6, embed_dim=384, num_heads=12, mlp_dim=1536),
    "base": dict(_BERT, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072),
}


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, minilm, base."""
    choose(size, SIZES, "size of configs/token_classification.py")
    c = fm_config.defaults()
    c.name = f"token_classification:{size}"
    c.objective = "fm_jax.objectives.text_heads.TokenClassification"
    # c.objective_args: labels (those of the data), words_key ("words"), tags_key ("tags"), scheme ("bio").
    c.data.train = "data/tweets"
    c.model.update(causal=False, **SIZES[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 32, 5
    else:
        c.steps, c.batch_size, c.seq_len = "3 epochs", 16, 48   # nine of ten tweets have 46 tokens at most
        c.eval.every = c.checkpoint.every = "34%"
        c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 3e-4, "linear", "10%"
        c.optimizer.final_learning_rate_frac, c.optimizer.weight_decay, c.optimizer.b2 = 0.0, 0.01, 0.999
    return c

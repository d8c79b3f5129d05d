"""Text embeddings, trained on pairs of texts that belong together.

    python -m fm_jax.prepare --examples --source pairs.jsonl --tokenizer runs/minilm/tokenizer --output data/pairs
    python -m fm_jax.train --config configs/text_embedding.py:minilm --workdir runs/pairs --config.data.train=data/pairs \\
        --config.checkpoint.init_from=runs/minilm

A line of pairs.jsonl is {"text": ..., "positive": ...}, and "negative" where `config.objective_args.negatives` says so.
`minilm` and `base` are the shapes of all-MiniLM-L6-v2 and of BERT-base.
"""

from fm_jax import config as fm_config
from fm_jax.architecture import ENCODERS
from fm_jax.errors import choose


def get_config(size: str = "minilm"):
    """Returns the config of a size: tiny (tests), demo, minilm, base, large."""
    choose(size, ENCODERS, "size of configs/text_embedding.py")
    c = fm_config.defaults()
    c.name = f"text_embedding:{size}"
    c.objective = "fm_jax.objectives.text_embedding.TextEmbedding"
    # c.objective_args: pooling ("mean"), normalize (True), projection_dim (0), projection_activation, projection_bias,
    # prompt, scale (20), symmetric (False), negatives (0), text_key, positive_key, negative_key.
    c.data.train = "data/pairs"
    c.model.update(ENCODERS[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 32, 5
    else:
        c.steps, c.batch_size, c.seq_len = "1 epochs", 64, 128
        c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 2e-5, "10%", "linear"
    return c

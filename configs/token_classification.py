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
from fm_jax.architecture import ENCODERS
from fm_jax.errors import choose


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, minilm, base, large."""
    choose(size, ENCODERS, "size of configs/token_classification.py")
    c = fm_config.defaults()
    c.name = f"token_classification:{size}"
    c.objective = "fm_jax.objectives.text_heads.TokenClassification"
    # c.objective_args: labels (those of the data), words_key ("words"), tags_key ("tags"), scheme ("bio").
    c.data.train = "data/tweets"
    c.model.update(ENCODERS[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 32, 5
    else:
        c.steps, c.batch_size, c.seq_len = "3 epochs", 16, 48   # nine of ten tweets have 46 tokens at most
        c.eval.every = c.checkpoint.every = "34%"
        c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 3e-4, "linear", "10%"
        c.optimizer.final_learning_rate_frac, c.optimizer.weight_decay, c.optimizer.b2 = 0.0, 0.01, 0.999
    return c

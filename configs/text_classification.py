"""Classes of texts, or of pairs of texts, by a pretrained encoder with a linear map.

    python -m fm_jax.convert --from_hf path/to/all-MiniLM-L6-v2 --workdir runs/minilm
    python -m fm_jax.prepare --examples --source catalogue:stackoverflow_titles \\
        --validation_source catalogue:stackoverflow_titles_test --tokenizer runs/minilm/tokenizer --output data/titles
    python -m fm_jax.train --config configs/text_classification.py:minilm --workdir runs/titles \\
        --config.data.train=data/titles --config.checkpoint.init_from=runs/minilm \\
        --config.checkpoint.init_pattern='(embed|transformer).*'

`demo` is of the shape of configs/masked_lm.py:demo, whose run gives it its encoder; `minilm` and `base` are those of
all-MiniLM-L6-v2 and of BERT-base.
"""

from fm_jax import config as fm_config
from fm_jax.architecture import ENCODERS
from fm_jax.errors import choose


def get_config(size: str = "demo"):
    """Returns the config of a size: tiny (tests), demo, minilm, base, large."""
    choose(size, ENCODERS, "size of configs/text_classification.py")
    c = fm_config.defaults()
    c.name = f"text_classification:{size}"
    c.objective = "fm_jax.objectives.text_heads.TextClassification"
    # c.objective_args: labels (those of the data), text_key ("text"), pair_key (""), label_key ("label"), pooling.
    c.data.train = "data/titles"
    c.model.update(ENCODERS[size])
    if size == "tiny":
        c.steps, c.batch_size, c.seq_len, c.log.every = 20, 8, 32, 5
    else:
        c.steps, c.batch_size, c.seq_len = "2 epochs", 32, 32
        c.eval.every = c.checkpoint.every = "50%"
        c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 5e-5, "linear", "10%"
        c.optimizer.final_learning_rate_frac, c.optimizer.weight_decay, c.optimizer.b2 = 0.0, 0.01, 0.999
        if size == "demo":
            c.optimizer.learning_rate = 5e-4
    return c

"""Preference tuning of a model that exists: it and its size come from the run that it begins with.

    python -m fm_jax.prepare --examples --source pairs.jsonl --tokenizer runs/sft/tokenizer --output data/pairs
    python -m fm_jax.annotate --model runs/sft --data data/pairs --output data/pairs_sft --seq_len 512
    python -m fm_jax.train --config configs/preference.py:dpo,runs/sft --workdir runs/dpo \\
        --config.data.train=data/pairs_sft

Methods: dpo, ipo, simpo, orpo; the last two need no reference, and take data/pairs as it is.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

# beta, learning rate: as the papers have them for models of billions of parameters.
METHODS = {"dpo": (0.1, 5e-7), "ipo": (0.1, 5e-7), "simpo": (2.0, 5e-7), "orpo": (0.1, 5e-6)}
TINY = dict(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64)


def get_config(arg: str = "dpo"):
    """Returns the config of "METHOD" or "METHOD,RUN", the run to begin with; tiny (tests): of dpo."""
    method, _, run = arg.partition(",")
    choose(method, (*METHODS, "tiny"), "method of configs/preference.py")
    tiny, method = method == "tiny", "dpo" if method == "tiny" else method
    beta, learning_rate = METHODS[method]
    c = fm_config.defaults()
    c.name = f"preference:{method}"
    if run:
        c.model = fm_config.load(f"{run}/config.json")[0].model
        c.checkpoint.init_from, c.data.tokenizer = run, f"{run}/tokenizer"
    c.objective = "fm_jax.objectives.preference.Preference"
    c.objective_args.update(method=method, beta=beta)   # also margin, label_smoothing, nll_weight
    c.data.train = "data/pairs"
    c.steps, c.batch_size, c.seq_len = "1 epoch", 32, min(512, c.model.max_seq_len)
    c.optimizer.learning_rate, c.optimizer.weight_decay, c.optimizer.warmup_steps = learning_rate, 0.0, "10%"
    if tiny:
        c.model.update(**TINY)
        c.steps, c.batch_size, c.seq_len, c.optimizer.learning_rate = 20, 8, 64, 1e-3
    return c

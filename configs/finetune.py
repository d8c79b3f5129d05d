"""Fine-tuning of a run on other data: in full, in part, or by adapters. Model, objective and tokenizer are the run's.

    python -m fm_jax.convert --from_hf catalogue:smollm2 --workdir runs/smollm2
    python -m fm_jax.prepare --chat --source catalogue:chitchat --tokenizer runs/smollm2/tokenizer --output data/chats
    python -m fm_jax.train --config configs/finetune.py:runs/smollm2 --workdir runs/tuned --config.data.train=data/chats
    python -m fm_jax.train --config configs/finetune.py:runs/smollm2 --workdir runs/lora --config.data.train=data/chats \\
        --config.adapt.lora='transformer.*(attention.w[qkvo]|mlp.w_.*)' --config.optimizer.learning_rate=1e-3

Over a base in 4 bits: --config.adapt.quantize=nf4. A part of the model: --config.adapt.freeze='embed.*'. Lower layers
slower: --config.optimizer.layer_decay=0.8. Prefix tuning, of learned keys and values of sixteen places in each layer:
configs/finetune.py:runs/smollm2,16.
"""

import os

from fm_jax import config as fm_config
from fm_jax.errors import UserError


def get_config(run: str):
    """Returns the config of a run that begins with the parameters of `run`; "RUN,P": and tunes a prefix of P places."""
    run, _, places = run.partition(",")
    base, _ = fm_config.load(f"{run}/config.json")
    c = fm_config.defaults()
    c.name = f"finetune:{os.path.basename(os.path.normpath(run))}"
    c.objective, c.hf_family = base.objective, base.hf_family
    c.objective_args.update(base.objective_args)
    c.model = base.model
    if places:
        if not places.isdecimal():
            raise UserError(f"configs/finetune.py:{run},{places}: after the comma comes a number of places, as in 16")
        c.model.prompt_tokens = int(places)
        c.checkpoint.init_pattern = "(?!.*[.]prompt_).*"   # which the base has not
        c.adapt.freeze = (c.checkpoint.init_pattern,)
    c.checkpoint.init_from, c.data.tokenizer = run, f"{run}/tokenizer"
    c.steps, c.batch_size, c.seq_len = "1 epoch", 16, min(512, c.model.max_seq_len)
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 5e-5, "linear", "5%"
    c.optimizer.final_learning_rate_frac, c.optimizer.weight_decay, c.optimizer.b2 = 0.0, 0.01, 0.999
    return c

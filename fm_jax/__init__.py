"""fm_jax: pretrain, adapt, evaluate, prompt and serve foundation models in JAX.

Importing this package is cheap: no jax, no device. `fm_jax.load(folder)` gives a ready model.
"""

__version__ = "0.1.0"


def load(folder, **how):
    """Returns the model in a run folder, ready to use: see `fm_jax.pretrained.load`."""
    from fm_jax import pretrained

    return pretrained.load(folder, **how)

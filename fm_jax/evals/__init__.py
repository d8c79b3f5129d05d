"""What a model is measured by. Layer 4: uses a loaded model, never how it was trained.

  tasks.py       the named tasks of `python -m fm_jax.evaluate`
  baselines.py   gzip, xz and an n-gram model on the same held-out bytes
"""

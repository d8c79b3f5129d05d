"""What a model is measured by. Layer 4: uses a loaded model, never how it was trained.

  tasks.py       the named tasks of `python -m fm_jax.evaluate`
  yaml_task.py   tasks of lm-evaluation-harness, read from YAML and local JSON
  requests.py    their prompts and shots, what the model is asked, and its results
  filters.py     what happens to a generated answer before it is judged
  metrics.py     what answers are worth, with standard errors
  results.py     tables, and two models beside each other
  baselines.py   gzip, xz and an n-gram model on the same held-out bytes
"""

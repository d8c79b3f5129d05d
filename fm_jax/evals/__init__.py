"""What a model is measured by. Layer 4: uses a loaded model, never how it was trained.

  tasks.py       tasks made of a run's held-out text
  task_files/    the tasks of the catalogue, as files of lm-evaluation-harness; to change one, copy it
  names.py       which tasks and groups there are
  yaml_task.py   what a task file says
  tables.py      its documents: local files and folders, the catalogue
  requests.py    their prompts and shots, what the model is asked, and its results
  journal.py     answers kept as they come, for an evaluation that is interrupted
  filters.py     what happens to a generated answer before it is judged
  metrics.py     what answers are worth, with standard errors
  execute.py     generated programs, run where they can do no harm
  results.py     tables, and two models beside each other
  probes.py      frozen features: a linear probe, nearest neighbours
  retrieval.py   search by vectors, and what ranked lists are worth
  baselines.py   gzip, xz and an n-gram model on the same held-out bytes; BM25; a dictionary of entities
"""

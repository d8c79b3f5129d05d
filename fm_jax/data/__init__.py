"""Text and records to batches. Each file uses only those above it in this list.

  catalogue.py   demo data by name: pinned, fetched from package registries, cached
  documents.py   JSONL, Parquet, plain text and the catalogue as one stream of documents or records
  prepared.py    the folder of tokenized shards: making it, checking it, reading rows from it
  examples.py    the folder of separate examples: labelled texts, pairs, questions
  questions.py   benchmarks by name, for evaluation alone
  mixture.py     example index -> (source, epoch, row): weighted mixtures and shuffling as arithmetic
  batches.py     batch t of a run as a pure function of (config, seed, t), prefetched by Grain
"""

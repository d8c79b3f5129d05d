#!/usr/bin/env bash
# From nothing to a small trained, evaluated and sampled language model on a laptop: what `make quickstart` runs.
# The same command continues an interrupted run. PYTHON names the interpreter; arguments go to fm_jax.train.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-.cache/jax}
# XLA:CPU allocates a step's temporaries anew each time; in huge pages that costs 512 times fewer page faults, 10% of a
# step. glibc reads this at the start of a process.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
DATA=data/english RUN=runs/quickstart

echo "== 1/3 data: English text and a tokenizer trained on it"
if [ ! -e "$DATA/manifest.json" ]; then
  prepare() {
    "$PYTHON" -m fm_jax.prepare --source "$1" --validation_frac "$2" --tokenizer sentencepiece:4096 --output "$DATA"
  }
  code=0
  prepare catalogue:wikipedia_introductions 0.02 || code=$?
  case $code in
    0) ;;
    69) # no network; anything else, such as Ctrl-C or a full disk, is no reason to train on another text
      echo "Wikipedia introductions could not be fetched (above); going on with this repository's Shakespeare text."
      prepare catalogue:tiny_shakespeare 0.1 ;;
    *) exit "$code" ;;
  esac
fi
echo "== 2/3 training; Ctrl-C saves, the same command continues"
"$PYTHON" -m fm_jax.train --config configs/causal_lm.py:small --workdir "$RUN" "$@"
echo "== 3/3 report"
"$PYTHON" -m fm_jax.report --workdir "$RUN"
echo "Next:  $PYTHON -m fm_jax.generate --workdir $RUN --prompt 'The history of' --temperature 0.8"

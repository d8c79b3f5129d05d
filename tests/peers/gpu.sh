#!/usr/bin/env bash
# One NVIDIA GPU: training of a 1B model in bfloat16 at 4,096 tokens beside PyTorch, and decoding against the bound of
# memory bandwidth. Prints the tables of gpu.py, to results/gpu.txt too. From nothing to the figures, under an hour:
#   bash tests/peers/gpu.sh
# On a CPU, to try every line with a tiny model: bash tests/peers/gpu.sh --tiny
# PYTHON and PEER_PYTHON name environments that are there already; others are made beside the checkout.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=.venv-gpu/bin/python
  [[ -x $PYTHON ]] || python3 -m venv .venv-gpu
  "$PYTHON" -m pip install --quiet --constraint launch/constraints.txt setuptools --editable '.[cuda]'
fi
if [[ -z "${PEER_PYTHON:-}" ]]; then
  PEER_PYTHON=.venv-torch/bin/python
  [[ -x $PEER_PYTHON ]] || python3 -m venv .venv-torch
  "$PEER_PYTHON" -m pip install --quiet --requirement tests/peers/requirements.txt
fi

export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92   # of ours; PyTorch takes what it needs
mkdir -p results
"$PYTHON" tests/peers/gpu.py --peer_python "$PEER_PYTHON" "$@" | tee results/gpu.txt

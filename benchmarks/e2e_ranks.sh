#!/usr/bin/env bash
# The rank sweep on the E2E NLG data, as a committed table.
# usage: benchmarks/e2e_ranks.sh FOLDER_OF_E2E OUTPUT_DIR     (FOLDER holds train.jsonl and heldout.jsonl)
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 out=$2
${PYTHON:-.venv/bin/python} -m raylora.search search_spaces/rank_sweep.yaml --output "$out" \
  --data.train "$data/train.jsonl" --data.heldout "$data/heldout.jsonl" --data.validation_size 0.05 \
  --data.max_validation_rows 64 --data.max_heldout_rows 64 --data.max_length 160 \
  --training.max_steps "${STEPS:-60}" --space.seed 0 "${@:3}"

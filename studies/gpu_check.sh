#!/usr/bin/env bash
# What a GPU makes of HAMT, in less than ten minutes: gpu_check.json. See studies/gpu_check.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
exec env PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
    timeout 600 "$python" studies/gpu_check.py "$@"

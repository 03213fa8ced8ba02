#!/usr/bin/env bash
# Install what the tests need and run them: `bash scripts/test.sh [pytest arguments]`. The exit code is pytest's.
# Uses the environment HF_MUON_VENV, else the active one, else makes .venv-test; needs Python 3.11+ and nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment "${HF_MUON_VENV:-${VIRTUAL_ENV:-.venv-test}}" dev

# One thread per process: with more, the small matrices of the tests wait for each other instead of computing.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec python -m pytest -q "$@"

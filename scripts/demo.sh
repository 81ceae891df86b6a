#!/usr/bin/env bash
# Set up what is missing and run the demo; arguments go to `prune-viz demo`.
set -euo pipefail
called_from="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_once base -e .

prune_viz="$PWD/.venv/bin/prune-viz"
if [ $# -gt 0 ]; then
    cd "$called_from" # so that paths among the arguments mean what the caller meant
fi
exec "$prune_viz" demo "$@"

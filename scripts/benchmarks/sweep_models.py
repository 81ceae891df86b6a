"""Whether the filters of every model that people have can be analysed.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/benchmarks/sweep_models.py             # all of torchvision's models: hours
    .venv/bin/python scripts/benchmarks/sweep_models.py --timm  # thirty families of timm's
    .venv/bin/python scripts/benchmarks/sweep_models.py --trained   # really trained ones
    .venv/bin/python scripts/benchmarks/sweep_models.py resnet      # those whose SPEC has this in it

Every model has seeded random weights. In every convolution two filters get a stimulus of few steps, on a
small canvas where the model takes one; a convolution counts if it ends with finite stimuli. With random
weights some filters never fire, however they are asked: those are counted too. Models of several inputs are
held at noise but for the first. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import trained
from tables import print_table
from torch import nn
from torchvision import models
from torchvision.models.video import mvit

import prune_viz as pv
from prune_viz.demo import digits
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.loading.architectures import default_input_shape, resolve_architecture
from prune_viz.loading.fixed_inputs import fix_inputs, fixed_at_noise
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.errors import UserError

STEPS = 4
SIZE, CANVAS = 96, 48  # of inputs and stimuli, where the model takes them
TIMM = (
    "resnet18d", "seresnet18", "ecaresnet26t", "resnetrs50", "resnext26ts", "res2net50_26w_4s",
    "skresnet18", "resnest14d", "dpn48b", "densenet121", "dla34", "hrnet_w18_small", "selecsls42",
    "vovnet39a", "xception41", "inception_v4", "inception_resnet_v2", "efficientnet_lite0",
    "tf_efficientnetv2_b0", "mobilenetv3_small_050", "mobilenetv4_conv_small", "ghostnet_050",
    "mnasnet_small", "fbnetc_100", "rexnet_100", "regnety_002", "repvgg_a0", "convnext_atto",
    "convmixer_1024_20_ks9_p14", "nfnet_l0",
)  # fmt: skip
# Where a model does not take what the size of its weights or 224 by 224 says, or takes long at that.
SHAPES = {
    "raft": [(3, 128, 128)] * 2, "r3d_18": [(3, 8, 64, 64)], "mc3_18": [(3, 8, 64, 64)],
    "r2plus1d_18": [(3, 8, 64, 64)], "s3d": [(3, 16, 224, 224)], "mvit": [(3, 8, 64, 64)],
    "swin3d": [(3, 8, 64, 64)], "rcnn": [(3, 96, 96)], "retinanet": [(3, 96, 96)], "fcos": [(3, 96, 96)],
    "ssd": [(3, 96, 96)],
}  # fmt: skip


# MViT is built for one size of input; at its usual one of 16 frames, 224 by 224, each would take hours.
SMALL_MVIT = {"temporal_size": 8, "spatial_size": (64, 64)}


def build(spec: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model with seeded weights, or really trained ones, and the shape of the input that is varied."""
    torch.manual_seed(0)
    if spec in TRAINED:
        return TRAINED[spec]()
    name = spec.partition(":")[2]
    large = mvit.MViT
    with mock.patch.object(mvit, "MViT", lambda **settings: large(**{**settings, **SMALL_MVIT})):
        model = resolve_architecture(spec).eval()
    if any(part in name for part in ("rcnn", "retinanet", "fcos")):
        model.transform.min_size, model.transform.max_size = (96,), 96  # type: ignore[union-attr]
    shapes = next((shapes for part, shapes in SHAPES.items() if part in name), None)
    if shapes is None:
        shapes = [default_input_shape(model, spec)]
    if len(shapes) > 1:
        fix_inputs(model, fixed_at_noise(shapes))
    return model, shapes[0]


def trained_mtcnn(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """One of the three networks of MTCNN, which detects faces: PReLU, no batch norm."""
    folder = importlib.util.find_spec("facenet_pytorch").submodule_search_locations[0]
    weights = Path(folder) / "data" / f"{name.lower()}.pt"
    arch = f"facenet_pytorch.models.mtcnn:{name}"
    return pv.load_model(weights, arch=arch, arch_kwargs={"pretrained": False}), (3, size, size)


def trained_efficientnet() -> tuple[nn.Module, tuple[int, ...]]:
    """EfficientNet-lite0 on ImageNet."""
    model = pv.load_model(trained.efficientnet_weights(), arch=trained.ARCH, arch_kwargs=trained.ARCH_KWARGS)
    return model, (3, 224, 224)


TRAINED = {
    "EfficientNet-lite0": trained_efficientnet,
    "MTCNN, PNet": partial(trained_mtcnn, "PNet", 12),
    "MTCNN, RNet": partial(trained_mtcnn, "RNet", 24),
    "MTCNN, ONet": partial(trained_mtcnn, "ONet", 48),
    "demo": lambda: (digits.train_digits_net(digits.load_digits()), (1, 8, 8)),
}


def prepare(model: nn.Module, shape: tuple[int, ...]) -> FilterNetwork:
    """The model on as small inputs as it takes."""
    small = (shape[0], *(min(size, SIZE) for size in shape[1:]))
    for smaller, canvas in ((small, CANVAS), (small, None), (shape, CANVAS)):
        try:
            return FilterNetwork(model, smaller, canvas)
        except UserError:
            continue
    return FilterNetwork(model, shape)


def row(spec: str) -> dict[str, Any]:
    """What could be analysed of one model."""
    start = time.perf_counter()
    worked, seen, silent, causes = 0, 0, 0, []
    try:
        model, shape = build(spec)
        network = prepare(model, shape)
        seen = len(network.layers)
        causes += [f"{name} never runs" for name in network.skipped]
        for layer in network.layers:
            try:
                stimuli = find_stimuli(network, layer.name, range(min(2, layer.filters)), steps=STEPS)
            except Exception as error:  # what is counted here
                causes.append(f"{layer.name}: {_short(error)}")
                continue
            finite = bool(stimuli.images.isfinite().all() and stimuli.activations.isfinite().all())
            worked += finite
            silent += int((stimuli.activations == 0).sum())
            if not finite:
                causes.append(f"{layer.name}: not finite")
    except UserError as error:
        causes.append(str(error))
    except Exception as error:  # what is counted here
        causes.append(_short(error))
    seconds = time.perf_counter() - start
    return {
        "model": spec, "layers": seen, "worked": worked, "silent": silent, "seconds": seconds,
        "causes": causes,
    }  # fmt: skip


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def specs_of(timm: bool, really_trained: bool) -> Sequence[str]:
    """All that are tried."""
    if really_trained:
        return list(TRAINED)
    if timm:
        return [f"timm:{name}" for name in TIMM]
    return [f"torchvision:{name}" for name in models.list_models() if not name.startswith("quantized_")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="of the SPECs to try")
    parser.add_argument("--timm", action="store_true", help="timm's models instead of torchvision's")
    parser.add_argument("--trained", action="store_true", help="really trained ones instead")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for spec in specs_of(options.timm, options.trained):
        if options.part in spec:
            rows.append(row(spec))
            print(*rows[-1].values(), sep=", ", flush=True)
            gc.collect()
    print_table(
        "Convolutions of which two filters could be analysed",
        ["model", "convolutions", "worked", "silent filters", "seconds", "what did not, for instance"],
        [[*(one[key] for key in ("model", "layers", "worked", "silent", "seconds")),
          "; ".join(one["causes"])[:70]] for one in rows],
    )  # fmt: skip
    whole = sum(0 < one["layers"] == one["worked"] for one in rows)
    print(json.dumps({"models": len(rows), "whole": whole, "rows": rows}))


if __name__ == "__main__":
    main()

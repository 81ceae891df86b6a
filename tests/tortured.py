"""A run of many small tasks, to be killed: `python tests/tortured.py OUT [WORKERS [SEED [STEPS]]]`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.calibration import extent
from prune_viz.cli.console import exit_codes
from prune_viz.execution import tasks
from prune_viz.feature_visualization import search


class Inverted(nn.Module):
    """Expansion, depthwise convolution and projection around a shortcut, as in mobile networks."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(self.expand(x)).relu()
        return x + self.norm3(self.project(self.norm2(self.depthwise(inner)).relu()))


class Mobile(nn.Module):
    """A small classifier of such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Inverted(12, 24), Inverted(12, 24))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).relu()).mean(dim=(2, 3)))


def network() -> Mobile:
    """The network, its norms as if it had been trained."""
    torch.manual_seed(0)
    model = Mobile().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def cut_small() -> None:
    """Have tasks of four filters, and few calibration images."""
    torch.set_num_threads(1)
    search.BATCH["cpu"], tasks.BATCHES = 4, 1
    extent.IMAGES = 32


def run(out: str | Path, workers: int = 1, seed: int = 0, steps: int = 40) -> None:
    """Analyse it in tasks of four filters."""
    cut_small()
    analyze(network(), input_shape=(3, 16, 16), out=out, workers=workers, steps=steps, seed=seed)


if __name__ == "__main__":
    try:
        exit_codes(run)(sys.argv[1], *map(int, sys.argv[2:]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)

"""Filters of layers and branches that do nothing at all are dead, and go before any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import randomise_norms
from torch import Tensor, nn

from prune_viz.analysis.pipeline import Analysis, analyze
from prune_viz.pruning.budgets import write_masks

SHAPE = (3, 12, 12)


class Branch(nn.Sequential):
    """Two convolutions with norms, beside a shortcut."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )  # fmt: skip

    def forward(self, maps: Tensor) -> Tensor:
        inner: Tensor = super().forward(maps)
        return maps + inner


def branches() -> nn.Module:
    """A network whose first branch ends in a batch norm of zeros."""
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    model = randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Branch(), Branch(), *head))
    nn.init.zeros_(model[1][4].weight)
    nn.init.zeros_(model[1][4].bias)
    return model.eval()


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("branches") / "run"
    return analyze(branches(), input_shape=SHAPE, steps=4, out=out)


@pytest.mark.slow
def test_a_branch_without_effect_is_dead(analysed: Analysis) -> None:
    verdicts = analysed.filters.set_index(["layer", "filter"])["verdict"]
    assert (verdicts.loc["1.0"] == "dead").sum() == 15
    assert not (verdicts.loc["2.0"] == "dead").any()


@pytest.mark.slow
def test_a_branch_without_effect_goes_first(analysed: Analysis, tmp_path: Path) -> None:
    outcome = write_masks(analysed.out, tmp_path / "masks.pt", ratio=15 / 56, model=branches())
    assert outcome.removed == 15
    assert outcome.measured is not None
    assert outcome.measured.value == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_layer_that_never_fires_is_dead_but_for_one() -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    nn.init.constant_(model[2].bias, -100.0)
    found = analyze(model, input_shape=SHAPE, steps=4).filters
    verdicts = found.set_index(["layer", "filter"])["verdict"]
    assert (verdicts.loc["2"] == "dead").sum() == 7

"""A budget is never worse than the run's own verdicts where it saves as much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_viz.analysis.pipeline import analyze
from prune_viz.demo import DigitsNet
from prune_viz.demo.digits import Digits, accuracy, load_digits, plant, train_digits_net
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.masks import load_masks
from prune_viz.pruning.remove import compensated


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def analysed(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[DigitsNet, Path]:
    model = plant(train_digits_net(digits), digits)[0].eval()
    run = tmp_path_factory.mktemp("digits") / "run"
    analyze(model, input_shape=DigitsNet.input_shape, steps=16, out=run)
    return model, run


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.95, 1.0])
def test_a_budget_is_no_worse_than_the_verdicts(
    analysed: tuple[DigitsNet, Path], digits: Digits, tmp_path: Path, share: float
) -> None:
    model, run = analysed
    verdicts = write_masks(run, tmp_path / "verdicts.pt", model=model)
    assert verdicts.saved is not None
    assert verdicts.measured is not None
    budget = write_masks(run, tmp_path / "budget.pt", macs=share * verdicts.saved, model=model)
    assert budget.saved is not None
    assert budget.measured is not None
    assert share * verdicts.saved <= budget.saved <= verdicts.saved + 1e-9
    assert budget.measured.value <= verdicts.measured.value * (1 + 1e-6) + 1e-12
    flagged, asked = load_masks(tmp_path / "verdicts.pt"), load_masks(tmp_path / "budget.pt")
    assert not any(bool((~asked[name] & flagged[name]).any()) for name in flagged)
    example = torch.zeros(1, *DigitsNet.input_shape)
    scores = [accuracy(compensated(model, masks, example), digits) for masks in (flagged, asked)]
    assert scores[1] >= scores[0]

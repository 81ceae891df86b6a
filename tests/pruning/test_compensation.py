"""What makes up for removed filters is chosen by what it comes to in the end."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prune_viz.channels.coupling import find_groups
from prune_viz.pruning import compensation
from prune_viz.pruning.masks import Masks, masks_as_stored
from prune_viz.runs.decisions_json import BesideMasks, Merge


class Meter:
    """Knows what each way comes to: merging is worse at first, and better once norms are set."""

    def __init__(self, whole: nn.Sequential) -> None:
        self.weight = whole[2].weight.clone()

    def change(self, model: nn.Sequential) -> float:
        merged = bool((model[2].weight[:, :3] != self.weight[:, :3]).any())
        return {(True, False): 5.0, (False, False): 3.0, (True, True): 1.0, (False, True): 2.0}[
            merged, hasattr(model, "set_anew")
        ]


def test_ways_are_compared_with_norms_set_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_anew(model: nn.Module, *_: object) -> bool:
        model.set_anew = True
        return True

    monkeypatch.setattr(compensation, "recalibrate_norms", set_anew)
    monkeypatch.setattr(compensation, "copy_statistics", lambda *_: None)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval().requires_grad_(False)
    masks = Masks(
        {"0": torch.tensor([True, True, True, False]), "2": torch.ones(2, dtype=torch.bool)},
        merges=(Merge("0", 3, (0,), (1.0,), 0.0),),
        calibration_images=torch.randn(8, 3, 4, 4),
    )
    groups = find_groups(model, torch.zeros(1, 3, 4, 4))
    done = compensation.compensate_filters(model, masks, groups, Meter(model))
    assert done == compensation.Compensation(merged=("0",), norms=True)


def test_what_older_files_call_rough_is_unfounded() -> None:
    older = BesideMasks(model_sha256=None, merges=(), rough="no batch norm shows it")
    assert masks_as_stored(older).is_unfounded
    assert not masks_as_stored(replace(older, unfounded=False)).is_unfounded
    assert not masks_as_stored(replace(older, rough="")).is_unfounded

"""Merging never hurts: whatever the network, removal with it moves the output no more than without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import slow
from torch import Tensor, nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.masks import Masks, load_masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.pruning.remove import compensated

SHAPE = (2, 12, 12)


class Permuted(nn.Module):
    """Norms behind the activations, and scores from maps that are flattened position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(12), nn.MaxPool2d(2),
            nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(10),
        )  # fmt: skip
        self.head = nn.Linear(360, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).permute(0, 2, 3, 1).reshape(len(images), -1))


def without_norms() -> nn.Module:
    layers = [nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))


def with_sigmoid() -> nn.Module:
    return nn.Sequential(Permuted(), nn.Sigmoid())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "norm behind ReLU, permuted": Permuted,
    "no norms, biases": without_norms,
    "labels": with_sigmoid,
}


def inputs(seed: int, count: int = 96) -> Tensor:
    """Smooth random maps, far from what the network's norms expect."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 4, 4, generator=random)
    return 3 + 2 * nn.functional.interpolate(coarse, (12, 12), mode="bilinear")


@pytest.fixture(scope="module", params=[next(iter(NETWORKS)), *map(slow, list(NETWORKS)[1:])])
def pruned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    model = NETWORKS[request.param]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("run")
    analyze(model, input_shape=SHAPE, steps=3, data=inputs(0), out=folder / "run")
    return model, folder


def change(model: nn.Module, masks: Masks, images: Tensor) -> float:
    kind = find_output_kind(model, images[:2])
    return OutputMeter(model, images, kind).change(compensated(model, masks, images[:1]))


@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_merging_is_no_worse_than_nothing(pruned: tuple[nn.Module, Path], budget: float) -> None:
    model, folder = pruned
    outcome = write_masks(folder / "run", folder / "masks.pt", macs=budget, model=model)
    masks = load_masks(folder / "masks.pt")
    bare = masks.copy()
    bare.merges = ()
    seen = masks.images.kept_out
    assert seen is not None
    assert outcome.measured is not None
    assert outcome.measured.value == pytest.approx(change(model, masks, seen), rel=1e-3)
    assert change(model, masks, seen) <= change(model, bare, seen)
    unseen = inputs(1, 256)
    assert change(model, masks, unseen) <= 1.1 * change(model, bare, unseen)


def test_merges_that_hurt_are_left_out(pruned: tuple[nn.Module, Path]) -> None:
    model, folder = pruned
    write_masks(folder / "run", folder / "masks.pt", macs=0.3, model=model)
    masks = load_masks(folder / "masks.pt")
    seen = masks.images.kept_out
    assert seen is not None
    bare = masks.copy()
    bare.merges = ()
    wrong = masks.copy()
    wrong.merges = tuple(
        type(one)(one.layer, one.filter, one.representatives, one.coefficients, one.constant + 50.0)
        for one in masks.merges
    )
    assert wrong.merges
    assert change(model, wrong, seen) <= change(model, bare, seen) * (1 + 1e-6)

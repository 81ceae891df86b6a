"""Networks from public bug reports: what is removed is what was masked, and the rest is kept."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from networks import randomise_norms
from reported_networks import REPORTED, SHAPE, Between, Gated, SplitHalves
from torch import Tensor, nn

from prune_viz.channels import experiments, labelling, verification
from prune_viz.channels.coupling import build_graph, find_groups
from prune_viz.channels.groups import CouplingGroup, group_of_layer
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.memory import Budget

INPUTS = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))


def _removed_as_masked(model: nn.Module, groups: list[CouplingGroup], training: bool = False) -> float:
    """Largest difference between removing some channels of every group and masking them."""
    modules = dict(model.named_modules())
    masks = {}
    for group in groups:
        gone = {0, group.channels // 2, group.channels - 1} if group.channels > 3 else {group.channels - 1}
        for places in group.producers if group.removable else ():
            mask = torch.ones(modules[places.module].out_channels, dtype=torch.bool)
            mask[[i for i, c in zip(places.indices, places.channels, strict=True) if c in gone]] = False
            masks[places.module] = mask
    masks = reconcile_masks(model, masks, INPUTS)
    assert not masks.notes
    masked = apply_masks(copy.deepcopy(model), masks)
    smaller = remove_filters(model, masks, INPUTS)
    if masks.removed:
        count = sum(parameter.numel() for parameter in smaller.parameters())
        assert count < sum(parameter.numel() for parameter in model.parameters())
    for network in (masked, smaller):
        for module in network.modules():
            module.training = training and not hasattr(module, "running_mean")
    with torch.no_grad():
        one, other = masked(INPUTS), smaller(INPUTS)
    pairs = zip(one, other, strict=True) if isinstance(one, (list, tuple)) else [(one, other)]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


SLOW = ("unbound attention", "fixed split", "split in halves", "a quarter and the rest", "shuffle")


@pytest.mark.parametrize("name", [slow(one) if one in SLOW else one for one in REPORTED])
def test_removed_equals_masked(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model, kept = REPORTED[name]
    model = randomise_norms(copy.deepcopy(model))
    groups = find_groups(model, INPUTS[:1])
    assert {layer for group in groups if not group.removable for layer in group.layers} == kept
    assert all(group.note for group in groups if not group.removable)
    assert _removed_as_masked(model, groups) < 1e-4 or name == "dropout that is always on"
    if name == "head in training":
        assert _removed_as_masked(model, groups, training=True) < 1e-4
    assert not [one for one in recwarn if "num_features" in str(one.message)]


def test_flatten_of_a_fixed_size_keeps_its_group_alone() -> None:
    """The classic network for MNIST: the second convolution stays, the first one may go."""

    class Classic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
            self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.max_pool2d(self.conv1(x), 2))
            x = F.relu(F.max_pool2d(self.conv2(x), 2)).view(-1, 320)
            return self.fc2(F.relu(self.fc1(x)))

    groups = group_of_layer(find_groups(Classic().eval(), torch.zeros(1, 1, 28, 28)))
    assert groups["conv1"].removable
    assert not groups["conv2"].removable
    assert "does not run without" in groups["conv2"].note


def test_units_of_several_filters_go_whole() -> None:
    groups = group_of_layer(find_groups(Between(SplitHalves(), 8).eval(), INPUTS[:1]))
    first = groups["first"].producers[0]
    assert groups["first"].channels == 8
    assert [first.indices[first.channels == channel].tolist() for channel in range(2)] == [[0, 8], [1, 9]]


def test_random_outputs_keep_everything() -> None:
    noisy = Between(lambda x: x + torch.randn(x.shape[1]).view(1, -1, 1, 1)).eval()
    notes = {group.note for group in find_groups(noisy, INPUTS[:1])}
    assert notes == {"the network draws random numbers when it runs", "its filters are the network's output"}


class Counting(nn.Module):
    """Counts its calls in a buffer, and adds the count."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_network_that_changes_with_each_call_keeps_everything() -> None:
    groups = group_of_layer(find_groups(Between(Counting()).eval(), INPUTS[:1]))
    assert groups["first"].note == "the network changes from call to call"


@pytest.mark.parametrize(("limit", "why"), [("SECONDS", "takes too long"), ("LABELS", "too much memory")])
def test_following_channels_is_bounded(limit: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, limit, -1)
    with pytest.raises(labelling.UntraceableError, match=why):
        find_groups(Gated().eval(), INPUTS[:1])


@pytest.mark.parametrize(
    ("limit", "value", "why"), [("SECONDS", -1, "no time left"), ("Budget", None, "too much memory")]
)
def test_experiments_are_bounded(limit: str, value: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit == "Budget":
        value = mock.Mock(of=lambda device: Budget(device, 0))
    monkeypatch.setattr(experiments if limit == "Budget" else verification, limit, value)
    groups = group_of_layer(find_groups(Gated().eval(), INPUTS[:1]))
    assert why in groups["c1"].note


def test_dropout_that_is_always_on_is_said() -> None:
    assert build_graph(Between(F.dropout).eval(), INPUTS[:1]).drops
    assert not build_graph(Between(nn.Dropout()).eval(), INPUTS[:1]).drops


class ByKeyword(Between):
    """Its last layer is called by keyword, and its scores are returned in a namespace."""

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.second(F.relu(self.first(x))))
        return SimpleNamespace(scores=self.third(input=x).mean(dim=(2, 3)))


def test_layers_called_by_keyword_keep_what_they_read() -> None:
    groups = group_of_layer(find_groups(ByKeyword(nn.ReLU()).eval(), INPUTS[:1]))
    assert groups["first"].removable
    assert groups["second"].note == "third is given its maps by keyword"
    assert "output" in groups["third"].note


def test_norms_of_untraceable_networks_are_masked_rightly() -> None:
    """Norms stand before their convolutions, so that the order of registration misleads."""

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn1(x) if float(x.sum()) < 1e9 else x
            return self.head(self.conv2(F.relu(self.bn2(self.conv1(x))))).mean(dim=(2, 3))

    torch.manual_seed(0)
    model = randomise_norms(Before())
    assert _removed_as_masked(model, find_groups(model, INPUTS[:1])) < 1e-4

"""Where channels lie in layers of every kind, against slow and simple removal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prune_viz.network import layer_kinds

KINDS = {
    "plain": nn.Conv2d(6, 8, 3),
    "grouped": nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "multiplied": nn.Conv2d(6, 12, 3, groups=6),
    "signal": nn.Conv1d(6, 8, 3),
    "volume": nn.Conv3d(6, 8, 1),
    "transposed": nn.ConvTranspose2d(6, 8, 3, stride=2),
    "transposed and grouped": nn.ConvTranspose2d(6, 8, 3, groups=2),
    "linear": nn.Linear(6, 8),
}


def _input(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 6)
    return torch.randn(2, 6, *[5] * len(layer.kernel_size))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_axes(kind: str) -> None:
    layer = KINDS[kind]
    inputs = _input(layer)
    axis = layer_kinds.channel_axis(layer)
    assert inputs.shape[axis] == layer_kinds.count_inputs(layer)
    assert (
        layer(inputs).shape[axis]
        == layer_kinds.count_outputs(layer)
        == layer_kinds.filters_in(layer, layer.weight)
    )
    assert layer_kinds.is_convolution(layer) == (kind != "linear")
    assert layer_kinds.is_depthwise(layer) == (kind == "depthwise")
    assert layer_kinds.is_grouped(layer) == (kind in ("grouped", "transposed and grouped", "multiplied"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
def test_a_filters_weights_alone_make_its_map(kind: str) -> None:
    layer = copy.deepcopy(KINDS[kind])
    inputs, number = _input(layer), 3
    rows = layer_kinds.by_filters(layer, layer.weight.detach())
    assert rows.shape[0] == layer.out_channels
    mask = torch.zeros(layer.out_channels)
    mask[number] = 1
    before = layer(inputs)
    with torch.no_grad():
        layer.weight.mul_(layer_kinds.spread_over_weight(layer, mask))
    after = layer(inputs)
    torch.testing.assert_close(after[:, number], before[:, number])
    others = [other for other in range(layer.out_channels) if other != number]
    bias = layer.bias[others].view(1, -1, *[1] * (after.ndim - 2)).expand_as(after[:, others])
    torch.testing.assert_close(after[:, others], bias)
    alone = layer_kinds.by_filters(layer, layer.weight.detach())
    assert alone[number].equal(rows[number])
    assert not alone[others].any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_from_their_inputs(kind: str) -> None:
    layer = KINDS[kind]
    weight = layer.weight.detach()
    spread = layer_kinds.spread_by_inputs(layer, weight).clone()
    assert spread.shape[:2] == (layer_kinds.count_inputs(layer), layer_kinds.count_outputs(layer))
    assert torch.equal(layer_kinds.gather_by_inputs(layer, spread), weight)
    inputs, axis = _input(layer), layer_kinds.channel_axis(layer)
    silent = inputs.index_fill(axis, torch.tensor([1, 3]), 0.0)
    expected = layer(silent)
    with torch.no_grad():
        spread[[1, 3]] = 0.0
        layer = copy.deepcopy(layer)
        layer.weight.copy_(layer_kinds.gather_by_inputs(layer, spread))
    torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize(
    ("kind", "shape", "states"),
    [
        ("plain", (5, 4, 3, 3), (4, 5, 1)), ("grouped", (4, 3, 3, 3), (3, 4, 1)),
        ("grouped", (6, 2, 3, 3), (4, 6, 2)), ("depthwise", (4, 1, 3, 3), (4, 4, 4)),
        ("multiplied", (8, 1, 3, 3), (4, 8, 4)), ("transposed", (4, 5, 3, 3), (4, 5, 1)),
        ("transposed and grouped", (3, 4, 3, 3), (3, 4, 1)),
    ],
)  # fmt: skip
def test_sizes_follow_a_weight(kind: str, shape: tuple[int, ...], states: tuple[int, int, int]) -> None:
    layer = copy.deepcopy(KINDS[kind])
    layer_kinds.set_sizes(layer, torch.zeros(shape), states[2])
    assert (layer.in_channels, layer.out_channels, layer.groups) == states
    layer.weight, layer.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(states[1]))
    assert layer(torch.randn(1, states[0], 5, 5)).shape[1] == states[1]

"""How a network is prepared for stimuli: canvases, whole batches, and the layout of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_viz.network.filter_network import FilterNetwork


class FixedInside(nn.Module):
    """Its second convolution runs at one input size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 8, stride=8)
        self.mix = nn.Linear(4 * 28 * 28, 2 * 8 * 8)
        self.second = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.relu(self.first(x)).flatten(1))
        return self.second(x.unflatten(1, (2, 8, 8)))


class RowsMixed(nn.Module):
    """Reads the order of values in memory, so that laying channels last would change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.next = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.next(torch.as_strided(x, x.shape, (x[0].numel(), x[0, 0].numel(), x.shape[3], 1)))


def test_fixed_size_layer_takes_the_input_size_in_whole_batches() -> None:
    model = FixedInside().eval()
    network = FilterNetwork(model, (3, 224, 224))
    first, second = network.layers
    assert first.canvas < second.canvas == (224, 224)
    inputs = torch.randn(5, 3, 224, 224)
    found = network.maps("second")(inputs)[0]
    torch.testing.assert_close(found, model(inputs), rtol=1e-4, atol=1e-5)
    assert not network._row_by_row


def test_small_canvas_is_used_where_the_layer_runs_on_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    network = FilterNetwork(model, (3, 96, 96), canvas=24)
    assert [layer.canvas for layer in network.layers] == [(24, 24), (24, 24)]


def test_weights_are_laid_channels_last_where_that_changes_nothing() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    for model, expected in ((plain, True), (RowsMixed().eval(), False)):
        network = FilterNetwork(model, (3, 16, 16))
        assert network.channels_last == expected
        assert network._graph is not None
        weights = [
            weight for weight in network._graph.parameters() if weight.ndim == 4 and weight.shape[2] > 1
        ]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) == expected for weight in weights)

"""The map of the whole network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from networks import Concatenating, Plain, Residual, Untraceable, randomise_norms
from torch import Tensor, nn

from prune_viz.embedding.features import principal
from prune_viz.embedding.network_map import common_profiles, embed_network
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.responses import map_norms, response_matrix
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.map_reading import read_maps
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.utils.memory import Budget


class Flattening(nn.Sequential):
    """Takes inputs of one size only."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 2))


def _found(network: FilterNetwork, seed: int = 0) -> dict[str, LayerTensors]:
    """Noise for stimuli, and the true responses to it."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in network.layers:
        shape = (layer.filters, network.input_shape[0], *layer.canvas)
        images = torch.randn(shape, generator=generator).half()
        responses = response_matrix(network, layer.name, images)
        found[layer.name] = LayerTensors(images.numpy(), np.diag(responses).copy(), responses)
    return found


@pytest.mark.parametrize("model", [Residual, Concatenating, Untraceable, Flattening])
def test_norms_in_one_pass_are_those_of_each_layer(model: type[nn.Module]) -> None:
    network = FilterNetwork(randomise_norms(model()), (3, 16, 16))
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    names = [layer.name for layer in network.layers]
    norms = read_maps(network, names, lambda: [images[:3], images[3:]], map_norms)
    assert list(norms) == names
    for name in names:
        np.testing.assert_allclose(norms[name], response_matrix(network, name, images), rtol=1e-4, atol=1e-5)


def test_a_network_is_asked_which_sizes_it_takes() -> None:
    assert FilterNetwork(Plain().eval(), (3, 16, 16)).takes((24, 20))
    assert not FilterNetwork(Flattening(), (3, 16, 16)).takes((24, 20))
    assert FilterNetwork(Flattening(), (3, 16, 16)).takes((16, 16))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Residual(), (3, 16, 16)),
        (Untraceable(), (3, 16, 16)),
        (Flattening(), (3, 16, 16)),
        (nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1)), (2, 100)),
        (nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Conv3d(3, 1, 1)), (1, 10, 10, 10)),
        (nn.Sequential(nn.Conv2d(1, 1, 3)), (1, 8, 8)),
    ],
)
def test_every_filter_has_the_same_place_each_time(model: nn.Module, shape: Sequence[int]) -> None:
    network = FilterNetwork(randomise_norms(model), shape)
    found = _found(network)
    embeddings, places = embed_network(network, network.layers, found, RunContext())
    again = embed_network(network, network.layers, found, RunContext())[1]
    assert list(embeddings) == list(places) == [layer.name for layer in network.layers]
    for layer in network.layers:
        assert places[layer.name].shape == embeddings[layer.name].positions.shape == (layer.filters, 2)
        assert np.isfinite(places[layer.name]).all()
        assert np.array_equal(places[layer.name], again[layer.name])


def test_some_layers_alone_can_be_drawn() -> None:
    network = FilterNetwork(randomise_norms(Residual()), (3, 16, 16))
    chosen = [layer for layer in network.layers if layer.name in ("inner", "expand")]
    found = {name: tensors for name, tensors in _found(network).items() if name in ("inner", "expand")}
    assert list(embed_network(network, chosen, found, RunContext())[1]) == ["inner", "expand"]


def test_a_network_that_responds_to_nothing_has_a_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    network = FilterNetwork(model, (3, 16, 16))
    places = embed_network(network, network.layers, _found(network), RunContext())[1]["0"]
    assert np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == 4


class Passing(nn.Module):
    """Its second layer passes on what the first computes, filter by filter, at another scale."""

    def __init__(self, filters: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, filters, 5, padding=2)
        self.second = nn.Conv2d(filters, filters, 1, bias=False)
        self.second.weight.data.copy_(3 * torch.eye(filters)[:, :, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(images))))


@pytest.mark.slow
def test_copies_in_another_layer_lie_near_each_other() -> None:
    network = FilterNetwork(Passing(64), (3, 32, 32))
    found = {}
    for layer in network.layers:
        images = find_stimuli(network, layer.name, steps=12, seed=layer.depth).images.half()
        responses = response_matrix(network, layer.name, images)
        found[layer.name] = LayerTensors(images.numpy(), np.diag(responses).copy(), responses)
    places = embed_network(network, network.layers, found, RunContext())[1]
    first, second = places["first"], places["second"]
    apart = np.linalg.norm(first[:, None] - second[None], axis=2)
    ranks = (apart < np.diag(apart)[:, None]).sum(axis=1)
    assert np.median(ranks) <= 1  # of 64
    assert np.median(np.diag(apart)) < 0.3 * np.median(apart)


def test_common_profiles_of_copies_are_the_same() -> None:
    network = FilterNetwork(Passing(), (3, 32, 32))
    stimuli = [torch.randn(7, 3, size, size) for size in (16, 24)]
    profiles = common_profiles(network, ["first", "second"], stimuli)
    assert profiles["first"].shape == (24, 14)
    np.testing.assert_allclose(profiles["first"], profiles["second"], atol=1e-4)


def test_filters_that_respond_to_nothing_lie_apart() -> None:
    model = Passing()
    with torch.no_grad():
        model.second.weight[10:15] = 0.0
    network = FilterNetwork(model, (3, 32, 32))
    positions = embed_network(network, network.layers, _found(network), RunContext())[1]
    silent = positions["second"][10:15]
    others = np.vstack([positions["first"], np.delete(positions["second"], range(10, 15), axis=0)])
    size = np.ptp(np.vstack([others, silent]), axis=0)
    assert np.linalg.norm((others[:, None] - silent) / size, axis=2).min() > 0.02


def test_network_map_uses_components_of_all_layers() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(3, 1, size=(count, 6)) * np.arange(1, 7) for count in (5, 1, 30)]
    scores, variance = principal([part.astype(np.float32) for part in parts], 2)
    whole = np.vstack(parts)
    centred = whole - whole.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left * values)[:, :2], rtol=1e-3, atol=1e-3)
    assert variance == pytest.approx((centred**2).sum() / 36, rel=1e-4)


class Tight(Budget):
    """Lets two inputs through at a time."""

    def rows(self, a_row: int, aside: int = 0) -> int:
        return 2


@pytest.mark.parametrize("model", [Residual, Untraceable])
@pytest.mark.parametrize("budget", [None, Tight(torch.device("cpu"), 2**40)])
def test_inputs_are_read_as_many_at_a_time_as_memory_holds(
    model: type[nn.Module], budget: Budget | None
) -> None:
    network = FilterNetwork(randomise_norms(model()), (3, 16, 16))
    images = torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    name = network.layers[-1].name
    rows = []

    def reading(maps: Tensor) -> Tensor:
        rows.append(len(maps))
        if len(maps) > 4:
            raise torch.OutOfMemoryError
        return map_norms(maps)

    norms = read_maps(network, [name], lambda: [images[:10], images[10:]], reading, budget)[name]
    assert rows == ([2] * 5 + [1] if budget else [10, 10, 8, 4, 4, 2, 1])
    np.testing.assert_allclose(norms, response_matrix(network, name, images), rtol=1e-4, atol=1e-5)

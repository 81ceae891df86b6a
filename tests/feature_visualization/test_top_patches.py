"""Which parts of example images excite a filter most, against a slow search of every image and place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Plain, Untraceable, randomise_norms
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.feature_visualization.top_patches import (
    SHOWN,
    TopPatches,
    find_top_patches,
    read_top_patches,
    write_top_patches,
)
from prune_viz.loading.input_data import normalise
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.runs.run_directory import RunDirectory

STATISTICS = InputStatistics(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def pixels(count: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def second_maps(model: nn.Module, images: Tensor) -> Tensor:
    first = torch.relu(model.bn1(model.conv1(images)))
    return torch.relu(model.bn2(model.conv2(first)))


@pytest.mark.parametrize("kind", [Plain, Untraceable])
def test_parts_are_those_of_a_search_of_every_place(kind: type[nn.Module]) -> None:
    model = randomise_norms(kind()).eval()
    network = FilterNetwork(model, (3, 16, 16))
    shown = pixels(20)
    examples = normalise(shown, STATISTICS)
    found = find_top_patches(network, network.layers, examples, STATISTICS)
    assert found is not None
    windows = found.windows["conv2"]
    with torch.no_grad():
        maps = second_maps(model, examples).numpy()
    for filter_, row in enumerate(windows):
        ranked = sorted(range(20), key=lambda image: -maps[image, filter_].max())[:SHOWN]
        for image, (number, left, top, side) in zip(ranked, row, strict=True):
            if maps[image, filter_].max() == 0:
                assert number == -1
                continue
            kept = found.pictures[int(number)]
            assert np.array_equal(kept, shown[image].permute(1, 2, 0).numpy())  # its own pixels
            down, across = np.unravel_index(maps[image, filter_].argmax(), maps.shape[2:])
            place = (np.array([across, down]) + 0.5) * 2  # the stride
            corner = np.clip(place - 8 * side * 2, 0, 16 - 16 * side)
            assert 16 * np.array([left, top]) == pytest.approx(corner, abs=1e-4)


def test_a_bright_spot_is_found_on_oblong_images_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[0].weight[1] *= -1
        model[0].bias.zero_()
    network = FilterNetwork(model, (3, 40, 120), canvas=32)
    images = torch.zeros(3, 3, 40, 120)
    images[1, :, 20:23, 100:103] = 1.0
    found = find_top_patches(network, network.layers, images, None)
    assert found is not None
    number, left, top, side = found.windows["0"][0, 0]
    assert found.windows["0"][0, 1:, 0].tolist() == [-1, -1]  # blank images excite nothing
    assert (found.windows["0"][1, :, 0] == -1).all()  # nor does anything excite what only bright spots still
    assert number == 0
    assert side == pytest.approx(32 / 120)
    # The picture stands in the middle of a square of its width.
    assert left <= 101.5 / 120 <= left + side
    assert 40 / 120 <= top <= (40 + 21.5) / 120 <= top + side <= 80 / 120 + 1e-6
    assert found.pictures.shape == (1, 120, 120, 3)


def test_signals_have_no_pictures() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU())
    network = FilterNetwork(model, (1, 64))
    assert find_top_patches(network, network.layers, torch.randn(4, 1, 64), None) is None


class Unrolled(nn.Module):
    """Pictures, read as signals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv1d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).flatten(2))


def test_maps_that_are_no_pictures_and_what_nothing_excites() -> None:
    network = FilterNetwork(Unrolled(), (3, 16, 16))
    found = find_top_patches(network, network.layers, torch.randn(4, 3, 16, 16), None)
    assert found is not None
    assert (found.windows["second"][..., 0] == -1).all()
    assert (found.windows["first"][..., 0] >= 0).any()
    dead = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.constant_(dead[0].bias, -1e3)
    network = FilterNetwork(dead, (3, 16, 16))
    assert find_top_patches(network, network.layers, torch.randn(4, 3, 16, 16), None) is None


def test_written_is_read_damaged_is_refused(tmp_path: Path) -> None:
    parts = TopPatches(np.zeros((2, 8, 8, 3), np.uint8), {"a/../<b>": np.ones((4, 6, 4), np.float32)})
    path, files, counts = tmp_path / "examples.safetensors", {"a/../<b>": "000-a-b"}, {"a/../<b>": 4}
    write_top_patches(parts, files, path)
    again = read_top_patches(path, files, counts)
    assert again is not None
    assert np.array_equal(again.windows["a/../<b>"], parts.windows["a/../<b>"])
    assert read_top_patches(path, {"other": "001-other"}, {"other": 4}) is None
    assert read_top_patches(path, files, {"a/../<b>": 5}) is None
    for wrong in (
        TopPatches(parts.pictures.astype(np.float32), parts.windows),
        TopPatches(parts.pictures[..., 0], parts.windows),
        TopPatches(parts.pictures[:1], parts.windows),  # of which there is no second
    ):
        write_top_patches(wrong, files, path)
        assert read_top_patches(path, files, counts) is None
    path.write_bytes(path.read_bytes()[:-9])
    assert read_top_patches(path, files, counts) is None
    assert read_top_patches(tmp_path / "none", files, counts) is None


def test_weights_are_kept_of_what_reads_the_input(tmp_path: Path) -> None:
    model = randomise_norms(Plain())
    pv.analyze(model, input_shape=(3, 16, 16), steps=2, out=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    found = {record.name: run.read_layer(record.file).weights for record in run.layers()}
    assert found["conv2"] is found["conv3"] is None
    assert np.array_equal(found["conv1"], model.conv1.weight.detach().numpy())


@pytest.mark.parametrize(
    ("first", "kept"),
    [
        (nn.Conv2d(3, 6, 3), True),
        (nn.Conv2d(3, 6, 3, groups=3), False),
        (nn.ConvTranspose2d(3, 6, 3), False),
    ],
)
def test_weights_kept_where_filters_read_all_channels(first: nn.Module, kept: bool) -> None:
    network = FilterNetwork(nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 2, 1)), (3, 12, 12))
    found = network.input_weights("0")
    assert (found is not None) == kept
    assert found is None or torch.equal(found, first.weight)
    assert network.input_weights("2") is None


def test_untraceable_network_has_no_known_first_layer() -> None:
    assert FilterNetwork(Untraceable().eval(), (3, 16, 16)).input_weights("conv1") is None

from __future__ import annotations

import pytest
import torch

from prune_viz.calibration import dead_leaves as leaves
from prune_viz.calibration.dead_leaves import dead_leaves
from prune_viz.calibration.images import natural_noise
from prune_viz.network.inputs import InputStatistics


@pytest.mark.parametrize("shape", [(1, 64), (3, 24, 32), (2, 6, 8, 10)])
def test_dead_leaves_on_any_axes_reproducible(shape: tuple[int, ...]) -> None:
    pictures = dead_leaves(shape, 5, seed=3)
    assert pictures.shape == (5, *shape)
    assert pictures.isfinite().all()
    assert torch.equal(pictures, dead_leaves(shape, 5, seed=3))
    assert not torch.equal(pictures, dead_leaves(shape, 5, seed=4))
    assert dead_leaves(shape, 0, seed=3).shape == (0, *shape)


def _kurtosis_of_edges(pictures: torch.Tensor) -> float:
    steps = (pictures - pictures.roll(1, -1)).flatten()
    return float((steps**4).mean() / steps.square().mean() ** 2)


def test_dead_leaves_have_edges_and_flat_places() -> None:
    size = (1, 48, 48)
    assert _kurtosis_of_edges(natural_noise(size, 32, seed=0)) == pytest.approx(3, abs=0.3)
    assert _kurtosis_of_edges(dead_leaves(size, 32, seed=0)) > 8


def test_colours_are_those_of_natural_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "TEXTURE", 0.0)
    statistics = InputStatistics(mean=(0.0,) * 3, std=(0.5, 1.0, 0.25))
    pictures = dead_leaves((3, 16, 16), 800, seed=1, statistics=statistics)
    values = pictures.transpose(0, 1).flatten(1)
    deviations = values.square().mean(dim=1).sqrt()
    torch.testing.assert_close(deviations, torch.tensor([0.5, 0.25, 1.0]), rtol=0.06, atol=0)
    correlation = (values[0] * values[1]).mean() / (deviations[0] * deviations[1])
    assert float(correlation) == pytest.approx(0.91, abs=0.02)


def test_a_picture_without_texture_has_a_colour_a_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "TEXTURE", 0.0)
    for picture in dead_leaves((3, 64, 64), 20, seed=2):
        colours = torch.unique(picture.flatten(1), dim=1).shape[1]
        assert 2 <= colours <= leaves.MOST + 1

"""How far predictions can be trusted, by what they rest on."""

import pytest
import torch
from torch import nn

from prune_viz.calibration.images import SyntheticImages
from prune_viz.redundancy.basis import ENOUGH_EXAMPLES, FAR, distance_of, find_roughness

PICTURE, SIGNAL = (3, 32, 32), (1, 1024)


def _calibrated(distance: float | None) -> SyntheticImages:
    return SyntheticImages(torch.zeros(2, *PICTURE), before=1.0, distance=distance, passes=1)


@pytest.mark.parametrize(
    ("distance", "shape", "unfounded", "why"),
    [
        (FAR / 2, PICTURE, False, "no inputs of the network's kind were given"),
        (2 * FAR, PICTURE, True, "calibration ended far"),
        (None, PICTURE, True, "no batch norm shows"),
        (FAR / 2, SIGNAL, True, "the inputs are not pictures"),
    ],
)
def test_without_inputs_everything_is_rough(
    distance: float | None, shape: tuple[int, ...], unfounded: bool, why: str
) -> None:
    found = find_roughness(_calibrated(distance), ENOUGH_EXAMPLES - 1, None, shape)
    assert found.is_unfounded is unfounded
    assert found.why.startswith(why)
    assert "--data with 128 unlabelled inputs would help" in found.why


def test_inputs_make_predictions_sound() -> None:
    found = find_roughness(_calibrated(2 * FAR), ENOUGH_EXAMPLES, FAR / 2, SIGNAL)
    assert (found.why, found.is_unfounded) == ("", False)


def test_inputs_unlike_those_of_training_are_said_to_be_so() -> None:
    found = find_roughness(_calibrated(FAR / 2), ENOUGH_EXAMPLES, 2 * FAR, PICTURE)
    assert found.is_unfounded
    assert "the inputs of --data are far from what the batch norms saw in training, at 0.4" in found.why


def test_the_distance_of_inputs_is_that_of_their_statistics() -> None:
    norm = nn.BatchNorm2d(2).eval()
    norm.running_mean[:], norm.running_var[:] = torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0])
    inputs = torch.randn(40, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = 3 + 2 * inputs[:, 0]  # a deviation from the running mean
    inputs[:, 1] *= 3
    model = nn.Sequential(nn.Conv2d(2, 2, 1), norm).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[0].bias.zero_()
    assert distance_of(model, inputs) == pytest.approx((1 + 4) / 2, rel=0.02)
    assert distance_of(model, None) is None
    assert distance_of(nn.Conv2d(2, 2, 1).eval(), inputs) is None

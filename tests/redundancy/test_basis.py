"""How far predictions can be trusted, by what they rest on."""

import pytest
import torch

from prune_viz.calibration.images import SyntheticImages
from prune_viz.redundancy.basis import ENOUGH_EXAMPLES, FAR, find_roughness

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
    found = find_roughness(_calibrated(distance), ENOUGH_EXAMPLES - 1, shape)
    assert found.is_unfounded is unfounded
    assert found.why.startswith(why)
    assert "--data with 128 unlabelled inputs would help" in found.why


def test_inputs_make_predictions_sound() -> None:
    found = find_roughness(_calibrated(2 * FAR), ENOUGH_EXAMPLES, SIGNAL)
    assert (found.why, found.is_unfounded) == ("", False)

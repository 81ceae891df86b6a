"""What is said of a predicted and a measured change of the output."""

from __future__ import annotations

import pytest
import torch
from networks import mask_without, random_residual
from torch import Tensor, nn

from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.pruning.outcome import describe_change, differ, measure_masks
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.fingerprint import Origin
from prune_viz.runs.output_kind import OutputKind, Task
from prune_viz.utils.errors import UserError


def _nats(value: float) -> Damage:
    return Damage(value, Unit.NATS)


def test_predicted_and_measured_stand_side_by_side() -> None:
    assert describe_change(_nats(0.25), _nats(0.3), "8 images", "") == [
        "change of the output: predicted 0.25 nats, measured 0.3 nats on 8 images"
    ]
    assert describe_change(None, _nats(0.3), "8 images", "") == [
        "change of the output: measured 0.3 nats on 8 images"
    ]
    assert describe_change(_nats(0.25), None, "", "") == ["change of the output: predicted 0.25 nats"]
    assert describe_change(None, None, "", "no data") == []
    assert describe_change(Damage(0.1, Unit.CONSUMERS), None, "", "") == []  # not one of the output


def test_large_differences_and_rough_ones_are_said() -> None:
    lines = describe_change(_nats(0.1), _nats(0.5), "8 images", "no data")
    assert lines[1:] == [
        "note: these differ by a factor of 5.0; trust the measured one", "note: both are rough: no data"
    ]  # fmt: skip
    assert "more than a factor of 1,000" in describe_change(_nats(0), _nats(0.5), "8 images", "")[1]


@pytest.mark.parametrize(
    ("one", "other", "far"), [(0.1, 0.19, False), (0.1, 0.21, True), (1e-9, 9e-5, False), (1e-9, 2e-4, True)]
)
def test_what_is_as_good_as_nothing_does_not_differ(one: float, other: float, far: bool) -> None:
    assert differ(_nats(one), _nats(other)) is differ(_nats(other), _nats(one)) is far


def test_masks_are_measured_on_their_own_model_only() -> None:
    model = random_residual()
    masks = Masks({"inner": mask_without(8, 1, 2)}, origin=Origin(weights="ab" * 32))
    masks.calibration_images = torch.randn(8, 3, 16, 16)
    with pytest.raises(UserError, match="not the one that was analysed"):
        measure_masks(model, masks)
    masks.origin = Origin()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure_masks(model, masks) == ""
    assert masks.measured is not None
    assert masks.measured.value > 0
    assert masks.measured_on == "2 synthetic images that no fit saw"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks.calibration_images = None
    assert "no images to measure on" in measure_masks(model, masks)


@pytest.mark.parametrize("output", [OutputKind(), None])
def test_images_that_do_not_fit_measure_nothing(output: OutputKind | None) -> None:
    masks = Masks({"inner": mask_without(8, 1, 2)}, origin=Origin(output=output))
    masks.calibration_images = torch.randn(8, 5, 16, 16)
    assert "does not run on an input of shape 5,16,16" in measure_masks(random_residual(), masks)
    assert masks.measured is None


class Frames(nn.Module):
    """Returns frames before inputs, as a recurrent network may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).movedim(1, 0)


@pytest.mark.parametrize("rows", [3, 32])
@pytest.mark.parametrize("frames", [5, 80])
def test_a_network_at_zero_changes_all_of_its_output(frames: int, rows: int) -> None:
    whole, zero = Frames(), Frames()
    nn.init.zeros_(zero.layer.weight)
    nn.init.zeros_(zero.layer.bias)
    meter = OutputMeter(whole, torch.randn(10, frames, 4), OutputKind(Task.VALUES), rows)
    assert meter.change(zero) == pytest.approx(1.0, rel=1e-5)


def test_a_single_number_for_all_inputs_is_measured() -> None:
    class Mean(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).mean()

    whole = Mean(3, 4, 3)
    zero = Mean(3, 4, 3)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    meter = OutputMeter(whole, torch.randn(6, 3, 8, 8), OutputKind(Task.VALUES), rows=2)
    assert meter.change(zero) == pytest.approx(1.0, rel=1e-5)

"""Moments of what batch norms are fed, and their gradients, against plain sums and torch's own norms."""

from __future__ import annotations

import pytest
import torch
from networks import Residual, randomise_norms
from torch import Tensor, nn

from prune_viz.calibration.losses import Watched
from prune_viz.calibration.norm_moments import moments, normalise
from prune_viz.runs.output_kind import OutputKind

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _norm(axes: int, affine: bool) -> nn.Module:
    norm = KINDS[axes](3, affine=affine).double().eval()
    norm.running_mean = torch.randn(3).double() + 50
    norm.running_var = torch.rand(3).double() + 0.5
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def _plainly(norm: nn.Module, inputs: Tensor) -> Tensor:
    along = (1, 3, *(1,) * (inputs.ndim - 2))
    deviation = (norm.running_var + norm.eps).sqrt()
    normal = (inputs - norm.running_mean.view(along)) / deviation.view(along)
    rows = normal.transpose(0, 1).flatten(1)
    return torch.stack([rows.mean(dim=1), rows.square().mean(dim=1)])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (1, 3, 1), (5, 3, 7), (5, 3, 6, 4), (5, 3, 4, 3, 2)])
def test_moments_and_outputs_with_their_gradients_are_those_of_plain_sums(
    shape: tuple[int, ...], last: bool, affine: bool
) -> None:
    inputs = 50 + torch.randn(shape, dtype=torch.float64)
    if last:
        inputs = inputs.movedim(1, -1).contiguous().movedim(-1, 1)
    inputs.requires_grad_()
    norm, weight, onward = _norm(len(shape), affine), torch.randn(2, 3).double(), torch.randn(shape).double()
    expected, usual = _plainly(norm, inputs), norm(inputs)
    outputs, found = normalise(norm, inputs)
    torch.testing.assert_close(outputs, usual)
    for one in (found, moments(norm, inputs)):
        torch.testing.assert_close(one, expected)
        pulled = [(this * weight).sum() for this in (one, expected)]
        torch.testing.assert_close(
            *(torch.autograd.grad(this, inputs, retain_graph=True)[0] for this in pulled)
        )
    both = [(a * weight).sum() + (b * onward).sum() for a, b in ((found, outputs), (expected, usual))]
    torch.testing.assert_close(*(torch.autograd.grad(one, inputs)[0] for one in both))


def test_large_means_take_nothing_from_small_deviations() -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.fill_(1000)
    norm.running_var.fill_(1e-4)
    inputs = 1000 + 0.01 * torch.randn(4, 3, 32, 32)
    found = moments(norm, inputs)
    torch.testing.assert_close(found.double(), _plainly(norm.double(), inputs.double()), rtol=1e-2, atol=1e-2)


class Doubling(nn.BatchNorm2d):
    """A batch norm of somebody's own."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


def test_norms_of_other_kinds_go_on_computing_what_they_do() -> None:
    model = randomise_norms(Residual()).eval()
    model.bn0.__class__ = Doubling
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        before = model(images)
        with Watched(model, OutputKind()) as watched:
            watched.see(images)
            torch.testing.assert_close(model(images), before)
        assert torch.equal(model(images), before)
    assert not any("forward" in vars(module) for module in model.modules())

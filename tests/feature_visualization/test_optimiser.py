from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prune_viz.feature_visualization import optimiser as module
from prune_viz.feature_visualization.optimiser import (
    draw_noise,
    draw_shifts,
    images_at,
    one_side,
    optimise,
    points_at,
    roll,
    unit,
)
from prune_viz.feature_visualization.priors import NoPrior, make_prior


def _optimise_all(maps, prior, canvas, channels=1, count=3, steps=64) -> Tensor:
    points = points_at(torch.stack([draw_noise(str(number), (channels, *canvas)) for number in range(count)]))
    shifts = torch.zeros(steps, count, len(canvas), dtype=torch.long)
    points, sound = optimise(maps, [0] * count, prior, canvas, points, shifts, 0.5)
    assert sound.all()
    torch.testing.assert_close(points.norm(dim=1), torch.ones(count))
    return images_at(points, prior, canvas)


def test_the_best_input_may_lie_inside_the_ball() -> None:
    centre = torch.linspace(-1, 1, 30).view(1, 1, 5, 6)
    prior = NoPrior(radius=2 * float(centre.norm()))

    def maps(inputs: Tensor) -> tuple[Tensor, Tensor]:
        away = (inputs - centre).square().flatten(1).sum(dim=1)
        found = (100 - away).view(-1, 1, 1, 1)
        return found, found

    images = _optimise_all(maps, prior, (5, 6))
    assert ((images - centre).flatten(1).norm(dim=1) < 0.02 * centre.norm()).all()


def test_the_best_input_on_the_bound_is_reached_exactly() -> None:
    target = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    prior = NoPrior(radius=3.0)

    def maps(inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = (inputs * target).flatten(1).sum(dim=1).view(-1, 1, 1, 1)
        return found, found

    images = _optimise_all(maps, prior, (6, 5), channels=2)
    reached = (images * target).flatten(1).sum(dim=1).abs()
    torch.testing.assert_close(reached, (3.0 * target.norm()).expand(3), rtol=1e-4, atol=0)
    assert (images.flatten(1).norm(dim=1) <= 3.0001).all()


NEGATIVE = torch.tensor([-1.0])


def test_one_sided_objective_raises_silent_side() -> None:
    found = torch.tensor([[3.0, -2.0, 0.5]]).view(1, 1, 1, 3)
    before, after = one_side(lambda inputs: (inputs, inputs), NEGATIVE)(found)
    assert torch.equal(before, -found)
    assert after.flatten().tolist() == [0.0, 2.0, 0.0]
    gradient = module._gradient(
        found.abs(), one_side(lambda inputs: (inputs, inputs), NEGATIVE), torch.tensor([0])
    )
    assert (gradient < 0).any()


@pytest.mark.parametrize("bounded", [False, True])
def test_gradient_matches_finite_differences(bounded: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 2, 3, 3, generator=generator, dtype=torch.float64)

    def maps(inputs: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.nn.functional.conv2d(inputs, weight)
        return before, torch.sigmoid(before) if bounded else torch.nn.functional.softplus(before)

    images = torch.randn(2, 2, 6, 7, generator=generator, dtype=torch.float64)
    filters = torch.tensor([2, 0])
    gradient = module._gradient(images, maps, filters)
    for row in range(2):
        for place in [(0, 0, 0), (1, 3, 4), (0, 5, 6), (1, 2, 2)]:
            values = []
            for step in (1e-5, -1e-5):
                moved = images.clone()
                moved[row][place] += step
                values.append(float(maps(moved)[1][row, filters[row]].norm()))
            difference = (values[0] - values[1]) / 2e-5
            assert float(gradient[row][place]) == pytest.approx(difference, rel=1e-6, abs=1e-9)


def test_a_gradient_that_is_not_finite_stops_its_own_row() -> None:
    def maps(inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = inputs.sum(dim=(1, 2, 3), keepdim=True) * torch.tensor([1.0, math.nan, 1.0]).view(-1, 1, 1, 1)
        return found, found

    points = points_at(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    shifts = torch.zeros(4, 3, 2, dtype=torch.long)
    moved, sound = optimise(maps, [0, 0, 0], NoPrior(1.0), (4, 4), points, shifts, 0.3)
    assert sound.tolist() == [True, False, True]
    torch.testing.assert_close(moved[1], points[1])
    assert not torch.allclose(moved[0], points[0], atol=1e-2)


def test_noise_and_jitter_depend_on_the_key_alone() -> None:
    for draw in (lambda key: draw_noise(key, (3, 48, 24)), lambda key: draw_shifts(key, (48, 24), 16)):
        assert torch.equal(draw("0/conv/3"), draw("0/conv/3"))
        assert not torch.equal(draw("0/conv/3"), draw("0/conv/4"))
    many = torch.stack([draw_shifts(str(number), (48, 24), 16) for number in range(200)])
    assert many[:, 8:].eq(0).all()
    assert (many[..., 0].min(), many[..., 0].max()) == (-4, 4)
    assert (many[..., 1].min(), many[..., 1].max()) == (-2, 2)


def test_points_stand_for_images_within_the_bound() -> None:
    prior = make_prior("natural", 3, (12, 10))
    white = torch.randn(4, 3, 12, 10)
    points = points_at(white)
    torch.testing.assert_close(points.norm(dim=1), torch.ones(4))
    back = prior.whiten(images_at(points, prior, (12, 10)))
    within = prior.radius * math.sqrt(1 - module.SLACK**2) * unit(white.flatten(1))
    torch.testing.assert_close(back.flatten(1), within, rtol=1e-3, atol=1e-4)


def test_roll_is_torch_roll_with_offsets_of_its_own() -> None:
    images = torch.randn(3, 2, 5, 7)
    shifts = torch.tensor([[0, 0], [2, -3], [-1, 6]])
    expected = torch.stack(
        [torch.roll(i, (-int(s[0]), -int(s[1])), (1, 2)) for i, s in zip(images, shifts, strict=True)]
    )
    assert torch.equal(roll(images, shifts), expected)
    assert torch.equal(roll(roll(images, shifts), -shifts), images)

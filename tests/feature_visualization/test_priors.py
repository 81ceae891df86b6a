from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_viz.feature_visualization.priors import (
    FLATTEST,
    RADIUS,
    NaturalPrior,
    make_prior,
    natural_amplitude,
    scene_exponent,
    separable_amplitude,
)
from prune_viz.network.inputs import InputStatistics, as_spectrograms
from prune_viz.utils.errors import UserError

IMAGENET = InputStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CANVASES = [(9,), (8, 6), (5, 7), (4, 3, 5)]


def _covariance(channels: int, seed: int, scale: float = 1.0) -> tuple[tuple[float, ...], ...]:
    factor = scale * np.random.default_rng(seed).normal(size=(channels, channels + 2))
    return tuple(tuple(row) for row in (factor @ factor.T).tolist())


def _known(channels: int, seed: int, exponent: float | None = None, scale: float = 1.0) -> InputStatistics:
    return InputStatistics((0.5,) * channels, (1.0,) * channels, _covariance(channels, seed, scale), exponent)


def _likeliest(prior: NaturalPrior, channels: int, canvas: tuple[int, ...]) -> torch.Tensor:
    """The largest stimulus on the ball: constant in space, along the strongest channel direction."""
    direction = torch.ones(1) if prior.mix is None else torch.linalg.eigh(prior.mix)[1][:, -1]
    white = direction.view(1, -1, *[1] * len(canvas)).expand(1, channels, *canvas)
    return prior.colour(white * prior.radius / white.norm())


def test_without_statistics_priors_are_as_ever() -> None:
    colour = make_prior("natural", 3, (24, 20))
    assert isinstance(colour, NaturalPrior)
    assert float(_likeliest(colour, 3, (24, 20)).square().mean().sqrt()) == pytest.approx(RADIUS, rel=1e-5)
    squared = colour.mix @ colour.mix
    torch.testing.assert_close(squared.diagonal(), torch.ones(3))
    assert float(squared[0, 2]) == pytest.approx(0.79)
    for channels, canvas in ((2, (24, 20)), (4, (24,)), (4, (6, 6, 6))):
        other = make_prior("natural", channels, canvas)
        assert isinstance(other, NaturalPrior)
        assert other.mix is None
    assert make_prior("none", 4, (24, 20)).radius == math.sqrt(4 * 24 * 20)


@pytest.mark.parametrize("name", ["natural", "none"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_unit_variances_change_nothing(channels: int, name: str) -> None:
    unit = InputStatistics((0.5,) * channels, (0.25,) * channels)
    plain, known = make_prior(name, channels, (12, 10)), make_prior(name, channels, (12, 10), "cpu", unit)
    assert known.radius == plain.radius
    white = torch.randn(2, channels, 12, 10)
    assert torch.equal(known.colour(white), plain.colour(white))


def test_the_map_is_symmetric() -> None:
    for statistics in (None, IMAGENET, _known(3, 0, 1.3)):
        prior = make_prior("natural", 3, (12, 10), statistics=statistics)
        one, other = torch.randn(2, 1, 3, 12, 10)
        left, right = (prior.colour(one) * other).sum(), (one * prior.colour(other)).sum()
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    canvas=st.sampled_from(CANVASES),
    channels=st.integers(1, 5),
    seed=st.integers(0, 1000),
    exponent=st.one_of(st.none(), st.floats(0.5, 1.5)),
    covariance=st.booleans(),
    name=st.sampled_from(["natural", "spectrogram", "none"]),
)
def test_whiten_undoes_colour(
    canvas: tuple[int, ...], channels: int, seed: int, exponent: float | None, covariance: bool, name: str
) -> None:
    statistics = _known(channels, seed, exponent) if covariance else None
    prior = make_prior(name, channels, canvas, statistics=statistics)
    white = torch.randn(2, channels, *canvas, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(prior.whiten(prior.colour(white)), white, rtol=1e-3, atol=2e-3)
    images = prior.colour(white)
    torch.testing.assert_close(prior.colour(prior.whiten(images)), images, rtol=1e-3, atol=2e-3)


def test_a_covariance_that_is_singular_can_be_undone() -> None:
    grey = InputStatistics((0.5,) * 3, (1.0,) * 3, ((1.0,) * 3,) * 3)
    prior = make_prior("natural", 3, (8, 8), statistics=grey)
    assert isinstance(prior, NaturalPrior)
    values = torch.linalg.eigvalsh(prior.mix.double()).square()
    assert float(values[0] / values[2]) == pytest.approx(FLATTEST, rel=1e-2)
    white = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(prior.whiten(prior.colour(white)), white, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("canvas", [(64,), (16, 16), (6, 8, 7)])
def test_noise_has_the_given_covariance(canvas: tuple[int, ...]) -> None:
    statistics = _known(3, 1, scale=0.4)
    prior = make_prior("natural", 3, canvas, statistics=statistics)
    white = torch.randn(4000, 3, *canvas, generator=torch.Generator().manual_seed(0))
    flat = prior.colour(white).transpose(0, 1).flatten(1)
    expected = torch.tensor(statistics.covariance)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], expected, rtol=0.05, atol=0.03)


def test_a_normalisation_gives_the_deviation_of_pixels() -> None:
    for channels, correlation in ((3, 0.91), (2, 0.0)):
        statistics = InputStatistics((0.5,) * channels, (0.5, 0.1, 0.2)[:channels])
        prior = make_prior("natural", channels, (8, 8), statistics=statistics)
        assert isinstance(prior, NaturalPrior)
        covariance = prior.mix @ prior.mix
        assert float(covariance[0, 0]) == pytest.approx((0.25 / 0.5) ** 2, rel=1e-4)
        assert float(covariance[0, 1]) == pytest.approx(correlation * 0.5 * 2.5, rel=1e-4, abs=1e-5)


def test_neighbouring_bands_vary_together() -> None:
    prior = make_prior("natural", 6, (8, 8))
    assert isinstance(prior, NaturalPrior)
    covariance = prior.mix @ prior.mix
    expected = torch.tensor([[0.9 ** abs(one - other) for other in range(6)] for one in range(6)])
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("canvas", [(16, 12), (9, 15)])
def test_spectrograms_fall_along_each_axis(canvas: tuple[int, int]) -> None:
    amplitude = separable_amplitude(canvas, 0.7)
    rows, columns = canvas
    for row, column in ((1, 1), (2, 4), (3, 1)):
        fall = float(amplitude[row, column] / amplitude[1, 1])
        assert fall == pytest.approx((row * column) ** -0.7, rel=1e-4)
        assert float(amplitude[-row, column]) == pytest.approx(float(amplitude[row, column]))
    # A tone, constant along time, is as strong as one that varies once along it.
    assert torch.equal(amplitude[:, 0], amplitude[:, 1])
    whole = make_prior("none", 1, canvas).whiten(torch.eye(rows * columns).view(-1, 1, *canvas))
    prior = make_prior("spectrogram", 1, canvas)
    power = prior.colour(whole).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(power, torch.ones(rows * columns), rtol=1e-4, atol=1e-4)


def test_separable_statistics_make_priors_of_spectrograms() -> None:
    known = as_spectrograms(None, (1, 16, 16))
    plain, asked = (make_prior(name, 1, (16, 16), statistics=known) for name in ("natural", "spectrogram"))
    bare = make_prior("spectrogram", 1, (16, 16))
    assert torch.equal(plain.amplitude, bare.amplitude)
    assert torch.equal(asked.amplitude, bare.amplitude)
    assert plain.radius == bare.radius
    photographs = as_spectrograms(_known(1, 0, 1.4), (1, 16, 16))
    assert photographs.exponent is None  # that was measured as of pictures
    measured = replace(photographs, exponent=0.8)
    steep = make_prior("spectrogram", 1, (16, 16), statistics=measured)
    assert torch.equal(steep.amplitude, separable_amplitude((16, 16), 0.8))
    with pytest.raises(UserError, match="of two axes"):
        as_spectrograms(None, (1, 1024))


def test_the_measured_exponent_is_used() -> None:
    prior = make_prior("natural", 1, (32, 32), statistics=_known(1, 0, 1.4))
    assert isinstance(prior, NaturalPrior)
    assert torch.equal(prior.amplitude, natural_amplitude((32, 32), 1.4))
    assert float(prior.amplitude[0, 4] / prior.amplitude[0, 8]) == pytest.approx(2**1.4, rel=1e-4)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_radius_is_in_natural_standard_deviations(canvas: tuple[int, ...], scale: float) -> None:
    for channels in (1, 3, 5):
        statistics = _known(channels, 3, 0.8, scale)
        deviation = math.sqrt(np.diag(statistics.covariance).mean())
        prior = make_prior("natural", channels, canvas, statistics=statistics)
        reached = float(_likeliest(prior, channels, canvas).square().mean().sqrt())
        assert reached == pytest.approx(RADIUS * deviation, rel=1e-4)
        none = make_prior("none", channels, canvas, statistics=statistics)
        assert none.radius == pytest.approx(deviation * math.sqrt(channels * math.prod(canvas)))


def test_statistics_of_other_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="the input has 4 channels"):
        make_prior("natural", 4, (8, 8), statistics=IMAGENET)


def test_scenes_of_photographs_have_the_steeper_spectrum() -> None:
    assert scene_exponent((3, 32, 32)) > scene_exponent((1, 32, 32)) > scene_exponent((3, 64))
    steep = make_prior("natural", 1, (32, 32), exponent=1.2)
    torch.testing.assert_close(steep.amplitude, natural_amplitude((32, 32), 1.2))
    measured = make_prior("natural", 1, (32, 32), statistics=_known(1, 0, 1.4), exponent=1.2)
    torch.testing.assert_close(measured.amplitude, natural_amplitude((32, 32), 1.4))


@pytest.mark.parametrize(("axes", "slope"), [(1, 0.5), (2, 0.8), (3, 1.2)])
def test_spectra_fall_by_the_kind_of_input(axes: int, slope: float) -> None:
    size = (32,) * axes
    torch.testing.assert_close(make_prior("natural", 1, size).amplitude, natural_amplitude(size, slope))
    octaves = make_prior("natural", 1, size).amplitude.flatten()[[1, 2, 4, 8]]
    torch.testing.assert_close(octaves[:-1] / octaves[1:], torch.full((3,), 2.0**slope))

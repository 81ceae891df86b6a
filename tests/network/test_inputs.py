from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import sklearn.datasets
import torch

from prune_viz.feature_visualization.priors import make_prior
from prune_viz.network.inputs import (
    InputStatistics,
    given_statistics,
    measure_own_units,
    measure_statistics,
    stored_statistics,
)
from prune_viz.utils.errors import UserError

# Of an exponent: the window mixes neighbouring frequencies, which tells at the lowest of a small image.
TOLERANCE = 0.09
COVARIANCE = np.array([[0.010, 0.006, 0.001], [0.006, 0.008, -0.002], [0.001, -0.002, 0.005]])


def _images(
    exponent: float, covariance: np.ndarray, size: tuple[int, ...], count: int = 32, crop: int = 1
) -> np.ndarray:
    """Images (N, C, *size) about 0.5 with a 1/f^a spectrum and exactly this channel covariance.

    With `crop` 2 they are corners of canvases twice as large, so that they do not wrap around.
    """
    channels = len(covariance)
    canvas = [crop * extent for extent in size]
    white = np.random.default_rng(0).normal(size=(channels, count, *canvas))
    grids = np.meshgrid(*(np.fft.fftfreq(extent) for extent in canvas), indexing="ij")
    frequency = np.sqrt(sum(grid**2 for grid in grids))
    frequency.flat[0] = np.inf
    axes = tuple(range(2, white.ndim))
    coloured = np.fft.ifftn(np.fft.fftn(white, axes=axes) * frequency**-exponent, axes=axes).real
    flat = coloured[(..., *(slice(extent) for extent in size))].reshape(channels, -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat = np.linalg.solve(np.linalg.cholesky(np.cov(flat, bias=True).reshape(channels, channels)), flat)
    mixed = (np.linalg.cholesky(covariance) @ flat).reshape(channels, count, *size)
    return 0.5 + np.moveaxis(mixed, 0, 1).clip(-0.5, 0.5)


def test_given_numbers_are_taken() -> None:
    assert given_statistics(3, None, None) is None
    assert given_statistics(3, [0.5], [0.25]) == InputStatistics((0.5,) * 3, (0.25,) * 3)
    assert given_statistics(2, 0, 1) == InputStatistics((0.0, 0.0), (1.0, 1.0))
    assert given_statistics(2, (0.1, 0.2), [1, 2]) == InputStatistics((0.1, 0.2), (1.0, 2.0))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.5], None, "--mean and --std belong together"),
        (None, [0.5], "--mean and --std belong together"),
        ([0.5, 0.5], [1], "--mean takes one number or 3"),
        ([0.5], [], "--std takes one number or 3"),
        ([0.5], [1, 0, 1], "--std must be positive"),
        ([0.5], -1, "--std must be positive"),
        (math.nan, 1, "--mean must be finite"),
        (0, [1, 1, math.inf], "--std must be finite"),
        (["grey"], [1], "--mean takes numbers"),
    ],
)
def test_bad_numbers_are_refused_in_one_line(mean: object, std: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        given_statistics(3, mean, std)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_statistics_are_plain_data() -> None:
    measured = measure_statistics(_images(1.0, COVARIANCE, (16, 16)))
    assert hash(measured) == hash(measure_statistics(_images(1.0, COVARIANCE, (16, 16))))
    again = json.loads(json.dumps(asdict(measured)))
    assert again["mean"] == list(measured.mean)
    assert again["covariance"] == [list(row) for row in measured.covariance or ()]


def test_statistics_survive_json_damaged_are_refused() -> None:
    assert stored_statistics(None, 3) is None
    known = InputStatistics((0.5, 0.4), (0.2, 0.3), ((1.0, 0.1), (0.1, 1.0)), 0.9)
    stored = json.loads(json.dumps(asdict(known)))
    assert stored_statistics(stored, len(known.mean)) == known
    for name, value in (("mean", None), ("std", ["wide", 1]), ("covariance", [1, 2]), ("exponent", "steep")):
        with pytest.raises(UserError, match=r"run\.json is damaged: at "):
            stored_statistics({**stored, name: value}, len(known.mean))
    for wrong in (
        [],
        {**stored, "mean": []},
        {**stored, "std": [0.0, 1.0]},
        {**stored, "covariance": [[1.0]]},
    ):
        with pytest.raises(UserError, match="is damaged"):
            stored_statistics(wrong, 2)


def test_mean_std_and_covariance_are_measured_back() -> None:
    images = _images(1.0, COVARIANCE, (24, 20))
    measured = measure_statistics(images)
    deviation = np.sqrt(np.diag(COVARIANCE))
    # Only the few pixels clipped to [0, 1] part them.
    np.testing.assert_allclose(measured.mean, 0.5, atol=1e-4)
    np.testing.assert_allclose(measured.std, deviation, rtol=1e-3)
    expected = COVARIANCE / np.outer(deviation, deviation)
    np.testing.assert_allclose(measured.covariance, expected, atol=2e-3)

    normalised = measure_statistics(images, mean=[0.4, 0.5, 0.6], std=[0.1, 0.2, 0.5])
    assert normalised.mean == (0.4, 0.5, 0.6)
    assert normalised.std == (0.1, 0.2, 0.5)
    expected = COVARIANCE / np.outer([0.1, 0.2, 0.5], [0.1, 0.2, 0.5])
    np.testing.assert_allclose(normalised.covariance, expected, rtol=2e-2, atol=1e-3)
    assert normalised.exponent is not None


@pytest.mark.parametrize("size", [(256,), (64, 64), (48, 80), (24, 24, 24)])
@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_the_exponent_is_measured_back(exponent: float, size: tuple[int, ...]) -> None:
    images = _images(exponent, np.diag([0.01, 0.004]), size)
    assert measure_statistics(images).exponent == pytest.approx(exponent, abs=TOLERANCE)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize("exponent", [0.4, 0.6, 1.0])
def test_separable_spectra_are_known_from_round_ones(exponent: float, size: tuple[int, int]) -> None:
    white = torch.randn(32, 1, *size, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics((0.5,), (0.25,), None, exponent, separable=True)
    images = make_prior("natural", 1, size, statistics=statistics).colour(white)
    measured = measure_own_units(images)
    assert measured.separable
    assert measured.exponent == pytest.approx(exponent, abs=TOLERANCE)
    assert not measure_own_units(make_prior("natural", 1, size).colour(white)).separable


def test_photographs_are_no_spectrograms() -> None:
    photographs = np.stack([sklearn.datasets.load_sample_image(name) for name in ("china.jpg", "flower.jpg")])
    crops = [
        photographs[:, top : top + 96, left : left + 96] for top in (0, 150, 300) for left in (0, 250, 500)
    ]
    assert not measure_statistics(np.moveaxis(np.concatenate(crops), 3, 1)).separable


def test_tones_and_clicks_make_spectrograms() -> None:
    random = torch.Generator().manual_seed(0)
    times = torch.arange(8000) / 8000
    pictures = []
    for _ in range(32):
        sound = 0.02 * torch.randn(8000, generator=random)
        for start, pitch in zip(
            torch.rand(5, generator=random), torch.rand(5, generator=random), strict=True
        ):
            there = (times >= start) & (times < start + 0.2)
            sound += there * sum(
                torch.sin(2 * math.pi * k * (80 + 400 * pitch) * times) / k for k in range(1, 8)
            )
        levels = torch.stft(sound, 256, 120, window=torch.hann_window(256), return_complex=True).abs()
        pictures.append((levels + 1e-3).log()[None, :64, :64])
    assert measure_own_units(torch.stack(pictures)).separable


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_borders_do_not_tilt_the_exponent(exponent: float) -> None:
    images = _images(exponent, np.diag([0.01]), (48, 48), crop=2)
    assert measure_statistics(images).exponent == pytest.approx(exponent, abs=TOLERANCE)


def test_the_exponent_is_kept_in_range() -> None:
    rng = np.random.default_rng(0)
    assert measure_statistics(rng.random((8, 1, 32, 32))).exponent == 0.5
    ramps = np.linspace(0, 1, 32) * rng.random((8, 1, 1, 1)) * np.ones((32, 1))
    assert measure_statistics(ramps).exponent == 1.5


def test_bytes_tensors_and_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = (_images(1.0, COVARIANCE, (16, 16)) * 255).astype(np.uint8)
    expected = measure_statistics(stored)
    assert measure_statistics(torch.from_numpy(stored)) == expected
    monkeypatch.setattr("prune_viz.network.inputs._BATCH_VALUES", 5 * 3 * 16 * 16)
    for images in (stored, stored / 255, torch.from_numpy(stored / 255).float()):
        measured = measure_statistics(images)
        for name in ("mean", "std", "covariance", "exponent"):
            np.testing.assert_allclose(getattr(measured, name), getattr(expected, name), rtol=1e-5)


def test_flat_channels_and_few_images() -> None:
    images = _images(1.0, COVARIANCE, (16, 16))
    images[:, 1] = 0.3
    measured = measure_statistics(images)
    assert measured.mean[1] == pytest.approx(0.3)
    assert measured.std[1] == 1
    assert np.asarray(measured.covariance)[1] == pytest.approx(np.zeros(3), abs=1e-6)
    assert measured.exponent is not None

    few = measure_statistics(images[:7])
    assert few.covariance is not None
    assert few.exponent is None
    assert measure_statistics(images[..., :11]).exponent is None

    shades = np.broadcast_to(np.linspace(0, 1, 9).reshape(9, 1, 1, 1), (9, 1, 16, 16))
    each_constant = measure_statistics(shades)
    assert each_constant.covariance == pytest.approx(np.ones((1, 1)))
    assert each_constant.exponent is None
    for shade in (0.0, 0.3, 1.0):
        assert measure_statistics(np.full((9, 2, 16, 16), shade)) == InputStatistics(
            (pytest.approx(shade),) * 2, (1.0, 1.0), None, None
        )


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 8)),
        np.zeros((2, 1, 4, 4, 4, 4)),
        np.zeros((0, 3, 8, 8)),
        np.zeros((2, 3, 8, 8), dtype=np.int64),
        np.full((2, 3, 8, 8), 3.0),
        np.full((2, 3, 8, 8), np.nan),
        np.full((2, 3, 8, 8), -1.0),
    ],
)
def test_unsuitable_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"images must|pixels must"):
        measure_statistics(images)
    with pytest.raises(UserError, match="--mean and --std"):
        measure_statistics(np.zeros((2, 3, 8, 8)), mean=[0.5])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_inputs_of_any_range_are_measured_and_stored(scale: float) -> None:
    inputs = scale * (3 + torch.randn(40, 2, 24, 24, generator=torch.Generator().manual_seed(0)))
    found = measure_own_units(inputs)
    np.testing.assert_allclose(np.sqrt(np.diagonal(found.covariance)), scale, rtol=0.02)
    shown = inputs * torch.tensor(found.std).view(2, 1, 1) + torch.tensor(found.mean).view(2, 1, 1)
    assert float(shown.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shown.std()) == pytest.approx(0.25, abs=0.01)
    assert stored_statistics(json.loads(json.dumps(asdict(found))), 2) == found

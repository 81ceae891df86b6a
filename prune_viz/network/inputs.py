"""What is known of a model's inputs: how pixels are normalised and how natural ones vary.

It is given by the user, measured on example inputs, or both. `prune_viz.feature_visualization.priors` takes
from it which inputs are likely, `prune_viz.feature_visualization.rendering` which colours they have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_viz.utils.errors import UserError
from prune_viz.utils.json_files import convert_json

EXPONENTS = (0.5, 1.5)  # photographs have 0.8 to 1.2
SEPARABLE_EXPONENTS = (0.2, 1.5)
_CLEARLY = 0.7  # how much better a separable spectrum must fit; of photographs and digits it fits far worse
HIGHEST_FREQUENCY = 0.35  # cycles a pixel; above it scaling and compression bend the spectrum
FEWEST_IMAGES = 8
SMALLEST_SIDE = 12  # leaves three frequencies below the highest
_FLAT = 1e-12  # variance of pixels in [0, 1] that is rounding alone
_BATCH_VALUES = 2**21
_LARGEST_STATISTIC = 1e30


@dataclass(frozen=True)
class InputStatistics:
    """How a model's inputs are made and how natural ones vary. Input = (pixel - mean) / std.

    Attributes
    ----------
    mean, std : tuple of float, length C
        The normalisation of each channel, for pixels in [0, 1]; std is positive.
    covariance : tuple of tuples of float, shape (C, C), or None
        Covariance of the channels over natural inputs, in the model's own (normalised) units; None if
        unknown.
    exponent : float or None
        The slope a of the amplitude spectrum ``1/f^a`` of natural inputs; None if unknown.
    separable : bool
        Whether the spectrum is a product of such slopes, one along each axis, and not alike in all
        directions. Spectrograms are so: tones hardly vary along time, and clicks hardly along frequency
        (Singh and Theunissen 2003, "Modulation spectra of natural sounds and ethological theories of
        auditory processing").
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] | None = None
    exponent: float | None = None
    separable: bool = False


def as_spectrograms(statistics: InputStatistics | None, shape: Sequence[int]) -> InputStatistics:
    """The same for inputs that are spectrograms, of shape (C, frequencies, times).

    What is not known of the normalisation is taken to be a mean of 0 and a variance of 1.

    Raises
    ------
    UserError
        If inputs of that shape are not of two axes.
    """
    if len(shape) != 3:
        raise UserError("--prior spectrogram is for inputs of two axes, frequency and time")
    if statistics is None:
        channels = shape[0]
        statistics = InputStatistics((0.5,) * channels, (0.25,) * channels)  # two deviations are 0 and 1
    return statistics if statistics.separable else replace(statistics, exponent=None, separable=True)


def describe_inputs(
    channels: int,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    images: Tensor | np.ndarray | None = None,
) -> InputStatistics | None:
    """What is known of a model's inputs: measured where there are images, else as given, else nothing.

    The parameters are those of `given_statistics` and `measure_statistics`, and so are the errors.
    """
    return given_statistics(channels, mean, std) if images is None else measure_statistics(images, mean, std)


def stored_statistics(stored: Any, channels: int) -> InputStatistics | None:
    """Statistics of inputs of so many channels as `run.json` holds them; None for none.

    Raises
    ------
    UserError
        If they are not what a run writes.
    """
    if stored is None:
        return None
    found = convert_json(stored, InputStatistics, "run.json")
    rows = found.covariance or ()
    numbers = [*found.mean, *found.std, *(number for row in rows for number in row), found.exponent or 1.0]
    fits = len(found.mean) == len(found.std) == channels and min(found.std, default=0) > 0
    fits = fits and (found.covariance is None or [len(row) for row in rows] == [channels] * channels)
    if not fits or not all(abs(number) <= _LARGEST_STATISTIC for number in numbers):
        raise UserError(
            "run.json is damaged: at inputs: not statistics of the model's inputs; run analyze again"
        )
    return found


def given_statistics(
    channels: int, mean: float | Sequence[float] | None, std: float | Sequence[float] | None
) -> InputStatistics | None:
    """Statistics from the normalisation that the user gave.

    Parameters
    ----------
    channels : int
        Channels of the input.
    mean, std : float or sequence of float, optional
        A number a channel, or one for all.

    Returns
    -------
    InputStatistics or None
        None if neither is given.

    Raises
    ------
    UserError
        If only one is given, there are not as many numbers as channels, one is not finite or a std is
        not positive.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UserError("--mean and --std belong together; give both")
    statistics = InputStatistics(_numbers("--mean", mean, channels), _numbers("--std", std, channels))
    if min(statistics.std) <= 0:
        raise UserError(f"--std must be positive, not {min(statistics.std):g}")
    return statistics


def _numbers(option: str, given: float | Sequence[float], channels: int) -> tuple[float, ...]:
    """One finite number a channel, or `UserError`."""
    try:
        numbers = np.asarray(given, dtype=float).ravel().tolist()
    except (TypeError, ValueError):
        raise UserError(f"{option} takes numbers, not {given!r}") from None
    if len(numbers) not in (1, channels):
        raise UserError(f"{option} takes one number or {channels}, one a channel; {len(numbers)} were given")
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{option} must be finite, not {given!r}")
    return tuple(numbers * channels if len(numbers) == 1 else numbers)


def measure_statistics(
    images: Tensor | np.ndarray,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputStatistics:
    """Measure how natural inputs vary.

    Parameters
    ----------
    images : Tensor or ndarray, shape (N, C, *size)
        Pixels: floats in [0, 1], or uint8, which is divided by 255. One to three spatial axes.
    mean, std : float or sequence of float, optional
        The model's normalisation; that of the images by default.

    Returns
    -------
    InputStatistics
        A channel without variation has std 1 unless one was given. The covariance is None where no
        channel varies. The exponent is None where it cannot be measured: fewer than `FEWEST_IMAGES`, no
        variation within images, or a side below `SMALLEST_SIDE`.

    Raises
    ------
    UserError
        If the images are none, of another shape or out of range, or mean and std are refused by
        `given_statistics`.
    """
    pixels = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if not 3 <= pixels.ndim <= 5 or pixels.size == 0:
        raise UserError(f"images must be at least one, of shape (N, C, *size), not {pixels.shape}")
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise UserError(f"pixels must be floats in [0, 1] or uint8, not {pixels.dtype}")
    count, channels, *size = pixels.shape
    known = given_statistics(channels, mean, std)
    total = np.zeros(channels)
    second = np.zeros((channels, channels))
    power = np.zeros((channels, *size[:-1], size[-1] // 2 + 1))
    window = _hann(size)
    axes = tuple(range(2, pixels.ndim))
    step = max(1, _BATCH_VALUES // math.prod(pixels.shape[1:]))
    for start in range(0, count, step):
        batch = pixels[start : start + step].astype(np.float64)
        if pixels.dtype == np.uint8:
            batch /= 255
        elif not (batch.min() >= -1e-3 and batch.max() <= 1 + 1e-3):  # NaN fails as well
            raise UserError("pixels must be floats in [0, 1] or uint8")
        flat = np.moveaxis(batch, 1, 0).reshape(channels, -1)
        total += flat.sum(axis=1)
        second += flat @ flat.T
        batch -= batch.mean(axis=axes, keepdims=True)
        power += (np.abs(np.fft.rfftn(batch * window, axes=axes)) ** 2).sum(axis=0)
    samples = count * math.prod(size)
    centre = total / samples
    covariance = second / samples - np.outer(centre, centre)
    variance = covariance.diagonal()
    varies_within = count >= FEWEST_IMAGES and power.sum() > _FLAT * count * math.prod(size) ** 2
    if known is None:
        deviation = np.sqrt(np.where(variance > _FLAT, variance, 1))
        known = InputStatistics(tuple(centre.tolist()), tuple(deviation.tolist()))
    scale = np.array(known.std)
    covariance = covariance / np.outer(scale, scale)
    power = power / (scale**2).reshape(-1, *[1] * len(size))
    exponent, separable = _slope(power.sum(axis=0), size) if varies_within else (None, False)
    return InputStatistics(
        known.mean,
        known.std,
        tuple(tuple(row) for row in covariance.tolist()) if variance.max() > _FLAT else None,
        exponent,
        separable,
    )


def measure_own_units(
    inputs: Tensor,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputStatistics:
    """Measure how natural inputs vary that are in the model's own units.

    Parameters
    ----------
    inputs : Tensor of float, shape (N, C, *size)
        Example inputs, of any range.
    mean, std : float or sequence of float, optional
        The model's normalisation, of pixels in 0..1.

    Returns
    -------
    InputStatistics
        As `measure_statistics`. Where no normalisation was given, it is one that shows a channel's mean as
        mid grey, and two deviations about it as black and white.
    """
    flat = inputs.double().movedim(1, 0).flatten(1)
    low = flat.amin(dim=1)
    spread = (flat.amax(dim=1) - low).clamp_min(1e-30)
    axes = (-1, *(1,) * (inputs.ndim - 2))
    # Brought to [0, 1], measured there, and taken back.
    pixels = ((inputs.double() - low.view(axes)) / spread.view(axes)).clamp(0, 1)
    to_own = -(low / spread), 1 / spread  # mean and deviation by which pixels become inputs again
    measured = measure_statistics(pixels, to_own[0].tolist(), to_own[1].tolist())
    known = given_statistics(inputs.shape[1], mean, std)
    if known is None:
        deviation = flat.std(dim=1, correction=0)
        shown = 1 / (4 * torch.where(deviation > 1e-9, deviation, 1.0))
        known = InputStatistics(tuple((0.5 - flat.mean(dim=1) * shown).tolist()), tuple(shown.tolist()))
    return replace(
        known, covariance=measured.covariance, exponent=measured.exponent, separable=measured.separable
    )


def _hann(size: Sequence[int]) -> np.ndarray:
    """Hann window over every axis, whose borders are zero so that they do not tilt the spectrum."""
    window = np.ones(())
    for extent in size:
        window = window[..., None] * np.sin(np.pi * np.arange(extent) / extent) ** 2
    return window


def _slope(power: np.ndarray, size: Sequence[int]) -> tuple[float | None, bool]:
    """The exponent a that fits a power spectrum at the frequencies of a real FFT, and if it is separable.

    Alike in all directions it is ``1/f^(2a)``, of two axes and separable ``1/(f1 f2)^(2a)``.
    """
    shortest = min(size)
    if shortest < SMALLEST_SIDE:
        return None, False
    grids = [*(np.abs(np.fft.fftfreq(extent)) for extent in size[:-1]), np.fft.rfftfreq(size[-1])]
    along = np.meshgrid(*grids, indexing="ij")
    frequency = np.sqrt(sum(grid**2 for grid in along))
    # From the second frequency on, since the window spreads the constant over the first.
    used = (frequency >= 2 / shortest - 1e-9) & (frequency <= HIGHEST_FREQUENCY)
    smallest = np.finfo(float).tiny
    if len(size) == 2:
        amplitudes = 0.5 * np.log(np.maximum(power[used], smallest))
        product = np.prod([np.maximum(grid, 1 / extent) for grid, extent in zip(along, size, strict=True)], 0)
        slope, left = _line(np.log(product[used]), amplitudes)
        if left < _CLEARLY * _line(np.log(frequency[used]), amplitudes)[1]:
            return float(np.clip(-slope, *SEPARABLE_EXPONENTS)), True
    rings = np.rint(frequency[used] * shortest).astype(int)
    members = np.bincount(rings)
    there = members > 0
    levels = np.bincount(rings, power[used])[there] / members[there]
    places = np.bincount(rings, np.log(frequency[used]))[there] / members[there]
    slope, _ = _line(places, 0.5 * np.log(np.maximum(levels, smallest)))
    return float(np.clip(-slope, *EXPONENTS)), False


def _line(places: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Slope of the straight line through points, and the variance that it leaves."""
    slope, start = np.polyfit(places, values, 1)
    return float(slope), float(np.var(values - start - slope * places))

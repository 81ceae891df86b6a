"""What is known of a model's inputs: how pixels are normalised and how natural ones vary.

It is given by the user, measured on example inputs, or both. `prune_viz.feature_visualization.priors` takes
from it which inputs are likely, `prune_viz.feature_visualization.rendering` which colours they have.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prune_viz.utils.errors import UserError
from prune_viz.utils.json_files import convert_json

EXPONENTS = (0.5, 1.5)  # photographs have 0.8 to 1.2
HIGHEST_FREQUENCY = 0.35  # cycles a pixel; above it scaling and compression bend the spectrum
FEWEST_IMAGES = 8
SMALLEST_SIDE = 12  # leaves three frequencies below the highest
_FLAT = 1e-12  # variance of pixels in [0, 1] that is rounding alone
_BATCH_VALUES = 2**21
_LARGEST_STATISTIC = 1e9
# Only these are decoded: some of Pillow's other formats start programs or read further files.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


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
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] | None = None
    exponent: float | None = None


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
    return InputStatistics(
        known.mean,
        known.std,
        tuple(tuple(row) for row in covariance.tolist()) if variance.max() > _FLAT else None,
        _slope(power.sum(axis=0), size) if varies_within else None,
    )


def _hann(size: Sequence[int]) -> np.ndarray:
    """Hann window over every axis, whose borders are zero so that they do not tilt the spectrum."""
    window = np.ones(())
    for extent in size:
        window = window[..., None] * np.sin(np.pi * np.arange(extent) / extent) ** 2
    return window


def _slope(power: np.ndarray, size: Sequence[int]) -> float | None:
    """The exponent a that fits a power spectrum ``1/f^(2a)`` at the frequencies of a real FFT."""
    shortest = min(size)
    if shortest < SMALLEST_SIDE:
        return None
    grids = [*(np.fft.fftfreq(extent) for extent in size[:-1]), np.fft.rfftfreq(size[-1])]
    frequency = np.sqrt(sum(grid**2 for grid in np.meshgrid(*grids, indexing="ij")))
    # From the second frequency on, since the window spreads the constant over the first.
    used = (frequency >= 2 / shortest - 1e-9) & (frequency <= HIGHEST_FREQUENCY)
    rings = np.rint(frequency[used] * shortest).astype(int)
    members = np.bincount(rings)
    there = members > 0
    levels = np.bincount(rings, power[used])[there] / members[there]
    places = np.bincount(rings, np.log(frequency[used]))[there] / members[there]
    amplitudes = 0.5 * np.log(np.maximum(levels, np.finfo(float).tiny))
    slope = np.polyfit(places, amplitudes, 1)[0]
    return float(np.clip(-slope, *EXPONENTS))


def read_inputs(
    input_shape: tuple[int, ...],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    data: str | Path | None,
    out: str | Path | None,
) -> tuple[InputStatistics | None, Tensor | None, list[str]]:
    """What is known of an analysis's inputs, example inputs, and a note on those that could not be read.

    Parameters
    ----------
    input_shape : tuple of int
        (C, *size).
    mean, std : float or sequence of float, optional
        The normalisation.
    data : path, optional
        A folder of example inputs.
    out : path, optional
        The run directory, which may not lie in `data`.

    Returns
    -------
    statistics : InputStatistics or None
    examples : Tensor or None, shape (N, C, *size)
        In the model's own input units; None without `data`.
    notes : list of str

    Raises
    ------
    UserError
        If `out` lies in `data`, or what is given does not fit.
    """
    if data is None:
        return describe_inputs(input_shape[0], mean, std), None, []
    if out is not None and Path(out).resolve().is_relative_to(Path(data).resolve()):
        raise UserError(
            f"--data: the run directory {out} lies in {data}, so its pictures would be read; move --out"
        )
    images, skipped = read_images(Path(data), input_shape)
    notes = [f"{skipped} files of the example inputs could not be read and were left out."] if skipped else []
    statistics = measure_statistics(images, mean, std)
    return statistics, normalise(images, statistics), notes


def normalise(images: Tensor, statistics: InputStatistics) -> Tensor:
    """Bring pixels, uint8 of shape (N, C, *size), to the model's own input units."""
    mean, std = (
        torch.tensor(numbers).view(-1, *[1] * (images.ndim - 2))
        for numbers in (statistics.mean, statistics.std)
    )
    return (images.float() / 255 - mean) / std


def read_images(folder: Path, input_shape: Sequence[int], limit: int = 512) -> tuple[Tensor, int]:
    """Read example inputs from a folder and the folders in it.

    Inputs of one or three channels and two axes are read from pictures, grey or RGB, scaled and cropped
    about their centre to the input's size. Inputs of any other kind are read from ``.npy`` arrays of
    shape (C, *size), uint8 or floats in [0, 1], cropped about their centre.

    Parameters
    ----------
    folder : Path
        Where they are.
    input_shape : sequence of int
        (C, *size).
    limit : int
        How many files to read at most; of more, as many evenly spaced ones in the order of their names.

    Returns
    -------
    images : Tensor of uint8, shape (N, C, *size)
    skipped : int
        How many files were passed over: broken, too large to decode safely, arrays of another shape or
        range or smaller than the input, links that lead outside the folder.

    Raises
    ------
    UserError
        If there is no such folder or no usable file in it.
    """
    shape = tuple(input_shape)
    pictures = shape[0] in (1, 3) and len(shape) == 3
    suffixes = _SUFFIXES if pictures else {".npy"}
    root = Path(folder).resolve()
    if not root.is_dir():
        raise UserError(f"--data: there is no folder {folder}")
    paths = [Path(place, name) for place, _, names in os.walk(root) for name in names]
    paths = sorted((path for path in paths if path.suffix.lower() in suffixes), key=Path.as_posix)
    if len(paths) > limit:
        paths = [paths[rank * len(paths) // limit] for rank in range(limit)]
    images = []
    for path in paths:
        try:
            if not (path.is_file() and path.resolve().is_relative_to(root)):
                continue
            images.append(_read_picture(path, shape) if pictures else _read_array(path, shape))
        except Exception:  # noqa: S112  (what a broken file raises depends on its format)
            continue
    if not images:
        kind = "picture" if pictures else f".npy array of shape {shape} or larger, with values in [0, 1],"
        raise UserError(f"--data: no {kind} in {folder} can be read ({len(paths)} tried)")
    return torch.from_numpy(np.stack(images)), len(paths) - len(images)


def _read_picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels of a picture, uint8, shape (C, H, W); raises whatever Pillow does."""
    channels, height, width = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as opened:
            opened.draft(None, (2 * width, 2 * height))  # decodes a large JPEG at a fraction of its size
            picture: Image.Image = opened
            if picture.mode.startswith("I;16"):  # Pillow would clip these at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode in ("I", "F"):
                raise ValueError("pixels of unknown range")
            picture = picture.convert("L" if channels == 1 else "RGB")
    fitted = np.asarray(ImageOps.fit(picture, (width, height)))
    return fitted.reshape(height, width, channels).transpose(2, 0, 1)


def _read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels of an array about its centre, uint8, of `shape`; raises ValueError if it does not suit."""
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if stored.ndim != len(shape) or stored.shape[0] != shape[0]:
        raise ValueError("another shape")
    spare = [have - wanted for have, wanted in zip(stored.shape, shape, strict=True)]
    if min(spare) < 0:
        raise ValueError("smaller than the input")
    crop = tuple(slice(extra // 2, extra // 2 + wanted) for extra, wanted in zip(spare, shape, strict=True))
    array: np.ndarray = np.array(stored[crop])  # a copy, so that the file is closed
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise ValueError("values outside [0, 1]")
    return (array * 255 + 0.5).astype(np.uint8)

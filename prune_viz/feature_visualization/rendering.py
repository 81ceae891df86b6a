"""Drawing stimuli as pictures: the one rule by which inputs of any kind become colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from prune_viz.utils.array_files import batches_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prune_viz.network.inputs import InputStatistics

GREY = 128
_BATCH = 64
_PAPER = (243, 240, 234)
_INK = (38, 56, 62)


def stretch(values: np.ndarray, statistics: InputStatistics | None = None) -> np.ndarray:
    """Stretch each stimulus around its ground: ``ground + 0.5 clip(x / q, -1, 1)``.

    Parameters
    ----------
    values : ndarray, shape (F, ...), with statistics (F, C, ...)
        Stimuli in input units, about zero mean.
    statistics : InputStatistics, optional
        The normalisation of the C channels. With it x is taken to pixels, ``std * x``, and stretched by
        one gain for all channels, so that hues are true. The ground, where x is 0, is mid-grey tinted
        as the mean pixel is: ``0.5 + mean - average of mean over the channels``.

    Returns
    -------
    ndarray of float32, shape (F, ...)
        In [0, 1]. `q` is the 99.5th percentile of ``|x|`` of each stimulus, in pixels if these are
        known; a flat one is all ground. The ground is mid-grey without statistics and for one channel.
    """
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    ground: np.ndarray = np.array(0.5, dtype=np.float32)
    if statistics is not None:
        finite = _as_pixels(finite, statistics)
        ground = 0.5 + _by_channel(statistics.mean, values.ndim) - np.float32(np.mean(statistics.mean))
    flat = np.abs(finite).reshape(len(finite), -1)
    rank = min(flat.shape[1] - 1, math.ceil(0.995 * flat.shape[1]) - 1)
    q = np.partition(flat, rank, axis=1)[:, rank]
    q = np.where(q > 0, q, 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(np.clip(ground + 0.5 * np.clip(finite / q, -1, 1), 0, 1), dtype=np.float32)


def _by_channel(numbers: tuple[float, ...], axes: int) -> np.ndarray:
    """A number a channel, float32, to meet an array (F, C, ...) of so many axes."""
    return np.array(numbers, dtype=np.float32).reshape(-1, *[1] * (axes - 2))


def _as_pixels(images: np.ndarray, statistics: InputStatistics | None) -> np.ndarray:
    """Take (F, C, ...) from input units to pixels, about zero, if these are known."""
    return images if statistics is None else images * _by_channel(statistics.std, images.ndim)


def colour_axes(images: np.ndarray, statistics: InputStatistics | None = None) -> np.ndarray | None:
    """Directions in channel space that a layer's stimuli are drawn along.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)
    statistics : InputStatistics, optional
        The normalisation of the C channels, from which the directions are taken in pixels.

    Returns
    -------
    ndarray, shape (C, 3), or None
        None where the channels are drawn as they are: one (grey) or three (red, green, blue).
        Otherwise the first three principal components of all pixels of the layer (the third is zero
        for two channels), each with its largest entry positive.
    """
    channels = images.shape[1]
    if channels in (1, 3):
        return None
    second = np.zeros((channels, channels))
    for batch in batches_of(images, _BATCH):
        pixels = np.nan_to_num(batch.astype(np.float32), posinf=0.0, neginf=0.0)
        flat = np.moveaxis(_as_pixels(pixels, statistics), 1, 0).reshape(channels, -1)
        second += flat @ flat.T
    vectors = np.linalg.eigh(second)[1][:, ::-1][:, :3]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    vectors = vectors * np.where(largest < 0, -1, 1)
    return np.pad(vectors, ((0, 0), (0, 3 - vectors.shape[1])))


def draw_pictures(
    images: np.ndarray, side: int, axes: np.ndarray | None, statistics: InputStatistics | None = None
) -> np.ndarray:
    """Draw stimuli as square colour tiles.

    Two-dimensional stimuli keep their aspect on a grey ground; of three-dimensional ones the middle
    slice is drawn; a signal of one channel is drawn as a curve, of more as a strip a channel.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)
        One to three spatial axes.
    side : int
        Side of a tile in pixels.
    axes : ndarray, shape (C, 3), or None
        From `colour_axes`, of the same statistics.
    statistics : InputStatistics, optional
        The normalisation of the C channels: draws three of them, taken to be red, green and blue, in
        their true colours (`stretch`), and weighs more by what they are in pixels. Signals have no
        colours and are drawn as without.

    Returns
    -------
    ndarray of uint8, shape (F, side, side, 3)
    """
    spatial = images.ndim - 2
    if spatial == 3:
        images = images[:, :, images.shape[2] // 2]
    if spatial == 1:
        unit = stretch(images)
        draw = _curve if images.shape[1] == 1 else _strip
        return np.stack([draw(one, side) for one in unit])
    if axes is not None:
        images = np.einsum("fchw,cd->fdhw", _as_pixels(images.astype(np.float32), statistics), axes)
        statistics = None
    pixels = (stretch(images, statistics) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if pixels.shape[1:3] == (side, side):
        return pixels
    return np.stack([_fitted(one, side) for one in pixels])


def draw_inputs(images: np.ndarray, side: int, statistics: InputStatistics | None) -> np.ndarray:
    """Draw inputs that are pictures with the pixels that they had.

    Parameters
    ----------
    images : ndarray, shape (N, C, H, W)
        In the model's own input units.
    side : int
        Side of a tile in pixels.
    statistics : InputStatistics or None
        The normalisation. Without it, and for other than one or three channels, `draw_pictures` draws.

    Returns
    -------
    ndarray of uint8, shape (N, side, side, 3)
    """
    if statistics is None or images.shape[1] not in (1, 3):
        return draw_pictures(images, side, colour_axes(images, statistics), statistics)
    pixels = _as_pixels(images, statistics) + _by_channel(statistics.mean, images.ndim)
    levels = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.stack([_fitted(np.broadcast_to(one, (*one.shape[:2], 3)), side) for one in levels])


def _fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scale (H, W, 3) to fit a square; small canvases keep their pixels visible."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (side, side), (GREY,) * 3)
    tile.paste(
        Image.fromarray(pixels).resize(fitted, method), ((side - fitted[0]) // 2, (side - fitted[1]) // 2)
    )
    return np.asarray(tile)


def _curve(signal: np.ndarray, side: int) -> np.ndarray:
    """Draw (1, L) in [0, 1] as a curve."""
    over = 3 * side
    x = np.linspace(0.04 * over, 0.96 * over, signal.shape[1])
    y = (0.92 - 0.84 * signal[0]) * over
    tile = Image.new("RGB", (over, over), _PAPER)
    draw = ImageDraw.Draw(tile)
    draw.line([(0, over // 2), (over, over // 2)], fill=(214, 209, 200), width=3)
    draw.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=_INK, width=6, joint="curve")
    return np.asarray(tile.resize((side, side), Image.Resampling.BOX))


def _strip(signal: np.ndarray, side: int) -> np.ndarray:
    """Draw (C, L) in [0, 1] as grey levels, a strip a channel."""
    grey = Image.fromarray((signal * 255 + 0.5).astype(np.uint8))
    return np.asarray(grey.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))


def plot_pictures(
    images: np.ndarray, titles: Sequence[str], columns: int, statistics: InputStatistics | None
) -> Figure:
    """Draw inputs, shape (N, C, *size), as a matplotlib figure, `columns` to a row, each under its title."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.4 * columns, 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    side = 96 if images.ndim == 3 else max(96, *images.shape[-2:])
    drawn = draw_pictures(images, side, colour_axes(images, statistics), statistics)
    for axis, title, picture in zip(axes, titles, drawn, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
    return figure

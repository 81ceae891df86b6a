"""Pictures: stimuli as tiles, a layer's tiles on sheets, the response matrix in cluster order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GREY = 128
MAX_SIDE = 8192  # browsers and their graphics hardware decode no larger picture reliably
_BATCH = 64
_CHUNK = 100
_QUALITIES = (82, 65, 45)  # tried in turn
_BYTES_A_TILE = 5000  # 21,008 filters stay near 100 MB
_PAPER = (243, 240, 234)
_INK = (38, 56, 62)
_RAMP = (38, 140, 132)


@dataclass(frozen=True)
class Grid:
    """How the tiles of a sheet are laid out, row by row.

    Attributes
    ----------
    tiles : int
        Number of tiles, at least 1.
    side : int
        Side of a tile in pixels.
    columns, rows : int
        Tiles across and down.
    """

    tiles: int
    side: int
    columns: int
    rows: int

    def position(self, tile: int) -> tuple[float, float]:
        """CSS background position of a tile in percent, for a background of columns x rows tiles."""
        row, column = divmod(tile, self.columns)
        return (
            100 * column / (self.columns - 1) if self.columns > 1 else 0.0,
            100 * row / (self.rows - 1) if self.rows > 1 else 0.0,
        )


@dataclass(frozen=True)
class Sheet:
    """One picture file of many tiles.

    Attributes
    ----------
    file : str
        Its name.
    layout : Grid
        How its tiles lie.
    filters : tuple of int
        The filter that each tile shows, in the order of the tiles.
    """

    file: str
    layout: Grid
    filters: tuple[int, ...]


def grid(tiles: int, side: int, columns: int | None = None) -> Grid:
    """Lay out `tiles` in about a square, with smaller tiles where `MAX_SIDE` would be passed.

    `side` should be a multiple of 16, the blocks of JPEG, so that no stimulus smears into the next.
    """
    columns = columns or math.ceil(math.sqrt(tiles))
    rows = math.ceil(tiles / columns)
    return Grid(tiles, min(side, MAX_SIDE // max(columns, rows) // 8 * 8), columns, rows)


def sheets(slug: str, order: Sequence[int], canvas: Sequence[int]) -> list[Sheet]:
    """Plan a layer's sheets: at most a hundred filters each, in the order of the gallery.

    A page then decodes only the sheets that it shows at the time.
    """
    side = 96 if max(canvas) > 64 or len(canvas) == 1 else 64
    chunks = [tuple(order[begin : begin + _CHUNK]) for begin in range(0, len(order), _CHUNK)]
    return [Sheet(f"{slug}-{index}.jpg", grid(len(chunk), side), chunk) for index, chunk in enumerate(chunks)]


def thumbnails(slug: str, order: Sequence[int], shown: float) -> Sheet:
    """Plan the one sheet of small tiles for a layer's map, where they are `shown` CSS pixels wide.

    A tile must never be shown at less than half its size: without a graphics processor, Chromium
    decodes the whole sheet again for each tile that it shrinks so far.
    """
    side = int(np.clip(math.ceil(shown / 8) * 8, 24, 96))
    return Sheet(f"{slug}-map.jpg", grid(len(order), side), tuple(order))


def stretch(values: np.ndarray) -> np.ndarray:
    """Stretch each stimulus around grey: ``0.5 + 0.5 clip(x / q, -1, 1)``.

    Parameters
    ----------
    values : ndarray, shape (F, ...)
        Stimuli in input units, about zero mean.

    Returns
    -------
    ndarray of float32, shape (F, ...)
        In [0, 1]. `q` is the 99.5th percentile of ``|x|`` of each stimulus; a flat one is mid-grey.
    """
    finite = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    flat = np.abs(finite).reshape(len(finite), -1)
    rank = min(flat.shape[1] - 1, math.ceil(0.995 * flat.shape[1]) - 1)
    q = np.partition(flat, rank, axis=1)[:, rank]
    q = np.where(q > 0, q, 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(0.5 + 0.5 * np.clip(finite / q, -1, 1), dtype=np.float32)


def colour_axes(images: np.ndarray) -> np.ndarray | None:
    """Directions in channel space that a layer's stimuli are drawn along.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)

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
    for begin in range(0, len(images), _BATCH):
        pixels = np.nan_to_num(images[begin : begin + _BATCH].astype(np.float32), posinf=0.0, neginf=0.0)
        flat = np.moveaxis(pixels, 1, 0).reshape(channels, -1)
        second += flat @ flat.T
    vectors = np.linalg.eigh(second)[1][:, ::-1][:, :3]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    vectors = vectors * np.where(largest < 0, -1, 1)
    return np.pad(vectors, ((0, 0), (0, 3 - vectors.shape[1])))


def pictures(images: np.ndarray, side: int, axes: np.ndarray | None) -> np.ndarray:
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
        From `colour_axes`.

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
        images = np.einsum("fchw,cd->fdhw", images.astype(np.float32), axes)
    pixels = (stretch(images) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if pixels.shape[1:3] == (side, side):
        return pixels
    return np.stack([_fitted(one, side) for one in pixels])


def to_pixels(image: np.ndarray) -> np.ndarray:
    """Draw one stimulus of shape (C, *canvas) at its own size, as the report does.

    Returns
    -------
    ndarray of uint8, shape (side, side, 3)
        `side` is the longest of the spatial axes, 96 for a signal in time.
    """
    stimuli = image[None]
    side = 96 if image.ndim == 2 else max(image.shape[-2:])
    return np.asarray(pictures(stimuli, side, colour_axes(stimuli))[0])


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


def write_layer_sheets(folder: Path, images: np.ndarray, plan: Sequence[Sheet], small: Sheet) -> None:
    """Draw all stimuli of a layer, write them as planned, and the same in small as `small`."""
    axes = colour_axes(images)
    reduced: dict[int, np.ndarray] = {}
    for sheet in plan:
        tiles = pictures(images[list(sheet.filters)], sheet.layout.side, axes)
        write_sheet(folder / sheet.file, tiles, sheet.layout)
        for number, tile in zip(sheet.filters, tiles, strict=True):
            reduced[number] = _reduced(tile, small.layout.side)
    write_sheet(folder / small.file, [reduced[number] for number in small.filters], small.layout)


def _reduced(tile: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS))


def write_sheet(path: Path, tiles: Sequence[np.ndarray] | np.ndarray, layout: Grid) -> None:
    """Write drawn tiles, each uint8 (side, side, 3), as one JPEG.

    Noise, which compresses badly and shows it least, gets a lower quality.
    """
    sheet = Image.new("RGB", (layout.columns * layout.side, layout.rows * layout.side), (GREY,) * 3)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, layout.columns)
        sheet.paste(Image.fromarray(tile), (column * layout.side, row * layout.side))
    colour = "4:2:0" if layout.side % 16 == 0 else "4:4:4"  # whole blocks in every tile
    for quality in _QUALITIES:
        sheet.save(path, "JPEG", quality=quality, subsampling=colour, optimize=True)
        if path.stat().st_size <= _BYTES_A_TILE * layout.tiles:
            break


def write_response_matrix(path: Path, responses: np.ndarray, order: np.ndarray, limit: int = 640) -> None:
    """Write the cross-filter response matrix as a PNG, rows and columns in `order`.

    Each column is relative to its filter's strongest response (or to a hundredth of the usual one, so that
    the noise of silent filters stays blank). The ink is one colour whose opacity is
    the square root of that share, so that the picture reads on light and on dark pages.

    Parameters
    ----------
    path : Path
        File to write.
    responses : ndarray, shape (F, F)
        ``responses[i, j]``: norm of filter j's feature map on stimulus i.
    order : ndarray of int, shape (F,)
        Filters from left to right and from top to bottom.
    limit : int
        Largest side in pixels; a larger matrix is averaged over blocks.
    """
    matrix = np.nan_to_num(responses.astype(np.float32), posinf=0.0, neginf=0.0)[np.ix_(order, order)]
    peak = matrix.max(axis=0)
    matrix = matrix / np.maximum(np.maximum(peak, 0.01 * np.median(peak)), np.finfo(np.float32).tiny)
    if len(matrix) > limit:
        edges = np.linspace(0, len(matrix), limit, endpoint=False).astype(int)
        sizes = np.diff(np.append(edges, len(matrix)))
        blocks = np.add.reduceat(np.add.reduceat(matrix, edges, axis=0), edges, axis=1)
        matrix = blocks / np.outer(sizes, sizes)
    levels = (np.sqrt(np.clip(matrix, 0, 1)) * 63 + 0.5).astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.putpalette(list(_RAMP) * 64)
    picture.save(path, "PNG", optimize=True, transparency=bytes(level * 255 // 63 for level in range(64)))

"""Sheets: a layer's stimuli as tiles on a few pictures, and the response matrix in cluster order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from prune_viz.feature_visualization.rendering import GREY, colour_axes, draw_pictures
from prune_viz.network.inputs import InputStatistics

MAX_SIDE = 8192  # browsers and their graphics hardware decode no larger picture reliably
_CHUNK = 100
_QUALITIES = (82, 65, 45)  # tried in turn
_BYTES_A_TILE = 5000  # 21,008 filters stay near 100 MB
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


def write_layer_sheets(
    folder: Path,
    images: np.ndarray,
    plan: Sequence[Sheet],
    small: Sheet,
    statistics: InputStatistics | None,
) -> None:
    """Draw all stimuli of a layer, write them as planned, and the same in small as `small`."""
    axes = colour_axes(images, statistics)
    reduced: dict[int, np.ndarray] = {}
    for sheet in plan:
        tiles = draw_pictures(images[list(sheet.filters)], sheet.layout.side, axes, statistics)
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
    sheet = _composed(tiles, layout)
    colour = "4:2:0" if layout.side % 16 == 0 else "4:4:4"  # whole blocks in every tile
    for quality in _QUALITIES:
        sheet.save(path, "JPEG", quality=quality, subsampling=colour, optimize=True)
        if path.stat().st_size <= _BYTES_A_TILE * layout.tiles:
            break


def write_weights(path: Path, weights: np.ndarray, layout: Grid) -> None:
    """Write a first layer's weights, shape (F, C, *kernel), as one PNG with a tile a filter."""
    tiles = draw_pictures(weights, layout.side, colour_axes(weights))
    _composed(tiles, layout).save(path, "PNG", optimize=True)


def _composed(tiles: Sequence[np.ndarray] | np.ndarray, layout: Grid) -> Image.Image:
    sheet = Image.new("RGB", (layout.columns * layout.side, layout.rows * layout.side), (GREY,) * 3)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, layout.columns)
        sheet.paste(Image.fromarray(tile), (column * layout.side, row * layout.side))
    return sheet


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

"""Figures for papers: a layer's stimuli in cluster order, or the network's stimuli by depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prune_viz.feature_visualization.rendering import colour_axes, draw_pictures
from prune_viz.network.inputs import InputStatistics, stored_statistics
from prune_viz.network.layers import no_layer_message
from prune_viz.report.layer_pages import filter_card, gallery
from prune_viz.report.pages import depth_rows, layer_rows
from prune_viz.report.wording import label
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import LayerRecord
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import MARK, written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".svg", ".png", ".pdf")
_SIDE = 96  # pixels of a stimulus, at least
_INCHES = 0.62  # a stimulus takes
_COLUMNS = 16
_DPI = 300
_LABEL = 40  # characters of a layer's name
# Matplotlib's markers, by the shape of a verdict.
_MARKERS = {"ring": "o", "diamond": "D", "cross": "X", "square": "s"}


def write_figure(run: Path, layer: str | None, out: Path) -> str:
    """Draw a layer's stimuli, or those of the whole network by depth, into a file.

    Parameters
    ----------
    run : Path
        A complete run directory.
    layer : str or None
        The layer; None for the network.
    out : Path
        Where to write; its ending, one of `ENDINGS`, says in which format.

    Returns
    -------
    str
        For people: what was drawn.

    Raises
    ------
    UserError
        If the ending is of no such format, the run is not complete or has no such layer.
    """
    from matplotlib import rc_context

    if out.suffix not in ENDINGS:
        raise UserError(f"--out {out}: a figure ends in {', '.join(ENDINGS)}")
    directory = RunDirectory(run)
    records, table = directory.layers(), directory.read_filters()
    provenance = directory.read_provenance()
    statistics = stored_statistics(provenance.inputs, provenance.channels)
    if layer is None:
        figure, what = _by_depth(directory, records, table, statistics, provenance.channels)
    else:
        record = next((record for record in records if record.name == layer), None)
        if record is None:
            raise UserError(no_layer_message(layer, [record.name for record in records]))
        rows = table[table["layer"] == layer]
        figure, what = (
            _of_layer(directory, record, rows, statistics, provenance.channels),
            f"{len(rows)} stimuli of {layer}",
        )
    # Neither a date nor a chance name in it: the same run makes the same file.
    metadata = {
        ".svg": {"Date": None, "Creator": MARK},
        ".pdf": {"CreationDate": None, "Creator": MARK},
        ".png": {"Software": MARK},
    }[out.suffix]
    with (
        written_aside(out) as aside,
        rc_context({"svg.hashsalt": "prune-viz"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may hold what no font has
        figure.savefig(aside, format=out.suffix[1:], dpi=_DPI, metadata=metadata)
    return what


def _of_layer(
    run: RunDirectory,
    record: LayerRecord,
    rows: pd.DataFrame,
    statistics: InputStatistics | None,
    channels: int,
) -> Figure:
    """All stimuli of a layer, cluster by cluster, flagged ones marked."""
    every = [filter_card(entry) for entry in rows.sort_values("filter").to_dict("records")]
    cards = [card for cluster in gallery(every) for card in cluster.cards]
    images = run.read_layer_of(record, channels).images
    figure, axes = _grid(math.ceil(len(cards) / _COLUMNS), min(_COLUMNS, len(cards)))
    for axis, card in zip(axes, cards, strict=False):
        _show(axis, images, [card.number], statistics)
        axis.set_title(str(card.number), fontsize=5, pad=1.5)
        if card.verdict.flagged:
            colour, mark = card.verdict.look.colour, _MARKERS[card.verdict.look.shape]
            axis.plot(0.93, 0.93, mark, color=colour, ms=4, mec="white", mew=0.5, transform=axis.transAxes)
    return figure


def _by_depth(
    run: RunDirectory,
    records: Sequence[LayerRecord],
    table: pd.DataFrame,
    statistics: InputStatistics | None,
    channels: int,
) -> tuple[Figure, str]:
    """Telling stimuli of some layers, a row a layer, from the first to the last."""
    rows = depth_rows(layer_rows(records, table), table)
    columns = max(len(row.tiles) for row in rows)
    figure, axes = _grid(len(rows), columns)
    for place, row in enumerate(rows):
        images = run.read_layer_of(row.row.record, channels).images
        for axis, tile in zip(axes[place * columns :], row.tiles, strict=False):
            _show(axis, images, [tile.filter], statistics)
        axes[place * columns].text(
            -0.08, 0.5, label(row.row.record.name, _LABEL), fontsize=6, family="monospace", parse_math=False,
            ha="right", va="center", transform=axes[place * columns].transAxes,
        )  # fmt: skip
    return figure, f"stimuli of {len(rows)} layers by depth"


def _grid(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figure = Figure(figsize=(columns * _INCHES, rows * (_INCHES + 0.09)), layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, images: np.ndarray, numbers: list[int], statistics: InputStatistics | None) -> None:
    side = max(_SIDE, *images.shape[-2:]) if images.ndim > 3 else _SIDE
    (picture,) = draw_pictures(images[numbers], side, colour_axes(images, statistics), statistics)
    axis.imshow(picture, interpolation="none")

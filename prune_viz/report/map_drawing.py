"""The map of the whole network on the report's first page: a dot a filter, a path a layer, some stimuli."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prune_viz.report import layout
from prune_viz.report.pages import LayerRow
from prune_viz.report.run_data import packed
from prune_viz.runs.verdicts import FLAGGED, Verdict

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 2000  # of the drawing, in its own units; dots stand on whole ones, which keeps their paths short
HEIGHT = 0.62  # of its width
SIDE = 0.046  # of a stimulus on it, as a share of its width
_MARGIN = 0.03
_GAP = 1.3  # sides between two stimuli
_MOST = 110  # stimuli
_STEPS = 65534  # of a place on the map, for the browser; the next number stands for none


@dataclass(frozen=True)
class LayerDots:
    """A layer's filters on the map, as SVG path data by verdict.

    Attributes
    ----------
    row : LayerRow
        The layer.
    paths : dict of Verdict to str
        Dots (points that a round cap widens), diamonds, crosses or squares; none for a verdict that no
        filter has.
    """

    row: LayerRow
    paths: dict[Verdict, str]


@dataclass(frozen=True)
class ShownStimulus:
    """A stimulus drawn on the map; `left` and `top` in percent as in `layer_pages.MapTile`."""

    tile: int
    row: LayerRow
    filter: int
    left: float
    top: float


@dataclass(frozen=True)
class NetworkMap:
    """The map of the network.

    Attributes
    ----------
    width, height : int
        Of the drawing.
    dot : float
        Diameter of a dot in its units.
    layers : list of LayerDots
        In order of depth.
    stimuli : list of ShownStimulus
        Some filters' stimuli, spread over the map.
    data : dict
        For the browser: ``places`` (x and y of each filter in 1/65534 of the width, 65535 for none) and
        ``clusters`` (within its layer, -1 for none), both `packed`, filters in the order of the layers; and
        ``dot``, a dot's diameter in units of the width.
    """

    width: int
    height: int
    dot: float
    layers: list[LayerDots]
    stimuli: list[ShownStimulus]
    data: dict[str, Any]


def draw_map(rows: Sequence[LayerRow], filters: pd.DataFrame) -> NetworkMap | None:
    """Lay out the map of the network.

    Parameters
    ----------
    rows : sequence of LayerRow
        All layers in order of depth.
    filters : DataFrame
        `filters.csv`.

    Returns
    -------
    NetworkMap or None
        None if no filter has a place, as in runs of older versions.
    """
    import pandas as pd

    if "network_x" not in filters:
        return None
    tables = dict(tuple(filters.groupby("layer", sort=False)))
    ordered = pd.concat([tables[row.record.name].sort_values("filter") for row in rows])
    placed = np.isfinite(ordered[["network_x", "network_y"]].to_numpy(dtype=float)).all(axis=1)
    known = ordered[placed]
    if not len(known):
        return None
    centres = layout.fit(known[["network_x", "network_y"]].to_numpy(dtype=float), HEIGHT, _MARGIN)
    dot = float(np.clip(WIDTH * np.sqrt(0.1 * HEIGHT / len(known)), 4.4, 16))
    by_name = {row.record.name: row for row in rows}
    layer_of, verdicts = known["layer"].to_numpy(), known["verdict"].to_numpy()
    layers = []
    for row in rows:
        own = layer_of == row.record.name
        points = {verdict: WIDTH * centres[own & (verdicts == verdict)] for verdict in Verdict}
        paths = {verdict: _path(verdict, places, dot) for verdict, places in points.items() if len(places)}
        layers.append(LayerDots(row, paths))
    chosen = spread(centres, ~np.isin(verdicts, FLAGGED))
    numbers = known["filter"].to_numpy()
    stimuli = [
        ShownStimulus(
            tile,
            by_name[layer_of[index]],
            int(numbers[index]),
            float(100 * (centres[index, 0] - SIDE / 2) / (1 - SIDE)),
            float(100 * (centres[index, 1] - SIDE / 2) / (HEIGHT - SIDE)),
        )
        for tile, index in enumerate(chosen)
    ]
    places = np.full((len(ordered), 2), _STEPS + 1, dtype=np.uint16)
    places[placed] = (_STEPS * centres).round()
    data = {
        "places": packed(places),
        "clusters": packed(ordered["cluster"].to_numpy(np.int16)),
        "dot": round(dot / WIDTH, 5),
    }
    return NetworkMap(WIDTH, round(WIDTH * HEIGHT), round(dot, 2), layers, stimuli, data)


def _path(verdict: Verdict, points: np.ndarray, dot: float) -> str:
    r = round(max(0.85 * dot, 5.2))
    shapes = {
        "diamond": f"m0-{r}l{r} {r}-{r} {r}-{r}-{r}z",
        "cross": f"m-{r}-{r}l{2 * r} {2 * r}m0-{2 * r}l-{2 * r} {2 * r}",
        "square": f"m-{r}-{r}h{2 * r}v{2 * r}h-{2 * r}z",
    }
    return _dots(points) if verdict.look.shape == "ring" else _marks(points, shapes[verdict.look.shape])


def _marks(points: np.ndarray, mark: str) -> str:
    return "".join(f"M{x} {y}{mark}" for x, y in points.round().astype(int).tolist())


def _dots(points: np.ndarray) -> str:
    """Dots from left to right, each from the one before, which takes the fewest characters."""
    whole = points.round().astype(int)
    whole = whole[np.lexsort((whole[:, 1], whole[:, 0]))]
    if not len(whole):
        return ""
    steps = np.diff(whole, axis=0).tolist()
    return f"M{whole[0, 0]} {whole[0, 1]}h0" + "".join(
        f"m{x}{y}h0" if y < 0 else f"m{x} {y}h0" for x, y in steps
    )


def spread(centres: np.ndarray, kept: np.ndarray) -> list[int]:
    """Choose filters whose stimuli cover the map without touching, and hide few flagged filters.

    Parameters
    ----------
    centres : ndarray, shape (F, 2)
        Places, in units of the map's width.
    kept : ndarray of bool, shape (F,)
        Which filters are not flagged, and may be chosen.

    Returns
    -------
    list of int
        At most `_MOST`; first those near the middles of the cells of a grid.
    """
    from sklearn.neighbors import KDTree

    gap = _GAP * SIDE
    inside = ((centres >= SIDE / 2) & (centres <= np.array([1, HEIGHT]) - SIDE / 2)).all(axis=1)
    candidates = np.flatnonzero(inside & kept)
    if len(candidates) and not kept.all():
        flagged = KDTree(centres[~kept], metric="chebyshev")
        hidden = flagged.query_radius(centres[candidates], 0.6 * SIDE, count_only=True)
        # None where few are flagged; where many are, some cannot but be hidden.
        candidates = candidates[hidden <= np.quantile(hidden, 0.2)]
    places = centres[candidates]
    off = np.abs(places / gap - np.floor(places / gap) - 0.5).max(axis=1)
    taken: list[int] = []
    free = np.ones(len(candidates), dtype=bool)
    for place in np.argsort(off, kind="stable"):
        if free[place] and len(taken) < _MOST:
            taken.append(int(candidates[place]))
            free &= np.abs(places - places[place]).max(axis=1) >= gap
    return taken


def styles(page: NetworkMap) -> Iterable[str]:
    """Rules of the map's own style sheet: a colour a layer, and where the stimuli lie."""
    last = max(len(page.layers) - 1, 1)
    yield f".network{{--shape:{page.width}/{page.height};--dot:{page.dot}px;--side:{100 * SIDE:.2f}%}}"
    for depth in range(len(page.layers)):
        way = 2 * depth / last
        ends = ("--shallow", "--middle") if way <= 1 else ("--middle", "--deep")
        share = 100 * (way if way <= 1 else way - 1)
        yield f".d{depth}{{--tint:color-mix(in oklab,var({ends[0]}),var({ends[1]}) {share:.1f}%)}}"
    for one in page.stimuli:
        x, y = f"{one.left:.2f}%", f"{one.top:.2f}%"
        yield f"#n{one.tile}{{left:{x};top:{y};translate:-{x} -{y}}}"

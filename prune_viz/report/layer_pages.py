"""What the page of a layer shows, as plain data: its map, gallery, and the evidence on flagged filters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prune_viz.report import layout, wording
from prune_viz.report.pages import LayerRow
from prune_viz.runs.decisions_json import Decisions, GroupRecord, VerdictRecord
from prune_viz.runs.verdicts import Verdict

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 6  # representatives drawn beside a redundant filter
_BINS = 96  # bars of a response profile
_LOOSE = 6.0  # an outline this many times larger than its thumbnails says little
_HALF = 20  # height of a profile's half in its own units


@dataclass(frozen=True)
class FilterCard:
    """A filter, with the figures that its card and its thumbnail carry."""

    number: int
    verdict: Verdict
    activation: float
    score: float
    damage: float
    cluster: int
    reason: str

    @property
    def label(self) -> str:
        """One line for a screen reader and for the preview."""
        return (
            f"Filter {self.number}, {self.verdict}, activation {wording.activation(self.activation)}, "
            f"R² {wording.r_squared(self.score)}"
        )


@dataclass(frozen=True)
class MapTile:
    """A thumbnail's place on the map in percent: 0 touches the left or upper edge, 100 the other."""

    card: FilterCard
    left: float
    top: float


@dataclass(frozen=True)
class Outline:
    """A cluster's outline on the map, in thousandths of the map's width.

    Clusters come from the full feature space; one that the map tears apart is not `compact`.
    """

    cluster: int
    points: str
    compact: bool


@dataclass(frozen=True)
class Map:
    """The map of a layer.

    Attributes
    ----------
    tiles : list of MapTile
        Filters that the embedding placed.
    side : float
        Side of a thumbnail in percent of the map's width.
    height : float
        Height of the map in units of its width.
    outlines : list of Outline
        Clusters of three filters or more, the largest first.
    unplaced : list of FilterCard
        Filters without embedding coordinates.
    """

    tiles: list[MapTile]
    side: float
    height: float
    outlines: list[Outline]
    unplaced: list[FilterCard]


@dataclass(frozen=True)
class Cluster:
    """Filters of one cluster, the most active first; `number` is -1 for those in none."""

    number: int
    cards: list[FilterCard]


@dataclass(frozen=True)
class Representative:
    """A kept filter that a redundant one is reconstructed from, and its weight in that."""

    number: int
    coefficient: float | None


@dataclass(frozen=True)
class Answers:
    """Norms of the maps with which a copy and its scaled representative answer the same stimulus.

    Attributes
    ----------
    stimulus : int
        The filter whose stimulus it is.
    own, other : float
        The copy's, and the representative's times its weight.
    """

    stimulus: int
    own: float
    other: float

    def text(self, number: int, representative: Representative) -> str:
        """A line for people: ``on stimulus 3: 12.2 from filter 3, 12.2 from 2 x filter 7``."""
        weight = f"{representative.coefficient:.3g} x " if representative.coefficient is not None else ""
        return (
            f"On stimulus {self.stimulus}: {wording.activation(self.own)} from filter {number}, "
            f"{wording.activation(self.other)} from {weight}filter {representative.number}"
        )


@dataclass(frozen=True)
class Flagged:
    """A redundant or dead filter and the evidence against it.

    Attributes
    ----------
    card : FilterCard
        The filter.
    representatives : list of Representative
        Up to six, the strongest first.
    more : int
        Representatives beyond those.
    constant : float or None
        The constant in the regression, or what a dead filter always gives.
    profile, other : str
        SVG path data of its response profile, upwards, and of its first representative's, downwards
        (empty for a dead filter).
    bins : int
        Bars of the profiles.
    answers : list of Answers
        Of a copy and what it is a copy of, to the stimulus of each; empty where several filters rebuild it.
    """

    card: FilterCard
    representatives: list[Representative]
    more: int
    constant: float | None
    profile: str
    other: str
    bins: int
    answers: list[Answers]

    @property
    def proof(self) -> list[str]:
        """The answers, a line for people each."""
        return [answer.text(self.card.number, self.representatives[0]) for answer in self.answers]


@dataclass(frozen=True)
class Coupling:
    """What must be removed together with this layer's filters, and who reads them."""

    tied: list[str]
    consumers: list[str]
    removable: bool
    note: str


@dataclass(frozen=True)
class LayerPage:
    """Everything that a layer's page shows; `order` is the gallery's, for the response matrix."""

    row: LayerRow
    previous: LayerRow | None
    following: LayerRow | None
    coupling: Coupling | None
    map: Map
    clusters: list[Cluster]
    redundant: list[Flagged]
    dead: list[Flagged]
    median_activation: float
    order: list[int]


def layer_page(
    rows: Sequence[LayerRow],
    index: int,
    table: pd.DataFrame,
    responses: np.ndarray,
    decisions: Decisions,
) -> LayerPage:
    """Gather what the page of layer `index` of `rows` shows.

    Parameters
    ----------
    rows : sequence of LayerRow
        All layers in order of depth.
    index : int
        The layer's place in `rows`.
    table : DataFrame
        The layer's part of `filters.csv`.
    responses : ndarray, shape (F, F)
        ``responses[i, j]``: norm of filter j's feature map on stimulus i.
    decisions : Decisions
        The run's.
    """
    row = rows[index]
    table = table.sort_values("filter")
    cards = [filter_card(entry) for entry in table.to_dict("records")]
    clusters = gallery(cards)
    order = [card.number for cluster in clusters for card in cluster.cards]
    kin = {
        number: [int(part) for part in text.split(";")]
        for number, text in zip(table["filter"], table["representative"], strict=True)
        if text
    }
    verdicts = {one.filter: one for one in decisions.verdicts if one.layer == row.record.name}
    profiles = Profiles(responses, order)
    flagged = [
        _flagged(card, kin.get(card.number, []), verdicts.get(card.number), profiles)
        for card in cards
        if card.verdict.flagged
    ]
    active = [card.activation for card in cards if math.isfinite(card.activation)]
    return LayerPage(
        row=row,
        previous=rows[index - 1] if index else None,
        following=rows[index + 1] if index + 1 < len(rows) else None,
        coupling=coupling(row, decisions.groups),
        map=layer_map(cards, table[["x", "y"]].to_numpy(dtype=float)),
        clusters=clusters,
        redundant=[one for one in flagged if one.card.verdict is Verdict.REDUNDANT],
        dead=[one for one in flagged if one.card.verdict is Verdict.DEAD],
        median_activation=float(np.median(active)) if active else math.nan,
        order=order,
    )


def filter_card(entry: Mapping[Hashable, Any]) -> FilterCard:
    """What is shown of a filter, from its row of `filters.csv`."""
    return FilterCard(
        number=int(entry["filter"]),
        verdict=Verdict(entry["verdict"]),
        activation=float(entry["activation"]),
        score=float(entry["score"]),
        damage=float(entry["damage"]),
        cluster=int(entry["cluster"]),
        reason=str(entry["reason"]),
    )


def gallery(cards: Sequence[FilterCard]) -> list[Cluster]:
    """Group filters by cluster, the largest first, those in none last; the most active first in each."""
    groups: dict[int, list[FilterCard]] = {}
    for card in cards:
        groups.setdefault(max(card.cluster, -1), []).append(card)
    ranked = sorted(groups, key=lambda number: (number < 0, -len(groups[number]), number))
    return [
        Cluster(number, sorted(groups[number], key=lambda c: -np.nan_to_num(c.activation)))
        for number in ranked
    ]


def layer_map(cards: Sequence[FilterCard], points: np.ndarray) -> Map:
    """Place the thumbnails of `cards`, whose embedding coordinates are `points` (F, 2)."""
    known = np.isfinite(points).all(axis=1)
    placed = [card for card, here in zip(cards, known, strict=True) if here]
    unplaced = [card for card, here in zip(cards, known, strict=True) if not here]
    height = 0.56 if len(placed) <= 300 else 0.72
    if not placed:
        return Map([], 0.0, height, [], unplaced)
    side = layout.thumbnail_side(len(placed), height)
    centres = layout.place(points[known], height, side)
    tiles = [
        MapTile(card, 100 * (x - side / 2) / (1 - side), 100 * (y - side / 2) / (height - side))
        for card, (x, y) in zip(placed, centres, strict=True)
    ]
    return Map(tiles, 100 * side, height, _outlines(placed, centres, side), unplaced)


def _outlines(cards: Sequence[FilterCard], centres: np.ndarray, side: float) -> list[Outline]:
    members: dict[int, list[int]] = {}
    for index, card in enumerate(cards):
        if card.cluster >= 0:
            members.setdefault(card.cluster, []).append(index)
    outlines = []
    for cluster, inside in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        if len(inside) < 3:
            continue
        ring = 1000 * layout.hull(layout.corners(centres[inside], side))
        points = " ".join(f"{x:.0f},{y:.0f}" for x, y in ring)
        room = len(inside) * (1000 * side) ** 2
        outlines.append(Outline(cluster, points, layout.area(ring) < _LOOSE * room))
    return outlines


class Profiles:
    """How each filter responds to all stimuli of its layer, in the gallery's order, as SVG paths."""

    def __init__(self, responses: np.ndarray, order: Sequence[int]) -> None:
        finite = np.nan_to_num(responses.astype(np.float32), posinf=0.0, neginf=0.0)
        self._order = list(order)
        self._ordered = finite[np.asarray(order, dtype=int)]
        self.bins = min(_BINS, len(order))
        peaks = self._ordered.max(axis=0)
        self._usual = float(np.median(peaks))
        self._edges = np.linspace(0, len(order), self.bins, endpoint=False).astype(int)

    def __contains__(self, number: int) -> bool:
        return 0 <= number < len(self._ordered)

    def path(self, number: int, direction: int, dead: bool = False) -> str:
        """Bars of filter `number` from the middle line, upwards (-1) or downwards (1).

        They are relative to the filter's own peak; those of a `dead` one to the layer's median peak, or
        numerical noise would look like a response.
        """
        bars = np.maximum.reduceat(self._ordered[:, number], self._edges)
        peak = float(bars.max())
        if dead:
            peak = max(peak, self._usual)
        heights = np.zeros(self.bins) if peak <= 0 else bars / peak * (_HALF - 1)
        steps = "".join(f"V{_HALF + direction * height:.3g}h1" for height in heights)
        return f"M0 {_HALF}{steps}V{_HALF}Z"

    def answers(self, number: int, other: int, weight: float) -> list[Answers]:
        """What two filters answer to the stimulus of each, the other one's times a weight."""
        place = {filter_: row for row, filter_ in enumerate(self._order)}
        return [
            Answers(
                one,
                float(self._ordered[place[one], number]),
                abs(weight) * float(self._ordered[place[one], other]),
            )
            for one in (number, other)
        ]


def _flagged(
    card: FilterCard, listed: Sequence[int], verdict: VerdictRecord | None, profiles: Profiles
) -> Flagged:
    numbers = listed if verdict is None else verdict.representatives or listed
    weights: list[float | None] = [] if verdict is None else list(verdict.coefficients)
    weights += [None] * (len(numbers) - len(weights))
    known = [Representative(*pair) for pair in zip(numbers, weights, strict=False) if pair[0] in profiles]
    copied = known[0] if len(known) == 1 and known[0].coefficient is not None else None
    weight = 0.0 if copied is None or copied.coefficient is None else copied.coefficient
    return Flagged(
        card=card,
        representatives=known[:_SHOWN],
        more=max(0, len(known) - _SHOWN),
        constant=None if verdict is None else verdict.constant,
        profile=profiles.path(card.number, -1, dead=card.verdict is Verdict.DEAD),
        other=profiles.path(known[0].number, 1) if known else "",
        bins=profiles.bins,
        answers=[] if copied is None else profiles.answers(card.number, copied.number, weight),
    )


def coupling(row: LayerRow, groups: Sequence[GroupRecord]) -> Coupling | None:
    """Find the layer's coupling group; None if it has none."""
    group = next((one for one in groups if one.id == row.record.group), None)
    if group is None:
        return None
    tied = [name for name in group.layers if name != row.record.name]
    return Coupling(tied, list(group.consumers), group.removable, group.note)

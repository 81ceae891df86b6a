"""What removal would save at several budgets, and what that is predicted to cost, as a table and a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_viz.pruning.budgets import counts_for_macs, read_rankings, removed_filters, share_saved
from prune_viz.report.chart_frame import ChartFrame, frame, polyline
from prune_viz.runs.decisions_json import Decisions
from prune_viz.runs.run_json import Summary
from prune_viz.utils.errors import UserError

_SHARES = tuple(step / 20 for step in range(1, 15))  # of the multiply-accumulates, on the curve
_FRAME = frame(height=280, left=88, right=28, top=16, bottom=56)
_LEAST = 1e-9  # damage below it is drawn there


@dataclass(frozen=True)
class Budget:
    """What a budget takes and is predicted to cost.

    Attributes
    ----------
    saved : float
        Share of the multiply-accumulates, 0 to 1.
    filters : int
        How many filters go.
    damage : float
        Predicted damage, the sum over coupling groups, in the unit of the run.
    """

    saved: float
    filters: int
    damage: float


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, at a place in the drawing."""

    place: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Curve(ChartFrame):
    """Budgets drawn: damage, on a logarithmic axis, over what is saved.

    Attributes
    ----------
    line : str
        SVG path data.
    points : list of (float, float, Budget)
        Where each budget stands.
    default : tuple of (float, float) or None
        Where the run's own masks stand; None where they take nothing.
    across, up : list of Tick
        Shares saved, and damages.
    """

    line: str
    points: list[tuple[float, float, Budget]]
    default: tuple[float, float] | None
    across: list[Tick]
    up: list[Tick]


def budgets(decisions: Decisions) -> list[Budget]:
    """Budgets that the run's removal order can meet; empty where nothing was ranked."""
    rankings, costs = read_rankings(decisions), decisions.macs
    found: list[Budget] = []
    for share in _SHARES if rankings and any(costs.values()) else ():
        try:
            counts = counts_for_macs(rankings, share, costs)
        except UserError:  # more than can go
            break
        damage = sum(ranking.damage_of(counts) for ranking in rankings)
        saved = share_saved(rankings, counts, costs)
        found.append(Budget(saved, removed_filters(rankings, counts), damage))
    return found


def default_budget(decisions: Decisions, summary: Summary | None) -> Budget | None:
    """What the run's own masks take; None where that is nothing or was not measured."""
    predicted = decisions.prediction
    if predicted is None or summary is None or not summary.macs or summary.macs_after is None:
        return None
    if not decisions.verdicts:
        return None
    return Budget(1 - summary.macs_after / summary.macs, len(decisions.verdicts), predicted.value)


def draw_curve(known: Sequence[Budget], default: Budget | None) -> Curve | None:
    """Lay out the curve; None for fewer than two budgets."""
    if len(known) < 2:
        return None
    shown = [*known, *([default] if default else [])]
    levels = [math.log10(max(one.damage, _LEAST)) for one in shown]
    low, high = math.floor(min(levels)), math.ceil(max(levels))
    high = max(high, low + 1)
    widest = math.ceil(10 * max(one.saved for one in shown) - 1e-9) / 10

    def height_of(level: float) -> float:
        return _FRAME.y((level - low) / (high - low))

    def at(one: Budget) -> tuple[float, float]:
        return _FRAME.x(one.saved / widest), height_of(math.log10(max(one.damage, _LEAST)))

    points = [(*at(one), one) for one in known]
    step = max(1, round((high - low) / 5))
    return Curve(
        **vars(_FRAME),
        line=polyline([(x, y) for x, y, _ in points]),
        points=points,
        default=at(default) if default else None,
        across=[
            Tick(_FRAME.x(share / widest), float(share))
            for share in np.arange(0, widest + 0.01, 0.1).round(1)
        ],
        up=[Tick(height_of(level), 10.0**level) for level in range(low, high + 1, step)],
    )

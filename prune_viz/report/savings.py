"""What removal would save at several budgets, and what that is predicted to cost, as a table and a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_viz.pruning.allocation import counts_for_share
from prune_viz.pruning.curves import predicted_total, preferred
from prune_viz.pruning.rankings import Saving, read_rankings
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
        Predicted change of the output by all of them together, in the run's unit of damage.
    measured : float or None
        What it was measured to be, on images that no fit saw; None where it was not.
    """

    saved: float
    filters: int
    damage: float
    measured: float | None = None


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
        Where each budget stands by its predicted damage.
    measured : list of (float, float, Budget)
        Where those that were tried stand by their measured damage.
    default : tuple of (float, float) or None
        Where the run's own masks stand; None where they take nothing.
    across, up : list of Tick
        Shares saved, and damages.
    """

    line: str
    points: list[tuple[float, float, Budget]]
    measured: list[tuple[float, float, Budget]]
    default: tuple[float, float] | None
    across: list[Tick]
    up: list[Tick]


def budgets(decisions: Decisions) -> list[Budget]:
    """Budgets that the run's removal order can meet; empty where nothing was ranked."""
    rankings, tried = read_rankings(decisions), decisions.budgets
    saving = Saving(rankings, decisions.macs)
    found: list[Budget] = []
    for share in _SHARES if rankings and saving.whole else ():
        allocation = preferred(tried, share)
        try:
            counts = counts_for_share(saving, share, allocation)
        except UserError:  # more than can go
            break
        damage = predicted_total(sum(one.damage_of(counts) for one in rankings), tried, allocation)
        found.append(Budget(saving.of(counts), saving.removed_filters(counts), damage))
    return found


def measured_budgets(decisions: Decisions) -> list[Budget]:
    """Budgets that were tried as the run ended, each shared as `masks` would share it."""
    tried = decisions.budgets
    return [
        Budget(one.saved, one.filters, predicted_total(one.predicted, tried, one.allocation), one.measured)
        for one in sorted(tried, key=lambda one: one.saved)
        if one.allocation is preferred(tried, one.saved)
    ]


def default_budget(decisions: Decisions, summary: Summary | None) -> Budget | None:
    """What the run's own masks take; None where that is nothing or was not measured."""
    predicted = decisions.prediction
    if predicted is None or summary is None or not summary.macs or summary.macs_after is None:
        return None
    if not decisions.verdicts:
        return None
    measured = decisions.measurement
    return Budget(
        1 - summary.macs_after / summary.macs, len(decisions.verdicts), predicted.value,
        None if measured is None else measured.value,
    )  # fmt: skip


def draw_curve(known: Sequence[Budget], tried: Sequence[Budget], default: Budget | None) -> Curve | None:
    """Lay out the curve; None for fewer than two budgets.

    Parameters
    ----------
    known : sequence of Budget
        Predicted ones.
    tried : sequence of Budget
        Those that were measured.
    default : Budget, optional
        What the run's own masks take.
    """
    if len(known) < 2:
        return None
    shown = [*known, *tried, *([default] if default else [])]
    damages = [one.damage for one in known] + [_measured_else_predicted(one) for one in shown[len(known) :]]
    levels = [math.log10(max(damage, _LEAST)) for damage in damages]
    low, high = math.floor(min(levels)), math.ceil(max(levels))
    high = max(high, low + 1)
    widest = math.ceil(10 * max(one.saved for one in shown) - 1e-9) / 10

    def height_of(level: float) -> float:
        return _FRAME.y((level - low) / (high - low))

    def at(one: Budget, damage: float) -> tuple[float, float]:
        return _FRAME.x(one.saved / widest), height_of(math.log10(max(damage, _LEAST)))

    points = [(*at(one, one.damage), one) for one in known]
    step = max(1, round((high - low) / 5))
    return Curve(
        **vars(_FRAME),
        line=polyline([(x, y) for x, y, _ in points]),
        points=points,
        measured=[(*at(one, _measured_else_predicted(one)), one) for one in tried],
        default=at(default, _measured_else_predicted(default)) if default else None,
        across=[
            Tick(_FRAME.x(share / widest), float(share))
            for share in np.arange(0, widest + 0.01, 0.1).round(1)
        ],
        up=[Tick(height_of(level), 10.0**level) for level in range(low, high + 1, step)],
    )


def _measured_else_predicted(one: Budget) -> float:
    return one.damage if one.measured is None else one.measured

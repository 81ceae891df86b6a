"""How the predicted damage of a layer's filters is distributed, by verdict, as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prune_viz.report import wording
from prune_viz.report.chart_frame import ChartFrame, frame
from prune_viz.report.layer_pages import FilterCard
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.verdicts import Verdict

_FRAME = frame(height=190, left=44, right=12, top=14, bottom=46)
_LEAST = -9  # power of ten; what is below stands in the first bar
_A_DECADE = 2  # bars
_GAP = 2.0
_APART = 64.0  # the least between the middles of two labels


@dataclass(frozen=True)
class Part:
    """A bar's filters of one verdict, a rectangle of the drawing."""

    verdict: Verdict
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Bar:
    """Filters of about the same damage; `label` says which and how many."""

    label: str
    parts: list[Part]


@dataclass(frozen=True, kw_only=True)
class DamageHistogram(ChartFrame):
    """A layer's histogram of damage.

    Attributes
    ----------
    bars : list of Bar
        From the least damage to the most.
    across, up : list of (float, str)
        Places on the axes and their texts.
    """

    bars: list[Bar]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def draw_histogram(cards: Sequence[FilterCard], unit: Unit) -> DamageHistogram | None:
    """Lay out the histogram; None where no filter's damage is known.

    Parameters
    ----------
    cards : sequence of FilterCard
        The layer's filters.
    unit : Unit
        Of damage.

    Returns
    -------
    DamageHistogram or None
    """
    known = [card for card in cards if math.isfinite(card.damage)]
    if not known:
        return None
    binned: dict[int, dict[Verdict, int]] = {}
    for card in known:
        verdicts = binned.setdefault(_bin(card.damage), dict.fromkeys(Verdict, 0))
        verdicts[card.verdict] += 1
    first = min((index for index in binned if index), default=1)
    first -= (first - 1) % _A_DECADE  # a whole power of ten
    last = first + math.ceil(max(1, max(binned) - first) / _A_DECADE) * _A_DECADE
    before = 1 if 0 in binned else 0  # the bar of what is as good as nothing
    places = last - first + 1 + before
    step = (_FRAME.right - _FRAME.left) / places

    def along(index: int) -> float:
        return _FRAME.x((index - first + before if index else 0) / places)

    tallest = max(sum(verdicts.values()) for verdicts in binned.values())
    bars = []
    for index, verdicts in sorted(binned.items()):
        y, parts = _FRAME.bottom, []
        for verdict, count in verdicts.items():
            height = count / tallest * (_FRAME.bottom - _FRAME.top)
            y -= height
            if count:
                parts.append(
                    Part(verdict, along(index), round(y, 1), round(step - _GAP, 1), round(height, 1))
                )
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items() if count)
        bars.append(Bar(f"{_range(index, unit)}: {counts}", parts))
    decades = range(first, last + 1, _A_DECADE * max(1, round((last - first) / _A_DECADE / 6)))
    ticks = [(along(index), wording.magnitude(_edge(index), unit)) for index in decades]
    if before:
        nothing = _FRAME.x(0.5 / places)
        ticks = [(nothing, "none"), *(tick for tick in ticks if tick[0] - nothing > _APART)]
    return DamageHistogram(
        **vars(_FRAME),
        bars=bars,
        across=ticks,
        up=[(_FRAME.top, wording.count(tallest)), (_FRAME.bottom, "0")],
    )


def _bin(damage: float) -> int:
    """0 for what is below the least, then from 1 by halves of powers of ten."""
    if damage < 10.0**_LEAST:
        return 0
    return 1 + math.floor((math.log10(damage) - _LEAST) * _A_DECADE)


def _edge(index: int) -> float:
    """The least damage in a bar but the first."""
    return float(10 ** (_LEAST + (index - 1) / _A_DECADE))


def _range(index: int, unit: Unit) -> str:
    least, most = (Damage(_edge(place), unit).figure(wording.NARROW) for place in (index, index + 1))
    return f"{least} to {most}" if index else f"below {most}"

"""How the predicted damage of a layer's filters is distributed, by verdict, as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prune_viz.report import wording
from prune_viz.report.layer_pages import FilterCard
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.verdicts import Verdict

_WIDTH, _HEIGHT = 720, 190  # of the drawing, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 14, 46
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


@dataclass(frozen=True)
class DamageHistogram:
    """A layer's histogram of damage.

    Attributes
    ----------
    width, height, left, right, bottom : float
        Of the drawing and of its axes.
    bars : list of Bar
        From the least damage to the most.
    across, up : list of (float, str)
        Places on the axes and their texts.
    """

    width: float
    height: float
    left: float
    right: float
    bottom: float
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
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    step = (right - _LEFT) / (last - first + 1 + before)

    def along(index: int) -> float:
        return round(_LEFT + (index - first + before if index else 0) * step, 1)

    tallest = max(sum(verdicts.values()) for verdicts in binned.values())
    bars = []
    for index, verdicts in sorted(binned.items()):
        y, parts = float(bottom), []
        for verdict, count in verdicts.items():
            height = count / tallest * (bottom - _TOP)
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
        nothing = round(_LEFT + step / 2, 1)
        ticks = [(nothing, "none"), *(tick for tick in ticks if tick[0] - nothing > _APART)]
    return DamageHistogram(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=right,
        bottom=bottom,
        bars=bars,
        across=ticks,
        up=[(float(_TOP), wording.count(tallest)), (float(bottom), "0")],
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

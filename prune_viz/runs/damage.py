"""Damage: how far removing filters moves a network, in which unit, and how that is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

_DASH = "\u2013"
RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


class Unit(StrEnum):
    """What damage is measured in; the value is what files hold."""

    NATS = "nats"
    """KL divergence of the predicted classes' probabilities."""
    LABELS = "nats over labels"
    """KL divergence of each label's probability, summed over labels."""
    POSITION = "nats a position"
    """KL divergence of the classes' probabilities at a position, a mean over positions."""
    OUTPUT = "output"
    """Squared change of the network's output as a share of its square."""
    CONSUMERS = "readers"
    """Share of the variance of the consumers' output that is lost."""

    @property
    def symbol(self) -> str:
        """What follows a figure."""
        return _WRITTEN[self].symbol

    @property
    def scale(self) -> float:
        """Factor from the value to the figure that is written."""
        return _WRITTEN[self].scale

    @property
    def least(self) -> float:
        """Smallest figure that is written; a smaller one is "under" that."""
        return _WRITTEN[self].least

    @property
    def of(self) -> str:
        """What the damage is a share, a sum or a mean of; empty where that goes without saying."""
        return _WRITTEN[self].of


@dataclass(frozen=True)
class _Written:
    symbol: str
    scale: float
    least: float
    of: str


_WRITTEN = {
    Unit.NATS: _Written("nats", 1.0, 1e-9, ""),
    Unit.LABELS: _Written("nats", 1.0, 1e-9, "summed over labels"),
    Unit.POSITION: _Written("nats", 1.0, 1e-9, "a position"),
    Unit.OUTPUT: _Written("%", 100.0, 1e-4, "of the output's square"),
    Unit.CONSUMERS: _Written("%", 100.0, 1e-4, "of the output of the layers that read it"),
}


@dataclass(frozen=True)
class Damage:
    """How far something moves a network.

    Attributes
    ----------
    value : float
        Not negative where it was predicted; NaN where it is not known.
    unit : Unit
        What it is measured in.
    """

    value: float
    unit: Unit

    def text(self, gap: str = "") -> str:
        """Write it to two significant figures: ``0.012 nats``, ``3.4%``, ``under 1e-9 nats``, ``0%``.

        Parameters
        ----------
        gap : str
            Between figure and unit. Without one, a space stands before a unit that is a word.
        """
        if not math.isfinite(self.value):
            return _DASH
        least = self.unit.least / self.unit.scale
        if 0 < abs(self.value) < least:
            return f"under {Damage(least, self.unit).figure(gap)}"
        return self.figure(gap)

    def figure(self, gap: str = "") -> str:
        """Write it as `text` does, however small it is."""
        gap = gap or (" " if self.unit.symbol.isalpha() else "")
        return f"{_two_figures(self.value * self.unit.scale)}{gap}{self.unit.symbol}"

    def tick(self, gap: str) -> str:
        """Write a power of ten for an axis: ``0.01 nats``, ``10\u207b\u2076 nats``, ``1 %``."""
        figure = self.value * self.unit.scale
        power = round(math.log10(figure))
        if -3 <= power <= 3:
            return f"{figure:g}{gap}{self.unit.symbol}"
        return f"10{str(power).translate(RAISED)}{gap}{self.unit.symbol}"

    def __str__(self) -> str:
        return f"{self.text()} {self.unit.of}".rstrip()


def _two_figures(value: float) -> str:
    """Two significant figures; a whole number in full."""
    written = f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.2g}"
    return written.replace("e-0", "e-").replace("e+0", "e")

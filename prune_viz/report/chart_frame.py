"""The frame of a chart: the size of its drawing, its axes, and where values stand between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChartFrame:
    """The area of an SVG chart, in its own units.

    Attributes
    ----------
    width, height : float
        Of the drawing.
    left, right, top, bottom : float
        Bounds of the plot inside it.
    """

    width: float = 720
    height: float
    left: float
    right: float
    top: float
    bottom: float

    def x(self, share: float) -> float:
        """The place at a share, 0 to 1, of the way from left to right."""
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, share: float) -> float:
        """The place at a share, 0 to 1, of the way from bottom to top."""
        return round(self.bottom - share * (self.bottom - self.top), 1)


def frame(height: float, left: float, right: float, top: float, bottom: float) -> ChartFrame:
    """A frame of the usual width, from the margins around its axes."""
    width = ChartFrame.width
    return ChartFrame(height=height, left=left, right=width - right, top=top, bottom=height - bottom)


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data of a line through points."""
    return "M" + "L".join(f"{x} {y}" for x, y in points)

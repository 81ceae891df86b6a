"""A measured sign of growing abstraction: how much of a stimulus lies along one angle, by depth.

Near the input stimuli are lines at one angle; the deeper the layer, the more angles one stimulus takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune_viz.report.chart_frame import ChartFrame, frame, polyline
from prune_viz.report.pages import LayerRow
from prune_viz.utils.array_files import batches_of

_FRAME = frame(height=200, left=52, right=12, top=12, bottom=40)
_FEWEST = 3  # layers that are drawn
_TREND = 6  # layers from which a rank correlation says something
_STEADY = 0.5  # rank correlation from which a change with depth is called one
_BATCH = 64


@dataclass(frozen=True)
class LayerCoherence:
    """Coherence of a layer's stimuli, 0 (all angles alike) to 1 (one angle): median and quartiles."""

    row: LayerRow
    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class CoherenceCurve(ChartFrame):
    """Coherence by depth, drawn.

    Attributes
    ----------
    line, band : str
        SVG path data: the medians, and what lies between the quartiles.
    points : list of (float, float, LayerCoherence)
        Where each layer's median stands.
    ticks : list of (float, float)
        Places on the axis and their values.
    finding : str
        What that says, in a sentence, with Spearman's correlation of the medians with depth.
    """

    line: str
    band: str
    points: list[tuple[float, float, LayerCoherence]]
    ticks: list[tuple[float, float]]
    finding: str


def coherence(images: np.ndarray) -> np.ndarray:
    """How much of each stimulus's contrast lies along one angle.

    The coherence of the structure tensor over the whole stimulus: with the eigenvalues ``a >= b`` of the
    mean outer product of its gradients, ``(a - b) / (a + b)`` [1]_.

    Parameters
    ----------
    images : ndarray, shape (F, C, H, W)

    Returns
    -------
    ndarray of float64, shape (F,)
        In [0, 1]; NaN for a stimulus without contrast.

    References
    ----------
    .. [1] J. Bigun, G. H. Granlund, "Optimal orientation detection of linear symmetry", ICCV 1987.
    """
    if min(images.shape[2:]) < 2:
        return np.full(len(images), np.nan)
    parts = []
    for batch in batches_of(images, _BATCH):
        finite = np.nan_to_num(batch.astype(np.float64), posinf=0.0, neginf=0.0)
        down, across = np.gradient(finite, axis=(2, 3))
        xx, yy, xy = (
            (one * other).mean(axis=(1, 2, 3))
            for one, other in ((across, across), (down, down), (across, down))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.sqrt((xx - yy) ** 2 + 4 * xy**2) / (xx + yy))
    return np.concatenate(parts)


def layer_coherence(row: LayerRow, images: np.ndarray, kept: np.ndarray) -> LayerCoherence | None:
    """Coherence of the stimuli of a layer's `kept` filters; None unless some are pictures with contrast."""
    if images.ndim != 4 or not kept.any():
        return None
    values = coherence(images)[kept]
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return LayerCoherence(row, median, low, high)


def draw_coherence(layers: Sequence[LayerCoherence]) -> CoherenceCurve | None:
    """Lay out the curve; None for fewer than three layers."""
    if len(layers) < _FEWEST:
        return None
    across = [_FRAME.x(index / (len(layers) - 1)) for index in range(len(layers))]
    points = [(x, _FRAME.y(one.median), one) for x, one in zip(across, layers, strict=True)]
    edge = [(x, _FRAME.y(one.high)) for x, one in zip(across, layers, strict=True)]
    edge += [(x, _FRAME.y(one.low)) for x, one in zip(reversed(across), reversed(layers), strict=True)]
    correlation = _rank_correlation(np.array([one.median for one in layers]))
    return CoherenceCurve(
        **vars(_FRAME),
        line=polyline([(x, y) for x, y, _ in points]),
        band=polyline(edge) + "Z",
        points=points,
        ticks=[(_FRAME.y(value), value) for value in (0.0, 0.5, 1.0)],
        finding=_finding(layers, correlation),
    )


def _rank_correlation(values: np.ndarray) -> float:
    """Spearman's, of values with their order; 0 where all are the same."""
    import pandas as pd

    ranks = pd.Series(values).rank().to_numpy()
    order = np.arange(len(values))
    if np.ptp(ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks, order)[0, 1])


def _finding(layers: Sequence[LayerCoherence], correlation: float) -> str:
    third = max(1, len(layers) // 3)
    first, last = (
        100 * float(np.median([one.median for one in part])) for part in (layers[:third], layers[-third:])
    )
    what = f"from {first:.0f}\u202f% in the first third of the layers to {last:.0f}\u202f% in the last"
    rank = f"rank correlation with depth {correlation:+.2f}".replace("-", "\u2212")
    if len(layers) < _TREND:
        return f"Here it goes {what}; so few layers show no trend."
    if correlation <= -_STEADY:
        return f"It falls {what} ({rank}): the deeper, the more abstract."
    if correlation >= _STEADY:
        return f"Here it rises, {what} ({rank})."
    return f"Here it does not change steadily with depth: it goes {what} ({rank})."

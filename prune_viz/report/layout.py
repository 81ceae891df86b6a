"""Where the thumbnails of a layer's map lie: scaling, moving apart, outlines of clusters."""

from __future__ import annotations

import numpy as np

_STEPS = 160


def thumbnail_side(filters: int, height: float) -> float:
    """Side of a thumbnail as a share of the map's width, so that `filters` of them leave air.

    Parameters
    ----------
    filters : int
        How many thumbnails the map holds, at least 1.
    height : float
        Height of the map in units of its width.
    """
    return float(np.clip(np.sqrt(0.32 * height / filters), 0.016, 0.068))


def fit(points: np.ndarray, height: float, margin: float) -> np.ndarray:
    """Scale each axis of embedding coordinates (F, 2) to fill the map but for a margin.

    Parameters
    ----------
    points : ndarray, shape (F, 2)
        Finite embedding coordinates.
    height, margin : float
        Of the map, in units of its width.

    Returns
    -------
    ndarray of float64, shape (F, 2)
        In units of the map's width: x in [0, 1], y in [0, height].
    """
    low = np.array([margin, margin])
    high = np.array([1 - margin, height - margin])
    span = np.ptp(points, axis=0)
    unit = np.where(span > 0, (points - points.min(axis=0)) / np.where(span > 0, span, 1), 0.5)
    unit[:, 1] = 1 - unit[:, 1]  # the embedding's y points up, the page's down
    return np.asarray(low + unit * (high - low))


def place(points: np.ndarray, height: float, side: float) -> np.ndarray:
    """Place thumbnails on the map near their embedding coordinates, with little overlap.

    Each axis is scaled to fill the map; then thumbnails that overlap push each other apart a little at
    a time, so neighbours stay neighbours and none is hidden.

    Parameters
    ----------
    points : ndarray, shape (F, 2)
        Finite embedding coordinates.
    height : float
        Height of the map in units of its width.
    side : float
        Side of a thumbnail in the same units.

    Returns
    -------
    ndarray of float64, shape (F, 2)
        Centres in units of the map's width: x in [0, 1], y in [0, height], whole thumbnails inside.
    """
    from scipy.spatial import KDTree

    margin = 0.6 * side
    low = np.array([margin, margin])
    high = np.array([1 - margin, height - margin])
    centres = fit(points, height, margin)
    # Coinciding points need some direction to part in; a fixed one keeps the page reproducible.
    centres = centres + np.random.default_rng(0).normal(scale=1e-3 * side, size=centres.shape)
    gap = 1.12 * side
    for _ in range(_STEPS):
        pairs = KDTree(centres).query_pairs(gap, p=np.inf, output_type="ndarray")
        if not len(pairs):
            break
        first, second = pairs.T
        apart = centres[second] - centres[first]
        overlap = gap - np.abs(apart)
        shorter = np.argmin(overlap, axis=1)
        rows = np.arange(len(first))
        push = 0.5 * overlap[rows, shorter] * np.where(apart[rows, shorter] < 0, -1, 1)
        moved = np.concatenate([2 * first + shorter, 2 * second + shorter])  # places in the flat array
        shift = np.bincount(moved, np.concatenate([-push, push]), minlength=centres.size)
        centres = np.clip(centres + shift.reshape(centres.shape), low, high)
    return centres


def hull(points: np.ndarray) -> np.ndarray:
    """Convex hull of points in the plane, counter-clockwise (Andrew's monotone chain).

    Parameters
    ----------
    points : ndarray, shape (N, 2)

    Returns
    -------
    ndarray, shape (M, 2)
        Corners; M < 3 where the points lie on a line.
    """
    ordered = [tuple(point) for point in np.unique(points, axis=0)]

    def chain(along: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        corners: list[tuple[float, ...]] = []
        for x, y in along:
            while len(corners) >= 2:
                (ax, ay), (bx, by) = corners[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                corners.pop()
            corners.append((x, y))
        return corners[:-1]

    if len(ordered) < 3:
        return np.array(ordered).reshape(-1, 2)
    return np.array(chain(ordered) + chain(ordered[::-1])).reshape(-1, 2)


def area(ring: np.ndarray) -> float:
    """Area of a polygon with corners `ring`, shape (M, 2), counter-clockwise."""
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) / 2)


def corners(centres: np.ndarray, side: float) -> np.ndarray:
    """Return the corner points of thumbnails of `side` around `centres`, shape (4 F, 2)."""
    offsets = 0.6 * side * np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    return (centres[:, None, :] + offsets).reshape(-1, 2)

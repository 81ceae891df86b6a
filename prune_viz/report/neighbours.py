"""Who else fires on a filter's stimulus, and which filters respond alike."""

from __future__ import annotations

import numpy as np

SHOWN = 6  # filters of each kind


def firing(responses: np.ndarray) -> list[list[tuple[int, float]]]:
    """For each stimulus the other filters that fire most on it, as shares of their own strongest response."""
    finite = np.nan_to_num(responses.astype(np.float32), posinf=0.0, neginf=0.0)
    peaks = finite.max(axis=0)
    shares = np.where(peaks > 0, finite / np.where(peaks > 0, peaks, 1), 0)
    return _strongest(shares)


def similar(responses: np.ndarray) -> list[list[tuple[int, float]]]:
    """For each filter those whose responses to all stimuli are most alike: the cosine of their profiles."""
    finite = np.nan_to_num(responses.astype(np.float64), posinf=0.0, neginf=0.0)
    lengths = np.linalg.norm(finite, axis=0)
    unit = finite / np.where(lengths > 0, lengths, 1)
    return _strongest(unit.T @ unit)


def _strongest(shares: np.ndarray) -> list[list[tuple[int, float]]]:
    """The largest few of each row but the diagonal, above zero."""
    count = len(shares)
    apart = shares.copy()
    np.fill_diagonal(apart, -1)
    shown = min(SHOWN, count - 1)
    if shown < 1:
        return [[] for _ in range(count)]
    order = np.argsort(-apart, axis=1, kind="stable")[:, :shown]
    largest = np.take_along_axis(apart, order, axis=1).clip(max=1)
    return [
        [(other, share) for other, share in zip(others, row, strict=True) if share > 0]
        for others, row in zip(order.tolist(), largest.tolist(), strict=True)
    ]

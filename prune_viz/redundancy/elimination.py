"""Rebuilding channels from others, on second moments alone: regressions and backward elimination.

With ``G = E[v v']`` the second moments of a group's channels and a constant, the residual of channel j
given all others is ``1 / (G^-1)_jj``. Backward elimination removes the channel whose loss its consumers feel
least, downdates ``G^-1`` by a rank, and moves the removed channel's outgoing weights onto those that rebuild
it, so that the damage of further removals is that to the merged network. The losses of one elimination are
orthogonal; they add (taps of a wide consumer taken as independent).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_REPRESENTATIVES = 8
MERGE_RIDGE = 1e-4  # of a kept channel's own mean square, where all of them rebuild what is removed
RIDGE = 1e-9  # of a channel's own mean square


def eliminate(
    gram: np.ndarray, weight_gram: np.ndarray, ridge: float = RIDGE, first: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """Backward elimination of channels by damage, merging as it goes.

    Parameters
    ----------
    gram : ndarray, shape (n + 1, n + 1)
        Second moments of n channels and a constant, the constant last; it is never removed.
    weight_gram : ndarray, shape (n, n)
        What the consumers make of the channels, in units of damage.
    ridge : float
        What is added to the Gram matrix, as a share of each channel's own mean square.
    first : sequence of int
        Channels that go before all others, in this order; fewer than n.

    Returns
    -------
    order : list of int
        The n - 1 channels that can go: `first`, and then the least missed first.
    damage : list of float
        Total damage once that channel and all before it are gone, not decreasing.
    """
    count = len(weight_gram)
    inverse = invert(gram, ridge)
    weight_gram = np.pad(weight_gram, (0, 1)).astype(np.float64)
    alive = np.ones(count + 1, dtype=bool)
    alive[-1] = False
    order: list[int] = []
    total, damages = 0.0, []
    for step in range(count - 1):
        residual = 1.0 / np.maximum(np.diag(inverse), 1e-300)
        loss = np.where(alive, np.diag(weight_gram).clip(min=0) * residual, np.inf)
        gone = int(first[step]) if step < len(first) else int(loss.argmin())
        total += float(loss[gone])
        order.append(gone)
        damages.append(total)
        alive[gone] = False
        column = inverse[:, gone].copy()
        # What rebuilds it: the regression of the removed channel on all that is left.
        weights = -column / column[gone]
        weights[gone] = 0.0
        inverse -= np.outer(column, column) / column[gone]
        inverse[gone, :] = inverse[:, gone] = 0.0
        inverse[gone, gone] = 1e-300
        shared = weight_gram[:, gone].copy()
        shared[gone] = 0.0
        weight_gram += np.outer(weights, shared) + np.outer(shared, weights)
        weight_gram += weight_gram[gone, gone] * np.outer(weights, weights)
        weight_gram[gone, :] = weight_gram[:, gone] = 0.0
    return order, damages


def invert(gram: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Inverse of second moments, scaled to unit diagonal and steadied by a small ridge."""
    diagonal = np.diag(gram).copy()
    floor = 1e-12 * max(float(np.median(diagonal)), 1e-30)
    scale = np.sqrt(np.maximum(diagonal, floor))
    scaled = gram / np.outer(scale, scale)
    scaled[np.diag_indices_from(scaled)] += ridge
    return np.asarray(np.linalg.inv(scaled) / np.outer(scale, scale))


def rebuild(channel: int, kept: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Rebuild a channel from a few kept ones: orthogonal matching pursuit on second moments.

    Parameters
    ----------
    channel : int
        The channel to rebuild.
    kept : ndarray of int
        Channels that may be used.
    gram : ndarray, shape (n + 1, n + 1)
        Second moments of the channels and a constant, the constant last.

    Returns
    -------
    ndarray, shape (n + 1,)
        Least-squares weights, zero but for at most `MAX_REPRESENTATIVES` channels and the constant.
    """
    constant = len(gram) - 1
    mean = gram[:, constant]
    covariance = gram - np.outer(mean, mean)
    target = covariance[channel, channel]
    weights = np.zeros(len(gram))
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0))
    usable = kept[deviation[kept] > 1e-6 * max(float(deviation.max()), 1e-30)]
    chosen: list[int] = []
    left = covariance[channel].copy()
    solution = np.zeros(0)
    residual = target
    while len(chosen) < MAX_REPRESENTATIVES and len(usable) and residual > 1e-7 * target and target > 0:
        gain = np.abs(left[usable]) / deviation[usable]
        gain[np.isin(usable, chosen)] = 0.0
        best = int(usable[gain.argmax()])
        if gain.max() <= 1e-6 * deviation[channel]:
            break
        chosen.append(best)
        block = covariance[np.ix_(chosen, chosen)]
        steady = block + RIDGE * np.diag(np.diag(block))
        solution = np.linalg.solve(steady, covariance[chosen, channel])
        left = covariance[channel] - solution @ covariance[chosen]
        residual = target - 2 * solution @ covariance[chosen, channel] + solution @ block @ solution
    weights[chosen] = solution
    weights[constant] = mean[channel] - weights[:constant] @ mean[:constant]
    return weights


def rebuild_all(removed: Sequence[int], kept: Sequence[int], gram: np.ndarray) -> np.ndarray:
    """Rebuild removed channels from all kept ones and a constant: least squares on second moments.

    Parameters
    ----------
    removed, kept : sequence of int
        Channels.
    gram : ndarray, shape (n + 1, n + 1)
        Second moments of the channels and a constant, the constant last.

    Returns
    -------
    ndarray, shape (len(removed), len(kept) + 1)
        Weights of the kept channels and the constant.
    """
    basis = [*kept, len(gram) - 1]
    block = gram[np.ix_(basis, basis)].astype(np.float64)
    floor = 1e-12 * max(float(np.median(np.diag(block))), 1e-30)
    block[np.diag_indices_from(block)] += MERGE_RIDGE * np.diag(block) + floor
    return np.asarray(np.linalg.solve(block, gram[np.ix_(basis, list(removed))]).T)

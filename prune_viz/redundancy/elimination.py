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
_BLOCK = 64  # channels that go before the matrices are brought up to date


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
    left = np.arange(count + 1)  # channels of the rows that are left, and the constant
    order: list[int] = []
    damages: list[float] = []
    while len(order) < count - 1:
        steps = min(_BLOCK, count - 1 - len(order))
        ahead = [int(np.searchsorted(left, one)) for one in first[len(order) : len(order) + steps]]
        gone, losses = _eliminate_block(inverse, weight_gram, steps, ahead)
        order += left[gone].tolist()
        damages += losses
        stays = np.delete(np.arange(len(left)), gone)
        left, inverse, weight_gram = (
            left[stays],
            *(one[np.ix_(stays, stays)] for one in (inverse, weight_gram)),
        )
    return order, np.cumsum(damages).tolist()


def _eliminate_block(
    inverse: np.ndarray, weight_gram: np.ndarray, steps: int, first: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Eliminate some channels; both matrices are brought up to date in place once all are gone.

    A step needs the diagonals and one column of each matrix. So its changes, of rank one and two, are kept
    aside, and the columns are corrected by them: many changes at once are a product of matrices, and a
    matrix too large for the cache is not written at every step.

    Returns
    -------
    gone : list of int
        Rows in the order in which they go.
    losses : list of float
        What each adds to the damage.
    """
    size = len(inverse)
    columns, weights, shares = (np.zeros((size, steps)) for _ in range(3))
    pivots = np.ones(steps)
    residual, felt = np.diag(inverse).copy(), np.diag(weight_gram).copy()
    alive = np.ones(size, dtype=bool)
    alive[-1] = False
    gone: list[int] = []
    losses: list[float] = []
    loss = np.full(size, np.inf)
    for step in range(steps):
        loss[alive] = felt[alive].clip(min=0) / np.maximum(residual[alive], 1e-300)
        one = first[step] if step < len(first) else int(loss.argmin())
        losses.append(float(loss[one]))
        before = slice(step)
        column = inverse[:, one] - columns[:, before] @ (columns[one, before] / pivots[before])
        shared = weight_gram[:, one] + weights[:, before] @ shares[one, before]
        shared += shares[:, before] @ weights[one, before]
        alive[one], loss[one] = False, np.inf
        column[gone] = shared[gone] = 0.0
        # What rebuilds it: the regression of the removed channel on all that is left.
        weight = -column / column[one]
        weight[one] = 0.0
        own = shared[one]
        shared[one] = 0.0
        share = shared + own / 2 * weight
        columns[:, step], pivots[step], weights[:, step], shares[:, step] = column, column[one], weight, share
        residual -= column**2 / column[one]
        felt += 2 * weight * share
        gone.append(one)
    inverse -= (columns / pivots) @ columns.T
    moved = weights @ shares.T
    weight_gram += moved
    weight_gram += moved.T
    return gone, losses


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

    def covariance(channels: Sequence[int]) -> np.ndarray:
        """Some rows of the covariance; all of it would cost far more than what is made of them."""
        return gram[channels] - np.outer(mean[channels], mean)

    own = covariance([channel])[0]
    target = own[channel]
    weights = np.zeros(len(gram))
    deviation = np.sqrt(np.maximum(np.diag(gram) - mean**2, 0))
    usable = kept[deviation[kept] > 1e-6 * max(float(deviation.max()), 1e-30)]
    chosen: list[int] = []
    left = own
    solution = np.zeros(0)
    residual = target
    while len(chosen) < MAX_REPRESENTATIVES and len(usable) and residual > 1e-7 * target and target > 0:
        gain = np.abs(left[usable]) / deviation[usable]
        gain[np.isin(usable, chosen)] = 0.0
        best = int(usable[gain.argmax()])
        if gain.max() <= 1e-6 * deviation[channel]:
            break
        chosen.append(best)
        named = covariance(chosen)
        block, wanted = named[:, chosen], named[:, channel]
        steady = block + RIDGE * np.diag(np.diag(block))
        solution = np.linalg.solve(steady, wanted)
        left = own - solution @ named
        residual = target - 2 * solution @ wanted + solution @ block @ solution
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

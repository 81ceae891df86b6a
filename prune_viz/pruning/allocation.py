"""How a budget is shared among coupling groups: how many channels of each go.

What is dead or redundant stands first in every group's removal order, and goes first of all. What more is
asked goes where it costs least damage for what it saves, over the whole network. Where measuring a run's
budgets says otherwise, every group loses the same share of its channels instead, its flagged ones at least.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from prune_viz.pruning.rankings import Ranking, Saving
from prune_viz.runs.decisions_json import Allocation
from prune_viz.utils.errors import UserError

_SHARES = 1000  # how finely an even share is searched for
_STEPS = 64  # in which a group's channels go at most, over the whole network

Counts = dict[int, int]  # channels that go, by the group's number


def counts_for_tolerance(rankings: Sequence[Ranking], tolerance: float, round_to: int = 1) -> Counts:
    """How many channels each group can lose before its predicted damage passes `tolerance`, in its unit.

    Of a group that loses some a multiple of `round_to` stays.
    """
    counts = {}
    for ranking in rankings:
        bearable = int(np.searchsorted(ranking.damage, tolerance, side="right"))
        # One more, lowered, is the most that is not above and leaves a multiple.
        counts[ranking.number] = ranking.lower_count(bearable + 1, round_to)
    return counts


def counts_for_share(
    saving: Saving, wanted: float, allocation: Allocation = Allocation.DAMAGE, round_to: int = 1
) -> Counts:
    """How many channels each group loses so that a share of something is saved.

    Parameters
    ----------
    saving : Saving
        What is to be saved: filters or multiply-accumulates.
    wanted : float
        The share of it, above 0 and below 1.
    allocation : Allocation
        How it is shared among the groups.
    round_to : int
        Of a group that loses channels a multiple of this stays.

    Returns
    -------
    dict of int to int
        By the group's number.

    Raises
    ------
    UserError
        If that much cannot go.
    """
    rankings = saving.rankings
    flagged = {one.number: one.lower_count(one.flagged + 1, round_to) for one in rankings}
    if saving.of(flagged) >= wanted:
        least = {one.number: 0 for one in rankings}
        counts = _least_damage(saving, wanted, least, flagged, round_to)
    else:
        least = flagged
        most = {one.number: one.count(1.0, round_to) for one in rankings}
        if saving.of(most) < wanted:
            left = f" and leave multiples of {round_to}" if round_to > 1 else ""
            share = f"at most {saving.of(most):.1%} of the {saving.what} of this network"
            raise UserError(f"{share} can go{left}; ask for less")
        if allocation is Allocation.EVEN:
            counts = _even_shares(saving, wanted, flagged, round_to)
        else:
            counts = _least_damage(saving, wanted, flagged, most, round_to)
    return _keep_what_can_stay(saving, counts, wanted, least, round_to)


def _even_shares(saving: Saving, wanted: float, least: Mapping[int, int], round_to: int) -> Counts:
    """The smallest even share of every group's channels that saves what is wanted, but at least `least`."""

    def counts_at(step: int) -> Counts:
        return {
            one.number: max(one.count(step / _SHARES, round_to), least[one.number]) for one in saving.rankings
        }

    low, high = 0, _SHARES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saving.of(counts_at(middle)) >= wanted else (middle + 1, high)
    return counts_at(low)


def _least_damage(
    saving: Saving, wanted: float, start: Mapping[int, int], most: Mapping[int, int], round_to: int
) -> Counts:
    """Go on from `start` where a step costs least damage for what it saves, until what is wanted is saved.

    A step takes up to a part in `_STEPS` of a group's channels; of several ahead, the one with the best price
    counts, so that one costly channel before cheap ones does not stop a group for good.
    """
    counts, saved = dict(start), saving.of(start)

    def offer(one: Ranking) -> tuple[float, int, int] | None:
        """The best price of a step of a group, its number, and the count that it leads to."""
        now, found = counts[one.number], []
        step = max(1, -(-one.channels // _STEPS), round_to)
        for ahead in (step, 4 * step, 16 * step):
            reached = min(one.raise_count(min(now + ahead, one.channels), round_to), most[one.number])
            gain = saving.of({**counts, one.number: reached}) - saved if reached > now else 0.0
            if gain > 0:
                price = (one.damage_of_first(reached) - one.damage_of_first(now)) / gain
                found.append((price, one.number, reached))
        return min(found, default=None)

    of_number = {one.number: one for one in saving.rankings}
    heap = [found for one in saving.rankings if (found := offer(one))]
    heapq.heapify(heap)
    while heap and saved < wanted:
        # What others lost since makes a step save less, never more: a price can only have risen.
        found = offer(of_number[heapq.heappop(heap)[1]])
        if found is None:
            continue
        if heap and found > heap[0]:
            heapq.heappush(heap, found)
            continue
        reached = {**counts, found[1]: found[2]}
        saved = saving.of(reached)
        counts = reached if saved < wanted else _last_step(saving, wanted, counts, most, round_to)
        if after := offer(of_number[found[1]]):
            heapq.heappush(heap, after)
    return counts


def _last_step(
    saving: Saving, wanted: float, counts: Counts, most: Mapping[int, int], round_to: int
) -> Counts:
    """Counts raised in the one group where reaching what is wanted costs least."""
    found = []
    for one in saving.rankings:
        now = counts[one.number]
        every = sorted({one.raise_count(count, round_to) for count in range(now + 1, most[one.number] + 1)})
        place = bisect_left(every, wanted, key=lambda count: saving.of({**counts, one.number: count}))
        if place < len(every):
            cost = one.damage_of_first(every[place]) - one.damage_of_first(now)
            found.append((cost, one.number, every[place]))
    _, number, count = min(found)
    return {**counts, number: count}


def _keep_what_can_stay(
    saving: Saving, counts: Counts, wanted: float, least: Mapping[int, int], round_to: int
) -> Counts:
    """Counts of which none above `least` can be lowered: a step is kept where that spares most damage."""
    losing = [one for one in saving.rankings if counts[one.number] > least[one.number]]
    while losing:
        lower = {one.number: one.lower_count(counts[one.number], round_to) for one in losing}
        best = max(losing, key=lambda one: one.damage_of(counts) - one.damage_of(lower))
        offer = {**counts, best.number: lower[best.number]}
        fits = saving.of(offer) >= wanted
        if fits:
            counts = offer
        if not fits or counts[best.number] <= least[best.number]:
            losing = [one for one in losing if one is not best]
    return counts

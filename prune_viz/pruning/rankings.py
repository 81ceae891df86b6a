"""Coupling groups with their removal order, its damage, and what removal saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prune_viz.channels.groups import Places
from prune_viz.runs.decisions_json import Decisions, GroupRecord, VerdictRecord


@dataclass(frozen=True)
class Ranking:
    """A coupling group whose channels were ranked.

    Attributes
    ----------
    number : int
        The group's number.
    channels : int
        How many channels it has.
    order : list of int
        Its channels but the last to stay, the least missed first.
    damage : list of float
        Predicted damage of having removed that channel and all before it.
    filters : dict of str to ndarray, each shape (channels, K)
        For each layer tied to the group, the filters at each channel (`Places.table`); -1 where it has none.
    reads : dict of str to float
        For each module that reads the group, the share of its inputs that are the group's.
    norms : list of Places
        Norms that the channels pass.
    flagged : int
        How many channels at the head of the order are redundant or dead.
    """

    number: int
    channels: int
    order: list[int]
    damage: list[float]
    filters: dict[str, np.ndarray]
    reads: dict[str, float]
    norms: list[Places]
    flagged: int = 0

    def count(self, share: float, round_to: int) -> int:
        """How many channels can go for at most a share of them, a multiple of `round_to` staying."""
        return self.lower_count(min(round(share * self.channels), len(self.order)) + 1, round_to)

    def lower_count(self, count: int, round_to: int) -> int:
        """The next smaller number of channels to remove, of those that leave a multiple of `round_to`."""
        return self.channels - min((self.channels - count) // round_to * round_to + round_to, self.channels)

    def raise_count(self, count: int, round_to: int) -> int:
        """The smallest number of channels to remove, not below `count`, that leaves a multiple."""
        return self.channels - (self.channels - count) // round_to * round_to

    def damage_of_first(self, count: int) -> float:
        """Predicted damage of losing the first so many channels of the order."""
        return self.damage[count - 1] if count else 0.0

    def damage_of(self, counts: Mapping[int, int]) -> float:
        """Predicted damage of losing so many channels, by the group's number."""
        return self.damage_of_first(counts[self.number])


def read_rankings(decisions: Decisions) -> list[Ranking]:
    """The ranked groups that `decisions.json` holds."""
    orders = {entry.group: entry for entry in decisions.removal_order if entry.channels}
    rankings = []
    for group in decisions.groups:
        if group.id not in orders:
            continue
        filters = {
            producer.layer: Places(
                producer.layer, np.array(producer.filters, int), np.array(producer.channels, int)
            ).table(group.channels)
            for producer in group.producers
        }
        entry = orders[group.id]
        reads = {consumer.module: consumer.share for consumer in group.reads}
        norms = [
            Places(norm.module, np.array(norm.indices, int), np.array(norm.channels, int))
            for norm in group.norms
        ]
        order, damage = list(entry.channels), list(entry.damage)
        flagged = _flagged(group, decisions.verdicts)
        first = next((place for place, one in enumerate(order) if one not in flagged), len(order))
        rankings.append(Ranking(group.id, group.channels, order, damage, filters, reads, norms, first))
    return rankings


def _flagged(group: GroupRecord, verdicts: Sequence[VerdictRecord]) -> set[int]:
    """Channels of a group on which there is a verdict."""
    channel_of = {
        (producer.layer, number): channel
        for producer in group.producers
        for number, channel in zip(producer.filters, producer.channels, strict=True)
    }
    named = ((one.layer, one.filter) for one in verdicts)
    return {channel_of[one] for one in named if one in channel_of}


class Saving:
    """What is saved by removing the first channels of groups.

    Parameters
    ----------
    rankings : sequence of Ranking
        The groups.
    macs : mapping of str to int, optional
        Multiply-accumulates of each module of the whole network, of which a share is saved; without them
        it is filters.
    filters : int
        How many filters the network has.
    """

    def __init__(
        self, rankings: Sequence[Ranking], macs: Mapping[str, int] | None = None, filters: int = 0
    ) -> None:
        self.rankings = rankings
        self.what = "filters" if macs is None else "multiply-accumulates"
        self._filters = filters
        self._costs = None if macs is None else np.array(list(macs.values()), dtype=float)
        self.whole = filters if macs is None else sum(macs.values())
        place = {} if macs is None else {name: index for index, name in enumerate(macs)}
        self._gone: dict[int, np.ndarray] = {}  # filters gone with the first so many channels
        self._written: dict[int, list[tuple[int, np.ndarray]]] = {}
        self._read: dict[int, list[tuple[int, float]]] = {}
        for ranking in rankings:
            there = {
                layer: np.cumsum([0, *(placed[ranking.order] >= 0).sum(axis=1)])
                for layer, placed in ranking.filters.items()
            }
            self._gone[ranking.number] = sum(there.values(), np.zeros(len(ranking.order) + 1, int))
            self._written[ranking.number] = [
                (place[layer], gone / (ranking.filters[layer] >= 0).sum())
                for layer, gone in there.items()
                if layer in place
            ]
            self._read[ranking.number] = [
                (place[module], share / ranking.channels)
                for module, share in ranking.reads.items()
                if module in place
            ]

    def removed_filters(self, counts: Mapping[int, int]) -> int:
        """How many filters go with so many channels of each group."""
        return sum(int(self._gone[one.number][counts[one.number]]) for one in self.rankings)

    def left(self, counts: Mapping[int, int]) -> float:
        """Multiply-accumulates that are left: a module's fall with its filters and with what it reads."""
        if self._costs is None:
            return float(self._filters - self.removed_filters(counts))
        written, read = np.ones(len(self._costs)), np.ones(len(self._costs))
        for ranking in self.rankings:
            count = counts[ranking.number]
            for index, gone in self._written[ranking.number] if count else ():
                written[index] -= gone[count]
            for index, share in self._read[ranking.number] if count else ():
                read[index] -= share * count
        return float(self._costs @ (written * read))

    def of(self, counts: Mapping[int, int]) -> float:
        """Share that is saved with so many channels of each group gone; 0 of nothing."""
        return 1 - self.left(counts) / self.whole if self.whole else 0.0

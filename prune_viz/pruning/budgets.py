"""Masks for any budget from one analysis: how many channels of each coupling group are removed, and which.

Every group has its removal order, the least missed channel first. A share of filters or of
multiply-accumulates is spread evenly: each group loses the same share of its channels, and what rounding
took too much is kept where it is missed most. A tolerance is spread as damage: each group goes as far
down its order as the predicted damage allows. What is removed is rebuilt from all that its group keeps, by
least squares on the second moments over the calibration images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prune_viz.calibration.images import read_calibration_images
from prune_viz.channels.groups import NormChannel, Places, norm_channels
from prune_viz.pruning.masks import Masks, read_beside, save_masks
from prune_viz.redundancy.elimination import rebuild_all
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.decisions_json import Decisions, Merge
from prune_viz.runs.fingerprint import Origin
from prune_viz.runs.run_directory import RunDirectory, merges_beside
from prune_viz.utils.errors import UserError

_SHARES = 1000  # how finely an even share is searched for


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
    """

    number: int
    channels: int
    order: list[int]
    damage: list[float]
    filters: dict[str, np.ndarray]
    reads: dict[str, float]
    norms: list[Places]

    def count(self, share: float, round_to: int) -> int:
        """How many channels to remove for a share of them to go, a multiple of `round_to` staying."""
        left = round_to * round((1 - share) * self.channels / round_to)
        return self.channels - min(max(left, round_to, self.channels - len(self.order)), self.channels)

    def lower_count(self, count: int, round_to: int) -> int:
        """The next smaller number of channels to remove, of those that leave a multiple of `round_to`."""
        return self.channels - min((self.channels - count) // round_to * round_to + round_to, self.channels)

    def damage_of(self, counts: Mapping[int, int]) -> float:
        """Predicted damage of losing so many channels."""
        count = counts[self.number]
        return self.damage[count - 1] if count else 0.0


def write_masks(
    run: Path,
    out: Path | None = None,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    tolerance: float | None = None,
    round_to: int = 1,
) -> list[str]:
    """Write masks for a budget from what a run directory holds; without a budget, those of its verdicts.

    Parameters
    ----------
    run : Path
        A run directory.
    out : Path, optional
        Where to write; the run's own ``masks.pt`` by default. What makes up for the filters is written
        beside it: the merges, and outside the run its synthetic images.
    ratio, macs, tolerance : float, optional
        At most one of them: share of the filters, share of the multiply-accumulates, predicted damage.
    round_to : int
        Of a group that loses channels for such a budget, a multiple of this stays.

    Returns
    -------
    list of str
        For people: what was done.

    Raises
    ------
    UserError
        If the run is not complete or the budget asks for more than can go.
    """
    directory = RunDirectory(run)
    decisions = directory.read_decisions()
    filters, costs = decisions.filters, decisions.macs
    rankings = read_rankings(decisions)
    if not rankings and (ratio, macs, tolerance) != (None, None, None):
        raise UserError("no filter of this run was judged, so no budget can be met; filters.csv says why")
    counts = None
    if ratio is not None:
        counts = counts_for_ratio(rankings, ratio, sum(filters.values()), round_to)
    elif macs is not None:
        counts = counts_for_macs(rankings, macs, costs, round_to)
    elif tolerance is not None:
        counts = counts_for_tolerance(rankings, tolerance, round_to)
    out = out or directory.masks_file
    inside = out.resolve().parent == directory.path.resolve()
    masks = read_beside(directory.decisions_file)
    if counts is None:
        masks.update(_masks_of_verdicts(decisions))
    else:
        unit = decisions.damage_unit
        masks = masks_for_counts(
            rankings, counts, directory.read_gram_matrices(), filters, masks.origin, unit
        )
    if not inside:
        masks.calibration_images = read_calibration_images(directory.calibration_images_file)
    save_masks(masks, out)
    if inside and counts is None:
        merges_beside(out).unlink(missing_ok=True)  # decisions.json says the same
    lines = [f"{masks.removed:,} of {masks.filters:,} filters go ({masks.removed / masks.filters:.1%})"]
    if counts is not None:
        saved = share_saved(rankings, counts, costs)
        lines.append(f"that saves {saved:.1%} of {sum(costs.values()):,} multiply-accumulates")
        worst = max(rankings, key=lambda ranking: ranking.damage_of(counts), default=None)
        if worst is not None:
            most = Damage(worst.damage_of(counts), decisions.damage_unit)
            lines.append(f"predicted damage of a group: at most {most}, at {next(iter(worst.filters))}")
    return [*lines, f"written to {out}"]


def _masks_of_verdicts(decisions: Decisions) -> dict[str, torch.Tensor]:
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in decisions.filters.items()}
    for verdict in decisions.verdicts:
        masks[verdict.layer][verdict.filter] = False
    return masks


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
        rankings.append(Ranking(group.id, group.channels, order, damage, filters, reads, norms))
    return rankings


def counts_for_tolerance(rankings: Sequence[Ranking], tolerance: float, round_to: int = 1) -> dict[int, int]:
    """How many channels each group can lose before its predicted damage passes `tolerance`, in its unit.

    Of a group that loses some a multiple of `round_to` stays.
    """
    counts = {}
    for ranking in rankings:
        bearable = int(np.searchsorted(ranking.damage, tolerance, side="right"))
        # One more, lowered, is the most that is not above and leaves a multiple.
        counts[ranking.number] = ranking.lower_count(bearable + 1, round_to)
    return counts


def counts_for_ratio(
    rankings: Sequence[Ranking], ratio: float, filters: int, round_to: int = 1
) -> dict[int, int]:
    """How many channels each group loses so that a share `ratio` of `filters` goes, evenly spread.

    Of a group that loses some a multiple of `round_to` stays.
    """

    def share_of_filters(counts: Mapping[int, int]) -> float:
        return removed_filters(rankings, counts) / filters

    return _evenly(rankings, ratio, share_of_filters, "filters", round_to)


def counts_for_macs(
    rankings: Sequence[Ranking], ratio: float, macs: Mapping[str, int], round_to: int = 1
) -> dict[int, int]:
    """How many channels each group loses so that a share `ratio` of the MACs goes, evenly spread.

    Parameters
    ----------
    rankings : sequence of Ranking
        The groups.
    ratio : float
        Share of the multiply-accumulates to save, above 0 and below 1.
    macs : mapping of str to int
        MACs of each module of the whole network.
    round_to : int
        Of a group that loses channels a multiple of this stays.
    """

    def share_of_macs(counts: Mapping[int, int]) -> float:
        return share_saved(rankings, counts, macs)

    return _evenly(rankings, ratio, share_of_macs, "multiply-accumulates", round_to)


def removed_filters(rankings: Sequence[Ranking], counts: Mapping[int, int]) -> int:
    """How many filters go with so many channels of each group."""
    removed = 0
    for ranking in rankings:
        gone = ranking.order[: counts[ranking.number]]
        removed += sum(int((filters[gone] >= 0).sum()) for filters in ranking.filters.values())
    return removed


def macs_left(rankings: Sequence[Ranking], counts: Mapping[int, int], macs: Mapping[str, int]) -> float:
    """Multiply-accumulates that are left: a module's fall with its filters and with what it reads."""
    written = dict.fromkeys(macs, 1.0)
    read = dict.fromkeys(macs, 1.0)
    for ranking in rankings:
        gone = ranking.order[: counts[ranking.number]]
        for layer, filters in ranking.filters.items():
            if layer in written:
                written[layer] -= float((filters[gone] >= 0).sum() / (filters >= 0).sum())
        for module, share in ranking.reads.items():
            if module in read:
                read[module] -= share * len(gone) / ranking.channels
    return sum(cost * written[name] * read[name] for name, cost in macs.items())


def share_saved(rankings: Sequence[Ranking], counts: Mapping[int, int], macs: Mapping[str, int]) -> float:
    """Share of the multiply-accumulates that is saved with so many channels of each group gone; 0 of none."""
    total = sum(macs.values())
    return 1 - macs_left(rankings, counts, macs) / total if total else 0.0


def _evenly(
    rankings: Sequence[Ranking],
    wanted: float,
    saved: Callable[[Mapping[int, int]], float],
    what: str,
    round_to: int,
) -> dict[int, int]:
    """The smallest even share of channels that saves what is wanted, less what can then be kept."""

    def counts_at(step: int) -> dict[int, int]:
        return {ranking.number: ranking.count(step / _SHARES, round_to) for ranking in rankings}

    low, high = 0, _SHARES
    if saved(counts_at(high)) < wanted:
        most = saved(counts_at(high))
        left = f" and leave multiples of {round_to}" if round_to > 1 else ""
        raise UserError(f"at most {most:.1%} of the {what} of this network can go{left}; ask for less")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saved(counts_at(middle)) >= wanted else (middle + 1, high)
    return _give_back(rankings, counts_at(low), wanted, saved, round_to)


def _give_back(
    rankings: Sequence[Ranking],
    counts: dict[int, int],
    wanted: float,
    saved: Callable[[Mapping[int, int]], float],
    round_to: int,
) -> dict[int, int]:
    """Counts of which none can be lowered: one step at a time goes back where that spares most damage."""
    losing = [ranking for ranking in rankings if counts[ranking.number]]
    while losing:
        lower = {one.number: one.lower_count(counts[one.number], round_to) for one in losing}
        best = max(losing, key=lambda one: one.damage_of(counts) - one.damage_of(lower))
        offer = {**counts, best.number: lower[best.number]}
        fits = saved(offer) >= wanted
        if fits:
            counts = offer
        if not fits or not counts[best.number]:
            losing = [one for one in losing if one is not best]
    return counts


def masks_for_counts(
    rankings: Sequence[Ranking],
    counts: Mapping[int, int],
    gram_matrices: Mapping[int, np.ndarray],
    filters: Mapping[str, int],
    origin: Origin,
    unit: Unit,
) -> Masks:
    """Masks that remove so many channels of each group, with the merges that make up for them.

    Parameters
    ----------
    rankings : sequence of Ranking
        The groups.
    counts : mapping of int to int
        Channels to remove, by the group's number.
    gram_matrices : mapping of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of each group's channels and a constant.
    filters : mapping of str to int
        How many filters each layer of the network has.
    origin : Origin
        The model that was analysed.
    unit : Unit
        Of the groups' damage.
    """
    channels = {ranking.number: ranking.order[: counts[ranking.number]] for ranking in rankings}
    predicted = Damage(sum(ranking.damage_of(counts) for ranking in rankings), unit)
    return masks_for_channels(rankings, channels, gram_matrices, filters, origin, predicted)


def masks_for_channels(
    rankings: Sequence[Ranking],
    channels: Mapping[int, Sequence[int]],
    gram_matrices: Mapping[int, np.ndarray],
    filters: Mapping[str, int],
    origin: Origin,
    predicted: Damage,
) -> Masks:
    """Masks that remove such channels of each group, with the merges that make up for them.

    Parameters
    ----------
    channels : mapping of int to sequence of int
        Channels to remove, by the group's number.
    predicted : Damage
        What that is predicted to cost.
    rankings, gram_matrices, filters, origin
        As `masks_for_counts`.
    """
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in filters.items()}
    merges: list[Merge] = []
    passed: list[NormChannel] = []
    for ranking in rankings:
        gone = channels.get(ranking.number, [])
        if not len(gone):
            continue
        producers = [
            Places(layer, placed[placed >= 0], np.nonzero(placed >= 0)[0])
            for layer, placed in ranking.filters.items()
        ]
        passed += norm_channels(producers, ranking.norms, set(gone))
        for layer, placed in ranking.filters.items():
            own = placed[list(gone)]
            masks[layer][own[own >= 0]] = False
        matrix = gram_matrices.get(ranking.number)
        if matrix is None or matrix.shape != (ranking.channels + 1, ranking.channels + 1):
            raise UserError("moments.safetensors does not fit decisions.json; run analyze again")
        merges += _merges(ranking, gone, matrix)
    return Masks(masks, tuple(merges), origin, predicted=predicted, norm_channels=passed)


def _merges(ranking: Ranking, gone: Sequence[int], gram: np.ndarray) -> list[Merge]:
    """How a group's removed channels are rebuilt from filters of a layer that has them all."""
    whole = next((layer for layer, placed in ranking.filters.items() if (placed[:, 0] >= 0).all()), None)
    if whole is None:
        return []
    kept = sorted(set(range(ranking.channels)) - set(gone))
    weights = rebuild_all(gone, kept, gram)
    placed = ranking.filters[whole][:, 0]
    representatives = tuple(placed[kept].tolist())
    return [
        Merge(whole, int(placed[channel]), representatives, tuple(map(_short, row[:-1])), _short(row[-1]))
        for channel, row in zip(gone, weights, strict=True)
    ]


def _short(number: float) -> float:
    """A number at single precision, so that files of a million of them stay small."""
    return float(f"{number:.7g}")

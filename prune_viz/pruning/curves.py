"""What removal costs, measured: a curve for every coupling group, and whole budgets.

What is predicted from second moments takes errors at different positions to be independent, and the
output to answer in proportion. Neither holds for large removals, so such predictions are far too low. So
some points of every group's curve are measured, and what lies between follows the predicted shape; so
are some whole budgets, each on the images of the fits and on those that no fit saw. The larger of the two
counts. On the images of the fits a group looks too cheap where these are few for its many channels, as
almost anything can then be rebuilt from the rest. On the others, of which there are fewer, a mean rests on
the few of which the network is unsure, and groups that happen to look cheap on these would be chosen.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.copies import plain_copy
from prune_viz.network.tracing import own_norms
from prune_viz.pruning.allocation import counts_for_share
from prune_viz.pruning.compensation import ROUGH_MARGIN
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.pruning.merging import GroupRemoval, Merger, merge_removals
from prune_viz.pruning.rankings import Ranking, Saving
from prune_viz.redundancy.channel_verdicts import GroupVerdicts
from prune_viz.redundancy.elimination import rebuild_all
from prune_viz.runs.decisions_json import Allocation, MeasuredBudget
from prune_viz.utils.devices import in_threads
from prune_viz.utils.errors import UserError
from prune_viz.utils.progress import Progress

SHARES = (0.06, 0.12, 0.25, 0.5, 0.75, 0.95)  # of what is left of a group beside its flagged channels
BUDGETS = (0.1, 0.2, 0.35, 0.5, 0.7)  # of the multiply-accumulates
CLEARLY = 1.25  # how much less even shares must cost
_LEAST = 1e-15  # what a predicted or measured damage counts as at least
_FACTORS = 1 / 4, 16.0  # between a sum of groups' damages and the damage of all


def budget_passes(rough: bool) -> int:
    """How often a network runs on all images to measure budgets."""
    return (1 + rough) * len(Allocation) * len(BUDGETS)


def curve_passes(groups: Sequence[CouplingGroup], rough: bool) -> int:
    """How often a network runs on all images to measure the curves of groups."""
    return (1 + rough) * (len(SHARES) + 1) * len(groups)


def measure_curves(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    meter: OutputMeter,
    kept_out: OutputMeter | None,
    rough: bool,
    progress: Progress,
) -> dict[int, GroupVerdicts]:
    """Bring the predicted damage of every group's removal order to what is measured at some points.

    Parameters
    ----------
    model : nn.Module
        The whole network in eval mode; left unchanged.
    groups : sequence of CouplingGroup
        Those to measure.
    verdicts : mapping of int to GroupVerdicts
        By the group's number, ranked.
    gram_matrices : mapping of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels and a constant.
    meter : OutputMeter
        Measures the network on the images of the fits.
    kept_out : OutputMeter or None
        Measures it on images that nothing was fitted to.
    rough : bool
        Whether merging counts only where it is better by far (`prune_viz.pruning.compensation`).
    progress : Progress
        Shows how the work goes.

    Returns
    -------
    dict of int to GroupVerdicts
        Of all groups, `order_damage` in the meter's unit where it was measured.
    """
    meters = [meter] if kept_out is None else [meter, kept_out]
    norms = own_norms(model)  # found here: tracing changes how modules are called in every thread
    own = threading.local()  # a copy of the network for each thread

    def measured(group: CouplingGroup) -> GroupVerdicts:
        if not hasattr(own, "merger"):
            own.trial = plain_copy(model)
            own.merger = Merger(own.trial, norms)
        ranked = verdicts[group.number]
        points = []
        for count in _counts(ranked):
            removal = removal_of(ranked, ranked.order[:count], gram_matrices[group.number])
            changes = []
            for option in _options([removal], rough):
                with own.merger.on_trial(group, option[0]):
                    changes.append(max(one.change(own.trial) for one in meters))
            points.append((count, changes[_better(changes)]))
        progress.advance()
        return replace(ranked, order_damage=_corrected(ranked.order_damage, points))

    progress.start("curves", len(groups))
    found = in_threads(measured, groups, next(model.parameters()).device)
    progress.finish()
    return {**verdicts, **{group.number: one for group, one in zip(groups, found, strict=True)}}


def _options(removals: Sequence[GroupRemoval], rough: bool) -> list[list[GroupRemoval]]:
    """What is measured of removals: merged, and, where that is rough, with nothing in their place too."""
    unmerged = [removal.unmerged() for removal in removals]
    return [list(removals), unmerged] if rough else [list(removals)]


def _better(changes: Sequence[float]) -> int:
    """Which of `_options` would be applied, by what they change: merging where it is better by far."""
    return len(changes) - 1 if changes[0] * ROUGH_MARGIN > changes[-1] else 0


def removal_of(verdicts: GroupVerdicts, gone: Sequence[int], gram: np.ndarray) -> GroupRemoval:
    """What rebuilds channels that go: of flagged ones alone their representatives, else all that stays."""
    channels = len(gram) - 1
    if set(gone) <= set(verdicts.flagged):
        rows = [verdicts.channels[channel].weights(channels + 1) for channel in gone]
        return GroupRemoval(tuple(gone), torch.from_numpy(np.array(rows).reshape(len(gone), channels + 1)))
    kept = sorted(set(range(channels)) - set(gone))
    weights = np.zeros((len(gone), channels + 1))
    weights[:, [*kept, channels]] = rebuild_all(gone, kept, gram)
    return GroupRemoval(tuple(gone), torch.from_numpy(weights))


def _counts(ranked: GroupVerdicts) -> list[int]:
    """At how many channels a group's curve is measured."""
    most, flagged = len(ranked.order), len(ranked.flagged)
    counts = {flagged, *(flagged + round(share * (most - flagged)) for share in SHARES)}
    return sorted(count for count in counts if 0 < count <= most)


def _corrected(damage: Sequence[float], points: Sequence[tuple[int, float]]) -> list[float]:
    """Predicted damage times what is measured of it, the logarithm of that share straight between points.

    It never falls, and between two points it stays between what was measured at them.
    """
    known = [(count, measured) for count, measured in points if math.isfinite(measured)]
    if not known:
        return list(damage)
    counts = [count for count, _ in known]
    measured = np.maximum.accumulate([max(one, _LEAST) for _, one in known])
    shares = [
        math.log(one / max(damage[count - 1], _LEAST)) for count, one in zip(counts, measured, strict=True)
    ]
    every = np.arange(1, len(damage) + 1)
    found = np.maximum(damage, _LEAST) * np.exp(np.interp(every, counts, shares))
    behind, ahead = np.searchsorted(counts, every, side="right"), np.searchsorted(counts, every)
    least = np.concatenate([[0.0], measured])[behind]
    most = np.concatenate([measured, [np.inf]])[ahead]
    return [float(one) for one in np.maximum.accumulate(found.clip(least, most))]


def measure_budgets(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    rankings: Sequence[Ranking],
    macs: Mapping[str, int],
    meter: OutputMeter,
    kept_out: OutputMeter,
    rough: bool,
    progress: Progress,
) -> tuple[MeasuredBudget, ...]:
    """Try budgets, shared in every way.

    Parameters
    ----------
    rankings : sequence of Ranking
        The groups' removal orders, with the damage that was measured.
    macs : mapping of str to int
        Multiply-accumulates of each module.
    model, groups, verdicts, gram_matrices, meter, kept_out, rough, progress
        As `measure_curves`.
    """
    saving, norms = Saving(rankings, macs), own_norms(model)

    def tried(asked: tuple[float, Allocation]) -> MeasuredBudget | None:
        progress.advance()
        wanted, allocation = asked
        try:
            counts = counts_for_share(saving, wanted, allocation)
        except UserError:  # more than can go
            return None
        losing = [one for one in rankings if counts[one.number]]
        removals = [
            removal_of(verdicts[one.number], one.order[: counts[one.number]], gram_matrices[one.number])
            for one in losing
        ]
        changes = []
        for option in _options(removals, rough):
            numbered = {one.number: removal for one, removal in zip(losing, option, strict=True)}
            changed = merge_removals(plain_copy(model), groups, numbered, norms)
            changes.append((meter.change(changed), kept_out.change(changed)))
        found = changes[_better([max(change) for change in changes])]
        if not math.isfinite(sum(found)):
            return None
        predicted = sum(one.damage_of(counts) for one in rankings)
        return MeasuredBudget(
            allocation, saving.of(counts), saving.removed_filters(counts), predicted, *found
        )

    every = [(wanted, allocation) for wanted in BUDGETS if saving.whole for allocation in Allocation]
    progress.start("budgets", len(every))
    found = in_threads(tried, every, next(model.parameters()).device)
    progress.finish()
    return tuple(one for one in found if one is not None)


def preferred(tried: Sequence[MeasuredBudget], saved: float) -> Allocation:
    """How to share a budget: evenly where that costs clearly less at the nearest one that was tried."""
    costs = {
        allocation: min(own, key=lambda one: abs(one.saved - saved)).cost
        for allocation in Allocation
        if (own := [one for one in tried if one.allocation is allocation])
    }
    even = costs.get(Allocation.EVEN, math.inf)
    return Allocation.EVEN if CLEARLY * even < costs.get(Allocation.DAMAGE, math.inf) else Allocation.DAMAGE


def predicted_total(damage: float, tried: Sequence[MeasuredBudget], allocation: Allocation) -> float:
    """Damage of removing channels of several groups, from the sum of what each group alone costs.

    What is measured of whole budgets says how much more, or less, all together cost than their sum.
    """
    own = sorted(
        (math.log(max(one.predicted, _LEAST)), math.log(max(one.cost, _LEAST)))
        for one in tried
        if one.allocation is allocation
    )
    if not own or damage <= 0:
        return damage
    sums, factors = [one[0] for one in own], [one[1] - one[0] for one in own]
    factor = math.exp(float(np.interp(math.log(damage), sums, factors)))
    return damage * min(max(factor, _FACTORS[0]), _FACTORS[1])

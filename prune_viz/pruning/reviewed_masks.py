"""Masks that follow a review.

A filter on which nothing was decided goes or stays as its verdict says; what goes together, the filters of
one channel, is decided together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from prune_viz.pruning.budgets import finish_masks, masks_for_channels
from prune_viz.pruning.curves import predicted_total
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.outcome import Outcome
from prune_viz.pruning.rankings import Ranking, read_rankings
from prune_viz.pruning.review import KEEP, REMOVE, Filter, Review, read_review
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import Allocation, Decisions
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError, few


@dataclass(frozen=True)
class ReviewedMasks:
    """Masks that follow a review.

    Attributes
    ----------
    masks : Masks
        What goes is rebuilt from all that stays in its group.
    decisions : Decisions
        What the run decided.
    rankings : list of Ranking
        Its ranked groups.
    channels : dict of int to list of int
        Channels of these that go.
    """

    masks: Masks
    decisions: Decisions
    rankings: list[Ranking]
    channels: dict[int, list[int]]


def reviewed_masks(run: RunDirectory, review: Review) -> ReviewedMasks:
    """Make the masks that follow a review.

    Raises
    ------
    UserError
        If decisions on filters that go only together differ, filters are to go that cannot, or nothing of a
        group would be left.
    """
    decisions = run.read_decisions()
    table = run.read_filters()
    damage = dict(zip(zip(table["layer"], table["filter"], strict=True), table["damage"], strict=True))
    going = {(entry.layer, entry.filter) for entry in decisions.verdicts}
    channels, loose = _gone(review, decisions, going)
    rankings = read_rankings(decisions)
    gram_matrices = run.read_gram_matrices() if channels else {}
    masks = masks_for_channels(
        decisions, rankings, channels, gram_matrices, Damage(0.0, decisions.damage_unit)
    )
    for layer, number in loose:
        masks[layer][number] = False
    emptied = next((layer for layer, mask in masks.items() if not mask.any()), None)
    if emptied is not None:
        raise UserError(f"the review leaves no filter of {emptied}; keep one at least")
    masks.predicted = _predicted(channels, decisions, rankings, damage)
    return ReviewedMasks(masks, decisions, rankings, channels)


def _gone(
    review: Review, decisions: Decisions, going: set[Filter]
) -> tuple[dict[int, list[int]], list[Filter]]:
    """Channels that go, by group, and filters that go and are in none."""
    ranked = decisions.ranked
    said: dict[tuple[int, int], dict[str, Filter]] = {}
    gone: set[tuple[int, int]] = set()
    placed: set[Filter] = set()
    for group in decisions.groups:
        for producer in group.producers:
            for number, channel in zip(producer.filters, producer.channels, strict=True):
                one = producer.layer, number
                placed.add(one)
                place = group.id, channel
                decision = review.decisions.get(one)
                if decision is not None:
                    said.setdefault(place, {})[decision] = one
                if decision == REMOVE and not (group.removable and group.id in ranked):
                    why = group.note or "its group was not ranked in this run"
                    raise UserError(f"filter {number} of {producer.layer} cannot be removed: {why}")
                if one in going:
                    gone.add(place)
    for place, decided in said.items():
        if len(decided) > 1:
            pair = few([f"filter {number} of {layer}" for layer, number in decided.values()])
            raise UserError(f"the review keeps and removes what goes only together: {pair}")
        (gone.add if REMOVE in decided else gone.discard)(place)
    loose = {one for one in going if one not in placed} | {
        one for one, decision in review.decisions.items() if decision == REMOVE and one not in placed
    }
    loose -= {one for one, decision in review.decisions.items() if decision == KEEP}
    channels: dict[int, list[int]] = {}
    for number, channel in sorted(gone):
        channels.setdefault(number, []).append(channel)
    return channels, sorted(loose)


def _predicted(
    channels: Mapping[int, Sequence[int]],
    decisions: Decisions,
    rankings: Sequence[Ranking],
    damage: Mapping[Filter, float],
) -> Damage:
    """What removing such channels costs, by the group's number.

    Where a group loses the first channels of its order, what these cost together. Other channels cost no
    less than as many of the first, and no less than what each costs alone.
    """
    ranked = {one.number: one for one in rankings}
    total = 0.0
    for group in decisions.groups:
        gone = set(channels.get(group.id, ()))
        first = ranked[group.id].damage_of_first(len(gone)) if group.id in ranked else 0.0
        if group.id not in ranked or gone != set(ranked[group.id].order[: len(gone)]):
            filter_of = {
                channel: (producer.layer, number)
                for producer in reversed(group.producers)
                for number, channel in zip(producer.filters, producer.channels, strict=True)
            }
            alone = [damage.get(filter_of[channel], np.nan) for channel in gone]
            first = max(first, float(np.nansum(alone)))
        total += first
    return Damage(predicted_total(total, decisions.budgets, Allocation.DAMAGE), decisions.damage_unit)


def write_reviewed_masks(
    run: Path, review: Path, out: Path | None = None, model: nn.Module | None = None
) -> tuple[Outcome, str]:
    """Write the masks that follow a review, by default as the run's own.

    Parameters
    ----------
    run : Path
        A run directory.
    review : Path
        What the report of the run saved.
    out : Path, optional
        Where to write; the run's own ``masks.pt`` by default.
    model : nn.Module, optional
        The network that was analysed; with it the change of its output is measured.

    Returns
    -------
    Outcome
        What the masks do.
    str
        For people: what was decided.

    Raises
    ------
    UserError
        As `read_review` and `reviewed_masks`, or if the model is another one.
    """
    directory = RunDirectory(run)
    read = read_review(review, directory)
    made = reviewed_masks(directory, read)
    flagged = {(entry.layer, entry.filter) for entry in made.decisions.verdicts}
    accepted = sum(read.decisions.get(one) == REMOVE for one in flagged)
    rejected = sum(read.decisions.get(one) == KEEP for one in flagged)
    added = sum(decision == REMOVE and one not in flagged for one, decision in read.decisions.items())
    decided = (
        f"of {len(flagged):,} flagged filters {accepted:,} accepted, {rejected:,} rejected, "
        f"{len(flagged) - accepted - rejected:,} undecided, which follow their verdicts; {added:,} more go"
    )
    out = out or directory.masks_file
    outcome = finish_masks(directory, made.decisions, made.rankings, made.channels, made.masks, out, model)
    return outcome, decided

"""What a person decided on an analysis' verdicts, and the masks that follow: `review.json`.

The report lets one accept or overrule each verdict and saves the decisions with the identity of the run they
are about. A filter on which nothing was decided goes or stays as its verdict says; what goes together, the
filters of one channel, is decided together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from prune_viz.pruning.budgets import finish_masks, masks_for_channels
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.outcome import Outcome
from prune_viz.pruning.rankings import Ranking, read_rankings
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import Decisions
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import Index
from prune_viz.utils.errors import UserError, few
from prune_viz.utils.files import sha256, write_json
from prune_viz.utils.json_files import convert_json, decode_json, read_text

FORMAT = 1
LARGEST = 2**25  # bytes of a review
REMOVE, KEEP = "remove", "keep"

Filter = tuple[str, int]  # a layer and the number of a filter of it


@dataclass(frozen=True)
class _DecisionRecord:
    layer: str
    filter: Index
    decision: Literal["remove", "keep"]


@dataclass(frozen=True)
class _ReviewRecord:
    """What `review.json` holds."""

    format: int
    run: str
    decisions: tuple[_DecisionRecord, ...]


@dataclass(frozen=True)
class Review:
    """Decisions on the filters of a run.

    Attributes
    ----------
    run : str
        The run's identity (`identity`).
    decisions : dict of (str, int) to {"remove", "keep"}
        By layer and filter; filters on which nothing was decided are left out.
    """

    run: str
    decisions: dict[Filter, str]


@dataclass(frozen=True)
class ReviewedRun:
    """What a review must fit.

    Attributes
    ----------
    run : str
        The run's identity (`identity`).
    filters : mapping of str to int
        How many filters each layer has.
    """

    run: str
    filters: Mapping[str, int]


def identity(run: RunDirectory) -> str:
    """What identifies the verdicts of a run among all others: the SHA-256 of its `decisions.json`."""
    return sha256(run.decisions_file)


def reviewed_run(run: RunDirectory) -> ReviewedRun:
    """What reviews of a run must fit.

    Raises
    ------
    UserError
        If the run has no verdicts, or they cannot be read.
    """
    try:
        return ReviewedRun(identity(run), run.read_decisions().filters)
    except OSError as error:
        raise UserError(f"{run.decisions_file} cannot be read: {error.strerror}") from None


def read_review(path: Path, run: RunDirectory) -> Review:
    """Read a review of a run.

    Raises
    ------
    UserError
        If there is none, it is damaged, of another run, or decides on filters that the run does not have.
    """
    return parse_review(decode_json(read_text(path, LARGEST), str(path)), run, str(path))


def parse_review(
    content: Any, run: RunDirectory, name: str = "the review", expected: ReviewedRun | None = None
) -> Review:
    """Check what a review holds; arguments and errors are `read_review`'s.

    `expected` is what the review must fit; it is read from the run where it is None.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{name} is not a review: save one from the report of the run")
    record = convert_json(content, _ReviewRecord, name)
    expected = expected or reviewed_run(run)
    if record.run != expected.run:
        raise UserError(f"{name} is of another run than {run.path}, or of verdicts that it had before")
    for one in record.decisions:
        if one.filter >= expected.filters.get(one.layer, 0):
            raise UserError(
                f"{name} decides on filter {one.filter} of {one.layer}, which the run does not have"
            )
    return Review(record.run, {(one.layer, one.filter): one.decision for one in record.decisions})


def review_content(review: Review) -> dict[str, Any]:
    """A review as plain data: what `review.json` holds."""
    listed = [
        {"layer": layer, "filter": number, "decision": decision}
        for (layer, number), decision in sorted(review.decisions.items())
    ]
    return {"format": FORMAT, "run": review.run, "decisions": listed}


def write_review(review: Review, path: Path) -> None:
    """Write a review, whole or not at all."""
    write_json(path, review_content(review))


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
    costs = [damage.get(filters[0], np.nan) for filters in _first_filters(channels, decisions)]
    predicted = Damage(float(np.nansum(costs)), decisions.damage_unit)
    rankings = read_rankings(decisions)
    gram_matrices = run.read_gram_matrices() if channels else {}
    masks = masks_for_channels(decisions, rankings, channels, gram_matrices, predicted)
    for layer, number in loose:
        masks[layer][number] = False
    emptied = next((layer for layer, mask in masks.items() if not mask.any()), None)
    if emptied is not None:
        raise UserError(f"the review leaves no filter of {emptied}; keep one at least")
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


def _first_filters(channels: Mapping[int, list[int]], decisions: Decisions) -> list[list[Filter]]:
    """For each channel that goes the filters at it."""
    found: dict[tuple[int, int], list[Filter]] = {}
    for group in decisions.groups:
        wanted = set(channels.get(group.id, ()))
        for producer in group.producers:
            for number, channel in zip(producer.filters, producer.channels, strict=True):
                if channel in wanted:
                    found.setdefault((group.id, channel), []).append((producer.layer, number))
    return list(found.values())


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

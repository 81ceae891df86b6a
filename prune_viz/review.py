"""What a person decided on an analysis' verdicts, and the masks that follow: `review.json`.

The report lets one accept or overrule each verdict and saves the decisions with the identity of the run they
are about. A filter on which nothing was decided goes or stays as its verdict says; what goes together, the
filters of one channel, is decided together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune_viz.budgets import masks_for_channels, read_rankings
from prune_viz.errors import UserError, few
from prune_viz.files import sha256, write_json
from prune_viz.masks import Masks, Predicted, read_beside, save_masks
from prune_viz.probes import read_images
from prune_viz.runs import RunDirectory

FORMAT = 1
REMOVE, KEEP = "remove", "keep"

Filter = tuple[str, int]  # a layer and the number of a filter of it


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


def identity(run: RunDirectory) -> str:
    """What tells the verdicts of a run from those of any other: the SHA-256 of its `decisions.json`."""
    return sha256(run.decisions_file)


def read_review(path: Path, run: RunDirectory) -> Review:
    """Read a review of a run.

    Raises
    ------
    UserError
        If there is none, it is damaged, of another run, or decides on filters that the run does not have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not a review: save one from the report of the run") from None
    return parse_review(content, run, str(path))


def parse_review(content: Any, run: RunDirectory, name: str = "the review") -> Review:
    """Check what a review holds; arguments and errors are `read_review`'s."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{name} is not a review: save one from the report of the run")
    if content.get("run") != identity(run):
        raise UserError(f"{name} is of another run than {run.path}, or of verdicts that it had before")
    listed, counts = content.get("decisions"), run.read_decisions()["filters"]
    if not isinstance(listed, list):
        raise UserError(f"{name} is damaged: it has no list of decisions")
    decisions: dict[Filter, str] = {}
    for entry in listed:
        known = isinstance(entry, dict) and entry.get("decision") in (REMOVE, KEEP)
        layer, number = (entry.get("layer"), entry.get("filter")) if known else (None, None)
        if not isinstance(layer, str) or type(number) is not int:
            raise UserError(f"{name} is damaged: a decision is not on a layer and a filter, remove or keep")
        if not 0 <= number < counts.get(layer, 0):
            raise UserError(f"{name} decides on filter {number} of {layer}, which the run does not have")
        decisions[layer, number] = entry["decision"]
    return Review(content["run"], decisions)


def write_review(review: Review, path: Path) -> None:
    """Write a review, whole or not at all."""
    listed = [
        {"layer": layer, "filter": number, "decision": decision}
        for (layer, number), decision in sorted(review.decisions.items())
    ]
    write_json(path, {"format": FORMAT, "run": review.run, "decisions": listed})


def reviewed_masks(run: RunDirectory, review: Review) -> Masks:
    """Masks that follow a review, what goes rebuilt from all that stays in its group.

    Raises
    ------
    UserError
        If decisions on filters that go only together differ, filters are to go that cannot, or nothing of a
        group would be left.
    """
    decisions = run.read_decisions()
    table = run.read_filters()
    damage = dict(zip(zip(table["layer"], table["filter"], strict=True), table["damage"], strict=True))
    going = {(entry["layer"], entry["filter"]) for entry in decisions["verdicts"]}
    channels, loose = _gone(review, decisions, going)
    origin = read_beside(run.decisions_file).origin
    costs = [damage.get(filters[0], np.nan) for filters in _first_filters(channels, decisions)]
    predicted = Predicted(float(np.nansum(costs)), decisions.get("damage_unit", "readers"))
    rankings = read_rankings(decisions)
    moments = run.read_moments() if channels else {}
    masks = masks_for_channels(rankings, channels, moments, decisions["filters"], origin, predicted)
    for layer, number in loose:
        masks[layer][number] = False
    emptied = next((layer for layer, mask in masks.items() if not mask.any()), None)
    if emptied is not None:
        raise UserError(f"the review leaves no filter of {emptied}; keep one at least")
    return masks


def _gone(
    review: Review, decisions: Mapping[str, Any], going: set[Filter]
) -> tuple[dict[int, list[int]], list[Filter]]:
    """Channels that go, by group, and filters that go and are in none."""
    ranked = {entry["group"] for entry in decisions["removal_order"] if entry["channels"]}
    said: dict[tuple[int, int], dict[str, Filter]] = {}
    gone: set[tuple[int, int]] = set()
    placed: set[Filter] = set()
    for group in decisions["groups"]:
        for writer in group["writers"]:
            for number, channel in zip(writer["filters"], writer["channels"], strict=True):
                one = writer["layer"], number
                placed.add(one)
                place = group["id"], channel
                decision = review.decisions.get(one)
                if decision is not None:
                    said.setdefault(place, {})[decision] = one
                if decision == REMOVE and not (group["removable"] and group["id"] in ranked):
                    why = group["note"] or "its group was not ranked in this run"
                    raise UserError(f"filter {number} of {writer['layer']} cannot be removed: {why}")
                if one in going:
                    gone.add(place)
    for place, told in said.items():
        if len(told) > 1:
            pair = few([f"filter {number} of {layer}" for layer, number in told.values()])
            raise UserError(f"the review keeps and removes what goes only together: {pair}")
        (gone.add if REMOVE in told else gone.discard)(place)
    loose = {one for one in going if one not in placed} | {
        one for one, decision in review.decisions.items() if decision == REMOVE and one not in placed
    }
    loose -= {one for one, decision in review.decisions.items() if decision == KEEP}
    channels: dict[int, list[int]] = {}
    for number, channel in sorted(gone):
        channels.setdefault(number, []).append(channel)
    return channels, sorted(loose)


def _first_filters(channels: Mapping[int, list[int]], decisions: Mapping[str, Any]) -> list[list[Filter]]:
    """For each channel that goes the filters at it."""
    found: dict[tuple[int, int], list[Filter]] = {}
    for group in decisions["groups"]:
        wanted = set(channels.get(group["id"], ()))
        for writer in group["writers"]:
            for number, channel in zip(writer["filters"], writer["channels"], strict=True):
                if channel in wanted:
                    found.setdefault((group["id"], channel), []).append((writer["layer"], number))
    return list(found.values())


def write_reviewed_masks(run: Path, review: Path, out: Path | None = None) -> list[str]:
    """Write the masks that follow a review, by default as the run's own.

    Parameters
    ----------
    run : Path
        A run directory.
    review : Path
        What the report of the run saved.
    out : Path, optional
        Where to write; the run's own ``masks.pt`` by default.

    Returns
    -------
    list of str
        For people: what was decided and done.

    Raises
    ------
    UserError
        As `read_review` and `reviewed_masks`.
    """
    directory = RunDirectory(run)
    read = read_review(review, directory)
    masks = reviewed_masks(directory, read)
    out = out or directory.masks_file
    if out.resolve().parent != directory.path.resolve():
        masks.probes = read_images(directory.probes_file)
    save_masks(masks, out)
    flagged = {(entry["layer"], entry["filter"]) for entry in directory.read_decisions()["verdicts"]}
    accepted = sum(read.decisions.get(one) == REMOVE for one in flagged)
    rejected = sum(read.decisions.get(one) == KEEP for one in flagged)
    added = sum(decision == REMOVE and one not in flagged for one, decision in read.decisions.items())
    return [
        f"of {len(flagged):,} flagged filters {accepted:,} accepted, {rejected:,} rejected, "
        f"{len(flagged) - accepted - rejected:,} undecided, which go as told; {added:,} more go",
        f"{masks.removed:,} of {masks.filters:,} filters go ({masks.removed / masks.filters:.1%})",
        f"written to {out}",
    ]

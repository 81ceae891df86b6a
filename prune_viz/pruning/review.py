"""What a person decided on an analysis' verdicts: `review.json`.

The report lets one accept or overrule each verdict and saves the decisions with the identity of the run they
are about. A filter on which nothing was decided goes or stays as its verdict says; what goes together, the
filters of one channel, is decided together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import Index
from prune_viz.utils.errors import UserError
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

"""What was found, in sentences, and how many filters have each verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_viz.report import wording
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.verdicts import FLAGGED, Verdict

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Counts:
    """How many filters have each verdict: ``counts[Verdict.DEAD]``."""

    of: Mapping[Verdict, int]

    def __getitem__(self, verdict: Verdict) -> int:
        return self.of[verdict]

    @property
    def filters(self) -> int:
        """All filters."""
        return sum(self.of.values())

    @property
    def flagged(self) -> int:
        """Filters that the run's masks remove."""
        return sum(self[verdict] for verdict in FLAGGED)

    @property
    def shown(self) -> list[Verdict]:
        """The verdicts that a legend names: `UNJUDGED` only where some filters are, alone where all are."""
        if self[Verdict.UNJUDGED] == self.filters:
            return [Verdict.UNJUDGED]
        return [verdict for verdict in Verdict if self[verdict] or verdict is not Verdict.UNJUDGED]

    def __str__(self) -> str:
        return ", ".join(f"{self[verdict]} {verdict}" for verdict in self.shown)


def finding(counts: Counts, tied: int = 0) -> str:
    """Say what was found.

    Parameters
    ----------
    counts : Counts
        Filters by verdict.
    tied : int
        How many of those that are kept cannot go, whatever they do.
    """
    whole, unjudged = wording.plural(counts.filters, "filter"), counts[Verdict.UNJUDGED]
    judged = counts.filters - unjudged - tied
    if not judged:
        return f"None of the {whole} was judged; the reason stands at each."
    rest = _left(unjudged, tied)
    if not counts.flagged:
        each = wording.plural(judged, "filter")
        others = " that were judged" if judged < counts.filters else ""
        return f"Each of the {each}{others} does something that no other does.{rest}"
    parts = []
    redundant, dead = counts[Verdict.REDUNDANT], counts[Verdict.DEAD]
    both = redundant and dead
    if redundant:
        who = wording.count(redundant) if both else "they" if redundant > 1 else "it"
        parts.append(f"{who} repeat{'s' * (redundant == 1)} what other filters compute")
    if dead:
        who = wording.count(dead) if both else "they" if dead > 1 else "it"
        parts.append(f"{who} do{'es' * (dead == 1)} nothing")
    return f"{wording.count(counts.flagged)} of {whole} can go: {' and '.join(parts)}.{rest}"


def so_far(counts: Counts) -> str:
    """Say what an unfinished run shows."""
    return f"Pictures of {wording.plural(counts.filters, 'filter')}: this run is not finished."


def count_tied(filters: pd.DataFrame) -> int:
    """How many filters are kept without a cost of their removal, since nothing can remove them."""
    return int(((filters["verdict"] == Verdict.KEEP) & filters["damage"].isna()).sum())


def _left(unjudged: int, tied: int) -> str:
    """A sentence on filters about which nothing was found."""
    said = []
    if unjudged:
        said.append(f"{wording.count(unjudged)} {'was' if unjudged == 1 else 'were'} not judged")
    if tied:
        said.append(f"{wording.count(tied)} cannot go, whatever {'it does' if tied == 1 else 'they do'}")
    return f" {', and '.join(said)}." if said else ""


def certainty(
    filters: pd.DataFrame, predicted: Damage | None, measured: Damage | None = None, rough: str = ""
) -> str:
    """Say how sure the finding is: how well redundant filters are reconstructed, and what removal will cost.

    Parameters
    ----------
    filters : DataFrame
        `filters.csv`.
    predicted : Damage or None
        What the run's masks cost, where that was predicted.
    measured : Damage, optional
        What they were measured to cost, on images that no fit saw.
    rough : str
        Why that is rough; empty where it is not.
    """
    sentences = []
    scores = filters.loc[filters["verdict"] == Verdict.REDUNDANT, "score"].dropna()
    if len(scores):
        least = wording.r_squared(float(scores.min()))
        each = f"at least {least}" if len(scores) > 1 else least
        sentences.append(
            "On calibration images that the fit did not see, what is called redundant is reconstructed from "
            f"filters that stay with an R² of {each}."
        )
    if predicted is not None and filters["verdict"].isin(FLAGGED).any():
        size = wording.damage(predicted.value, predicted.unit)
        whose = "what reads the filters" if predicted.unit is Unit.CONSUMERS else "the output"
        found = f"Removing all that can go is predicted to move {whose} by {size}"
        if measured is not None:
            found += f", and measured to move it by {wording.damage(measured.value, measured.unit)}"
        sentences.append(f"{found}{' (rough: the notes say why)' if rough else ''}.")
    return " ".join(sentences)

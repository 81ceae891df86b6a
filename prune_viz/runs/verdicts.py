"""The verdicts a filter can have: what each is called, looks like and means, wherever it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Look:
    """How a verdict is shown.

    Attributes
    ----------
    letter : str
        One letter for it, unlike any other verdict's, in tables of the report.
    shape : {"ring", "diamond", "cross", "square"}
        Its mark, so that verdicts never differ by colour alone.
    colour, dark : str
        Of the mark, ``#rrggbb``, on light and on dark ground.
    legend : str
        What it means, in a sentence.
    """

    letter: str
    shape: str
    colour: str
    dark: str
    legend: str


class Verdict(StrEnum):
    """What was found of a filter; the value is what files hold."""

    KEEP = "keep"
    REDUNDANT = "redundant"
    DEAD = "dead"
    UNJUDGED = "unjudged"

    @property
    def look(self) -> Look:
        """How it is shown."""
        return _LOOKS[self]

    @property
    def flagged(self) -> bool:
        """Whether masks of the run remove filters with this verdict."""
        return self in _REMOVED

    @property
    def classes(self) -> str:
        """The CSS classes of what is drawn for it: its name and its shape."""
        return f"{self.value} {self.look.shape}"


_REMOVED = frozenset({Verdict.REDUNDANT, Verdict.DEAD})
_LOOKS = {
    Verdict.KEEP: Look("k", "ring", "#23776f", "#58b3a8", "Not found to be redundant or dead."),
    Verdict.REDUNDANT: Look(
        "r",
        "diamond",
        "#a85a06",
        "#eaa54c",
        "A copy of a filter that stays, or a weighted sum of several.",
    ),
    Verdict.DEAD: Look("d", "cross", "#8a2f55", "#e084ab", "Never changes the network's output."),
    Verdict.UNJUDGED: Look(
        "u", "square", "#6b6f76", "#9aa0a8", "Not judged, for the reason given; it stays."
    ),
}
FLAGGED = tuple(verdict for verdict in Verdict if verdict.flagged)

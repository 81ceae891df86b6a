"""What a network returns: scores of classes, of labels, of every position, or other values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prune_viz.runs.damage import Unit


class Task(StrEnum):
    """What the numbers mean that a network returns; the value is what files and `--task` hold."""

    CLASSES = "classes"
    """One row of scores for an input, of classes of which one is right."""
    LABELS = "labels"
    """Scores each of which stands for itself, as of labels of which several may hold."""
    DENSE = "dense"
    """Scores of classes at every position, as of a segmentation."""
    VALUES = "values"
    """Anything else: embeddings, measurements, boxes, several outputs."""

    @property
    def unit(self) -> Unit:
        """What the change of such outputs is measured in."""
        return _UNITS[self]


class Evidence(StrEnum):
    """What speaks for a task."""

    GIVEN = "given"
    """The user said so."""
    STRUCTURE = "structure"
    """The last operations of the network, or the number and names of its outputs."""
    RANGE = "range"
    """The values that it returns for noise."""
    ASSUMED = "assumed"
    """Nothing but the shape of the output."""


_UNITS = {
    Task.CLASSES: Unit.NATS,
    Task.LABELS: Unit.LABELS,
    Task.DENSE: Unit.POSITION,
    Task.VALUES: Unit.OUTPUT,
}
_MEANING = {
    Task.CLASSES: ("probabilities of classes", "scores of classes, one of which is right"),
    Task.LABELS: ("probabilities of labels, each for itself", "scores of labels, each for itself"),
    Task.DENSE: ("probabilities of classes at every position", "scores of classes at every position"),
    Task.VALUES: ("values that are not read as probabilities",) * 2,
}
_BECAUSE = {
    Evidence.GIVEN: ", as --task says",
    Evidence.STRUCTURE: ", as its structure shows",
    Evidence.RANGE: ", by their range on noise",
    Evidence.ASSUMED: ": assumed from the shape alone, so say --task {others} if that is wrong",
}


@dataclass(frozen=True)
class OutputKind:
    """What a network returns, and how that is known.

    Attributes
    ----------
    task : Task
        What its numbers mean.
    normalised : bool
        Whether they are probabilities already: a softmax or sigmoid is part of the network.
    evidence : Evidence
        How that is known.
    """

    task: Task = Task.VALUES
    normalised: bool = False
    evidence: Evidence = Evidence.ASSUMED

    def __str__(self) -> str:
        """A sentence for people."""
        others = [task.value for task in Task if task is not self.task]
        because = _BECAUSE[self.evidence].format(others=f"{', '.join(others[:-1])} or {others[-1]}")
        return f"The network returns {_MEANING[self.task][not self.normalised]}{because}."

"""What a network's outputs say: probabilities, and how far a change of the network moved them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid

from prune_viz.runs.damage import Damage
from prune_viz.runs.output_kind import OutputKind, Task

_LEAST = 1e-12  # of a probability of classes
_LEAST_SQUARE = 1e-24  # of an output
_LEAST_LABEL = 1e-6  # of a label's, and of its opposite: nearer to 1 single precision knows little


def output_change(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    kind: OutputKind,
    count: int,
    sizes: Sequence[float] | None = None,
) -> Damage:
    """What a change of a network did to its outputs on the same inputs.

    Parameters
    ----------
    before, after : sequence of Tensor
        All the network's outputs, in the same order and shapes.
    kind : OutputKind
        What they are.
    count : int
        How many inputs there were.
    sizes : sequence of float, optional
        Mean square of each output, where that is known over more inputs than these (`mean_squares`).

    Returns
    -------
    Damage
        In the task's unit, not negative; NaN where outputs are not finite. Of scores it is the
        Kullback-Leibler divergence of the probabilities after from those before, a mean over inputs,
        positions and outputs, and summed over labels; of other values the squared change as a share of the
        square, a mean over outputs.
    """
    changes = output_changes(before, after, kind, count, sizes)
    change = sum(map(float, changes)) / max(len(changes), 1)
    return Damage(max(change, 0.0), kind.task.unit)  # in this order, which leaves NaN as it is


def output_changes(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    kind: OutputKind,
    count: int,
    sizes: Sequence[float] | None = None,
) -> list[Tensor]:
    """The change of each output as a scalar in double precision, which can be differentiated.

    Arguments are those of `output_change`, which is their mean; outputs that say nothing are left out.
    """
    there = [index for index, old in enumerate(before) if old.is_floating_point() and old.numel()]
    pairs = [(old.double(), new.double()) for old, new in zip(before, after, strict=True)]
    pairs = [pairs[index] for index in there]
    if kind.task is not Task.VALUES:
        pairs = [(old, new) for old, new in pairs if len(by_inputs([old], count))]
    measure = {Task.CLASSES: _of_classes, Task.DENSE: _of_classes, Task.LABELS: _of_labels}.get(kind.task)
    if measure is None:
        known = mean_squares(before) if sizes is None else sizes
        return [
            (old - new).square().mean() / max(known[index], _LEAST_SQUARE)
            for index, (old, new) in zip(there, pairs, strict=True)
        ]
    return [measure(scores_of(old, kind), scores_of(new, kind)) for old, new in pairs]


def _of_classes(before: Tensor, after: Tensor) -> Tensor:
    one, other = before.log_softmax(dim=1), after.log_softmax(dim=1)
    return (one.exp() * (one - other)).sum(dim=1).mean()


def _of_labels(before: Tensor, after: Tensor) -> Tensor:
    yes, no = (logsigmoid(sign * before) - logsigmoid(sign * after) for sign in (1, -1))
    each = before.sigmoid() * yes + (-before).sigmoid() * no
    return (each.sum(dim=1) if each.ndim > 1 else each).mean()


def mean_squares(outputs: Sequence[Tensor]) -> list[float]:
    """Mean square of each output; 0 of what is empty or holds no numbers of floats."""
    return [
        float(one.double().square().mean()) if one.is_floating_point() and one.numel() else 0.0
        for one in outputs
    ]


def by_inputs(outputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """Those outputs that have a row for each of so many inputs."""
    return [one for one in outputs if one.is_floating_point() and one.shape[:1] == (count,)]


def scores_of(output: Tensor, kind: OutputKind) -> Tensor:
    """Scores of which a softmax, or a sigmoid for labels, makes the probabilities.

    Parameters
    ----------
    output : Tensor, shape (B, scores, *size) or (B,)
        What the network returned.
    kind : OutputKind
        What that is; not values.
    """
    if not kind.normalised:
        return output
    if kind.task is Task.LABELS:
        return output.clamp(_LEAST_LABEL, 1 - _LEAST_LABEL).logit()
    return output.clamp_min(_LEAST).log()


def class_probabilities(outputs: Sequence[Tensor], kind: OutputKind, count: int) -> Tensor | None:
    """Probabilities of classes, shape (count, classes), of a network that returns such scores, or None."""
    rows = [one for one in by_inputs(outputs, count) if one.ndim == 2]
    if kind.task is not Task.CLASSES or len(rows) != 1:
        return None
    return rows[0] if kind.normalised else rows[0].softmax(dim=1)

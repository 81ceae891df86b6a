"""What a network returns: its tensors, the classes' probabilities, and how far a change moved them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prune_viz.runs.damage import Damage, Unit


def output_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Damage:
    """What a change of a network did to its outputs on the same inputs.

    Parameters
    ----------
    before, after : sequence of Tensor
        All the network's outputs, in the same order and shapes.

    Returns
    -------
    Damage
        Mean divergence of the classes' probabilities after from those before, in nats, or the squared
        change as a share of the square, a mean over outputs.
    """
    shares, others = class_probabilities(before), class_probabilities(after)
    if shares is not None and others is not None:
        shares, others = shares.double(), others.double()
        ratio = shares.clamp_min(1e-30).log() - others.clamp_min(1e-30).log()
        return Damage(float((shares * ratio).sum(dim=1).mean()), Unit.NATS)
    changes = [
        float((old.double() - new.double()).square().mean() / old.double().square().mean().clamp_min(1e-24))
        for old, new in zip(before, after, strict=True)
        if old.is_floating_point() and old.numel()
    ]
    return Damage(sum(changes) / max(len(changes), 1), Unit.OUTPUT)


def class_probabilities(outputs: Sequence[Tensor]) -> Tensor | None:
    """Probabilities of classes, shape (B, classes), of a network that returns one row of scores for an input.

    Outputs that are probabilities already are returned as they are; None where there is no such row.
    """
    if len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
        return None
    (scores,) = outputs
    if not scores.is_floating_point():
        return None
    return scores if are_probabilities(scores) else scores.softmax(dim=1)


def are_probabilities(scores: Tensor) -> bool:
    """Whether scores, shape (B, classes), are probabilities already."""
    return bool((scores >= 0).all()) and bool(((scores.sum(dim=1) - 1).abs() < 1e-4).all())

"""What the removal order rests on, for people and for `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz.calibration.images import BATCH, SyntheticImages
from prune_viz.calibration.losses import norms_distance
from prune_viz.feature_visualization.priors import are_pictures
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.outputs import class_probabilities
from prune_viz.runs.damage import Unit
from prune_viz.runs.output_kind import OutputKind, Task
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.nested_tensors import tensors_of

ENOUGH_EXAMPLES = 32  # of the user's inputs, from which on predictions are not called rough
ADVISED_EXAMPLES = 128
UNMEASURED = (
    "the change of the output could not be measured, as the network is too large for that or runs on no "
    "calibration images"
)
FAR = 0.2  # distance of batch norms' statistics from those of training
_UNSEEN = (
    "no inputs of the network's kind were given, without which changes can be put several times too high"
)


@dataclass(frozen=True)
class Predictions:
    """Which classes a classifier sees in calibration images.

    Attributes
    ----------
    confidence : float
        Mean largest probability.
    classes : int
        How many classes are the likeliest of some calibration image.
    """

    confidence: float
    classes: int


def predictions_on(
    model: nn.Module, calibrated: SyntheticImages | None, kind: OutputKind
) -> Predictions | None:
    """What the network takes synthetic images for; None without any, or where it returns no class scores."""
    if calibrated is None or calibrated.distance is None or kind.task is not Task.CLASSES:
        return None
    device = next(model.parameters()).device
    found = with_fewer(partial(_shares, model, calibrated.images, kind), BATCH, device)
    if found is None:
        return None
    most = found.max(dim=1)
    return Predictions(float(most.values.mean()), len(set(most.indices.tolist())))


def _shares(model: nn.Module, images: Tensor, kind: OutputKind, rows: int) -> Tensor | None:
    """The classes' probabilities, shape (N, classes), so many images at a time."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for batch in torch.split(images, rows):
            shares = class_probabilities(tensors_of(model(batch.to(device))), kind, len(batch))
            if shares is None:
                return None
            found.append(shares.float().cpu())
    return torch.cat(found)


def describe(
    calibrated: SyntheticImages | None, predicted: Predictions | None, examples: int, unit: Unit
) -> str:
    """Say what the removal order rests on, and what damage is where it is not a divergence of classes.

    Parameters
    ----------
    calibrated : SyntheticImages or None
        The synthetic calibration images, where there are any.
    predicted : Predictions or None
        What the network takes them for, where it returns class scores.
    examples : int
        How many images the user gave.
    unit : Unit
        Of damage.

    Returns
    -------
    str
        Sentences for the report and the log.
    """
    units = {
        Unit.CONSUMERS: " How the network's output depends on its filters could not be measured there; "
        "damage is a share of the output of the layers that read them.",
        Unit.OUTPUT: " Damage is the squared change of the network's outputs as a share of their square.",
    }
    images = f"the {examples:,} inputs of --data"
    if calibrated is not None and calibrated.distance is not None:
        also = f" and {images}" if examples else ""
        looks = ""
        if predicted is not None:
            plural = "es" if predicted.classes > 1 else ""
            looks = (
                f" The network takes them for {predicted.classes} class{plural}, at a mean probability of "
                f"{predicted.confidence:.2f}."
            )
        if calibrated.activation_kept is not None:
            share = f"{calibrated.activation_kept:.2f}"
            looks += f" Stimuli among them still activate their filters at {share} (median) of before."
        return (
            f"The removal order rests on {len(calibrated.images)} synthetic calibration images{also}. They "
            "were optimised until the batch norms' statistics came near those of training: the distance "
            f"fell from {calibrated.before:.3g} to {calibrated.distance:.3g}.{looks}{units.get(unit, '')}"
        )
    if calibrated is None and examples:
        return f"The removal order rests on {images} alone.{units.get(unit, '')}"
    rests = "noise and stimuli" if calibrated is None else "dead leaves and stimuli"
    return (
        "No calibration images could be synthesised from what batch norms hold of the training data, so the "
        f"removal order rests on {rests}.{units.get(unit, '')}"
    )


@dataclass(frozen=True)
class Roughness:
    """How far predicted and measured changes of the output can be trusted.

    Attributes
    ----------
    why : str
        Why they are rough, and what would help; empty where they are not.
    is_unfounded : bool
        Whether they can be wrong either way, so that merging must be clearly better to be used.
    """

    why: str
    is_unfounded: bool


def distance_of(model: nn.Module, examples: Tensor | None) -> float | None:
    """How far what batch norms see of the user's inputs is from what they saw in training.

    None without inputs, or where no batch norm shows it.
    """
    if examples is None:
        return None
    return with_fewer(partial(norms_distance, model, examples), BATCH, next(model.parameters()).device)


def find_roughness(
    calibrated: SyntheticImages | None,
    examples: int,
    distance: float | None,
    shape: Sequence[int],
    statistics: InputStatistics | None = None,
) -> Roughness:
    """Find how far what is predicted and measured can be trusted.

    Parameters
    ----------
    calibrated : SyntheticImages or None
        The synthetic calibration images, where there are any.
    examples : int
        How many inputs the user gave.
    distance : float or None
        Of these from the training inputs (`distance_of`).
    shape : sequence of int
        (C, *size) of one input.
    statistics : InputStatistics, optional
        What is known of the inputs.
    """
    if examples >= ENOUGH_EXAMPLES and (distance is None or distance <= FAR):
        return Roughness("", False)
    if examples >= ENOUGH_EXAMPLES:
        return Roughness(
            f"the inputs of --data are far from what the batch norms saw in training, at {distance:.2g}; "
            "what holds on them may not hold on others. Inputs of more kinds would help",
            True,
        )
    reasons = []
    if not are_pictures(shape, statistics):
        reasons.append("the inputs are not pictures")
    if calibrated is None or calibrated.distance is None:
        reasons.append("no batch norm shows what the training inputs were like")
    elif calibrated.distance > FAR:
        reasons.append(
            f"calibration ended far from what the batch norms saw in training, at {calibrated.distance:.2g}"
        )
    why = " and ".join(reasons) or _UNSEEN
    return Roughness(f"{why}. --data with {ADVISED_EXAMPLES} unlabelled inputs would help", bool(reasons))


def summary(calibrated: SyntheticImages | None, predicted: Predictions | None) -> dict[str, Any] | None:
    """What `run.json` holds of the calibration."""
    if calibrated is None:
        return None
    return {
        "images": len(calibrated.images),
        "size": list(calibrated.images.shape[2:]),
        "passes": calibrated.passes,
        "before": calibrated.before,
        "distance": calibrated.distance,
        "activation_kept": calibrated.activation_kept,
        **({} if predicted is None else asdict(predicted)),
    }

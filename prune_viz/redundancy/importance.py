"""The removal order of every coupling group, by what removal does to the network's output.

It is measured on probes near the training data: calibrated ones where there can be any, and the user's
own images where there are some. How much the output depends on what each consumer gives
(`prune_viz.redundancy.fisher`) weighs what the consumers would lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.calibration import synthetic_images
from prune_viz.calibration.images import (
    BATCH,
    SyntheticImages,
    calibration_size,
    calibration_starts,
    runs_on,
    split,
)
from prune_viz.calibration.synthetic_images import calibrate, enlarged, synthetic_count, variants
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.outputs import class_probabilities
from prune_viz.network.tracing import norms_behind
from prune_viz.redundancy.dead import are_silent
from prune_viz.redundancy.fisher import Sensitivities, gather_sensitivities
from prune_viz.redundancy.gram_matrices import Moments, gather_moments, pool_moments, weigh_outputs
from prune_viz.redundancy.judge import GroupVerdicts, note_silent, rank
from prune_viz.redundancy.sign_pairs import weight_signs
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.nested_tensors import tensors_of
from prune_viz.utils.progress import counted
from prune_viz.utils.scratch_arrays import ScratchArrays

WIDEST = {1: 4096, 2: 160, 3: 32}  # synthetic images, by spatial axes
SENSED = 4  # variants of each calibrated probe on which the output's sensitivity is measured


@dataclass(frozen=True)
class CalibrationImages:
    """Inputs near the training data.

    Attributes
    ----------
    synthetic : Tensor or None, shape (N, C, *size)
        Synthetic images, where there can be any.
    examples : Tensor or None, shape (N, C, *size)
        The user's images, in the model's own input units, where there are some.
    seed : int
        Seed of all that is random when they are used.
    """

    synthetic: Tensor | None
    examples: Tensor | None
    seed: int

    def any(self) -> bool:
        """Whether there are inputs at all."""
        return self.synthetic is not None or self.examples is not None

    def varied(self, model: nn.Module) -> Iterator[Tensor]:
        """Synthetic images in their variants, a set each."""
        if self.synthetic is not None:
            images = self.synthetic
            larger = runs_on(model, images.shape[1], enlarged(images.shape[2:]))
            yield from variants(images, larger, self.seed)


@dataclass(frozen=True)
class Measured:
    """Moments of groups on probes near the training data.

    Attributes
    ----------
    moments : dict of int to list of Moments
        By the group's number, one a consumer.
    weighed : dict of int to list of Moments
        The same, weighted by the network output's sensitivity to them, where that is known.
    silent : dict of int to ndarray of bool, each shape (channels,)
        Which channels stay zero on all of the user's own images; empty where there are none.
    ablations : dict of int to ndarray, each shape (channels,), or None
        What silencing each channel costs the network's output (`Sensitivities.ablations`); None where
        nothing is near the training data or that cannot be measured.
    unit : Unit
        Of damage by the weighed moments: that of `Sensitivities`, or a share of the consumers' output.
    signs : dict of int to ndarray of int, each shape (channels, channels)
        Which channels have the same weights, and which opposite ones (`prune_viz.redundancy.sign_pairs`).
    """

    moments: dict[int, list[Moments]]
    weighed: dict[int, list[Moments]]
    silent: dict[int, np.ndarray]
    ablations: dict[int, np.ndarray] | None
    unit: Unit
    signs: dict[int, np.ndarray]


@dataclass(frozen=True)
class Ranked:
    """Every group's removal order.

    Attributes
    ----------
    verdicts : dict of int to GroupVerdicts
        By the group's number, with the new orders and damages.
    moments : dict of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels of each group that was measured, and a constant.
    """

    verdicts: dict[int, GroupVerdicts]
    moments: dict[int, np.ndarray]


def synthesise_images(
    model: nn.Module,
    layers: Mapping[str, LayerTensors],
    input_shape: Sequence[int],
    context: RunContext,
) -> SyntheticImages | None:
    """Calibrate probes that start from dead leaves and from the stimuli of the deep layers.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    layers : mapping of str to LayerTensors
        The layers' stimuli, in order of depth.
    input_shape : sequence of int
        (C, *size).
    context : RunContext
        What the stages of a run share.

    Returns
    -------
    SyntheticImages or None
        None where nothing can be calibrated (`prune_viz.calibration.synthetic_images.calibrate`).
    """
    channels, *size = input_shape
    widest = WIDEST[len(size)]
    size = list(calibration_size(model, input_shape, [min(extent, widest) for extent in size]))
    count = synthetic_count(size)
    starts = calibration_starts(layers, channels, size, count, context.seed, context.statistics)
    context.progress.start("calibration", sum(len(kind.images) for kind in starts) * synthetic_images.PASSES)
    found = calibrate(model, starts, context)
    context.progress.finish()
    return found


def sense_output(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    near: CalibrationImages,
    context: RunContext,
) -> Sensitivities | None:
    """How the network's output depends on the outputs of groups' consumers, near the training data.

    Parameters are those of `measure_groups`. None where nothing is near the training data, or where it cannot
    be measured (`prune_viz.redundancy.fisher.gather_sensitivities`).
    """
    if not groups or not near.any():
        return None
    progress = context.progress

    def batches() -> Iterator[Tensor]:
        examples = [] if near.examples is None else [near.examples]
        count = 0 if near.synthetic is None else SENSED * len(near.synthetic)
        progress.start("sensitivity", count + sum(map(len, examples)))
        for images in chain(islice(near.varied(model), SENSED), examples):
            for batch in torch.split(images, BATCH):
                yield batch
                progress.advance(len(batch))
        progress.finish()

    return gather_sensitivities(model, groups, batches, near.seed, context.budget)


def measure_groups(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    known: Mapping[int, Sequence[Moments]],
    near: CalibrationImages,
    sensitivities: Sensitivities | None,
    context: RunContext,
) -> Measured:
    """Measure groups on probes near the training data.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    groups : sequence of CouplingGroup
        Those to measure.
    known : mapping of int to sequence of Moments
        Their moments on noise and stimuli, which count where there is nothing nearer.
    near : CalibrationImages
        What is near the training data.
    sensitivities : Sensitivities or None
        From `sense_output`.
    context : RunContext
        What the stages of a run share.
    """
    norms = norms_behind(model)
    signs = {group.number: weight_signs(model, group, norms) for group in groups}
    moments, silent = _gather(model, groups, near, context)
    moments = moments or {number: list(consumers) for number, consumers in known.items()}
    if sensitivities is None:
        return Measured(moments, moments, silent, None, Unit.CONSUMERS, signs)
    store = ScratchArrays(context.budget)
    weighed = {
        group.number: weigh_outputs(model, group, moments[group.number], sensitivities.consumers, store)
        for group in groups
    }
    return Measured(moments, weighed, silent, sensitivities.ablations, sensitivities.unit, signs)


def rank_groups(verdicts: Mapping[int, GroupVerdicts], measured: Measured) -> Ranked:
    """Order every measured group's channels.

    Parameters
    ----------
    verdicts : mapping of int to GroupVerdicts
        Of all groups, by number.
    measured : Measured
        Their moments.
    """
    ranked, pooled = dict(verdicts), {}
    for number, moments in measured.moments.items():
        ablations = None if measured.ablations is None else measured.ablations[number]
        ranked[number], pooled[number] = rank(
            verdicts[number],
            moments,
            measured.weighed[number],
            ablations,
            measured.unit,
            measured.signs[number],
        )
        if number in measured.silent:
            ranked[number] = note_silent(ranked[number], measured.silent[number])
    return Ranked(ranked, pooled)


def _gather(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    near: CalibrationImages,
    context: RunContext,
) -> tuple[dict[int, list[Moments]], dict[int, np.ndarray]]:
    """The groups' moments over synthetic images and examples, and what channels examples leave silent."""
    parts, counts, silent = [], [], {}
    if (calibrated := near.synthetic) is not None:
        count = synthetic_images.VARIANTS * len(calibrated)

        def moved() -> Iterator[tuple[Tensor, bool]]:
            return counted(context.progress, "ranking", _split(near.varied(model)), count)

        parts.append(gather_moments(model, groups, moved, context.budget))
        counts.append(len(calibrated))
    if (examples := near.examples) is not None:

        def shown() -> Iterator[tuple[Tensor, bool]]:
            return counted(context.progress, "ranking data", _split([examples]), len(examples))

        seen = gather_moments(model, groups, shown, context.budget)
        silent = {number: are_silent(consumers) for number, consumers in seen.items()}
        parts.append(seen)
        counts.append(len(examples))
    if not parts:
        return {}, {}
    shares = [count / sum(counts) for count in counts]
    pooled = {group.number: pool_moments([part[group.number] for part in parts], shares) for group in groups}
    return pooled, silent


def _split(sets: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    for images in sets:
        yield from split(images, images.shape[2:])


@dataclass(frozen=True)
class Predictions:
    """Which classes a classifier sees in calibration images.

    Attributes
    ----------
    confidence : float
        Mean largest probability.
    classes : int
        How many classes are the likeliest of some probe.
    """

    confidence: float
    classes: int


def predictions_on(model: nn.Module, calibrated: SyntheticImages | None) -> Predictions | None:
    """What the network takes synthetic images for; None without any, or where it returns no class scores."""
    if calibrated is None:
        return None
    device = next(model.parameters()).device
    found = with_fewer(partial(_shares, model, calibrated.images), BATCH, device)
    if found is None:
        return None
    most = found.max(dim=1)
    return Predictions(float(most.values.mean()), len(set(most.indices.tolist())))


def _shares(model: nn.Module, images: Tensor, rows: int) -> Tensor | None:
    """The classes' probabilities, shape (N, classes), so many images at a time."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for batch in torch.split(images, rows):
            shares = class_probabilities(tensors_of(model(batch.to(device))))
            if shares is None:
                return None
            found.append(shares.float().cpu())
    return torch.cat(found)


def describe(
    calibrated: SyntheticImages | None, predicted: Predictions | None, examples: int, unit: Unit
) -> str:
    """Say what the removal order rests on, and what damage is where it is not what one expects."""
    units = {
        Unit.CONSUMERS: " How the network's output depends on its filters could not be measured there; "
        "damage is a share of the output of the layers that read them.",
        Unit.OUTPUT: " Damage is the squared change of the network's outputs as a share of their square.",
    }
    images = f"the {examples:,} images of --data"
    if calibrated is not None:
        also = f" and {images}" if examples else ""
        looks = ""
        if predicted is not None:
            plural = "es" if predicted.classes > 1 else ""
            looks = (
                f" The network takes them for {predicted.classes} class{plural}, at a mean probability of "
                f"{predicted.confidence:.2f}."
            )
        if calibrated.held is not None:
            share = f"{calibrated.held:.2f}"
            looks += f" Stimuli among them still activate their filters at {share} (median) of before."
        return (
            f"The removal order rests on {len(calibrated.images)} synthetic calibration images{also}. They "
            "were optimised until the batch norms' statistics came near those of training: the distance "
            f"fell from {calibrated.before:.3g} to {calibrated.distance:.3g}.{looks}{units.get(unit, '')}"
        )
    rests = (
        f"{images} alone."
        if examples
        else "noise and stimuli: trust budgets beyond the verdicts only after fine-tuning."
    )
    return (
        "No calibration images could be synthesised from what batch norms hold of the training data, so the "
        f"removal order rests on {rests}{units.get(unit, '') if examples else ''}"
    )


def summary(calibrated: SyntheticImages | None, predicted: Predictions | None) -> dict[str, Any] | None:
    """What `run.json` holds of the calibration."""
    if calibrated is None:
        return None
    return {
        "probes": len(calibrated.images),
        "size": list(calibrated.images.shape[2:]),
        "passes": calibrated.passes,
        "before": calibrated.before,
        "distance": calibrated.distance,
        "held": calibrated.held,
        **({} if predicted is None else asdict(predicted)),
    }

"""The removal order of every coupling group, measured on calibrated probes where there can be any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from prune_viz import calibration
from prune_viz.calibration import Calibrated, calibrate, enlarged, variants
from prune_viz.coupling import CouplingGroup
from prune_viz.inputs import InputStatistics
from prune_viz.probes import calibration_starts, probe_size, runs_on, split
from prune_viz.progress import Progress
from prune_viz.redundancy import GroupVerdicts, rank
from prune_viz.responses import Moments, gather_moments
from prune_viz.runs import LayerTensors

WIDEST = {1: 4096, 2: 128, 3: 32}  # calibrated probes, by spatial axes


@dataclass(frozen=True)
class Ranked:
    """Every group's removal order, and what it was measured on.

    Attributes
    ----------
    verdicts : dict of int to GroupVerdicts
        By the group's number, with the new orders.
    moments : dict of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels of each group that was probed, and a constant.
    calibrated : Calibrated or None
        The probes; None where they could not be calibrated, or nothing was to rank.
    """

    verdicts: dict[int, GroupVerdicts]
    moments: dict[int, np.ndarray]
    calibrated: Calibrated | None


def rank_groups(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    known: Mapping[int, Sequence[Moments]],
    layers: Mapping[str, LayerTensors],
    input_shape: Sequence[int],
    seed: int,
    statistics: InputStatistics | None,
    progress: Progress,
) -> Ranked:
    """Calibrate probes, measure the groups' moments on them, and order every group's channels.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    groups : sequence of CouplingGroup
        Those that were probed.
    verdicts : mapping of int to GroupVerdicts
        Of all groups, by number.
    known : mapping of int to sequence of Moments
        Their moments on noise and stimuli, which count where nothing can be calibrated.
    layers : mapping of str to LayerTensors
        The layers' stimuli, in order of depth; half of the probes start from the deep ones.
    input_shape : sequence of int
        (C, *size).
    seed : int
        Seed of all that is random.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    progress : Progress
        Told how the work goes.
    """
    found, moments = None, known
    if groups:
        channels, *size = input_shape
        widest = WIDEST[len(size)]
        size = list(probe_size(model, input_shape, [min(extent, widest) for extent in size]))
        starts = calibration_starts(layers, channels, size, calibration.PROBES, seed, statistics)
        progress.start("calibration", len(starts) * calibration.PASSES)
        found = calibrate(model, starts, seed=seed, statistics=statistics, progress=progress)
        progress.finish()
    if found is not None:
        progress.start("ranking", len(found.images) * calibration.VARIANTS)
        moments = gather_moments(model, groups, _batches(model, found.images, seed, progress))
        progress.finish()
    pairs = {number: rank(verdicts[number], readers) for number, readers in moments.items()}
    ranked = {**verdicts, **{number: pair[0] for number, pair in pairs.items()}}
    return Ranked(ranked, {number: pair[1] for number, pair in pairs.items()}, found)


def _batches(
    model: nn.Module, images: Tensor, seed: int, progress: Progress
) -> Iterator[tuple[Tensor, bool]]:
    """Variants of the probes in batches, and which are held out."""
    larger = runs_on(model, images.shape[1], enlarged(images.shape[2:]))
    for moved in variants(images, larger, seed):
        for batch, held_out in split(moved, moved.shape[2:]):
            yield calibration.as_batch(batch), held_out
            progress.advance(len(batch))


def describe(calibrated: Calibrated | None) -> str:
    """Say in a sentence what the removal order rests on."""
    if calibrated is None:
        return (
            "No probes could be calibrated to what batch norms remember of the training data, so the removal "
            "order rests on noise and stimuli: trust budgets beyond the verdicts only after fine-tuning."
        )
    return (
        f"The removal order rests on {len(calibrated.images)} probes, moved until the batch norms saw what "
        f"they saw in training: the distance fell from {calibrated.before:.3g} to {calibrated.distance:.3g}."
    )


def summary(calibrated: Calibrated | None) -> dict[str, Any] | None:
    """What `run.json` says of the calibration."""
    if calibrated is None:
        return None
    return {
        "probes": len(calibrated.images),
        "size": list(calibrated.images.shape[2:]),
        "passes": calibrated.passes,
        "before": calibrated.before,
        "distance": calibrated.distance,
    }

"""The removal order of every coupling group, by what removal does to the network's output.

It is measured on calibration images: synthetic ones where there can be any, and the user's own images
where there are some. How much the output depends on what each consumer gives
(`prune_viz.redundancy.fisher`) weighs what the consumers would lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.calibration.extent import plan_extent
from prune_viz.calibration.images import (
    BATCH,
    SyntheticImages,
    calibration_starts,
    runs_on,
    split,
)
from prune_viz.calibration.synthetic_images import calibrate
from prune_viz.calibration.variants import enlarged, variants
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.tracing import norms_behind
from prune_viz.redundancy.channel_verdicts import GroupVerdicts
from prune_viz.redundancy.dead import are_silent
from prune_viz.redundancy.fisher import FisherMatrices, gather_fisher
from prune_viz.redundancy.gram_matrices import (
    GramMatrices,
    gather_gram_matrices,
    pool_gram_matrices,
    weigh_outputs,
)
from prune_viz.redundancy.judge import note_silent, rank
from prune_viz.redundancy.sign_pairs import weight_signs
from prune_viz.runs.damage import Unit
from prune_viz.utils.progress import counted
from prune_viz.utils.scratch_arrays import ScratchArrays


@dataclass(frozen=True)
class CalibrationImages:
    """Inputs near the training data, those that are fitted to.

    Attributes
    ----------
    synthetic : Tensor or None, shape (N, C, *size)
        Synthetic images, where there can be any.
    examples : Tensor or None, shape (N, C, *size)
        The user's images, in the model's own input units, where there are some.
    seed : int
        Seed of all that is random when they are used.
    unfitted : Tensor or None, shape (N, C, *size)
        Others of the user's images, on which it is only watched which channels are silent.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    """

    synthetic: Tensor | None
    examples: Tensor | None
    seed: int
    unfitted: Tensor | None = None
    statistics: InputStatistics | None = None

    def any(self) -> bool:
        """Whether there are inputs at all."""
        return self.synthetic is not None or self.examples is not None

    def varied(self, model: nn.Module) -> Iterator[Tensor]:
        """Synthetic images in their variants, a set each."""
        if self.synthetic is not None:
            images = self.synthetic
            larger = runs_on(model, images.shape[1], enlarged(images.shape[2:]))
            yield from variants(images, larger, self.seed, self.statistics)


@dataclass(frozen=True)
class Measured:
    """Gram matrices of groups on calibration images.

    Attributes
    ----------
    gram_matrices : dict of int to list of GramMatrices
        By the group's number, one a consumer.
    weighed : dict of int to list of GramMatrices
        The same, weighted by the network output's sensitivity to them, where that is known.
    silent : dict of int to ndarray of bool, each shape (channels,)
        Which channels stay zero on all of the user's own images; empty where there are none.
    ablations : dict of int to ndarray, each shape (channels,), or None
        What silencing each channel costs the network's output (`FisherMatrices.ablations`); None where
        nothing is near the training data or that cannot be measured.
    unit : Unit
        Of damage by the weighed Gram matrices: that of `FisherMatrices`, or a share of the consumers' output.
    signs : dict of int to ndarray of int, each shape (channels, channels)
        Which channels have the same weights, and which opposite ones (`prune_viz.redundancy.sign_pairs`).
    """

    gram_matrices: dict[int, list[GramMatrices]]
    weighed: dict[int, list[GramMatrices]]
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
    gram_matrices : dict of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels of each group that was measured, and a constant.
    """

    verdicts: dict[int, GroupVerdicts]
    gram_matrices: dict[int, np.ndarray]


def synthesise_images(model: nn.Module, network: FilterNetwork, context: RunContext) -> SyntheticImages:
    """Synthesise calibration images that start from dead leaves and from the stimuli of the deep layers.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    network : FilterNetwork
        The same, prepared, for the stimuli.
    context : RunContext
        What the stages of a run share.

    Returns
    -------
    SyntheticImages
        Where nothing can be calibrated (`prune_viz.calibration.synthetic_images.calibrate`), the images that
        calibration would have started from.
    """
    extent = plan_extent(model, network.input_shape)
    starts = calibration_starts(network, extent.size, extent.count, context.seed, context.statistics)
    context.progress.start("calibration", sum(len(kind.images) for kind in starts) * extent.passes)
    found = calibrate(model, starts, context, extent.passes)
    context.progress.finish()
    if found is None:
        images = torch.cat([kind.images.float() for kind in starts])
        return SyntheticImages(images, None, None, 0)
    return found


def measure_fisher(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    calibration: CalibrationImages,
    context: RunContext,
) -> FisherMatrices | None:
    """Measure how the network's output depends on what groups' consumers put out, on calibration images.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    groups : sequence of CouplingGroup
        Those whose consumers count.
    calibration : CalibrationImages
        Synthetic images, of which as many variants are used as the run's effort allows, and the user's.
    context : RunContext
        What the stages of a run share.

    Returns
    -------
    FisherMatrices or None
        None without calibration images, or where nothing can be measured
        (`prune_viz.redundancy.fisher.gather_fisher`).
    """
    if not groups or not calibration.any():
        return None
    progress = context.progress

    def batches() -> Iterator[Tensor]:
        examples = [] if calibration.examples is None else [calibration.examples]
        variants = context.effort.sensitivity_variants
        count = 0 if calibration.synthetic is None else variants * len(calibration.synthetic)
        progress.start("sensitivity", count + sum(map(len, examples)))
        for images in chain(islice(calibration.varied(model), variants), examples):
            for batch in torch.split(images, BATCH):
                yield batch
                progress.advance(len(batch))
        progress.finish()

    return gather_fisher(model, groups, batches, context.output, calibration.seed, context.budget)


def measure_groups(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    known: Mapping[int, Sequence[GramMatrices]],
    calibration: CalibrationImages,
    fisher: FisherMatrices | None,
    context: RunContext,
) -> Measured:
    """Measure groups on calibration images.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, batch norms unfolded; left unchanged.
    groups : sequence of CouplingGroup
        Those to measure.
    known : mapping of int to sequence of GramMatrices
        Their Gram matrices on noise and stimuli, which count where there is nothing nearer.
    calibration : CalibrationImages
        What is near the training data.
    fisher : FisherMatrices or None
        From `measure_fisher`.
    context : RunContext
        What the stages of a run share.
    """
    norms = norms_behind(model)
    signs = {group.number: weight_signs(model, group, norms) for group in groups}
    gram_matrices, silent = _gather(model, groups, calibration, context)
    gram_matrices = gram_matrices or {number: list(consumers) for number, consumers in known.items()}
    if fisher is None:
        return Measured(gram_matrices, gram_matrices, silent, None, Unit.CONSUMERS, signs)
    store = ScratchArrays(context.budget)
    weighed = {
        group.number: weigh_outputs(model, group, gram_matrices[group.number], fisher.consumers, store)
        for group in groups
    }
    return Measured(gram_matrices, weighed, silent, fisher.ablations, fisher.unit, signs)


def rank_groups(verdicts: Mapping[int, GroupVerdicts], measured: Measured) -> Ranked:
    """Order every measured group's channels.

    Parameters
    ----------
    verdicts : mapping of int to GroupVerdicts
        Of all groups, by number.
    measured : Measured
        Their Gram matrices.
    """
    ranked, pooled = dict(verdicts), {}
    for number, gram_matrices in measured.gram_matrices.items():
        ablations = None if measured.ablations is None else measured.ablations[number]
        ranked[number], pooled[number] = rank(
            verdicts[number],
            gram_matrices,
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
    calibration: CalibrationImages,
    context: RunContext,
) -> tuple[dict[int, list[GramMatrices]], dict[int, np.ndarray]]:
    """The groups' Gram matrices on all calibration images, and which channels examples leave silent."""
    parts, counts, silent = [], [], {}
    if (calibrated := calibration.synthetic) is not None:
        variants = context.effort.variants
        count = variants * len(calibrated)

        def moved() -> Iterator[tuple[Tensor, bool]]:
            copies = islice(calibration.varied(model), variants)
            return counted(context.progress, "ranking", _split(copies), count)

        parts.append(gather_gram_matrices(model, groups, moved, context.budget))
        counts.append(len(calibrated))
    if (examples := calibration.examples) is not None:

        def shown() -> Iterator[tuple[Tensor, bool]]:
            return counted(context.progress, "ranking data", _split([examples]), len(examples))

        seen = gather_gram_matrices(model, groups, shown, context.budget)
        silent = {number: are_silent(consumers) for number, consumers in seen.items()}
        if (others := calibration.unfitted) is not None and len(others):
            unfitted = gather_gram_matrices(model, groups, lambda: _split([others]), context.budget)
            silent = {number: silent[number] & are_silent(unfitted[number]) for number in silent}
        parts.append(seen)
        counts.append(len(examples))
    if not parts:
        return {}, {}
    shares = [count / sum(counts) for count in counts]
    pooled = {
        group.number: pool_gram_matrices([part[group.number] for part in parts], shares) for group in groups
    }
    return pooled, silent


def _split(sets: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    for images in sets:
        yield from split(images, images.shape[2:])

"""What removal costs, measured as a run ends: the curves of groups, budgets, and the run's own masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration.image_files import RunImages
from prune_viz.calibration.images import fitted
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.copies import plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.pruning.compensation import compensate_filters
from prune_viz.pruning.curves import (
    budget_passes,
    curve_passes,
    measure_budgets,
    measure_curves,
    predicted_total,
)
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import BATCH, OutputMeter, affordable, meter_on
from prune_viz.pruning.rankings import read_rankings
from prune_viz.redundancy.channel_verdicts import GroupVerdicts
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.decisions_json import Allocation, Decisions, prediction_record
from prune_viz.utils.devices import workers_on
from prune_viz.utils.memory import RowLimit


@dataclass(frozen=True)
class Meters:
    """What measures changes of a network.

    Attributes
    ----------
    whole : nn.Module or None
        A copy of the network, in single precision on the run's device.
    every, unseen : OutputMeter or None
        On the images of the fits, and on those that no fit saw; None where nothing can be measured, or
        where that would take too long.
    """

    whole: nn.Module | None
    every: OutputMeter | None
    unseen: OutputMeter | None


NO_METERS = Meters(None, None, None)


def make_meters(prepared: Prepared, images: RunImages, rough: bool, context: RunContext) -> Meters:
    """Meters for what is analysed.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    images : RunImages
        The run's images.
    rough : bool
        Whether more is measured, as measurements are rough (`prune_viz.pruning.curves`).
    context : RunContext
        What the stages of a run share.
    """
    every = images.fitted
    if images.are_real and prepared.examples is not None:
        every = fitted(prepared.examples)
    if every is None or images.kept_out is None or not prepared.judged:
        return NO_METERS
    shape = prepared.network.input_shape
    whole = plain_copy(prepared.model).float().to(prepared.network.device)
    macs, workers = count_cost(whole, shape)[1], workers_on(prepared.network.device)

    def meter(given: Tensor, passes: int) -> OutputMeter | None:
        chosen = affordable(given, macs, shape[1:], passes, context.effort.measuring)
        if chosen is None:
            return None
        most = workers * BATCH  # as many networks are measured at a time
        rows = RowLimit(context.budget, whole, backward=False).rows(chosen.shape[1:], most)
        return meter_on(whole, chosen, context.output, rows // workers)

    passes = curve_passes(prepared.judged, rough) + budget_passes(rough)
    return Meters(whole, meter(every, passes), meter(images.kept_out, passes))


def measured_orders(
    meters: Meters,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    rough: bool,
    context: RunContext,
) -> dict[int, GroupVerdicts]:
    """Verdicts of all groups whose removal orders cost what was measured (`curves.measure_curves`)."""
    if meters.whole is None or meters.every is None:
        return dict(verdicts)
    ranked = [group for group in groups if verdicts[group.number].order]
    return measure_curves(
        meters.whole,
        ranked,
        verdicts,
        gram_matrices,
        meters.every,
        meters.unseen,
        rough,
        context.progress,
    )


def measured_decisions(
    meters: Meters,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    decisions: Decisions,
    masks: Masks,
    context: RunContext,
) -> Decisions:
    """Decisions with what budgets and the run's own masks were measured to cost.

    Parameters
    ----------
    meters : Meters
        What measures the network.
    groups : sequence of CouplingGroup
        Those that were judged.
    verdicts : mapping of int to GroupVerdicts
        By the group's number.
    gram_matrices : mapping of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels and a constant.
    decisions : Decisions
        What was decided.
    masks : Masks
        The run's own masks; what they cost is noted there too.
    context : RunContext
        What the stages of a run share.
    """
    whole, every, unseen = meters.whole, meters.every, meters.unseen
    if whole is None or every is None or unseen is None or decisions.damage_unit is Unit.CONSUMERS:
        return decisions
    rankings, rough = read_rankings(decisions), masks.is_unfounded
    tried = measure_budgets(
        whole, groups, verdicts, gram_matrices, rankings, decisions.macs, every, unseen, rough,
        context.progress,
    )  # fmt: skip
    if masks.removed:
        flagged = sum(one.damage_of_first(one.flagged) for one in rankings)
        total = predicted_total(flagged, tried, Allocation.DAMAGE)
        masks.predicted = Damage(total, decisions.damage_unit)
        changed = plain_copy(whole)
        compensate_filters(changed, masks, groups, unseen)
        masks.measured = unseen.damage(changed)
        masks.measured_on = unseen.describe(masks.images.are_real)
    return replace(
        decisions,
        budgets=tried,
        predicted=prediction_record(masks.predicted),
        measured=prediction_record(masks.measured),
        measured_on=masks.measured_on,
    )

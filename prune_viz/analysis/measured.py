"""What removal costs, measured as a run ends: the curves of groups, budgets, and the run's own masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.copies import plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.pruning.compensation import compensate_filters
from prune_viz.pruning.curves import measure_budgets, measure_curves, predicted_total
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import BATCH, OutputMeter, affordable, meter_on
from prune_viz.pruning.rankings import read_rankings
from prune_viz.redundancy.channel_verdicts import GroupVerdicts
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.decisions_json import Allocation, Decisions, prediction_record
from prune_viz.utils.memory import RowLimit


def meter_for(
    model: nn.Module, input_shape: Sequence[int], images: Tensor | None, passes: int, context: RunContext
) -> OutputMeter | None:
    """A meter on images, shape (N, C, *size), as many as so many passes can afford; None without any."""
    if images is None or not passes:
        return None
    macs = count_cost(model, input_shape)[1]
    chosen = affordable(images, macs, input_shape[1:], passes)
    rows = RowLimit(context.budget, model, backward=False).rows(chosen.shape[1:], BATCH)
    return meter_on(model, chosen, context.output, rows)


def measured_orders(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    meter: OutputMeter | None,
    rough: str,
    context: RunContext,
) -> dict[int, GroupVerdicts]:
    """Verdicts of all groups whose removal orders cost what was measured (`curves.measure_curves`)."""
    ranked = [group for group in groups if verdicts[group.number].order]
    if meter is None:
        return dict(verdicts)
    return measure_curves(model, ranked, verdicts, gram_matrices, meter, bool(rough), context.progress)


def measured_decisions(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    gram_matrices: Mapping[int, np.ndarray],
    meter: OutputMeter | None,
    kept_out: OutputMeter | None,
    decisions: Decisions,
    masks: Masks,
    context: RunContext,
) -> Decisions:
    """Decisions with what budgets and the run's own masks were measured to cost.

    Parameters
    ----------
    model : nn.Module
        The whole network in eval mode; left unchanged.
    groups : sequence of CouplingGroup
        Those that were judged.
    verdicts : mapping of int to GroupVerdicts
        By the group's number.
    gram_matrices : mapping of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of the channels and a constant.
    meter, kept_out : OutputMeter or None
        Measure the network on all images, and on those kept out of all fits; without them nothing is
        measured.
    decisions : Decisions
        What was decided.
    masks : Masks
        The run's own masks; what they cost is noted there too.
    context : RunContext
        What the stages of a run share.
    """
    if meter is None or kept_out is None or decisions.damage_unit is Unit.CONSUMERS:
        return decisions
    rankings = read_rankings(decisions)
    tried = measure_budgets(
        model, groups, verdicts, gram_matrices, rankings, decisions.macs, meter, kept_out,
        bool(masks.rough), context.progress,
    )  # fmt: skip
    if masks.removed:
        flagged = sum(one.damage_of_first(one.flagged) for one in rankings)
        total = predicted_total(flagged, tried, Allocation.DAMAGE)
        masks.predicted = Damage(total, decisions.damage_unit)
        changed = plain_copy(model)
        compensate_filters(changed, masks, groups)
        masks.measured = kept_out.damage(changed)
    return replace(
        decisions,
        budgets=tried,
        predicted=prediction_record(masks.predicted),
        measured=prediction_record(masks.measured),
    )

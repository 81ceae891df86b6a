"""From stimuli to what follows from them: verdicts, masks, and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from prune_viz.analysis.decisions import decisions_of, masks_of
from prune_viz.analysis.filter_rows import filter_table
from prune_viz.analysis.measured import (
    NO_METERS,
    Meters,
    make_meters,
    measured_decisions,
    measured_orders,
)
from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration import synthetic_images
from prune_viz.calibration.image_files import (
    RunImages,
    examples_to_keep,
    load_synthetic_images,
    write_run_images,
)
from prune_viz.calibration.images import SyntheticImages, fitted, kept_out
from prune_viz.channels.groups import CouplingGroup, group_of_layer
from prune_viz.embedding.network_map import NetworkMaps
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.priors import are_photographs
from prune_viz.feature_visualization.top_patches import find_top_patches, write_top_patches
from prune_viz.network.calls import blank_input
from prune_viz.network.cost import count_cost, count_macs
from prune_viz.pruning.masks import Masks, write_plain_masks
from prune_viz.pruning.remove import remove_and_compensate
from prune_viz.redundancy import basis
from prune_viz.redundancy.channel_verdicts import GroupVerdicts, keep_each_layer
from prune_viz.redundancy.fisher import FisherMatrices
from prune_viz.redundancy.gram_matrices import GramMatrices, rounds
from prune_viz.redundancy.group_verdicts import calibration_copy, gather_on_stimuli, judge_groups
from prune_viz.redundancy.importance import (
    CalibrationImages,
    measure_fisher,
    measure_groups,
    rank_groups,
    synthesise_images,
)
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import LayerFiles, RunDirectory
from prune_viz.runs.verdicts import Verdict
from prune_viz.utils.errors import UserError
from prune_viz.utils.scratch_arrays import ScratchArrays


@dataclass(frozen=True)
class Conclusions:
    """What follows from the stimuli.

    Attributes
    ----------
    filters : DataFrame
        A row a filter, columns `filters_csv.FILTER_COLUMNS`.
    masks : Masks
        Consistent over coupling groups.
    provenance : dict
        For `run.json`: ``calibration, damage_unit, summary``.
    notes : list of str
        For the report.
    """

    filters: pd.DataFrame
    masks: Masks
    provenance: dict[str, Any]
    notes: list[str]


def conclude(
    prepared: Prepared, run: RunDirectory, key: str, maps: NetworkMaps, context: RunContext
) -> Conclusions:
    """Judge and rank the filters of layers whose stimuli are in the run directory.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    run : RunDirectory
        Where stimuli are, and conclusions go.
    key : str
        Of the model and its inputs, from `tasks.stimuli_key`, on which calibration images depend.
    maps : NetworkMaps
        Where the filters lie on the layers' maps and on that of the network.
    context : RunContext
        What the stages share. Groups are judged in parts whose Gram matrices fit in memory; those of a group
        that does not fit alone are kept in the run directory meanwhile.

    Returns
    -------
    Conclusions

    Raises
    ------
    UserError
        If a layer's file is damaged, or the run directory cannot be written.
    """
    model, network, groups = prepared.model, prepared.network, prepared.groups
    found = LayerFiles(run, prepared.records)
    judged = _judge(prepared, run, found, key, context)
    notes = [] if judged.basis is None else [judged.basis]
    if judged.rough.why and prepared.judged:
        notes.append(f"Predicted and measured changes of the output are rough: {judged.rough.why}.")
    if prepared.examples is not None:
        with context.stage("examples"):
            parts = find_top_patches(
                network, prepared.layers, prepared.examples, context.statistics, context.budget
            )
        if parts is not None:
            write_top_patches(parts, {one.name: one.slug for one in prepared.records}, run.examples_file)
    table = filter_table(
        prepared.layers, found, *maps, group_of_layer(groups), judged.verdicts, prepared.unjudged
    )
    counts_of_layers = {layer.name: layer.filters for layer in network.layers}
    masks = masks_of(table, groups, judged.verdicts, counts_of_layers, prepared.origin, judged.unit)
    masks.images = judged.images
    masks.rough, masks.is_unfounded = judged.rough.why, judged.rough.is_unfounded
    run.write_filters(table)
    macs = count_macs(model, network.input_shape)
    modules = dict(model.named_modules())
    with context.stage("budgets"):
        decisions = measured_decisions(
            judged.meters, prepared.judged, judged.verdicts, judged.gram_matrices,
            decisions_of(table, groups, judged.verdicts, masks, modules, macs, judged.unit),
            masks, context,
        )  # fmt: skip
    run.write_decisions(decisions)
    run.write_gram_matrices(judged.gram_matrices)
    write_plain_masks(masks, run.masks_file)
    with context.stage("removal"):
        context.progress.start("removal", 1)
        summary = _summary(prepared, table, masks, notes)
        context.progress.finish()
    provenance = {"calibration": judged.calibration, "damage_unit": judged.unit, "summary": summary}
    return Conclusions(table, masks, provenance, notes)


@dataclass(frozen=True)
class _Judged:
    """Verdicts and what they rest on.

    Attributes
    ----------
    verdicts : dict of int to GroupVerdicts
        By the group's number.
    gram_matrices : dict of int to ndarray
        Second moments of the groups that were judged.
    unit : Unit
        Of damage.
    images : RunImages
        The synthetic calibration images, and the user's that were kept out.
    meters : Meters
        What measures the change of the network's output.
    rough : Roughness
        How far predictions can be trusted.
    basis : str or None
        What the removal order rests on, for people; None where nothing was judged.
    calibration : dict or None
        What `run.json` holds of the calibration.
    """

    verdicts: dict[int, GroupVerdicts]
    gram_matrices: dict[int, np.ndarray]
    unit: Unit
    images: RunImages
    meters: Meters
    rough: basis.Roughness
    basis: str | None
    calibration: dict[str, Any] | None


def _judge(
    prepared: Prepared, run: RunDirectory, found: LayerFiles, key: str, context: RunContext
) -> _Judged:
    """Calibrate, and judge and rank the groups, as many at a time as memory holds."""
    judged, examples = prepared.judged, prepared.examples
    twin = calibration_copy(prepared.model, prepared.network)
    calibrated = None
    if judged:
        with context.stage("calibration"):
            calibrated = _calibrate(twin, prepared, run, key, context)
    images = RunImages(None if calibrated is None else calibrated.images, examples_to_keep(examples))
    write_run_images(images, run.calibration_images_file, calibrated, _calibration_key(key, context))
    calibration = CalibrationImages(
        images.fitted,
        None if examples is None else fitted(examples),
        context.seed,
        None if examples is None else kept_out(examples),
        context.statistics,
    )
    with context.stage("sensitivity"):
        fisher = measure_fisher(twin, judged, calibration, context)
    verdicts = judge_groups(prepared.groups, {}, context.quietly())
    gram_matrices = _allocate_gram_matrices(judged, context)
    for part in rounds(judged, context.host_memory() // 2):
        verdicts = _judge_part(
            twin, prepared, part, found, calibration, fisher, verdicts, gram_matrices, context
        )
    verdicts = {group.number: keep_each_layer(group, verdicts[group.number]) for group in prepared.groups}
    unit = fisher.unit if fisher else Unit.CONSUMERS
    predicted = basis.predictions_on(twin, calibrated, context.output)
    count = 0 if examples is None else len(examples)
    rests_on = basis.describe(calibrated, predicted, count, unit) if judged else None
    distance = basis.distance_of(twin, examples)
    rough = basis.find_roughness(
        calibrated, count, distance, prepared.network.input_shape, context.statistics
    )
    with context.stage("curves"):
        meters = (
            make_meters(prepared, images, rough.is_unfounded, context) if fisher is not None else NO_METERS
        )
        verdicts = measured_orders(meters, judged, verdicts, gram_matrices, rough.is_unfounded, context)
    if fisher is not None and meters.every is None and not rough.is_unfounded:
        rough = basis.Roughness(basis.UNMEASURED, True)
    summary = basis.summary(calibrated, predicted)
    return _Judged(verdicts, gram_matrices, unit, images, meters, rough, rests_on, summary)


def _judge_part(
    twin: nn.Module,
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    found: LayerFiles,
    calibration: CalibrationImages,
    fisher: FisherMatrices | None,
    verdicts: dict[int, GroupVerdicts],
    gram_matrices: dict[int, np.ndarray],
    context: RunContext,
) -> dict[int, GroupVerdicts]:
    """Verdicts with those of some groups; fills their `gram_matrices`.

    A function, so that no Gram matrix of these groups outlives it.
    """
    some, on_stimuli = _judge_on_stimuli(twin, prepared, groups, found, calibration, context)
    with context.stage("ranking"):
        measured = measure_groups(twin, groups, on_stimuli, calibration, fisher, context)
        ranked = rank_groups({**verdicts, **some}, measured)
        for number, matrix in ranked.gram_matrices.items():
            gram_matrices[number][:] = matrix
    return ranked.verdicts


def _judge_on_stimuli(
    twin: nn.Module,
    prepared: Prepared,
    groups: Sequence[CouplingGroup],
    found: LayerFiles,
    calibration: CalibrationImages,
    context: RunContext,
) -> tuple[dict[int, GroupVerdicts], dict[int, list[GramMatrices]]]:
    """Verdicts of some groups on noise and stimuli; their Gram matrices where there are no better images."""
    with context.stage("gram matrices"):
        examples = None if prepared.examples is None else fitted(prepared.examples)
        gram_matrices = gather_on_stimuli(twin, prepared.network, groups, found, examples, context)
    with context.stage("verdicts"):
        verdicts = judge_groups(groups, gram_matrices, context)
    return verdicts, {} if calibration.any() else gram_matrices


def _calibrate(
    twin: nn.Module, prepared: Prepared, run: RunDirectory, key: str, context: RunContext
) -> SyntheticImages | None:
    """Synthetic images, those of an earlier run of the same model where the directory holds them.

    None where the user gave examples enough, and the inputs are no photographs: those beside which nothing
    synthetic is needed.
    """
    examples, shape = prepared.examples, prepared.network.input_shape
    enough = examples is not None and len(examples) >= basis.ENOUGH_EXAMPLES
    if enough and not are_photographs(shape):
        return None
    calibrated = load_synthetic_images(run.calibration_images_file, _calibration_key(key, context))
    if calibrated is None:
        calibrated = synthesise_images(twin, prepared.network, context)
    return None if enough and calibrated.distance is None else calibrated


def _calibration_key(key: str, context: RunContext) -> str:
    """Digest of all that synthetic images depend on."""
    parts = [key, asdict(context.output), synthetic_images.settings()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _allocate_gram_matrices(groups: Sequence[CouplingGroup], context: RunContext) -> dict[int, np.ndarray]:
    """Room for each group's pooled Gram matrices, (channels + 1, channels + 1), all in one array."""
    sides = {group.number: group.channels + 1 for group in groups}
    whole = ScratchArrays(context.budget).zeros([sum(side**2 for side in sides.values())], np.float32)
    whole[:] = 0  # its pages are taken now, so that later estimates of memory are right
    ends = np.cumsum([side**2 for side in sides.values()])
    return {
        number: whole[end - side**2 : end].reshape(side, side)
        for (number, side), end in zip(sides.items(), ends, strict=True)
    }


def _summary(prepared: Prepared, table: pd.DataFrame, masks: Masks, notes: list[str]) -> dict[str, Any]:
    """Counts of filters by verdict, and the network's size before and after."""
    shape = prepared.network.input_shape
    before = count_cost(prepared.model, shape)
    after = _cost_after(prepared, masks, before, notes)
    counts = {verdict.value: int((table["verdict"] == verdict).sum()) for verdict in Verdict}
    return {
        "filters": len(table), **counts, "parameters": before[0], "parameters_after": after[0],
        "macs": before[1], "macs_after": after[1],
    }  # fmt: skip


def _cost_after(prepared: Prepared, masks: Masks, cost: tuple[int, int], notes: list[str]) -> tuple[int, int]:
    """Parameters and MACs once the masked filters are removed for real."""
    if not masks.removed:
        return cost
    model, shape = prepared.model, prepared.network.input_shape
    try:
        smaller, _ = remove_and_compensate(
            model, masks, blank_input(model, shape), groups=prepared.groups or None
        )
        return count_cost(smaller, shape)
    except UserError as error:
        notes.append(f"What removal saves could not be measured: {error}")
        return cost

"""From stimuli to what follows from them: verdicts, masks, places on maps, and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from prune_viz.analysis.decisions import decisions_of, filter_table, masks_of
from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration import synthetic_images
from prune_viz.calibration.images import Calibrated, load_probes, save_probes
from prune_viz.channels.groups import CouplingGroup, group_of_layer
from prune_viz.embedding.network_map import embed_network
from prune_viz.feature_visualization.top_patches import find_top_patches, write_top_patches
from prune_viz.network.calls import blank_input
from prune_viz.pruning.masks import Masks, write_plain_masks
from prune_viz.pruning.remove import count_cost, count_macs, remove_filters
from prune_viz.redundancy import importance
from prune_viz.redundancy.gram_matrices import rounds
from prune_viz.redundancy.importance import (
    NearInputs,
    calibrated_probes,
    measure_groups,
    rank_groups,
    sense_output,
)
from prune_viz.redundancy.verdicts import judge_groups, probe_groups, probing_copy
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import LayerFiles, RunDirectory
from prune_viz.runs.stages import Stages
from prune_viz.runs.verdicts import Verdict
from prune_viz.utils.array_files import evict
from prune_viz.utils.devices import release_memory
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import Budget
from prune_viz.utils.progress import Progress
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
    prepared: Prepared, run: RunDirectory, key: str, stages: Stages, progress: Progress, budget: Budget
) -> Conclusions:
    """Probe, judge, rank and embed the filters of layers whose stimuli are in the run directory.

    Parameters
    ----------
    subject : Subject
        What is analysed.
    run : RunDirectory
        Where stimuli are, and conclusions go.
    key : str
        From `tasks.stimuli_key`.
    stages : Stages
        Told how long what takes.
    progress : Progress
        Told how the work goes.
    budget : Budget
        Memory that may be taken. Groups whose moments do not fit together are judged in turns; of one that
        does not fit alone they are kept in the run directory meanwhile.

    Returns
    -------
    Conclusions

    Raises
    ------
    UserError
        If a layer's file is damaged, or the run directory cannot be written.
    """
    model, network, seed, statistics = prepared.model, prepared.network, prepared.seed, prepared.statistics
    groups, examples, notes = prepared.groups, prepared.examples, []
    found = LayerFiles(run, prepared.records)
    judged = prepared.judged
    budget = replace(budget, folder=run.path)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with stages.timed(name):
            yield
        release_memory(network.device)

    twin = probing_copy(model, network)
    calibrated = None
    if judged:
        with stage("calibration"):
            calibrated = _calibrate(twin, prepared, run, found, progress, key, budget)
    if calibrated is None:
        run.probes_file.unlink(missing_ok=True)  # an earlier run's
    near = NearInputs(None if calibrated is None else calibrated.images, examples, seed)
    with stage("sensitivity"):
        sensitivities = sense_output(twin, judged, near, progress, budget)
    verdicts, pooled = judge_groups(groups, {}, Progress()), _squares(judged, budget)
    for part in rounds(judged, budget.of_host().left() // 2):
        with stage("probes"):
            moments = probe_groups(twin, network, part, found, examples, seed, statistics, progress, budget)
        with stage("verdicts"):
            verdicts.update(judge_groups(part, moments, progress))
        with stage("ranking"):
            known = {} if near.any() else moments
            del moments  # a square of its channels for every reader of a group
            measured = measure_groups(twin, part, known, near, sensitivities, progress, budget)
            ranked = rank_groups(verdicts, measured)
            del measured
        verdicts = ranked.verdicts
        for number, matrix in ranked.moments.items():
            pooled[number][:] = matrix
            evict(pooled[number])
        del ranked
    unit = sensitivities.unit if sensitivities else Unit.READERS
    predicted = importance.predictions_on(twin, calibrated)
    del twin, sensitivities  # what follows needs the room
    if judged:
        count = 0 if examples is None else len(examples)
        notes.append(importance.describe(calibrated, predicted, count, unit))
    with stage("embedding"):
        embeddings, places = embed_network(network, prepared.layers, found, seed, progress, budget)
    if examples is not None:
        with stage("examples"):
            parts = find_top_patches(network, prepared.layers, examples, statistics, budget)
        if parts is not None:
            write_top_patches(parts, {one.name: one.slug for one in prepared.records}, run.examples_file)
    table = filter_table(prepared.layers, found, embeddings, places, group_of_layer(groups), verdicts)
    counts_of_layers = {layer.name: layer.filters for layer in network.layers}
    masks = masks_of(table, groups, verdicts, counts_of_layers, prepared.origin, unit)
    masks.probes = near.calibrated
    run.write_filters(table)
    macs = count_macs(model, network.input_shape)
    decisions = decisions_of(table, groups, verdicts, masks, dict(model.named_modules()), macs, unit)
    run.write_decisions(decisions)
    run.write_moments(pooled)
    write_plain_masks(masks, run.masks_file)
    with stage("removal"):
        summary = _summary(prepared, table, masks, notes)
    provenance = {
        "calibration": importance.summary(calibrated, predicted),
        "damage_unit": unit,
        "summary": summary,
    }
    return Conclusions(table, masks, provenance, notes)


def _calibrate(
    twin: nn.Module,
    prepared: Prepared,
    run: RunDirectory,
    found: LayerFiles,
    progress: Progress,
    key: str,
    budget: Budget,
) -> Calibrated | None:
    """Calibrated probes, those of an earlier run where they are of the same model, options and layers."""
    parts = [key, list(found), synthetic_images.settings()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    calibrated = load_probes(run.probes_file, key)
    if calibrated is None:
        shape, statistics = prepared.network.input_shape, prepared.statistics
        calibrated = calibrated_probes(twin, found, shape, prepared.seed, statistics, progress, budget)
        if calibrated is not None:
            save_probes(calibrated, run.probes_file, key)
    return calibrated


def _squares(groups: Sequence[CouplingGroup], budget: Budget) -> dict[int, np.ndarray]:
    """Room for each group's pooled moments, (channels + 1, channels + 1), all in one array."""
    sides = {group.number: group.channels + 1 for group in groups}
    whole = ScratchArrays(budget).zeros([sum(side**2 for side in sides.values())], np.float32)
    whole[:] = 0  # taken now, so that what is left is known
    evict(whole)
    ends = np.cumsum([side**2 for side in sides.values()])
    return {
        number: whole[end - side**2 : end].reshape(side, side)
        for (number, side), end in zip(sides.items(), ends, strict=True)
    }


def _summary(prepared: Prepared, table: pd.DataFrame, masks: Masks, notes: list[str]) -> dict[str, Any]:
    """Counts of filters by verdict, and the network's size before and after."""
    shape = prepared.network.input_shape
    before = count_cost(prepared.model, shape)
    after = _cost_after(prepared.model, masks, shape, before, notes)
    counts = {verdict.value: int((table["verdict"] == verdict).sum()) for verdict in Verdict}
    return {
        "filters": len(table), **counts, "parameters": before[0], "parameters_after": after[0],
        "macs": before[1], "macs_after": after[1],
    }  # fmt: skip


def _cost_after(
    model: nn.Module, masks: Masks, input_shape: tuple[int, ...], cost: tuple[int, int], notes: list[str]
) -> tuple[int, int]:
    """Parameters and MACs once the masked filters are removed for real."""
    if not masks.removed:
        return cost
    try:
        smaller = remove_filters(model, masks, blank_input(model, input_shape))
        return count_cost(smaller, input_shape)
    except UserError as error:
        notes.append(f"What removal saves could not be measured: {error}")
        return cost

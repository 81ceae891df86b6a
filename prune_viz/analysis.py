"""The whole way from a model to a run directory: `analyze`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from prune_viz import (
    __version__,
    calibration,
    coupling,
    leaves,
    objectives,
    ranking,
    redundancy,
    responses,
    surgery,
)
from prune_viz.decisions import decisions_json, filter_table, masks_of
from prune_viz.dependencies import UntraceableError
from prune_viz.devices import pick_device
from prune_viz.errors import LayerError, UserError, few, one_line
from prune_viz.exciting import find_exciting_parts, write_exciting_parts
from prune_viz.filters import FilterNetwork, blank_input
from prune_viz.groups import CouplingGroup, group_of_layer
from prune_viz.inputs import InputStatistics, read_inputs
from prune_viz.layers import Layer, select_layers
from prune_viz.masks import Masks, write_plain_masks
from prune_viz.network_map import embed_network
from prune_viz.origin import Origin, hash_model
from prune_viz.probes import Calibrated, load_probes, save_probes
from prune_viz.progress import Progress
from prune_viz.provenance import Stages, peak_mib, versions
from prune_viz.ranking import calibrated_probes, measure_groups, rank_groups
from prune_viz.report import write_report
from prune_viz.runs import FORMAT, LayerFiles, LayerRecord, LayerTensors, RunDirectory, slug, write_json
from prune_viz.stimuli import STEPS, as_stored, ascend, check_options
from prune_viz.verdicts import judge_groups, probe_groups, probing_copy
from prune_viz.weights import check_finite


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes
    ----------
    filters : DataFrame
        A row a filter, columns `runs.FILTER_COLUMNS`.
    masks : Masks
        A mask for every convolution that runs, True = keep, consistent over coupling groups.
    layers : mapping of str to LayerTensors
        Stimuli, activations and responses of each layer, read when asked for.
    summary : dict
        ``filters, keep, redundant, dead, parameters, parameters_after, macs, macs_after, seconds,
        peak_mib``.
    out : Path or None
        The run directory; None if the run was not kept.
    """

    filters: pd.DataFrame
    masks: Masks
    layers: Mapping[str, LayerTensors]
    summary: dict[str, Any]
    out: Path | None


def analyze(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    out: str | Path | None = None,
    layers: Sequence[str] = (),
    prior: str = "natural",
    steps: int = STEPS,
    canvas: int | None = None,
    seed: int = 0,
    device: str = "auto",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    data: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    source: Mapping[str, Any] | None = None,
) -> Analysis:
    """Find stimuli, responses, redundant and dead filters of a network, and write a run directory.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    input_shape : sequence of int
        Shape of one input, channels first: ``(3, 224, 224)``.
    out : path, optional
        The run directory. A run of the same model and options that was cut short is taken up where it
        stopped. Without it nothing is kept but what is returned.
    layers : sequence of str
        Shell patterns of layer names to look at; all layers by default.
    prior, steps, canvas, seed, device, mean, std
        See `prune_viz.stimuli.maximize`.
    data : path, optional
        A folder of example inputs, read by `prune_viz.inputs.read_images`; what is natural is measured on
        them, and so are mean and std unless given, and filters are compared on them too.
    fresh : bool
        Start over, whatever the run directory holds.
    progress : Progress, optional
        Told how the work goes.
    source : mapping, optional
        Where the model came from, for `run.json`: ``path, sha256, arch, arch_kwargs, trust_pickle``.

    Returns
    -------
    Analysis

    Raises
    ------
    UserError
        If the weights are not finite, the input shape does not fit, a pattern matches no layer, `data`
        holds no input, or `out` cannot be written or holds something else.
    """
    progress = progress or Progress()
    check_finite(model)
    check_options(prior, steps)
    if canvas is not None and canvas < 1:
        raise UserError(f"--canvas must be at least 1, not {canvas}")
    network = FilterNetwork(model, input_shape, canvas, pick_device(device))
    if network.overflowing:
        raise UserError(
            f"{network.overflowing[0]} gives values that are not finite on noise; its weights are too large"
        )
    chosen = select_layers(network.layers, layers)
    statistics, examples, unread = read_inputs(network.input_shape, mean, std, data, out)
    weights_sha256 = hash_model(model)
    source = {"sha256": weights_sha256, **(source or {})}
    options = {
        "prior": prior,
        "steps": steps,
        "canvas": canvas,
        "data": None if data is None else str(data),
        "layers": list(layers),
        "device": str(network.device),
        "tolerance": redundancy.TOLERANCE,
    }
    temporary = tempfile.TemporaryDirectory(prefix="prune-viz-") if out is None else None
    run = RunDirectory(Path(temporary.name) if temporary is not None else Path(str(out)))
    run.claim(str(source["sha256"]), fresh)

    stages = Stages()
    groups, notes = _couple(model, network)
    notes += unread
    tied = group_of_layer(groups)
    records = [_record(layer, tied.get(layer.name)) for layer in chosen]
    cost = surgery.count_cost(model, network.input_shape)
    provenance: dict[str, Any] = {
        "format": FORMAT,
        "state": "running",
        "model": {
            "path": None, "arch": None, "arch_kwargs": {}, "trust_pickle": False, "held_inputs": None,
            **source,
            "class_name": type(model).__name__, "parameters": cost[0], "macs": cost[1],
            "input_shape": list(network.input_shape),
        },
        "inputs": None if statistics is None else asdict(statistics),
        "options": options,
        "seed": seed,
        "versions": versions(),
        "device": str(network.device),
        "threads": torch.get_num_threads(),
        "started": _now(),
        "layers": [asdict(record) for record in records],
        "notes": notes,
    }  # fmt: skip
    run.write_provenance(provenance)

    with progress:
        key = _stimuli_key(provenance)
        ascents = {"prior": prior, "steps": steps, "seed": seed, "statistics": statistics}
        notes += _find_stimuli(network, records, run, stages, progress, ascents, key)
        found = LayerFiles(run, records)
        judged = [group for group in groups if group.removable and set(found).issuperset(group.layers)]
        with stages.timed("probes"):
            twin = probing_copy(model, network)
            moments = probe_groups(twin, network, judged, found, examples, seed, statistics, progress)
        with stages.timed("verdicts"):
            verdicts = judge_groups(groups, moments, progress)
        calibrated = None
        if judged:
            with stages.timed("calibration"):
                calibrated = _calibrate(twin, network, run, found, seed, statistics, progress, key)
        if calibrated is None:
            run.probes_file.unlink(missing_ok=True)  # an earlier run's
        with stages.timed("ranking"):
            near = None if calibrated is None else calibrated.images
            measured = measure_groups(twin, judged, moments, near, examples, seed, progress)
            ranked = rank_groups(verdicts, measured)
            verdicts = ranked.verdicts
        predicted = ranking.predictions_on(twin, calibrated)
        provenance["calibration"] = ranking.summary(calibrated, predicted)
        if judged:
            count = 0 if examples is None else len(examples)
            notes.append(ranking.describe(calibrated, predicted, count, measured.unit))
        provenance["damage_unit"] = measured.unit
        with stages.timed("embedding"):
            embeddings, places = embed_network(network, chosen, found, seed, progress)
        if examples is not None:
            with stages.timed("examples"):
                parts = find_exciting_parts(network, chosen, examples, statistics)
            if parts is not None:
                write_exciting_parts(parts, {one.name: one.slug for one in records}, run.examples_file)
        table = filter_table(chosen, found, embeddings, places, tied, verdicts)
        counts_of_layers = {layer.name: layer.filters for layer in network.layers}
        origin = Origin(str(source["sha256"]), weights_sha256)
        masks = masks_of(table, groups, verdicts, counts_of_layers, origin, measured.unit)
        masks.probes = near
        run.write_filters(table)
        macs = surgery.count_macs(model, network.input_shape)
        modules = dict(model.named_modules())
        decisions = decisions_json(table, groups, verdicts, masks, modules, macs, measured.unit)
        write_json(run.decisions_file, decisions)
        run.write_moments(ranked.moments)
        write_plain_masks(masks, run.masks_file)
        with stages.timed("removal"):
            after = _cost_after(model, masks, network.input_shape, cost, notes)
        counts = {
            verdict: int((table["verdict"] == verdict).sum()) for verdict in ("keep", "redundant", "dead")
        }
        summary: dict[str, Any] = {
            "filters": len(table), **counts, "parameters": cost[0], "parameters_after": after[0],
            "macs": cost[1], "macs_after": after[1],
        }  # fmt: skip
        provenance.update(summary=summary, stages=stages.listed(), finished=_now())
        run.write_provenance(provenance)
        if temporary is None:
            with stages.timed("report"):
                write_report(run, progress)
    run.write_provenance({**provenance, "stages": stages.listed(), "state": "complete"})
    summary = {**summary, "seconds": stages.total(), "peak_mib": peak_mib()}
    if temporary is None:
        return Analysis(table, masks, found, summary, run.path)
    kept = dict(found)
    temporary.cleanup()
    return Analysis(table, masks, kept, summary, None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _couple(model: nn.Module, network: FilterNetwork) -> tuple[list[CouplingGroup], list[str]]:
    """Coupling groups, and notes for the report where something had to be left out."""
    notes = [f"{name} never runs when the model is called; it was left out." for name in network.skipped]
    if network.repeated:
        names = few(list(network.repeated))
        notes.append(f"Run several times when the model is called, looked at the first time: {names}.")
    if not network.takes_batches:
        notes.append("The model takes one input at a time, so its filters are not judged, only looked at.")
        return [], notes
    try:
        return coupling.find_groups(model, blank_input(model, network.input_shape)), notes
    except UntraceableError as error:
        notes.append(
            f"The ties between layers could not be traced ({error}), so no filter is called redundant and "
            "only silent ones are called dead."
        )
        return [], notes


def _record(layer: Layer, group: CouplingGroup | None) -> LayerRecord:
    number = None if group is None else group.number
    file = f"layers/{slug(layer.depth, layer.name)}.safetensors"
    return LayerRecord(**vars(layer), group=number, file=file)


def _stimuli_key(provenance: Mapping[str, Any]) -> str:
    """What a layer's stimuli depend on; a file with another key is not used again."""
    model, options = provenance["model"], provenance["options"]
    parts = {
        "model": [model[name] for name in ("sha256", "arch", "arch_kwargs", "held_inputs", "input_shape")],
        "options": [options["prior"], options["steps"], options["canvas"], options["device"]],
        "inputs": provenance["inputs"],
        "seed": provenance["seed"],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _find_stimuli(
    network: FilterNetwork,
    records: Sequence[LayerRecord],
    run: RunDirectory,
    stages: Stages,
    progress: Progress,
    ascents: Mapping[str, Any],
    key: str,
) -> list[str]:
    """Write every layer's stimuli and response matrix, skipping files that an earlier run completed.

    Gives a note on each layer that cannot be looked at, or has filters whose ascent met values that are not
    finite.
    """
    progress.start("stimuli", sum(record.filters for record in records))
    files = {record.name: record.file for record in records}
    notes = []
    for record in records:
        progress.note(record.name)
        metadata = run.layer_metadata(record.file) or {}
        if metadata.get("key") == key:
            progress.advance(record.filters)
        else:
            feeder = network.feeder(record.name)
            fed = None
            if feeder in files:
                fed = torch.from_numpy(run.read_layer(files[feeder]).images)
            failed, derailed = "", ""
            try:
                with stages.timed("stimuli"):
                    stimuli = ascend(network, record.name, fed=fed, progress=progress, **ascents)
                with stages.timed("responses"):
                    matrix = responses.response_matrix(network, record.name, stimuli.images)
            except LayerError as error:
                failed, tensors = one_line(error), _nothing_seen(record, network.input_shape[0])
            else:
                derailed = ", ".join(map(str, stimuli.derailed))
                weights = network.input_weights(record.name)
                tensors = LayerTensors(
                    as_stored(stimuli.images).numpy(),
                    stimuli.activations.numpy().astype(np.float32),
                    matrix,
                    None if weights is None else weights.float().cpu().numpy(),
                )
            metadata = {"key": key, "layer": record.name, "derailed": derailed, "failed": failed}
            run.write_layer(record.file, tensors, metadata)
        if metadata.get("failed"):
            notes.append(f"{record.name} could not be looked at: {metadata['failed']}.")
        if metadata.get("derailed"):
            notes.append(
                f"{record.name}: the ascent of filters {metadata['derailed']} met values that are not "
                "finite; their stimuli are the best finite ones found, if any."
            )
    progress.finish()
    return notes


def _nothing_seen(record: LayerRecord, channels: int) -> LayerTensors:
    """What stands for a layer that cannot be looked at: pictures of nothing, activations unknown."""
    count = record.filters
    unknown = np.full(count, np.nan, dtype=np.float32)
    images = np.zeros((count, channels, *record.canvas), dtype=np.float16)
    return LayerTensors(images, unknown, np.zeros((count, count), dtype=np.float32))


def _calibrate(
    twin: nn.Module,
    network: FilterNetwork,
    run: RunDirectory,
    found: LayerFiles,
    seed: int,
    statistics: InputStatistics | None,
    progress: Progress,
    key: str,
) -> Calibrated | None:
    """Calibrated probes, those of an earlier run where they are of the same model, options and layers."""
    settings = [calibration.SETTINGS, objectives.SETTINGS, leaves.SETTINGS]
    key = hashlib.sha256(json.dumps([key, list(found), settings]).encode()).hexdigest()
    calibrated = load_probes(run.probes_file, key)
    if calibrated is None:
        calibrated = calibrated_probes(twin, found, network.input_shape, seed, statistics, progress)
        if calibrated is not None:
            save_probes(calibrated, run.probes_file, key)
    return calibrated


def _cost_after(
    model: nn.Module, masks: Masks, input_shape: tuple[int, ...], cost: tuple[int, int], notes: list[str]
) -> tuple[int, int]:
    """Parameters and MACs once the masked filters are removed for real."""
    if not masks.removed:
        return cost
    try:
        smaller = surgery.remove_filters(model, masks, blank_input(model, input_shape))
        return surgery.count_cost(smaller, input_shape)
    except UserError as error:
        notes.append(f"What removal saves could not be measured: {error}")
        return cost

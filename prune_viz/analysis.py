"""The whole way from a model to a run directory: `analyze`."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from prune_viz import __version__, coupling, redundancy, responses, surgery
from prune_viz.checkpoints import check_finite
from prune_viz.coupling import CouplingGroup, UntraceableError
from prune_viz.decisions import decisions_json, filter_rows, masks_of
from prune_viz.embedding import embed
from prune_viz.errors import UserError
from prune_viz.filters import FilterNetwork, Layer, select_layers
from prune_viz.masks import Masks, save_masks
from prune_viz.progress import Progress
from prune_viz.provenance import Stages, hash_model, peak_mib, versions
from prune_viz.runs import FORMAT, LayerRecord, LayerTensors, RunDirectory, slug, write_json
from prune_viz.stimuli import STEPS, ascend, check_options, pick_device


class LayerFiles(Mapping[str, LayerTensors]):
    """A run's layers by name, each read from the run directory when asked for."""

    def __init__(self, run: RunDirectory, records: Sequence[LayerRecord]) -> None:
        self._run = run
        self._files = {record.name: record.file for record in records}

    def __getitem__(self, name: str) -> LayerTensors:
        return self._run.read_layer(self._files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


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
    prior, steps, canvas, seed, device
        See `prune_viz.stimuli.maximize`.
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
        If the weights are not finite, the input shape does not fit, a pattern matches no layer, or `out`
        cannot be written or holds something else.
    """
    progress = progress or Progress()
    check_finite(model)
    check_options(prior, steps)
    if canvas is not None and canvas < 1:
        raise UserError(f"--canvas must be at least 1, not {canvas}")
    network = FilterNetwork(model, input_shape, canvas, pick_device(device))
    chosen = select_layers(network.layers, layers)
    source = {"sha256": hash_model(model), **(source or {})}
    options = {
        "prior": prior,
        "steps": steps,
        "canvas": canvas,
        "layers": list(layers),
        "device": str(network.device),
        "tolerance": redundancy.TOLERANCE,
    }
    temporary = tempfile.TemporaryDirectory(prefix="prune-viz-") if out is None else None
    run = RunDirectory(Path(temporary.name) if temporary is not None else Path(str(out)))
    run.claim(str(source["sha256"]), fresh)

    stages = Stages()
    groups, notes = _couple(model, network)
    tied = coupling.group_of_layer(groups)
    records = [
        LayerRecord(
            layer.name, layer.kind, layer.filters, layer.depth, layer.receptive_field, layer.canvas,
            tied[layer.name].number if layer.name in tied else None,
            f"layers/{slug(layer.depth, layer.name)}.safetensors",
        )
        for layer in chosen
    ]  # fmt: skip
    parameters, macs = surgery.count_cost(model, input_shape)
    provenance: dict[str, Any] = {
        "format": FORMAT,
        "state": "running",
        "model": {
            "path": None, "arch": None, "arch_kwargs": {}, "trust_pickle": False, **source,
            "class_name": type(model).__name__, "parameters": parameters, "macs": macs,
            "input_shape": list(network.input_shape),
        },
        "options": options,
        "seed": seed,
        "versions": versions(),
        "device": str(network.device),
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "layers": [asdict(record) for record in records],
        "notes": notes,
    }  # fmt: skip
    run.write_provenance(provenance)

    with progress:
        key = _stimuli_key(provenance, seed)
        _find_stimuli(network, chosen, records, run, stages, progress, prior, steps, seed, key)
        found = LayerFiles(run, records)
        with stages.timed("probes"):
            judged = {layer.name for layer in chosen}
            whole = [group for group in groups if group.removable and judged.issuperset(group.layers)]
            moments = _probe(model, network, whole, found, seed, progress)
        with stages.timed("verdicts"):
            progress.start("verdicts", len(groups))
            verdicts = {}
            for group in groups:
                verdicts[group.number] = (
                    redundancy.judge(group, moments[group.number])
                    if group.number in moments
                    else redundancy.judge_unjudged(group)
                )
                progress.advance()
            progress.finish()
        with stages.timed("embedding"):
            progress.start("embedding", len(chosen))
            tables = []
            for layer in chosen:
                progress.note(layer.name)
                tensors = found[layer.name]
                embedding = embed(tensors.images, tensors.responses, seed)
                tables.append(filter_rows(layer, tensors, embedding, tied.get(layer.name), verdicts, judged))
                progress.advance()
            progress.finish()
        table = pd.concat(tables, ignore_index=True)
        masks = masks_of(table, groups, verdicts, {layer.name: layer.filters for layer in network.layers})
        run.write_filters(table)
        write_json(run.decisions_file, decisions_json(table, groups, verdicts, masks, str(source["sha256"])))
        save_masks(masks, run.masks_file)
        with stages.timed("removal"):
            after = _cost_after(model, masks, network.input_shape, (parameters, macs), notes)
        counts = table["verdict"].value_counts()
        summary: dict[str, Any] = {
            "filters": len(table),
            **{verdict: int(counts.get(verdict, 0)) for verdict in ("keep", "redundant", "dead")},
            "parameters": parameters,
            "parameters_after": after[0],
            "macs": macs,
            "macs_after": after[1],
        }
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        provenance.update(summary=summary, notes=notes, stages=stages.listed(), finished=finished)
        run.write_provenance(provenance)
        if temporary is None:
            from prune_viz.report import write_report

            with stages.timed("report"):
                write_report(run, progress)
            provenance.update(stages=stages.listed())
    run.write_provenance({**provenance, "state": "complete"})
    summary.update(seconds=stages.total(), peak_mib=peak_mib())
    if temporary is not None:
        kept = {name: found[name] for name in found}
        temporary.cleanup()
        return Analysis(table, masks, kept, summary, None)
    return Analysis(table, masks, found, summary, run.path)


def _couple(model: nn.Module, network: FilterNetwork) -> tuple[list[CouplingGroup], list[str]]:
    """Coupling groups, and notes for the report where something had to be left out."""
    notes = [f"{name} never runs when the model is called; it was left out." for name in network.skipped]
    try:
        return coupling.find_groups(model.cpu(), torch.zeros(1, *network.input_shape)), notes
    except UntraceableError as error:
        notes.append(
            f"The ties between layers could not be traced ({error}), so no filter is called redundant and "
            "only silent ones are called dead."
        )
        return [], notes


def _stimuli_key(provenance: Mapping[str, Any], seed: int) -> str:
    """What a layer's stimuli depend on; a file with another key is not used again."""
    model, options = provenance["model"], provenance["options"]
    parts = {
        "model": [model["sha256"], model["arch"], model["arch_kwargs"], model["input_shape"]],
        "options": [options["prior"], options["steps"], options["canvas"], options["device"], seed],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _find_stimuli(
    network: FilterNetwork,
    layers: Sequence[Layer],
    records: Sequence[LayerRecord],
    run: RunDirectory,
    stages: Stages,
    progress: Progress,
    prior: str,
    steps: int,
    seed: int,
    key: str,
) -> None:
    """Write every layer's stimuli and response matrix, skipping files that an earlier run completed."""
    progress.start("stimuli", sum(layer.filters for layer in layers))
    for layer, record in zip(layers, records, strict=True):
        progress.note(layer.name)
        if (run.layer_metadata(record.file) or {}).get("key") == key:
            progress.advance(layer.filters)
            continue
        with stages.timed("stimuli"):
            stimuli = ascend(network, layer.name, prior=prior, steps=steps, seed=seed, progress=progress)
        with stages.timed("responses"):
            matrix = responses.response_matrix(network, layer.name, stimuli.images)
        tensors = LayerTensors(
            stimuli.images.numpy().astype(np.float16), stimuli.activations.numpy().astype(np.float32), matrix
        )
        run.write_layer(record.file, tensors, {"key": key, "layer": layer.name})
    progress.finish()


def _probe(
    model: nn.Module,
    network: FilterNetwork,
    groups: Sequence[CouplingGroup],
    found: Mapping[str, LayerTensors],
    seed: int,
    progress: Progress,
) -> dict[int, list[responses.Moments]]:
    """Run all stimuli and natural noise through the network and sum moments where groups are read."""
    if not groups:
        return {}
    twin = copy.deepcopy(model).eval().to(network.device)
    if len(network.input_shape) == 3:
        twin = twin.to(memory_format=torch.channels_last)
    largest = tuple(
        max(layer.canvas[axis] for layer in network.layers) for axis in range(len(network.input_shape) - 1)
    )
    size = responses.probe_size(twin, network.input_shape, largest)
    count = sum(layer.filters for layer in network.layers if layer.name in found)
    progress.start("probes", count + responses.NOISE_PROBES)

    def counted() -> Iterator[tuple[Tensor, bool]]:
        images = (torch.from_numpy(found[name].images) for name in found)
        for batch, held_out in responses.make_probes(images, network.input_shape[0], size, seed):
            yield batch, held_out
            progress.advance(len(batch))

    moments = responses.gather_moments(twin, groups, counted())
    progress.finish()
    return moments


def _cost_after(
    model: nn.Module, masks: Masks, input_shape: tuple[int, ...], cost: tuple[int, int], notes: list[str]
) -> tuple[int, int]:
    """Parameters and MACs once the masked filters are removed for real."""
    if not masks.removed:
        return cost
    try:
        smaller = surgery.remove_filters(model, masks, torch.zeros(1, *input_shape))
        return surgery.count_cost(smaller, input_shape)
    except UserError as error:
        notes.append(f"What removal saves could not be measured: {error}")
        return cost

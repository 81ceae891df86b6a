"""The whole way from a model to a run directory: `analyze`."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from prune_viz import __version__, coupling, redundancy, responses, surgery
from prune_viz.coupling import CouplingGroup, UntraceableError
from prune_viz.decisions import decisions_json, filter_rows, masks_of
from prune_viz.embedding import embed
from prune_viz.errors import UserError
from prune_viz.filters import FilterNetwork, Layer, select_layers
from prune_viz.masks import Masks, save_masks
from prune_viz.progress import Progress
from prune_viz.runs import FORMAT, LayerRecord, LayerTensors, RunDirectory, slug, write_json
from prune_viz.stimuli import STEPS, ascend, pick_device


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
    open_run(run, str(source["sha256"]), fresh)

    stages = _Stages()
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
        "versions": {
            "prune_viz": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "pandas": pd.__version__,
        },
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
        provenance.update(summary=summary, notes=notes, stages=stages.listed())
        run.write_provenance(provenance)
        if temporary is None:
            from prune_viz.report import write_report

            with stages.timed("report"):
                write_report(run, progress)
            provenance.update(stages=stages.listed())
    provenance.update(state="complete", finished=datetime.now(UTC).isoformat(timespec="seconds"))
    run.write_provenance(provenance)
    summary.update(seconds=stages.total(), peak_mib=peak_mib())
    if temporary is not None:
        kept = {name: found[name] for name in found}
        temporary.cleanup()
        return Analysis(table, masks, kept, summary, None)
    return Analysis(table, masks, found, summary, run.path)


def check_finite(model: nn.Module) -> None:
    """Raise `UserError`, naming the tensor, if a parameter or buffer holds NaN or infinity."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{name} holds {bad} values that are NaN or infinite; repair the checkpoint first"
            )


def hash_model(model: nn.Module) -> str:
    """Hex SHA-256 over a model's state dict: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_run(run: RunDirectory, model_sha256: str, fresh: bool) -> None:
    """Make sure that a run of this model may be written to a directory, and empty it if asked to.

    Raises
    ------
    UserError
        If the directory cannot be written, holds another model's run or something that is no run.
    """
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"{run.path} is a file; give --out a directory")
    if run.path.is_dir() and any(run.path.iterdir()):
        if not (run.path / "run.json").exists():
            raise UserError(f"{run.path} holds something that is not a prune-viz run; give another --out")
        try:
            there = run.read_provenance()["model"]["sha256"]
        except (UserError, KeyError, TypeError):
            there = None
        if there != model_sha256 and not fresh:
            raise UserError(
                f"{run.path} holds another model's run; give another --out, or --fresh to replace it"
            )
        if fresh:
            for part in ("layers", "report"):
                shutil.rmtree(run.path / part, ignore_errors=True)
            for file in (run.masks_file, run.decisions_file, run.filters_file):
                file.unlink(missing_ok=True)
    try:
        (run.path / "layers").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.path):
            pass
    except OSError as error:
        raise UserError(f"{run.path} cannot be written ({error.strerror}); give another --out") from None


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
    stages: _Stages,
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


class _Stages:
    """Seconds a stage and peak memory up to its end."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._peak: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._peak[name] = peak_mib()

    def listed(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "seconds": round(seconds, 2), "peak_mib": round(self._peak[name], 1)}
            for name, seconds in self._seconds.items()
        ]

    def total(self) -> float:
        return sum(self._seconds.values())


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

"""The whole way from a model to a run directory: `analyze`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from prune_viz.analysis.conclude import conclude
from prune_viz.analysis.dry_run import Estimate, estimate_run
from prune_viz.analysis.prepare import Prepared, prepare
from prune_viz.execution.executors import Engine, LocalEngine, run_tasks
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.task_results import TaskResults
from prune_viz.execution.tasks import StimulusSettings, Task, plan_tasks, stimuli_key
from prune_viz.feature_visualization.stimuli import STEPS, check_options
from prune_viz.network.copies import plain_copy
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.remove import count_cost
from prune_viz.redundancy.judge import TOLERANCE
from prune_viz.report import write_report
from prune_viz.runs.log import RunLog, now
from prune_viz.runs.ownership import check_run_directory, claimed
from prune_viz.runs.run_directory import LayerFiles, LayerTensors, RunDirectory
from prune_viz.runs.stages import Stages, peak_mib, versions
from prune_viz.utils.errors import RunInterruptedError, UserError, one_line
from prune_viz.utils.memory import Budget, check_sizes
from prune_viz.utils.progress import Progress


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes
    ----------
    filters : DataFrame
        A row a filter, columns `filters_csv.FILTER_COLUMNS`.
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
    engine: str = "local",
    workers: int | None = None,
    gpus_per_task: float = 1.0,
    memory: int | None = None,
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
        See `prune_viz.feature_visualization.stimuli.maximize`.
    data : path, optional
        A folder of example inputs, read by `prune_viz.network.inputs.read_images`; what is natural is
        measured on them, and so are mean and std unless given, and filters are compared on them too.
    engine : {"local", "ray"}
        Where stimuli are sought: on this machine, or on a Ray cluster (`prune_viz.execution.ray_executor`).
    workers : int, optional
        How many tasks at a time; by default a CPU's cores, of other devices one, of a cluster all it takes.
    gpus_per_task : float
        Of a GPU, how much each task on a Ray cluster takes.
    memory : int, optional
        Bytes that the run may take (`prune_viz.utils.memory.Budget`).
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
        holds no input, `memory` does not suffice for one filter, or `out` cannot be written, is in use or
        holds something else.
    IncompleteError
        If some tasks failed. What is done is kept, and the same call goes on.
    """
    progress = progress or Progress()
    check_options(prior, steps)
    if engine not in ("local", "ray"):
        raise UserError(f"--engine is local or ray, not {engine!r}")
    if engine == "ray" and memory is not None:
        raise UserError("--memory is for this machine: leave it out with --engine ray")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install 'prune-viz[ray]'")
    if not (0 < gpus_per_task <= 1 or gpus_per_task == int(gpus_per_task) > 0):
        raise UserError(f"--gpus-per-task is a share of a GPU, or a whole number, not {gpus_per_task:g}")
    if out is not None:
        check_run_directory(Path(out))
    check_sizes(input_shape, canvas, memory)
    source = dict(source or {})
    prepared = prepare(
        model, input_shape, layers=layers, canvas=canvas, seed=seed, device=device, mean=mean, std=std,
        data=data, out=out, file_sha256=source.get("sha256"),
    )  # fmt: skip
    network = prepared.network
    options = {
        "prior": prior,
        "steps": steps,
        "canvas": canvas,
        "data": None if data is None else str(data),
        "layers": list(layers),
        "device": str(network.device),
        "tolerance": TOLERANCE,
    }
    provenance = _provenance(prepared, source, options)
    budget = Budget.of(network.device, memory)
    settings = StimulusSettings(prior, steps, seed, prepared.statistics)

    # Before anything of an earlier run is cleared away.
    budgeted = None if engine == "ray" else MemoryPlan(network, memory, workers)

    def make_engine() -> Engine:
        if engine == "ray":
            from prune_viz.execution.ray_executor import RayEngine, Work

            plain = plain_copy(model).cpu()  # parametrisations cannot be sent
            work = Work(plain, network.input_shape, canvas, network.device.type, settings)
            return RayEngine(work, workers, gpus_per_task, progress)
        plan = budgeted or MemoryPlan(network, memory, workers)
        return LocalEngine(network, settings, plan.workers, plan.batch, progress)

    if out is not None:
        run = RunDirectory(Path(out))
        return _run(prepared, run, provenance, make_engine, budget, fresh, progress, report=True)
    with tempfile.TemporaryDirectory(prefix="prune-viz-") as folder:
        run = RunDirectory(Path(folder))
        result = _run(prepared, run, provenance, make_engine, budget, fresh, progress, report=False)
        return replace(result, layers=dict(result.layers), out=None)


def estimate(
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
    workers: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Say what `analyze` would take on this machine, from a short trial; nothing is written.

    Parameters and errors are those of `analyze`.
    """
    check_options(prior, steps)
    check_sizes(input_shape, canvas, memory)
    start = time.perf_counter()
    prepared = prepare(
        model, input_shape, layers=layers, canvas=canvas, seed=seed, device=device, mean=mean, std=std,
        data=data, out=out, file_sha256=None,
    )  # fmt: skip
    settings = StimulusSettings(prior, steps, seed, prepared.statistics)
    preparation = time.perf_counter() - start
    with progress or Progress() as shown:
        found = estimate_run(prepared, settings, memory, workers, shown)
    return replace(found, seconds={"preparation": preparation, **found.seconds})


def _run(
    prepared: Prepared,
    run: RunDirectory,
    provenance: dict[str, Any],
    make_engine: Callable[[], Engine],
    budget: Budget,
    fresh: bool,
    progress: Progress,
    report: bool,
) -> Analysis:
    """Fill a run directory, or take up where an earlier process stopped."""
    log = RunLog(run.log_file)
    stages = Stages(log)
    key = stimuli_key(provenance)
    tasks = plan_tasks(prepared.network, prepared.records, key)
    provenance = {**provenance, "key": key, "tasks": len(tasks)}
    with claimed(run, str(prepared.origin.file), fresh), _states(run, provenance, log), progress:
        with stages.timed("stimuli"):
            provenance["notes"] += _find_stimuli(prepared, run, tasks, key, make_engine, progress, log)
        concluded = conclude(prepared, run, key, stages, progress, budget)
        provenance["notes"] += concluded.notes
        provenance.update(concluded.provenance, stages=stages.listed(), finished=now())
        run.write_provenance(provenance)  # which the report shows
        if report:
            with stages.timed("report"):
                write_report(run, progress)
        provenance["stages"] = stages.listed()
    summary = {**concluded.provenance["summary"], "seconds": stages.total(), "peak_mib": peak_mib()}
    found = LayerFiles(run, prepared.records)
    return Analysis(concluded.filters, concluded.masks, found, summary, run.path)


@contextmanager
def _states(run: RunDirectory, provenance: dict[str, Any], log: RunLog) -> Iterator[None]:
    """Keep in `run.json` and the log how a run stands: running, then complete or stopped by what.

    A process that is killed leaves it running; whether it is shows in who holds the directory.
    """
    provenance["state"] = "running"
    run.write_provenance(provenance)
    log("run started", tasks=provenance["tasks"], process=os.getpid())
    try:
        yield
    except BaseException as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)
        with suppress(UserError):  # the disk may be full
            run.write_provenance({**provenance, "state": "stopped", "stopped_by": what})
            log("run stopped", why=what)
        if isinstance(error, KeyboardInterrupt):
            raise RunInterruptedError from None
        raise
    provenance["state"] = "complete"
    run.write_provenance(provenance)
    log("run complete")


def _find_stimuli(
    prepared: Prepared,
    run: RunDirectory,
    tasks: Sequence[Task],
    key: str,
    make_engine: Callable[[], Engine],
    progress: Progress,
    log: RunLog,
) -> list[str]:
    """Have every layer's stimuli and responses found that the run directory does not hold yet.

    Gives a note on each layer that cannot be analysed, or has filters whose ascent met values that are not
    finite.
    """

    def weights(name: str) -> np.ndarray | None:
        found = prepared.network.input_weights(name)
        return None if found is None else found.float().cpu().numpy()

    results = TaskResults(run, prepared.records, tasks, key, weights)
    progress.start("stimuli", sum(record.filters for record in prepared.records))
    progress.advance(sum(task.filters for task in results.done))
    if len(results.done) < len(tasks):
        with make_engine() as engine:
            run_tasks(tasks, results, engine, log, lambda task: progress.note(task.layer))
    progress.finish()
    results.tidy()
    notes = []
    for name, metadata in results.metadata.items():
        if metadata["failed"]:
            notes.append(f"{name} could not be analysed: {metadata['failed']}.")
        if metadata["diverged"]:
            notes.append(
                f"{name}: the ascent of filters {metadata['diverged']} diverged; their "
                "stimuli are the best finite ones found, if any."
            )
    return notes


def _provenance(prepared: Prepared, source: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` says before anything is found."""
    cost = count_cost(prepared.model, prepared.network.input_shape)
    return {
        "model": {
            "path": None, "arch": None, "arch_kwargs": {}, "trust_pickle": False, "held_inputs": None,
            **source, "sha256": prepared.origin.file, "weights": prepared.origin.weights,
            "structure": prepared.network.structure,
            "class_name": type(prepared.model).__name__, "parameters": cost[0], "macs": cost[1],
            "input_shape": list(prepared.network.input_shape),
        },
        "inputs": None if prepared.statistics is None else asdict(prepared.statistics),
        "options": options,
        "seed": prepared.seed,
        "versions": versions(),
        "device": str(prepared.network.device),
        "threads": torch.get_num_threads(),
        "started": now(),
        "layers": [asdict(record) for record in prepared.records],
        "notes": list(prepared.notes),
    }  # fmt: skip

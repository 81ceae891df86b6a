"""The stages of an analysis, one after the other, and what a run directory holds of how they went."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from prune_viz.analysis.conclude import conclude
from prune_viz.analysis.expected_work import expected_stages
from prune_viz.analysis.found import Analysis
from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.prepare import Prepared
from prune_viz.analysis.unfinished import FULL_STIMULI, VERDICTS, draw_maps, is_awaited, report_so_far
from prune_viz.execution.executors import Engine, LocalEngine, run_tasks
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.run_context import RunContext
from prune_viz.execution.task_results import TaskResults
from prune_viz.execution.tasks import Task, plan_tasks, stimuli_key
from prune_viz.network.copies import plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.report import write_report
from prune_viz.runs.log import RunLog, now
from prune_viz.runs.ownership import claimed
from prune_viz.runs.run_directory import LayerFiles, RunDirectory
from prune_viz.runs.run_json import LayerRecord
from prune_viz.runs.stages import Log, Stages, peak_mib, versions
from prune_viz.utils.errors import RunInterruptedError, UserError, one_line
from prune_viz.utils.memory import Budget
from prune_viz.utils.progress import Progress


class PlannedRun:
    """An analysis of which all is known but where it is written.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    options : AnalysisOptions
        What is asked of the analysis.
    source : mapping
        Where the model came from, for `run.json`.
    progress : Progress
        Shows how the work goes.

    Raises
    ------
    UserError
        If the memory does not suffice for one filter.
    """

    def __init__(
        self, prepared: Prepared, options: AnalysisOptions, source: Mapping[str, Any], progress: Progress
    ) -> None:
        self._prepared, self._options, self._progress = prepared, options, progress
        self._provenance = _provenance(prepared, source, options)
        self._make_engine = _engine_maker(prepared, options, progress)

    def write(self, run: RunDirectory, fresh: bool, report: bool) -> Analysis:
        """Fill a run directory, or take up where an earlier process stopped.

        Parameters
        ----------
        run : RunDirectory
            The run directory.
        fresh : bool
            Start over, whatever it holds.
        report : bool
            Whether the report is written too.
        """
        prepared, options = self._prepared, self._options
        context = RunContext(
            options.seed,
            prepared.statistics,
            prepared.output,
            replace(Budget.of(prepared.network.device, options.memory), folder=run.path),
            self._progress,
            Stages(RunLog(run.log_file)),
            options.effort,
        )
        # On a cluster each task begins with drafts of its own: to start the cluster twice takes longer.
        drafts = options.engine == "local" and not prepared.network.is_draft
        awaited = report and is_awaited(prepared)
        self._progress.expect(partial(expected_stages, prepared, options, drafts, awaited, report))
        return _run(
            prepared, run, self._provenance, self._make_engine, context, fresh, report, drafts, awaited
        )


EngineMaker = Callable[[FilterNetwork], Engine]


def _engine_maker(prepared: Prepared, options: AnalysisOptions, progress: Progress) -> EngineMaker:
    """Return a factory of engines, for the network or its drafts.

    This machine's memory is planned at once, so that too little is reported before anything of an earlier run
    is cleared away.
    """
    if options.engine == "local":
        plan = MemoryPlan(prepared.network, options.memory, options.workers)

        def here(network: FilterNetwork) -> Engine:
            settings = options.stimulus_settings(prepared.statistics, network.is_draft)
            return LocalEngine(network, settings, plan.workers, plan.batch, progress)

        return here

    def on_cluster(network: FilterNetwork) -> Engine:
        from prune_viz.execution.ray_executor import RayEngine, Work

        work = Work(
            plain_copy(prepared.model).cpu(),  # parametrisations cannot be sent
            network.input_shape,
            options.canvas,
            network.device.type,
            options.stimulus_settings(prepared.statistics, network.is_draft),
            network.linear,
            network.is_draft,
            network.precision,
        )
        return RayEngine(work, options.workers, options.gpus_per_task, progress)

    return on_cluster


def _run(
    prepared: Prepared,
    run: RunDirectory,
    provenance: dict[str, Any],
    make_engine: EngineMaker,
    context: RunContext,
    fresh: bool,
    report: bool,
    drafts: bool,
    awaited: bool,
) -> Analysis:
    """Fill a run directory, or take up where an earlier process stopped."""
    stages, log = context.stages, context.stages.log
    recorded = provenance["options"]
    draft_key = stimuli_key(provenance, AnalysisOptions.of_stimuli(recorded, draft=True))
    key = stimuli_key(provenance, AnalysisOptions.of_stimuli(recorded))
    model_key = stimuli_key(provenance, {name: recorded[name] for name in ("canvas", "device", "precision")})
    tasks = plan_tasks(prepared.network, prepared.records, key)
    provenance = {**provenance, "key": key, "tasks": len(tasks)}
    with (
        claimed(run, str(prepared.origin.file), fresh),
        _recording_state(run, provenance, log),
        context.progress,
    ):
        found = _results(prepared, run, prepared.records, tasks, key, draft_key)
        if drafts:
            with stages.timed("drafts"):
                _find_drafts(prepared, run, found, draft_key, make_engine, context)
            if awaited and len(found.done) < len(tasks):
                to_come = [FULL_STIMULI, *(VERDICTS if prepared.judged else ())]
                maps = draw_maps(prepared, run, context, quick=True)
                report_so_far(prepared, run, provenance, maps, to_come, context)
        with stages.timed("stimuli"):
            _find_stimuli("stimuli", prepared.network, found, tasks, make_engine, context)
            found.tidy()
        provenance["notes"] += _notes(found)
        maps = draw_maps(prepared, run, context)
        if awaited and prepared.judged:
            report_so_far(prepared, run, provenance, maps, VERDICTS, context)
        concluded = conclude(prepared, run, model_key, maps, context)
        provenance["notes"] += concluded.notes
        provenance.update(concluded.provenance, to_come=[], stages=stages.listed(), finished=now())
        run.write_provenance(provenance)  # which the report shows
        if report:
            with stages.timed("report"):
                write_report(run, context.progress)
        provenance["stages"] = stages.listed()
    summary = {**concluded.provenance["summary"], "seconds": stages.total(), "peak_mib": peak_mib()}
    layers = LayerFiles(run, prepared.records)
    return Analysis(concluded.filters, concluded.masks, layers, summary, run.path)


@contextmanager
def _recording_state(run: RunDirectory, provenance: dict[str, Any], log: Log) -> Iterator[None]:
    """Keep in `run.json` and the log how a run stands: running, then complete or stopped by what.

    A process that is killed leaves it at running; the directory's lock shows whether it still is.
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


def _results(
    prepared: Prepared,
    run: RunDirectory,
    records: Sequence[LayerRecord],
    tasks: Sequence[Task],
    key: str,
    draft_key: str = "",
) -> TaskResults:
    """What the run directory holds of some tasks."""

    def weights(name: str) -> np.ndarray | None:
        found = prepared.network.input_weights(name)
        return None if found is None else found.float().cpu().numpy()

    return TaskResults(run, records, tasks, key, weights, draft_key)


def _find_drafts(
    prepared: Prepared,
    run: RunDirectory,
    found: TaskResults,
    draft_key: str,
    make_engine: EngineMaker,
    context: RunContext,
) -> None:
    """Have drafts found of every layer whose stimuli are not all there yet; they stand in their place."""
    network = prepared.network.draft
    records = [record for record in prepared.records if record.name not in found.whole]
    tasks = plan_tasks(network, records, draft_key)
    drafts = _results(prepared, run, records, tasks, draft_key)
    _find_stimuli("drafts", network, drafts, tasks, make_engine, context)


def _find_stimuli(
    stage: str,
    network: FilterNetwork,
    results: TaskResults,
    tasks: Sequence[Task],
    make_engine: EngineMaker,
    context: RunContext,
) -> None:
    """Have every layer's stimuli and responses found that the run directory does not hold yet."""
    progress = context.progress
    done = sum(task.filters for task in results.done)
    progress.start(stage, sum(task.filters for task in tasks), done)
    if len(results.done) < len(tasks):
        with make_engine(network) as engine:
            kind = "draft" if stage == "drafts" else "task"
            log = context.stages.log
            run_tasks(tasks, results, engine, log, lambda task: progress.note(task.layer), kind)
    progress.finish()


def _notes(results: TaskResults) -> list[str]:
    """A note on each layer that cannot be analysed, or has filters whose optimisation diverged."""
    notes = []
    for name, metadata in results.metadata.items():
        if metadata["failed"]:
            notes.append(f"{name} could not be analysed: {metadata['failed']}.")
        if metadata["diverged"]:
            notes.append(
                f"{name}: the optimisation of filters {metadata['diverged']} diverged; their "
                "stimuli are the best finite ones found, if any."
            )
    return notes


def _provenance(prepared: Prepared, source: Mapping[str, Any], options: AnalysisOptions) -> dict[str, Any]:
    """What `run.json` holds before anything is found."""
    cost = count_cost(prepared.model, prepared.network.input_shape)
    return {
        "model": {
            "path": None, "arch": None, "arch_kwargs": {}, "trust_pickle": False, "held_inputs": None,
            **source, "sha256": prepared.origin.file, "weights": prepared.origin.weights,
            "structure": prepared.network.structure,
            "class_name": type(prepared.model).__name__, "parameters": cost[0], "macs": cost[1],
            "input_shape": list(prepared.network.input_shape),
        },
        "output": asdict(prepared.output),
        "inputs": None if prepared.statistics is None else asdict(prepared.statistics),
        "options": options.recorded(str(prepared.network.device), prepared.network.precision),
        "seed": options.seed,
        "versions": versions(),
        "device": str(prepared.network.device),
        "threads": torch.get_num_threads(),
        "started": now(),
        "layers": [asdict(record) for record in prepared.records],
        "notes": list(prepared.notes),
    }  # fmt: skip

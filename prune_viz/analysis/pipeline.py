"""The whole way from a model to a run directory: `analyze`.

What is asked is checked before the stages are imported: they bring libraries that take seconds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from prune_viz.analysis.found import Analysis
from prune_viz.analysis.options import AnalysisOptions, OptionFields
from prune_viz.analysis.prepare import prepare
from prune_viz.runs.ownership import check_run_directory
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.progress import Progress

if TYPE_CHECKING:
    from prune_viz.analysis.dry_run import Estimate


def analyze(
    model: nn.Module,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
    source: Mapping[str, Any] | None = None,
    **options: Unpack[OptionFields],
) -> Analysis:
    """Find stimuli, responses, redundant and dead filters of a network, and write a run directory.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    out : path, optional
        The run directory. A run of the same model and options that was cut short is taken up where it
        stopped. Without it nothing is kept but what is returned.
    fresh : bool
        Start over, whatever the run directory holds.
    progress : Progress, optional
        Shows how the work goes.
    source : mapping, optional
        Where the model came from, for `run.json` (`prune_viz.loading.checkpoints.Checkpoint.source`).
    **options
        The fields of `prune_viz.analysis.options.AnalysisOptions`: ``input_shape``, which must be given,
        and ``layers, task, prior, steps, canvas, seed, device, precision, mean, std, data, engine, workers,
        gpus_per_task, memory``.

    Returns
    -------
    Analysis

    Raises
    ------
    UserError
        If an option is out of its range, the weights are not finite, the input shape does not fit, a pattern
        matches no layer, `data` holds no input, `memory` does not suffice for one filter, or `out` cannot be
        written, is in use or holds something else.
    IncompleteError
        If some tasks failed. What is done is kept, and the same call resumes the run.
    """
    asked = AnalysisOptions(**options)
    progress = progress or Progress()
    if out is not None:
        check_run_directory(Path(out))
    source = dict(source or {})
    prepared = prepare(model, asked, out, source.get("sha256"))
    for sentence in prepared.warnings:
        progress.say(sentence)

    from prune_viz.analysis.planned_run import PlannedRun

    planned = PlannedRun(prepared, asked, source, progress)
    if out is not None:
        return planned.write(RunDirectory(Path(out)), fresh, report=True)
    with tempfile.TemporaryDirectory(prefix="prune-viz-") as folder:
        result = planned.write(RunDirectory(Path(folder)), fresh, report=False)
        return replace(result, layers=dict(result.layers), out=None)


def estimate(
    model: nn.Module,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[OptionFields],
) -> Estimate:
    """Say what `analyze` would take on this machine, from a short trial; nothing is written.

    Parameters and errors are those of `analyze`.

    Raises
    ------
    UserError
        Also for another `engine` than ``local``.
    """
    asked = AnalysisOptions(**options)
    if asked.engine != "local":
        raise UserError("--dry-run estimates a run on this machine: leave out --engine")
    start = time.perf_counter()
    prepared = prepare(model, asked, out, None)
    preparation = time.perf_counter() - start

    from prune_viz.analysis.dry_run import estimate_run

    with progress or Progress() as shown:
        found = estimate_run(prepared, asked, shown)
    return replace(found, seconds={"preparation": preparation, **found.seconds})

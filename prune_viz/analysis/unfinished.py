"""A report of what an analysis has found so far, while the rest is still to come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prune_viz.analysis.filter_rows import filter_table
from prune_viz.analysis.prepare import Prepared
from prune_viz.embedding.network_map import NetworkMaps, embed_network
from prune_viz.execution.quality import EFFORTS, Quality
from prune_viz.execution.run_context import RunContext
from prune_viz.report import write_report
from prune_viz.runs.run_directory import LayerFiles, RunDirectory
from prune_viz.runs.verdicts import Verdict

FEW_FILTERS = 200  # with fewer, the whole report is there before anyone has opened a first one
FULL_STIMULI = "finished pictures"
VERDICTS = ("verdicts", "budgets", "masks")
_REASON = "the run has not come to its verdicts yet"


def is_awaited(prepared: Prepared) -> bool:
    """Whether a network is so large that its report is worth writing before the run ends."""
    return _count_filters(prepared) >= FEW_FILTERS


def _count_filters(prepared: Prepared) -> int:
    return sum(layer.filters for layer in prepared.layers)


def draw_maps(prepared: Prepared, run: RunDirectory, context: RunContext, quick: bool = False) -> NetworkMaps:
    """Place the filters whose stimuli are in the run directory on maps.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    run : RunDirectory
        Where the stimuli are.
    context : RunContext
        What the stages share.
    quick : bool
        Whether maps are drawn as in a draft.
    """
    if quick:
        context = replace(context, effort=EFFORTS[Quality.DRAFT])
    with context.stage("embedding"):
        return embed_network(prepared.network, prepared.layers, LayerFiles(run, prepared.records), context)


def report_so_far(
    prepared: Prepared,
    run: RunDirectory,
    provenance: dict[str, Any],
    maps: NetworkMaps,
    to_come: Sequence[str],
    context: RunContext,
) -> None:
    """Write a report of pictures without verdicts.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    run : RunDirectory
        Where the stimuli are.
    provenance : dict
        What `run.json` holds; gets what is to come.
    maps : NetworkMaps
        Where the filters lie.
    to_come : sequence of str
        What the run has still to find, for people.
    context : RunContext
        What the stages share.

    Raises
    ------
    UserError
        If the run directory cannot be written.
    """
    filters = _count_filters(prepared)
    found = LayerFiles(run, prepared.records)
    run.write_filters(filter_table(prepared.layers, found, *maps, {}, {}, _REASON))
    counts = dict.fromkeys((verdict.value for verdict in Verdict), 0) | {Verdict.UNJUDGED.value: filters}
    provenance.update(
        to_come=list(to_come), summary={"filters": filters, **counts}, stages=context.stages.listed()
    )
    run.write_provenance(provenance)
    with context.stage("report"):
        page = write_report(run, context.progress)
    context.progress.say(f"pictures so far: {page}")

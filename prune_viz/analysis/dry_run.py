"""What an analysis would take, from a short trial: `analyze --dry-run`.

A few filters of a few layers are searched for as in a run, as many at a time; between those layers what a
filter takes goes with the time of a forward pass. What follows the stimuli is timed on a few inputs and grows
with their number, verdicts with the cube of the channels of a group. Only the maps of filters and the report
count by the filter at rates measured once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.prepare import Prepared
from prune_viz.analysis.stage_costs import estimate_conclusions
from prune_viz.calibration.extent import Extent, plan_extent
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.executors import GLANCE, LocalEngine
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.run_context import RunContext
from prune_viz.execution.tasks import StartingStimuli, StimulusSettings, Task, TaskResult, task_filters
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.redundancy.group_verdicts import calibration_copy
from prune_viz.runs.stages import peak_mib
from prune_viz.utils.devices import WHOLE, one_thread_each
from prune_viz.utils.errors import LayerError
from prune_viz.utils.progress import Progress

# Of a kind: optimisation lasts longer without an activation, and where another layer's stimuli are its start.
TRIED_LAYERS = 4
TRIED_FILTERS = 8, 48  # of each, at least and at most: more give a better estimate
TRIAL_SECONDS = 60.0  # that trying them may take, about
PASSES_PER_FILTER = 250  # forward ones that an optimisation costs, about; only to choose how many are tried
REPORT_BYTES = 150_000, 4200  # of a report and the tables, once and a filter
LIBRARIES = 350 * 2**20  # what drawing maps loads


@dataclass(frozen=True)
class LayerCost:
    """What a layer's stimuli would take.

    Attributes
    ----------
    layer : Layer
        The layer.
    seconds : float
        Of work, shared by the workers.
    batch : int
        Filters at a time.
    """

    layer: Layer
    seconds: float
    batch: int


@dataclass(frozen=True)
class Estimate:
    """What an analysis would take.

    Attributes
    ----------
    layers : list of LayerCost
        In order of depth.
    seconds : dict of str to float
        By stage.
    memory, disk : int
        Bytes: the most at a time, and what the run directory would hold.
    workers : int
        Tasks at a time.
    """

    layers: list[LayerCost]
    seconds: dict[str, float]
    memory: int
    disk: int
    workers: int

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "layers": [
                {
                    "name": cost.layer.name, "filters": cost.layer.filters, "canvas": cost.layer.canvas,
                    "batch": cost.batch, "seconds": cost.seconds,
                }
                for cost in self.layers
            ],
            "filters": sum(cost.layer.filters for cost in self.layers),
            "workers": self.workers, "seconds": self.total, "stages": self.seconds,
            "memory": self.memory, "disk": self.disk,
        }  # fmt: skip


def estimate_run(prepared: Prepared, options: AnalysisOptions, progress: Progress) -> Estimate:
    """What an analysis on this machine would take.

    Parameters
    ----------
    prepared : Prepared
        What would be analysed.
    options : AnalysisOptions
        What is asked of the analysis.
    progress : Progress
        Shows how the trial goes.

    Raises
    ------
    UserError
        If the memory does not suffice for one filter.
    """
    network, layers = prepared.network, prepared.layers
    plan = MemoryPlan(network, options.memory, options.workers)
    judged, settings = prepared.judged, options.stimulus_settings(prepared.statistics, network.is_draft)
    costs = estimate_stimuli(network, layers, settings, plan, progress)
    seconds = {"stimuli": makespan(costs, plan.workers, task_filters(network))}
    twin = calibration_copy(prepared.model, network)
    context = RunContext(
        options.seed, prepared.statistics, prepared.output, plan.budget, effort=options.effort
    )
    seconds.update(estimate_conclusions(twin, prepared, context))
    extent = plan_extent(twin, network.input_shape) if seconds.get("calibration") else None
    disk = disk_bytes(layers, network.input_shape, judged, extent)
    return Estimate(costs, seconds, most_memory(plan, costs), disk, plan.workers)


def estimate_stimuli(
    network: FilterNetwork,
    layers: Sequence[Layer],
    settings: StimulusSettings,
    plan: MemoryPlan,
    progress: Progress,
) -> list[LayerCost]:
    """What the stimuli of layers would take.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layers : sequence of Layer
        Which.
    settings : StimulusSettings
        What stimuli depend on.
    plan : MemoryPlan
        How many at a time.
    progress : Progress
        Shows how the trial goes.
    """
    progress.start("trial", len(layers) + 1)
    with one_thread_each():
        passes = [_forward_seconds(network, layer, progress) for layer in layers]
    weights = np.array([layer.filters * one for layer, one in zip(layers, passes, strict=True)])
    producers = _producers(network, layers)
    traits = [(network.has_activation(one.name), producers[one.name] is None) for one in layers]
    kinds = [np.array([i for i, one in enumerate(traits) if one == kind]) for kind in dict.fromkeys(traits)]
    chosen = [kind[_spread(weights[kind], TRIED_LAYERS)] for kind in kinds]
    tried = sorted(int(index) for some in chosen for index in some)
    one_of_each = sum(passes[index] for index in tried) / WHOLE * PASSES_PER_FILTER
    count = int(np.clip(TRIAL_SECONDS * plan.workers / one_of_each, *TRIED_FILTERS)) // WHOLE * WHOLE
    seconds = _try(
        network, {layers[index].name: producers[layers[index].name] for index in tried}, count, settings, plan
    )
    progress.advance()
    progress.finish()
    a_filter = np.zeros(len(layers))
    for kind, some in zip(kinds, chosen, strict=True):
        ratios = [seconds[layers[index].name] / passes[index] for index in some]
        a_filter[kind] = np.interp(kind, some, ratios) * np.array(passes)[kind]
    return [
        LayerCost(layer, float(one * layer.filters), plan.batch(layer.name))
        for layer, one in zip(layers, a_filter, strict=True)
    ]


def _producers(network: FilterNetwork, layers: Sequence[Layer]) -> dict[str, str | None]:
    """The layer among these whose stimuli each one's search begins with, if any."""
    names = {layer.name for layer in layers}
    producers = {layer.name: network.producer(layer.name) for layer in layers}
    return {name: producer if producer in names else None for name, producer in producers.items()}


def _spread(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices, in order, of what lies at the middles of so many equal shares of the weights."""
    middles = (np.cumsum(weights) - weights / 2) / weights.sum()
    shares = (np.arange(count) + 0.5) / count
    return np.unique(np.abs(middles[:, None] - shares).argmin(axis=0))


def _forward_seconds(network: FilterNetwork, layer: Layer, progress: Progress) -> float:
    """Seconds of a forward pass up to a layer's maps, the least of a few."""
    images = torch.zeros(WHOLE, network.input_shape[0], *layer.canvas, device=network.device)
    maps, best = network.maps(layer.name), float("inf")
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            with suppress(LayerError):
                float(maps(images)[1].flatten()[0])  # waits for a device that works on its own
            best = min(best, time.perf_counter() - start)
    progress.advance()
    return best


def _try(
    network: FilterNetwork,
    producers: Mapping[str, str | None],
    count: int,
    settings: StimulusSettings,
    plan: MemoryPlan,
) -> dict[str, float]:
    """Seconds a filter of layers, given with what feeds them, so many of each tried as a run does."""
    names = dict.fromkeys([*(producer for producer in producers.values() if producer), *producers])
    found: dict[str, TaskResult] = {}
    with LocalEngine(network, settings, plan.workers, plan.batch) as engine:
        for wave in (
            [name for name in names if producers.get(name) is None],
            [name for name in names if producers.get(name) is not None],
        ):
            running = {}
            for name in wave:
                producer = producers.get(name)
                fed = found[producer].images if producer in found else None
                task = Task(name, 0, min(count, network.layer(name).filters), producer, "", "")
                running[name] = engine.submit(task, StartingStimuli(fed))
            while wait(running.values(), timeout=GLANCE).not_done:
                pass  # but a Ctrl-C is noticed
            found.update({name: future.result() for name, future in running.items()})
    return {name: found[name].seconds / len(found[name].images) for name in producers}


def makespan(costs: Sequence[LayerCost], workers: int, filters: int) -> float:
    """Seconds until all tasks of so many filters are done, each taken by the worker that is free first."""
    free = [0.0] * workers
    for cost in costs:
        for start in range(0, cost.layer.filters, filters):
            share = min(filters, cost.layer.filters - start) / cost.layer.filters
            free.sort()
            free[0] += share * cost.seconds
    return max(free)


def disk_bytes(
    layers: Sequence[Layer],
    input_shape: Sequence[int],
    groups: Sequence[CouplingGroup],
    calibrated: Extent | None,
) -> int:
    """What a run directory holds in the end; calibration images only where they can be calibrated."""
    channels = input_shape[0]
    images = 0 if calibrated is None else 4 * calibrated.count * channels * int(np.prod(calibrated.size))
    stimuli = sum(layer.filters * (2 * channels * int(np.prod(layer.canvas)) + 4) for layer in layers)
    responses = sum(4 * layer.filters**2 for layer in layers)
    grams = sum(4 * (group.channels + 1) ** 2 for group in groups)
    once, a_filter = REPORT_BYTES
    return stimuli + responses + grams + images + once + a_filter * sum(layer.filters for layer in layers)


def most_memory(plan: MemoryPlan, costs: Sequence[LayerCost]) -> int:
    """Bytes held at a time, while stimuli are sought or afterwards, when it was what the trial held.

    The trial itself runs as many inputs at a time as what follows the stimuli.
    """
    searches = max((cost.batch * plan.taken(cost.layer.name) for cost in costs), default=0)
    return max(plan.held + plan.workers * searches, int(peak_mib() * 2**20) + LIBRARIES)

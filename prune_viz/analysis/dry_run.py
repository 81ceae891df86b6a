"""What an analysis would take, from a short trial: `analyze --dry-run`.

Steps of the optimiser are timed at a few layers, by as many workers as in a run; between those layers what
a step takes goes with the multiply-accumulates of a forward pass. What follows the stimuli is timed on a few
inputs and grows with their number, verdicts with the cube of the channels of a group. Only the maps of
filters and the report count by the filter at rates measured once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prune_viz.analysis.expected_work import A_LAYER, BACKWARD, DRAFT_PASSES, macs_of_passes, search_passes
from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.prepare import Prepared
from prune_viz.analysis.stage_costs import estimate_conclusions
from prune_viz.calibration.extent import Extent, plan_extent
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.run_context import RunContext
from prune_viz.execution.tasks import task_filters
from prune_viz.network.cost import count_macs
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.redundancy.group_verdicts import calibration_copy
from prune_viz.runs.stages import peak_mib
from prune_viz.utils.devices import WHOLE, one_thread_each
from prune_viz.utils.errors import LayerError
from prune_viz.utils.progress import Progress

TRIED_LAYERS = 4
SHORT = 0.5  # seconds; what takes less is timed again
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
    taken : int
        Bytes that one of them takes.
    """

    layer: Layer
    seconds: float
    batch: int
    taken: int


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
    macs = count_macs(prepared.model, network.input_shape)
    costs = estimate_stimuli(network, layers, macs, search_passes(options), plan, progress)
    seconds = {"stimuli": makespan(costs, plan.workers, task_filters(network))}
    if not network.is_draft:
        share = _work(network.draft, layers, macs).sum() / _work(network, layers, macs).sum()
        drafts = share * DRAFT_PASSES / search_passes(options) * seconds["stimuli"]
        seconds = {"drafts": float(drafts), **seconds}
    twin = calibration_copy(prepared.model, network)
    context = RunContext(
        options.seed, prepared.statistics, prepared.output, plan.budget, effort=options.effort
    )
    seconds.update(estimate_conclusions(twin, prepared, context))
    extent = plan_extent(twin, network.input_shape) if seconds.get("calibration") else None
    disk = disk_bytes(layers, network.input_shape, prepared.judged, extent)
    return Estimate(costs, seconds, most_memory(plan, costs), disk, plan.workers)


def estimate_stimuli(
    network: FilterNetwork,
    layers: Sequence[Layer],
    macs: Mapping[str, int],
    passes: float,
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
    macs : mapping of str to int
        Multiply-accumulates of each layer on a whole input.
    passes : float
        Forward passes that a filter takes.
    plan : MemoryPlan
        How many at a time.
    progress : Progress
        Shows how the trial goes.
    """
    work = _work(network, layers, macs)
    chosen = _spread(work, TRIED_LAYERS)
    progress.start("trial", len(chosen))
    rates = []
    for index in chosen:
        step = _step_seconds(network, layers[index], plan.workers)
        rates.append(layers[index].filters * step / work[index])
        progress.advance()
    progress.finish()
    every = np.arange(len(layers))
    areas = np.array([math.prod(layer.canvas) for layer in layers])
    seconds = A_LAYER + np.interp(every, chosen, rates) * work * passes / BACKWARD
    held = [plan.taken(layers[index].name) / areas[index] for index in chosen]
    taken = np.interp(every, chosen, held) * areas
    return [
        LayerCost(layer, float(seconds[place]), plan.fitting(int(taken[place])), int(taken[place]))
        for place, layer in enumerate(layers)
    ]


def _work(network: FilterNetwork, layers: Sequence[Layer], macs: Mapping[str, int]) -> np.ndarray:
    """Multiply-accumulates of a forward pass for every filter of each layer, shape (layers,)."""
    found = macs_of_passes(network, macs)
    return np.array([max(layer.filters * found[layer.name], 1.0) for layer in layers])


def _step_seconds(network: FilterNetwork, layer: Layer, workers: int) -> float:
    """Seconds that a step of the optimiser takes a worker for a filter, while all workers are busy."""
    maps = network.climbed_maps(layer.name)

    def step(_: int) -> float:
        torch.set_num_threads(1)
        images = torch.zeros(WHOLE, network.input_shape[0], *layer.canvas, device=network.device)
        start = time.perf_counter()
        with suppress(LayerError, RuntimeError):  # of what has no gradient
            after = maps(images.requires_grad_())[1]
            (gradient,) = torch.autograd.grad(after.square().sum(), images)
            float(gradient.flatten()[0])  # waits for a device that works on its own
        return time.perf_counter() - start

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        seconds = float(np.mean(list(pool.map(step, range(workers)))))
        if seconds < SHORT:  # what is done at the first call alone would count
            seconds = min(float(np.mean(list(pool.map(step, range(workers))))) for _ in range(3))
    return seconds / WHOLE


def _spread(weights: np.ndarray, count: int) -> np.ndarray:
    """Indices, in order, of what lies at the middles of so many equal shares of the weights."""
    middles = (np.cumsum(weights) - weights / 2) / weights.sum()
    shares = (np.arange(count) + 0.5) / count
    return np.unique(np.abs(middles[:, None] - shares).argmin(axis=0))


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
    searches = max((cost.batch * cost.taken for cost in costs), default=0)
    return max(plan.held + plan.workers * searches, int(peak_mib() * 2**20) + LIBRARIES)

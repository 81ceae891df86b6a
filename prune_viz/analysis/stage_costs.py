"""Seconds of the stages that follow the stimuli, timed on a few inputs, for the dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration import images as calibration_images
from prune_viz.calibration import synthetic_images
from prune_viz.calibration.extent import plan_extent
from prune_viz.calibration.images import BATCH, Start, calibration_size, fitted, kept_out, natural_noise
from prune_viz.calibration.synthetic_images import calibrate, enlarged
from prune_viz.channels.groups import CouplingGroup
from prune_viz.embedding.layer_map import FEW
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.priors import tile
from prune_viz.network.cost import count_cost
from prune_viz.pruning.curves import budget_passes, curve_passes
from prune_viz.pruning.measuring import affordable
from prune_viz.redundancy import basis
from prune_viz.redundancy.fisher import gather_fisher
from prune_viz.redundancy.gram_matrices import gather_gram_matrices, rounds
from prune_viz.redundancy.judge import judge
from prune_viz.utils.memory import Budget

REPEATED_SECONDS, MOST_REPEATS = 1.0, 8  # of a pass of images: what it takes more each time counts
TIMED_CHANNELS = (48, 384)  # channels of the groups on which verdicts are timed, about
# What maps and report take, in seconds: once, once more where UMAP draws, and a filter.
FIXED_SECONDS, UMAP_SECONDS, SECONDS_PER_FILTER = 2.0, 6.0, 0.003


def estimate_conclusions(twin: nn.Module, prepared: Prepared, context: RunContext) -> dict[str, float]:
    """Seconds of what follows the stimuli, by stage.

    Parameters
    ----------
    twin : nn.Module
        The network to run calibration images through (`group_verdicts.calibration_copy`).
    prepared : Prepared
        What would be analysed.
    context : RunContext
        What the stages of the run would share.
    """
    network, judged, budget = prepared.network, prepared.judged, context.budget
    examples = 0 if prepared.examples is None else len(prepared.examples)
    filters = sum(layer.filters for layer in prepared.layers)
    once = FIXED_SECONDS + (UMAP_SECONDS if filters > FEW else 0.0)
    found = {"embedding and report": once + SECONDS_PER_FILTER * filters}
    if not judged:
        return found
    channels, *extents = network.input_shape
    largest = tuple(max(layer.canvas[axis] for layer in network.layers) for axis in range(len(extents)))
    size = calibration_size(twin, network.input_shape, largest)
    noise = natural_noise((channels, *size), BATCH, context.seed, None)
    judging = _judging_seconds(twin, judged, noise, budget)  # warms up too

    def gather_seconds(images: Tensor, count: float) -> float:
        """Of so many inputs, in as many turns as there are."""

        def turn(part: Sequence[CouplingGroup], times: int) -> None:
            gather_gram_matrices(twin, part, lambda: [(images, False)] * times, budget)

        parts = rounds(judged, context.host_memory() // 2)
        return sum(_seconds_of_many(partial(turn, part), count / len(images)) for part in parts)

    stimuli = min(filters, context.effort.stimuli)
    found["gram matrices"] = gather_seconds(
        noise, stimuli + calibration_images.count_noise_images(context.statistics) + examples
    )
    extent = plan_extent(twin, network.input_shape)
    count, size, images = extent.count, extent.size, tile(noise, extent.size)
    varied = count * context.effort.variants
    found["calibration"] = _calibration_seconds(twin, images, count, context)
    if found["calibration"]:
        large = (
            tile(noise, enlarged(size))
            if calibration_images.runs_on(twin, channels, enlarged(size))
            else images
        )
        seed, batches = context.seed, [images, large]
        seconds = _seconds(
            lambda: gather_fisher(twin, judged, lambda: batches, prepared.output, seed, budget)
        )
        found["sensitivity"] = seconds / 2 / BATCH * (context.effort.sensitivity_variants * count + examples)
        found["ranking"] = gather_seconds(images, varied / 2 + examples) + gather_seconds(large, varied / 2)
    with torch.no_grad():
        forward = _seconds(lambda: twin(images)) / len(images)
    rough = not found["calibration"] and examples < basis.ENOUGH_EXAMPLES
    every = images.new_zeros(1, *images.shape[1:]).expand(max(examples, count), *images.shape[1:])
    budgets = budget_passes(rough)
    passes = curve_passes(judged, rough) + budgets
    macs = count_cost(twin, network.input_shape)[1]
    chosen = affordable(fitted(every), macs, extents, passes, context.effort.measuring)
    if chosen is not None:
        found["curves"] = forward * (len(chosen) * passes + len(kept_out(every)) * budgets)
    found["verdicts"] = sum(judging(group.channels) for group in judged)
    found["ranking"] = found.get("ranking", 0) + found["verdicts"]
    return found


def _calibration_seconds(twin: nn.Module, images: Tensor, count: int, context: RunContext) -> float:
    """Seconds of synthesising so many calibration images; 0 where none can be."""

    def passes(number: int) -> None:
        calibrate(twin, [Start(images)], context, passes=number)

    if calibrate(twin, [Start(images)], context, passes=1) is None:
        return 0.0
    return _seconds_of_many(passes, synthetic_images.PASSES) * count / len(images)


def _judging_seconds(
    twin: nn.Module, judged: Sequence[CouplingGroup], noise: Tensor, budget: Budget | None
) -> Callable[[int], float]:
    """Seconds of judging a group by its channels, from judging a small and a larger one."""
    sizes = sorted(
        {min(judged, key=lambda group: abs(group.channels - size)).number for size in TIMED_CHANNELS}
    )
    groups = [group for group in judged if group.number in sizes]
    gram_matrices = gather_gram_matrices(twin, groups, lambda: [(noise, False), (noise, True)], budget)
    points = []
    for group in sorted(groups, key=lambda group: group.channels):
        start = time.perf_counter()
        judge(group, gram_matrices[group.number])
        points.append((group.channels, time.perf_counter() - start))
    (small, least), (large, most) = points[0], points[-1]
    power = np.log(most / least) / np.log(large / small) if large > small else 3.0
    power = float(np.clip(power, 1, 3))
    return lambda channels: most * (channels / large) ** power


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_of_many(work: Callable[[int], object], count: float) -> float:
    """Of work that takes the number of repeats: what it takes once, and each time more."""
    once = _seconds(partial(work, 1))
    more = int(np.clip(REPEATED_SECONDS / max(once, 1e-3), 1, MOST_REPEATS))
    a_time = max(_seconds(partial(work, 1 + more)) - once, 0) / more
    return once + a_time * max(count - 1, 0)

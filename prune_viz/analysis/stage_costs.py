"""Seconds of the stages that follow the stimuli, timed on a few inputs, for the dry run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.analysis.expected_work import BACKWARD
from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration import images as calibration_images
from prune_viz.calibration.extent import Extent, plan_extent
from prune_viz.calibration.images import BATCH, Start, calibration_size, fitted, kept_out, natural_noise
from prune_viz.calibration.synthetic_images import calibrate
from prune_viz.calibration.variants import enlarged
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

TRIED_MACS = 3e10  # of the inputs on which stages are timed: a second or two
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
    macs = count_cost(twin, network.input_shape)[1]
    tried = int(np.clip(TRIED_MACS / max(macs, 1), 4, BATCH))
    noise = natural_noise((channels, *size), tried, context.seed, None)
    judging = _judging_seconds(twin, judged, noise[: tried // 2], budget)  # warms up too

    parts = list(rounds(judged, context.host_memory() // 2))
    once, a_batch, a_pixel = _gathering(twin, parts[0], noise, budget)

    def gather_seconds(images: float, pixels: float) -> float:
        """Of so many inputs of so many pixels in all, in as many turns as there are."""
        return len(parts) * (once + a_batch * images / BATCH + a_pixel * pixels)

    stimuli = min(filters, context.effort.stimuli)
    inputs = stimuli + calibration_images.count_noise_images(context.statistics) + examples
    found["gram matrices"] = gather_seconds(inputs, inputs * math.prod(size))
    extent = plan_extent(twin, network.input_shape)
    count, size, images = extent.count, extent.size, tile(noise, extent.size)
    varied = count * context.effort.variants
    with torch.no_grad():
        forward = min(_seconds(lambda: twin(images)) for _ in range(2)) / len(images)
    found["calibration"] = _calibration_seconds(twin, images, extent, forward, context)
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
        found["sensitivity"] = seconds / 2 / tried * (context.effort.sensitivity_variants * count + examples)
        areas = [math.prod(batch.shape[2:]) for batch in batches]
        pixels = (varied / 2 + examples) * areas[0] + varied / 2 * areas[1]
        found["ranking"] = gather_seconds(varied + examples, pixels)
    rough = not found["calibration"] and examples < basis.ENOUGH_EXAMPLES
    every = images.new_zeros(1, *images.shape[1:]).expand(max(examples, count), *images.shape[1:])
    budgets = budget_passes(rough)
    passes = curve_passes(judged, rough) + budgets
    chosen = affordable(fitted(every), macs, extents, passes, context.effort.measuring)
    if chosen is not None:
        found["curves"] = forward * (len(chosen) * passes + len(kept_out(every)) * budgets)
    found["verdicts"] = sum(judging(group.channels) for group in judged)
    found["ranking"] = found.get("ranking", 0) + found["verdicts"]
    return found


def _gathering(
    twin: nn.Module, groups: Sequence[CouplingGroup], images: Tensor, budget: Budget | None
) -> tuple[float, float, float]:
    """Seconds of gathering Gram matrices: once, for each batch, and for each pixel of an input."""
    few = max(1, len(images) // 4)
    marks: list[float] = []

    def batches() -> Iterator[tuple[Tensor, bool]]:
        marks.clear()
        for part in (images[:few], images[:few], images):
            marks.append(time.perf_counter())
            yield part, False
        marks.append(time.perf_counter())

    seconds = _seconds(lambda: gather_gram_matrices(twin, groups, batches, budget))
    _, small, large = [after - before for before, after in pairwise(marks)]
    an_image = max(large - small, 0.5 * large) / (len(images) - few if len(images) > few else 1)
    a_batch = max(small - few * an_image, 0.0)
    once = seconds - (marks[-1] - marks[0])
    return once, a_batch, an_image / math.prod(images.shape[2:])


def _calibration_seconds(
    twin: nn.Module, images: Tensor, extent: Extent, forward: float, context: RunContext
) -> float:
    """Seconds of synthesising all calibration images; 0 where none can be."""
    start = time.perf_counter()
    if calibrate(twin, [Start(images)], context, passes=1) is None:
        return 0.0
    once = (time.perf_counter() - start) / len(images)
    return extent.count * (once + BACKWARD * forward * (extent.passes - 1))


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

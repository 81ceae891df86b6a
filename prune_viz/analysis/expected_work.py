"""What the stages of an analysis are expected to take, counted before they begin, for the time left.

All is in seconds of a machine that does `RATE` multiply-accumulates a second. Another one takes so many times
as long, which shows as the work goes on; what counts here is how the stages compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.prepare import Prepared
from prune_viz.calibration.extent import plan_extent
from prune_viz.calibration.images import count_noise_images
from prune_viz.embedding.layer_map import FEW
from prune_viz.feature_visualization.stimuli import STEPS
from prune_viz.network.cost import count_macs
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.precision import HALF
from prune_viz.pruning.curves import budget_passes, curve_passes
from prune_viz.utils.time_left import Expected

RATE = 2e10
BACKWARD = 3  # forward passes that one with its gradient takes
DRAFT_PASSES, SEARCH_PASSES = 24, 210  # forward ones a filter, of a draft and of a whole search
HALF_GAIN = 1.5  # times as fast, about, where gradients are bfloat16
A_LAYER = 0.3  # seconds more of a layer's search
A_DRAWN_FILTER = 0.002  # seconds of a filter on maps, and in a report
REMOVAL_PASSES = 10  # forward ones of the whole network, to see what removal saves
UMAP_SECONDS = 6.0


def expected_stages(
    prepared: Prepared, options: AnalysisOptions, drafts: bool, awaited: bool, report: bool
) -> list[Expected]:
    """The stages of an analysis in order, with what each will take.

    Parameters
    ----------
    prepared : Prepared
        What is analysed.
    options : AnalysisOptions
        What is asked of the analysis.
    drafts : bool
        Whether drafts of all stimuli are found first.
    awaited : bool
        Whether reports of the unfinished run are written.
    report : bool
        Whether a report is written in the end.
    """
    macs = count_macs(prepared.model, prepared.network.input_shape)
    drawn = A_DRAWN_FILTER * sum(layer.filters for layer in prepared.layers)
    maps = drawn if options.effort.is_draft else drawn + UMAP_SECONDS * (drawn > A_DRAWN_FILTER * FEW)
    stages = []
    if drafts:
        stages.append(Expected("drafts", _searching(prepared, prepared.network.draft, macs, DRAFT_PASSES)))
        if awaited:
            stages += [Expected("embedding", drawn), Expected("report", drawn)]
    stages += [
        Expected("stimuli", _searching(prepared, prepared.network, macs, search_passes(options))),
        Expected("embedding", maps),
    ]
    if prepared.judged:
        stages += [Expected("report", drawn)] if awaited else []
        stages += _judging(prepared, options, macs)
    stages.append(Expected("removal", A_LAYER + REMOVAL_PASSES * sum(macs.values()) / RATE))
    return [*stages, Expected("report", drawn)] if report else stages


def macs_of_passes(network: FilterNetwork, macs: Mapping[str, int]) -> dict[str, float]:
    """Multiply-accumulates of a forward pass up to each layer, on its canvas.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network, or its drafts.
    macs : mapping of str to int
        Those that each layer does itself on a whole input (`count_macs`).
    """
    area, deep = math.prod(network.input_shape[1:]), 0
    found = {}
    for layer in network.layers:
        deep += macs.get(layer.name, 0)
        found[layer.name] = deep * math.prod(layer.canvas) / area
    return found


def search_passes(options: AnalysisOptions) -> float:
    """Forward passes that the search for a filter's stimulus takes, after its draft."""
    if options.effort.is_draft:
        return DRAFT_PASSES
    return SEARCH_PASSES * (options.steps or options.effort.steps) / STEPS


def _searching(prepared: Prepared, network: FilterNetwork, macs: Mapping[str, int], passes: float) -> float:
    """Seconds of so many forward passes for every filter, each as deep as its layer."""
    work, rate = macs_of_passes(network, macs), RATE * (HALF_GAIN if network.precision == HALF else 1)
    return sum(A_LAYER + layer.filters * passes * work[layer.name] / rate for layer in prepared.layers)


def _judging(prepared: Prepared, options: AnalysisOptions, macs: Mapping[str, int]) -> Sequence[Expected]:
    """Calibration, and all that rests on it."""
    network, effort, groups = prepared.network, options.effort, prepared.judged
    extent = plan_extent(prepared.model, network.input_shape)
    examples = 0 if prepared.examples is None else len(prepared.examples)
    a_pixel = sum(macs.values()) / RATE / math.prod(network.input_shape[1:])
    forward = a_pixel * math.prod(extent.size)
    stimuli = min(sum(layer.filters for layer in prepared.layers), effort.stimuli)
    inputs = stimuli + count_noise_images(prepared.statistics) + examples
    widths = [group.channels for group in groups]
    solving = 4 * sum(width**3 for width in widths) / RATE
    measured = extent.count * effort.sensitivity_variants + examples
    calibration = BACKWARD * extent.count * extent.cost * extent.passes / RATE
    largest = a_pixel * max(math.prod(layer.canvas) for layer in network.layers)
    return [
        Expected("calibration", calibration),
        Expected("sensitivity", 2 * BACKWARD * forward * measured),
        Expected("gram matrices", 3 * largest * inputs),
        Expected("verdicts", solving),
        Expected("ranking", 3 * forward * (extent.count * effort.variants + examples) + solving),
        Expected("curves", forward * extent.count * curve_passes(groups, rough=False)),
        Expected("budgets", forward * extent.count * budget_passes(rough=False)),
    ]

"""How many calibration images there are, how large, and how often they move: as a network's cost allows.

Small networks get all passes: with fewer, more is lost when their filters go. Costly ones, where a pass takes
seconds, get half as many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.calibration.images import calibration_size
from prune_viz.network.copies import attached
from prune_viz.network.cost import count_cost

WIDEST = {1: 4096, 2: 160, 3: 32}  # calibration images, by spatial axes
NARROWEST = {1: 512, 2: 96, 3: 16}  # as small as they get where a network is costly
IMAGES, FEWEST = 96, 32
COST = 4.4e10  # of all calibration images together, in multiply-accumulates
PASSES, FEWEST_PASSES = 76, 38
ALL_PASSES = 38 * COST  # multiply-accumulates of all passes over all images, about
SEEN = 200  # multiply-accumulates that take as long as a value that a batch norm sees
_STEPS = 5  # sizes that are tried between the widest and the narrowest


def settings() -> list[object]:
    """What the number and the size of calibration images depend on, for the key under which they are kept."""
    return [WIDEST, NARROWEST, IMAGES, FEWEST, COST, SEEN, PASSES, FEWEST_PASSES, ALL_PASSES, _STEPS]


@dataclass(frozen=True)
class Extent:
    """How many calibration images there are, of what spatial size, what running one costs, and how often.

    The cost is in multiply-accumulates, with what it takes to see the values before batch norms.
    """

    count: int
    size: tuple[int, ...]
    cost: float
    passes: int


def plan_extent(model: nn.Module, input_shape: Sequence[int]) -> Extent:
    """Choose how many images are calibrated, their size, and how often they are moved at most.

    What a pass of an image costs is counted, not timed, so that it is the same on every machine. Where
    `FEWEST` large ones cost too much, they are made smaller.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode; left unchanged.
    input_shape : sequence of int
        (C, *size) of one input.
    """
    channels, *size = input_shape
    widest, narrowest = WIDEST[len(size)], NARROWEST[len(size)]
    fewest = min(IMAGES, FEWEST)
    for share in torch.linspace(1, 0, _STEPS).tolist():
        side = round(narrowest + share * (widest - narrowest))
        fitting = calibration_size(model, input_shape, [min(extent, side) for extent in size])
        cost = max(_cost(model, (channels, *fitting)), 1.0)
        count = int(COST / cost)
        if count >= fewest:
            break
    count = min(max(count, fewest), IMAGES)
    passes = min(max(int(ALL_PASSES / (count * cost)), FEWEST_PASSES), PASSES)
    return Extent(count, fitting, cost, passes)


def _cost(model: nn.Module, shape: Sequence[int]) -> float:
    """What it costs to run an input of a shape, in multiply-accumulates."""
    values = 0

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal values
        values += math.prod(given[0].shape[1:])

    device = next(model.parameters()).device
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    with attached(norm.register_forward_pre_hook(note) for norm in norms), torch.no_grad():
        model(torch.zeros(1, *shape, device=device))
    return count_cost(model, shape)[1] + SEEN * values

"""From stimuli to verdicts: images run through the whole network, and every group is judged on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from prune_viz.calibration import images
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.channels_last import lay_channels_last, lay_weights_channels_last
from prune_viz.network.copies import as_it_was, plain_copy
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.redundancy.channel_verdicts import GroupVerdicts, keep_whole_group
from prune_viz.redundancy.gram_matrices import GramMatrices, gather_gram_matrices, pool_gram_matrices
from prune_viz.redundancy.judge import judge
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.utils.progress import counted


def calibration_copy(model: nn.Module, network: FilterNetwork) -> nn.Module:
    """A copy of the model to run images through, its batch norms unfolded; it remembers nothing of a call."""
    twin = plain_copy(model, share=network.shares).float().to(network.device)
    run = twin.forward

    def forward(inputs: Tensor) -> Any:
        with as_it_was(twin):
            return run(inputs)

    twin.forward = forward
    if network.channels_last:
        lay_weights_channels_last(twin)
        twin.register_forward_pre_hook(lambda _, given: tuple(map(lay_channels_last, given)))
    return twin


def gather_on_stimuli(
    model: nn.Module,
    network: FilterNetwork,
    groups: Sequence[CouplingGroup],
    layers: Mapping[str, LayerTensors],
    examples: Tensor | None,
    context: RunContext,
) -> dict[int, list[GramMatrices]]:
    """Run stimuli, natural noise and the user's images through a network, and sum groups' Gram matrices.

    Parameters
    ----------
    model : nn.Module
        From `calibration_copy`.
    network : FilterNetwork
        The network as stimuli saw it, for its canvases.
    groups : sequence of CouplingGroup
        Those to judge.
    layers : mapping of str to LayerTensors
        The layers' stimuli.
    examples : Tensor or None, shape (N, C, *size)
        The user's images in the model's own input units. They count for half, however many they are.
    context : RunContext
        What the stages of a run share.

    Returns
    -------
    dict of int to list of GramMatrices
        By the group's number, one a consumer.
    """
    if not groups:
        return {}
    axes = range(len(network.input_shape) - 1)
    largest = tuple(max(layer.canvas[axis] for layer in network.layers) for axis in axes)
    size = images.calibration_size(model, network.input_shape, largest)
    filters = sum(layer.filters for layer in network.layers if layer.name in layers)
    share = min(1.0, context.effort.stimuli / max(filters, 1))
    chosen = {name: choose_stimuli(layers[name], share) for name in layers}
    count = sum(map(len, chosen.values()))

    def made() -> Iterator[tuple[Tensor, bool]]:
        stimuli = (
            layers[name].images if share == 1 else layers[name].images[rows] for name, rows in chosen.items()
        )
        batches = images.noise_and_stimuli(
            stimuli, network.input_shape[0], size, context.seed, context.statistics
        )
        return counted(
            context.progress, "gram matrices", batches, count + images.count_noise_images(context.statistics)
        )

    gram_matrices = gather_gram_matrices(model, groups, made, context.budget)
    if examples is not None:

        def shown() -> Iterator[tuple[Tensor, bool]]:
            batches = images.split(examples, examples.shape[2:])
            return counted(context.progress, "data", batches, len(examples))

        given = gather_gram_matrices(model, groups, shown, context.budget)
        gram_matrices = {
            number: pool_gram_matrices([gram_matrices[number], given[number]], [0.5, 0.5])
            for number in gram_matrices
        }
    return gram_matrices


def choose_stimuli(found: LayerTensors, share: float) -> np.ndarray:
    """Choose a share of a layer's stimuli, evenly spaced, and those of filters that these leave silent.

    Parameters
    ----------
    found : LayerTensors
        The layer's stimuli and responses.
    share : float
        In (0, 1].

    Returns
    -------
    ndarray of int
        Rows, ascending.
    """
    count = len(found.activations)
    rows = np.unique(np.linspace(0, count - 1, math.ceil(share * count)).astype(int))
    silent = ~(np.asarray(found.responses)[rows].max(axis=0, initial=0.0) > 0)
    return np.union1d(rows, np.flatnonzero(silent & (np.asarray(found.activations) > 0)))


def judge_groups(
    groups: Sequence[CouplingGroup], gram_matrices: Mapping[int, Sequence[GramMatrices]], context: RunContext
) -> dict[int, GroupVerdicts]:
    """Judge every group.

    Parameters
    ----------
    groups : sequence of CouplingGroup
        All groups of the network.
    gram_matrices : mapping of int to sequence of GramMatrices
        By the group's number, one a consumer; a group that is not there is kept whole.
    context : RunContext
        What the stages of a run share.

    Returns
    -------
    dict of int to GroupVerdicts
        By the group's number.
    """
    context.progress.start("verdicts", len(groups))
    verdicts = {}
    for group in groups:
        if group.number in gram_matrices:
            verdicts[group.number] = judge(group, gram_matrices[group.number])
        else:
            verdicts[group.number] = keep_whole_group(group)
        context.progress.advance()
    context.progress.finish()
    return verdicts

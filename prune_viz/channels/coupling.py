"""Coupling groups: which filters can only be removed together, and who reads them.

A group's *channels* are the things that are removed or kept as one: a channel of a residual stream is
written by several convolutions and read by several; a channel between an expansion and a projection passes a
depthwise convolution on the way; one behind a split belongs to several filters of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.channels.calls import Ways
from prune_viz.channels.groups import AxisPlaces, CouplingGroup, Places
from prune_viz.channels.label_sets import LabelSets
from prune_viz.channels.labelling import Labelled, UntraceableError, label, steadied
from prune_viz.channels.layer_operations import SUMMED
from prune_viz.channels.parameter_axes import PASSED, READ, ParameterAxes
from prune_viz.channels.verification import verified
from prune_viz.network.attention_heads import layers_of_heads
from prune_viz.network.copies import plain_copy
from prune_viz.network.layer_kinds import (
    count_inputs,
    count_outputs,
    input_axis,
    is_convolution,
    is_grouped,
    is_transposed,
    norms_channels,
    reads_channels,
)
from prune_viz.utils.devices import one_thread_each
from prune_viz.utils.errors import brief

# Spatial sizes, by number of axes, at which channels are followed where a network runs on one of them.
SIZES = {1: (1024, 4096), 2: (64, 128), 3: (32,)}
_MANY_WEIGHTS = 2 * 10**8  # of a network that runs on one row at a time, as it takes seconds for each


@dataclass(frozen=True)
class ChannelGraph:
    """Which filters of a network can only be removed together.

    Attributes
    ----------
    groups : list of CouplingGroup
        Every convolution that runs stands in exactly one of them as a producer; a linear layer does where
        its hidden units can be removed.
    kept_linear : dict of str to str
        The other linear layers that run, and why all their outputs are kept.
    drops : bool
        Whether the network drops values at random though it does not train.
    """

    groups: list[CouplingGroup]
    kept_linear: dict[str, str]
    drops: bool = False


def find_groups(model: nn.Module, example_inputs: Tensor) -> list[CouplingGroup]:
    """Find the coupling groups of a model's filters; parameters and errors are those of `build_graph`."""
    return build_graph(model, example_inputs).groups


def build_graph(model: nn.Module, example_inputs: Tensor) -> ChannelGraph:
    """Follow a model's channels, and verify by experiment which of them can be removed.

    Parameters
    ----------
    model : nn.Module
        The network; copied, not changed.
    example_inputs : Tensor, shape (1, C, *size)
        An input the model runs on.

    Raises
    ------
    UntraceableError
        If the network does not run, or this takes too long.
    """
    twin = plain_copy(model).float().cpu().requires_grad_(False)
    # On small maps threads wait for each other longer than they work, above all beside other programs.
    with one_thread_each() if _has_few_weights(twin) else nullcontext():
        return _built(twin, example_inputs.float().cpu())


def _built(twin: nn.Module, example: Tensor) -> ChannelGraph:
    inputs = smallest_input(twin, example)
    known = _known_ways(twin)
    found = label(twin, inputs, known)
    groups = list(_groups(twin, found, known))
    ways = _other_ways(found, groups, known)
    if ways != known:
        again = label(twin, inputs, ways)
        groups = _better(groups, list(_groups(twin, again, ways)))
    groups = verified(twin, groups, inputs, trains=found.differs_in_training)
    graph = _of_filters(twin, groups)
    return replace(graph, kept_linear=graph.kept_linear | _never_called(twin, found), drops=found.drops)


def _never_called(model: nn.Module, found: Labelled) -> dict[str, str]:
    """Layers whose weights are used without calling them, so that nobody sees what they compute."""
    used = {number for number, _ in found.axes.roles}
    return {
        name: _BESIDE
        for name, layer in model.named_modules()
        if reads_channels(layer) and name not in found.called and _number(found, layer) in used
    }


def _known_ways(model: nn.Module) -> Ways:
    """How filters are grouped as far as modules of known kinds say: attention of our own form has heads."""
    axes = ParameterAxes(model, LabelSets())
    numbers = (axes.number(layer.weight) for layer in layers_of_heads(model))
    return Ways(by_head=frozenset(number for number in numbers if number is not None))


def _other_ways(found: Labelled, groups: list[CouplingGroup], known: Ways) -> Ways:
    """Another way to group the filters that cannot be removed, where there is one.

    Whole groups of a grouped convolution go, unless something behind it mixes them, as a shuffle does. Single
    queries and keys go, unless they are multiplied with each other; then whole heads do.
    """
    stuck = {layer: group.note for group in groups if not group.removable for layer in group.layers}
    numbers = {name: _number(found, layer) for name, layer in found.called.items() if name in stuck}
    return Ways(
        frozenset(number for name, number in numbers.items() if is_grouped(found.called[name])),
        known.by_head | {number for name, number in numbers.items() if stuck[name] == SUMMED},
    )


def _of_filters(model: nn.Module, groups: list[CouplingGroup]) -> ChannelGraph:
    """The groups without linear layers of which nothing can go: their outputs are no hidden units."""
    graph = ChannelGraph([], {})
    for group in groups:
        convolutions = [
            places for places in group.producers if is_convolution(model.get_submodule(places.module))
        ]
        if group.removable:
            convolutions = group.producers
        names = {places.module for places in convolutions}
        graph.kept_linear.update({name: group.note for name in group.layers if name not in names})
        if convolutions:
            part = group if len(names) == len(group.producers) else group.written_by(convolutions)
            graph.groups.append(replace(part, number=len(graph.groups)))
    return graph


def _better(first: list[CouplingGroup], second: list[CouplingGroup]) -> list[CouplingGroup]:
    """Of two ways to group the same filters, the one in which more of them can be removed."""

    def removable(groups: list[CouplingGroup]) -> int:
        return sum(len(places.indices) for one in groups if one.removable for places in one.producers)

    return second if removable(second) > removable(first) else first


def smallest_input(model: nn.Module, example: Tensor) -> Tensor:
    """Noise of the smallest size on which a model runs, of two rows where it takes several and is not large.

    Parameters
    ----------
    model : nn.Module
        The network, on the CPU.
    example : Tensor, shape (B, C, *size)
        What it runs on.

    Raises
    ------
    UntraceableError
        If it does not run on one like the example either.
    """
    shape = tuple(example.shape[1:])
    small = [tuple(min(extent, size) for extent in shape[1:]) for size in SIZES.get(len(shape) - 1, ())]
    whole = _noise(shape, 1)
    error = _error(model, whole)
    if error is not None:
        raise UntraceableError(brief(error))
    few = _has_few_weights(model)
    for size in dict.fromkeys([*small, shape[1:]]):
        for rows in (2, 1) if few else (1,):
            inputs = _noise((shape[0], *size), rows)
            if inputs.shape == whole.shape:
                return whole
            if _error(model, inputs) is not None:
                continue
            # What runs in training should do so on the smaller input too.
            if size == shape[1:] or not _error(model, inputs, True) or _error(model, whole, True):
                return inputs
    return whole


def _has_few_weights(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) < _MANY_WEIGHTS


def _noise(shape: tuple[int, ...], rows: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def _error(model: nn.Module, inputs: Tensor, training: bool = False) -> Exception | None:
    """What a network raises on an input, in training or not; None where it runs."""
    try:
        with steadied(model, training):
            model(inputs)
    except Exception as error:  # whatever an untrusted forward pass raises
        return error
    return None


def _groups(model: nn.Module, found: Labelled, ways: Ways) -> Iterator[CouplingGroup]:
    """Coupling groups, as the labels have them."""
    roots = found.sets.roots()
    axes = {key: roots[labels.numpy()] for key, labels in found.axes.labels.items()}
    written = {
        name: axes.get((_number(found, module), 1 - input_axis(module)), np.zeros(count_outputs(module), int))
        for name, module in found.called.items()
    }
    order = [name for name, _ in model.named_modules() if name in written]
    reader = _GroupReader(model, found, axes)
    for number, layers in enumerate(_tied(order, written)):
        group = reader.read(number, {name: written[name] for name in layers})
        are_heads = any(_number(found, found.called[name]) in ways.by_head for name in layers)
        yield replace(group, are_heads=are_heads and group.removable)


def _number(found: Labelled, layer: Any) -> int:
    """Which parameter the weight of a layer is; -1 where it is none."""
    number = found.axes.number(layer.weight)
    return -1 if number is None else number


def _tied(order: list[str], written: Mapping[str, np.ndarray]) -> list[list[str]]:
    """Layers that write channels in common, together, in order."""
    writers: dict[int, list[str]] = {}
    for name in order:
        for root in np.unique(written[name]).tolist():
            if root:
                writers.setdefault(root, []).append(name)
    together = {name: {name} for name in order}
    for names in writers.values():
        for name in names[1:]:
            if together[name] is not together[names[0]]:
                joined = together[names[0]] | together[name]
                for member in joined:
                    together[member] = joined
    seen: set[str] = set()
    tied = []
    for name in order:
        if name not in seen:
            tied.append([one for one in order if one in together[name]])
            seen |= together[name]
    return tied


class _GroupReader:
    """Turns sets of labels into coupling groups."""

    def __init__(self, model: nn.Module, found: Labelled, axes: Mapping[Any, np.ndarray]) -> None:
        self._names, self._roles = found.axes.names, found.axes.roles
        self._refused = found.sets.refused()
        self._axes = axes
        self._axes_of: dict[int, list[tuple[int, int]]] = {}  # by the set of labels that lies along them
        for key in sorted(axes):
            for root in np.unique(axes[key]).tolist():
                self._axes_of.setdefault(root, []).append(key)
        # Modules that hold each parameter or buffer, and under what name; several where it is shared.
        self._holders: dict[int, list[tuple[str, str, nn.Module]]] = {}
        for name, module in model.named_modules():
            kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for own, tensor in (item for kind in kinds for item in kind.items()):
                number = None if tensor is None else found.axes.number(tensor)
                if number is not None:
                    self._holders.setdefault(number, []).append((name, own, module))
        self._called = found.called

    def read(self, number: int, written: Mapping[str, np.ndarray]) -> CouplingGroup:
        """The group of some layers, from the sets of the labels that each of them writes."""
        layers = list(written)
        widest = max(layers, key=lambda name: len(np.unique(written[name])))
        roots = dict.fromkeys(np.concatenate([written[name] for name in (widest, *layers)]).tolist())
        channel_of = {root: place for place, root in enumerate(root for root in roots if root)}
        if not channel_of:  # a layer of one filter, or one whose weights are computed
            every = np.arange(len(written[widest]))
            module = self._called[widest]
            grouped = is_transposed(module) and module.groups > 1
            note = "it is a grouped transposed convolution" if grouped else _WEIGHTS
            note = "it has no other filter" if len(every) == 1 else note
            alone = [Places(widest, every, every)]
            return CouplingGroup(number, len(every), alone, [], removable=False, note=note)
        keys = sorted({key for root in channel_of for key in self._axes_of.get(root, ())})
        notes = [self._refused[root] for root in channel_of if root in self._refused]
        if len(channel_of) == 1:
            notes.append("all its filters go only together")
        consumers, norms = self._readers(keys, channel_of, notes)
        if not consumers:
            notes.append("nothing in the network that can be adjusted reads it")
        producers = [Places(name, *_placed(own, channel_of)) for name, own in written.items()]
        if any(len(places.indices) < len(written[places.module]) for places in producers):
            notes.append("some of its filters belong to no channel")
        return CouplingGroup(
            number,
            len(channel_of),
            producers,
            consumers,
            removable=not notes,
            note=next(iter(notes), ""),
            norms=norms,
            axes=[
                AxisPlaces(self._names[tensor], axis, *_placed(self._axes[tensor, axis], channel_of))
                for tensor, axis in keys
            ],
        )

    def _readers(
        self, keys: list[tuple[int, int]], channel_of: Mapping[int, int], notes: list[str]
    ) -> tuple[list[Places], list[Places]]:
        """Layers that read a group's channels, and norms that these pass; notes what speaks against them."""
        consumers: dict[str, Places] = {}
        norms: dict[str, Places] = {}
        for key in keys:
            tensor, axis = key
            holders = self._holders[tensor]
            places = _placed(self._axes[key], channel_of)
            reading = [
                name
                for name, own, module in holders
                if own == "weight" and name in self._called and axis == input_axis(module)
            ]
            if len({name for name, _, module in holders if reads_channels(module)}) > 1:
                notes.append(f"{' and '.join(name for name, *_ in holders)} share their weights")
            elif READ in self._roles[key] and not reading:
                notes.append(f"{self._names[tensor]} reads it, which is no weight of a layer")
            elif READ in self._roles[key]:
                module = self._called[reading[0]]
                consumers.setdefault(reading[0], Places(reading[0], *_in_all_groups(module, *places)))
            for name, _, module in holders if PASSED in self._roles[key] else ():
                if norms_channels(module):
                    norms.setdefault(name, Places(name, *places))
        return list(consumers.values()), list(norms.values())


def _placed(own: np.ndarray, channel_of: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices along an axis at which channels lie, and those channels."""
    channels = np.array([channel_of.get(root, -1) for root in own.tolist()])
    return np.flatnonzero(channels >= 0), channels[channels >= 0]


def _in_all_groups(module: Any, indices: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places along a grouped convolution's weight, as channels that it reads: one in each of its groups."""
    groups = module.groups if is_convolution(module) else 1
    size = count_inputs(module) // groups
    return np.concatenate([group * size + indices for group in range(groups)]), np.tile(channels, groups)


_BESIDE = "its weights are used without calling it, as some kinds of attention do"
_WEIGHTS = "its weights are computed, or belong to no layer"

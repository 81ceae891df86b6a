"""Coupling groups: which filters can only be removed together, and who reads them.

The groups come from Torch-Pruning's dependency graph. A group's *channels* are the things that are
removed or kept as one: a channel of a residual stream is written by several convolutions and read by
several; a channel between an expansion and a projection passes a depthwise convolution on the way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from prune_viz.channels.dependency_graph import UntraceableError, build_graph, tied_to
from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.channels.verification import confirmed
from prune_viz.network.copies import plain_copy
from prune_viz.network.layer_kinds import (
    count_inputs,
    count_outputs,
    is_convolution,
    is_depthwise,
    is_grouped,
    reads_channels,
)
from prune_viz.network.tracing import norms_behind


def find_groups(model: nn.Module, example_inputs: torch.Tensor) -> list[CouplingGroup]:
    """Find the coupling groups of a model's convolutions.

    Parameters
    ----------
    model : nn.Module
        The network; copied, not changed.
    example_inputs : Tensor, shape (1, C, *size)
        An input the model runs on.

    Returns
    -------
    list of CouplingGroup
        Every convolution that runs stands in exactly one group as a producer.

    Raises
    ------
    UntraceableError
        If the dependency graph cannot be built.
    """
    twin = plain_copy(model).float()
    example = example_inputs[:1].float()
    twin.to(example.device)
    graph = build_graph(twin, example)
    names = {module: name for name, module in twin.named_modules()}
    groups: list[CouplingGroup] = []
    seen: set[nn.Module] = set()
    lost: dict[Any, str] = {}
    for module in names:
        if is_convolution(module) and module in graph.module2node and module not in seen:
            try:
                group, producers = _tied_group(graph, module, len(groups), names)
                widest = max(producers, key=count_outputs, default=module)
                if count_outputs(widest) > count_outputs(module):  # this one writes a part of what is tied
                    group, producers = _tied_group(graph, widest, len(groups), names)
            except UntraceableError as error:
                lost[module] = f"the way of its maps cannot be traced ({error})"
                continue
            seen.update(producers)
            groups.append(group)
    for module, note in lost.items():
        if module not in seen:
            groups.append(_group_alone(len(groups), names[module], count_outputs(module), note))
    norms = norms_behind(twin)
    return [confirmed(twin, group, norms, example) for group in groups]


def _tied_group(
    graph: Any, module: Any, number: int, names: dict[nn.Module, str]
) -> tuple[CouplingGroup, list[Any]]:
    """The group of all that goes with a convolution's filters, and its producers."""
    items = tied_to(graph, module, range(count_outputs(module)))
    return _read_group(number, count_outputs(module), items, names)


def _group_alone(number: int, name: str, channels: int, note: str) -> CouplingGroup:
    """A group of one convolution, where its ties to others are unknown."""
    every = np.arange(channels)
    return CouplingGroup(number, channels, [Places(name, every, every)], [], removable=False, note=note)


def _read_group(
    number: int, channels: int, items: Any, names: dict[nn.Module, str]
) -> tuple[CouplingGroup, list[nn.Module]]:
    """Turn one of the library's groups into plain data, and list its producers."""
    producers: dict[nn.Module, Places] = {}
    norms: list[Places] = []
    consumers: dict[nn.Module, Places] = {}
    notes: list[str] = []
    for item in items.items:
        node, handler = item.dep.target, item.dep.handler.__name__
        module = node.module
        reads = handler == "prune_in_channels" and reads_channels(module)
        if not reads and not node.outputs:
            notes.append("its filters are the network's output")
        if isinstance(module, nn.Parameter) or module not in names:
            continue
        places = Places(names[module], np.array(item.idxs), np.array(item.root_idxs))
        if is_grouped(module):
            notes.append(f"{names[module]} is a grouped convolution")
        if is_depthwise(module):
            producers.setdefault(module, places)
        elif reads:
            consumers[module] = places
            times = set(np.bincount(places.channels, minlength=channels))
            if len(times) > 1:
                notes.append(f"{names[module]} reads only a part of it")
            elif is_convolution(module) and times != {1}:
                notes.append(f"{names[module]} reads each of its maps more than once")
            elif places.indices.max() >= count_inputs(module):
                notes.append(f"something on the way to {names[module]} rearranges its channels")
        elif is_convolution(module):
            producers[module] = places
        elif isinstance(module, _InstanceNorm) and module.running_mean is not None:
            notes.append(f"{names[module]} keeps running statistics, which the library does not cut")
        elif isinstance(module, (_BatchNorm, _InstanceNorm)):
            norms.append(places)
        elif not (isinstance(module, nn.PReLU) or reads_channels(module)):
            notes.append(f"{names[module]} ({type(module).__name__}) mixes or fixes the channels")
    if not consumers:
        notes.append("nothing in the network that can be adjusted reads it")
    ordered = sorted(producers, key=lambda module: list(names).index(module))
    group = CouplingGroup(
        number,
        channels,
        [producers[module] for module in ordered],
        list(consumers.values()),
        removable=not notes,
        note=next(iter(notes), ""),
        norms=norms,
    )
    return group, list(producers)

"""Coupling groups: which filters can only be removed together, and who reads them.

The groups come from Torch-Pruning's dependency graph. A group's *channels* are the things that are
removed or kept as one: a channel of a residual stream is written by several convolutions and read by
several; a channel between an expansion and a projection passes a depthwise convolution on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from prune_viz.dependencies import UntraceableError, build_graph, tied_to
from prune_viz.layers import is_depthwise
from prune_viz.outputs import tensors_of
from prune_viz.plain import plain_copy
from prune_viz.tracing import norms_behind


@dataclass(frozen=True)
class Places:
    """Where a group's channels lie in one module: ``channels[k]`` is at index ``indices[k]``.

    Attributes
    ----------
    module : str
        The module's dotted name.
    indices : ndarray of int, shape (K,)
        Filters of a writer; input channels (or, behind a flatten, input features) of a reader.
    channels : ndarray of int, shape (K,)
        Channel of the group that lies there; a channel may lie at several indices.
    """

    module: str
    indices: np.ndarray
    channels: np.ndarray


@dataclass(frozen=True)
class Passage:
    """A norm's channel through which what filters write passes: silent once they all go.

    Attributes
    ----------
    norm : str
        The norm.
    channel : int
        Its channel.
    filters : tuple of (str, int)
        Layer and filter of all that writes it.
    """

    norm: str
    channel: int
    filters: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CouplingGroup:
    """Filters that can only be removed together.

    Attributes
    ----------
    number : int
        Index in the list of groups.
    channels : int
        How many channels there are to keep or remove.
    writers : list of Places
        Convolutions whose filters are tied to the channels, depthwise ones on the way included.
    readers : list of Places
        Convolutions and linear layers that read the channels.
    removable : bool
        Whether the network can be made smaller by a channel of this group.
    note : str
        Why not, where `removable` is False.
    norms : list of Places
        Norms that the channels pass on their way to the readers, those behind a concatenation included.
        A silent channel stays silent only where their scales and shifts are zero too.
    """

    number: int
    channels: int
    writers: list[Places]
    readers: list[Places]
    removable: bool = True
    note: str = ""
    norms: list[Places] = field(default_factory=list)
    layers: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", [places.module for places in self.writers])


Change = Callable[[torch.Tensor], torch.Tensor]
Reads = dict[str, list[torch.Tensor]]


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
        Every convolution that runs stands in exactly one group as a writer.

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
        if isinstance(module, _ConvNd) and module in graph.module2node and module not in seen:
            try:
                group, writers = _tied_group(graph, module, len(groups), names)
                widest = max(writers, key=lambda writer: writer.out_channels, default=module)
                if widest.out_channels > module.out_channels:  # this one writes a part of what is tied
                    group, writers = _tied_group(graph, widest, len(groups), names)
            except UntraceableError as error:
                lost[module] = f"the way of its maps cannot be traced ({error})"
                continue
            seen.update(writers)
            groups.append(group)
    for module, note in lost.items():
        if module not in seen:
            groups.append(_group_alone(len(groups), names[module], module.out_channels, note))
    norms = norms_behind(twin)
    return [_confirmed(twin, group, norms, example) for group in groups]


def _tied_group(
    graph: Any, module: Any, number: int, names: dict[nn.Module, str]
) -> tuple[CouplingGroup, list[Any]]:
    """The group of all that goes with a convolution's filters, and its writers."""
    items = tied_to(graph, module, range(module.out_channels))
    return _read_group(number, module.out_channels, items, names)


def _group_alone(number: int, name: str, channels: int, note: str) -> CouplingGroup:
    """The group of a convolution of which it is not known what goes with it."""
    every = np.arange(channels)
    return CouplingGroup(number, channels, [Places(name, every, every)], [], removable=False, note=note)


def _confirmed(
    model: nn.Module, group: CouplingGroup, norms: Mapping[str, str], example: torch.Tensor
) -> CouplingGroup:
    """The group as it is, or not removable with what an experiment said against it."""
    if not group.removable:
        return group
    try:
        note = _experiment(model, group, norms, example)
    except Exception as error:  # whatever a stranger's forward pass raises
        note = f"its maps cannot be followed ({' '.join(str(error).split())[:80]})"
    return replace(group, removable=not note, note=note)


def _experiment(
    model: nn.Module, group: CouplingGroup, norms: Mapping[str, str], example: torch.Tensor
) -> str:
    """Disturb one channel while the readers' outputs are held, and say what moves that must not.

    The library takes any operation without parameters for one that leaves channels apart. Here a channel
    is jolted where it is written: behind that, nothing but the same channel at the readers may move, and
    nothing the network returns. Then all channels are silenced: they must arrive silent.
    """
    modules = dict(model.named_modules())
    jolted_channel = group.channels // 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=generator).to(example)
    held: dict[str, list[torch.Tensor]] = {}

    def run(changes: Sequence[tuple[str, list[int]]], change: Change) -> tuple[Reads, Any]:
        taken: Reads = {places.module: [] for places in group.readers}
        holding = bool(held)

        def read(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
                taken[name].append(arguments[0].clone())
                if not holding:
                    held.setdefault(name, []).append(output.clone())
                    return output
                return held[name][len(taken[name]) - 1]

            return hook

        def write(indices: list[int]) -> Any:
            def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
                changed = output.clone()
                changed[:, indices] = change(output[:, indices])
                return changed

            return hook

        hooks = [
            modules[places.module].register_forward_hook(read(places.module)) for places in group.readers
        ]
        hooks += [modules[name].register_forward_hook(write(indices)) for name, indices in changes]
        try:
            with torch.no_grad():
                return taken, model(noise)
        finally:
            for handle in hooks:
                handle.remove()

    before, output = run([], torch.zeros_like)
    written = [
        (norms.get(places.module, places.module), places.indices[places.channels == jolted_channel].tolist())
        for places in group.writers
        if jolted_channel in places.channels
    ]
    # Not by a constant, which a norm over positions would take away again.
    jolted, jolted_output = run(written, lambda maps: maps + (1 + maps.abs().amax()) * _uneven(maps))
    pairs = zip(tensors_of(output), tensors_of(jolted_output), strict=True)
    if any(_moved(one, other) for one, other in pairs):
        return "its maps are part of what the network returns"
    scaled = [places for places in group.norms if modules[places.module].weight is not None]
    passed = [(places.module, places.indices.tolist()) for places in (*group.writers, *scaled)]
    with _unshifted(modules, [places for places in group.norms if places not in scaled]):
        silenced, _ = run(passed, torch.zeros_like)
    for places in group.readers:
        axis = 1 if isinstance(modules[places.module], _ConvNd) else -1
        all_own = torch.from_numpy(places.indices)
        own = torch.from_numpy(places.indices[places.channels == jolted_channel])
        for one, other, silent in zip(
            before[places.module], jolted[places.module], silenced[places.module], strict=True
        ):
            rest = torch.ones(one.shape[axis], dtype=torch.bool)
            rest[own] = False
            kept = rest.nonzero().ravel()
            if _moved(one.index_select(axis, kept), other.index_select(axis, kept)):
                return f"something on the way to {places.module} mixes its channels"
            if bool(silent.index_select(axis, all_own).abs().max() > 1e-6 * float(one.abs().max())):
                return f"something on the way to {places.module} turns a silent channel into another value"
    return ""


def _uneven(maps: torch.Tensor) -> torch.Tensor:
    """Noise between 0 and 1, the same for maps of one shape."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(maps.shape, generator=generator).to(maps)


@contextmanager
def _unshifted(modules: Mapping[str, Any], norms: Sequence[Places]) -> Iterator[None]:
    """Norms without a scale of their own as masks leave them: with means of zero where channels go."""
    kept = {
        places.module: modules[places.module].running_mean.clone()
        for places in norms
        if modules[places.module].running_mean is not None
    }
    for places in norms:
        if places.module in kept:
            modules[places.module].running_mean[torch.from_numpy(places.indices)] = 0.0
    try:
        yield
    finally:
        for name, mean in kept.items():
            modules[name].running_mean.copy_(mean)


def _moved(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape != other.shape or not torch.allclose(
        one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max())
    )


def _read_group(
    number: int, channels: int, items: Any, names: dict[nn.Module, str]
) -> tuple[CouplingGroup, list[nn.Module]]:
    """Turn one of the library's groups into plain data, and list its writers."""
    writers: dict[nn.Module, Places] = {}
    norms: list[Places] = []
    readers: dict[nn.Module, Places] = {}
    notes: list[str] = []
    for item in items.items:
        node, handler = item.dep.target, item.dep.handler.__name__
        module = node.module
        reads = handler == "prune_in_channels" and isinstance(module, (_ConvNd, nn.Linear))
        if not reads and not node.outputs:
            notes.append("its filters are the network's output")
        if isinstance(module, nn.Parameter) or module not in names:
            continue
        places = Places(names[module], np.array(item.idxs), np.array(item.root_idxs))
        if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
            notes.append(f"{names[module]} is a grouped convolution")
        if is_depthwise(module):
            writers.setdefault(module, places)
        elif reads:
            readers[module] = places
            times = set(np.bincount(places.channels, minlength=channels))
            if len(times) > 1:
                notes.append(f"{names[module]} reads only a part of it")
            elif isinstance(module, _ConvNd) and times != {1}:
                notes.append(f"{names[module]} reads each of its maps more than once")
            elif places.indices.max() >= _inputs_of(module):
                notes.append(f"something on the way to {names[module]} rearranges its channels")
        elif isinstance(module, _ConvNd):
            writers[module] = places
        elif isinstance(module, _InstanceNorm) and module.running_mean is not None:
            notes.append(f"{names[module]} keeps running statistics, which the library does not cut")
        elif isinstance(module, (_BatchNorm, _InstanceNorm)):
            norms.append(places)
        elif not isinstance(module, (nn.PReLU, nn.Linear)):
            notes.append(f"{names[module]} ({type(module).__name__}) mixes or fixes the channels")
    if not readers:
        notes.append("nothing in the network that can be adjusted reads it")
    ordered = sorted(writers, key=lambda module: list(names).index(module))
    group = CouplingGroup(
        number,
        channels,
        [writers[module] for module in ordered],
        list(readers.values()),
        removable=not notes,
        note=next(iter(notes), ""),
        norms=norms,
    )
    return group, list(writers)


def _inputs_of(module: Any) -> int:
    """How many channels or features a reader takes."""
    return int(module.in_channels if isinstance(module, _ConvNd) else module.in_features)


def passages(writers: Sequence[Places], norms: Sequence[Places], gone: Set[int]) -> list[Passage]:
    """Through which channels of norms a group's channels pass that go.

    Parameters
    ----------
    writers, norms : sequence of Places
        The group's (`CouplingGroup`).
    gone : set of int
        Its channels that go.
    """
    filters: dict[int, list[tuple[str, int]]] = {}
    for places in writers:
        for index, channel in zip(places.indices.tolist(), places.channels.tolist(), strict=True):
            filters.setdefault(channel, []).append((places.module, index))
    return [
        Passage(places.module, index, tuple(filters[channel]))
        for places in norms
        for index, channel in zip(places.indices.tolist(), places.channels.tolist(), strict=True)
        if channel in gone
    ]


def group_of_layer(groups: Sequence[CouplingGroup]) -> dict[str, CouplingGroup]:
    """The group in which each convolution is a writer."""
    return {layer: group for group in groups for layer in group.layers}

"""What the dependency graph cannot see of a coupling group, found by experiment.

One channel is disturbed where it is written, all are silenced, and consumers that compute in ways of
their own do without one: what moves then must be what the graph says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.network.copies import as_it_was, attached
from prune_viz.network.layer_kinds import channel_axis, copy_without_inputs, is_plain
from prune_viz.utils.errors import brief
from prune_viz.utils.nested_tensors import tensors_of

Change = Callable[[torch.Tensor], torch.Tensor]
Reads = dict[str, list[torch.Tensor]]


def confirmed(
    model: nn.Module, group: CouplingGroup, norms: Mapping[str, str], example: torch.Tensor
) -> CouplingGroup:
    """Give a group as it is, or as not removable with what an experiment said against it.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, plain; left unchanged.
    group : CouplingGroup
        As the dependency graph has it.
    norms : mapping of str to str
        The batch norm behind each convolution.
    example : Tensor, shape (1, C, *size)
        An input the model runs on.
    """
    if not group.removable:
        return group
    try:
        note = _experiment(model, group, norms, example)
    except Exception as error:  # whatever an untrusted forward pass raises
        note = f"its maps cannot be followed ({brief(error, 80)})"
    return replace(group, removable=not note, note=note)


def _experiment(
    model: nn.Module, group: CouplingGroup, norms: Mapping[str, str], example: torch.Tensor
) -> str:
    """Disturb one channel while the consumers' outputs are held, and say what moves that must not.

    The library takes any operation without parameters for one that leaves channels apart. Here a channel
    is jolted where it is written: behind that, nothing but the same channel at the consumers may move, and
    nothing the network returns. Then all channels are silenced: they must arrive silent.
    """
    modules = dict(model.named_modules())
    jolted_channel = group.channels // 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example.shape, generator=generator).to(example)
    held: dict[str, list[torch.Tensor]] = {}

    def run(changes: Sequence[tuple[str, list[int]]], change: Change) -> tuple[Reads, Any]:
        taken: Reads = {places.module: [] for places in group.consumers}
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
            modules[places.module].register_forward_hook(read(places.module)) for places in group.consumers
        ]
        hooks += [modules[name].register_forward_hook(write(indices)) for name, indices in changes]
        with attached(hooks), torch.no_grad(), as_it_was(model):
            return taken, model(noise)

    before, output = run([], torch.zeros_like)
    written = [
        (norms.get(places.module, places.module), places.indices[places.channels == jolted_channel].tolist())
        for places in group.producers
        if jolted_channel in places.channels
    ]
    # Not by a constant, which a norm over positions would take away again.
    jolted, jolted_output = run(written, lambda maps: maps + (1 + maps.abs().amax()) * _uneven(maps))
    pairs = zip(tensors_of(output), tensors_of(jolted_output), strict=True)
    if any(_moved(one, other) for one, other in pairs):
        return "its maps are part of what the network returns"
    scaled = [places for places in group.norms if modules[places.module].weight is not None]
    passed = [(places.module, places.indices.tolist()) for places in (*group.producers, *scaled)]
    with _unshifted(modules, [places for places in group.norms if places not in scaled]):
        silenced, _ = run(passed, torch.zeros_like)
    for places in group.consumers:
        axis = channel_axis(modules[places.module])
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
            if one.numel() and bool(
                silent.index_select(axis, all_own).abs().max() > 1e-6 * float(one.abs().max())
            ):
                return f"something on the way to {places.module} turns a silent channel into another value"
        consumer = modules[places.module]
        if not all(_reads_apart(consumer, one, own, axis) for one in before[places.module]):
            return f"{places.module} ({type(consumer).__name__}) computes with all its weights together"
    return ""


def _reads_apart(consumer: Any, inputs: torch.Tensor, own: torch.Tensor, axis: int) -> bool:
    """Whether a consumer with its own forward pass computes the same without a channel as with it silent.

    Convolutions that standardise their weights do not: mean and deviation change with the channels.
    """
    if is_plain(consumer):
        return True
    rest = torch.ones(inputs.shape[axis], dtype=torch.bool)
    rest[own] = False
    kept = rest.nonzero().ravel()
    silent = inputs.index_fill(axis, own, 0.0)
    smaller = copy_without_inputs(consumer, kept)
    with torch.no_grad():
        return not _moved(consumer(silent), smaller(inputs.index_select(axis, kept)))


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
    if one.shape != other.shape or not one.numel():
        return one.shape != other.shape
    return not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))

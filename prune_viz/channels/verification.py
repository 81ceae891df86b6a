"""Coupling groups verified by experiment: what the labels say of a network is tried on it.

Three experiments are run, each on all groups at once, and on halves of them where it fails, until those are
found that are at fault. One channel of each is disturbed where it is written: nothing but the same channel
at its consumers may move. All channels are silenced: they must arrive silent. And some are removed, at both
ends and in the middle: every layer must compute what it computes with them silenced, up to rounding.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.channels.cutting import cut_channels
from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.channels.labelling import steadied
from prune_viz.network.calls import run_and_size_norms
from prune_viz.network.copies import attached, plain_copy
from prune_viz.network.layer_kinds import channel_axis, input_axis, is_plain, reads_channels
from prune_viz.utils.errors import brief
from prune_viz.utils.memory import Budget
from prune_viz.utils.nested_tensors import tensors_of

SECONDS = 120.0  # for all experiments on a network
_MANY = 4  # groups of layers with the same names but for numbers
_CLOSE = 1e-4  # relative; also to a layer's largest value, where single values are near zero

Change = Callable[[Tensor], Tensor]
Experiment = Callable[[Sequence[CouplingGroup]], str]


def verified(
    model: nn.Module, groups: Sequence[CouplingGroup], inputs: Tensor, trains: bool = False
) -> list[CouplingGroup]:
    """Give groups as they are, or as not removable with what an experiment said against them.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, plain; left unchanged.
    groups : sequence of CouplingGroup
        As the labels have them.
    inputs : Tensor, shape (B, C, *size)
        Noise that the model runs on.
    trains : bool
        Whether the network does something else in training, which then is tried too.
    """
    if not any(group.removable for group in groups):
        return list(groups)
    notes: dict[int, str] = {}
    deadline = time.monotonic() + SECONDS
    bench = _Bench(model, inputs)
    bench.pass_through(groups)
    why = bench.unsteady()
    if why:
        return [replace(group, removable=False, note=group.note or why) for group in groups]
    experiments = [bench.jolt, bench.silence, bench.remove]
    passes = [(one, training) for training in ([False, True] if trains else [False]) for one in experiments]
    for experiment, training in passes:
        rest = [group for group in groups if group.removable and group.number not in notes]
        notes |= _failing_kinds(rest, partial(experiment, training=training), deadline)
    return [
        replace(group, removable=False, note=notes[group.number])
        if group.removable and group.number in notes
        else group
        for group in groups
    ]


def _failing_kinds(
    groups: Sequence[CouplingGroup], experiment: Experiment, deadline: float
) -> dict[int, str]:
    """Why groups fail an experiment, by their numbers.

    Blocks of a network repeat. So where the first and the last group of `_MANY` fail whose layers have the
    same names, numbers aside, those between are taken to fail too, and are kept.
    """
    if not groups:
        return {}
    if time.monotonic() > deadline:
        return _failing(groups, experiment, deadline)
    if not experiment(groups):
        return {}
    kinds: dict[str, list[CouplingGroup]] = {}
    for group in groups:
        kinds.setdefault(re.sub(r"\d+", "#", " ".join(group.layers)), []).append(group)
    found: dict[int, str] = {}
    for alike in kinds.values():
        why = experiment(alike[:1]) if len(alike) >= _MANY else ""
        if why and experiment(alike[-1:]):
            found |= {group.number: why for group in alike}
    return found | _failing([group for group in groups if group.number not in found], experiment, deadline)


def _failing(groups: Sequence[CouplingGroup], experiment: Experiment, deadline: float) -> dict[int, str]:
    """Why groups fail an experiment, by their numbers; found by halving those that fail together."""
    if not groups:
        return {}
    if time.monotonic() > deadline:
        return {group.number: "there was no time left to verify that it can be removed" for group in groups}
    why = experiment(groups)
    if not why:
        return {}
    if len(groups) == 1:
        return {groups[0].number: why}
    half = len(groups) // 2
    found = _failing(groups[:half], experiment, deadline) | _failing(groups[half:], experiment, deadline)
    rest = [group for group in groups if group.number not in found]
    if not found:  # each half is fine, and both together are not
        return {group.number: why for group in groups[:half]}
    return found | (_failing(rest, experiment, deadline) if len(rest) < len(groups) else {})


@dataclass
class _Run:
    """What a pass read and computed: a tensor a call, by the layer's name; and what the network returned."""

    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    returned: list[Tensor]
    bytes: int = 0


class _Bench:
    """A network on which experiments are run, and what it computes undisturbed."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._whole: dict[bool, _Run] = {}
        self._most = Budget.of(torch.device("cpu")).left() // 4  # two passes are held at a time
        self._passed: set[str] = set()  # grouped convolutions that channels pass on their way to consumers

    def pass_through(self, groups: Sequence[CouplingGroup]) -> None:
        """Let channels pass the grouped convolutions that go with them."""
        consumers = {places.module for group in groups for places in group.consumers}
        producers = {places.module for group in groups for places in group.producers}
        self._passed = {
            name for name in producers - consumers if getattr(self._modules[name], "groups", 1) > 1
        }

    def unsteady(self) -> str:
        """Why nothing can be tried: passes that should be alike return different things, or none."""
        try:
            whole = self._undisturbed().returned
            for seed, why in enumerate(("changes from call to call", "draws random numbers when it runs")):
                with steadied(self._model, seed=seed):
                    again = tensors_of(self._model(self._inputs))
                if any(_differ(one, other) for one, other in zip(whole, again, strict=True)):
                    return f"the network {why}"
        except Exception as error:  # whatever an untrusted forward pass raises, or its maps are too large
            return f"what it computes cannot be compared ({brief(error, 80)})"
        return ""

    def jolt(self, groups: Sequence[CouplingGroup], training: bool) -> str:
        """Disturb one channel of each group while all layers' outputs are held, and see what moves."""
        before = self._undisturbed(training)
        disturbed = {group.number: {group.channels // 2} for group in groups}
        writes = _written(groups, disturbed, norms=False)
        after = self._try(writes, _jolted, before, training)
        if isinstance(after, str):
            return after
        for number, (one, other) in enumerate(zip(before.returned, after.returned, strict=True)):
            if _differ(one, other):
                return f"its maps are part of what the network returns (tensor {number})"
        reads = _read(groups, disturbed)
        for name, layer in self._modules.items():
            if name not in before.inputs or name in self._passed:
                continue
            axis = channel_axis(layer)
            kept = np.setdiff1d(np.arange(before.inputs[name][0].shape[axis]), reads.get(name, []))
            chosen = torch.from_numpy(kept)
            for one, other in zip(before.inputs[name], after.inputs[name], strict=True):
                if _differ(one.index_select(axis, chosen), other.index_select(axis, chosen)):
                    return f"something on the way to {name} mixes its channels"
        return ""

    def silence(self, groups: Sequence[CouplingGroup], training: bool) -> str:
        """Silence all channels of each group while all layers' outputs are held: they must arrive silent."""
        before = self._undisturbed(training)
        every = {group.number: set(range(group.channels)) for group in groups}
        after = self._try(_written(groups, every, norms=True), torch.zeros_like, before, training)
        if isinstance(after, str):
            return after
        for name, indices in _read(groups, every).items():
            axis = channel_axis(self._modules[name])
            chosen = torch.from_numpy(indices)
            reads = zip(before.inputs.get(name, ()), after.inputs.get(name, ()), strict=True)
            for one, other in reads:
                silent = other.index_select(axis, chosen)
                if silent.numel() and float(silent.abs().max()) > 1e-6 * float(one.abs().max()):
                    return f"something on the way to {name} turns a silent channel into another value"
        return ""

    def remove(self, groups: Sequence[CouplingGroup], training: bool) -> str:
        """Remove some channels of each group: every layer must compute as it does with them silenced."""
        gone = {group.number: _ends_and_middle(group.channels) for group in groups}
        masked = self._try(_written(groups, gone, norms=True), torch.zeros_like, training=training)
        if isinstance(masked, str):
            return masked
        smaller = plain_copy(self._model, share=True)
        kept = cut_channels(smaller, groups, gone)
        try:
            removed = self._run(smaller, training=training)
        except Exception as error:  # a forward pass that counts on the old sizes
            return f"the network does not run without some of its channels ({brief(error, 80)})"
        for name, layer in self._modules.items():
            if name not in masked.outputs:
                continue
            axis = channel_axis(layer)
            own = kept.get((f"{name}.weight", 1 - input_axis(layer)))
            for one, other in zip(masked.outputs[name], removed.outputs.get(name, []), strict=False):
                rest = one if own is None else one.index_select(axis, torch.from_numpy(np.flatnonzero(own)))
                if _differ(rest, other):
                    kind = "" if is_plain(layer) else f" ({type(layer).__name__})"
                    return f"{name}{kind} computes something else without some of its channels"
        pairs = zip(masked.returned, removed.returned, strict=True)
        if any(_differ(one, other) for one, other in pairs):
            return "the network returns something else without some of its channels"
        return ""

    def _undisturbed(self, training: bool = False) -> _Run:
        if training not in self._whole:
            self._whole[training] = self._run(self._model, training=training)
        return self._whole[training]

    def _try(
        self,
        writes: Mapping[str, np.ndarray],
        change: Change,
        held: _Run | None = None,
        training: bool = False,
    ) -> _Run | str:
        """`_run` on the whole network, or why it fails."""
        try:
            return self._run(self._model, writes, change, held, training)
        except Exception as error:  # whatever an untrusted forward pass raises
            return f"its maps cannot be followed ({brief(error, 80)})"

    def _run(
        self,
        model: nn.Module,
        writes: Mapping[str, np.ndarray] | None = None,
        change: Change = torch.zeros_like,
        held: _Run | None = None,
        training: bool = False,
    ) -> _Run:
        """Run a network, changing some channels where they are written, and holding layers' outputs."""
        run = _Run({}, {}, [])
        modules: dict[str, Any] = dict(model.named_modules())

        def hook(name: str) -> Callable[..., Tensor | None]:
            def read(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Tensor | None:
                if not isinstance(output, Tensor):
                    return None
                run.bytes += arguments[0].nbytes + output.nbytes
                if run.bytes > self._most:
                    raise MemoryError("its maps take too much memory")
                taken = run.inputs.setdefault(name, [])
                taken.append(arguments[0].clone())
                run.outputs.setdefault(name, []).append(output.clone())
                if held is None or name in self._passed:
                    return None
                return held.outputs[name][len(taken) - 1].clone()

            return read

        def write(name: str, indices: np.ndarray) -> Callable[..., Tensor]:
            def changed(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                made, places = output.clone(), torch.from_numpy(indices)
                axis = channel_axis(module) if reads_channels(module) else 1
                return made.index_copy_(axis, places, change(made.index_select(axis, places)))

            return changed

        hooks = [
            module.register_forward_hook(hook(name))
            for name, module in modules.items()
            if reads_channels(module)
        ]
        hooks += [
            modules[name].register_forward_hook(write(name, where))
            for name, where in (writes or {}).items()
            if getattr(modules[name], "weight", None) is not None
        ]
        with attached(hooks), steadied(model, training), _unshifted(modules, writes or {}, change):
            run.returned = tensors_of(run_and_size_norms(model, self._inputs))
        return run


@contextmanager
def _unshifted(
    modules: Mapping[str, Any], writes: Mapping[str, np.ndarray], change: Change
) -> Iterator[None]:
    """Norms without a scale as masks leave them: with means of zero where channels are silent."""
    means = {
        name: getattr(modules[name], "running_mean", None)
        for name in (writes if change is torch.zeros_like else ())
        if getattr(modules[name], "weight", None) is None
    }
    kept = {name: mean.clone() for name, mean in means.items() if mean is not None}
    for name in kept:
        modules[name].running_mean[torch.from_numpy(writes[name])] = 0.0
    try:
        yield
    finally:
        for name, mean in kept.items():
            modules[name].running_mean.copy_(mean)


def _written(
    groups: Sequence[CouplingGroup], channels: Mapping[int, set[int]], norms: bool
) -> dict[str, np.ndarray]:
    """Where channels are written: filters of producers, and channels of norms that they pass."""
    found: dict[str, list[np.ndarray]] = {}
    for group in groups:
        for places in (*group.producers, *(group.norms if norms else ())):
            if len(indices := _indices(places, channels[group.number])):
                found.setdefault(places.module, []).append(indices)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _read(groups: Sequence[CouplingGroup], channels: Mapping[int, set[int]]) -> dict[str, np.ndarray]:
    """Where channels are read, by the consumer."""
    found: dict[str, list[np.ndarray]] = {}
    for group in groups:
        for places in group.consumers:
            found.setdefault(places.module, []).append(_indices(places, channels[group.number]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _indices(places: Places, channels: set[int]) -> np.ndarray:
    return places.indices[np.isin(places.channels, list(channels))]


def _ends_and_middle(channels: int) -> set[int]:
    """Channels to remove on trial: the first, the last and the middle one, but never all."""
    chosen = {0, channels // 2, channels - 1}
    return chosen if len(chosen) < channels else {channels - 1}


def _jolted(maps: Tensor) -> Tensor:
    """Maps with noise added, uneven, since a norm over positions would take a constant away again."""
    generator = torch.Generator().manual_seed(1)
    return maps + (1 + maps.abs().amax()) * torch.rand(maps.shape, generator=generator)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True
    if not one.numel() or not one.is_floating_point():
        return not torch.equal(one, other)
    largest = float(one.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return not torch.allclose(one, other, rtol=_CLOSE, atol=0.1 * _CLOSE * largest, equal_nan=True)

"""Experiments on a network: channels are disturbed, silenced or removed, and what moves is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

_CLOSE = 1e-4  # relative; also to a layer's largest value, where single values are near zero

Change = Callable[[Tensor], Tensor]
Choice = Callable[[int, int], set[int]]  # of channels, from a group's place among others and how many it has


@dataclass
class Run:
    """What a pass read and computed: a tensor a call, by the layer's name; and what the network returned."""

    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    returned: list[Tensor]
    bytes: int = 0
    by_keyword: set[str] = field(default_factory=set)  # layers whose maps are not their first argument
    differing: list[str] = field(default_factory=list)  # layers that computed something else than was held


class Bench:
    """A network on which experiments are run, and what it computes undisturbed."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._whole: dict[bool, Run] = {}
        self._most = Budget.of(torch.device("cpu")).left() // 4  # two passes are held at a time
        self._differing: set[str] = set()  # layers at which the last removal failed
        self._last = ""  # the layer that was called last
        self._passed: set[str] = set()  # grouped convolutions that channels pass on their way to consumers

    def pass_through(self, groups: Sequence[CouplingGroup]) -> None:
        """Let channels pass the grouped convolutions that go with them."""
        consumers = {places.module for group in groups for places in group.consumers}
        producers = {places.module for group in groups for places in group.producers}
        self._passed = {
            name for name in producers - consumers if getattr(self._modules[name], "groups", 1) > 1
        }

    def suspects(self, groups: Sequence[CouplingGroup]) -> Sequence[CouplingGroup]:
        """Groups that may be at fault where removal failed: those at the layers that differed, or all."""
        found = [
            group
            for group in groups
            if any(places.module in self._differing for places in (*group.producers, *group.consumers))
        ]
        return found or groups

    def cannot_watch(self, group: CouplingGroup) -> str:
        """Why what a group's consumers read cannot be seen; empty where it can."""
        named = [one.module for one in group.consumers if one.module in self._undisturbed().by_keyword]
        return f"{named[0]} is given its maps by keyword" if named else ""

    def unsteady(self) -> str:
        """Why nothing can be tried: passes that should be alike return different things, or none."""
        try:
            whole = self._undisturbed().returned
            if not whole:
                return "the network returns nothing that can be compared"
            if self._returns(whole, seed=1):
                return ""
            if self._returns(whole, seed=0):
                return "the network draws random numbers when it runs"
            return "the network changes from call to call"
        except Exception as error:  # whatever an untrusted forward pass raises, or its maps are too large
            return f"what it computes cannot be compared ({brief(error, 80)})"

    def _returns(self, expected: Sequence[Tensor], seed: int) -> bool:
        """Whether another pass returns the same, whatever it draws at random coming from a seed."""
        with steadied(self._model, seed=seed):
            again = tensors_of(self._model(self._inputs))
        return not any(_differ(one, other) for one, other in zip(expected, again, strict=True))

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

    def remove(self, groups: Sequence[CouplingGroup], training: bool, choose: Choice) -> str:
        """Remove some channels of each group: every layer must compute as it does with them silenced."""
        gone = {group.number: choose(place, group.channels) for place, group in enumerate(groups)}
        self._differing = set()
        writes = _written(groups, gone, norms=True)
        masked = self._try(writes, torch.zeros_like, training=training, reads=False)
        if isinstance(masked, str):
            return masked
        smaller = plain_copy(self._model, share=True)
        cut = cut_channels(smaller, groups, gone)
        kept = {
            name: torch.from_numpy(np.flatnonzero(own))
            for name, layer in self._modules.items()
            if name in masked.outputs
            and (own := cut.get((f"{name}.weight", 1 - input_axis(layer)))) is not None
        }
        try:
            # Every layer is held at what it computes masked. So differences do not add up, nor do they change
            # what the network chooses by its values, as a detector does.
            removed = self._run(smaller, held=masked, training=training, kept=kept, reads=False)
        except Exception as error:  # a forward pass that counts on the old sizes
            self._differing = {self._last}
            return f"the network does not run without some of its channels ({brief(error, 80)})"
        self._differing = set(removed.differing)
        for name in removed.differing:
            layer = self._modules[name]
            kind = "" if is_plain(layer) else f" ({type(layer).__name__})"
            return f"{name}{kind} computes something else without some of its channels"
        pairs = zip(masked.returned, removed.returned, strict=True)
        if any(_differ(one, other) for one, other in pairs):
            return "the network returns something else without some of its channels"
        return ""

    def _undisturbed(self, training: bool = False) -> Run:
        if training not in self._whole:
            self._whole[training] = self._run(self._model, training=training)
        return self._whole[training]

    def _try(
        self,
        writes: Mapping[str, np.ndarray],
        change: Change,
        held: Run | None = None,
        training: bool = False,
        reads: bool = True,
    ) -> Run | str:
        """`_run` on the whole network, or why it fails."""
        try:
            return self._run(self._model, writes, change, held, training, reads=reads)
        except Exception as error:  # whatever an untrusted forward pass raises
            return f"its maps cannot be followed ({brief(error, 80)})"

    def _run(
        self,
        model: nn.Module,
        writes: Mapping[str, np.ndarray] | None = None,
        change: Change = torch.zeros_like,
        held: Run | None = None,
        training: bool = False,
        kept: Mapping[str, Tensor] | None = None,
        reads: bool = True,
    ) -> Run:
        """Run a network, changing some channels where they are written, and holding layers' outputs.

        With `kept`, the filters that layers of a smaller network have, what they compute is compared with
        what is held, and not noted. What they read is noted with `reads`.
        """
        run = Run({}, {}, [])
        calls: Counter[str] = Counter()
        modules: dict[str, Any] = dict(model.named_modules())

        def hook(name: str) -> Callable[..., Tensor | None]:
            def read(module: nn.Module, arguments: Any, named: Any, output: Any) -> Tensor | None:
                self._last = name
                given = next(iter((*arguments, *named.values())))
                if not isinstance(output, Tensor):
                    return None
                if not arguments:
                    run.by_keyword.add(name)
                calls[name] += 1
                run.bytes += given.nbytes * reads + output.nbytes * (kept is None)
                if run.bytes > self._most:
                    raise MemoryError("its maps take too much memory")
                if reads:
                    run.inputs.setdefault(name, []).append(given.clone())
                if kept is None:
                    run.outputs.setdefault(name, []).append(output.clone())
                if held is None or (name in self._passed and kept is None):
                    return None
                other = held.outputs[name][calls[name] - 1]
                if kept is not None and name in kept:
                    other = other.index_select(channel_axis(module), kept[name])
                if kept is not None and _differ(other, output):
                    run.differing.append(name)
                return other.clone()

            return read

        def write(name: str, indices: np.ndarray) -> Callable[..., Tensor]:
            def changed(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                made, places = output.clone(), torch.from_numpy(indices)
                axis = channel_axis(module) if reads_channels(module) else 1
                return made.index_copy_(axis, places, change(made.index_select(axis, places)))

            return changed

        hooks = [
            module.register_forward_hook(hook(name), with_kwargs=True)
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


def _ends_and_middle(place: int, channels: int) -> set[int]:
    """The first, the last and the middle channel, but never all."""
    chosen = {0, channels // 2, channels - 1}
    return chosen if len(chosen) < channels else {channels - 1}


def _some(place: int, channels: int) -> set[int]:
    """Half of the channels or fewer, at random; of groups near each other different numbers, where possible.

    The forward pass may count on it that two groups are equally large.
    """
    half = max(1, channels // 2)
    count = half - place // 2 % (half + 1)
    return set(np.random.default_rng([place, channels]).permutation(channels)[:count].tolist())


def _at_one_end(place: int, channels: int) -> set[int]:
    """A quarter of the channels: the first of every other group, and of those between none."""
    return set(range(max(1, channels // 4))) if place % 2 == 0 and channels > 1 else set()


def _at_other_end(place: int, channels: int) -> set[int]:
    """A quarter of the channels: the last of every other group, and of those between none."""
    return set(range(channels - max(1, channels // 4), channels)) if place % 2 and channels > 1 else set()


# Which channels are removed on trial.
CHOICES: tuple[Choice, ...] = (_ends_and_middle, _some, _at_one_end, _at_other_end)


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

"""Hints: a smaller network's layers are compared with the whole one's, at the filters that it kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz.network.copies import attached
from prune_viz.network.layer_kinds import channel_axis, count_outputs, layers_of
from prune_viz.network.tracing import own_norms
from prune_viz.utils.nested_tensors import tensors_of

_Hook = Callable[[nn.Module, Any, Any], None]


@dataclass(frozen=True)
class Asked:
    """What the whole network gives for a batch.

    Attributes
    ----------
    outputs : list of Tensor
        All its outputs.
    maps : dict of str to Tensor
        By the module, its output at the filters that the smaller network keeps.
    """

    outputs: list[Tensor]
    maps: dict[str, Tensor]


class Hints:
    """Compares the layers of a smaller network with the whole one's (Romero et al. 2015, FitNets).

    Maps are compared behind the batch norm that a layer has for itself, else as the layer gives them. Layers
    that run more than once, and those whose output is constant, are left out.

    Parameters
    ----------
    whole, smaller : nn.Module
        The networks, in eval mode; the smaller one has the whole one's names.
    masks : mapping of str to bool Tensor
        What was cut, True = kept; of other layers all filters are there.
    images : Tensor, shape (N, C, *size)
        Inputs on which layers are measured once, on the networks' device.

    Attributes
    ----------
    unchanged : set of str
        Modules of the smaller network that run before the first whose tensors differ from those of the whole
        one.
    """

    def __init__(
        self, whole: nn.Module, smaller: nn.Module, masks: Mapping[str, Tensor], images: Tensor
    ) -> None:
        self._whole, self._smaller = whole, smaller
        behind, modules = own_norms(whole), dict(smaller.named_modules())
        self._kept: dict[str, tuple[int, Tensor]] = {}
        for name, layer in layers_of(whole, masks.keys()).items():
            place = behind.get(name, name)
            if name in modules and place in modules:
                mask = masks.get(name, torch.ones(count_outputs(layer), dtype=torch.bool))
                self._kept[place] = channel_axis(layer), mask.nonzero().ravel().to(images.device)
        self._scales: dict[str, Tensor] = {}
        self.unchanged = self._measure(images)

    def ask(self, images: Tensor) -> Asked:
        """What the whole network gives for a batch, shape (B, C, *size)."""
        maps: dict[str, Tensor] = {}

        def hook(place: str) -> _Hook:
            def note(module: nn.Module, arguments: Any, output: Any) -> None:
                maps[place] = self._at_kept(place, output)

            return note

        with torch.no_grad(), attached(self._hooks(self._whole, self._scales, hook)):
            return Asked(tensors_of(self._whole(images.clone())), maps)  # it may write into its input

    def answer(self, images: Tensor, asked: Asked) -> tuple[list[Tensor], Tensor]:
        """What the smaller network puts out, and how far its layers are from what was asked.

        Returns
        -------
        list of Tensor
            Its outputs.
        Tensor, a scalar
            Mean over layers of the squared error as a share of the whole network's variance.
        """
        errors: list[Tensor] = []

        def hook(place: str) -> _Hook:
            def compare(module: nn.Module, arguments: Any, output: Any) -> None:
                # At once: what comes next may overwrite the map.
                errors.append((output - asked.maps[place]).square().mean() / self._scales[place])

            return compare

        with attached(self._hooks(self._smaller, self._scales, hook)):
            outputs = tensors_of(self._smaller(images.clone()))
        return outputs, torch.stack(errors).mean() if errors else images.new_zeros(())

    def _measure(self, images: Tensor) -> set[str]:
        """Find what can be compared, its scale, and the modules that run before the first difference."""
        asked: dict[str, list[tuple[torch.Size, Tensor]]] = {}  # shape and variance, of each call
        given: dict[str, list[torch.Size]] = {}
        order: list[str] = []

        def measure(place: str) -> _Hook:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    maps = self._at_kept(place, output)
                    asked.setdefault(place, []).append((maps.shape, maps.var()))

            return hook

        def called(name: str) -> _Hook:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                order.append(name)
                if isinstance(output, Tensor):
                    given.setdefault(name, []).append(output.shape)

            return hook

        with torch.no_grad():
            with attached(self._hooks(self._whole, self._kept, measure)):
                self._whole(images.clone())
            with attached(self._hooks(self._smaller, dict(self._smaller.named_modules()), called)):
                self._smaller(images.clone())
        for place, calls in asked.items():
            shape, scale = calls[0]
            if len(calls) > 1 or given.get(place) != [shape]:
                continue
            if bool(scale.isfinite()) and float(scale) > torch.finfo(scale.dtype).tiny:
                self._scales[place] = scale
        changed = self._changed()
        first = next((index for index, name in enumerate(order) if name in changed), 0)
        return set(order[:first]) - set(order[first:])

    def _changed(self) -> set[str]:
        """Modules of the smaller network of which a tensor of their own is not as in the whole one."""
        whole = self._whole.state_dict()

        def is_new(name: str, tensor: Tensor) -> bool:
            return name not in whole or not torch.equal(tensor, whole[name])

        return {
            name.rpartition(".")[0] for name, one in self._smaller.state_dict().items() if is_new(name, one)
        }

    def _at_kept(self, place: str, maps: Tensor) -> Tensor:
        axis, kept = self._kept[place]
        return maps.index_select(axis, kept)

    @staticmethod
    def _hooks(model: nn.Module, places: Mapping[str, Any], hook: Callable[[str], _Hook]) -> list[Any]:
        modules = dict(model.named_modules())
        return [modules[place].register_forward_hook(hook(place)) for place in places if place in modules]

"""A layer's maps by hooks, for models that `prune_viz.tracing` cannot trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from prune_viz.tracing import ACTIVATIONS


def hookable(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a model on a device, of which maps before activations can be looked at too."""
    twin = copy.deepcopy(model).to(device).requires_grad_(False)
    modules: Iterator[Any] = twin.modules()
    for module in modules:
        if getattr(module, "inplace", False):
            module.inplace = False
    return twin


class HookedMaps:
    """A layer's maps from a model that cannot be traced: the whole model runs until the layer is reached.

    The batch norm and the activation that follow a convolution are found by watching which modules
    take its very output; an activation that is a function, not a module, is not seen.

    Parameters
    ----------
    model : nn.Module
        The network, as `hookable` gives it; hooks hang on it only while it runs.
    conv : str
        Name of the convolution.
    """

    def __init__(self, model: nn.Module, conv: str) -> None:
        self._model = model
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._before = self._after = conv
        self._followed = False

    def __call__(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the maps before and after the activation; the same one where none was found."""
        if not self._followed:
            self._follow(inputs)
        return self._run(inputs)

    def _follow(self, inputs: torch.Tensor) -> None:
        """Extend the tap over the norm and the activation that take the convolution's output."""
        taken: list[tuple[torch.Tensor, str]] = []
        given: dict[str, torch.Tensor] = {}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                given.setdefault(name, output)
                taken.extend((argument, name) for argument in arguments)

            return hook

        kinds: tuple[type[nn.Module], ...] = (_ConvNd, _BatchNorm, *ACTIVATIONS)
        hooks = [
            module.register_forward_hook(watch(name))
            for name, module in self._modules.items()
            if isinstance(module, kinds)
        ]
        try:
            with torch.no_grad():
                self._model(inputs)
        finally:
            for handle in hooks:
                handle.remove()
        for kind in (_BatchNorm, ACTIVATIONS):
            takers = [name for argument, name in taken if argument is given[self._after]]
            if len(takers) == 1 and isinstance(self._modules[takers[0]], kind):
                self._after = takers[0]
                if kind is _BatchNorm:
                    self._before = takers[0]
        self._followed = True

    def _run(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
                # One activation module may serve many layers: wait for the call that takes our map.
                if name == self._before or arguments[0] is maps.get(self._before):
                    maps[name] = output
                    if name == self._after:
                        raise _ReachedError

            return hook

        hooks = [
            self._modules[name].register_forward_hook(keep(name))
            for name in dict.fromkeys((self._before, self._after))
        ]
        try:
            self._model(inputs)
        except _ReachedError:
            pass
        finally:
            for handle in hooks:
                handle.remove()
        return maps[self._before], maps[self._after]


class _ReachedError(Exception):
    """The layer looked for has run; the rest of the forward pass is not needed."""

"""A layer's maps by hooks, for models that `tracing` cannot trace; input by input where need be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from prune_viz.network.copies import as_it_was, attached, free_copy
from prune_viz.network.tracing import ACTIVATION_NAMES

MapFunction = Callable[[Tensor], tuple[Tensor, Tensor]]


def hookable(model: nn.Module, device: torch.device, *, share: bool) -> nn.Module:
    """A frozen copy of a model on a device, of which maps before activations can be read too.

    `share` is that of `prune_viz.network.copies.free_copy`.
    """
    twin = free_copy(model, share=share).to(device).requires_grad_(False)
    modules: Iterator[Any] = twin.modules()
    for module in modules:
        if getattr(module, "inplace", False):
            module.inplace = False
    return twin


class HookedMaps:
    """A layer's maps from a model that cannot be traced: the whole model runs until the layer is reached.

    The batch norm and the activation that follow a convolution are found by watching what takes its very
    output.

    Parameters
    ----------
    model : nn.Module
        The network, from `hookable`; hooks hang on it only while it runs.
    conv : str
        Name of the convolution.
    alone : threading.RLock
        Held while the model runs with hooks on it; one a model.
    """

    def __init__(self, model: nn.Module, conv: str, alone: threading.RLock) -> None:
        self._model = model
        self._alone = alone
        self._conv = self._before = conv
        self.has_activation: bool | None = None  # known after the first run

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Give the maps before and after the activation; the same one where none was found."""
        with self._alone:
            if self.has_activation is None:
                self._follow(inputs)
            return self._run(inputs)

    def _follow(self, inputs: Tensor) -> None:
        """Extend the tap over the norm and the activation that take the convolution's output."""
        norms = [name for name, module in self._model.named_modules() if isinstance(module, _BatchNorm)]
        given: dict[str, Tensor] = {}
        read: dict[str, Any] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
                if name not in given:
                    given[name] = output
                    read[name] = next(iter(arguments), None)  # none where it is called by keyword

            return hook

        with torch.no_grad(), _Watch() as watch:
            self._run_hooked(inputs, {name: note(name) for name in (self._conv, *norms)})
        norm = next((name for name in norms if read.get(name) is given[self._conv]), None)
        if norm is not None and watch.takers(given[self._conv]) == ["batch_norm"]:
            self._before = norm
        takers = watch.takers(given[self._before])
        self.has_activation = len(takers) == 1 and takers[0] in ACTIVATION_NAMES

    def _run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        watch = _Watch()
        before: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            watch.awaited = output
            before.append(output)
            if not self.has_activation:
                watch.result = output
                raise _ReachedError

        try:
            with watch:
                self._run_hooked(inputs, {self._before: keep})
        except _ReachedError:
            pass
        return before[-1], watch.result

    def _run_hooked(self, inputs: Tensor, hooks: dict[str, Any]) -> None:
        modules = {name: self._model.get_submodule(name) for name in hooks}
        handles = (modules[name].register_forward_hook(hook) for name, hook in hooks.items())
        with attached(handles), as_it_was(self._model):
            self._model(inputs)


class _Watch(TorchFunctionMode):
    """Sees all functions of torch that are called, by modules or not, and ends the run where it is asked to.

    Attributes
    ----------
    awaited : Tensor or None
        A map; the run ends with the first activation of it.
    result : Tensor
        What that gave.
    """

    result: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.awaited: Tensor | None = None
        self._calls: list[tuple[Any, str]] = []

    def takers(self, tensor: Tensor) -> list[str]:
        """Names of the functions that made something of a tensor."""
        return [name for taken, name in self._calls if taken is tensor]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        taken = args[0] if args else None
        if isinstance(taken, Tensor) and taken is self.awaited and name in ACTIVATION_NAMES:
            # Of a copy, as the function may write its result where it read.
            self.result = func(taken.clone(), *args[1:], **kwargs)
            raise _ReachedError
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._calls += [(argument, name) for argument in args if isinstance(argument, Tensor)]
        return result


class RowByRow:
    """A layer's maps, one input at a time: for networks that take batches apart, or mix their rows.

    All of a layer's output for one input counts as one map, with an axis more: crops of a picture, frames of
    a film.

    Parameters
    ----------
    maps : callable
        From inputs, shape (B, C, *canvas), to the layer's maps before and after its activation.
    """

    def __init__(self, maps: MapFunction) -> None:
        self._maps = maps

    def __call__(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the maps before and after the activation, both (B, F, parts, *spatial)."""
        pairs = [self._maps(inputs[row : row + 1]) for row in range(len(inputs))]
        before = _stacked([pair[0] for pair in pairs])
        if all(one is other for one, other in pairs):
            return before, before
        return before, _stacked([pair[1] for pair in pairs])


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Maps (parts, F, *spatial) of several inputs in one tensor, zeros where an input has fewer parts."""
    most = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    padded = []
    for row in rows:
        lacking = [(0, full - size) for full, size in zip(most, row.shape, strict=True)]
        padded.append(F.pad(row, [number for pair in reversed(lacking) for number in pair]))
    return torch.stack(padded).transpose(1, 2)


class _ReachedError(Exception):
    """The layer looked for has run; the rest of the forward pass is not needed."""

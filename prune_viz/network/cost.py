"""What a network costs: its parameters, and the multiply-accumulates of each module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from prune_viz.network.calls import blank_input
from prune_viz.network.copies import attached, free_copy
from prune_viz.network.dispatch import DispatchMode


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the multiply-accumulates that each module does itself, not its children, for one input.

    Parameters
    ----------
    model : nn.Module
        The network.
    input_shape : sequence of int
        Channels first, without the batch axis.
    """
    return {name: macs for name, macs in _counted(model, input_shape).items() if macs > 0}


def count_cost(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """Count a network's parameters and its multiply-accumulates for one input.

    Parameters
    ----------
    model : nn.Module
        The network.
    input_shape : sequence of int
        Channels first, without the batch axis.

    Returns
    -------
    parameters, macs : int
        MACs of convolutions and matrix products, as PyTorch's own counter sees them.
    """
    macs = sum(_counted(model, input_shape).values())
    return sum(parameter.numel() for parameter in model.parameters()), macs


def _counted(model: nn.Module, input_shape: Sequence[int]) -> Counter[str]:
    """MACs by the innermost module that is being called, after one input has passed in eval mode."""
    # Hooks stumble over views of parameters with gradients, as an expanded class token is.
    twin = free_copy(model, share=True).eval().requires_grad_(False)
    counting = _Counting()
    hooks = [
        hook
        for name, module in twin.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        for hook in (
            module.register_forward_pre_hook(partial(counting.enter, name)),
            module.register_forward_hook(counting.leave, always_call=True),
        )
    ]
    with torch.no_grad(), attached(hooks), counting:
        twin(blank_input(model, input_shape))
    return counting.macs


class _Counting(DispatchMode):
    """Counts multiply-accumulates by PyTorch's own formulas.

    PyTorch's counter, `torch.utils.flop_counter.FlopCounterMode`, would import its compiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self._inside = [""]

    def enter(self, name: str, module: nn.Module, inputs: object) -> None:
        """Note that a module is being called."""
        self._inside.append(name)

    def leave(self, module: nn.Module, inputs: object, output: object) -> None:
        """Note that the call of the innermost module has ended."""
        self._inside.pop()

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and count it; one without a formula is counted by what it is made of."""
        formula: Any = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:
                made = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if made is NotImplemented else made
        output = func(*args, **kwargs)
        self.macs[self._inside[-1]] += formula(*args, **kwargs, out_val=output) // 2
        return output

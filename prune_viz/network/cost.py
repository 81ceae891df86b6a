"""What a network costs: its parameters, and the multiply-accumulates of each module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune_viz.network.calls import blank_input
from prune_viz.network.copies import free_copy


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """Count the multiply-accumulates that each module does itself, not its children, for one input.

    Parameters
    ----------
    model : nn.Module
        The network.
    input_shape : sequence of int
        Channels first, without the batch axis.
    """
    counter = _counted(model, input_shape)
    counted = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(model).__name__  # what the counter calls the model itself
    own: dict[str, int] = {}

    def total(name: str, module: nn.Module) -> int:
        inner = sum(
            total(f"{name}.{child}" if name else child, part) for child, part in module.named_children()
        )
        found: int | None = counted.get(f"{root}.{name}" if name else root)
        if found is None:  # never called itself, as a list of modules is not
            return inner
        own[name] = found - inner
        return found

    total("", model)
    return {name: macs for name, macs in own.items() if macs > 0}


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
    macs = _counted(model, input_shape).get_total_flops() // 2
    return sum(parameter.numel() for parameter in model.parameters()), macs


def _counted(model: nn.Module, input_shape: Sequence[int]) -> FlopCounterMode:
    """PyTorch's counter after one input has passed in eval mode."""
    # Its hooks stumble over views of parameters with gradients, as an expanded class token is.
    twin = free_copy(model, share=True).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(blank_input(model, input_shape))
    return counter

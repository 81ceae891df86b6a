"""Pictures with their channels last in memory: faster, where a network computes the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prune_viz.network.copies import as_it_was, free_copy
from prune_viz.utils.nested_tensors import tensors_of


def lay_channels_last(inputs: Tensor) -> Tensor:
    """Inputs with their channels last in memory, where they are pictures."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


def lay_weights_channels_last(model: nn.Module) -> None:
    """Lay out a model's weights for such inputs; kernels of one pixel lie so already, and stay in place."""
    for parameter in model.parameters():
        parameter.data = lay_channels_last(parameter.data)


def takes_channels_last(model: nn.Module, example: Tensor, *, share: bool) -> bool:
    """Whether a model computes the same for an input, shape (1, C, *size), with its channels last.

    It is tried on a copy, which shares what it can with the model where that is allowed (`free_copy`).
    """
    if example.ndim != 4:
        return False
    try:
        with torch.no_grad(), as_it_was(model):
            usual = tensors_of(model(example))
        twin = free_copy(model, share=share)
        lay_weights_channels_last(twin)
        with torch.no_grad():
            last = tensors_of(twin(lay_channels_last(example)))
        return all(_alike(one, other) for one, other in zip(usual, last, strict=True))
    except Exception:  # whatever an untrusted forward pass raises
        return False


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding alone; what is not finite counts as zero."""
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    one, other = (tensor.nan_to_num(0.0, 0.0, 0.0) for tensor in (one, other))
    return torch.allclose(one, other, rtol=1e-2, atol=1e-3 * float(one.abs().max()))

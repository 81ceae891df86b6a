"""Tall kernels over one column of one channel, as networks for signals have that are built of 2-D layers.

PyTorch computes them many times slower on a CPU than the same kernels lying on their side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from prune_viz.network.copies import plain_copy
from prune_viz.network.layer_kinds import has_tall_kernel

_Network = TypeVar("_Network", bound=nn.Module)


def turned(model: _Network) -> _Network:
    """The model, or, where it has tall kernels, a plain copy that shares its weights and has them turned.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    """
    if not any(map(has_tall_kernel, model.modules())):
        return model
    twin = plain_copy(model, share=True)
    modules: Iterator[Any] = twin.modules()
    for module in filter(has_tall_kernel, modules):
        sizes = (module.stride, module.padding, module.dilation)
        module._conv_forward = partial(_convolve_turned, *sizes)
    return twin


def _convolve_turned(
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """What a convolution computes, of one column on its side."""
    if inputs.shape[-1] != 1:
        return F.conv2d(inputs, weight, bias, stride, padding, dilation)
    lying, kernels = inputs.transpose(-2, -1), weight.transpose(-2, -1)
    return F.conv2d(lying, kernels, bias, stride[::-1], padding[::-1], dilation[::-1]).transpose(-2, -1)

"""What batch norms are fed: each channel's mean and mean square, and their gradient, in few passes.

Maps before batch norms are the largest that a network holds. So no copy of one is made beside what a batch
norm puts out anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm

_FLOOR = 1e-3  # of a layer's mean variance; what a channel's variance counts as at least


def settings() -> list[object]:
    """What moments depend on beside their arguments, for the key of calibration images."""
    return [_FLOOR]


def is_plain_norm(module: _BatchNorm) -> bool:
    """Whether a module computes what a batch norm in eval mode does, and no more."""
    plain = type(module) in (BatchNorm1d, BatchNorm2d, BatchNorm3d) and "forward" not in vars(module)
    return plain and not module.training


def moments(module: Any, inputs: Tensor) -> Tensor:
    """Mean and mean square of each channel, in deviations from a batch norm's running mean.

    Parameters
    ----------
    module : nn.Module
        The batch norm, with running statistics.
    inputs : Tensor, shape (B, C, *size)
        What it is fed.

    Returns
    -------
    Tensor, shape (2, C)
    """
    found: Tensor = _Moments.apply(inputs, module.running_mean, _deviation(module))
    return found


def normalise(module: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode puts out, shape (B, C, *size), and the `moments` of what it is fed.

    Both are differentiated by the input alone, in one pass.
    """
    with torch.no_grad():
        scale = (module.running_var + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        shift = -module.running_mean * scale
        if module.bias is not None:
            shift = shift + module.bias
    deviation = _deviation(module)
    both: tuple[Tensor, Tensor] = _Normalised.apply(inputs, module.running_mean, deviation, scale, shift)
    return both


def _deviation(module: Any) -> Tensor:
    variance, floor = module.running_var, _FLOOR * float(module.running_var.mean())
    deviation: Tensor = (variance.clamp_min(floor) + module.eps).sqrt()
    return deviation


def _channels_second(values: Tensor, axes: int) -> Tensor:
    """Values by channel, shape (C,), to be broadcast over maps of so many axes."""
    return values.view(1, -1, *(1,) * (axes - 2))


def _measure(inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    own, variance = torch.batch_norm_update_stats(inputs, None, None, 0.0)
    off = (own - mean) / deviation
    return torch.stack([off, variance / deviation.square() + off.square()])


def _pull(gradient: Tensor, inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The gradient by the input, from that by the moments."""
    count = inputs.numel() // max(1, inputs.shape[1])
    slope = 2 * gradient[1] / (deviation.square() * count)
    level = gradient[0] / (deviation * count) - slope * mean
    axes = inputs.ndim
    return torch.addcmul(_channels_second(level, axes), inputs, _channels_second(slope, axes))


class _Moments(torch.autograd.Function):
    """Shapes (B, C, *size), (C,) and (C,) to (2, C)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Measure."""
        ctx.save_for_backward(inputs, mean, deviation)
        return _measure(inputs, mean, deviation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by the input."""
        return _pull(gradient, *ctx.saved_tensors), None, None


class _Normalised(torch.autograd.Function):
    """Shapes (B, C, *size) and four times (C,) to (B, C, *size) and (2, C)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, mean: Tensor, deviation: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalise and measure."""
        ctx.save_for_backward(inputs, mean, deviation, scale)
        axes = inputs.ndim
        outputs = torch.addcmul(_channels_second(shift, axes), inputs, _channels_second(scale, axes))
        return outputs, _measure(inputs, mean, deviation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, onward: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by the input."""
        inputs, mean, deviation, scale = ctx.saved_tensors
        pulled = _pull(gradient, inputs, mean, deviation)
        return pulled.addcmul_(onward, _channels_second(scale, inputs.ndim)), None, None, None, None

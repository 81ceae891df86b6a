"""What a convolution of any kind and a linear layer are: where channels lie, and how weights are cut.

Where filters are analysed, nothing else asks which of them a layer is, so that a new kind is added here.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_PLAIN: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: object) -> TypeGuard[_ConvNd]:
    """Whether a layer is a convolution, transposed, grouped and depthwise ones included."""
    return isinstance(module, _ConvNd)


def is_transposed(module: object) -> bool:
    """Whether a layer is a transposed convolution."""
    return isinstance(module, _ConvTransposeNd)


def is_depthwise(module: object) -> bool:
    """Whether each filter of a convolution reads exactly one channel, its own."""
    return is_convolution(module) and module.groups == module.in_channels == module.out_channels > 1


def is_grouped(module: object) -> bool:
    """Whether a convolution has groups of several channels each."""
    return is_convolution(module) and module.groups > 1 and not is_depthwise(module)


def reads_channels(module: object) -> bool:
    """Whether a layer's weights can be cut along the channels that it reads."""
    return isinstance(module, (_ConvNd, nn.Linear))


def is_plain(module: Any) -> bool:
    """Whether a layer computes as torch's own class of its kind does: its forward pass is not overridden."""
    kinds: tuple[Any, ...] = (*_PLAIN, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
    return any(type(module).forward is kind.forward for kind in kinds)


def plain_kind(module: object) -> Any | None:
    """Torch's own class of which a convolution is a subclass; None for transposed ones and other layers."""
    return next((kind for kind in _PLAIN if isinstance(module, kind)), None)


def convolutions_of(model: nn.Module) -> dict[str, _ConvNd]:
    """A model's convolutions by name, those that never run included."""
    return {name: module for name, module in model.named_modules() if is_convolution(module)}


def channel_axis(module: object) -> int:
    """Along which axis of its inputs and outputs a layer's channels lie."""
    return 1 if is_convolution(module) else -1


def count_inputs(module: Any) -> int:
    """How many channels, or features, a layer reads."""
    return int(module.in_channels if is_convolution(module) else module.in_features)


def count_outputs(module: Any) -> int:
    """How many channels, or features, a layer writes."""
    return int(module.out_channels if is_convolution(module) else module.out_features)


def input_axis(module: object) -> int:
    """Along which axis of a layer's weight the channels lie that it reads, of a group where it has groups."""
    return 0 if is_transposed(module) else 1


def by_inputs(module: object, weight: Tensor) -> Tensor:
    """A view of a layer's weight with what it reads first, then what it writes: (inputs, outputs, *taps)."""
    return weight if is_transposed(module) else weight.transpose(0, 1)


def by_filters(module: Any, weight: Tensor) -> Tensor:
    """A convolution's weight, shape (filters, inputs of its group, *taps)."""
    if not is_transposed(module):
        return weight
    return weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def spread_over_weight(module: Any, mask: Tensor) -> Tensor:
    """A value for each filter of a convolution, in a shape that multiplies its weight."""
    tail = [1] * (module.weight.ndim - 2)
    if not is_transposed(module):
        return mask.view(-1, 1, *tail)
    per_group = mask.view(module.groups, -1)
    repeated = per_group.repeat_interleave(module.in_channels // module.groups, dim=0)
    return repeated.view(module.in_channels, -1, *tail)


def copy_without_inputs(module: Any, kept: Tensor) -> Any:
    """A copy of a layer without groups that reads some of its channels alone, of those numbers."""
    smaller: Any = copy.deepcopy(module)
    smaller.weight = nn.Parameter(module.weight.detach().index_select(input_axis(module), kept))
    setattr(smaller, "in_channels" if is_convolution(module) else "in_features", len(kept))
    return smaller


def resize(module: nn.Module, weight: Tensor) -> None:
    """Set the sizes that a layer states beside its weight to those of another weight, of the same kind.

    Parameters
    ----------
    module : nn.Module
        A convolution or linear layer; of others nothing is set.
    weight : Tensor
        With fewer filters, inputs or whole groups than the layer's own.
    """
    if is_convolution(module) and weight.ndim == module.weight.ndim:
        read = input_axis(module)
        whole = (module.in_channels if is_transposed(module) else module.out_channels) // module.groups
        if module.groups > 1 and weight.shape[1] == module.weight.shape[1] and not weight.shape[0] % whole:
            module.groups = weight.shape[0] // whole  # whole groups went
        sizes = [weight.shape[0], weight.shape[1] * module.groups]
        module.in_channels, module.out_channels = sizes[read], sizes[1 - read]
    elif isinstance(module, nn.Linear) and weight.ndim == 2:
        module.out_features, module.in_features = weight.shape


def filters_in(module: Any, weight: Tensor) -> int:
    """How many filters a layer of this kind has with a weight of its own shape or a smaller one."""
    if is_transposed(module):
        return weight.shape[1] * int(module.groups) if weight.ndim > 1 else 0
    return weight.shape[0] if weight.ndim else 0


def is_strided_back(module: Any) -> bool:
    """Whether outputs of a layer see different taps of its kernel: those of a strided transposed one do."""
    return is_transposed(module) and max(module.stride) > 1


def count_phases(module: Any) -> int:
    """Over how many outputs the taps of a layer's kernel are spread: a transposed one's strides."""
    return int(torch.tensor(module.stride).prod()) if is_transposed(module) else 1

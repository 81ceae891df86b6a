"""What a convolution of any kind and a linear layer are: where channels lie, and how weights are cut.

Where filters are analysed, nothing else asks which of them a layer is, so that a new kind is added here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

_TALL = 16
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


def has_tall_kernel(module: object) -> bool:
    """Whether a layer is a plain 2-D convolution of one channel by columns of at least `_TALL` rows."""
    return (
        type(module) is nn.Conv2d
        and module.in_channels == 1
        and module.kernel_size[0] >= _TALL
        and module.kernel_size[1] == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


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


def has_plain_weights(module: nn.Module) -> bool:
    """Whether a layer is torch's own convolution or linear layer, of real weights without parametrisation."""
    if type(module) not in (*_PLAIN, nn.Linear) or parametrize.is_parametrized(module):
        return False
    layer: Any = module
    return bool(layer.weight.is_floating_point())


def convolutions_of(model: nn.Module) -> dict[str, _ConvNd]:
    """A model's convolutions by name, those that never run included."""
    return {name: module for name, module in model.named_modules() if is_convolution(module)}


def layers_of(model: nn.Module, linear: Collection[str] = ()) -> dict[str, Any]:
    """A model's layers of filters by name: its convolutions, and the linear layers that are named."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_convolution(module) or (name in linear and reads_channels(module))
    }


def maps_of(module: object, output: Tensor) -> Tensor:
    """A layer's output as maps, shape (B, filters, *positions): a linear layer has its channels last."""
    if is_convolution(module):
        return output
    return output[..., None] if output.ndim == 2 else output.movedim(-1, 1)


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


def spread_by_inputs(module: Any, weight: Tensor) -> Tensor:
    """`by_inputs`, with zeros for what the groups of a convolution do not read."""
    groups = module.groups if is_convolution(module) else 1
    if groups == 1:
        return by_inputs(module, weight)
    own = weight.reshape(groups, -1, *weight.shape[1:])  # groups, outputs (inputs, transposed) of each, ...
    own = own if is_transposed(module) else own.transpose(1, 2)
    spread = own.new_zeros(groups, own.shape[1], groups, *own.shape[2:])
    spread[torch.arange(groups), :, torch.arange(groups)] = own
    return spread.flatten(2, 3).flatten(0, 1)


def gather_by_inputs(module: Any, spread: Tensor) -> Tensor:
    """A weight in its own layout, from `spread_by_inputs`."""
    groups = module.groups if is_convolution(module) else 1
    if groups == 1:
        return by_inputs(module, spread)
    inputs, outputs, *taps = spread.shape
    own = spread.reshape(groups, inputs // groups, groups, outputs // groups, *taps)
    own = own[torch.arange(groups), :, torch.arange(groups)]
    return own.flatten(0, 1) if is_transposed(module) else own.transpose(1, 2).flatten(0, 1)


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


def set_sizes(module: Any, weight: Tensor, groups: int | None = None) -> None:
    """Set the sizes that a layer states beside its weight to those of another weight, of the same kind.

    Parameters
    ----------
    module : nn.Module
        A layer or norm of torch's own; of others nothing is set.
    weight : Tensor
        With fewer filters, inputs or channels than the layer's own.
    groups : int, optional
        Of a convolution, with that weight; as many as it has now by default.
    """
    if is_convolution(module) and weight.ndim == module.weight.ndim:
        module.groups = module.groups if groups is None else groups
        sizes = [weight.shape[0], weight.shape[1] * module.groups]
        read = input_axis(module)
        module.in_channels, module.out_channels = sizes[read], sizes[1 - read]
    elif isinstance(module, nn.Linear) and weight.ndim == 2:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        module.num_features = len(weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = len(weight) if module.num_groups == module.num_channels else module.num_groups
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def groups_left(module: Any, kept: Tensor) -> int:
    """How many groups of a convolution keep a filter, from a mask of its filters, True = keep."""
    return int(kept.view(module.groups, -1).any(dim=1).sum())


def norms_channels(module: object) -> bool:
    """Whether a module normalises every channel for itself: a batch norm, with fixed statistics too.

    That is torch's batch norms and instance norms, and any class with a vector each of ``weight``, ``bias``,
    ``running_mean`` and ``running_var``.
    """
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return True
    held = [getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
    shapes = {one.shape if isinstance(one, Tensor) else None for one in held}
    return len(shapes) == 1 and None not in shapes and len(next(iter(shapes)) or ()) == 1


def count_normed(norm: Any) -> int:
    """How many channels a norm of every channel for itself has (`norms_channels`)."""
    return int(norm.num_features) if isinstance(norm, (_BatchNorm, _InstanceNorm)) else len(norm.weight)


def filters_in(module: Any, weight: Tensor) -> int:
    """How many filters a layer of this kind has with a weight of its own shape or a smaller one."""
    if is_transposed(module):
        return weight.shape[1] * int(module.groups) if weight.ndim > 1 else 0
    return weight.shape[0] if weight.ndim else 0


def linear_layer(weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
    """A linear layer that holds these parameters."""
    outputs, inputs = weight.shape
    layer: Any = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def is_strided_back(module: Any) -> bool:
    """Whether outputs of a layer see different taps of its kernel: those of a strided transposed one do."""
    return is_transposed(module) and max(module.stride) > 1


def count_phases(module: Any) -> int:
    """Over how many outputs the taps of a layer's kernel are spread: a transposed one's strides."""
    return int(torch.tensor(module.stride).prod()) if is_transposed(module) else 1

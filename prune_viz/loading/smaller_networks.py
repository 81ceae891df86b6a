"""Networks from which filters were removed: built again from the shapes of the weights that are left."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from prune_viz.loading.architectures import LARGEST_INPUT, resolve_architecture
from prune_viz.loading.fixed_inputs import FixedInputs, fix_inputs
from prune_viz.loading.state_dicts import StateDict, check_real, tensors_in
from prune_viz.loading.tensor_checks import check_tensor
from prune_viz.network.attention_heads import narrow_attention, resize_heads
from prune_viz.network.calls import run_and_size_norms
from prune_viz.network.copies import bake_parameters
from prune_viz.network.layer_kinds import (
    filters_in,
    groups_left,
    is_convolution,
    reads_channels,
    set_sizes,
)
from prune_viz.network.packed_attention import by_layers
from prune_viz.utils.errors import UserError, brief

_MOST_STEPS = 1_000  # in which a file may say that filters were removed
_MOST_MASKED = 2**26  # filters that the masks of all steps may speak of


def removed_before(
    path: Path, about: Mapping[str, Any]
) -> tuple[list[dict[str, torch.Tensor]], tuple[int, ...] | None]:
    """Give what was removed before a file was written, and the shape of its network's input.

    Parameters
    ----------
    path : Path
        The file.
    about : mapping
        What it holds beside the weights.

    Returns
    -------
    pruning : list of dict
        Masks, as one step; empty where nothing was removed.
    input_shape : tuple of int or None
        (C, *spatial), where the file says it.

    Raises
    ------
    UserError
        If the shape is too large, or the masks do not fit one another.
    """
    shape, pruning = about.get("input_shape"), about.get("pruning")
    if not isinstance(shape, (list, tuple)) or not 2 <= len(shape) <= 4:
        return [], None
    if not all(type(size) is int and size > 0 for size in shape):
        return [], None
    if math.prod(shape) > LARGEST_INPUT:
        raise UserError(f"the file names an input of shape {tuple(shape)}, which is too large to be one")
    if not isinstance(pruning, list) or not all(isinstance(masks, dict) for masks in pruning):
        return [], tuple(shape)
    if len(pruning) > _MOST_STEPS:
        raise UserError(
            f"{path}: its record of removed filters has {len(pruning):,} steps; at most {_MOST_STEPS:,} are "
            "read"
        )
    try:
        return [compose_steps(pruning)] if pruning else [], tuple(shape)
    except UserError as error:
        raise UserError(f"{path}: its record of removed filters does not fit together: {error}") from None


def compose_steps(steps: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make one step of several in which filters were removed.

    Parameters
    ----------
    steps : sequence of mapping of str to bool Tensor
        Masks, True = keep; each step's are over the filters that the steps before it left.

    Returns
    -------
    dict of str to bool Tensor
        Masks over the filters of the whole network, on the CPU.

    Raises
    ------
    UserError
        Naming a mask that is no dense bool tensor of one axis, or does not fit the one before it.
    """
    whole: dict[str, torch.Tensor] = {}
    left = _MOST_MASKED
    for masks in steps:
        for name, mask in masks.items():
            check_tensor(f"the mask of {name}", mask)
            if not isinstance(name, str) or mask.dtype != torch.bool or mask.ndim != 1:
                raise UserError(f"the mask of {name} is not a bool tensor of one axis")
            before = whole.get(name, torch.ones(len(mask), dtype=torch.bool))
            left -= len(before) + 256  # which any mask costs in time
            if left < 0:
                raise UserError("its masks speak of too many filters")
            kept = before.nonzero().ravel()
            if len(kept) != len(mask):
                raise UserError(f"a mask of {name} has {len(mask)} filters, where {len(kept)} are left")
            whole[name] = before.clone()
            whole[name][kept] = mask.cpu()
    return whole


def build_smaller(
    path: Path,
    arch: str,
    kwargs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    input_shape: tuple[int, ...],
    held: FixedInputs | None,
    state: StateDict,
) -> nn.Module:
    """Build an architecture at the sizes that a file's weights have, and load those.

    Nothing is traced or run again: each layer takes the sizes of its weights, which are checked against the
    masks and against the whole network.

    Parameters
    ----------
    path : Path
        The file, for messages.
    arch : str
        SPEC of the architecture.
    kwargs : mapping
        What it is built with.
    masks : mapping of str to bool Tensor
        What was removed (`removed_before`).
    input_shape : tuple of int
        (C, *spatial).
    held : FixedInputs or None
        Where it takes several inputs, what all but one of them are held at.
    state : dict of str to Tensor
        The weights that are left.

    Raises
    ------
    UserError
        If they do not fit what is left, or the network does not run at these sizes.
    """
    whole, smaller = (resolve_architecture(arch, kwargs).cpu().float().eval() for _ in range(2))
    for network in (whole, smaller):
        bake_parameters(network)  # as removal did
        narrow_attention(network)
    check_real(state, tensors_in(whole.state_dict()), path)
    try:
        resize_to(smaller, masks, state)
        if _runs(whole, held, input_shape) and not _runs(smaller, held, input_shape):
            raise UserError("it does not run at these sizes")
    except UserError as error:
        raise UserError(f"{path}: its record of removed filters does not fit {arch}: {error}") from None
    return smaller


def resize_to(model: nn.Module, masks: Mapping[str, Tensor], state: StateDict) -> None:
    """Give every layer of a network the sizes of a smaller network's weights, and those weights.

    Parameters
    ----------
    model : nn.Module
        The architecture at full size; changed in place.
    masks : mapping of str to bool Tensor
        What was removed: a masked layer keeps as many filters as its mask does.
    state : dict of str to Tensor
        The smaller network's state dict.

    Raises
    ------
    UserError
        If a tensor is missing or has another number of axes, or is larger than the network's own, or a layer
        does not have the filters that its mask keeps.
    """
    modules, state = dict(model.named_modules()), by_layers(model, state)
    for name, mask in masks.items():
        weight = state.get(f"{name}.weight")
        if weight is None or name not in modules:
            raise UserError(f"there is no layer {name}")
        count = filters_in(modules[name], weight)
        if count != int(mask.sum()):
            raise UserError(f"{name} has {count} filters, its mask keeps {int(mask.sum())}")
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        weight = state.get(f"{prefix}weight")
        if weight is not None and weight.ndim:
            masked = is_convolution(module) and name in masks
            set_sizes(module, weight, groups_left(module, masks[name]) if masked else None)
        for kind in (module._parameters, module._buffers):
            for own, tensor in kind.items():
                found = state.get(prefix + own)
                if found is not None and (tensor is None or found.shape != tensor.shape):
                    kind[own] = _resized(prefix + own, tensor, found, reads_channels(module))
    resize_heads(model, {name: mask.numpy() for name, mask in masks.items()})
    named = OrderedDict(state)
    named._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    try:
        model.load_state_dict(named)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the weights do not fit the network that is left after removal: {brief(error)}"
        ) from None


def _resized(name: str, tensor: Tensor | None, found: Tensor, may_have_bias: bool) -> Tensor:
    """Room for a tensor of the smaller network in the place of the whole one's."""
    if tensor is None:
        if not (may_have_bias and name.endswith("bias")):  # which merging adds to layers without one
            raise UserError(f"{name} is none of the architecture's tensors")
        return nn.Parameter(torch.empty_like(found))
    if found.ndim != tensor.ndim or any(
        new > old for new, old in zip(found.shape, tensor.shape, strict=True)
    ):
        raise UserError(f"{name} is {tuple(found.shape)}, which is not what is left of {tuple(tensor.shape)}")
    room = torch.empty(found.shape, dtype=tensor.dtype)
    return nn.Parameter(room, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room


def _runs(model: nn.Module, held: FixedInputs | None, input_shape: tuple[int, ...]) -> bool:
    """Whether a network runs on an input of a shape, tried without memory for it."""
    twin = copy.deepcopy(model)
    try:
        if held is not None:
            fix_inputs(twin, held)
        with torch.no_grad():
            run_and_size_norms(twin.to("meta"), torch.zeros(1, *input_shape, device="meta"))
    except Exception:  # of any architecture's own
        return False
    sized: dict[str, Any] = dict(twin.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.weight is None and name in sized:
            module.num_features = int(sized[name].num_features)
    return True

"""Masks applied to a model: filters at zero, and still at zero after any optimiser's steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from prune_viz.network import tracing
from prune_viz.network.copies import bake_parameters, parametrise_norms, pruned_by_torch, unshare_class
from prune_viz.network.layer_kinds import count_normed, norms_channels, spread_over_weight
from prune_viz.network.packed_attention import place_of
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.utils.errors import UserError


class FilterMask(nn.Module):
    """Parametrisation that multiplies a parameter by a mask, so that no optimiser can revive a filter."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())

    def forward(self, parameter: Tensor) -> Tensor:
        """Zero what the mask removes."""
        return parameter * self.mask


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Zero the masked filters now and keep them at zero through any optimiser's steps.

    The weights and biases of masked filters, and the scale and shift of the norms they pass, are
    parametrised (`torch.nn.utils.parametrize`): the values read are always the masked ones. Parameters
    stay the same objects, so an optimiser made before goes on working. Of a plain dict only the batch norm
    right behind a filter is known; `Masks` from a run or `reconcile_masks` know those behind
    concatenations too, as DenseNet has them.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks : mapping of str to bool Tensor
        True = keep.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    UserError
        If the masks are for another model.
    """
    for module, name, mask in masked_tensors(model, masks):
        mask_tensor(module, name, mask)
    return model


def masked_tensors(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """List all that must be zero for masked filters to output zero: a module, its tensor's name, the mask.

    That is their weights and biases and the scale and shift of the norms that they pass: of those that
    `Masks.norm_channels` name, or, where they name none, of the batch norm behind each. Where a norm has
    neither, its running mean, as it would give the old one, negated (fed zeros, it stays at zero). Masks
    broadcast over the tensor.

    Raises
    ------
    UserError
        If the masks are for another model; nothing was given then.
    """
    check_masks(model, masks)
    modules: dict[str, Any] = dict(model.named_modules())
    known = masks if isinstance(masks, Masks) else Masks(masks)
    passed: dict[str, set[int]] = {}
    for norm_channel in filter(known.silences, known.norm_channels):
        norm = modules.get(norm_channel.norm)
        if not norms_channels(norm) or norm_channel.channel >= count_normed(norm):
            raise UserError(f"these masks are for another model: it has no such norm {norm_channel.norm!r}")
        passed.setdefault(norm_channel.norm, set()).add(norm_channel.channel)
    behind = {} if known.norm_channels else tracing.norms_behind(model)
    for name, mask in masks.items():
        if bool(mask.all()):
            continue
        module, prefix = place_of(modules, name)
        yield module, f"{prefix}weight", mask[:, None] if prefix else spread_over_weight(module, mask)
        if getattr(module, f"{prefix}bias") is not None:
            yield module, f"{prefix}bias", mask
        if name in behind:
            passed.setdefault(behind[name], set()).update((~mask).nonzero().ravel().tolist())
    for name, channels in passed.items():
        norm = modules[name]
        mask = torch.ones(count_normed(norm), dtype=torch.bool)
        mask[sorted(channels)] = False
        for tensor in ("running_mean",) if norm.weight is None else ("weight", "bias"):
            if getattr(norm, tensor) is not None:
                yield norm, tensor, mask


def make_permanent(model: nn.Module) -> nn.Module:
    """Turn masks that `apply_masks` or `prune_with_torch` set into zeros, under the state dict's own keys.

    Other parametrisations of the model, such as weight norm, become plain values with them.
    """
    bake_parameters(model)
    return model


def are_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether all that `apply_masks` would set to zero in `model` is at zero already."""
    for module, name, mask in masked_tensors(model, masks):
        tensor = getattr(module, name)
        if bool((tensor * ~mask.to(tensor.device)).any()):
            return False
    return True


def mask_tensor(module: nn.Module, name: str, mask: Tensor) -> None:
    """Zero what a mask removes of a module's tensor, now and whenever it is read."""
    parametrise_norms(module)
    unshare_class(module)
    tensor = getattr(module, name)
    mask = mask.to(tensor.device)
    if name in pruned_by_torch(module):
        prune_tensor(module, name, mask)
        return
    if parametrize.is_parametrized(module, name):
        for step in module.parametrizations[name]:  # type: ignore[index]
            if isinstance(step, FilterMask):
                step.mask.mul_(mask)
                return
    with torch.no_grad():
        tensor.mul_(mask)
    if isinstance(tensor, nn.Parameter) or parametrize.is_parametrized(module, name):
        parametrize.register_parametrization(module, name, FilterMask(mask))


def prune_tensor(module: nn.Module, name: str, mask: Tensor) -> None:
    """Lay a mask over a module's parameter by `torch.nn.utils.prune`."""
    tensor = getattr(module, name)
    whole = mask.to(tensor).expand_as(tensor).clone()
    prune.custom_from_mask(module, name, whole)  # type: ignore[no-untyped-call]

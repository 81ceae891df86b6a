"""Removal: what filters gave is merged into others, batch norms are set anew, and then the filters go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from prune_viz.channels.cutting import cut_channels
from prune_viz.channels.groups import CouplingGroup, Places, group_of_layer
from prune_viz.network.calls import blank_input, run_and_size_norms
from prune_viz.network.copies import free_copy, plain_copy
from prune_viz.network.layer_kinds import gather_by_inputs, spread_by_inputs
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.network.tracing import own_norms
from prune_viz.pruning.batch_norms import copy_statistics, recalibrate_norms
from prune_viz.pruning.consistency import channels_gone, groups_for_removal, reconcile_with_groups
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.runs.decisions_json import Merge
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.errors import UserError, brief


def remove_filters(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Tensor, compensate: str = "none"
) -> nn.Module:
    """Make a network smaller by the filters that masks remove.

    Parameters
    ----------
    model : nn.Module
        The network; copied, not changed.
    masks : mapping of str to bool Tensor
        True = keep. Reconciled first, so that only whole coupled channels go.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.
    compensate : {"none", "merge"}
        Whether to make up for what goes by what the masks carry (`compensate_filters`).

    Returns
    -------
    nn.Module
        The smaller network in eval mode.

    Raises
    ------
    UserError
        If the masks are for another model, merges were fitted to other weights than `model` has, or the
        architecture cannot be traced.
    """
    if compensate not in ("none", "merge"):
        raise UserError(f"--compensate is none or merge, not {compensate!r}")
    check_masks(model, masks)
    if compensate == "merge" and isinstance(masks, Masks) and not masks.origin.has_weights_of(model):
        # Trained since, perhaps: with filters masked, nothing has kept what reads them in shape.
        raise UserError(
            "the merges were fitted to other weights than this model has; analyze it as it is now, or do not "
            "compensate"
        )
    groups = groups_for_removal(model, example_inputs)
    consistent = reconcile_with_groups(model, masks, groups)
    if consistent.notes:
        warnings.warn("; ".join(consistent.notes), stacklevel=2)
    smaller = plain_copy(model)
    if compensate == "merge":
        compensate_filters(smaller, consistent, groups)
    cut_channels(smaller, groups, {group.number: channels_gone(group, consistent) for group in groups})
    try:
        with torch.no_grad():
            run_and_size_norms(smaller, blank_input(smaller, example_inputs.shape[1:]))
    except Exception as error:  # a forward pass that counts on the old sizes
        raise UserError(
            f"this architecture does not work without those filters ({brief(error)}); mask them"
        ) from None
    return smaller


def compensate_filters(model: nn.Module, masks: Masks, groups: Sequence[CouplingGroup]) -> bool:
    """Make up for what masks remove: merge it, then set batch norms anew where that helps.

    Parameters
    ----------
    model : nn.Module
        The whole network in eval mode; changed in place.
    masks : Masks
        Consistent masks, with merges and, for the batch norms, `Masks.calibration_images`.
    groups : sequence of CouplingGroup
        The model's groups.

    Returns
    -------
    bool
        Whether batch norms were set anew (`prune_viz.pruning.batch_norms.recalibrate_norms`).
    """
    if masks.calibration_images is None or not masks.removed:
        merge_filters(model, masks, groups)
        return False
    whole = plain_copy(model).float()
    merged = plain_copy(merge_filters(model, masks, groups)).float()
    if not recalibrate_norms(merged, whole, masks.calibration_images, output_kind(whole, masks)):
        return False
    copy_statistics(merged, model)
    return True


def output_kind(model: nn.Module, masks: Masks) -> OutputKind:
    """What a network returns: as the analysis took it, or as its calibration images show."""
    images = masks.calibration_images
    if masks.origin.output is not None or images is None:
        return masks.origin.output or OutputKind()
    device = next(model.parameters()).device
    return find_output_kind(model, images[:2].float().to(device))


def merge_filters(model: nn.Module, masks: Masks, groups: Sequence[CouplingGroup]) -> nn.Module:
    """Fold what removed filters contributed into the weights that read their representatives.

    The columns in the consumers of all filters that `masks` remove become zero, merged or not, so that
    masking or removing them afterwards changes nothing more.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks : Masks
        Consistent masks with their merges. A merge whose filter stays, or whose representatives do not,
        is left out.
    groups : sequence of CouplingGroup
        The model's groups.

    Returns
    -------
    nn.Module
        `model`.
    """
    norms = own_norms(model)
    modules = dict(model.named_modules())
    by_layer = group_of_layer(groups)
    merges: dict[int, list[Merge]] = {}
    for merge in masks.merges:
        if merge.layer in by_layer and merge.layer in masks:
            mask = masks[merge.layer]
            if max(merge.filter, *merge.representatives, -1) >= len(mask):
                raise UserError(f"the merges are for another model: {merge.layer} has {len(mask)} filters")
            if masks.holds(merge):
                merges.setdefault(by_layer[merge.layer].number, []).append(merge)
    for group in groups:
        gone = sorted(channels_gone(group, masks))
        if not gone:
            continue
        weights = _as_channels(group, gone, merges.get(group.number, ()))
        for consumer in group.consumers:
            norm = norms.get(consumer.module)
            _merge_into(modules[consumer.module], consumer, gone, weights, modules[norm] if norm else None)
    return model


def _as_channels(group: CouplingGroup, gone: Sequence[int], merges: Sequence[Merge]) -> Tensor:
    """Merges in a group's channels instead of a layer's filters: a row each of `gone`, over all and 1."""
    channel_of = {
        places.module: dict(zip(places.indices.tolist(), places.channels.tolist(), strict=True))
        for places in group.producers
    }
    row_of = {channel: row for row, channel in enumerate(gone)}
    weights = torch.zeros(len(gone), group.channels + 1, dtype=torch.float64)
    for merge in merges:
        row = row_of[channel_of[merge.layer][merge.filter]]
        named = [channel_of[merge.layer][index] for index in merge.representatives]
        weights[row, named] = torch.tensor(merge.coefficients, dtype=torch.float64)
        weights[row, -1] = merge.constant
    return weights


def _merge_into(
    consumer: Any, places: Places, gone: Sequence[int], weights: Tensor, norm: nn.Module | None
) -> None:
    """Fold merges into one consumer's weight, and their constants into its bias or the norm behind it."""
    # A row a channel; behind a flatten a channel lies at several columns.
    columns = torch.from_numpy(places.table(weights.shape[1] - 1))
    with torch.no_grad():
        weight: Tensor = consumer.weight.data
        inputs_first = spread_by_inputs(consumer, weight)
        nowhere = inputs_first.new_zeros(1, *inputs_first.shape[1:])
        room = torch.cat([inputs_first, nowhere])  # what is at column -1 is read by nothing
        lost = room[columns[list(gone)]].double()  # removed, columns, outputs, *taps
        share = weights.to(lost.device)
        taken = torch.einsum("rk,r...->k...", share[:, :-1], lost)
        room[columns] += taken.to(weight)
        room[columns[list(gone)]] = 0.0
        weight.copy_(gather_by_inputs(consumer, room[:-1]))
        sums = lost.movedim(2, 1).flatten(2).sum(dim=2)  # removed, outputs
        shift = share[:, -1] @ sums
        if bool(shift.abs().max() > 0):
            _add_bias(consumer, shift.to(weight), norm)


def _add_bias(consumer: Any, shift: Tensor, norm: nn.Module | None) -> None:
    """Add a constant to a layer's outputs: in its bias, or in the mean of the batch norm behind it."""
    if consumer.bias is not None:
        # A parameter of its own, as another layer may share it.
        consumer.bias = nn.Parameter(consumer.bias.detach() + shift, consumer.bias.requires_grad)
    elif isinstance(norm, _BatchNorm) and norm.running_mean is not None:
        norm.running_mean -= shift
    else:
        consumer.bias = nn.Parameter(shift)


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

"""Masks made consistent over coupling groups, so that what they remove can be taken out of a network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup, norm_channels
from prune_viz.channels.labelling import UntraceableError
from prune_viz.network.calls import does_not_run
from prune_viz.network.copies import opened, plain_copy
from prune_viz.network.layer_kinds import count_outputs, is_convolution, layers_of
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.utils.errors import UserError


def reconcile_masks(model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Tensor) -> Masks:
    """Make masks consistent over coupling groups, so that what they remove can be removed.

    A coupled channel goes only where every filter tied to it is masked out; the rest is kept.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    masks : mapping of str to bool Tensor
        True = keep; layers not named are kept whole.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.

    Returns
    -------
    Masks
        A mask for every convolution, and every linear layer whose units may go. `notes` says what was kept
        and why; a warning does too.

    Raises
    ------
    UserError
        If the masks are for another model or keep nothing of a layer.
    """
    check_masks(model, masks)
    groups = groups_for_removal(model, example_inputs)
    reconciled = reconcile_with_groups(model, masks, groups)
    if reconciled.notes:
        warnings.warn("; ".join(reconciled.notes), stacklevel=2)
    return reconciled


def groups_for_removal(model: nn.Module, example_inputs: Tensor) -> list[CouplingGroup]:
    """Coupling groups, or a `UserError` that says whether the input or the architecture is at fault."""
    try:
        with torch.no_grad():
            plain_copy(model).float()(example_inputs.float())
    except Exception as error:  # whatever an untrusted forward pass raises
        raise does_not_run(example_inputs.shape[1:], error) from None
    try:
        return find_groups(model, example_inputs)
    except UntraceableError as error:
        raise UserError(
            f"this architecture cannot be traced, so its filters can be masked but not removed: {error}"
        ) from None


def reconcile_with_groups(
    model: nn.Module, masks: Mapping[str, Tensor], groups: Sequence[CouplingGroup]
) -> Masks:
    """Make masks consistent over groups that are known already; see `reconcile_masks`."""
    reconciled = Masks()
    if isinstance(masks, Masks):
        reconciled.merges, reconciled.origin = masks.merges, masks.origin
        reconciled.images = masks.images
        reconciled.rough, reconciled.is_unfounded = masks.rough, masks.is_unfounded
    model = opened(model)
    modules = dict(model.named_modules())
    hidden = {layer for group in groups for layer in group.layers}
    for name, module in layers_of(model, hidden | masks.keys()).items():
        reconciled[name] = torch.ones(count_outputs(module), dtype=torch.bool)
    for group in groups:
        gone = channels_gone(group, masks)
        if len(gone) == group.channels:
            raise UserError(f"the masks remove every filter of {group.layers[0]}; keep at least one")
        reconciled.norm_channels += norm_channels(group.producers, group.norms, gone)
        for places in group.producers:
            removed = places.indices[[channel in gone for channel in places.channels]]
            reconciled[places.module][torch.from_numpy(removed)] = False
            wished = int((~masks[places.module]).sum()) if places.module in masks else 0
            if wished > len(removed):
                why = group.note or "filters tied to them are kept in " + ", ".join(
                    layer for layer in group.layers if layer != places.module
                )
                kept = wished - len(removed)
                reconciled.notes.append(f"{places.module}: {kept} masked filters are kept, {why}")
    grouped = {layer for group in groups for layer in group.layers}
    for name in masks:
        if name not in grouped and not bool(masks[name].all()):
            why = "it does not run" if is_convolution(modules[name]) else "they are no hidden units"
            reconciled.notes.append(f"{name}: all its filters are kept, since {why}")
    return reconciled


def channels_gone(group: CouplingGroup, masks: Mapping[str, Tensor]) -> set[int]:
    """Channels of a group of which every tied filter is masked out."""
    if not group.removable:
        return set()
    gone = set(range(group.channels))
    for places in group.producers:
        mask = masks.get(places.module)
        kept = places.channels if mask is None else places.channels[mask.cpu().numpy()[places.indices]]
        gone -= set(kept.tolist())
    return gone

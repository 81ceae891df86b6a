"""Removal: what filters gave is made up for, and then they are cut out of a copy of the network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prune_viz.channels.cutting import cut_channels
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.calls import blank_input, run_and_size_norms
from prune_viz.network.copies import plain_copy
from prune_viz.pruning.compensation import Compensation, compensate_filters
from prune_viz.pruning.consistency import channels_gone, groups_for_removal, reconcile_with_groups
from prune_viz.pruning.masks import Masks, check_masks
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
    return remove_and_compensate(model, masks, example_inputs, compensate)[0]


def remove_and_compensate(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_inputs: Tensor,
    compensate: str = "none",
    groups: Sequence[CouplingGroup] | None = None,
) -> tuple[nn.Module, Compensation]:
    """Remove filters, and say how that was made up for; arguments and errors are `remove_filters`'.

    The model's coupling groups are found where they are not given.
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
    if groups is None:
        groups = groups_for_removal(model, example_inputs)
    consistent = reconcile_with_groups(model, masks, groups)
    if consistent.notes:
        warnings.warn("; ".join(consistent.notes), stacklevel=2)
    smaller = plain_copy(model)
    done = compensate_filters(smaller, consistent, groups) if compensate == "merge" else Compensation()
    cut_channels(smaller, groups, {group.number: channels_gone(group, consistent) for group in groups})
    try:
        with torch.no_grad():
            run_and_size_norms(smaller, blank_input(smaller, example_inputs.shape[1:]))
    except Exception as error:  # a forward pass that counts on the old sizes
        raise UserError(
            f"this architecture does not work without those filters ({brief(error)}); mask them"
        ) from None
    return smaller, done


def compensated(model: nn.Module, masks: Masks, example_inputs: Tensor) -> nn.Module:
    """A copy of a network that puts out what it does without its masked filters, at its full size.

    Parameters
    ----------
    model : nn.Module
        The network; left unchanged.
    masks : Masks
        Consistent masks, with what makes up for them (`compensate_filters`).
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.
    """
    twin = plain_copy(model)
    compensate_filters(twin, masks, groups_for_removal(model, example_inputs))
    return twin

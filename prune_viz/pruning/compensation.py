"""What makes up for removed filters: merging, where it is measured to help, and batch norms set anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.copies import plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.network.tracing import own_norms
from prune_viz.pruning.batch_norms import copy_statistics, recalibrate_norms
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import OutputMeter, affordable, meter_on
from prune_viz.pruning.merging import GroupRemoval, Merger, merge_removals, removals_of
from prune_viz.runs.output_kind import OutputKind

ROUGH_MARGIN = 2.0  # by which merging must be better where measurements are rough
_NOTHING = 1e-7  # a change of the output by merging everything, below which no group is tried alone


@dataclass(frozen=True)
class Compensation:
    """What was made up for.

    Attributes
    ----------
    merged : tuple of str
        A layer of each group of which something is merged.
    unmerged : tuple of str
        A layer of each group in which nothing takes the place of what goes, as that was measured to be
        better than its merges.
    norms : bool
        Whether batch norms were set anew.
    """

    merged: tuple[str, ...] = ()
    unmerged: tuple[str, ...] = ()
    norms: bool = False


def compensate_filters(
    model: nn.Module, masks: Masks, groups: Sequence[CouplingGroup], meter: OutputMeter | None = None
) -> Compensation:
    """Make up for what masks remove: merge it, then set batch norms anew, each where that helps.

    Whether it helps is measured on `RunImages.kept_out`, images that nothing was fitted to: for each group
    alone, and then for all together, with norms set anew, as much that merging disturbs is put right by them.
    Without such images everything is merged.

    Parameters
    ----------
    model : nn.Module
        The whole network in eval mode; changed in place.
    masks : Masks
        Consistent masks, with merges and `Masks.images`.
    groups : sequence of CouplingGroup
        The model's groups.
    meter : OutputMeter, optional
        Measures the network, in single precision, on such images; made where it is not given.

    Returns
    -------
    Compensation
    """
    removals = removals_of(masks, groups)
    whole, behind = plain_copy(model).float(), own_norms(model)
    if meter is None and removals:
        meter = meter_for(whole, masks, passes=2 * len(removals) + 10)
    if meter is None:
        merge_removals(model, groups, removals, behind)
        return _described(groups, removals, removals)
    margin = ROUGH_MARGIN if masks.is_unfounded else 1.0
    fitted, tried = masks.images.fitted, []
    for chosen, times in _candidates(whole, groups, removals, behind, meter, margin):
        merged = merge_removals(plain_copy(whole), groups, chosen, behind)
        norms = fitted is not None and recalibrate_norms(merged, whole, fitted, meter)
        tried.append((times * meter.change(merged), norms, chosen, merged))
    _, norms, chosen, merged = min(tried, key=lambda one: one[0])
    merge_removals(model, groups, chosen, behind)
    if norms:
        copy_statistics(merged, model)
    return replace(_described(groups, removals, chosen), norms=norms)


def meter_for(whole: nn.Module, masks: Masks, passes: int = 2) -> OutputMeter | None:
    """A meter on as many of the masks' images that no fit saw as so many passes can afford.

    None without any, where the network does not run on them, or where that would take too long.
    """
    images = masks.images.kept_out
    if images is None:
        return None
    try:
        macs = count_cost(whole, images.shape[1:])[1]
    except Exception:  # whatever an untrusted forward pass raises on images that are not its own
        return None
    return meter_on(whole, affordable(images, macs, images.shape[2:], passes), output_kind(whole, masks))


def output_kind(model: nn.Module, masks: Masks) -> OutputKind:
    """What a network returns: as the analysis took it, or as the masks' images show."""
    images = masks.images.kept_out
    if masks.origin.output is not None or images is None:
        return masks.origin.output or OutputKind()
    device = next(model.parameters()).device
    try:
        return find_output_kind(model, images[:2].float().to(device))
    except Exception:  # whatever an untrusted forward pass raises on images that are not its own
        return OutputKind()


def _candidates(
    whole: nn.Module,
    groups: Sequence[CouplingGroup],
    removals: Mapping[int, GroupRemoval],
    behind: Mapping[str, str],
    meter: OutputMeter,
    margin: float,
) -> list[tuple[Mapping[int, GroupRemoval], float]]:
    """The removals merged everywhere, nowhere, and where that moves the output less, by a group alone.

    Less by a factor of `margin`, so that merging does not rest on measurements that may be off by as much;
    beside each is by what its change is to be multiplied before they are compared.
    """
    unmerged = {number: removal.unmerged() for number, removal in removals.items()}
    if not any(removal.is_merged for removal in removals.values()):
        return [(removals, 1.0)]
    if meter.change(merge_removals(plain_copy(whole), groups, removals, behind)) <= _NOTHING:
        return [(removals, 1.0)]
    trial = plain_copy(whole)
    merger = Merger(trial, behind)
    mixed = {}
    for group in groups:
        if group.number not in removals:
            continue
        mixed[group.number] = removals[group.number]
        if not removals[group.number].is_merged:
            continue
        found = []
        for removal in (removals[group.number], unmerged[group.number]):
            with merger.on_trial(group, removal):
                found.append(meter.change(trial))
        if found[1] < margin * found[0]:
            mixed[group.number] = unmerged[group.number]
    options: list[tuple[Mapping[int, GroupRemoval], float]] = [(removals, margin), (unmerged, 1.0)]
    if any(mixed[number].is_merged != removal.is_merged for number, removal in removals.items()):
        options.append((mixed, 1.0))
    return options


def _described(
    groups: Sequence[CouplingGroup],
    removals: Mapping[int, GroupRemoval],
    chosen: Mapping[int, GroupRemoval],
) -> Compensation:
    layer = {group.number: group.layers[0] for group in groups}
    merged = tuple(layer[number] for number, removal in chosen.items() if removal.is_merged)
    unmerged = tuple(
        layer[number]
        for number, removal in removals.items()
        if removal.is_merged and not chosen[number].is_merged
    )
    return Compensation(merged, unmerged)

"""What makes up for removed filters: merging, where it is measured to help, and batch norms set anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.copies import plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.network.output_kinds import find_output_kind
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
    alone, and then for all together. Without such images everything is merged.

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
    whole = plain_copy(model).float()
    if meter is None and removals:
        meter = meter_for(whole, masks, passes=2 * len(removals) + 3)
    margin = ROUGH_MARGIN if masks.is_unfounded else 1.0
    chosen = removals if meter is None else _where_it_helps(whole, groups, removals, meter, margin)
    merge_removals(model, groups, chosen)
    done = _described(groups, removals, chosen)
    fitted = masks.images.fitted
    if meter is None or fitted is None:
        return done
    merged = plain_copy(model).float()
    if not recalibrate_norms(merged, whole, fitted, meter):
        return done
    copy_statistics(merged, model)
    return replace(done, norms=True)


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


def _where_it_helps(
    whole: nn.Module,
    groups: Sequence[CouplingGroup],
    removals: Mapping[int, GroupRemoval],
    meter: OutputMeter,
    margin: float,
) -> Mapping[int, GroupRemoval]:
    """The removals, merged in those groups where that moves the output less than nothing in their place.

    Less by a factor of `margin`, so that merging does not rest on measurements that may be off by as much.
    """
    unmerged = {number: removal.unmerged() for number, removal in removals.items()}

    def change(chosen: Mapping[int, GroupRemoval]) -> float:
        return meter.change(merge_removals(plain_copy(whole), groups, chosen))

    all_merged = change(removals)
    if all_merged <= _NOTHING or not any(removal.is_merged for removal in removals.values()):
        return removals
    trial = plain_copy(whole)
    merger = Merger(trial)
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
    options = [(margin * all_merged, removals), (change(unmerged), unmerged)]
    if any(mixed[number].is_merged != removal.is_merged for number, removal in removals.items()):
        options.append((change(mixed), mixed))
    return min(options, key=lambda option: option[0])[1]


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

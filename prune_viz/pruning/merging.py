"""Merging: what removed filters contributed is folded into the weights that read their representatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.channels.groups import CouplingGroup, Places, group_of_layer
from prune_viz.network.layer_kinds import gather_by_inputs, spread_by_inputs
from prune_viz.network.tracing import own_norms
from prune_viz.pruning.consistency import channels_gone
from prune_viz.pruning.masks import Masks
from prune_viz.runs.decisions_json import Merge
from prune_viz.utils.errors import UserError


@dataclass(frozen=True)
class GroupRemoval:
    """What of a coupling group goes, and what takes its place.

    Attributes
    ----------
    gone : tuple of int
        Channels that go.
    weights : Tensor, shape (len(gone), channels + 1)
        What rebuilds each: weights over the group's channels and a constant; zeros for nothing in its place.
    """

    gone: tuple[int, ...]
    weights: Tensor

    @property
    def is_merged(self) -> bool:
        """Whether anything takes the place of what goes."""
        return bool(self.weights.any())

    def unmerged(self) -> GroupRemoval:
        """The same channels with nothing in their place."""
        return GroupRemoval(self.gone, torch.zeros_like(self.weights))


def removals_of(masks: Masks, groups: Sequence[CouplingGroup]) -> dict[int, GroupRemoval]:
    """What masks remove of each group, by its number, and the merges that hold for it.

    Parameters
    ----------
    masks : Masks
        Consistent masks with their merges. A merge whose filter stays, or whose representatives do not,
        is left out.
    groups : sequence of CouplingGroup
        The model's groups.

    Raises
    ------
    UserError
        If the merges are for another model.
    """
    by_layer = group_of_layer(groups)
    merges: dict[int, list[Merge]] = {}
    for merge in masks.merges:
        if merge.layer in by_layer and merge.layer in masks:
            mask = masks[merge.layer]
            if max(merge.filter, *merge.representatives, -1) >= len(mask):
                raise UserError(f"the merges are for another model: {merge.layer} has {len(mask)} filters")
            if masks.holds(merge):
                merges.setdefault(by_layer[merge.layer].number, []).append(merge)
    removals = {}
    for group in groups:
        gone = sorted(channels_gone(group, masks))
        if gone:
            weights = _as_channels(group, gone, merges.get(group.number, ()))
            removals[group.number] = GroupRemoval(tuple(gone), weights)
    return removals


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


class Merger:
    """Folds what goes of coupling groups into the weights that read the rest.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    norms : mapping of str to str
        The batch norm behind each layer, from `prune_viz.network.tracing.own_norms`.
    """

    def __init__(self, model: nn.Module, norms: Mapping[str, str]) -> None:
        self._norms = norms
        self._modules: dict[str, Any] = dict(model.named_modules())

    def merge(self, group: CouplingGroup, removal: GroupRemoval) -> None:
        """Merge what goes of one group.

        The columns in its consumers become zero, so that masking or removing the filters changes no more.
        """
        for places in group.consumers:
            norm = self._norms.get(places.module)
            _merge_into(
                self._modules[places.module], places, removal.gone, removal.weights,
                self._modules[norm] if norm else None,
            )  # fmt: skip

    @contextmanager
    def on_trial(self, group: CouplingGroup, removal: GroupRemoval) -> Iterator[None]:
        """Merge what goes of one group, and set all as it was afterwards."""
        consumers = [self._modules[places.module] for places in group.consumers]
        weights = [consumer.weight.data.clone() for consumer in consumers]
        biases = [consumer.bias for consumer in consumers]
        named = [self._norms.get(places.module) for places in group.consumers]
        means = {
            name: self._modules[name].running_mean.clone()
            for name in named
            if name is not None and getattr(self._modules[name], "running_mean", None) is not None
        }
        try:
            self.merge(group, removal)
            yield
        finally:
            for consumer, weight, bias in zip(consumers, weights, biases, strict=True):
                consumer.weight.data.copy_(weight)
                consumer.bias = bias
            for name, mean in means.items():
                self._modules[name].running_mean.copy_(mean)


def merge_filters(model: nn.Module, masks: Masks, groups: Sequence[CouplingGroup]) -> nn.Module:
    """Fold what removed filters contributed into the weights that read their representatives.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks, groups
        As `removals_of`.

    Returns
    -------
    nn.Module
        `model`.
    """
    return merge_removals(model, groups, removals_of(masks, groups), own_norms(model))


def merge_removals(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    removals: Mapping[int, GroupRemoval],
    norms: Mapping[str, str],
) -> nn.Module:
    """Merge what goes of several groups, by their numbers; the model is changed in place and returned."""
    merger = Merger(model, norms)
    for group in groups:
        if group.number in removals:
            merger.merge(group, removals[group.number])
    return model


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

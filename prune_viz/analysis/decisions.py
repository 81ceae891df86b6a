"""From a group's verdicts to masks and `decisions.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from prune_viz.channels.groups import CouplingGroup, Places, norm_channels
from prune_viz.network.layer_kinds import count_inputs
from prune_viz.pruning.masks import Masks, beside_masks
from prune_viz.redundancy.channel_verdicts import ChannelVerdict, GroupVerdicts
from prune_viz.redundancy.judge import TOLERANCE
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.decisions_json import (
    ConsumerRecord,
    Decisions,
    GroupRecord,
    Merge,
    NormRecord,
    ProducerRecord,
    RemovalOrder,
    VerdictRecord,
)
from prune_viz.runs.fingerprint import Origin
from prune_viz.runs.verdicts import FLAGGED, Verdict


def masks_of(
    table: pd.DataFrame,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    filters: Mapping[str, int],
    origin: Origin,
    unit: Unit,
) -> Masks:
    """Masks of every layer from the rows' verdicts, with the merges that make up for them."""
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in filters.items()}
    flagged = table[table["verdict"].isin(FLAGGED)]
    for name, rows in flagged.groupby("layer", sort=False):
        masks[str(name)][torch.from_numpy(rows["filter"].to_numpy().copy())] = False
    merges, damage = [], 0.0
    gone: dict[int, set[int]] = {}
    for group in groups:
        for found in verdicts[group.number].channels:
            if found.verdict.flagged:
                gone.setdefault(group.number, set()).add(found.channel)
                damage += 0.0 if np.isnan(found.damage) else found.damage
                merges += _merge(group, found)
    passed = [
        norm_channel
        for group in groups
        for norm_channel in norm_channels(group.producers, group.norms, gone.get(group.number, set()))
    ]
    return Masks(masks, tuple(merges), origin, predicted=Damage(damage, unit), norm_channels=passed)


def _merge(group: CouplingGroup, found: ChannelVerdict) -> list[Merge]:
    """How a flagged channel is rebuilt, in filters of a layer that has it and all its representatives."""
    for places in group.producers:
        own, *others = places.table(group.channels)[[found.channel, *found.representatives], 0].tolist()
        if min(own, *others, own) >= 0:
            return [Merge(places.module, own, tuple(others), tuple(found.coefficients), found.constant)]
    return []


def decisions_of(
    table: pd.DataFrame,
    groups: Sequence[CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    masks: Masks,
    modules: Mapping[str, Any],
    macs: Mapping[str, int],
    unit: Unit,
) -> Decisions:
    """What `decisions.json` holds: groups, flagged filters with their evidence, removal order, merges.

    Parameters
    ----------
    table : DataFrame
        The rows of `filters.csv`.
    groups : sequence of CouplingGroup
        The network's groups.
    verdicts : mapping of int to GroupVerdicts
        By the group's number.
    masks : Masks
        What the verdicts remove.
    modules : mapping of str to Module
        The network's modules, for how much each reads.
    macs : mapping of str to int
        Multiply-accumulates of each module.
    unit : Unit
        Of the damage, but for that of merging all that is flagged in a group (`GroupVerdicts`).
    """
    in_group = {layer: group for group in groups for layer in group.layers}
    flagged = []
    for row in table[table["verdict"].isin(FLAGGED)].to_dict("records"):
        entry: dict[str, Any] = {"layer": row["layer"], "filter": row["filter"]}
        entry["verdict"] = Verdict(row["verdict"])
        entry["representatives"] = tuple(int(part) for part in row["representative"].split(";") if part)
        group = in_group.get(row["layer"])
        if group is not None:
            places = next(p for p in group.producers if p.module == row["layer"])
            channel = int(places.channels[places.indices == row["filter"]][0])
            found = verdicts[group.number].channels[channel]
            entry.update(kind=found.kind, coefficients=tuple(found.coefficients), constant=found.constant)
        entry.update({name: row[name] for name in ("score", "damage", "reason")})
        flagged.append(VerdictRecord(**entry))
    return Decisions(
        **vars(beside_masks(masks)),
        tolerance=TOLERANCE,
        damage_unit=unit,
        filters={name: len(mask) for name, mask in masks.items()},
        macs=dict(macs),
        groups=tuple(_group_record(group, verdicts[group.number], modules) for group in groups),
        verdicts=tuple(flagged),
        removal_order=tuple(
            RemovalOrder(
                group.number,
                tuple(verdicts[group.number].order),
                tuple(float(f"{damage:.4g}") for damage in verdicts[group.number].order_damage),
            )
            for group in groups
        ),
    )


def _group_record(group: CouplingGroup, verdicts: GroupVerdicts, modules: Mapping[str, Any]) -> GroupRecord:
    """A coupling group as `decisions.json` holds it."""

    def listed(places: Places) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        return places.module, tuple(places.indices.tolist()), tuple(places.channels.tolist())

    return GroupRecord(
        id=group.number,
        layers=tuple(group.layers),
        consumers=tuple(places.module for places in group.consumers),
        producers=tuple(ProducerRecord(*listed(places)) for places in group.producers),
        norms=tuple(NormRecord(*listed(places)) for places in group.norms),
        reads=tuple(
            ConsumerRecord(places.module, len(places.indices) / count_inputs(modules[places.module]))
            for places in group.consumers
        ),
        channels=group.channels,
        removable=group.removable,
        note=group.note,
        consumers_damage=verdicts.damage,
    )

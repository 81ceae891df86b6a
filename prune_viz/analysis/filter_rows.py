"""Rows of `filters.csv`: every filter with its verdict, and the reason for it in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from prune_viz.channels.groups import CouplingGroup
from prune_viz.embedding.layer_map import Embedding
from prune_viz.network.layers import Layer
from prune_viz.redundancy.channel_verdicts import ChannelVerdict, GroupVerdicts
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.filters_csv import FILTER_COLUMNS
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.runs.verdicts import Verdict


def filter_rows(
    layer: Layer,
    tensors: LayerTensors,
    embedding: Embedding,
    places: np.ndarray,
    group: CouplingGroup | None,
    verdicts: Mapping[int, GroupVerdicts],
    judged: set[str],
    unjudged: str = "",
) -> pd.DataFrame:
    """A layer's rows of `filters.csv`.

    Parameters
    ----------
    layer : Layer
        The layer.
    tensors : LayerTensors
        Its stimuli and responses.
    embedding : Embedding
        Its map and clusters.
    places : ndarray, shape (F, 2)
        Its filters on the map of the network.
    group : CouplingGroup or None
        The group that ties its filters; None if groups could not be found.
    verdicts : mapping of int to GroupVerdicts
        By the group's number.
    judged : set of str
        Names of the layers that this run analysed.
    unjudged : str
        Why no group is judged, though some could be; empty where they are.
    """
    rows = []
    written = (
        next((p for p in group.producers if p.module == layer.name), None) if group is not None else None
    )
    channel_of: dict[int, int] = {}
    if written is not None and group is not None:
        channel_of = dict(zip(written.indices.tolist(), written.channels.tolist(), strict=True))
        filters_at = written.table(group.channels)
    for index in range(layer.filters):
        activation = float(tensors.activations[index])
        if group is None:
            silent = not unjudged and activation == 0 and float(tensors.responses[:, index].max()) == 0
            verdict = Verdict.DEAD if silent else Verdict.UNJUDGED
            score = damage = float("nan")
            representatives: list[int] = []
            reason = (
                f"Silent: its own stimulus and {len(tensors.responses) - 1} others leave its feature map at "
                "zero."
                if silent
                else f"Not judged: {unjudged or 'what reads it could not be traced'}."
            )
        else:
            found = verdicts[group.number].channels[channel_of[index]]
            verdict, score, damage = found.verdict, found.score, found.damage
            if verdict is Verdict.KEEP and np.isnan(damage) and group.removable:
                verdict = Verdict.UNJUDGED
            place = filters_at[channel_of[index]].tolist().index(index)  # of several filters of a channel
            others = filters_at[found.representatives, place]
            representatives = others[others >= 0].tolist()
            unit = verdicts[group.number].unit
            reason = explain(found, representatives, group, layer.name, activation, judged, unit)
            if unjudged and verdict is Verdict.UNJUDGED:
                reason = f"Not judged: {unjudged}."
        rows.append(
            (
                layer.name, index, verdict.value, ";".join(map(str, representatives)), score,
                int(embedding.clusters[index]), *embedding.positions[index], activation, damage, reason,
                *places[index],
            )
        )  # fmt: skip
    return pd.DataFrame(rows, columns=FILTER_COLUMNS)


def filter_table(
    layers: Sequence[Layer],
    found: Mapping[str, LayerTensors],
    embeddings: Mapping[str, Embedding],
    places: Mapping[str, np.ndarray],
    tied: Mapping[str, CouplingGroup],
    verdicts: Mapping[int, GroupVerdicts],
    unjudged: str = "",
) -> pd.DataFrame:
    """The whole of `filters.csv`: `filter_rows` of every layer, each layer's share looked up by its name."""
    judged = set(found)
    tables = [
        filter_rows(
            layer, found[layer.name], embeddings[layer.name], places[layer.name], tied.get(layer.name),
            verdicts, judged, unjudged,
        )
        for layer in layers
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def explain(
    verdict: ChannelVerdict,
    representatives: Sequence[int],
    group: CouplingGroup,
    layer: str,
    activation: float,
    judged: set[str],
    unit: Unit,
) -> str:
    """Say in a sentence why a filter has its verdict."""
    tied = [name for name in group.layers if name != layer]
    channel = "it" if not tied else "the channel that ties it to " + " and ".join(tied)
    cost = _cost(Damage(verdict.damage, unit))
    if verdict.kind == "silent":
        if activation > 0:
            return (
                f"Silent: {channel} never fires where it is read, on its own stimulus or any other "
                "calibration image."
            )
        return "Silent: its own stimulus and every other calibration image leave its feature map at zero."
    if verdict.kind == "unread":
        return "Unread: every weight that reads it is zero."
    if verdict.kind == "unreached":
        return (
            "Unread: what reads it does not reach the network's output, which depends on it on none of the "
            "calibration images."
        )
    if verdict.kind == "constant":
        return (
            f"Constant: its output is the same on every input, so {verdict.constant:.3g} in the bias of "
            f"what reads it takes its place; removing it {cost}."
        )
    if verdict.verdict is Verdict.REDUNDANT:
        mix = _mix(representatives, verdict.coefficients)
        return (
            f"Redundant: {mix} reconstructs {_percent(verdict.score)} of it on calibration images kept "
            f"out of the fit; removing it {cost}."
        )
    if group.note:
        return f"Kept: {group.note}."
    if np.isnan(verdict.damage):
        missing = [name for name in group.layers if name not in judged]
        if missing:
            return f"Not judged: it is tied to {', '.join(missing)}, which this run did not analyse."
        return "Not judged: the output of the layers that read it never varies."
    rebuilt = f"all others together reconstruct {_percent(verdict.score)} of it"
    silent = "" if verdict.fires else " It never fires on the inputs of --data, which is no proof."
    return f"Kept: {rebuilt}; removing it with nothing in its place {cost}.{silent}"


def _cost(damage: Damage) -> str:
    """What removal does, after the word "it"."""
    if np.isnan(damage.value):
        return "has a cost that could not be measured"
    if damage.unit is Unit.CONSUMERS:
        return f"costs {damage}"
    return f"changes the network's output by {damage.text()}"


def _mix(filters: Sequence[int], coefficients: Sequence[float]) -> str:
    """A weighted sum of filters, such as ``0.5 x filter 3 - 0.2 x filter 7``."""
    terms = (f"{weight:.3g} x filter {index}" for index, weight in zip(filters, coefficients, strict=True))
    return " + ".join(terms).replace("+ -", "- ")


def _percent(share: float) -> str:
    percent = 100 * share
    if percent >= 99.995:
        return "100%"
    if percent >= 99:
        return f"{percent:.2f}%"
    return f"{percent:.3g}%" if percent >= 1e-3 else "under 0.001%"

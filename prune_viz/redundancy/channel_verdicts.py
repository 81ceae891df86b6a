"""Verdicts on the channels of a coupling group, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prune_viz.channels.groups import CouplingGroup
from prune_viz.runs.damage import Unit
from prune_viz.runs.verdicts import Verdict


@dataclass(frozen=True)
class ChannelVerdict:
    """The verdict on one channel of a coupling group.

    Attributes
    ----------
    channel : int
        Which channel.
    verdict : Verdict
        What to do.
    kind : {"", "silent", "constant", "unread", "unreached"}
        How a dead one is dead; unreached, where what reads it does not reach the network's output.
    representatives : list of int
        Kept channels that rebuild it, the one that contributes most first.
    coefficients : list of float
        Their weights.
    constant : float
        What is added.
    score : float
        Share of the channel's variance that others rebuild, held out, 0 to 1; NaN if not judged.
    damage : float
        What removing it costs, a flagged channel rebuilt from its representatives, a kept one with nothing
        in its place: a share of the consumers' output variance, or, once ranked by the output's sensitivity,
        nats of divergence of the network's output; NaN if not judged.
    fires : bool
        False where it gave nothing on any of the user's own images.
    """

    channel: int
    verdict: Verdict
    kind: str
    representatives: list[int]
    coefficients: list[float]
    constant: float
    score: float
    damage: float
    fires: bool = True

    def weights(self, size: int) -> np.ndarray:
        """What rebuilds a flagged channel: weights over its group's channels and a constant, (size,)."""
        weights = np.zeros(size)
        weights[self.representatives] = self.coefficients
        weights[-1] = self.constant
        return weights


@dataclass(frozen=True)
class GroupVerdicts:
    """What was found in a coupling group.

    Attributes
    ----------
    group : int
        The group's number.
    channels : list of ChannelVerdict
        A verdict a channel, in order.
    order : list of int
        Channels in the order in which to remove them: flagged ones, and then the least missed first.
    order_damage : list of float
        Predicted damage of having removed that channel and all before it.
    damage : float
        Predicted damage of removing all flagged channels with merging, held out; a share of the consumers'
        output variance.
    unit : Unit
        Of all other damages: a share of the consumers' output variance, divergence of the network's output,
        or its squared change as a share of its square.
    """

    group: int
    channels: list[ChannelVerdict]
    order: list[int]
    order_damage: list[float]
    damage: float
    unit: Unit = Unit.CONSUMERS

    @property
    def flagged(self) -> list[int]:
        """Channels that are redundant or dead."""
        return [one.channel for one in self.channels if one.verdict.flagged]


def keep_channel(channel: int, score: float, damage: float) -> ChannelVerdict:
    """The verdict on a channel that is kept, with what others rebuild of it and what its removal costs."""
    return ChannelVerdict(channel, Verdict.KEEP, "", [], [], 0.0, score, damage)


def dead_channel(channel: int, kind: str) -> ChannelVerdict:
    """The verdict on a channel that is dead and that nothing need make up for."""
    return ChannelVerdict(channel, Verdict.DEAD, kind, [], [], 0.0, 1.0, 0.0)


def keep_whole_group(group: CouplingGroup) -> GroupVerdicts:
    """Verdicts for a group that cannot be judged: everything is kept."""
    nan = float("nan")
    kept = [keep_channel(index, nan, nan) for index in range(group.channels)]
    return GroupVerdicts(group.number, kept, [], [], 0.0)


def keep_each_layer(group: CouplingGroup, verdicts: GroupVerdicts) -> GroupVerdicts:
    """Verdicts and a removal order that leave a filter of every layer, where layers write parts of a group.

    Parameters
    ----------
    group : CouplingGroup
        The group.
    verdicts : GroupVerdicts
        What was found in it.
    """
    channels, ranked = list(verdicts.channels), list(zip(verdicts.order, verdicts.order_damage, strict=True))
    for places in group.producers:
        own = set(places.channels.tolist())
        if all(channels[channel].verdict.flagged for channel in own):
            place = {channel: step for step, (channel, _) in enumerate(ranked)}
            last = max(own, key=lambda one: (np.nan_to_num(channels[one].damage), place.get(one, len(place))))
            channels[last] = keep_channel(last, channels[last].score, channels[last].damage)
            ranked = [one for one in ranked if one[0] != last]
        ends = [place for place, (channel, _) in enumerate(ranked) if channel in own]
        if len(ends) == len(own):
            ranked = ranked[: ends[-1]]
    return replace(
        verdicts,
        channels=channels,
        order=[channel for channel, _ in ranked],
        order_damage=[damage for _, damage in ranked],
    )

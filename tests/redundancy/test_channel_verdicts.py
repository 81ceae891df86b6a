"""Verdicts of a group whose layers write parts of it."""

from __future__ import annotations

import numpy as np

from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.redundancy.channel_verdicts import ChannelVerdict, GroupVerdicts, keep_each_layer
from prune_viz.runs.verdicts import Verdict


def _group() -> CouplingGroup:
    """Two layers side by side, added to a third."""
    left = Places("left", np.arange(2), np.arange(2))
    right, both = Places("right", np.arange(3), 2 + np.arange(3)), Places("both", np.arange(5), np.arange(5))
    return CouplingGroup(0, 5, [left, right, both], [Places("reads", np.arange(5), np.arange(5))])


def _verdicts(*flagged: int, order: list[int]) -> GroupVerdicts:
    channels = [
        ChannelVerdict(
            channel, Verdict.DEAD if channel in flagged else Verdict.KEEP, "", [], [], 0.0, 1.0, channel / 10
        )
        for channel in range(5)
    ]
    return GroupVerdicts(0, channels, order, [0.1 * place for place in range(len(order))], 0.0)


def test_a_layer_of_dead_filters_keeps_the_dearest() -> None:
    found = keep_each_layer(_group(), _verdicts(0, 1, 3, order=[]))
    assert [one.verdict.flagged for one in found.channels] == [True, False, False, True, False]


def test_order_ends_before_a_layer_is_empty() -> None:
    found = keep_each_layer(_group(), _verdicts(order=[3, 1, 4, 0]))
    assert found.order == [3, 1, 4]
    assert len(found.order_damage) == 3
    whole = _verdicts(0, order=[3, 1, 4])
    assert keep_each_layer(_group(), whole) == whole

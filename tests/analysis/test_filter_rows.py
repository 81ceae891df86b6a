from __future__ import annotations

import numpy as np

from prune_viz.analysis.filter_rows import explain
from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.redundancy.channel_verdicts import ChannelVerdict
from prune_viz.runs.damage import Unit
from prune_viz.runs.verdicts import Verdict


def _group(*layers: str) -> CouplingGroup:
    places = [Places(layer, np.arange(8), np.arange(8)) for layer in layers]
    return CouplingGroup(0, 8, places, [Places("consumer", np.arange(8), np.arange(8))])


def test_reason_of_a_redundant_filter_is_a_sum_with_signs() -> None:
    found = ChannelVerdict(3, Verdict.REDUNDANT, "", [5, 1, 2], [0.5, -0.25, 1.0], 0.0, 0.98, 0.0004)
    said = explain(found, [5, 1, 2], _group("conv"), "conv", 1.0, {"conv"}, Unit.NATS)
    assert said == (
        "Redundant: 0.5 x filter 5 - 0.25 x filter 1 + 1 x filter 2 reconstructs 98% of it on calibration "
        "images kept out of the fit; removing it changes the network's output by 0.0004 nats."
    )
    turned = ChannelVerdict(3, Verdict.REDUNDANT, "", [5], [-2.0], 0.0, 1.0, 0.0)
    assert explain(turned, [5], _group("conv"), "conv", 1.0, {"conv"}, Unit.NATS).startswith(
        "Redundant: -2 x filter 5 reconstructs 100%"
    )


def test_silent_consumer_input_is_named_in_the_reason() -> None:
    silent = ChannelVerdict(3, Verdict.DEAD, "silent", [], [], 0.0, 1.0, 0.0)
    alone = explain(silent, [], _group("conv"), "conv", 1.0, {"conv"}, Unit.NATS)
    tied = explain(silent, [], _group("conv", "other"), "conv", 1.0, {"conv", "other"}, Unit.NATS)
    ending = "never fires where it is read, on its own stimulus or any other calibration image."
    assert alone == f"Silent: it {ending}"
    assert tied == f"Silent: the channel that ties it to other {ending}"

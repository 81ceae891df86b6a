"""Channels of several filters, read several times or in groups: a copy is found, and merged exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import randomise_norms
from reported_networks import REPORTED
from torch import Tensor, nn

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup, Places, group_of_layer
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.redundancy.gram_matrices import gather_gram_matrices
from prune_viz.redundancy.judge import judge
from prune_viz.runs.decisions_json import Merge
from prune_viz.runs.verdicts import Verdict

COPY, ORIGINAL, SCALE = 3, 1, 0.5


def _plant(model: nn.Module, group: CouplingGroup, scale: float) -> None:
    """Make all filters of one channel those of another, the last ones before the consumers scaled."""
    modules: dict[str, Any] = dict(model.named_modules())

    def copied(places: Places, tensor: Tensor) -> None:
        table = torch.from_numpy(places.table(group.channels))
        tensor[table[COPY]] = scale * tensor[table[ORIGINAL]]

    with torch.no_grad():
        for places in group.producers:
            modules[places.module].bias += 1.0  # so that each of them fires
            copied(places, modules[places.module].weight)
            copied(places, modules[places.module].bias)


@pytest.mark.parametrize(
    ("name", "layer", "consumer"),
    [
        ("halves and SPPF", "sppf1", "sppf2"),  # read four times by one layer
        ("pixel shuffle", "first", "second"),  # four filters at one map
        ("shuffle", "first", "between.one"),  # a filter in each group of the consumer
    ],
)
def test_copy_of_a_unit_merges_exactly(name: str, layer: str, consumer: str) -> None:
    model = randomise_norms(copy.deepcopy(REPORTED[name][0]))
    inputs = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    group = group_of_layer(find_groups(model, inputs[:1]))[layer]
    _plant(model, group, SCALE)
    whole = model(inputs)
    assert [places.module for places in group.consumers] == [consumer]
    batches = [(inputs[:24], False), (inputs[24:], True)]
    gram_matrices = gather_gram_matrices(model, [group], lambda: batches)[group.number]
    found = judge(group, gram_matrices).channels
    flagged = [one for one in found if one.verdict is Verdict.REDUNDANT]
    assert len(flagged) == 1
    assert {flagged[0].channel, *flagged[0].representatives} == {COPY, ORIGINAL}
    places = group.producers[0]
    table = places.table(group.channels)
    mask = torch.ones(len(places.indices), dtype=torch.bool)
    mask[table[flagged[0].channel]] = False
    merge = Merge(
        places.module,
        int(table[flagged[0].channel, 0]),
        tuple(table[flagged[0].representatives, 0].tolist()),
        tuple(flagged[0].coefficients),
        flagged[0].constant,
    )
    smaller = remove_filters(model, Masks({layer: mask}, (merge,)), inputs[:1], compensate="merge")
    torch.testing.assert_close(smaller(inputs), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    plain = remove_filters(model, {layer: mask}, inputs[:1])
    assert (plain(inputs) - whole).abs().max() > 20 * (smaller(inputs) - whole).abs().max()

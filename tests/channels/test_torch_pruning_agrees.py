"""The channel graph beside Torch-Pruning's dependency graph, on networks that both can follow."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from marks import slow
from networks import Concatenating, Dense, Flattening, Plain, Residual
from torch import nn

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.layer_kinds import is_convolution, is_depthwise, reads_channels

Cut = set[tuple[str, str, int]]


def _theirs(graph: Any, names: dict[nn.Module, str], conv: nn.Module, index: int) -> Cut:
    """What goes with one filter: layer, whether what it writes or reads, and the index."""
    found = graph.get_pruning_group(conv, tp.prune_conv_out_channels, [index])
    cut = set()
    for item in found:
        module, handler = item.dep.target.module, item.dep.handler.__name__
        if reads_channels(module):
            reads = handler == "prune_in_channels" and not is_depthwise(module)
            kind = "reads" if reads else "writes"
            cut |= {(names[module], kind, place) for place in item.idxs}
    return cut


def _ours(group: CouplingGroup, channel: int) -> Cut:
    kinds = (("writes", group.producers), ("reads", group.consumers))
    return {
        (places.module, kind, int(index))
        for kind, listed in kinds
        for places in listed
        for index in places.indices[places.channels == channel]
    }


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Plain, (3, 16, 16)), (Residual, (3, 16, 16)), (Concatenating, (3, 16, 16)), (Dense, (3, 16, 16)),
        (Flattening, (1, 8, 8)), slow(torchvision.models.resnet18, (3, 64, 64)),
        slow(torchvision.models.mobilenet_v2, (3, 64, 64)), slow(torchvision.models.densenet121, (3, 64, 64)),
        slow(torchvision.models.efficientnet_b0, (3, 64, 64)),
        slow(torchvision.models.mnasnet0_5, (3, 64, 64)),
        slow(torchvision.models.regnet_x_400mf, (3, 64, 64)),
    ],
)  # fmt: skip
def test_the_same_channels_go_together(make: Any, shape: tuple[int, ...]) -> None:
    model = make().eval()
    names = {module: name for name, module in model.named_modules()}
    groups = find_groups(model, torch.zeros(1, *shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, *shape))
    compared = 0
    for group in groups:
        root = model.get_submodule(group.layers[0])
        if not group.removable or not is_convolution(root) or group.channels != root.out_channels:
            continue
        for channel in {0, group.channels - 1}:
            index = int(group.producers[0].table(group.channels)[channel, 0])
            assert _ours(group, channel) == _theirs(graph, names, root, index), group.layers
            compared += 1
    assert compared >= 2

"""Cutting channels out of a network: every axis of a parameter loses the indices where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.attention_heads import set_heads
from prune_viz.network.layer_kinds import groups_left, input_axis, is_convolution, set_sizes


def cut_channels(
    model: nn.Module, groups: Sequence[CouplingGroup], gone: Mapping[int, Set[int]]
) -> dict[tuple[str, int], np.ndarray]:
    """Cut channels out of a network's parameters and buffers, in place.

    A parameter that stands at several places stays one.

    Parameters
    ----------
    model : nn.Module
        The network, plain (`prune_viz.network.copies.plain_copy`).
    groups : sequence of CouplingGroup
        Its groups.
    gone : mapping of int to set of int
        By a group's number, the channels that go.

    Returns
    -------
    dict of (str, int) to ndarray of bool
        For every tensor and axis that was cut, which indices were kept.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept: dict[tuple[str, int], np.ndarray] = {}
    for group in groups:
        for places in group.axes if gone.get(group.number) else ():
            lost = places.indices[np.isin(places.channels, list(gone[group.number]))]
            key = (places.tensor, places.axis)
            own = kept.setdefault(key, np.ones(tensors[key[0]].shape[key[1]], dtype=bool))
            own[lost] = False
    cut: dict[int, Tensor] = {}
    for (name, axis), own in kept.items():
        whole = cut.get(id(tensors[name]), tensors[name])
        part = whole.detach().index_select(axis, torch.from_numpy(np.flatnonzero(own)).to(whole.device))
        cut[id(tensors[name])] = (
            nn.Parameter(part, tensors[name].requires_grad) if isinstance(whole, nn.Parameter) else part
        )
    for prefix, module in model.named_modules():
        _replace(module, prefix, cut, kept)
    for group in groups:
        if group.are_heads and gone.get(group.number):
            set_heads(model, group.layers, group.channels, group.channels - len(gone[group.number]))
    return kept


def _replace(
    module: nn.Module, prefix: str, cut: Mapping[int, Tensor], kept: Mapping[tuple[str, int], np.ndarray]
) -> None:
    """Put what was cut in the place of what a module holds, and set the sizes that it states."""
    kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for held in kinds:
        for name, tensor in held.items():
            if tensor is not None and id(tensor) in cut:
                if name == "weight":
                    own = kept.get((f"{prefix}.{name}".lstrip("."), 1 - input_axis(module)))
                    grouped = is_convolution(module) and module.groups > 1 and own is not None
                    groups = groups_left(module, torch.from_numpy(own)) if grouped else None
                    set_sizes(module, cut[id(tensor)], groups)
                held[name] = cut[id(tensor)]

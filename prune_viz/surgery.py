"""Merging and removal: what a filter contributed goes into its representatives, then it goes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from prune_viz.coupling import (
    CouplingGroup,
    Places,
    UntraceableError,
    build_graph,
    find_groups,
    group_of_layer,
)
from prune_viz.errors import UserError
from prune_viz.filters import blank_input
from prune_viz.masks import Masks, Merge, make_permanent, norms_behind, reconcile_masks


def remove_filters(
    model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Tensor, compensate: str = "none"
) -> nn.Module:
    """Make a network smaller by the filters that masks remove.

    Parameters
    ----------
    model : nn.Module
        The network; copied, not changed.
    masks : mapping of str to bool Tensor
        True = keep. Reconciled first, so that only whole coupled channels go.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.
    compensate : {"none", "merge"}
        Whether to fold what the removed filters contributed into the weights that read their
        representatives, where the masks carry merges (`Masks.merges`).

    Returns
    -------
    nn.Module
        The smaller network in eval mode.

    Raises
    ------
    UserError
        If the masks are for another model, or the architecture cannot be traced.
    """
    if compensate not in ("none", "merge"):
        raise UserError(f"--compensate is none or merge, not {compensate!r}")
    consistent = reconcile_masks(model, masks, example_inputs)
    smaller = make_permanent(copy.deepcopy(model)).eval()
    if compensate == "merge":
        merge_filters(smaller, consistent, example_inputs)
    frozen = [name for name, parameter in smaller.named_parameters() if not parameter.requires_grad]
    try:
        groups = find_groups(smaller, example_inputs)
        graph = build_graph(smaller, example_inputs)
    except UntraceableError as error:
        raise UserError(f"this architecture cannot be traced, so nothing can be removed: {error}") from None
    modules = dict(smaller.named_modules())
    for group in groups:
        root = group.writers[0]
        keep = consistent[root.module].numpy()
        gone = [int(index) for index in root.indices if not keep[index]]
        if gone:
            # Not group.prune(idxs=...), which would record its history twice.
            graph.get_pruning_group(modules[root.module], tp.prune_conv_out_channels, gone).prune()
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    return smaller


def merge_filters(model: nn.Module, masks: Masks, example_inputs: Tensor) -> nn.Module:
    """Fold what removed filters contributed into the weights that read their representatives.

    Only filters that `masks` remove are merged. Their columns in the readers become zero, so that
    masking or removing them afterwards changes nothing more.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks : Masks
        Consistent masks with their merges.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.

    Returns
    -------
    nn.Module
        `model`.
    """
    by_layer = group_of_layer(find_groups(model, example_inputs))
    norms = norms_behind(model)
    modules = dict(model.named_modules())
    merges: dict[int, list[tuple[CouplingGroup, Merge]]] = {}
    for merge in masks.merges:
        group = by_layer.get(merge.layer)
        if group is not None and merge.layer in masks and not masks[merge.layer][merge.filter]:
            merges.setdefault(group.number, []).append((group, merge))
    for entries in merges.values():
        group = entries[0][0]
        rebuilt = [_as_channels(group, merge) for _, merge in entries]
        for reader in group.readers:
            norm = norms.get(reader.module)
            _merge_into(modules[reader.module], reader, rebuilt, modules[norm] if norm else None)
    return model


def _as_channels(group: CouplingGroup, merge: Merge) -> tuple[int, Sequence[int], Sequence[float], float]:
    """A merge in the group's channels instead of one layer's filters."""
    places = next(places for places in group.writers if places.module == merge.layer)
    channel = dict(zip(places.indices.tolist(), places.channels.tolist(), strict=True))
    return (
        channel[merge.filter],
        [channel[index] for index in merge.representatives],
        merge.coefficients,
        merge.constant,
    )


def _merge_into(
    reader: Any,
    places: Places,
    rebuilt: Sequence[tuple[int, Sequence[int], Sequence[float], float]],
    norm: nn.Module | None,
) -> None:
    """Fold merges into one reader's weight, and their constants into its bias or the norm behind it."""
    columns: dict[int, np.ndarray] = {
        channel: places.indices[places.channels == channel] for channel in set(places.channels.tolist())
    }
    with torch.no_grad():
        weight: Tensor = reader.weight.data
        inputs_first = weight if isinstance(reader, _ConvTransposeNd) else weight.transpose(0, 1)
        outputs = inputs_first.shape[1]
        shift = torch.zeros(outputs, dtype=torch.float64)
        for gone, representatives, coefficients, constant in rebuilt:
            lost = inputs_first[columns[gone]].clone()
            shift += constant * lost.double().reshape(len(lost), outputs, -1).sum(dim=(0, 2)).cpu()
            for kept, coefficient in zip(representatives, coefficients, strict=True):
                inputs_first[columns[kept]] += coefficient * lost
            inputs_first[columns[gone]] = 0.0
        if bool(shift.abs().max() > 0):
            _add_bias(reader, shift.to(weight), norm)


def _add_bias(reader: Any, shift: Tensor, norm: nn.Module | None) -> None:
    """Add a constant to a layer's outputs: in its bias, or in the mean of the batch norm behind it."""
    if reader.bias is not None:
        reader.bias.data += shift
    elif isinstance(norm, _BatchNorm) and norm.running_mean is not None:
        norm.running_mean -= shift
    else:
        reader.bias = nn.Parameter(shift)


def rebuild_smaller(
    model: nn.Module, masks: Mapping[str, Tensor], state: Mapping[str, Tensor], example_inputs: Tensor
) -> nn.Module:
    """Build a smaller network again from its architecture, the masks and its own weights.

    Parameters
    ----------
    model : nn.Module
        The architecture at full size, with any weights.
    masks : mapping of str to bool Tensor
        What was removed.
    state : mapping of str to Tensor
        The smaller network's state dict.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.

    Raises
    ------
    UserError
        If the weights do not fit what is left.
    """
    smaller = remove_filters(model, masks, example_inputs)
    for name, module in smaller.named_modules():
        bias = f"{name}.bias"
        if isinstance(module, (_ConvNd, nn.Linear)) and module.bias is None and bias in state:
            module.bias = nn.Parameter(torch.zeros_like(state[bias]))
    try:
        smaller.load_state_dict(dict(state))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"the weights do not fit the network that is left after removal: {text}") from None
    return smaller


def count_cost(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, int]:
    """Count a network's parameters and its multiply-accumulates for one input.

    Parameters
    ----------
    model : nn.Module
        The network.
    input_shape : sequence of int
        Channels first, without the batch axis.

    Returns
    -------
    parameters, macs : int
        MACs of convolutions and matrix products, as PyTorch's own counter sees them.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(blank_input(model, input_shape))
    model.train(training)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2

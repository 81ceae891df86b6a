"""What operations with weights do to channels: convolutions, products and norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prune_viz.channels.calls import Call, Labels, channels_of
from prune_viz.channels.label_sets import blank, is_constant
from prune_viz.channels.parameter_axes import PASSED, READ


def convolution(call: Call) -> Labels:
    """A convolution of any kind: it reads channels along one axis of its weight, and writes along another."""
    inputs, weight, bias = (call.argument(name) for name in ("input", "weight", "bias"))
    transposed, groups = call.argument("transposed"), call.argument("groups")
    read = channels_of(call, call.labels(inputs), 1)
    if call.view(weight) is None:
        call.refuse([read, call.labels(weight)], "a convolution reads it whose weights are computed")
        return blank(call.made[0].shape)
    if groups == 1:
        call.bind(weight, 0 if transposed else 1, read, READ)
        written = call.along(weight, 1 if transposed else 0)
    elif transposed:
        call.sets.refuse(read, "a grouped transposed convolution reads it")
        written = blank([call.made[0].shape[1]])
    else:
        written = _grouped(call, read, weight, groups)
    call.bind(bias, 0, written, PASSED)
    return written.view(1, -1, *(1,) * (call.made[0].ndim - 2)).expand(call.made[0].shape)


def _grouped(call: Call, read: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution: whole groups go, or the channels at one position in each of them."""
    written = call.along(weight, 0)
    before, after = read.view(groups, -1), written.view(groups, -1)
    view = call.view(weight)
    whole = all(call.sets.are_one(one) for one in before)  # each group reads one unit of channels
    if not whole and view is not None and view.number in call.ways.by_position:
        for one in after[1:]:
            call.sets.unite(after[0], one)
        for one in before:
            call.bind(weight, 1, one, READ)
        return written
    for one, other in zip(before, after, strict=True):
        call.sets.unite_all(torch.cat([one, other]))
        if bool((one == 0).any()):
            call.sets.refuse(other, "its layer reads values that belong to no channel")
    return written


def product(call: Call) -> Labels:
    """A matrix product: a linear layer, a mixing of positions, or one of attention's products."""
    first, second = call.args[-2:] if call.name in ("addmm", "baddbmm", "addmv") else call.args[:2]
    bias = call.args[0] if call.name in ("addmm", "baddbmm", "addmv") else None
    if call.view(second) is not None:
        return _linear(call, first, second, bias)
    left, right = call.labels(first), call.labels(second)
    shape = call.made[0].shape
    if right.ndim != left.ndim or call.view(first) is not None:
        call.refuse([left, right], f"something that it passes ({call.name}) mixes its channels")
        return blank(shape)
    if is_constant(left, [-1]) and is_constant(right, [-2]):
        return _carried(call, left, right, shape)
    if call.of_heads(left) and call.of_heads(right):
        return _scores(call, left, right, shape)
    call.refuse([left, right], SUMMED)
    return blank(shape)


SUMMED = "its products with other channels are summed, as in attention"


def _scores(call: Call, left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    """Products of queries and keys: all channels of a head go together, and its scores are theirs."""
    first = [one.narrow(-1, 0, 1).narrow(-2, 0, 1) for one in (left, right)]
    for labels, own in zip((left, right), first, strict=True):
        call.sets.unite(labels, own.expand(labels.shape))
    call.sets.unite(*first)
    return first[0].expand(shape)


def _carried(call: Call, left: Tensor, right: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels of a product that sums over positions: those of the rows, or those of the columns."""
    rows, columns = left.narrow(-1, 0, 1).expand(shape), right.narrow(-2, 0, 1).expand(shape)
    if bool(rows.any()) and bool(columns.any()):
        if not (call.of_heads(rows) and call.of_heads(columns)):
            call.refuse([rows, columns], SUMMED)
            return blank(shape)
        call.sets.unite(rows, columns)
    return rows if bool(rows.any()) else columns


def _linear(call: Call, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product with a parameter, shape (inputs, outputs)."""
    labels, shape = call.labels(inputs), call.made[0].shape
    axis = -2 if weight.ndim > 1 else -1
    if labels.shape[-1] > 1 and is_constant(labels, [-1]) and bool(labels.any()):
        # It mixes positions, and every channel for itself.
        if bias is not None and call.view(bias) is None:
            call.refuse([call.labels(bias)], "it is added to a product")
        return labels.narrow(-1, 0, 1).expand(shape) if weight.ndim > 1 else labels[..., 0]
    read = channels_of(call, labels, -1)
    call.bind(weight, axis, read, READ)
    if weight.ndim == 1:
        return blank(shape)
    written = call.along(weight, -1)
    call.bind(bias, -1, written, PASSED)
    return written.expand(shape)


def batch_norm(call: Call) -> Labels:
    """A norm of every channel for itself, with statistics that were measured in training or are now."""
    labels = call.labels(call.args[0])
    channels = channels_of(call, labels, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.bind(call.argument(name), 0, channels, PASSED)
    return [labels if one.shape == labels.shape else blank(one.shape) for one in call.made]


def layer_norm(call: Call) -> Labels:
    """A norm over all channels of a position, which depends on how many there are."""
    labels = call.labels(call.args[0])
    if len(call.argument("normalized_shape")) == 1:
        channels = channels_of(call, labels, -1)
        for name in ("weight", "bias"):
            call.bind(call.argument(name), 0, channels, PASSED)
    call.sets.refuse(labels, "a layer norm reads it, which depends on every channel")
    return [labels if one.shape == labels.shape else blank(one.shape) for one in call.made]


def group_norm(call: Call) -> Labels:
    """A norm over groups of channels; one that has a group for every channel leaves them apart."""
    labels = call.labels(call.args[0])
    channels = channels_of(call, labels, 1)
    for name in ("weight", "bias"):
        call.bind(call.argument(name), 0, channels, PASSED)
    if call.argument("group") != labels.shape[1]:
        call.sets.refuse(labels, "a group norm reads it, which depends on every channel of a group")
    return [labels if one.shape == labels.shape else blank(one.shape) for one in call.made]

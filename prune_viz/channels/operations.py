"""What each operation does to channels: the table `RULES`, by the names of PyTorch's operators.

A rule is given a `Call` and returns the labels of what the operation made. An operator of a kind that is
known already takes its name in one line of the table; one that is not there refuses the channels it meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from prune_viz.channels.calls import Call, Labels, Rule, channels_of, join
from prune_viz.channels.label_sets import blank, compact, first_along, is_constant, shrunk, varying_axes
from prune_viz.channels.layer_operations import batch_norm, convolution, group_norm, layer_norm, product
from prune_viz.channels.parameter_axes import PASSED
from prune_viz.utils.nested_tensors import tensors_of


def move(call: Call) -> Labels:
    """What moves values about moves their labels alike."""
    labels = tree_map(lambda one: _movable(call, one), (call.args, call.kwargs))
    moved = call.function(*labels[0], **labels[1])
    return tensors_of(moved)


def _movable(call: Call, argument: Any) -> Any:
    """Labels in the place of a tensor; indices by which another is moved stay."""
    if not isinstance(argument, Tensor):
        return argument
    values = argument is call.args[0] or argument.is_floating_point() or argument.is_complex()
    return call.labels(argument) if values else argument


def pad(call: Call) -> Labels:
    """Padding with a constant: positions belong to their channels, and further channels to none."""
    (small,) = shrunk([call.labels(call.args[0])])
    pads = list(call.argument("pad"))
    for place in range(0, len(pads), 2):
        if small.shape[-1 - place // 2] == 1:
            pads[place : place + 2] = 0, 0
    return torch.constant_pad_nd(small, pads, 0).expand(call.made[0].shape)


def reshape(call: Call) -> Labels:
    """A view of another shape. Where channels are spread over several axes, each part has as many of them.

    Where whole heads go, those are united where queries meet keys.
    """
    labels = call.labels(call.args[0])
    made = compact(labels.reshape(call.made[0].shape))
    before, after = varying_axes(labels), varying_axes(made)
    if len(before) == 1 and len(after) > 1 and not call.of_heads(labels):
        for axis in after[:-1]:
            unite_parts(call, made.unbind(axis))
    return made


def unite_parts(call: Call, parts: Sequence[Tensor]) -> None:
    """Unite the labels at equal places of parts, so that they stay equally large."""
    for part in parts[1:]:
        if part.shape == parts[0].shape:
            call.sets.unite(parts[0], part)


def split(call: Call) -> Labels:
    """Parts along an axis; where they are equally large, they stay so."""
    labels = call.labels(call.args[0])
    axis = call.argument("dim", 0)
    parts = list(call.function(labels, *call.args[1:], **call.kwargs))
    if not is_constant(labels, [axis]):
        unite_parts(call, parts)
    return parts


def cut_slice(call: Call) -> Labels:
    """A slice. One whose place is a multiple of its length is taken for one of several equal parts."""
    labels = call.labels(call.args[0])
    axis = call.argument("dim", 0) % labels.ndim
    made: Tensor = call.function(labels, *call.args[1:], **call.kwargs)
    size, length = labels.shape[axis], made.shape[axis]
    start = min(call.argument("start") or 0, size)
    start = start + size if start < 0 else start
    even = 0 < length < size and size % length == 0 and start % length == 0
    if even and call.argument("step", 1) == 1 and not is_constant(labels, [axis]):
        unite_parts(call, torch.chunk(labels, size // length, axis))
    return made


def concatenate(call: Call) -> Labels:
    """Tensors side by side. A parameter among them, such as a class token, has its neighbours' channels."""
    tensors, axis = list(call.args[0]), call.argument("dim", 0)
    parts = [call.labels(tensor) for tensor in tensors]
    known = next((part for part, one in zip(parts, tensors, strict=True) if call.view(one) is None), None)
    for number, tensor in enumerate(tensors):
        if known is not None and call.view(tensor) is not None and tensor.ndim == known.ndim:
            parts[number] = _beside(call, tensor, known, axis % known.ndim)
    if call.name == "stack":
        return torch.stack(parts, axis)
    axis %= call.made[0].ndim
    parts = [part for part in parts if part.ndim == call.made[0].ndim]  # others are empty
    narrow = parts
    for other in range(call.made[0].ndim):
        if other != axis and all(is_constant(part, [other]) for part in parts):
            narrow = [part.narrow(other, 0, min(1, part.shape[other])) for part in narrow]
    return torch.cat(narrow, axis).expand(call.made[0].shape)


def _beside(call: Call, tensor: Tensor, known: Tensor, axis: int) -> Tensor:
    """Labels of a parameter, as those of what it is put beside along an axis."""
    row = first_along(known, [axis])
    for other in range(known.ndim):
        along = channels_of(call, row, other)
        if other != axis and bool((along != along[:1]).any()):
            call.bind(tensor, other, along, PASSED)
    return row.expand(tensor.shape)


def elementwise(call: Call) -> Labels:
    """What is computed place by place, with parameters among the operands or without."""
    shape = call.made[0].shape
    operands = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor)]
    maps = [one for one in operands if call.view(one) is None]
    labels = join(call, [blank(shape), *(call.labels(one).broadcast_to(shape) for one in maps)])
    for parameter in (one for one in operands if call.view(one) is not None):
        for axis in range(parameter.ndim):
            own = axis + len(shape) - parameter.ndim
            if own >= 0 and parameter.shape[axis] > 1 and not is_constant(labels, [own]):
                call.bind(parameter, axis, channels_of(call, labels, own), PASSED)
    return [labels] * len(call.made)


def glu(call: Call) -> Labels:
    """A gated linear unit: the halves of a map go together."""
    first, second = call.labels(call.args[0]).chunk(2, call.argument("dim", -1))
    return join(call, [first, second])


def copy_into(call: Call) -> Labels:
    """Values written over others."""
    return call.labels(call.args[1]).broadcast_to(call.args[0].shape)


def write_rows(call: Call) -> Labels:
    """Values written into some rows of a tensor, as where boxes of several sizes are put together."""
    labels, values = call.labels(call.args[0]), call.labels(call.args[2])
    by_rows = len([one for one in call.args[1] if one is not None]) == 1 and call.args[1][0] is not None
    if not by_rows or values.ndim != labels.ndim or not is_constant(values, [0]):
        call.refuse([labels, values], "it is written into a part of another map")
        return blank(labels.shape)
    return join(call, [labels, values.narrow(0, 0, 1).expand(labels.shape)]) if len(values) else labels


def fill(call: Call) -> Labels:
    """Constants written over values, which belong to no channel."""
    return blank(call.args[0].shape)


def reduce(call: Call) -> Labels:
    """A sum, mean, norm or the like over some axes: of one channel, or the channels are mixed."""
    labels = call.labels(call.args[0])
    axes = call.argument("dim")
    axes = list(range(labels.ndim)) if axes is None or axes == [] else axes
    axes = [axes] if isinstance(axes, int) else list(axes)
    # Attention averages its weights over heads, mostly for nobody; what comes of it is seen on trial.
    over_heads = call.of_heads(labels) and set(varying_axes(labels)) <= {axis % labels.ndim for axis in axes}
    if over_heads or not _unite_along(call, labels, axes):
        return [blank(one.shape) for one in call.made]
    kept = first_along(labels, [axis % labels.ndim for axis in axes])
    return [kept.reshape(one.shape) if one.numel() == kept.numel() else blank(one.shape) for one in call.made]


def _unite_along(call: Call, labels: Tensor, axes: Sequence[int]) -> bool:
    """Whether channels stay apart where values along some axes meet.

    They are apart where they lie along others. Those that lie at one place of these, as where the maps of
    several branches are stacked and summed, go together.
    """
    if is_constant(labels, axes):
        return True
    reduced = [axis % labels.ndim for axis in axes]
    if any(axis not in reduced for axis in varying_axes(labels)):
        for axis in reduced:
            unite_parts(call, labels.unbind(axis))
        return True
    call.sets.refuse(labels, f"something that it passes ({call.name} over channels) mixes its channels")
    return False


def along(call: Call) -> Labels:
    """A softmax, a cumulative sum, a sort along an axis: of one channel, or the channels are mixed."""
    labels = call.labels(call.args[0])
    _unite_along(call, labels, [call.argument("dim", -1)])
    return [labels if one.shape == labels.shape else blank(one.shape) for one in call.made]


def spatial(call: Call) -> Labels:
    """Pooling and resizing: every map for itself."""
    labels = call.labels(call.args[0])
    axes = list(range(labels.ndim - _spatial_axes(call, labels), labels.ndim))
    if not is_constant(labels, axes):
        call.sets.refuse(labels, f"something that it passes ({call.name}) mixes its channels")
        return [blank(one.shape) for one in call.made]
    small = first_along(labels, axes)
    if len(call.made[0]) != len(labels) and is_constant(small, [0]):  # regions of a batch
        small = small.narrow(0, 0, 1)
    return [small.expand(one.shape) for one in call.made]


def _spatial_axes(call: Call, labels: Tensor) -> int:
    for count in (1, 2, 3):
        if f"{count}d" in call.name:
            return count
    return labels.ndim - 2


def unknown(call: Call) -> Labels:
    """An operation that is not in the table."""
    tensors = tensors_of([*call.args, *call.kwargs.values()])
    call.refuse([call.labels(one) for one in tensors], f"what {call.name} does to its channels is not known")
    return [blank(one.shape) for one in call.made]


_KINDS: dict[Rule, str] = {
    move: """permute transpose t expand select squeeze unsqueeze flip roll repeat tile index index_select
        pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold movedim diagonal gather
        take_along_dim""",
    reshape: "view _unsafe_view reshape _reshape_alias",
    split: "split split_with_sizes chunk unbind tensor_split",
    cut_slice: "slice narrow",
    concatenate: "cat stack",
    pad: "constant_pad_nd",
    elementwise: """clone alias detach contiguous _to_copy to lift_fresh real
        relu relu6 sigmoid tanh silu gelu hardtanh hardswish hardsigmoid leaky_relu elu celu selu mish
        softplus softsign log_sigmoid_forward rrelu_with_noise threshold hardshrink softshrink
        abs neg exp expm1 sqrt rsqrt pow square reciprocal log log1p log2 sin cos erf sign round floor ceil
        clamp clamp_min clamp_max nan_to_num isnan isinf logical_not bitwise_not
        dropout native_dropout bernoulli add sub mul div rsub where maximum minimum fmod remainder addcmul
        addcdiv lerp masked_fill prelu _prelu_kernel lt gt le ge eq ne logical_and logical_or bitwise_and
        bitwise_or""",
    glu: "glu",
    copy_into: "copy",
    write_rows: "index_put _index_put_impl",
    fill: "fill zero",
    reduce: """mean sum amax amin var std var_mean std_mean norm linalg_vector_norm max min prod any all
        argmax argmin logsumexp nansum aminmax""",
    along: "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod sort topk logcumsumexp",
    spatial: """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d
        avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d
        _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d
        upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
        upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d
        reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        grid_sampler_2d grid_sampler_3d roi_align roi_pool""",
    convolution: "convolution _convolution convolution_overrideable",
    product: "mm addmm bmm baddbmm mv addmv",
    batch_norm: """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _batch_norm_impl_index cudnn_batch_norm _batch_norm_no_update""",
    layer_norm: "native_layer_norm layer_norm",
    group_norm: "native_group_norm",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _KINDS.items() for name in names.split()}
# What reads no values of a tensor, but at most its shape.
_FREE = """
    empty zeros ones arange full zeros_like ones_like empty_like full_like rand rand_like randn
    randn_like randint scalar_tensor new_zeros new_empty new_empty_strided new_full new_ones
    linspace eye is_same_size sym_size sym_numel sym_stride empty_strided empty_permuted bernoulli_p
"""
FREE = frozenset(_FREE.split())

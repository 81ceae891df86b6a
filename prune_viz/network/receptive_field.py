"""How much of the input one position of a map sees, read off the traced network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from prune_viz.network.layer_kinds import is_convolution, is_transposed, reads_channels
from prune_viz.network.tracing import ancestors, module_name

_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_POOL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.max_pool1d,
    torch.max_pool2d, torch.max_pool3d,
}  # fmt: skip


def receptive_field(traced: fx.GraphModule, node: fx.Node, axes: int) -> tuple[int, ...] | None:
    """Input pixels that one position of a map sees, along each spatial axis; None if unbounded.

    Sizes and strides of convolutions and pools are carried along every path to `node`, and the widest
    path counts. Anything that pools globally, resizes or flattens makes the field unbounded, and so does a
    convolution over other axes than the input's, as over a spectrogram.
    """
    modules = dict(traced.named_modules())
    needed = ancestors(node)
    fields: dict[fx.Node, tuple[list[float], list[float]] | None] = {}
    for current in traced.graph.nodes:
        if current not in needed:
            continue
        inputs = [fields[parent] for parent in current.all_input_nodes if parent in fields]
        known = [field for field in inputs if field is not None]
        if current.op == "placeholder":
            fields[current] = ([1.0] * axes, [1.0] * axes)
        elif not known:
            fields[current] = None
        else:
            sizes = [max(field[0][axis] for field in known) for axis in range(axes)]
            jumps = [max(field[1][axis] for field in known) for axis in range(axes)]
            window = _window(current, modules, axes)
            if window is None:
                return None
            for axis, (extent, stride) in enumerate(window):
                sizes[axis] += (extent - 1) * jumps[axis]
                jumps[axis] *= stride
            fields[current] = (sizes, jumps)
    reached = fields[node]
    return None if reached is None else tuple(math.ceil(size) for size in reached[0])


def _window(node: fx.Node, modules: dict[str, nn.Module], axes: int) -> list[tuple[float, float]] | None:
    """Extent and stride of what `node` slides over its input; None if it sees everything."""
    unit = [(1.0, 1.0)] * axes
    if node.op == "call_module":
        module: Any = modules[module_name(node)]
        name = type(module).__name__
        if is_convolution(module) and len(module.kernel_size) != axes:
            return None
        if is_transposed(module):
            return [
                (1 + math.ceil(d * (k - 1) / s), 1 / s)
                for k, d, s in zip(module.kernel_size, module.dilation, module.stride, strict=True)
            ]
        if is_convolution(module) or isinstance(module, _POOLS):
            sizes = _per_axis(module.kernel_size, axes)
            dilations = _per_axis(getattr(module, "dilation", 1), axes)
            strides = _per_axis(module.stride, axes)
            return [(d * (k - 1) + 1, s) for k, d, s in zip(sizes, dilations, strides, strict=True)]
        if (
            "Adaptive" in name
            or "Upsample" in name
            or reads_channels(module)
            or isinstance(module, nn.Flatten)
        ):
            return None
        return unit
    name = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        size = node.args[1] if len(node.args) > 1 else node.kwargs["kernel_size"]
        stride = (node.args[2] if len(node.args) > 2 else node.kwargs.get("stride")) or size
        extents, strides = _per_axis(size, axes), _per_axis(stride, axes)
        return [(float(k), float(s)) for k, s in zip(extents, strides, strict=True)]
    seeing_all = ("adaptive", "interpolate", "mean", "flatten", "linear", "matmul", "upsample")
    return None if any(word in name for word in seeing_all) else unit


def _per_axis(value: Any, axes: int) -> Sequence[Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes

"""A network's convolutions as people know them: names, kinds, receptive fields, and sizes of stimuli."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune_viz.network.layer_kinds import (
    convolutions_of,
    count_inputs,
    is_convolution,
    is_depthwise,
    is_transposed,
    reads_channels,
)
from prune_viz.utils.errors import UserError

# A stimulus is at least this large and at most that, by number of spatial axes: pictures, signals, volumes.
SMALLEST_CANVAS = {1: 64, 2: 64, 3: 8}
LARGEST_CANVAS = {1: 4096, 2: 80, 3: 24}
_CANVAS_STEP = {1: 32, 2: 16, 3: 4}
# The same for drafts, with which every search begins.
SMALLEST_DRAFT = {1: 64, 2: 32, 3: 8}
LARGEST_DRAFT = {1: 1024, 2: 40, 3: 12}


def settings() -> list[object]:
    """What canvases depend on beside receptive fields, for the key of stimuli."""
    return [SMALLEST_CANVAS, LARGEST_CANVAS, _CANVAS_STEP, SMALLEST_DRAFT, LARGEST_DRAFT]


@dataclass(frozen=True)
class Layer:
    """A convolution and its filters, or a linear layer and its hidden units.

    Attributes
    ----------
    name : str
        The module's dotted name.
    kind : str
        For people, ``"3x3 convolution, stride 2"``.
    filters : int
        Number of filters (output channels).
    depth : int
        Position in the order of execution, from 0.
    receptive_field : tuple of int or None
        Input pixels one position of the feature map sees, a spatial axis each; None if unknown.
    canvas : tuple of int
        Spatial size of the stimuli.
    """

    name: str
    kind: str
    filters: int
    depth: int
    receptive_field: tuple[int, ...] | None
    canvas: tuple[int, ...]


def choose_canvas(
    input_size: Sequence[int],
    field: Sequence[int] | None,
    canvas: int | None = None,
    draft: bool = False,
) -> tuple[int, ...]:
    """Choose a layer's canvas: twice its receptive field, within bounds, never beyond the model's input.

    Parameters
    ----------
    input_size : sequence of int
        Spatial size of the model's input.
    field : sequence of int or None
        The receptive field; None counts as unbounded.
    canvas : int, optional
        A size wished for instead; the input still bounds it.
    draft : bool
        Whether it is for drafts, which are smaller.

    Returns
    -------
    tuple of int
        A size an axis.
    """
    axes = len(input_size)
    if canvas is not None:
        return tuple(min(size, canvas) for size in input_size)
    smallest, largest = SMALLEST_CANVAS[axes], LARGEST_CANVAS[axes]
    if draft:
        smallest, largest = SMALLEST_DRAFT[axes], LARGEST_DRAFT[axes]
    step = _CANVAS_STEP[axes]
    seen = field if field is not None else (largest,) * axes
    wished = [math.ceil(2 * extent / step) * step for extent in seen]
    return tuple(
        min(size, max(smallest, min(largest, wish))) for size, wish in zip(input_size, wished, strict=True)
    )


def describe(module: Any) -> str:
    """Name a layer for people, ``"5x5 depthwise convolution, stride 2"``, ``"linear layer, 384 inputs"``."""
    if not is_convolution(module):
        return f"linear layer, {count_inputs(module):,} inputs"
    size = "x".join(str(extent) for extent in module.kernel_size)
    words = [size]
    if is_depthwise(module):
        words.append("depthwise")
    elif module.groups > 1:
        words.append(f"grouped ({module.groups})")
    words.append("transposed convolution" if is_transposed(module) else "convolution")
    text = " ".join(words)
    if max(module.stride) > 1:
        text += f", stride {max(module.stride)}"
    if max(module.dilation) > 1:
        text += f", dilation {max(module.dilation)}"
    return text


def select_layers(
    layers: Sequence[Layer], patterns: Sequence[str], kept: Mapping[str, str] | None = None
) -> list[Layer]:
    """Layers whose name matches any of the shell patterns; all of them if there is no pattern.

    Parameters
    ----------
    layers : sequence of Layer
        All layers of filters.
    patterns : sequence of str
        Shell patterns.
    kept : mapping of str to str, optional
        Other layers, whose outputs are no filters, and why.

    Raises
    ------
    UserError
        If a pattern matches no layer; the message says why, or lists near names.
    """
    if not patterns:
        return list(layers)
    names = [layer.name for layer in layers]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            other = next(iter(fnmatch.filter(kept or {}, pattern)), None)
            if kept and other is not None:
                raise UserError(f"all outputs of the linear layer {other} are kept: {kept[other]}")
            raise UserError(no_layer_message(pattern, names))
    return [
        layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)
    ]


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Refuse at once what can match no layer, whichever of a model's layers turn out to have filters.

    Parameters
    ----------
    model : nn.Module
        The network; it does not run.
    patterns : sequence of str
        Shell patterns of the names of layers.

    Raises
    ------
    UserError
        If a pattern matches neither a convolution nor a linear layer.
    """
    readers = [name for name, module in model.named_modules() if reads_channels(module)]
    for pattern in patterns:
        if not fnmatch.filter(readers, pattern):
            raise UserError(no_layer_message(pattern, list(convolutions_of(model)) or readers))


def no_layer_message(wanted: str, names: Sequence[str]) -> str:
    """Say that no layer matches, and which names are near."""
    bare = wanted.replace("*", "")
    near = difflib.get_close_matches(bare, names, n=4, cutoff=0.3)
    near += [name for name in names if bare and bare in name and name not in near][:4]
    listed = ", ".join((near or list(names))[:6])
    return f"no layer of filters matches {wanted!r}; there are {len(names)}, for instance: {listed}"

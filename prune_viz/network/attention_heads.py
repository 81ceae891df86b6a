"""Attention modules: forms of them whose heads can be followed, and how many heads they say they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
from torch import nn

from prune_viz.network.packed_attention import pack

# Attributes that hold a number of heads, and those that hold how many channels all heads have together.
_COUNTS = ("num_heads", "n_heads", "heads", "num_attention_heads", "nhead", "n_head")
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "attention_dim", "key_attn_dim", "val_attn_dim")
_PARTS = (1, 2, 3)  # queries, keys and values that one layer may write
# Classes whose heads cannot be followed or removed as they are, and those that take their place.
_NARROW = {
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": "NarrowRelativeAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention": "NarrowWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": "NarrowWindowAttentionV2",
}
_LEVELS = 3  # from a layer up to the attention that it belongs to


def set_heads(model: nn.Module, layers: Iterable[str], whole: int, left: int) -> None:
    """Set the number of heads of the attention that layers belong to.

    Parameters
    ----------
    model : nn.Module
        The network; attributes are changed in place.
    layers : iterable of str
        Layers that write queries, keys or values.
    whole, left : int
        How many heads they wrote, and how many are left. Attention with another number is left as it is.
    """
    holders = [
        next((one for one in _around(model, layer) if whole in _counts(one).values()), None)
        for layer in layers
    ]
    for module in {id(one): one for one in holders if one is not None}.values():
        for name, count in _counts(module).items():
            if count == whole:
                setattr(module, name, left)
        for name in _WIDTHS:
            width = _number(module, name)
            if width and width % whole == 0:
                setattr(module, name, width // whole * left)
        _narrow(module)


def heads_left(model: nn.Module, layer: str, mask: np.ndarray) -> tuple[int, int] | None:
    """How many heads a layer has, and how many a mask keeps, where the mask keeps or removes whole heads.

    Parameters
    ----------
    model : nn.Module
        The network at full size.
    layer : str
        A layer of it.
    mask : ndarray of bool, shape (filters,)
        True = keep.

    Returns
    -------
    whole, left : int
        None where the layer belongs to no attention, or the mask cuts a head or keeps them all.
    """
    for module in _around(model, layer):
        for whole in _counts(module).values():
            for parts in _PARTS:
                if len(mask) % (parts * whole) == 0:
                    rows = mask.reshape(parts, whole, -1)
                    if bool((rows == rows[:1, :, :1]).all()) and not bool(rows.all()):
                        return whole, int(rows[0, :, 0].sum())
    return None


def resize_heads(model: nn.Module, masks: Mapping[str, np.ndarray]) -> None:
    """Set the number of heads wherever masks remove whole heads (`heads_left`).

    Parameters
    ----------
    model : nn.Module
        The network at full size; attributes are changed in place.
    masks : mapping of str to ndarray of bool
        By the layer, True = keep.
    """
    layers: dict[tuple[int, int], list[str]] = {}
    for layer, mask in masks.items():
        counts = heads_left(model, layer, mask)
        if counts is not None:
            layers.setdefault(counts, []).append(layer)
    for (whole, left), names in layers.items():
        set_heads(model, names, whole, left)


def narrow_attention(model: nn.Module) -> None:
    """Let attention call all of its layers, and run with fewer heads, where its own forward pass does not.

    Parameters
    ----------
    model : nn.Module
        A copy of a network; some of its modules change class in place, and what it computes stays the same.
    """
    for module in list(model.modules()):
        _narrow(module)


def layers_of_heads(model: nn.Module) -> list[Any]:
    """The layers that write queries, keys and values of attention in the forms of `narrow_attention`."""
    names = ((module, getattr(type(module), "WRITTEN_BY", "")) for module in model.modules())
    return [getattr(module, name) for module, name in names if name]


def _narrow(module: nn.Module) -> None:
    pack(module)
    kind = type(module)
    found = _NARROW.get(f"{kind.__module__}.{kind.__qualname__}")
    if found is not None:  # imported only here, since it imports torchvision
        module.__class__ = getattr(import_module("prune_viz.network.narrow_attention"), found)


def _around(model: nn.Module, layer: str) -> Iterator[nn.Module]:
    """The modules that a layer lies in, the nearest first."""
    parts = layer.split(".")
    for level in range(1, min(_LEVELS, len(parts)) + 1):
        yield model.get_submodule(".".join(parts[:-level]))


def _counts(module: nn.Module) -> dict[str, int]:
    """The numbers of heads that a module holds, by their attributes."""
    found = {name: _number(module, name) for name in _COUNTS}
    return {name: count for name, count in found.items() if count}


def _number(module: nn.Module, name: str) -> int:
    """A positive whole number that a module holds as an attribute; 0 where it holds none of this name."""
    value = vars(module).get(name)
    return value if type(value) is int and value > 0 else 0

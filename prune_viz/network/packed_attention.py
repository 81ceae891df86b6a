"""torch's own attention in a form that calls a layer for queries, keys and values, and runs with any heads.

`nn.MultiheadAttention` holds the weights for all three in a parameter of its own. Here a linear layer holds
them, ``in_proj``, so that its outputs are filters like others. State dicts have the same names in both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prune_viz.network.layer_kinds import linear_layer

LAYER = "in_proj"
_KINDS = ("weight", "bias")


class PackedAttention(nn.MultiheadAttention):
    """Torch's attention whose layer ``in_proj`` is called where queries, keys and values are one tensor."""

    WRITTEN_BY = LAYER  # the layer that writes queries, keys and values
    in_proj: Any
    in_proj_weight = property(lambda self: self.in_proj.weight)
    in_proj_bias = property(lambda self: self.in_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; parameters and results are its own."""
        if query is key and key is value:
            written = _thirds(self.in_proj(query))
        else:
            written = _projected((query, key, value), self.in_proj.weight, self.in_proj.bias)
        maps, weights = _attend(
            written, self.num_heads, self.batch_first, (attn_mask, key_padding_mask),
            self.dropout if self.training else 0.0, (need_weights, average_attn_weights),
        )  # fmt: skip
        return self.out_proj(maps), weights

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The state dict that `nn.MultiheadAttention` has."""
        found: Any = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        destination._metadata.update(found._metadata)
        for kind in _KINDS:
            if f"{prefix}{LAYER}.{kind}" in found:
                destination[f"{prefix}{LAYER}_{kind}"] = found.pop(f"{prefix}{LAYER}.{kind}")
        destination.update(found)
        return destination

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *arguments: Any
    ) -> None:
        _rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def pack(attention: nn.Module) -> None:
    """Turn torch's own attention into `PackedAttention`, in place, where it is what that computes.

    Its parameters stay the same objects. Nothing is done to any other module, nor to attention whose keys and
    values have other sizes or further rows, nor where something lies over its parameters.
    """
    if type(attention) is not nn.MultiheadAttention or attention.add_zero_attn:
        return
    weight = attention._parameters.get("in_proj_weight")
    if weight is None or attention.bias_k is not None or attention.bias_v is not None:
        return
    layer = linear_layer(weight, attention.in_proj_bias)
    layer.training = attention.training
    del attention._parameters["in_proj_weight"], attention._parameters["in_proj_bias"]
    attention.__class__ = PackedAttention
    attention._modules = {LAYER: layer, **attention._modules}
    attention._qkv_same_embed_dim = False  # else torch's fast path for encoders would not call it


def by_layers(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors have the names of the layers that hold them, where attention is packed."""
    named = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, PackedAttention):
            _rename(named, f"{name}." if name else "")
    return named


def place_of(modules: Mapping[str, nn.Module], layer: str) -> tuple[Any, str]:
    """Where the weight and bias of a layer stand: in which module, and what their names begin with.

    Of a layer that only `PackedAttention` has, they stand in torch's own attention. The module is None where
    there is no such layer.
    """
    parent, _, own = layer.rpartition(".")
    attention = modules.get(parent)
    if layer not in modules and own == LAYER and isinstance(attention, nn.MultiheadAttention):
        return attention, f"{LAYER}_"
    return modules.get(layer), ""


def _rename(state: MutableMapping[str, Any], prefix: str) -> None:
    for kind in _KINDS:
        if f"{prefix}{LAYER}_{kind}" in state:
            state[f"{prefix}{LAYER}.{kind}"] = state.pop(f"{prefix}{LAYER}_{kind}")


def _thirds(packed: Tensor) -> tuple[Tensor, ...]:
    return torch.unflatten(packed, -1, (3, -1)).unbind(-2)


def _projected(given: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values, each from a tensor of its own."""
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return tuple(map(F.linear, given, weight.chunk(3), biases))


def _attend(
    written: tuple[Tensor, ...],
    heads: int,
    batch_first: bool,
    masks: tuple[Tensor | None, Tensor | None],
    dropout: float,
    asked: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None]:
    """What queries, keys and values give, as they lie, and the weights if they are asked for, or their mean.

    The masks are over queries and keys, shape (L, S) or (B * heads, L, S), and over keys, shape ([B,] S):
    true where nothing is read, or added to scores.
    """
    batched = written[0].ndim == 3
    turned = batched and not batch_first
    queries, keys, values = (
        torch.unflatten(one.transpose(0, 1) if turned else one, -1, (heads, -1)).transpose(-3, -2)
        for one in written
    )
    added = _added(masks, queries)
    weights = None
    need_weights, average = asked
    if need_weights:
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        weights = F.softmax(scores if added is None else scores + added, dim=-1)
        weights = F.dropout(weights, dropout)
        maps = weights @ values
        weights = weights.mean(dim=-3) if average else weights
    else:
        maps = F.scaled_dot_product_attention(queries, keys, values, added, dropout)
    maps = maps.transpose(-3, -2).flatten(-2)
    return maps.transpose(0, 1) if turned else maps, weights


def _added(masks: tuple[Tensor | None, Tensor | None], queries: Tensor) -> Tensor | None:
    """Both masks as one that is added to scores, shape ([B,] heads, L, S)."""
    over_pairs, over_keys = (
        torch.zeros_like(mask, dtype=queries.dtype).masked_fill(mask, -torch.inf)
        if mask is not None and mask.dtype == torch.bool
        else mask
        for mask in masks
    )
    if over_pairs is not None and over_pairs.ndim == 3:
        over_pairs = over_pairs.reshape(*queries.shape[:-2], *over_pairs.shape[1:])
    if over_keys is not None:
        over_keys = over_keys[..., None, None, :]
    if over_pairs is None or over_keys is None:
        return over_keys if over_pairs is None else over_pairs
    return over_pairs + over_keys


# Masks and the axes of inputs steer these, so tracing does not look into them.
for _function in ("_thirds", "_projected", "_attend"):
    fx.wrap(_function)

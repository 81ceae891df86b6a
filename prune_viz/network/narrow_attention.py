"""torchvision's attention in forms that call every layer they use, and run with any number of heads.

torchvision's own forward passes take a width from their input, or use weights of layers without calling them.
These compute the same, and their parameters have the same names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

_APART = -100.0  # added where tokens of a shifted window were no neighbours before the shift
_LARGEST_SCALE = math.log(100.0)


class NarrowRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc]
    """MaxViT's attention with heads that need not be as wide together as what it reads."""

    WRITTEN_BY = "to_qkv"

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the third axis of maps, shape (B, groups, positions, channels)."""
        queries, keys, values = _by_head(self.to_qkv(x), self.n_heads)
        places = self.get_relative_positional_bias()
        maps = F.scaled_dot_product_attention(queries, keys, values, places, scale=self.scale_factor)
        merged: Tensor = self.merge(maps.transpose(-3, -2).flatten(-2))
        return merged


class NarrowWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Swin's attention within windows."""

    WRITTEN_BY = "qkv"

    def forward(self, x: Tensor) -> Tensor:
        """Attend within the windows of maps, shape (B, height, width, channels)."""
        windows = _windows(x, self.window_size, self.shift_size)
        queries, keys, values = self._heads(windows)
        scores = self._scores(queries, keys) + self.get_relative_position_bias()
        scores = _mask_shifted(scores, x, self.window_size, self.shift_size)
        weights = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
        maps = self.proj((weights @ values).transpose(-3, -2).flatten(-2))
        maps = F.dropout(maps, self.dropout, self.training)
        together: Tensor = _together(maps, x, self.window_size, self.shift_size)
        return together

    def _heads(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _by_head(self.qkv(windows), self.num_heads)

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        return _products(queries * queries.shape[-1] ** -0.5, keys)


class NarrowWindowAttentionV2(NarrowWindowAttention, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Swin v2's attention within windows: by cosines, each head at a scale of its own."""

    def _heads(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.qkv(windows)
        if self.qkv.bias is not None:
            packed = packed - _of_keys(self.qkv.bias)  # keys have no bias
        return _by_head(packed, self.num_heads)

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        scale: Tensor = self.logit_scale.clamp(max=_LARGEST_SCALE).exp()
        return _products(F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)) * scale


def _by_head(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each shape (..., heads, positions, channels of a head)."""
    queries, keys, values = torch.unflatten(packed, -1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    return queries, keys, values


def _of_keys(packed: Tensor) -> Tensor:
    """The middle third of a vector, with zeros for the rest."""
    return packed.new_tensor([0.0, 1.0, 0.0]).repeat_interleave(len(packed) // 3) * packed


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-2, -1)


def _padded(maps: Tensor, window: Sequence[int]) -> tuple[int, int]:
    """Height and width of maps, shape (B, height, width, channels), filled up to whole windows."""
    height, width = (-(-extent // size) * size for extent, size in zip(maps.shape[1:3], window, strict=True))
    return height, width


def _shifts(maps: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """By how much windows are shifted; not along an axis on which there is only one."""
    down, right = (
        0 if size >= extent else by
        for size, extent, by in zip(window, _padded(maps, window), shift, strict=True)
    )
    return down, right


def _windows(maps: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The windows of maps, shape (B * windows, positions, channels)."""
    height, width = _padded(maps, window)
    filled = F.pad(maps, (0, 0, 0, width - maps.shape[2], 0, height - maps.shape[1]))
    down, right = _shifts(maps, window, shift)
    rows = torch.unflatten(filled.roll((-down, -right), (1, 2)), 1, (-1, window[0]))
    tiles = torch.unflatten(rows, 3, (-1, window[1]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _together(windows: Tensor, maps: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """What `_windows` made of maps, with values of their own: maps of the size of those."""
    height, width = _padded(maps, window)
    down, right = _shifts(maps, window, shift)
    tiles = torch.unflatten(windows, 0, (-1, height // window[0], width // window[1]))
    shifted = torch.unflatten(tiles, 3, tuple(window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    whole = shifted.roll((down, right), (1, 2))
    return whole[:, : maps.shape[1], : maps.shape[2]].contiguous()


def _mask_shifted(scores: Tensor, maps: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Keep tokens apart that only the shift has brought into one window; scores by window and head."""
    down, right = _shifts(maps, window, shift)
    if down == right == 0:
        return scores
    height, width = _padded(maps, window)
    region = _part(height, window[0], down)[:, None] * 3 + _part(width, window[1], right)
    parts = _windows(region[None, :, :, None].to(scores.device), window, (0, 0))[..., 0]
    apart = (parts[:, None, :] != parts[:, :, None]).to(scores.dtype) * _APART
    by_picture = torch.unflatten(scores, 0, (-1, len(parts))) + apart[:, None]
    return by_picture.flatten(0, 1)


def _part(extent: int, window: int, shift: int) -> Tensor:
    """Which of three stretches each place of an axis lies in after the shift."""
    places = torch.arange(extent)
    return (places >= extent - window).long() + (places >= extent - shift).long()


_STEERED_BY_SIZES = ("_windows", "_together", "_mask_shifted", "_by_head", "_of_keys")
for _function in _STEERED_BY_SIZES:  # tracing does not look into them
    fx.wrap(_function)

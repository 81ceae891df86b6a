"""Attention of torchvision's that runs with fewer heads than it was built with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention


class NarrowRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc]
    """MaxViT's attention with heads that need not be as wide together as what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the third axis of maps, shape (B, groups, positions, channels)."""
        heads = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        queries, keys, values = heads.movedim(-3, 0).transpose(-3, -2)  # each with positions behind heads
        places = self.get_relative_positional_bias()
        maps = F.scaled_dot_product_attention(queries, keys, values, places, scale=self.scale_factor)
        merged: Tensor = self.merge(maps.transpose(-3, -2).flatten(-2))
        return merged

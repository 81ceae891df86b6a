"""torchvision's attention in forms whose heads can go: they compute the same, and heads go exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from marks import slow
from networks import mask_without
from torch import Tensor, fx, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import prune_viz as pv
from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import group_of_layer
from prune_viz.loading.smaller_networks import resize_to
from prune_viz.network.attention_heads import narrow_attention
from prune_viz.network.copies import free_copy


def _disturbed(module: nn.Module) -> nn.Module:
    """A module in eval mode, none of whose parameters is zero or one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize(
    ("window", "shift", "size"),
    [
        ((4, 4), (2, 2), (8, 12)),
        ((4, 4), (0, 0), (8, 8)),
        ((4, 3), (2, 1), (10, 11)),  # which are no whole windows
        ((4, 4), (2, 2), (4, 3)),  # of which there is one
        ((4, 4), (2, 2), (3, 20)),  # which are shifted along one axis
    ],
)
def test_window_attention_computes_the_same(
    kind: Any, has_bias: bool, window: tuple[int, int], shift: tuple[int, int], size: tuple[int, int]
) -> None:
    attention = _disturbed(kind(12, list(window), list(shift), 3, qkv_bias=has_bias))
    twin = free_copy(attention)
    assert type(twin) is not kind
    maps = _images(2, *size, 12)
    torch.testing.assert_close(twin(maps), attention(maps))
    torch.testing.assert_close(fx.symbolic_trace(twin)(maps), attention(maps))
    assert list(twin.state_dict()) == list(attention.state_dict())


def test_attention_over_places_computes_the_same() -> None:
    attention = _disturbed(RelativePositionalMultiHeadAttention(12, 4, 9))
    maps = _images(2, 5, 9, 12)
    torch.testing.assert_close(free_copy(attention)(maps), attention(maps))


def test_dropout_in_attention_is_kept() -> None:
    attention = ShiftedWindowAttention(12, [4, 4], [2, 2], 3, attention_dropout=0.5, dropout=0.5)
    twin, maps = free_copy(attention), _images(1, 8, 8, 12)
    for one in (attention, twin):
        one.eval()
    torch.testing.assert_close(twin(maps), attention(maps))
    twin.train()
    assert not torch.equal(twin(maps), twin(maps))


def test_the_model_itself_keeps_its_class() -> None:
    model = nn.Sequential(ShiftedWindowAttention(12, [4, 4], [0, 0], 3))
    free_copy(model)
    assert type(model[0]) is ShiftedWindowAttention
    narrow_attention(model)
    assert type(model[0]) is not ShiftedWindowAttention


def _swin(version: int) -> nn.Module:
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    return _disturbed(
        SwinTransformer([4, 4], 24, [2, 1], [2, 3], [4, 4], num_classes=3, **v2)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("version", [1, slow(2)])
def test_heads_of_windows_are_removed_exactly(version: int) -> None:
    model, images = _swin(version), _images(2, 3, 36, 44)
    groups = group_of_layer(find_groups(model, images[:1]))
    masks: dict[str, Tensor] = {}
    for block, heads in (("features.1.0", 2), ("features.1.1", 2), ("features.3.0", 3)):
        group = groups[f"{block}.attn.qkv"]
        assert (group.removable, group.are_heads, group.channels) == (True, True, heads)
        for places in group.producers:
            masks[places.module] = mask_without(
                len(places.indices), *places.indices[places.channels == 1].tolist()
            )
    masked = pv.apply_masks(copy.deepcopy(model), pv.reconcile_masks(model, masks, images[:1]))
    smaller = pv.remove_filters(model, masks, images[:1])
    torch.testing.assert_close(smaller(images), masked(images), rtol=1e-4, atol=1e-5)
    left = [smaller.get_submodule(f"features.{place}.attn").num_heads for place in ("1.0", "1.1", "3.0")]
    assert left == [1, 1, 2]
    again = copy.deepcopy(model)  # as the architecture is built again for a file of the smaller network
    resize_to(again, masks, smaller.state_dict())
    torch.testing.assert_close(again(images), smaller(images))

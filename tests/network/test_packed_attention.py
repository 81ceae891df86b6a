"""Torch's own attention with a layer of its own for queries, keys and values."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import prune_viz as pv
from prune_viz.loading.smaller_networks import resize_to
from prune_viz.network.attention_heads import narrow_attention
from prune_viz.network.copies import free_copy, opened
from prune_viz.network.packed_attention import PackedAttention

LAYER = "layers.1.self_attn.in_proj"
TOKENS = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))


def _attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **options).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def _given(same: bool, batched: bool, batch_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; of 5 and 7 tokens, where they are not the same."""
    random = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        given = torch.randn(2, count, 12, generator=random)
        return given[0] if not batched else given if batch_first else given.transpose(0, 1)

    if same:
        one = tokens(5)
        return one, one, one
    return tokens(5), tokens(7), tokens(7)


def _masks(queries: int, keys: int, kind: str, rows: int) -> dict[str, Tensor]:
    """Masks over pairs and over keys that leave the first key to every query."""
    random = torch.Generator().manual_seed(2)
    over_pairs, over_keys = (
        torch.rand(*size, generator=random) < 0.3 for size in ((queries, keys), (2, keys))
    )
    over_pairs[:, 0] = over_keys[:, 0] = False
    over_keys = over_keys if rows else over_keys[0]
    if kind == "added":
        return {"attn_mask": over_pairs * -3.0, "key_padding_mask": over_keys * -2.0}
    if kind == "by head":
        return {"attn_mask": torch.randn(max(rows, 1) * 3, queries, keys, generator=random)}
    return {"attn_mask": over_pairs, "key_padding_mask": over_keys} if kind else {}


@pytest.mark.parametrize("kind", ["", "true", "added", "by head"])
@pytest.mark.parametrize("same", [True, False])
def test_packed_attention_computes_the_same(kind: str, same: bool) -> None:
    for batch_first, bias, batched, weights, average in product([True, False], repeat=5):
        attention = _attention(batch_first=batch_first, bias=bias)
        twin = free_copy(attention)
        assert type(twin) is PackedAttention
        given = _given(same, batched, batch_first)
        asked = {
            "need_weights": weights, "average_attn_weights": average,
            **_masks(5, 5 if same else 7, kind, 2 if batched else 0),
        }  # fmt: skip
        for one, other in zip(twin(*given, **asked), attention(*given, **asked), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_encoder_computes_the_same_with_packed_attention() -> None:
    encoder, padding = _encoder(), torch.arange(7).expand(2, 7) > 4
    twin, called = free_copy(encoder), []
    twin.get_submodule(LAYER).register_forward_hook(lambda *_: called.append(LAYER))
    with torch.no_grad():  # torch takes its fast path
        torch.testing.assert_close(twin(TOKENS), encoder(TOKENS))
        padded = [one(TOKENS, src_key_padding_mask=padding)[:, :5] for one in (twin, encoder)]
    torch.testing.assert_close(*padded)
    assert len(called) == 2


def test_packed_attention_can_be_traced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = _attention(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x)[0]
            return y + self.attention(x, y, y, need_weights=False)[0]

    block = Block()
    traced = fx.symbolic_trace(free_copy(block))
    torch.testing.assert_close(traced(TOKENS), block(TOKENS))
    assert "attention.in_proj" in {node.target for node in traced.graph.nodes}


def test_state_dicts_have_the_names_of_torchs_attention() -> None:
    encoder = _encoder()
    twin = free_copy(encoder)
    assert list(twin.state_dict()) == list(encoder.state_dict())
    assert f"{LAYER}.weight" in dict(twin.named_parameters())
    other = _encoder()
    nn.init.zeros_(other.layers[1].self_attn.in_proj_weight)
    twin.load_state_dict(other.state_dict())
    assert not twin.get_submodule(LAYER).weight.any()
    encoder.load_state_dict(twin.state_dict())
    assert not encoder.layers[1].self_attn.in_proj_weight.any()


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 5}])
def test_other_attention_stays_as_it_is(options: dict[str, Any]) -> None:
    assert type(free_copy(_attention(**options))) is nn.MultiheadAttention


def test_a_model_is_opened_only_where_it_must_be() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert opened(plain) is plain
    encoder = _encoder()
    shared = opened(encoder)
    weight = shared.get_submodule(LAYER).weight
    assert weight.data_ptr() == encoder.layers[1].self_attn.in_proj_weight.data_ptr()
    assert opened(shared) is shared


class _Reading(nn.Module):
    """Tokens of a picture, an encoder over them, and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.encoder, self.head = nn.Conv2d(3, 12, 4, stride=4), _encoder(), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(dim=1))


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
HEAD = f"encoder.{LAYER}"


def _without_a_head() -> dict[str, Tensor]:
    kept = torch.ones(3, 3, 4, dtype=torch.bool)
    kept[:, 1] = False
    return {HEAD: kept.flatten()}


def test_heads_of_torchs_attention_are_masked_and_removed_alike() -> None:
    model = _Reading()
    masks = pv.reconcile_masks(model, _without_a_head(), IMAGES)
    assert (masks.removed, masks.notes) == (12, [])
    smaller = pv.remove_filters(model, masks, IMAGES)
    assert smaller.encoder.layers[1].self_attn.num_heads == 2
    for mask in (pv.apply_masks, pv.prune_with_torch):
        masked = mask(copy.deepcopy(model), masks)
        torch.testing.assert_close(masked(IMAGES), smaller(IMAGES), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(masked(IMAGES), model(IMAGES), rtol=1e-2)
        again = pv.remove_filters(masked, masks, IMAGES)  # what lies over its parameters goes with them
        torch.testing.assert_close(again(IMAGES), smaller(IMAGES), rtol=1e-4, atol=1e-5)
        pv.make_permanent(masked)
        assert masked.state_dict().keys() == model.state_dict().keys()
    assert type(model.encoder.layers[1].self_attn) is nn.MultiheadAttention


def test_a_smaller_encoder_is_built_again() -> None:
    model = _Reading()
    smaller = pv.remove_filters(model, _without_a_head(), IMAGES)
    assert list(smaller.state_dict()) == list(model.state_dict())
    narrow_attention(model)
    resize_to(model, _without_a_head(), smaller.state_dict())
    torch.testing.assert_close(model(IMAGES), smaller(IMAGES))


def test_other_tools_find_the_masks_at_torchs_attention() -> None:
    model = _Reading()
    found = pv.to_nni(model, pv.reconcile_masks(model, _without_a_head(), IMAGES))
    attention = found["encoder.layers.1.self_attn"]
    assert {name: int((1 - mask).sum()) for name, mask in attention.items()} == {
        "in_proj_weight": 144, "in_proj_bias": 12,
    }  # fmt: skip

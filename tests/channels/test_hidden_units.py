"""Hidden units of linear layers: which can go, and that removing them is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from networks import mask_without
from torch import Tensor, nn

from prune_viz.channels.coupling import build_graph, find_groups
from prune_viz.channels.groups import group_of_layer, hidden_layers
from prune_viz.network.copies import opened
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.remove import remove_filters

INPUTS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, a norm, and two linear layers over channels; perhaps a response norm."""

    def __init__(self, channels: int = 8, responses: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels))
        self.responses = responses

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc1(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        if self.responses:  # ConvNeXt v2's global response normalisation
            size = y.norm(dim=(1, 2), keepdim=True)
            y = y * size / (size.mean(dim=-1, keepdim=True) + 1e-6)
        return x + (self.scale * self.fc2(y)).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Torch's attention and an MLP, of one linear layer or of two that gate each other."""

    def __init__(self, gated: str = "", weights: str = "") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.up = nn.Linear(8, 32 if gated == "packed" else 16), nn.Linear(8, 16)
        self.down, self.gated, self.weights = nn.Linear(16, 8), gated, weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        maps, weights = self.attention(y, y, y, need_weights=bool(self.weights))
        x = x + maps
        if self.weights == "read":
            x = weights @ x
        y = self.norm2(x)
        if self.gated == "packed":
            y = F.glu(self.gate(y), -1)
        elif self.gated:
            y = F.silu(self.gate(y)) * self.up(y)
        else:
            y = F.gelu(self.up(y))
        return x + self.down(y)


class HeadedBlock(nn.Module):
    """Attention by packed queries, keys and values, or by three layers, whose heads are an attribute."""

    def __init__(self, packed: bool = True, norms: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 3, 12
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(12, 8)
        self.written = nn.ModuleList([nn.Linear(8, 36)] if packed else [nn.Linear(8, 12) for _ in range(3)])
        self.bias = nn.Parameter(torch.rand(4, 17, 17))
        self.norms = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)] if norms else [])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        heads = torch.cat([layer(y) for layer in self.written], -1)
        heads = heads.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        y = F.scaled_dot_product_attention(q, k, v, self.bias)
        return x + self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class CrossBlock(nn.Module):
    """Torch's attention from tokens to their half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y[:, ::2], y[:, ::2])[0]


class FixedHeads(HeadedBlock):
    """Attention that takes its width from its input, as many write it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.written[0](x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(*x.shape[:2], x.shape[-1] * 3 // 2))


class Tokens(nn.Module):
    """Patches as tokens, with a class token and places, and blocks between."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token, self.places = nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(1, 17, 8))
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.blocks(x)[:, 0])


class MixerBlock(nn.Module):
    """An MLP over tokens, and one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.token1, self.token2 = nn.Linear(17, 12), nn.Linear(12, 17)
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token2(F.gelu(self.token1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Excited(nn.Module):
    """Squeeze and excitation by linear layers, and a classifier of three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.mlp = nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))[:, :, None, None]
        return self.mlp(F.relu(self.next(x)).mean(dim=(2, 3)))


def _convnext(responses: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, stride=2),
        ConvNeXtBlock(responses=responses),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


TORCH_HEADS = "blocks.0.attention.in_proj"
CASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {  # and the linear layers whose units can go
    "ConvNeXt": (lambda: _convnext(False), {"1.fc1"}),
    "response norm": (lambda: _convnext(True), set()),
    "transformer": (lambda: Tokens(TransformerBlock()), {TORCH_HEADS, "blocks.0.up"}),
    "gated": (lambda: Tokens(TransformerBlock("apart")), {TORCH_HEADS, "blocks.0.gate", "blocks.0.up"}),
    "packed gates": (lambda: Tokens(TransformerBlock("packed")), {TORCH_HEADS, "blocks.0.gate"}),
    "weights of attention": (lambda: Tokens(TransformerBlock(weights="given")), {TORCH_HEADS, "blocks.0.up"}),
    "weights that are read": (lambda: Tokens(TransformerBlock(weights="read")), {"blocks.0.up"}),
    "mixer": (lambda: Tokens(MixerBlock()), {"blocks.0.fc1"}),
    "heads": (lambda: Tokens(HeadedBlock()), {"blocks.0.written.0"}),
    "heads of three layers": (
        lambda: Tokens(HeadedBlock(packed=False)),
        {f"blocks.0.written.{number}" for number in range(3)},
    ),
    "heads behind norms": (lambda: Tokens(HeadedBlock(norms=True)), set()),
    "heads of a fixed width": (lambda: Tokens(FixedHeads()), set()),
    "excitation and classifier": (Excited, {"down", "up", "mlp.0", "mlp.3"}),
}


SLOW = ("gated", "mixer", "response norm")


@pytest.mark.parametrize("name", [slow(one) if one in SLOW else one for one in CASES])
def test_hidden_units_are_found_and_removed_exactly(name: str) -> None:
    torch.manual_seed(0)
    make, expected = CASES[name]
    model = make().eval()
    groups = find_groups(model, INPUTS[:1])
    assert set(hidden_layers(opened(model), groups)) == expected
    masks = {}
    for group in groups:
        for places in group.producers if group.removable else ():
            chosen = torch.from_numpy(places.channels) % 3 != 1
            masks[places.module] = chosen[torch.from_numpy(places.indices).argsort()]
    masked = apply_masks(copy.deepcopy(model), reconcile_masks(model, masks, INPUTS))
    smaller = remove_filters(model, masks, INPUTS)
    torch.testing.assert_close(smaller(INPUTS), masked(INPUTS), rtol=1e-4, atol=1e-5)
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (smaller, model)]
    assert sizes[0] < sizes[1] or not expected


def test_heads_go_whole() -> None:
    model = Tokens(HeadedBlock()).eval()
    group = group_of_layer(find_groups(model, INPUTS))["blocks.0.written.0"]
    assert (group.channels, group.are_heads) == (4, True)
    rows = [[part * 12 + 3 + place for part in range(3) for place in range(3)]]
    assert [places.table(4)[1].tolist() for places in group.producers] == rows
    assert [places.table(4)[1].tolist() for places in group.consumers] == [[3, 4, 5]]
    bias = next(places for places in group.axes if places.tensor == "blocks.0.bias")
    assert (bias.axis, bias.channels.tolist()) == (0, [0, 1, 2, 3])
    masks = {"blocks.0.written.0": torch.ones(36, dtype=torch.bool)}
    masks["blocks.0.written.0"][rows[0]] = False
    block = remove_filters(model, masks, INPUTS).blocks[0]
    assert (block.num_heads, block.head_dim, block.attn_dim) == (3, 3, 9)
    assert model.blocks[0].num_heads == 4


def test_heads_that_stay_say_why() -> None:
    notes = {
        name: group_of_layer(find_groups(CASES[name][0]().eval(), INPUTS)).get("blocks.0.written.0")
        for name in ("heads behind norms", "heads of a fixed width")
    }
    assert notes == {"heads behind norms": None, "heads of a fixed width": None}
    kept = {name: build_graph(CASES[name][0]().eval(), INPUTS).kept_linear for name in notes}
    assert "layer norm" in kept["heads behind norms"]["blocks.0.written.0"]
    assert "does not run without some" in kept["heads of a fixed width"]["blocks.0.written.0"]
    crossed = build_graph(Tokens(CrossBlock()).eval(), INPUTS).kept_linear
    assert "without calling it" in crossed["blocks.0.attention.in_proj"]
    weighed = build_graph(CASES["weights that are read"][0]().eval(), INPUTS).kept_linear
    assert "mixes its channels" in weighed[TORCH_HEADS]


def test_gates_go_with_what_they_gate() -> None:
    groups = group_of_layer(find_groups(Tokens(TransformerBlock("apart")).eval(), INPUTS[:1]))
    assert groups["blocks.0.gate"] is groups["blocks.0.up"]
    (packed,) = group_of_layer(find_groups(Tokens(TransformerBlock("packed")).eval(), INPUTS[:1]))[
        "blocks.0.gate"
    ].producers
    assert packed.table(16)[3].tolist() == [3, 19]


def test_outputs_of_a_classifier_are_no_hidden_units() -> None:
    model = Excited().eval()
    with pytest.warns(UserWarning, match="mlp.5: all its filters are kept, since they are no hidden units"):
        masks = reconcile_masks(model, {"mlp.5": mask_without(5, 0)}, INPUTS)
    assert masks["mlp.5"].all()

"""Random networks built of the blocks that networks have, and whether what is removed from them is exact."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.copies import opened
from prune_viz.network.layer_kinds import count_outputs
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.consistency import reconcile_with_groups
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.nested_tensors import tensors_of

SIZE = 16  # of the inputs, both ways


class Residual(nn.Module):
    """A block whose input is added to its output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return x + self.block(x)


class Branches(nn.Module):
    """Blocks side by side, their outputs put together."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Halves(nn.Module):
    """One half of the channels passes a block, the other does not, as in ShuffleNet and CSP networks."""

    def __init__(self, block: nn.Module, how: str) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        half = x.shape[1] // 2
        one, two = x.chunk(2, 1) if self.how == "chunk" else (x[:, :half], x[:, half:])
        return torch.cat([one, self.block(two)], dim=1)


class Shuffle(nn.Module):
    """Channels of groups, in turns."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class SqueezeExcitation(nn.Module):
    """A gate for every channel, from the mean of all."""

    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        inner = max(channels // 2, 2)
        make: Callable[..., nn.Module] = nn.Linear if linear else (lambda a, b: nn.Conv2d(a, b, 1))
        self.down, self.up, self.linear = make(channels, inner), make(inner, channels), linear

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        mean = x.mean(dim=(2, 3)) if self.linear else x.mean(dim=(2, 3), keepdim=True)
        gate = torch.sigmoid(self.up(F.relu(self.down(mean))))
        return x * (gate[:, :, None, None] if self.linear else gate)


class Attention(nn.Module):
    """Attention over positions, with queries, keys and values of one convolution."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = (
            nn.Conv2d(channels, 3 * channels, 1),
            nn.Conv2d(channels, channels, 1),
            heads,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        weights = (q.transpose(-2, -1) @ k * (c // self.heads) ** -0.5).softmax(dim=-1)
        return self.out((v @ weights.transpose(-2, -1)).reshape(b, c, h, w))


class Heads(nn.Module):
    """Attention over positions whose heads are as many as an attribute says, and as wide as another does.

    Queries, keys and values come from three layers (`packed` 0), or from one that writes all queries
    first (1), or all of the first head (2).
    """

    def __init__(self, channels: int, heads: int, width: int, packed: int, linear: bool) -> None:
        super().__init__()
        make: Any = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.num_heads, self.width, self.linear, self.packed = heads, width, linear, packed
        inner = heads * width
        sizes = [3 * inner] if packed else [inner] * 3
        self.written = nn.ModuleList([make(channels, size) for size in sizes])
        self.out = make(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        maps = x.permute(0, 2, 3, 1) if self.linear else x
        made = [layer(maps) for layer in self.written]
        rows = torch.cat(made, -1).flatten(1, 2) if self.linear else torch.cat(made, 1).flatten(2).mT
        if self.packed == 2:  # by heads first
            heads = rows.reshape(*rows.shape[:2], self.num_heads, 3, self.width).transpose(2, 3)
        else:
            heads = rows.reshape(*rows.shape[:2], 3, self.num_heads, self.width)
        q, k, v = heads.transpose(1, 3).unbind(2)
        maps = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        maps = maps.view(len(x), *x.shape[2:], -1)
        return self.out(maps).permute(0, 3, 1, 2) if self.linear else self.out(maps.permute(0, 3, 1, 2))


class TorchHeads(nn.Module):
    """Torch's own attention over positions, whose weights are given too (1), or that reads fewer keys (2)."""

    def __init__(self, channels: int, heads: int, batch_first: bool, kind: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=batch_first)
        self.batch_first, self.kind = batch_first, kind

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        rows = x.flatten(2).transpose(1, 2) if self.batch_first else x.flatten(2).permute(2, 0, 1)
        keys = rows.narrow(1 if self.batch_first else 0, 0, 4) if self.kind == 2 else rows
        maps, _ = self.attention(rows, keys, keys, need_weights=self.kind == 1)
        return (maps.transpose(1, 2) if self.batch_first else maps.permute(1, 2, 0)).reshape(x.shape)


class Windows(nn.Module):
    """Attention of Swin within windows, shifted or not."""

    def __init__(self, channels: int, heads: int, shift: int, version: int) -> None:
        super().__init__()
        kind = ShiftedWindowAttention if version == 1 else ShiftedWindowAttentionV2
        self.attention = kind(channels, [4, 4], [shift, shift], heads)

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return self.attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """One block that is called two times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return self.block(self.block(x))


class Tied(nn.Module):
    """A convolution, and a transposed one with the same weight."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.ConvTranspose2d(inner, channels, 3, padding=1),
        )
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return self.up(F.relu(self.down(x)))


class Function(nn.Module):
    """What works without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return self.function(x)


class Written(nn.Module):
    """A slice at a fixed place is written over."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        x = x.clone()
        x[:, : self.channels] = x[:, : self.channels].sigmoid()
        return x


class Perceptron(nn.Module):
    """Two linear layers over the channels of every position, perhaps gated, perhaps behind a layer norm."""

    def __init__(self, channels: int, inner: int, gated: bool, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if normed else nn.Identity()
        self.up, self.gate = nn.Linear(channels, inner), nn.Linear(channels, inner) if gated else None
        self.down = nn.Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        x = self.norm(x.permute(0, 2, 3, 1))
        y = F.gelu(self.up(x))
        return self.down(y if self.gate is None else y * self.gate(x)).permute(0, 3, 1, 2)


class RandomNetwork(nn.Module):
    """A stem, random blocks, and a head.

    Parameters
    ----------
    seed : int
        All that is random follows from it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        torch.manual_seed(seed)
        width = self._random.choice([8, 12, 16])
        blocks, channels = [self._conv(3, width)], width
        for _ in range(self._random.randint(2, 5)):
            block, channels = self._block(channels, depth=2)
            blocks.append(block)
        self.blocks = nn.Sequential(*blocks)
        self.head = self._head(channels)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, low in (
                    ("running_mean", -0.3),
                    ("running_var", 0.5),
                    ("weight", 0.5),
                    ("bias", -0.2),
                ):
                    getattr(module, name).data.uniform_(low, low + 1.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Maps from maps."""
        return self.head(self.blocks(x))

    def _head(self, channels: int) -> nn.Module:
        """Scores by a linear layer, or maps."""
        kind = self._random.choice(["mean", "flatten", "maps"])
        if kind == "maps":
            return nn.Conv2d(channels, 3, 1)
        if kind == "mean":
            last = [nn.Linear(channels, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5)]
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *last)
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5))

    def _conv(self, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
        """A convolution with a norm and an activation, or without."""
        size = self._random.choice([1, 3])
        layers: list[nn.Module] = [
            nn.Conv2d(
                inputs, outputs, size, padding=size // 2, groups=groups, bias=self._random.random() < 0.5
            )
        ]
        norm = self._random.choice(["batch", "batch", "none", "instance", "group"])
        if norm == "batch":
            layers.append(nn.BatchNorm2d(outputs))
        elif norm == "instance":
            layers.append(nn.InstanceNorm2d(outputs, affine=self._random.random() < 0.5))
        elif norm == "group" and self._random.random() < 0.3:
            layers.append(nn.GroupNorm(2, outputs))
        layers.append(
            self._random.choice(
                [nn.ReLU(inplace=True), nn.ReLU(), nn.SiLU(), nn.PReLU(outputs), nn.Identity()]
            )
        )
        return nn.Sequential(*layers)

    def _same(self, channels: int, depth: int) -> nn.Module:
        """A block that leaves the number of channels as it is."""
        inner = self._random.choice([4, 8, 12])
        kinds: list[Callable[[], nn.Module]] = [
            lambda: self._conv(channels, channels),
            lambda: nn.Sequential(self._conv(channels, inner), self._conv(inner, channels)),
            lambda: SqueezeExcitation(channels, self._random.random() < 0.5),
            lambda: nn.Sequential(self._conv(channels, channels, channels), nn.Conv2d(channels, channels, 1)),
            lambda: Perceptron(channels, inner, self._random.random() < 0.3, self._random.random() < 0.3),
            lambda: self._conv(channels, channels, 2),
            lambda: nn.Sequential(*(self._conv(channels, channels, 4), Shuffle(4)) * 2),
            lambda: Twice(self._conv(channels, channels)),
            lambda: Attention(channels, self._random.choice([1, 2])),
            lambda: Heads(
                channels,
                *self._random.choice([(2, 3), (4, 2), (3, 1)]),
                self._random.randrange(3),
                self._random.random() < 0.5,
            ),
            lambda: TorchHeads(
                channels, *self._random.choice([(2, True), (4, False)]), self._random.randrange(3)
            ),
            lambda: Windows(channels, *self._random.choice([(2, 0, 1), (4, 2, 1), (2, 2, 2)])),
            lambda: Tied(channels, inner),
            lambda: nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GLU(1)),
            lambda: Shuffle(2),
            lambda: Function(lambda x: F.avg_pool2d(x, 3, 1, 1)),
            lambda: Function(F.hardswish),
            lambda: Written(2),
            lambda: Function(lambda x: x - x.mean(dim=1, keepdim=True)),
            lambda: Function(lambda x: x.view(-1, channels, *x.shape[2:])),
        ]  # fmt: skip
        if depth:
            kinds += 3 * [lambda: Residual(self._same(channels, depth - 1))]
            kinds += 2 * [lambda: self._halves(channels, depth - 1)]
        return self._random.choice(kinds if channels % 8 == 0 else kinds[:5])()

    def _halves(self, channels: int, depth: int) -> nn.Module:
        return Halves(self._same(channels // 2, depth), self._random.choice(["chunk", "slice"]))

    def _block(self, channels: int, depth: int) -> tuple[nn.Module, int]:
        """A block, and how many channels come out of it."""
        outputs = self._random.choice([8, 16, 24])
        kind = self._random.choice(["same", "same", "same", "conv", "branches", "shuffle", "transposed"])
        if kind == "same":
            return self._same(channels, depth), channels
        if kind == "branches":
            parts = [self._conv(channels, outputs) for _ in range(self._random.randint(1, 2))]
            keep = self._random.random() < 0.5
            return Branches(*parts, *([nn.Identity()] if keep else [])), len(
                parts
            ) * outputs + keep * channels
        if kind == "shuffle":
            return nn.Sequential(
                nn.Conv2d(channels, 4 * outputs, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)
            ), outputs
        if kind == "transposed":
            return nn.Sequential(
                nn.ConvTranspose2d(channels, outputs, 2, stride=2), nn.MaxPool2d(2), nn.ReLU()
            ), outputs
        return self._conv(channels, outputs), outputs


def try_removal(model: nn.Module, inputs: Tensor, seed: int) -> tuple[int, int, float]:
    """Remove random channels of every group that may lose some, and compare with masking them.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode.
    inputs : Tensor, shape (B, C, *size)
        What it is run on.
    seed : int
        Of the channels that go.

    Returns
    -------
    removable, filters : int
        How many of the filters may go, and how many there are.
    difference : float
        Largest difference of the outputs, relative to the largest output.
    """
    chosen = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = find_groups(model, inputs[:1])
        masks = _random_masks(model, groups, chosen)
        masked = apply_masks(copy.deepcopy(model), reconcile_with_groups(model, masks, groups)).double()
        smaller = remove_filters(model, masks, inputs[:1]).double()
    with torch.no_grad():
        pairs = zip(tensors_of(masked(inputs.double())), tensors_of(smaller(inputs.double())), strict=True)
        difference = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in pairs)
    counts = [(sum(len(places.indices) for places in group.producers), group.removable) for group in groups]
    return sum(count for count, may in counts if may), sum(count for count, _ in counts), difference


def _random_masks(model: nn.Module, groups: list[CouplingGroup], chosen: random.Random) -> dict[str, Tensor]:
    modules: dict[str, Any] = dict(opened(model).named_modules())
    masks = {}
    for group in groups:
        gone = set(chosen.sample(range(group.channels), chosen.randint(0, group.channels - 1)))
        for places in group.producers if group.removable else ():
            mask = torch.ones(count_outputs(modules[places.module]), dtype=torch.bool)
            lost = [
                i for i, c in zip(places.indices.tolist(), places.channels.tolist(), strict=True) if c in gone
            ]
            mask[lost[: len(mask) - 1]] = False  # a layer keeps a filter
            masks[places.module] = mask
    return masks


def try_random(seed: int) -> tuple[int, int, float]:
    """`try_removal` on the random network of a seed."""
    model = RandomNetwork(seed)
    return try_removal(model, torch.randn(2, 3, SIZE, SIZE), seed)

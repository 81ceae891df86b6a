"""Networks after public bug reports about removal, and which of their layers cannot be made smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 16, 16)


class Attention(nn.Module):
    """Attention over positions, with heads and queries cut out of one convolution, beside a depthwise one."""

    def __init__(self, unbound: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.qkv = nn.Conv2d(16, 48 if unbound else 32, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.projection = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 4, 1)
        self.unbound = unbound

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        b, _, h, w = x.shape
        if self.unbound:
            q, k, v = self.qkv(x).reshape(b, 3, 4, 4, h * w).unbind(1)
        else:
            q, k, v = self.qkv(x).view(b, 2, 16, h * w).split([4, 4, 8], dim=2)
        weights = (q.transpose(-2, -1) @ k).softmax(dim=-1)
        mixed = (v @ weights.transpose(-2, -1)).reshape(b, 16, h, w)
        mixed = mixed + self.depthwise(v.reshape(b, 16, h, w))
        return self.last(x + self.projection(mixed)).mean(dim=(2, 3))


class Maxout(nn.Module):
    """The larger one, or the sum, of each two channels."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.summed = summed

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        b, c, h, w = x.shape
        pairs = x.view(b, c // 2, 2, h, w)
        return self.c2(pairs.sum(2) if self.summed else pairs.max(2)[0]).mean(dim=(2, 3))


class TiedAutoencoder(nn.Module):
    """Transposed convolutions that share the convolutions' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.e1, self.e2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.d2, self.d1 = nn.ConvTranspose2d(12, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.d2.weight, self.d1.weight = self.e2.weight, self.e1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d1(F.relu(self.d2(F.relu(self.e2(F.relu(self.e1(x)))))))


class Auxiliary(nn.Module):
    """A second head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.aux, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        aux = self.aux(x).mean(dim=(2, 3)) if self.training else None
        out = self.head(F.relu(self.body(x))).mean(dim=(2, 3))
        return out if aux is None else (out, aux)


class Between(nn.Module):
    """Two convolutions with something in between that may count on sizes, and two more behind it."""

    def __init__(self, between: Callable[[Tensor], Tensor], reads: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(reads, 8, 1)
        self.third = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.first(x)))
        return self.third(F.relu(self.second(x))).mean(dim=(2, 3))


class Buffered(nn.Module):
    """Multiplies by a buffer, or blurs by a fixed depthwise kernel."""

    def __init__(self, blurs: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 16, 1, 1))
        self.register_buffer("kernel", torch.ones(16, 1, 3, 3) / 9)
        self.blurs = blurs

    def forward(self, x: Tensor) -> Tensor:
        if self.blurs:
            return F.conv2d(x, self.kernel, padding=1, groups=x.shape[1])
        return x * self.scale


class FrozenNorm(nn.Module):
    """A batch norm with fixed statistics, as detection networks have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class Gated(nn.Module):
    """Many channels times a map of one."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.m, self.c2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 1, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.c1(x)) * torch.sigmoid(self.m(x))).mean(dim=(2, 3))


class Frozen(nn.Module):
    """Its first part runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.c1(x))
        return self.c3(F.relu(self.c2(x))).mean(dim=(2, 3))


class ListOfChunks(nn.Module):
    """A block as YOLOv8 has it: halves, a bottleneck of one of them, all side by side, and then SPPF."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = nn.Conv2d(3, 16, 1), nn.Conv2d(24, 12, 1)
        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.sppf1, self.sppf2 = nn.Conv2d(12, 6, 1), nn.Conv2d(24, 8, 1)
        self.pool, self.head = nn.MaxPool2d(5, 1, 2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).relu().chunk(2, 1))
        parts.append(parts[-1] + self.outer(self.inner(parts[-1]).relu()))
        x = self.sppf1(self.cv2(torch.cat(parts, 1)).relu()).relu()
        pooled = [x]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        return self.head(self.sppf2(torch.cat(pooled, 1)).relu()).mean(dim=(2, 3))


class WrittenInPart(nn.Module):
    """A slice at a fixed place is written over."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x).clone()
        x[:, :4] = torch.sigmoid(x[:, :4])
        return self.c2(x).mean(dim=(2, 3))


class Pyramid(nn.Module):
    """One head, with a norm for each of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 2, 1),
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = F.relu(self.stem(x))
        sizes = [F.avg_pool2d(maps, 2**level) if level else maps for level in range(3)]
        return [
            self.last(norm(self.head(one)).relu()).mean(dim=(2, 3))
            for one, norm in zip(sizes, self.norms, strict=True)
        ]


class SplitFixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(x, [8, 8], 1)
        return one * two


class UnevenSplit(nn.Module):
    """A quarter of the channels is doubled, as many as that are at each size."""

    def forward(self, x: Tensor) -> Tensor:
        quarter = x.shape[1] // 4
        one, rest = x.split([quarter, x.shape[1] - quarter], 1)
        return torch.cat([2 * one, rest], 1)


class SplitHalves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(x, x.shape[1] // 2, 1)
        return one * two.sigmoid()


class Shuffled(nn.Module):
    """Grouped convolutions with a shuffle between them, as ShuffleNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 16, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        b, c, h, w = x.shape
        return self.two(x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w))


torch.manual_seed(0)
REPORTED: dict[str, tuple[nn.Module, set[str]]] = {  # a network, and its layers that stay whole
    "attention": (Attention(), {"qkv", "depthwise", "last"}),
    "unbound attention": (Attention(unbound=True), {"qkv", "depthwise", "last"}),
    "maxout": (Maxout(summed=False), {"c1", "c2"}),
    "summed pairs": (Maxout(summed=True), {"c1", "c2"}),
    "tied weights": (TiedAutoencoder(), {"e1", "e2", "d1", "d2"}),
    "head in training": (Auxiliary(), {"aux", "head"}),
    "buffer": (Between(Buffered(blurs=False)), {"third"}),
    "fixed blur": (Between(Buffered(blurs=True)), {"third"}),
    "fixed view": (Between(lambda x: x.reshape(-1, 16, 16, 16)), {"first", "third"}),
    "fixed split": (Between(SplitFixed(), 8), {"first", "third"}),
    "split in halves": (Between(SplitHalves(), 8), {"third"}),
    "frozen norm": (Between(FrozenNorm(16)), {"third"}),
    "gate of one map": (Gated(), {"m", "c2"}),
    "part without gradients": (Frozen(), {"c3"}),
    "dropout that is always on": (Between(F.dropout), {"third"}),
    "instance norm": (Between(nn.InstanceNorm2d(16)), {"third"}),
    "halves and SPPF": (ListOfChunks(), {"head"}),
    "written in part": (WrittenInPart(), {"c1", "c2"}),
    "one head at three sizes": (Pyramid(), {"last"}),
    "pixel shuffle": (Between(nn.PixelShuffle(2), 4), {"third"}),
    "gated linear unit": (Between(lambda x: F.glu(x, 1), 8), {"third"}),
    "shuffle": (Between(Shuffled()), {"third"}),
    "grouped": (Between(nn.Conv2d(16, 24, 3, padding=1, groups=4), 24), {"third"}),
    "a quarter and the rest": (Between(UnevenSplit()), {"first", "third"}),
    "both signs": (Between(lambda x: torch.cat([x, (1 - x).relu()], 1), 32), {"first", "third"}),
}

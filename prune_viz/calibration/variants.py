"""Copies of images, shifted and, of photographs, mirrored and enlarged, as natural images come too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_viz.feature_visualization.optimiser import roll
from prune_viz.feature_visualization.priors import are_photographs
from prune_viz.network.inputs import InputStatistics

JITTER = 1 / 16  # of the size, each way
VARIANTS = 16  # shifted and, of photographs, mirrored and enlarged copies of each calibration image
ENLARGED = 1.25


def shifted(images: Tensor, random: torch.Generator, mirror: bool) -> tuple[Tensor, Tensor]:
    """Shift each image around its canvas by up to `JITTER` of it, and mirror half of them if asked to.

    Parameters
    ----------
    images : Tensor, shape (B, C, *size)
        Images on any device.
    random : torch.Generator
        On the CPU.
    mirror : bool
        Whether half of them are mirrored, about.

    Returns
    -------
    Tensor, shape (B, C, *size)
        The images.
    Tensor of bool, shape (B,)
        Which of them are mirrored.
    """
    size = images.shape[2:]
    reaches = torch.tensor([max(1, int(side * JITTER)) for side in size])
    chance = 2 * torch.rand((len(images), len(size)), generator=random) - 1
    shifts = (chance * (reaches + 0.5)).round().long().clamp(-reaches, reaches)
    moved = roll(images, shifts.to(images.device))
    mirrored = torch.zeros(len(images), dtype=torch.bool)
    if mirror:
        mirrored = torch.rand(len(images), generator=random) < 0.5
        moved = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), moved.flip(-1), moved)
    return moved, mirrored


def variants(
    images: Tensor, enlarge: bool, seed: int = 0, statistics: InputStatistics | None = None
) -> Iterator[Tensor]:
    """Give `VARIANTS` copies of images, each shifted at random; of photographs, mirrored and enlarged too.

    Calibration shifts and mirrors alike as it goes, so that these feed the batch norms as well as the images
    themselves, and a deep layer, which sees few positions of each, gets samples enough for a regression.

    Parameters
    ----------
    images : Tensor, shape (N, C, *size)
        Calibration images.
    enlarge : bool
        Whether the network takes inputs `ENLARGED` times as large.
    seed : int
        Seed of the shifts.
    statistics : InputStatistics, optional
        What is known of the model's inputs: spectrograms are no photographs.

    Yields
    ------
    Tensor, shape (N, C, *size), or larger for some copies of photographs
    """
    random = torch.Generator().manual_seed(seed)
    photographs = are_photographs(images.shape[1:], statistics)
    for number in range(VARIANTS):
        moved, _ = shifted(images, random, photographs)
        if enlarge and photographs and number % 2:
            moved = F.interpolate(moved, size=enlarged(images.shape[2:]), mode="bicubic", antialias=True)
        yield moved


def enlarged(size: Sequence[int]) -> list[int]:
    """The size of enlarged calibration images."""
    return [round(ENLARGED * side) for side in size]

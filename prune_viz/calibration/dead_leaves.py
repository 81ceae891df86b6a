"""Dead leaves: opaque shapes of all sizes that hide each other, the simplest pictures with edges and objects.

Noise with a natural spectrum has no edge, no flat region and no object. Scenes are made of things that stand
before other things, with sizes that follow a power law; pictures made so share many of the statistics of
photographs (Lee, Mumford and Huang 2001), and networks trained on nothing else learn much of what photographs
teach (Baradad et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prune_viz.feature_visualization.priors import make_prior, scene_exponent
from prune_viz.network.inputs import InputStatistics

FEWEST, MOST = 4, 64  # leaves of a picture
SMALLEST, LARGEST = 0.05, 0.6  # a leaf's radius, of the picture's longest side; scarce as 1/r^3
STRETCH = 3.0  # the most that a leaf is longer or shorter than wide
TEXTURE = 0.6  # deviation of the noise on the roughest leaf, of a natural input's


def settings() -> list[object]:
    """What dead leaves depend on beside their arguments, for the key of calibration images."""
    return [FEWEST, MOST, SMALLEST, LARGEST, STRETCH, TEXTURE]


def dead_leaves(
    shape: Sequence[int], count: int, seed: int, statistics: InputStatistics | None = None
) -> Tensor:
    """Draw pictures of leaves: boxes and ellipsoids at random places, later ones before earlier ones.

    Each has one colour, of the natural prior's covariance, and a texture of natural noise, from none to
    `TEXTURE`; so has what is behind all of them. Pictures continue at their opposite edges. On two axes
    leaves are turned at random.

    Parameters
    ----------
    shape : sequence of int
        (C, *size), one to three axes.
    count : int
        How many pictures, each of `FEWEST` to `MOST` leaves.
    seed : int
        Of all that is drawn.
    statistics : InputStatistics, optional
        What is known of the model's inputs.

    Returns
    -------
    Tensor, shape (count, C, *size)
        In the model's own input units, as varied as natural inputs or, by the texture, somewhat more.
    """
    channels, *size = shape
    if not count:
        return torch.zeros(0, *shape)
    axes = len(size)
    random = torch.Generator().manual_seed(seed)
    exponent = scene_exponent(shape)
    prior = make_prior("natural", channels, tuple(size), statistics=statistics, exponent=exponent)
    noise = prior.colour(torch.randn(count, *shape, generator=random))
    # A constant picture is white noise of one frequency: coloured, it shows the channels' covariance alone.
    flat = make_prior("natural", channels, (1,) * axes, statistics=statistics)

    def drawn() -> Tensor:
        return torch.rand(count, generator=random)

    def colours() -> Tensor:
        return flat.colour(torch.randn(count, channels, *(1,) * axes, generator=random))

    def per_picture(values: Tensor) -> Tensor:
        return values.view(-1, 1, *(1,) * axes)

    leaves = (FEWEST * (MOST / FEWEST) ** drawn()).round()
    places = torch.meshgrid(*(torch.arange(extent, dtype=torch.float32) for extent in size), indexing="ij")
    pictures = colours() + per_picture(TEXTURE * drawn()) * noise
    for number in range(MOST):
        radius = (SMALLEST**-2 + (LARGEST**-2 - SMALLEST**-2) * drawn()) ** -0.5 * max(size)
        offsets = []
        for place, extent in zip(places, size, strict=True):
            offset = place - extent * per_picture(drawn())
            offsets.append((offset + extent / 2) % extent - extent / 2)
        if axes == 2:
            turn = math.pi * per_picture(drawn())
            across, along = offsets
            offsets = [turn.cos() * across - turn.sin() * along, turn.sin() * across + turn.cos() * along]
        reaches = [offset / per_picture(radius * STRETCH ** (drawn() - 0.5)) for offset in offsets]
        whole = torch.stack(reaches)
        box, ellipsoid = whole.abs().amax(dim=0), whole.square().sum(dim=0).sqrt()
        inside = torch.where(per_picture(drawn()) < 0.5, box, ellipsoid) < 1
        leaf = colours() + per_picture(TEXTURE * drawn()) * noise
        pictures = torch.where(inside & (number < per_picture(leaves)), leaf, pictures)
    return pictures

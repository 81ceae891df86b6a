"""The inputs on which filters are compared: natural noise, stimuli, synthetic images and their starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.calibration.dead_leaves import dead_leaves
from prune_viz.feature_visualization.priors import make_prior, tile
from prune_viz.feature_visualization.stimuli import DRAFT_STEPS, find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.layers import Layer
from prune_viz.utils.array_files import batches_of
from prune_viz.utils.devices import one_thread_each, workers_on
from prune_viz.utils.errors import LayerError

BATCH = 32
_CHUNK = 4 * BATCH  # images of which a batch may be made
NOISE_IMAGES = 256
HELD_OUT = 1 / 4  # share of the fitted images that check verdicts and are pooled into the fit after that
_START_BATCH = 16
KEPT_OUT = 4  # every so-many-th image is kept out of all that is fitted or ranked, to measure on


def fitted(images: Tensor) -> Tensor:
    """The images, shape (N, C, *size), on which verdicts and merging rest; of fewer than four all."""
    return images[torch.arange(len(images)) % KEPT_OUT != KEPT_OUT - 1]


def kept_out(images: Tensor) -> Tensor:
    """The images, shape (N, C, *size), on which it is measured what merging and removal do to the output."""
    return images[KEPT_OUT - 1 :: KEPT_OUT]


def natural_noise(
    shape: Sequence[int], count: int, seed: int, statistics: InputStatistics | None = None
) -> Tensor:
    """Random inputs with the spectrum and colours of natural ones; of variance 1 where none are known.

    Parameters
    ----------
    shape : sequence of int
        (C, *size).
    count : int
        How many.
    seed : int
        Of the generator.
    statistics : InputStatistics, optional
        What is known of the model's inputs.
    """
    prior = make_prior("natural", shape[0], tuple(shape[1:]), statistics=statistics)
    generator = torch.Generator().manual_seed(seed)
    return prior.colour(torch.randn(count, *shape, generator=generator))


def count_noise_images(statistics: InputStatistics | None) -> int:
    """How many pictures of noise `noise_and_stimuli` makes."""
    return NOISE_IMAGES * (2 if statistics is not None and statistics.covariance is not None else 1)


def calibration_size(model: nn.Module, input_shape: Sequence[int], wished: Sequence[int]) -> tuple[int, ...]:
    """Spatial size of calibration images: the one wished for if the model runs on it, else its own."""
    return tuple(wished) if runs_on(model, input_shape[0], wished) else tuple(input_shape[1:])


def runs_on(model: nn.Module, channels: int, size: Sequence[int]) -> bool:
    """Whether a network takes inputs of a size; a flatten, for example, ties it to one."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, *size, device=next(model.parameters()).device))
    except Exception:  # whatever an untrusted forward pass raises
        return False
    return True


def noise_and_stimuli(
    layers: Iterable[np.ndarray],
    input_channels: int,
    size: Sequence[int],
    seed: int,
    statistics: InputStatistics | None = None,
) -> Iterator[tuple[Tensor, bool]]:
    """Calibration images, batch by batch: natural noise, then every layer's stimuli, tiled to the size.

    Where natural inputs were measured on examples, as much noise of the usual statistics is added.

    Parameters
    ----------
    layers : iterable of ndarray of float16, each shape (F, C, *canvas)
        Stimuli, a layer at a time.
    input_channels : int
        C.
    size : sequence of int
        Spatial size of the calibration images.
    seed : int
        Seed of the noise.
    statistics : InputStatistics, optional
        What is known of the model's inputs, for the noise.

    Yields
    ------
    batch : Tensor, shape (B, C, *size)
    held_out : bool
        Every fourth calibration image is held out.
    """
    noise = natural_noise((input_channels, *size), NOISE_IMAGES, seed, statistics)
    yield from split(noise, size)
    if statistics is not None and statistics.covariance is not None:
        # So that no filter is called dead only because the example inputs vary too little.
        usual = replace(statistics, covariance=None, exponent=None)
        yield from split(natural_noise((input_channels, *size), NOISE_IMAGES, seed + 1, usual), size)
    for images in layers:
        for chunk in batches_of(images, _CHUNK):
            yield from split(torch.from_numpy(chunk.astype(np.float32)), size)


def split(images: Tensor, size: Sequence[int]) -> Iterator[tuple[Tensor, bool]]:
    """Split images into batches, every fourth image held out.

    Parameters
    ----------
    images : Tensor, shape (N, C, *canvas)
        Of any spatial size.
    size : sequence of int
        Spatial size that they are tiled to.

    Yields
    ------
    batch : Tensor, shape (B, C, *size)
    held_out : bool
    """
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        places = torch.arange(len(chunk)) % 4
        for held_out in (False, True):
            chosen = chunk[(places == 3) == held_out]
            for begin in range(0, len(chosen), BATCH):
                yield tile(chosen[begin : begin + BATCH], size), held_out


Owner = tuple[str, int]  # a layer and a filter of it


@dataclass(frozen=True)
class Start:
    """Pictures of one kind that calibration starts from.

    Attributes
    ----------
    images : Tensor, shape (N, C, *size)
        In the model's own input units.
    owners : tuple of (str, int)
        The layer and filter whose stimulus each is; empty where they are none.
    """

    images: Tensor
    owners: tuple[Owner, ...] = ()


@dataclass(frozen=True)
class SyntheticImages:
    """Calibration images on which batch norms see what they saw in training, and how nearly.

    Without batch norms they are nothing but dead leaves and stimuli.

    Attributes
    ----------
    images : Tensor, shape (N, C, *size)
        The calibration images, in the model's own input units, on the CPU.
    before, distance : float or None
        How far the batch norms' inputs were and are from their running statistics, over all channels and
        layers: mean squared error of the mean plus that of the deviation, in running deviations. None where
        no batch norm could be watched, and the images are those that calibration would have started from.
    passes : int
        How often each calibration image was moved.
    activation_kept : float or None
        Median activation of the filters whose stimuli the images started from, as a share of that at the
        start; None where none started from a stimulus.
    """

    images: Tensor
    before: float | None
    distance: float | None
    passes: int
    activation_kept: float | None = None


def calibration_starts(
    network: FilterNetwork,
    size: Sequence[int],
    count: int,
    seed: int,
    statistics: InputStatistics | None = None,
) -> tuple[Start, Start]:
    """Where synthetic images start: dead leaves, and as many drafts of the deeper layers' stimuli.

    They are sought here, so that calibration images do not depend on which layers are analysed, and how.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    size : sequence of int
        Spatial size of the calibration images.
    count : int
        How many calibration images.
    seed : int
        Of leaves and stimuli.
    statistics : InputStatistics, optional
        What is known of the model's inputs.

    Returns
    -------
    leaves, stimuli : Start
        With ``count - n`` and n pictures, and the stimuli's owners.
    """
    network = network.draft
    deep = network.layers[len(network.layers) // 2 :]
    quotas = np.diff(np.linspace(0, count // 2, len(deep) + 1).astype(int))

    def search(layer: Layer, quota: int) -> tuple[Tensor, list[Owner]]:
        torch.set_num_threads(1)
        filters = np.unique(np.linspace(0, layer.filters - 1, quota).astype(int)).tolist()
        try:
            found = find_stimuli(
                network, layer.name, filters, steps=DRAFT_STEPS, seed=seed, statistics=statistics,
                batch=_START_BATCH,
            )  # fmt: skip
        except LayerError:  # reported where the layer itself is analysed
            return torch.zeros(0, network.input_shape[0], *size), []
        live = found.activations > 0
        chosen = [number for number, alive in zip(filters, live.tolist(), strict=True) if alive]
        return tile(found.images[live], size), [(layer.name, number) for number in chosen]

    with one_thread_each(), ThreadPoolExecutor(workers_on(network.device)) as pool:
        asked = [(layer, int(quota)) for layer, quota in zip(deep, quotas, strict=True) if quota]
        found = list(pool.map(lambda one: search(*one), asked))
    owners = tuple(owner for _, own in found for owner in own)
    stimuli = torch.cat([torch.zeros(0, network.input_shape[0], *size), *(images for images, _ in found)])
    leaves = dead_leaves((network.input_shape[0], *size), count - len(stimuli), seed, statistics)
    return Start(leaves), Start(stimuli, owners)

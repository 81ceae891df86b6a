"""One map of the whole network: every filter of every layer at one place.

Layers see different stimuli, so their own responses cannot be compared across them. Here every filter
responds to the same inputs, a sample of all layers' stimuli that runs through the whole network once, and
stimuli are described in cycles per pixel, whatever their canvas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from prune_viz.embedding.features import (
    describe_stimuli,
    pictures_of,
    principal,
    responding,
    response_profiles,
)
from prune_viz.embedding.layer_map import Embedding, draw_map, embed, join, set_apart
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.priors import tile
from prune_viz.feature_visualization.responses import map_norms
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.network.map_reading import read_maps
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.utils.memory import Budget

COMMON_STIMULI = 384  # about; that all filters are shown
PICTURE_SHARE = 0.3  # of the squared distance between unrelated filters
COMPONENTS = 48  # of each part that the map is drawn from
_LEAST_VARIANCE = 1e-12  # of pictures that differ by more than rounding


class NetworkMaps(NamedTuple):
    """Where a network's filters lie.

    Attributes
    ----------
    embeddings : dict of str to Embedding
        A layer's own map and clusters.
    positions : dict of str to ndarray, shape (F, 2)
        Each layer's filters on the map of the network.
    """

    embeddings: dict[str, Embedding]
    positions: dict[str, np.ndarray]


def embed_network(
    network: FilterNetwork,
    layers: Sequence[Layer],
    found: Mapping[str, LayerTensors],
    context: RunContext,
) -> NetworkMaps:
    """Embed each layer's filters, and those of all layers together.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layers : sequence of Layer
        Which layers, in order of depth.
    found : mapping of str to LayerTensors
        Their stimuli and responses, each read once.
    context : RunContext
        What the stages of a run share. Its seed is that of the maps and of the sample that all filters are
        shown; its progress takes one step a layer and one for the whole network.

    Returns
    -------
    NetworkMaps
    """
    seed, progress, quick = context.seed, context.progress, context.effort.is_draft
    progress.start("embedding", len(layers) + 1)
    quota = -(-COMMON_STIMULI // max(len(layers), 1))
    random = np.random.default_rng(seed)
    embeddings, pictures, shown, live = {}, [], [], []
    for layer in layers:
        progress.note(layer.name)
        tensors = found[layer.name]
        descriptors = describe_stimuli(tensors.images)
        embeddings[layer.name] = embed(descriptors, tensors.responses, seed, quick)
        responses = np.nan_to_num(tensors.responses, nan=0.0, posinf=0.0)
        live.append(responding(responses))
        pictures.append(pictures_of(descriptors, responses)[live[-1]])
        chosen = np.sort(random.permutation(np.flatnonzero(live[-1]))[:quota])
        if len(chosen):
            shown.append(torch.from_numpy(tensors.images[chosen]))
        progress.advance()
    progress.note("the whole network")
    names = [layer.name for layer in layers]
    if shown:
        profiles = common_profiles(network, names, shown, context.budget)
        answers = [profiles.pop(name)[there] for name, there in zip(names, live, strict=True)]
        positions = set_apart(place_filters(pictures, answers, seed, quick), np.concatenate(live))
    else:
        positions = set_apart(np.zeros((0, 2)), np.concatenate(live))
    progress.advance()
    progress.finish()
    ends = np.cumsum([layer.filters for layer in layers])
    places = {
        layer.name: positions[end - layer.filters : end] for layer, end in zip(layers, ends, strict=True)
    }
    return NetworkMaps(embeddings, places)


def common_profiles(
    network: FilterNetwork, layers: Sequence[str], stimuli: Sequence[Tensor], budget: Budget | None = None
) -> dict[str, np.ndarray]:
    """What the filters of several layers respond to among the same inputs.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layers : sequence of str
        Names of layers.
    stimuli : sequence of Tensor, each shape (N, C, *canvas)
        Inputs; each is repeated until it fills the largest canvas, or the input if the network takes no
        other size.
    budget : Budget, optional
        Memory that may be taken.

    Returns
    -------
    dict of str to ndarray of float32, shape (F, all inputs)
        By layer, from `features.response_profiles`.
    """
    axes = range(len(network.input_shape) - 1)
    largest = tuple(max(images.shape[axis + 2] for images in stimuli) for axis in axes)
    size = largest if network.takes(largest) else network.input_shape[1:]
    norms = read_maps(network, layers, lambda: (tile(images, size) for images in stimuli), map_norms, budget)
    # Each layer's norms go as its profiles come.
    return {
        name: response_profiles(np.nan_to_num(norms.pop(name).numpy(), nan=0.0, posinf=0.0))
        for name in layers
    }


def place_filters(
    pictures: Sequence[np.ndarray], profiles: Sequence[np.ndarray], seed: int, quick: bool = False
) -> np.ndarray:
    """Draw the map of the network.

    Parameters
    ----------
    pictures : sequence of ndarray, each shape (F_i, D)
        What excites each filter looks like, from `features.pictures_of`, a layer each.
    profiles : sequence of ndarray, each shape (F_i, N)
        What it responds to among inputs that all filters were shown.
    seed : int
        Of UMAP.
    quick : bool
        Whether principal components will do.

    Returns
    -------
    ndarray of float64, shape (F, 2)
    """
    looks, variance = principal(pictures, COMPONENTS)
    answers, _ = principal(profiles, COMPONENTS)
    if variance > _LEAST_VARIANCE:
        looks /= np.sqrt(variance)
    return draw_map(join(looks, answers, PICTURE_SHARE), seed, quick)

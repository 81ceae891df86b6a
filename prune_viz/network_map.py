"""One map of the whole network: every filter of every layer at one place.

Layers see different stimuli, so their own responses cannot be compared across them. Here every filter
responds to the same inputs, a sample of all layers' stimuli that runs through the whole network once, and
stimuli are described in cycles per pixel, whatever their canvas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prune_viz.embedding import Embedding, draw_map, embed, join, set_apart
from prune_viz.features import (
    describe_stimuli,
    pictures_of,
    principal,
    responding,
    response_profiles,
    scaled_pictures,
)
from prune_viz.filters import FilterNetwork
from prune_viz.layers import Layer
from prune_viz.priors import tile
from prune_viz.progress import Progress
from prune_viz.responses import map_norms
from prune_viz.runs import LayerTensors

COMMON_STIMULI = 384  # about; that all filters are shown
BATCH = 32
PICTURE_SHARE = 0.3  # of the squared distance between unrelated filters
COMPONENTS = 48  # of each part that the map is drawn from


def embed_network(
    network: FilterNetwork,
    layers: Sequence[Layer],
    found: Mapping[str, LayerTensors],
    seed: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Embedding], dict[str, np.ndarray]]:
    """Embed each layer's filters, and those of all layers together.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layers : sequence of Layer
        Which layers, in order of depth.
    found : mapping of str to LayerTensors
        Their stimuli and responses, each read once.
    seed : int
        Of the maps and of the sample that all filters are shown.
    progress : Progress, optional
        Told about one step a layer, and one for the whole network.

    Returns
    -------
    embeddings : dict of str to Embedding
        A layer's own map and clusters.
    positions : dict of str to ndarray, shape (F, 2)
        Each layer's filters on the map of the network.
    """
    progress = progress or Progress()
    progress.start("embedding", len(layers) + 1)
    quota = -(-COMMON_STIMULI // max(len(layers), 1))
    random = np.random.default_rng(seed)
    embeddings, pictures, shown, live = {}, [], [], []
    for layer in layers:
        progress.note(layer.name)
        tensors = found[layer.name]
        descriptors = describe_stimuli(tensors.images)
        embeddings[layer.name] = embed(descriptors, tensors.responses, seed)
        responses = np.nan_to_num(tensors.responses, nan=0.0, posinf=0.0)
        pictures.append(pictures_of(descriptors, responses))
        live.append(responding(responses))
        chosen = np.sort(random.permutation(np.flatnonzero(live[-1]))[:quota])
        if len(chosen):
            shown.append(torch.from_numpy(tensors.images[chosen]))
        progress.advance()
    progress.note("the whole network")
    names = [layer.name for layer in layers]
    if shown:
        profiles = common_profiles(network, names, shown)
        positions = place_filters(np.vstack(pictures), profiles, np.concatenate(live), seed)
    else:
        positions = set_apart(np.zeros((0, 2)), np.concatenate(live))
    progress.advance()
    progress.finish()
    ends = np.cumsum([layer.filters for layer in layers])
    places = {
        layer.name: positions[end - layer.filters : end] for layer, end in zip(layers, ends, strict=True)
    }
    return embeddings, places


def common_profiles(network: FilterNetwork, layers: Sequence[str], stimuli: Sequence[Tensor]) -> np.ndarray:
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

    Returns
    -------
    ndarray of float32, shape (filters of all layers, all inputs)
        From `features.response_profiles`.
    """
    axes = range(len(network.input_shape) - 1)
    largest = tuple(max(images.shape[axis + 2] for images in stimuli) for axis in axes)
    size = largest if network.takes(largest) else network.input_shape[1:]
    batches = [
        tile(images[start : start + BATCH], size)
        for images in stimuli
        for start in range(0, len(images), BATCH)
    ]
    norms = network.read(layers, batches, map_norms)
    # Each layer's norms go as its profiles come.
    return np.vstack(
        [response_profiles(np.nan_to_num(norms.pop(name).numpy(), nan=0.0, posinf=0.0)) for name in layers]
    )


def place_filters(pictures: np.ndarray, profiles: np.ndarray, live: np.ndarray, seed: int) -> np.ndarray:
    """Draw the map of the network.

    Parameters
    ----------
    pictures : ndarray, shape (F, D)
        What excites each filter looks like, from `features.pictures_of`.
    profiles : ndarray, shape (F, N)
        What it responds to among inputs that all filters were shown.
    live : ndarray of bool, shape (F,)
        Which filters respond to anything, one at least; the others are set apart.
    seed : int
        Of UMAP.

    Returns
    -------
    ndarray of float64, shape (F, 2)
    """
    looks = principal(scaled_pictures(pictures[live]), COMPONENTS)
    answers = principal(profiles[live], COMPONENTS)
    return set_apart(draw_map(join(looks, answers, PICTURE_SHARE), seed), live)

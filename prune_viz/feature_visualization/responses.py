"""How filters respond to stimuli: the cross-filter response matrix."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.devices import in_batches

BATCH = 32


def response_matrix(
    network: FilterNetwork, layer: str, images: Tensor, batch: int | None = None
) -> np.ndarray:
    """How strongly each filter of a layer fires on each stimulus.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layer : str
        The layer's name.
    images : Tensor, shape (N, C, *canvas)
        Stimuli.
    batch : int, optional
        Most at a time, where memory is short.

    Returns
    -------
    ndarray of float32, shape (N, F)
        ``[i, j]`` is the L2 norm of filter j's feature map on image i.
    """
    maps = network.maps(layer)
    norms = torch.zeros(len(images), network.layer(layer).filters)

    def respond(rows: Tensor, new: int) -> None:
        found = map_norms(maps(images[rows].float().to(network.device))[1])
        norms[rows[:new]] = found[:new].cpu()

    with torch.no_grad():
        in_batches(len(images), min(BATCH, batch or BATCH), respond, network.device)
    return norms.numpy()


def map_norms(maps: Tensor) -> Tensor:
    """L2 norm of each feature map: (B, F, *map) to (B, F)."""
    found: Tensor = torch.linalg.vector_norm(maps.flatten(2), dim=2)
    return found

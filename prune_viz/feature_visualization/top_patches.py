"""Which parts of the example images excite each filter most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prune_viz.feature_visualization.rendering import draw_inputs
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.layers import Layer
from prune_viz.network.map_reading import read_maps
from prune_viz.utils.array_files import read_arrays, write_arrays
from prune_viz.utils.memory import Budget

SHOWN = 6  # parts a filter, each of another image
MOST_IMAGES = 192  # that are searched
SIDE = 224  # pixels of an image that is kept, at most
_LEAST = 32  # pixels of a part: less shows nothing of what is around


@dataclass(frozen=True)
class TopPatches:
    """The parts of example images that excite each filter of each layer most.

    Attributes
    ----------
    pictures : ndarray of uint8, shape (N, side, side, 3)
        The images, oblong ones on a square ground.
    windows : dict of str to ndarray of float32, shape (F, K, 4)
        By layer: for each filter, the most exciting part first, the number of a picture (-1: no more excite
        it) and the part's left and upper edge and side in units of the picture's. The side is the same for a
        whole layer.
    """

    pictures: np.ndarray
    windows: dict[str, np.ndarray]


def find_top_patches(
    network: FilterNetwork,
    layers: Sequence[Layer],
    examples: Tensor,
    statistics: InputStatistics | None,
    budget: Budget | None = None,
) -> TopPatches | None:
    """Search example images for what excites each filter of some layers most.

    A part lies about the place of a feature map's largest value, and is as large as what that place sees, but
    for two bounds: not so small that nothing around it shows, and no larger than the layer's canvas, since of
    a large receptive field mostly the middle counts.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layers : sequence of Layer
        Which layers.
    examples : Tensor, shape (N, C, H, W)
        Inputs in the model's own units; of many, some evenly spaced ones are searched.
    statistics : InputStatistics or None
        The normalisation, with which they become pictures again.
    budget : Budget, optional
        Memory that may be taken.

    Returns
    -------
    ExcitingParts or None
        None for inputs that are no pictures, and where none excites any filter.
    """
    if examples.ndim != 4:
        return None
    count = min(len(examples), MOST_IMAGES)
    searched = examples[np.linspace(0, len(examples) - 1, count).round().astype(int)]
    found = read_maps(network, [layer.name for layer in layers], lambda: [searched], _peaks, budget)
    size = np.array(searched.shape[2:])
    chosen = {layer.name: _windows(found[layer.name].numpy(), layer, size) for layer in layers}
    used = np.unique(np.concatenate([windows[..., 0].ravel() for windows in chosen.values()]))
    used = used[used >= 0].astype(int)
    if not len(used):
        return None
    for windows in chosen.values():
        here = windows[..., 0] >= 0
        windows[..., 0][here] = np.searchsorted(used, windows[..., 0][here])
    pictures = draw_inputs(searched[used].numpy(), min(SIDE, int(size.max())), statistics)
    return TopPatches(pictures, chosen)


def _peaks(maps: Tensor) -> Tensor:
    """The largest value of each map and its place, down and across, as shares: (B, F, H, W) to (B, F, 3).

    Maps over other axes than the picture's have no such place, and count as not excited.
    """
    if maps.ndim != 4:
        return torch.zeros(*maps.shape[:2], 3)
    values, places = maps.flatten(2).max(dim=2)
    height, width = maps.shape[2:]
    down, across = places // width, places % width
    return torch.stack([values, (down + 0.5) / height, (across + 0.5) / width], dim=2)


def _windows(peaks: np.ndarray, layer: Layer, size: np.ndarray) -> np.ndarray:
    """Windows on the images that excite each filter most; peaks (N, F, 3), sizes in pixels."""
    shown = min(SHOWN, len(peaks))
    values = np.nan_to_num(peaks[..., 0], nan=0.0, posinf=0.0, neginf=0.0)
    order = np.argsort(-values, axis=0, kind="stable")[:shown].T  # (F, K)
    filters = np.arange(len(order))[:, None]
    seen = layer.receptive_field or layer.canvas
    side = float(min(max(*seen, _LEAST), *layer.canvas, *size))
    centres = peaks[order, filters, 1:] * size  # (F, K, 2), pixels down and across
    corners = np.clip(centres - side / 2, 0, size - side) + (size.max() - size) / 2
    windows = np.zeros((*order.shape, 4), dtype=np.float32)
    windows[..., 0] = np.where(values[order, filters] > 0, order, -1)
    windows[..., 1:3] = corners[..., ::-1] / size.max()
    windows[..., 3] = side / size.max()
    return windows


def write_top_patches(parts: TopPatches, files: Mapping[str, str], path: Path) -> None:
    """Write them to `path`; `files` maps each layer to a name that is safe in a file."""
    arrays = {f"windows/{files[name]}": windows for name, windows in parts.windows.items()}
    write_arrays(path, {"pictures": parts.pictures, **arrays})


def read_top_patches(path: Path, files: Mapping[str, str], filters: Mapping[str, int]) -> TopPatches | None:
    """Read what `write_top_patches` wrote of layers with so many `filters`.

    None where there is none, or it is damaged or of other layers.
    """
    read = read_arrays(path)
    if read is None:
        return None
    arrays = read[0]
    try:
        pictures = arrays["pictures"]
        windows = {name: arrays[f"windows/{file}"] for name, file in files.items()}
    except KeyError:
        return None
    fits = pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[3] == 3
    fits = fits and all(
        found.ndim == 3 and found.shape[::2] == (filters[name], 4) and (found[..., 0] < len(pictures)).all()
        for name, found in windows.items()
    )
    return TopPatches(pictures, windows) if fits else None

"""Other ways to find redundant filters, given what was planted: how many, and how right they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from ablation import BATCH, scores_of
from planted_truth import COPIES, Site, Truth
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup

SAMPLES = 20_000  # positions on which maps are correlated


def peer_rows(
    family: str,
    model: nn.Module,
    truths: Sequence[Truth],
    table: pd.DataFrame,
    groups: Sequence[CouplingGroup],
    gram_matrices: Mapping[int, np.ndarray],
    stimuli: Mapping[str, np.ndarray],
    images: Tensor,
) -> pd.DataFrame:
    """A row a method and site: pairs' average precision, and what it flags against what was planted."""
    rows = []
    for truth in truths:
        layer = truth.site.layer
        kernels = model.get_submodule(layer).weight.flatten(1).double().numpy()
        sets = [p.set for p in truth.plants if p.kind in (*COPIES, "noisy", "mix")]
        pairs = {p.set for p in truth.plants if p.kind in (*COPIES, "noisy")}
        number = next(group.number for group in groups if layer in group.layers)
        pixels = stimuli[layer].reshape(len(kernels), -1)
        pixels = pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(1e-12)
        clusters = KMeans(len(kernels) - len(sets), n_init=3, random_state=0).fit(pixels)
        similarity = {
            "prune-viz": correlation(gram_matrices[number]),
            "weight cosine": cosine(kernels),
            "FPGM": -distances(kernels),
            "pixel k-means": np.where(
                clusters.labels_[:, None] == clusters.labels_[None], 0.0, -10.0
            ) - distances(pixels),
            "activations on real images": map_correlation(model, truth.site, images),
        }  # fmt: skip
        flags = {
            "prune-viz": np.flatnonzero(table.loc[layer, "verdict"].eq("redundant")).tolist(),
            "FPGM": np.argsort(distances(kernels).sum(axis=1))[: len(sets)].tolist(),
        }
        one, other = np.triu_indices(len(kernels), 1)
        labels = [frozenset((int(i), int(j))) in pairs for i, j in zip(one, other, strict=True)]
        for method, matrix in similarity.items():
            flagged = flags.get(method) or closest(matrix, len(sets))
            hits = sum(not own.isdisjoint(flagged) for own in sets)
            right = sum(any(channel in own for own in sets) for channel in flagged)
            precision = average_precision_score(labels, matrix[one, other])
            rows.append([family, layer, method, precision, len(sets), hits, len(flagged), right])
    return pd.DataFrame(
        rows, columns=["family", "layer", "method", "average", "sets", "hits", "flagged", "right"]
    )


def cosine(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return np.asarray(rows @ rows.T)


def distances(rows: np.ndarray) -> np.ndarray:
    return torch.cdist(*[torch.from_numpy(rows).double()] * 2).numpy()


def correlation(gram: np.ndarray) -> np.ndarray:
    """Correlation of channels from second moments of them and a constant; 0 where one never varies."""
    mean = gram[:-1, -1]
    covariance = gram[:-1, :-1] - np.outer(mean, mean)
    deviation = np.sqrt(np.diag(covariance).clip(min=0))
    floor = 1e-6 * max(float(deviation.max()), 1e-30)
    live = deviation > floor
    return np.where(np.outer(live, live), covariance / np.outer(*[deviation.clip(min=floor)] * 2), 0.0)


def map_correlation(model: nn.Module, site: Site, images: Tensor) -> np.ndarray:
    """Correlation of a site's channels where they are first read, on real images."""
    taken: list[Tensor] = []
    consumer = model.get_submodule(site.consumers[0])
    hook = consumer.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    scores_of(model, images[:BATCH])
    hook.remove()
    rows = taken[0].movedim(1, -1).flatten(0, -2).double()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLES]]
    rows = F.pad(rows, (0, 1), value=1.0)
    return correlation((rows.T @ rows / len(rows)).numpy())


def closest(similarity: np.ndarray, count: int) -> list[int]:
    """One of each of the closest pairs, until there are enough."""
    one, other = np.triu_indices(len(similarity), 1)
    flagged: list[int] = []
    for index in np.argsort(-similarity[one, other], kind="stable"):
        pair = (int(one[index]), int(other[index]))
        if len(flagged) < count and not set(pair) & set(flagged):
            flagged.append(pair[1])
    return flagged

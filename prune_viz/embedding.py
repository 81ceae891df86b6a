"""Where a layer's filters stand towards each other: joint features, clusters, a map.

A filter's feature joins what its stimulus looks like, how all filters respond to it, and how the filter
itself responds to all stimuli. UMAP draws the features in two dimensions; clusters
are found in the features themselves, never in the drawing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

COMPONENTS = 24
BATCH = 128
NEIGHBOURS = 15
# Shares of the joint variance: what the stimulus looks like, how all filters respond to it, and how the
# filter responds to all stimuli. Only the last is the same for copies, whose stimuli grow from noise of
# their own and may end differently.
PICTURE_SHARE, AUDIENCE_SHARE, PROFILE_SHARE = 0.1, 0.1, 0.8
CLUSTER_DIAMETER = 0.35  # of the median distance between filters


@dataclass(frozen=True)
class Embedding:
    """A layer's map.

    Attributes
    ----------
    features : ndarray of float64, shape (F, K)
        Joint features: pictures, audiences and profiles side by side.
    positions : ndarray of float64, shape (F, 2)
        The map.
    clusters : ndarray of int, shape (F,)
        Cluster of each filter, numbered from 0 by size; -1 for a filter that is in none.
    """

    features: np.ndarray
    positions: np.ndarray
    clusters: np.ndarray


def embed(images: np.ndarray, responses: np.ndarray, seed: int = 0) -> Embedding:
    """Embed and cluster a layer's filters.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)
        Stimuli.
    responses : ndarray, shape (F, F)
        ``[i, j]``: how strongly filter j fires on stimulus i, not negative. Where it is not finite it
        counts as none.
    seed : int
        Of UMAP.

    Returns
    -------
    Embedding
    """
    profiles, audiences = response_profiles(np.nan_to_num(responses, nan=0.0, posinf=0.0))
    parts = [
        (PICTURE_SHARE, describe_stimuli(images)),
        (AUDIENCE_SHARE, audiences),
        (PROFILE_SHARE, profiles),
    ]
    features = np.hstack([np.sqrt(share) * _scaled(part) for share, part in parts])
    return Embedding(features, draw_map(features, seed), find_clusters(features))


def describe_stimuli(images: np.ndarray) -> np.ndarray:
    """Describe pictures so that shifting one around its canvas changes nothing.

    Parameters
    ----------
    images : ndarray, shape (F, C, *canvas)

    Returns
    -------
    ndarray of float64, shape (F, D)
        The amplitude spectrum of every channel, coarse and on a log scale, and how channels vary
        together. Each picture is scaled to root mean square 1 first.
    """
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.vstack([_describe_batch(batch.astype(np.float32)) for batch in batches])


def _describe_batch(pictures: np.ndarray) -> np.ndarray:
    scale = np.sqrt((pictures**2).mean(axis=tuple(range(1, pictures.ndim)), keepdims=True))
    pictures = pictures / np.maximum(scale, 1e-12)
    axes = tuple(range(2, pictures.ndim))
    spectrum = np.abs(np.fft.fftn(pictures, axes=axes)) / np.sqrt(np.prod(pictures.shape[2:]))
    coarse = np.fft.fftshift(spectrum, axes=axes)
    for axis in axes:
        bins = np.array_split(np.arange(coarse.shape[axis]), min(12, coarse.shape[axis]))
        coarse = np.stack([coarse.take(part, axis=axis).mean(axis=axis) for part in bins], axis=axis)
    flat = pictures.reshape(*pictures.shape[:2], -1)
    colour = np.einsum("fcp,fdp->fcd", flat, flat) / flat.shape[2]
    count = len(pictures)
    parts = [np.log1p(coarse).reshape(count, -1), colour.reshape(count, -1), flat.mean(axis=2)]
    return np.hstack(parts).astype(np.float64)


def response_profiles(responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Profiles and audiences, both of shape (F, F).

    A filter's profile is how it responds to every stimulus, of unit length. Its audience is how all
    filters, each relative to its own profile so that loud ones do not rule, respond to its stimulus.
    """
    profiles = responses.T / np.maximum(np.linalg.norm(responses.T, axis=1, keepdims=True), 1e-12)
    audiences = profiles.T / np.maximum(np.linalg.norm(profiles.T, axis=1, keepdims=True), 1e-12)
    return profiles.astype(np.float64), audiences.astype(np.float64)


def _scaled(features: np.ndarray) -> np.ndarray:
    """Leading principal components, total variance 1."""
    centred = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    kept = left[:, :COMPONENTS] * values[:COMPONENTS]
    total = np.sqrt((kept**2).sum() / max(len(kept), 1))
    return np.asarray(kept / total if total > 1e-12 else kept)


def draw_map(features: np.ndarray, seed: int) -> np.ndarray:
    """Draw features in two dimensions: UMAP, or principal components for a handful of filters.

    Parameters
    ----------
    features : ndarray, shape (F, K)
    seed : int

    Returns
    -------
    ndarray of float64, shape (F, 2)
        Positions, the same for the same features and seed.
    """
    count = len(features)
    if count <= 5:
        flat = np.zeros((count, 2))
        flat[:, : min(2, features.shape[1])] = features[:, :2]
        return flat
    import torch
    import umap

    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapper = umap.UMAP(
            n_neighbors=min(NEIGHBOURS, count - 1), min_dist=0.3, init="pca", random_state=seed, n_jobs=1
        )
        positions = np.asarray(mapper.fit_transform(features), dtype=np.float64)
    torch.set_num_threads(threads)  # numba shares the thread pool and resets its size
    return positions


def find_clusters(features: np.ndarray) -> np.ndarray:
    """Cluster filters whose features are all close: complete linkage, cut at `CLUSTER_DIAMETER`.

    Parameters
    ----------
    features : ndarray, shape (F, K)

    Returns
    -------
    ndarray of int, shape (F,)
        Clusters of two filters or more, numbered by size from 0; -1 elsewhere.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import pairwise_distances

    labels = np.full(len(features), -1)
    if len(features) < 2:
        return labels
    distances = pairwise_distances(features)
    median = float(np.median(distances[np.triu_indices(len(features), 1)]))
    if median <= 0:
        return np.zeros(len(features), dtype=int)
    found = AgglomerativeClustering(
        n_clusters=None,
        metric="precomputed",
        linkage="complete",
        distance_threshold=CLUSTER_DIAMETER * median,
    ).fit_predict(distances)
    sizes = np.bincount(found)
    order = [label for label in np.argsort(-sizes, kind="stable") if sizes[label] > 1]
    for number, label in enumerate(order):
        labels[found == label] = number
    return labels

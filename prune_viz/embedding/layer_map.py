"""Where a layer's filters stand towards each other: joint features, clusters, a map.

A filter's feature joins what the stimuli that excite it look like and how it responds to all stimuli. t-SNE,
or UMAP where filters are many, draws the features in two dimensions; clusters are found in the features
themselves, never in the drawing. Filters that respond to nothing have no feature: they are in no cluster, and
set apart on the map.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from prune_viz.embedding.features import pictures_of, responding, response_profiles, scaled_pictures

HANDFUL = 20  # filters of which principal components show more than neighbourhoods
FEW = 300  # filters that t-SNE draws in a second or two; to import and compile UMAP takes many
NEIGHBOURS = 15
PERPLEXITY, ITERATIONS = 10, 500  # of t-SNE
EPOCHS = 200
PICTURE_SHARE = 0.2  # of the squared distance between unrelated filters; their responses have the rest
CLUSTER_DIAMETER = 0.35  # unrelated filters are about 1.4 apart
_ROWS, _CELLS = 1024, 2**23  # of distances at a time, at most


@dataclass(frozen=True)
class Embedding:
    """A layer's map.

    Attributes
    ----------
    positions : ndarray of float64, shape (F, 2)
        The map.
    clusters : ndarray of int, shape (F,)
        Cluster of each filter, numbered from 0 by size; -1 for a filter that is in none.
    """

    positions: np.ndarray
    clusters: np.ndarray


def embed(descriptors: np.ndarray, responses: np.ndarray, seed: int = 0, quick: bool = False) -> Embedding:
    """Embed and cluster a layer's filters.

    Parameters
    ----------
    descriptors : ndarray, shape (F, D)
        Of the stimuli, from `features.describe_stimuli`.
    responses : ndarray, shape (F, F)
        ``[i, j]``: how strongly filter j fires on stimulus i, not negative. Where it is not finite it
        counts as none.
    seed : int
        Of t-SNE and UMAP.
    quick : bool
        Whether the map shows principal components alone.

    Returns
    -------
    Embedding
    """
    features, live = joint_features(descriptors, responses)
    clusters = np.full(len(live), -1)
    clusters[live] = find_clusters(features)
    return Embedding(set_apart(draw_map(features, seed, quick), live), clusters)


def joint_features(descriptors: np.ndarray, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a layer's filters are compared by; parameters as those of `embed`.

    Returns
    -------
    features : ndarray of float32, shape (L, K)
        Pictures and profiles side by side, of the L filters that respond to anything.
    live : ndarray of bool, shape (F,)
        Which ones they are.
    """
    responses = np.nan_to_num(responses, nan=0.0, posinf=0.0)
    live = responding(responses)
    pictures = scaled_pictures(pictures_of(descriptors, responses)[live])
    return join(pictures, response_profiles(responses[:, live]), PICTURE_SHARE), live


def join(pictures: np.ndarray, profiles: np.ndarray, picture_share: float) -> np.ndarray:
    """Put the two parts of a feature, shapes (F, D) and (F, N), side by side with their shares."""
    parts = [np.sqrt(picture_share) * pictures, np.sqrt(1 - picture_share) * profiles]
    return np.asarray(np.hstack(parts), dtype=np.float32)


def draw_map(features: np.ndarray, seed: int, quick: bool = False) -> np.ndarray:
    """Draw features in two dimensions: principal components of a handful, t-SNE of up to `FEW`, UMAP of more.

    Parameters
    ----------
    features : ndarray, shape (F, K)
    seed : int
    quick : bool
        Whether principal components will do, however many filters there are.

    Returns
    -------
    ndarray of float64, shape (F, 2)
        Positions, the same for the same features and seed.
    """
    count = len(features)
    if quick or count <= HANDFUL or np.ptp(features, axis=0).max() < 1e-6:
        return _flattened(features)
    if count <= FEW:
        return _draw_few(features, seed)
    import torch
    import umap  # late: it takes many seconds, and small networks do without

    threads = torch.get_num_threads()
    neighbours = min(NEIGHBOURS, count - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapper = umap.UMAP(
            n_neighbors=neighbours,
            min_dist=0.3,
            n_epochs=EPOCHS,
            init="pca",
            random_state=seed,
            n_jobs=1,
            # Exact, and sooner than UMAP's own search is compiled.
            precomputed_knn=nearest(features, neighbours),
        )
        positions = np.asarray(mapper.fit_transform(features), dtype=np.float64)
    torch.set_num_threads(threads)  # numba shares the thread pool and resets its size
    return positions


def _draw_few(features: np.ndarray, seed: int) -> np.ndarray:
    """The map of so few filters that t-SNE takes all their distances as they are."""
    from sklearn.manifold import TSNE

    start = _flattened(features)
    mapper = TSNE(
        perplexity=min(PERPLEXITY, (len(features) - 1) / 3),
        max_iter=ITERATIONS,
        init=1e-4 * start / start[:, 0].std(),
        method="exact",
        random_state=seed,
    )
    return np.asarray(mapper.fit_transform(features.astype(np.float64)), dtype=np.float64)


def _flattened(features: np.ndarray) -> np.ndarray:
    """The two leading principal components, shape (F, 2), with signs that do not depend on the machine."""
    flat = np.zeros((len(features), 2))
    if len(features) > 1:
        left, values, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
        drawn = (left * values)[:, :2].astype(np.float64)
        largest = drawn[np.abs(drawn).argmax(axis=0), np.arange(drawn.shape[1])]
        flat[:, : drawn.shape[1]] = drawn * np.where(largest < 0, -1, 1)
    return flat


def nearest(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each filter's nearest neighbours, itself first.

    Parameters
    ----------
    features : ndarray, shape (F, K)
    count : int
        How many, at most F.

    Returns
    -------
    indices : ndarray of int32, shape (F, count)
    distances : ndarray of float32, shape (F, count)
    """
    import torch

    points = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    squares = points.square().sum(dim=1)
    found = []
    step = max(1, min(_ROWS, _CELLS // max(1, len(points))))
    for start in range(0, len(points), step):
        rows = points[start : start + step]
        distances = (rows @ points.T).mul_(-2).add_(squares).add_(squares[start : start + step, None])
        own = torch.arange(len(rows))
        distances[own, start + own] = -1.0  # whatever else coincides with it
        found.append(distances.topk(count, largest=False))
    indices = torch.cat([one.indices for one in found]).int().numpy()
    return indices, torch.cat([one.values for one in found]).clamp(min=0).sqrt().numpy()


def set_apart(positions: np.ndarray, placed: np.ndarray) -> np.ndarray:
    """Give filters that a map leaves out a place on it, close together in its emptiest corner.

    Parameters
    ----------
    positions : ndarray, shape (L, 2)
        The map.
    placed : ndarray of bool, shape (F,)
        Which filters it shows, L of them.

    Returns
    -------
    ndarray of float64, shape (F, 2)
    """
    everyone = np.zeros((len(placed), 2))
    everyone[placed] = positions
    rest = int((~placed).sum())
    if not rest:
        return everyone
    low, high = np.zeros(2), np.zeros(2)
    if len(positions):
        low, high = positions.min(axis=0), positions.max(axis=0)
    size = np.where(high > low, high - low, 1.0)
    # A sunflower's disc, half as dense as the map is on average and at most a seventh of it across.
    steps = np.arange(rest)
    radius = 0.7 * min(np.sqrt(rest / len(placed)), 0.1) * np.sqrt((steps + 0.5) / rest)
    angle = steps * np.pi * (3 - np.sqrt(5))
    disc = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    reach = radius.max()
    corners = np.array([[1 - reach, reach], [reach, reach], [1 - reach, 1 - reach], [reach, 1 - reach]])
    unit = (positions - low) / size
    room = [np.linalg.norm(unit - corner, axis=1).min(initial=2.0) for corner in corners]
    best = int(np.argmax(room))
    # Where no corner has room, outside: the map then is drawn a little smaller.
    push = np.clip(1.6 * reach + 0.03 - room[best], 0, None) * np.sign(corners[best] - 0.5) / np.sqrt(2)
    everyone[~placed] = low + (corners[best] + push + disc) * size
    return everyone


def find_clusters(features: np.ndarray) -> np.ndarray:
    """Cluster filters whose features are all close: complete linkage, cut at `CLUSTER_DIAMETER`.

    HDBSCAN finds as many planted copies but chains unlike filters to them
    (`scripts/benchmarks/bench_embedding.py`).

    Parameters
    ----------
    features : ndarray, shape (F, K)

    Returns
    -------
    ndarray of int, shape (F,)
        Clusters of two filters or more, numbered from 0 by size, then by their first filter; -1 elsewhere.
    """
    from sklearn.cluster import AgglomerativeClustering

    labels = np.full(len(features), -1)
    if len(features) < 2:
        return labels
    points = features.astype(np.float64)
    squares = (points**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    np.sqrt(distances.clip(min=0, out=distances), out=distances)
    np.fill_diagonal(distances, 0)
    found = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="complete", distance_threshold=CLUSTER_DIAMETER
    ).fit_predict(distances)
    sizes, first = np.bincount(found), np.unique(found, return_index=True)[1]
    ranked = sorted(range(len(sizes)), key=lambda label: (-sizes[label], first[label]))
    for number, label in enumerate(label for label in ranked if sizes[label] > 1):
        labels[found == label] = number
    return labels

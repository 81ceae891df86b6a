"""Features, clusters and maps of a layer's filters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from sklearn.metrics import adjusted_rand_score

from prune_viz.embedding.features import (
    describe_stimuli,
    pictures_of,
    responding,
    response_profiles,
    scaled_pictures,
)
from prune_viz.embedding.layer_map import (
    CLUSTER_DIAMETER,
    FEW,
    draw_map,
    embed,
    find_clusters,
    joint_features,
    nearest,
    set_apart,
)


def _textures(seed: int, count: int, size: int = 24) -> np.ndarray:
    """Stripes of different directions and colours."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    waves = random.integers(-5, 6, size=(count, 2))
    phases = random.uniform(0, 2 * np.pi, size=count)
    angle = 2 * np.pi * (waves[:, :1, None] * y + waves[:, 1:, None] * x) / size + phases[:, None, None]
    return np.cos(angle)[:, None] * random.uniform(0.2, 1, size=(count, 3, 1, 1))


def _with_copies(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stimuli and responses of 40 filters, of which the last ten copy those before them, twice as loud.

    The optimisation of a copy ends at an input of its own that excites both.
    """
    random = np.random.default_rng(seed)
    images = _textures(seed, 40)
    responses = random.uniform(size=(40, 40)) ** 4
    responses[np.arange(40), np.arange(40)] = 1.5
    responses[30:] = random.uniform(size=(10, 40)) ** 4
    responses[np.arange(30, 40), np.arange(20, 30)] = 1.45
    responses[:, 30:] = 2 * responses[:, 20:30]
    return images, responses


# --- what stimuli look like --------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(down=st.integers(-30, 30), right=st.integers(-30, 30), contrast=st.floats(0.1, 10))
def test_descriptors_ignore_shift_and_contrast(down: int, right: int, contrast: float) -> None:
    images = _textures(0, 10)
    moved = contrast * np.roll(images, (down, right), axis=(2, 3))
    np.testing.assert_allclose(describe_stimuli(images), describe_stimuli(moved), atol=1e-3)
    assert np.abs(describe_stimuli(images)[0] - describe_stimuli(images)[1]).max() > 0.1


def test_descriptors_do_not_see_the_size_of_the_canvas() -> None:
    def stripes(size: int, period: float) -> np.ndarray:
        across = np.arange(size) / period
        return np.broadcast_to(np.cos(2 * np.pi * across), (1, 1, size, size))

    small, large = (describe_stimuli(stripes(size, 8)) for size in (64, 80))
    other = describe_stimuli(stripes(80, 5))
    assert np.linalg.norm(small - large) < 0.05
    assert np.linalg.norm(large - other) > 0.5
    noise = np.random.default_rng(0).normal(size=(2, 64, 3, 80, 80)).astype(np.float32)
    means = [describe_stimuli(noise[0]).mean(0), describe_stimuli(noise[1, ..., :64, :64]).mean(0)]
    np.testing.assert_allclose(*means, atol=0.03)


def test_descriptors_share_out_all_the_power() -> None:
    for shape in [(5, 2, 41), (5, 3, 24, 31), (5, 1, 8, 9, 10)]:
        described = describe_stimuli(np.random.default_rng(0).normal(size=shape))
        channels = shape[1]
        power = described[:, : -(channels**2 + channels)] ** 2
        np.testing.assert_allclose(power.sum(axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 2, 40), (6, 1, 8, 8, 8), (6, 4, 5, 5), (6, 3, 1, 1), (6, 12, 7, 9)])
def test_descriptors_take_signals_and_volumes(shape: tuple[int, ...]) -> None:
    described = describe_stimuli(np.random.default_rng(0).normal(size=shape))
    assert described.shape[0] == 6
    assert np.isfinite(described).all()
    assert np.isfinite(describe_stimuli(np.zeros(shape))).all()


def test_copies_have_the_same_features() -> None:
    images, responses = _with_copies()
    described = describe_stimuli(images)
    apart = np.linalg.norm(described[20:30] - described[30:], axis=1)
    assert np.median(apart) > 0.5
    seen = pictures_of(described, responses)
    np.testing.assert_allclose(seen[20:30], seen[30:], atol=1e-5)


# --- what filters respond to -------------------------------------------------------------------------


def test_profiles_do_not_see_how_loud_a_filter_is() -> None:
    responses = np.random.default_rng(0).uniform(size=(8, 8))
    louder = responses * np.linspace(1, 9, 8)
    np.testing.assert_allclose(response_profiles(responses), response_profiles(louder), atol=1e-6)


def test_filters_that_tell_nothing_apart_are_seen() -> None:
    responses = np.random.default_rng(0).uniform(1, 2, size=(6, 6))
    responses[:, 1] = 0
    responses[:, 2] = 0.7 * (1 + 1e-7 * np.arange(6))
    responses[:, 3] *= 1e-9
    assert responding(responses).tolist() == [True, False, False, False, True, True]
    assert responding(np.ones((1, 1))).tolist() == [True]
    assert responding(np.zeros((3, 3))).tolist() == [False] * 3


# --- clusters ----------------------------------------------------------------------------------------


def test_copies_fall_into_one_cluster_and_others_do_not() -> None:
    images, responses = _with_copies()
    clusters = embed(describe_stimuli(images), responses).clusters
    assert (clusters[20:30] == clusters[30:]).all()
    assert (clusters[20:30] >= 0).all()
    assert len(set(clusters[20:30])) == 10
    assert (clusters[:20] == -1).mean() > 0.7


def test_a_layer_of_copies_is_one_cluster() -> None:
    random = np.random.default_rng(0)
    responses = np.outer(random.uniform(size=20), random.uniform(1, 9, size=20))
    images = np.repeat(_textures(0, 1), 20, axis=0)
    assert (embed(describe_stimuli(images), responses).clusters == 0).all()


def test_silent_and_constant_filters_are_in_no_cluster() -> None:
    images, responses = _with_copies()
    responses[:, [3, 4]] = 0
    responses[:, [5, 6]] = 0.5
    embedding = embed(describe_stimuli(images), responses)
    assert (embedding.clusters[3:7] == -1).all()
    assert not joint_features(describe_stimuli(images), responses)[1][3:7].any()
    assert np.isfinite(embedding.positions).all()
    live = np.delete(embedding.positions, [3, 4, 5, 6], axis=0)
    away = np.linalg.norm(live[:, None] - embedding.positions[None, 3:7], axis=2).min()
    assert away > np.linalg.norm(embedding.positions[3:7] - embedding.positions[3], axis=1).max() / 4
    nothing = embed(describe_stimuli(images), np.zeros((40, 40)))
    assert (nothing.clusters == -1).all()
    assert np.isfinite(nothing.positions).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_clusters_ignore_filter_order(seed: int) -> None:
    images, responses = _with_copies()
    order = np.random.default_rng(seed).permutation(40)
    described = describe_stimuli(images)
    pictures = scaled_pictures(pictures_of(described, responses))
    features = np.hstack([pictures, 2 * response_profiles(responses)])
    one, other = find_clusters(features), find_clusters(features[order])
    assert np.array_equal(one[order] == -1, other == -1)
    assert adjusted_rand_score(one[order], other) == 1


def test_all_members_of_a_cluster_are_close_to_all_others() -> None:
    features = np.random.default_rng(0).normal(scale=0.15, size=(200, 3))
    clusters = find_clusters(features)
    assert clusters.max() > 3
    for cluster in range(clusters.max() + 1):
        members = features[clusters == cluster]
        assert np.linalg.norm(members[:, None] - members[None], axis=2).max() <= CLUSTER_DIAMETER + 1e-6


def test_clusters_are_numbered_by_size() -> None:
    points = np.array([[0.0], [0.01], [30], [30.01], [30.02], [60], [90]])
    assert find_clusters(points).tolist() == [1, 1, 0, 0, 0, -1, -1]
    assert find_clusters(np.zeros((1, 3))).tolist() == [-1]
    assert find_clusters(np.zeros((4, 3))).tolist() == [0, 0, 0, 0]


# --- the map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 8, slow(FEW // 6 + 1)])
def test_map_is_deterministic_and_keeps_neighbours(count: int) -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(random.normal(size=(6, 5)) * 10, count, axis=0)
    features = groups + random.normal(size=groups.shape) * 0.1
    positions = draw_map(features, seed=0)
    assert np.array_equal(positions, draw_map(features, seed=0))
    spread = positions.reshape(6, count, 2)
    inside = np.linalg.norm(spread - spread.mean(axis=1, keepdims=True), axis=2).mean()
    assert inside < 0.3 * np.linalg.norm(positions - positions.mean(axis=0), axis=1).mean()


@pytest.mark.slow
def test_maps_of_few_filters_do_without_umap() -> None:
    code = (
        "import sys, numpy as np\nfrom prune_viz.embedding.layer_map import FEW, draw_map\n"
        "for count in (10, FEW): assert draw_map(np.random.default_rng(0).normal(size=(count, 9)), 0).any()\n"
        "print({'umap', 'numba'} & set(sys.modules))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_nearest_neighbours_are_exact() -> None:
    features = np.random.default_rng(0).normal(size=(2100, 6)).astype(np.float32)  # more than one batch
    features[7] = features[3]
    indices, distances = nearest(features, 4)
    assert np.array_equal(indices[:, 0], np.arange(2100))
    for row in (0, 1500, 2099):
        true = np.linalg.norm(features - features[row], axis=1)
        np.testing.assert_allclose(distances[row], np.sort(true)[:4], atol=2e-3)
        np.testing.assert_allclose(true[indices[row]], np.sort(true)[:4], atol=1e-5)
    assert 7 in indices[3]


def test_what_is_set_apart_lies_beside_the_others() -> None:
    positions = np.random.default_rng(0).uniform(size=(200, 2)) * np.array([10, 2])  # no corner is free
    placed = np.ones(212, dtype=bool)
    placed[5:17] = False
    everyone = set_apart(positions, placed)
    assert np.array_equal(everyone[placed], positions)
    size = np.ptp(positions, axis=0)
    gaps = np.linalg.norm((everyone[~placed][:, None] - positions[None]) / size, axis=2)
    assert gaps.min() > 0.02
    assert (np.ptp(everyone, axis=0) < 1.5 * size).all()
    assert len(np.unique(everyone[~placed], axis=0)) == 12


def test_a_handful_of_filters_can_be_drawn() -> None:
    for count in (1, 2, 3, 6, 7):
        images, responses = _textures(0, count), np.random.default_rng(0).uniform(size=(count, count))
        embedding = embed(describe_stimuli(images), responses)
        assert embedding.positions.shape == (count, 2)
        assert np.isfinite(embedding.positions).all()
        same = embed(describe_stimuli(images[:1].repeat(count, 0)), np.ones((count, count)))
        assert np.isfinite(same.positions).all()

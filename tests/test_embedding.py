from __future__ import annotations

import numpy as np

from prune_viz.embedding import describe_stimuli, draw_map, embed, find_clusters, response_profiles


def _textures(seed: int, count: int, size: int = 24) -> np.ndarray:
    """Stripes of different directions and colours."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    waves = random.integers(-5, 6, size=(count, 2))
    phases = random.uniform(0, 2 * np.pi, size=count)
    angle = 2 * np.pi * (waves[:, :1, None] * y + waves[:, 1:, None] * x) / size + phases[:, None, None]
    return np.cos(angle)[:, None] * random.uniform(0.2, 1, size=(count, 3, 1, 1))


def test_descriptors_do_not_see_a_shift_or_a_change_of_contrast() -> None:
    images = _textures(0, 10)
    moved = 3 * np.roll(images, (5, -7), axis=(2, 3))
    np.testing.assert_allclose(describe_stimuli(images), describe_stimuli(moved), atol=1e-4)
    assert np.abs(describe_stimuli(images)[0] - describe_stimuli(images)[1]).max() > 0.1


def test_descriptors_take_signals_and_volumes() -> None:
    for shape in [(6, 2, 40), (6, 1, 8, 8, 8), (6, 4, 5, 5)]:
        assert describe_stimuli(np.random.default_rng(0).normal(size=shape)).shape[0] == 6


def test_profiles_do_not_see_how_loud_a_filter_is() -> None:
    responses = np.random.default_rng(0).uniform(size=(8, 8))
    louder = responses * np.linspace(1, 9, 8)
    for one, other in zip(response_profiles(responses), response_profiles(louder), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_copies_fall_into_one_cluster_and_others_do_not() -> None:
    random = np.random.default_rng(0)
    images = _textures(1, 40)
    responses = random.uniform(size=(40, 40)) ** 4
    images[30:] = images[20:30] + 0.01 * random.normal(size=images[30:].shape)
    responses[:, 30:] = 2 * responses[:, 20:30]
    responses[30:] = responses[20:30] * (1 + 0.02 * random.normal(size=(10, 40)))
    clusters = embed(images, responses).clusters
    assert (clusters[20:30] == clusters[30:]).all()
    assert (clusters[20:30] >= 0).all()
    assert len(set(clusters[20:30])) == 10
    assert (clusters[:20] == -1).mean() > 0.7


def test_clusters_are_numbered_by_size() -> None:
    points = np.array([[0.0], [0.01], [30], [30.01], [30.02], [60], [90]])
    assert find_clusters(points).tolist() == [1, 1, 0, 0, 0, -1, -1]
    assert find_clusters(np.zeros((1, 3))).tolist() == [-1]
    assert find_clusters(np.zeros((4, 3))).tolist() == [0, 0, 0, 0]


def test_the_map_is_the_same_every_time_and_keeps_near_ones_near() -> None:
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(6, 5)) * 10, 8, axis=0) + random.normal(size=(48, 5)) * 0.1
    positions = draw_map(features, seed=0)
    assert np.array_equal(positions, draw_map(features, seed=0))
    spread = positions.reshape(6, 8, 2)
    inside = np.linalg.norm(spread - spread.mean(axis=1, keepdims=True), axis=2).mean()
    assert inside < 0.3 * np.linalg.norm(positions - positions.mean(axis=0), axis=1).mean()


def test_a_handful_of_filters_can_be_drawn() -> None:
    for count in (1, 2, 3, 6, 7):
        images, responses = _textures(0, count), np.random.default_rng(0).uniform(size=(count, count))
        embedding = embed(images, responses)
        assert embedding.positions.shape == (count, 2)
        assert np.isfinite(embedding.positions).all()

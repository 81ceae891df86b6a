"""Who fires on a filter's stimulus, and who responds alike."""

from __future__ import annotations

import numpy as np
import pytest

from prune_viz.report.neighbours import SHOWN, firing, similar
from prune_viz.report.wording import nearness


def test_who_fires_is_known_by_its_own_strongest_response() -> None:
    responses = np.array([[4.0, 1.0, 0.0], [2.0, 2.0, 0.0], [1.0, 0.5, 0.0]])
    assert firing(responses) == [[(1, 0.5)], [(0, 0.5)], [(0, 0.25), (1, 0.25)]]


def test_who_responds_alike_is_known_whatever_its_strength() -> None:
    responses = np.random.default_rng(0).random((9, 9))
    responses[:, 4] = 3 * responses[:, 7]
    found = similar(responses)
    assert found[4][0] == (7, pytest.approx(1.0))
    assert found[7][0] == (4, pytest.approx(1.0))
    assert all(len(row) == SHOWN for row in found)
    columns = responses / np.linalg.norm(responses, axis=0)
    cosine = columns.T @ columns
    for number, row in enumerate(found):
        assert [share for _, share in row] == sorted((share for _, share in row), reverse=True)
        for other, share in row:
            assert other != number
            assert share == pytest.approx(cosine[number, other], abs=1e-12)


def test_not_finite_filter_has_no_neighbours() -> None:
    assert firing(np.array([[np.nan, 1.0], [np.inf, 2.0]])) == [[(1, 0.5)], []]
    assert similar(np.ones((1, 1))) == firing(np.ones((1, 1))) == [[]]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.25, "25\u202f%"),
        (0.994, "99\u202f%"),
        (0.995, "1 \u2212 10\u207b\u00b2"),
        (1 - 2e-6, "1 \u2212 10\u207b\u2076"),
        (1.0, "the same"),
    ],
)
def test_what_is_nearly_the_same_is_told_from_it(share: float, text: str) -> None:
    assert nearness(share) == text

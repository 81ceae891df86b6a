"""Networks of random blocks: what is removed is exactly what was masked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from marks import slow

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def try_random(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[int, int, float]]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import random_networks

    yield random_networks.try_random
    del sys.modules["random_networks"]


@pytest.mark.parametrize("first", [0, *(slow(seed) for seed in range(4, 88, 4))])
def test_removal_is_exact(first: int, try_random: Callable[[int], tuple[int, int, float]]) -> None:
    found = {seed: try_random(seed) for seed in range(first, first + 4)}
    assert all(difference < 1e-6 for _, _, difference in found.values()), found
    assert sum(removable for removable, _, _ in found.values()) > 0

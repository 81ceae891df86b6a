"""Every benchmark can be imported and says what its options are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports benchmarks by name, and forgets them: their names are short enough to be taken for others."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for imported in set(sys.modules) - before:
        if (file := getattr(sys.modules[imported], "__file__", None)) and FOLDER in Path(file).parents:
            del sys.modules[imported]


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_benchmark_is_importable(benchmarks: Callable[[str], ModuleType], name: str) -> None:
    assert benchmarks(name).__doc__


def test_what_the_memory_benchmark_cuts_short_is_there(benchmarks: Callable[[str], ModuleType]) -> None:
    with benchmarks("bench_memory").shortened("conv", 0):
        pass

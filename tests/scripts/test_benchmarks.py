"""Every benchmark can be imported and says what its options are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py")))
def test_benchmark_is_importable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    try:
        assert importlib.import_module(name).__doc__
    finally:
        for imported in set(sys.modules) - before:  # whose names are short enough to be taken for others
            if (file := getattr(sys.modules[imported], "__file__", None)) and FOLDER in Path(file).parents:
                del sys.modules[imported]

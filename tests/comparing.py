"""What two runs have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prune_viz.utils.array_files import read_arrays


def assert_equal(one: Path, other: Path) -> None:
    """Everything that a run found and concluded is the same, and its report has the same files."""
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    for file in files:
        if file.endswith(".safetensors"):
            (first, said), (second, same) = read_arrays(one / file), read_arrays(other / file)
            for times in (said, same):
                times.pop("seconds", None)
            assert said == same, file
            assert first.keys() == second.keys()
            assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first), file
        elif file not in ("log.jsonl", "run.json") and not file.startswith("report/"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), file

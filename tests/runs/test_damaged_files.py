"""Files of a run that are damaged, of another kind, or do not fit one another: a result, or one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.utils.array_files import read_arrays, write_arrays

FILES = [
    "run.json", "decisions.json", "filters.csv", "masks.pt", "moments.safetensors", "probes.safetensors",
    "log.jsonl", "layers/001-inner.safetensors",
]  # fmt: skip
Change = Callable[[dict[str, Any], dict[str, str]], object]
LAYERS: dict[str, Change] = {
    "one axis": lambda arrays, _: arrays.update(images=np.zeros(8, np.float16)),
    "fewer filters": lambda arrays, _: arrays.update(
        {k: v[:3, :3] if v.ndim == 2 else v[:3] for k, v in arrays.items()}
    ),
    "one channel": lambda arrays, _: arrays.update(images=arrays["images"][:, :1].copy()),
    "not finite": lambda arrays, _: arrays.update({k: np.full_like(v, np.nan) for k, v in arrays.items()}),
    "whole numbers": lambda arrays, _: arrays.update(images=np.ones(arrays["images"].shape, np.int64)),
    "no size": lambda arrays, _: arrays.update(images=np.zeros((8, 3, 0, 4), np.float16)),
    "six axes": lambda arrays, _: arrays.update(images=np.zeros((8, 3, 2, 2, 2, 2), np.float16)),
    "another array": lambda arrays, _: arrays.update(more=np.zeros(3, np.float32)),
    "flat weights": lambda arrays, _: arrays.update(weights=np.zeros((8, 3), np.float32)),
    "no words": lambda _, words: words.clear(),
    "wrong words": lambda _, words: words.update(filters="9" * 5000, seconds="nan", diverged="x"),
}
FEW = ("wrong words", "one channel", "no size")
MOMENTS: dict[str, Change] = {
    "small": lambda arrays, _: arrays.update({k: v[:2, :2].copy() for k, v in arrays.items()}),
    "one missing": lambda arrays, _: arrays.pop(next(iter(arrays))),
    "not finite": lambda arrays, _: arrays.update({k: np.full_like(v, np.nan) for k, v in arrays.items()}),
    "zero": lambda arrays, _: arrays.update({k: np.zeros_like(v) for k, v in arrays.items()}),
    "whole numbers": lambda arrays, _: arrays.update({k: v.astype(np.int64) for k, v in arrays.items()}),
}


@pytest.fixture(scope="module")
def made(analysed: Callable[[str], Path]) -> Path:
    return analysed("residual")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def _check(run: Path, *commands: str) -> None:
    """No command fails otherwise than in one line."""
    beside = run.parent
    given = {
        "status": ["status", str(run)],
        "masks": ["masks", str(run), "--ratio", "0.3", "--out", str(beside / "masks.pt")],
        "verdicts": ["masks", str(run)],
        "report": ["report", str(run), "--single-file", str(beside / "report.html")],
        "figure": ["figure", str(run), "--layer", "inner", "--out", str(beside / "figure.svg")],
    }
    for command in commands or given:
        done = CliRunner().invoke(cli.app, given[command])
        assert done.exit_code in (0, 2), (command, done.output)
        assert done.stderr.count("\n") == (done.exit_code == 2), done.stderr


@pytest.mark.parametrize("kind", ["junk", *map(slow, ("pipe", "directory", "nothing", "missing", "link"))])
@pytest.mark.parametrize("name", FILES)
def test_files_of_another_kind(run: Path, name: str, kind: str) -> None:
    (file := run / name).unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "link":
        file.symlink_to("/etc/hostname")
    elif kind != "missing":
        file.write_bytes(b"" if kind == "nothing" else b"\x00\xff{" * 999)
    _check(run, "status", "masks", "verdicts", "figure")


@pytest.mark.parametrize("change", [one if one in FEW else slow(one) for one in LAYERS])
def test_layers_that_do_not_fit(run: Path, change: str) -> None:
    file = run / "layers" / "001-inner.safetensors"
    arrays, words = read_arrays(file) or pytest.fail("no layer")
    LAYERS[change](arrays, words)
    write_arrays(file, arrays, words)
    _check(run, "status", "report", "figure")


@pytest.mark.parametrize("change", MOMENTS)
def test_moments_that_do_not_fit(run: Path, change: str) -> None:
    arrays, words = read_arrays(run / "moments.safetensors") or pytest.fail("no moments")
    MOMENTS[change](arrays, words)
    write_arrays(run / "moments.safetensors", arrays, words)
    _check(run, "masks")

"""The layout: packages import downwards only, and no module is too long to be read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HOME = Path(__file__).parents[1] / "prune_viz"
# From the ground up: a package imports those before it, and itself.
ORDER = [
    "utils", "runs", "network", "loading", "channels", "feature_visualization", "execution", "embedding",
    "calibration", "redundancy", "pruning", "report", "analysis", "demo", "cli",
]  # fmt: skip


def _packages_imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prune_viz."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("prune_viz.")}
    return found


def test_imports_lead_downwards() -> None:
    upwards = [
        f"{file.relative_to(HOME)} imports {package}"
        for floor, name in enumerate(ORDER)
        for file in (HOME / name).rglob("*.py")
        for package in _packages_imported(file)
        if ORDER.index(package) > floor
    ]
    assert not upwards


def test_every_package_has_a_floor_and_docstring() -> None:
    packages = {folder.name for folder in HOME.iterdir() if (folder / "__init__.py").exists()}
    assert packages == set(ORDER)
    assert {file.stem for file in HOME.glob("*.py")} == {"__init__", "__main__", "lightning"}
    for name in packages:
        assert ast.get_docstring(ast.parse((HOME / name / "__init__.py").read_text()))


def test_no_module_is_longer_than_400_lines() -> None:
    long = {file.name: len(file.read_text().splitlines()) for file in HOME.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_one_module_knows_the_kinds_of_layers() -> None:
    kinds = re.compile(r"\b(_ConvNd|nn\.Linear|nn\.Conv\w+)\b")
    asking = [file for file in HOME.rglob("*.py") if kinds.search(file.read_text())]
    # The demo's network is made of layers.
    assert sorted(file.name for file in asking) == ["digits.py", "layer_kinds.py", "run.py"]

"""Figures for papers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_fixture import HOSTILE, write_run
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.report.figures import write_figure
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_layer_figure_shows_stimuli_and_flags(run: RunDirectory, tmp_path: Path) -> None:
    record = run.layers()[2]
    assert write_figure(run.path, record.name, tmp_path / "a.svg").startswith(f"{record.filters} stimuli of")
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<image") == record.filters
    table = run.read_filters()
    flagged = table[(table["layer"] == record.name) & (table["verdict"] != "keep")]
    marks = re.findall(r"fill: #(?:a85a06|8a2f55)", text)
    assert len(marks) >= len(flagged) > 0
    write_figure(run.path, record.name, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()


@pytest.mark.slow
def test_the_networks_figure_names_its_layers(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "network.png"
    done = CliRunner().invoke(cli.app, ["figure", str(run.path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[1] > 1000
    assert picture.std() > 10
    write_figure(run.path, None, tmp_path / "network.pdf")
    assert (tmp_path / "network.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_names_are_only_text(run: RunDirectory, tmp_path: Path) -> None:
    write_figure(run.path, None, tmp_path / "a.svg")
    write_figure(run.path, HOSTILE, tmp_path / "b.svg")
    for name in ("a.svg", "b.svg"):
        assert "<script" not in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("layer", "name", "says"),
    [
        (None, "figure.doc", "a figure ends in .svg, .png, .pdf"),
        ("nothing", "f.svg", "no layer of filters matches"),
    ],
)
def test_what_cannot_be_drawn_gets_one_line(
    run: RunDirectory, tmp_path: Path, layer: str | None, name: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        write_figure(run.path, layer, tmp_path / name)
    assert list(tmp_path.iterdir()) == []

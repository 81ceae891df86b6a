"""What a run shows before it has come to its verdicts."""

from pathlib import Path
from shutil import copytree

import pytest
from networks import random_residual
from typer.testing import CliRunner

from prune_viz.analysis import planned_run, unfinished
from prune_viz.analysis.pipeline import analyze
from prune_viz.cli import app
from prune_viz.report import write_report
from prune_viz.runs.ownership import claimed
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError

SHAPE = (3, 40, 40)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was interrupted when all its pictures were there."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfinished, "FEW_FILTERS", 1)
        patch.setattr(planned_run, "conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyze(random_residual(), input_shape=SHAPE, steps=4, out=out)
    return RunDirectory(out)


@pytest.fixture
def run(stopped: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of it."""
    return RunDirectory(copytree(stopped.path, tmp_path / "run"))


def test_pictures_are_reported_before_verdicts(run: RunDirectory) -> None:
    page = run.report_page.read_text()
    assert "Still to come:</strong> verdicts, budgets and masks." in page
    assert "Use the masks" not in page
    filters = run.read_filters()
    assert set(filters["verdict"]) == {"unjudged"}
    assert (filters["activation"] > 0).any()
    assert "Still to come" in (run.path / "report" / "layers" / f"{run.layers()[0].slug}.html").read_text()


def test_an_unfinished_run_has_nothing_to_prune_by(run: RunDirectory) -> None:
    assert not run.masks_file.exists()
    assert not run.decisions_file.exists()
    with pytest.raises(UserError, match="has not come to its end"):
        run.read_decisions()


def test_drafts_are_reported_before_the_stimuli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    find = planned_run._find_stimuli

    def only_drafts(stage: str, *rest: object) -> None:
        calls.append(stage)
        if stage == "stimuli":
            raise KeyboardInterrupt
        find(stage, *rest)

    monkeypatch.setattr(unfinished, "FEW_FILTERS", 1)
    monkeypatch.setattr(planned_run, "_find_stimuli", only_drafts)
    with pytest.raises(KeyboardInterrupt):
        analyze(random_residual(), input_shape=(3, 72, 72), steps=4, out=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert calls == ["drafts", "stimuli"]
    assert f"{unfinished.FULL_STIMULI}, verdicts, budgets and masks" in run.report_page.read_text()
    assert run.read_provenance().state == "stopped"


def test_reports_and_figures_are_made_of_unfinished_runs(run: RunDirectory, tmp_path: Path) -> None:
    before = run.report_page.read_text()
    write_report(run)
    assert run.report_page.read_text() == before
    drawn = CliRunner().invoke(app, ["figure", str(run.path), "--out", str(tmp_path / "depth.png")])
    assert drawn.exit_code == 0
    assert (tmp_path / "depth.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_that_goes_on_to_its_end_leaves_nothing_to_come(run: RunDirectory) -> None:
    analyze(random_residual(), input_shape=SHAPE, steps=4, out=run.path)
    assert run.read_provenance().to_come == ()
    assert "Still to come" not in run.report_page.read_text()
    assert run.masks_file.exists()


def test_a_report_is_left_to_the_run_that_is_at_work(run: RunDirectory) -> None:
    with claimed(run, run.read_provenance().model.sha256, fresh=False):
        said = CliRunner().invoke(app, ["report", str(run.path)])
    assert said.exit_code == 2
    assert "writes its report itself" in said.output

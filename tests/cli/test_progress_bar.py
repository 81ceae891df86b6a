"""The one bar of an analysis, as a terminal of 80 columns shows it."""

import io
import re
from collections.abc import Callable

import pytest
from networks import random_residual
from rich.console import Console

from prune_viz.analysis import unfinished
from prune_viz.analysis.pipeline import analyze
from prune_viz.cli.progress_bar import BarProgress
from prune_viz.utils.time_left import Expected


class Clock:
    """A second passes at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def _shown(work: Callable[[BarProgress], None], width: int = 80) -> list[str]:
    """The last state of every line that a terminal was shown."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    with BarProgress(console, clock=Clock()) as progress:
        work(progress)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]", text) if line.strip()]


def test_one_bar_says_stage_counts_and_time_left() -> None:
    def work(progress: BarProgress) -> None:
        progress.expect(lambda: [Expected("stimuli", 3.0), Expected("report", 1.0)])
        progress.start("stimuli", 2000)
        for _ in range(4):
            progress.advance(250)
        progress._bar.refresh()

    lines = _shown(work)
    assert any(re.search(r"1/2 stimuli +\S* +1,000/2,000 +0:00:\d\d +\S.* left$", line) for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_stages_that_nobody_expected_get_a_bar_of_their_own() -> None:
    def work(progress: BarProgress) -> None:
        for stage in ("training", "report"):
            progress.start(stage, 4)
            progress.advance(2)
            progress._bar.refresh()
            assert progress._bar.tasks[0].completed == 500
            progress.finish()

    assert any("training" in line for line in _shown(work))


def test_names_from_a_model_are_no_markup() -> None:
    def work(progress: BarProgress) -> None:
        progress.start("stimuli", 4)
        progress.note("[red]conv[/red]\x1b[31m")
        progress._bar.refresh()

    assert any("[red]conv" in line for line in _shown(work, width=120))
    assert not any("[red]" in line for line in _shown(work))


@pytest.mark.slow
def test_the_stages_of_an_analysis_are_those_expected(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    begun, expected = [], []

    class Noting(BarProgress):
        def expect(self, stages):
            expected.extend(one.stage for one in stages())
            assert all(one.work > 0 for one in stages())

        def start(self, stage, total, done=0):
            begun.append(stage)

        def advance(self, steps=1):
            pass

    monkeypatch.setattr(unfinished, "FEW_FILTERS", 1)
    progress = Noting(Console(file=io.StringIO()))
    analyze(random_residual(), input_shape=(3, 72, 72), steps=4, out=tmp_path / "run", progress=progress)
    assert begun == expected

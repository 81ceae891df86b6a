"""The HTML report of a run: opens from disk, asks the network for nothing.

What is shown, as plain data: `pages`, `layer_pages`, `neighbours`, and for the browser `run_data` and
`panel_data`. Where it lies: `layout`, `map_drawing`, and the charts `savings`, `coherence` and
`damage_histogram`. How it is written: `wording`, `sprites`, `render`, and `single_file`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from prune_viz.errors import UserError
from prune_viz.progress import Progress
from prune_viz.runs import RunDirectory

__all__ = ["write_report"]


def write_report(run: RunDirectory, progress: Progress | None = None) -> Path:
    """Write the report of a run from what its directory holds, replacing an older one.

    The new report is built aside and moved into place when it is whole; if that fails, the older one
    stays as it was.

    Parameters
    ----------
    run : RunDirectory
        A run with `run.json`, `filters.csv`, `decisions.json` and the layers' tensors.
    progress : Progress, optional
        Told about one step a layer.

    Returns
    -------
    Path
        The first page, ``report/index.html``.

    Raises
    ------
    UserError
        If the run is missing something, is damaged, or its directory cannot be written.
    """
    from prune_viz.report.render import render

    if "summary" not in run.read_provenance():
        raise UserError(f"the run in {run.path} stopped before its verdicts; run analyze again to finish it")
    target = run.report_page.parent
    aside, old = run.path / ".report.part", run.path / ".report.old"
    try:
        # What a killed write left behind: the last whole report may still stand aside.
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
    except OSError as error:
        raise UserError(f"{run.path} cannot be written ({error.strerror}); choose another place") from None
    try:
        render(run, aside, progress or Progress())
        _swap(aside, target, old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return run.report_page


def _swap(aside: Path, target: Path, old: Path) -> None:
    """Move the directory `aside` to `target`; what was there goes, or comes back if that fails."""
    had_one = target.exists()
    if had_one:
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        if had_one:
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)

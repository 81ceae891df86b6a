"""The HTML report of a run: opens from disk, asks the network for nothing.

What is shown, as plain data: `pages`, `layer_pages`, `neighbours`, and for the browser `run_data` and
`panel_data`. Where it lies: `layout`, `map_drawing`, and the charts `savings`, `coherence` and
`damage_histogram`. How it is written: `wording`, `sprites`, `render`, and `single_file`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from prune_viz.runs.report_files import NEW_REPORT, check_report, list_files, replace_report, restore_report
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.progress import Progress

__all__ = ["CONTENT_SECURITY_POLICY", "write_report"]

# In Chromium 'self' covers the neighbouring files of a page opened from disk (tests/test_report_browser.py
# fails if it does not). Style attributes are blocked, so positions come from a style sheet a layer.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)


def write_report(run: RunDirectory, progress: Progress | None = None) -> Path:
    """Write the report of a run from what its directory holds, replacing an older one.

    The new report is built aside and moved into place when it is whole; if that fails, the older one
    stays as it was.

    Parameters
    ----------
    run : RunDirectory
        A run with `run.json`, `filters.csv` and the layers' tensors, and with `decisions.json` where it has
        come to its verdicts.
    progress : Progress, optional
        Advanced by one step a layer.

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

    if run.read_provenance().summary is None:
        raise UserError(f"the run in {run.path} stopped before its first pictures; the same analyze goes on")
    check_report(run.path)
    new = run.path / NEW_REPORT
    try:
        restore_report(run.path)
        shutil.rmtree(new, ignore_errors=True)  # what a process left that died
        new.mkdir()
        render(run, new, progress or Progress())
        list_files(new)
        replace_report(run.path)
    except OSError as error:
        raise UserError(f"{run.path} cannot be written ({error.strerror}); choose another place") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return run.report_page

"""The files of a report: listed as ours when it is written, so that nothing else is ever removed with them.

A new report is built aside and moved into place when it is whole. What a person put beside the pages stays.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prune_viz.utils.destinations import check_own_folder
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import MARK, write_json
from prune_viz.utils.json_files import read_json

REPORT, NEW_REPORT, OLD_REPORT = "report", ".prune-viz.report-new", ".prune-viz.report-old"
LIST = "files.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*){0,3}")


@dataclass(frozen=True)
class _Listed:
    written_by: str
    files: tuple[str, ...]


def list_files(folder: Path, files: Sequence[str] | None = None) -> None:
    """Write down in a report which files in it are ours; by default all that are there."""
    if files is None:
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    write_json(folder / LIST, {"written_by": MARK, "files": [*files, LIST]})


def listed_files(folder: Path) -> list[str]:
    """Paths below a report that its list says are ours; empty where there is no list of ours."""
    try:
        listed = read_json(folder / LIST, _Listed)
    except UserError:
        return []
    return [name for name in listed.files if listed.written_by == MARK and _NAME.fullmatch(name)]


def check_report(run: Path) -> None:
    """Check that a report can be written to a run directory; nothing is changed.

    Raises
    ------
    UserError
        If a link, a mount point or a file stands in its place, or a folder with files and no list of ours.
    """
    for name in (REPORT, NEW_REPORT, OLD_REPORT):
        check_own_folder(run / name)
    for name in (REPORT, OLD_REPORT):
        folder = run / name
        if folder.is_dir() and any(folder.iterdir()) and not listed_files(folder):
            raise UserError(
                f"{folder} was not written by prune-viz, or by an earlier version: move it away or delete it"
            )


def remove_report(run: Path) -> None:
    """Remove the report of a run, and halves of one; files that are not ours stay, with an empty list."""
    restore_report(run)
    _remove_listed(run / REPORT)
    if (run / REPORT).exists():
        list_files(run / REPORT, ())
    shutil.rmtree(run / NEW_REPORT, ignore_errors=True)


def restore_report(run: Path) -> None:
    """Put right what a process left that died while it replaced a report."""
    report, old = run / REPORT, run / OLD_REPORT
    if old.is_dir():
        if not report.exists():
            old.rename(report)
        else:
            _retire(old, report)


def replace_report(run: Path) -> None:
    """Move a new report into place; the old one goes, or comes back if that fails.

    Raises
    ------
    UserError
        If the new report has a file whose place something of another's takes.
    """
    new, report, old = run / NEW_REPORT, run / REPORT, run / OLD_REPORT
    if report.exists():
        ours, coming = set(listed_files(report)), set(listed_files(new))
        taken = sorted(name for name in coming - ours if (report / name).exists())
        if taken:
            raise UserError(
                f"{report / taken[0]} is not prune-viz's, and its report needs the name: move it away"
            )
        report.rename(old)
    try:
        new.rename(report)
    except BaseException:
        if old.exists():
            old.rename(report)
        raise
    if old.exists():
        _retire(old, report)


def _retire(old: Path, report: Path) -> None:
    """Remove an old report; files that are not ours move into the new one."""
    _remove_listed(old)
    for file in [file for file in old.rglob("*") if not file.is_dir() or file.is_symlink()]:
        place = report / file.relative_to(old)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            file.rename(place)
    _remove_empty(old)


def _remove_listed(folder: Path) -> None:
    names = listed_files(folder)
    for name in sorted(names, key=lambda name: name == LIST):  # the list last, should we die meanwhile
        file = folder / name
        parents = [folder / parent for parent in PurePosixPath(name).parents]
        if file.is_file() and not file.is_symlink() and not any(parent.is_symlink() for parent in parents):
            file.unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and the folders in it, as far as they are empty."""
    inner = [one for one in folder.rglob("*") if one.is_dir() and not one.is_symlink()]
    for one in (*sorted(inner, key=lambda one: -len(one.parts)), folder):
        with suppress(OSError):  # not empty, or not there
            one.rmdir()

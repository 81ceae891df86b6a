"""Which directories are runs of ours to work in, and what in them may be removed.

A run is known by its mark, a `run.json` with our format and version. In it only what we wrote is ever removed
or replaced: files of fixed names, tensors whose name and header say so, and pages that a report lists as its
own. Links and mount points in the places of our folders are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prune_viz.runs.report_files import check_report, remove_report
from prune_viz.runs.run_directory import LAYERS, TASKS, RunDirectory
from prune_viz.runs.run_json import FORMAT
from prune_viz.utils.array_files import read_header
from prune_viz.utils.destinations import check_own_folder
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import is_left_aside
from prune_viz.utils.json_files import decode_json, read_text

_LOCK = ".lock"
_LARGEST_RUN = 2**28  # bytes of a run.json
_TENSORS = {
    TASKS: re.compile(r"\d{3,}-[A-Za-z0-9_-]+-\d+-[0-9a-f]{16}\.safetensors"),
    LAYERS: re.compile(r"\d{3,}-[A-Za-z0-9_-]+\.safetensors"),
}
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_run_directory(path: Path) -> None:
    """Check that a run may be made or taken up in a directory; nothing in it is changed.

    Raises
    ------
    UserError
        If it is not a directory, holds something that is not a run of ours, or something else than our own
        files and folders stands in their places.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give --out a directory")
    there = list(path.iterdir()) if path.is_dir() else []
    _check_places(path)
    if all(_is_blank(file) for file in there):
        return
    if not (path / "run.json").exists():
        raise UserError(f"{path} holds something that is not a prune-viz run; give another --out")
    if not has_mark(path):
        raise UserError(
            f"{path} is not a prune-viz run: its run.json is another program's, a later version's, or "
            "damaged; give another --out"
        )


def has_mark(path: Path) -> bool:
    """Whether the `run.json` of a directory says that prune-viz wrote it, in a format that it knows."""
    try:
        value = decode_json(read_text(path / "run.json", _LARGEST_RUN), "run.json")
    except UserError:
        return False
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        return False
    versions, program = value.get("versions"), value.get("written_by")
    ours = isinstance(versions, dict) and isinstance(versions.get("prune_viz"), str)
    ours = ours or (isinstance(program, str) and program.startswith("prune-viz "))
    return ours and type(value.get("format")) is int and 1 <= value["format"] <= FORMAT


def _is_blank(file: Path) -> bool:
    """Whether a file is one that a run leaves before it has its mark."""
    if file.is_symlink() or not file.is_file():
        return False
    return is_left_aside(file.name) or (file.name == _LOCK and file.stat().st_size == 0)


def _check_places(path: Path) -> None:
    """Refuse links, mount points and what else is not a folder, or not a file, where ours stand."""
    run = RunDirectory(path)
    for name in (TASKS, LAYERS):
        check_own_folder(path / name)
    check_report(path)
    for file in (*run.files, path / _LOCK):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            what = "a link" if file.is_symlink() else "not a regular file"
            raise UserError(f"{file} is {what}; a run keeps a file of its own there: move it away")


_ASKED = 1.0  # seconds; whoever asks whether a directory is in use holds its lock for a moment


@contextmanager
def claimed(run: RunDirectory, model_sha256: str, fresh: bool) -> Iterator[None]:
    """Hold a directory for a run of a model, and clear away what an earlier one concluded.

    Parameters
    ----------
    run : RunDirectory
        The directory; made if there is none.
    model_sha256 : str
        Of the model.
    fresh : bool
        Whether to start over, whatever model the run is of.

    Raises
    ------
    UserError
        If the directory cannot be written, another process works in it, it holds another model's run, or
        as `check_run_directory`.
    """
    from filelock import FileLock, Timeout

    _check_owner(run, model_sha256, fresh)
    path = run.path
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_ASKED, poll_interval=_ASKED / 50)
    except Timeout:
        raise UserError(
            f"another prune-viz is at work in {path}: wait until it ends, or give another --out"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out") from None
    except NotImplementedError:
        raise UserError(f"{path} lies where no file can be locked; give another --out") from None
    with lock:
        _check_owner(run, model_sha256, fresh)
        run.mark_running()
        _clear(run, fresh)
        yield


def in_use(run: RunDirectory) -> bool | None:
    """Whether a process holds a directory for a run; None where this user cannot find out."""
    from filelock import FileLock, Timeout

    lock = run.path / _LOCK
    if lock.is_symlink() or not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None


def _check_owner(run: RunDirectory, model_sha256: str, fresh: bool) -> None:
    check_run_directory(run.path)
    if fresh or not (run.path / "run.json").exists():
        return
    value = decode_json(read_text(run.path / "run.json", _LARGEST_RUN), f"{run.path / 'run.json'}")
    if value["model"].get("sha256") != model_sha256:
        raise UserError(f"{run.path} holds another model's run; give another --out, or --fresh to replace it")


def _clear(run: RunDirectory, fresh: bool) -> None:
    """Remove halves of a run that died and an earlier run's conclusions; with `fresh`, all that is ours."""
    for folder in (run.path, run.layers_folder, run.tasks_folder):
        for left in folder.iterdir() if folder.is_dir() else ():
            if is_left_aside(left.name) and left.is_file() and not left.is_symlink():
                left.unlink(missing_ok=True)
    if fresh:
        for folder in (run.layers_folder, run.tasks_folder):
            remove_tensors(folder)
        run.calibration_images_file.unlink(missing_ok=True)
        run.log_file.unlink(missing_ok=True)
    # While a run is under way, no verdicts of an earlier one stand beside its provenance.
    remove_report(run.path)
    for file in run.conclusions:
        file.unlink(missing_ok=True)


def remove_tensors(folder: Path, keep: frozenset[str] = frozenset()) -> None:
    """Remove layers or results of tasks from a run's folder, and the folder once it is empty.

    Parameters
    ----------
    folder : Path
        The run's `layers` or `tasks`. What there has another name than ours, or a header that does not say
        that we wrote it, stays.
    keep : frozenset of str
        Names of files of ours that stay.
    """
    for file in own_tensors(folder):
        if file.name not in keep:
            file.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def own_tensors(folder: Path) -> list[Path]:
    """The files in a run's `layers` or `tasks` that we wrote, by their names and headers."""
    files = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    return [
        file
        for file in files
        if _TENSORS[folder.name].fullmatch(file.name) and not file.is_symlink() and _is_ours(file)
    ]


def _is_ours(file: Path) -> bool:
    header = read_header(file) or {}
    run, digest = header.get("run", ""), header.get("sha256", "")
    return "layer" in header and all(_DIGEST.fullmatch(word) for word in (run, digest))

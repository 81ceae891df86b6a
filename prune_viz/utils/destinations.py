"""Where results may be written, checked by every command the same way before its work begins.

A result never replaces a directory, device, pipe or socket, nor an input, nor, without ``--force``, a file
that prune-viz did not write. What it wrote is known by a mark in the file's first or last bytes.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prune_viz.utils.errors import UserError
from prune_viz.utils.files import ASIDE, MARK, irregularity

_HEAD, _TAIL = 2**12, 2**16  # bytes in which a mark is looked for
_ZIP = b"PK\x03\x04"
_MOUNTS = Path("/proc/self/mountinfo")
_NAME = 30  # place of the first entry's name in a zip archive


def check_destination(option: str, file: Path, inputs: Iterable[Path] = (), force: bool = False) -> None:
    """Check that a result may be written to a file.

    Parameters
    ----------
    option : str
        The option that names the file, for the message.
    file : Path
        The file.
    inputs : iterable of Path
        Files that the command reads or that belong to what it reads.
    force : bool
        Whether a file that prune-viz did not write may be replaced.

    Raises
    ------
    UserError
        If it may not, or its directory cannot be written.
    """
    what = irregularity(file)
    if what == "a directory":
        raise UserError(f"{option} {file} is a directory; name a file")
    if what:
        raise UserError(f"{option} {file} is {what}, which is not replaced; name a regular file")
    if file.exists():
        if any(given.exists() and file.samefile(given) for given in inputs):
            raise UserError(f"{option} {file} would overwrite an input; name another file")
        if not force and not is_ours(file):
            raise UserError(
                f"{option} {file} is there already and prune-viz did not write it; name another file, or "
                "give --force to replace it"
            )
    check_writable(file.resolve().parent)


def is_ours(file: Path) -> bool:
    """Whether prune-viz wrote a regular file, as its mark says; an empty file is nobody's."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL))
        tail = stream.read(_TAIL)
    if head.startswith(_ZIP) and head[_NAME:].startswith(f"{ASIDE.rpartition('.')[0]}/".encode()):
        return True
    mark = MARK.encode()
    return not size or mark in head or mark in tail


def check_own_folder(folder: Path) -> None:
    """Check that a folder of a run is one, if it is there, and not a way to somewhere else.

    Raises
    ------
    UserError
        If a link, a mount point or a file stands there.
    """
    if folder.is_symlink() or _is_mount(folder):
        what = "a link" if folder.is_symlink() else "a mount point"
        raise UserError(f"{folder} is {what}; a run keeps its files in a folder of its own: move it away")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a run keeps a folder there: move it away")


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder, a part of the same file system too."""
    if folder.is_mount():
        return True
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    # The fifth word is the place, its spaces and the like as octal numbers.
    places = (
        re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines
    )
    return str(folder.absolute()) in places


def check_writable(directory: Path) -> None:
    """Raise `UserError` unless files can be made in `directory`, or it can be made; leaves no trace."""
    home = directory.absolute()
    try:
        while not home.exists() and home != home.parent:
            home = home.parent
        if not home.is_dir():
            raise UserError(f"{directory} cannot be written: {home} is not a directory")
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None

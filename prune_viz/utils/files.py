"""Files that are complete or absent: written aside, then renamed; and what may stand where one is to go."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prune_viz.utils.errors import UserError

MARK = "written by prune-viz"  # in every file we write that has room for it
# Start of the names of files that are still being written. torch.save names the folder inside its archive
# after the file up to the last dot, so that this is also the mark of what it wrote for us.
ASIDE = ".prune-viz."
_LEFT_ASIDE = re.compile(r"\.prune-viz\.[a-z0-9_]{8}")


def irregularity(path: Path) -> str:
    """What stands at `path` that is not a regular file, in words; empty for a regular file and for nothing.

    Links are followed: a link to a regular file counts as one.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    except RuntimeError:
        return "a link that leads back to itself"
    except OSError as error:
        return "a link that leads back to itself" if error.errno == errno.ELOOP else ""
    kinds = {
        stat.S_IFREG: "", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "not a regular file")


def check_readable(path: Path) -> None:
    """Check that `path` is a file to be read: opening a pipe would wait, a device might never end.

    Raises
    ------
    UserError
        If it does not exist or is not a regular file.
    """
    what = irregularity(path)
    if what:
        raise UserError(f"{path} is {what}, not a regular file")
    if not path.exists():
        raise UserError(f"{path} does not exist")


def check_replaceable(path: Path) -> None:
    """Raise `UserError` where something else than a regular file stands, which no result may replace."""
    what = irregularity(path)
    if what:
        raise UserError(f"{path} is {what}, which is not replaced; name a regular file")


def is_left_aside(name: str) -> bool:
    """Whether a file of this name was being written by us when its process died."""
    return _LEFT_ASIDE.fullmatch(name) is not None


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it into place if all went well.

    What was written is on the disk before it takes its name, so that a machine that dies leaves no half.
    Behind a link the file that it leads to is written.

    Raises
    ------
    UserError
        If the disk is full, nothing may be written there, or what is there is not a regular file.
    """
    check_replaceable(path)
    path = path.resolve() if path.is_symlink() else path
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=ASIDE, dir=path.parent)
        os.close(handle)
        aside = Path(name)
        yield aside
        aside.chmod(0o644)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. NaN becomes null."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False, ensure_ascii=True) + "\n")


def write_torch(path: Path, content: object) -> None:
    """Write what `torch.save` takes, whole or not at all: the same content is the same bytes."""
    import torch

    with written_aside(path) as aside:  # whose name up to the last dot torch writes into it, see `ASIDE`
        torch.save(content, aside)


def jsonable(value: Any) -> Any:
    """A value as JSON has it: numbers of numpy as Python's, what is not finite as null, paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if type(value).__module__ == "numpy":
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; raises `UserError` where there is no regular file."""
    check_readable(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

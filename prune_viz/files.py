"""Files that are complete or absent: written aside, then renamed; tensors with a digest of what they hold."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from prune_viz.errors import UserError

ASIDE = ".part"  # ending of what is still being written
_DIGEST = "sha256"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it into place if all went well.

    What was written is on the disk before it takes its name, so that a machine that dies leaves no half.

    Raises
    ------
    UserError
        If the disk is full, or nothing may be written there.
    """
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=ASIDE, dir=path.parent)
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
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=True) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of numpy as Python's, what is not finite as null, paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], told: Mapping[str, str] | None = None) -> None:
    """Write arrays of at least one axis to a safetensors file, with strings and a digest of both."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    told = dict(told or {})
    told[_DIGEST] = _digest(arrays, told)
    with written_aside(path) as aside:
        aside.write_bytes(save(arrays, told))


def read_arrays(path: Path, strict: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """What `write_arrays` wrote, arrays and strings; None where there is nothing, or not just that.

    With `strict` false, files without a digest count too, as earlier versions wrote them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError, ValueError, TypeError):
        return None
    digest = told.pop(_DIGEST, None)
    sound = not strict if digest is None else digest == _digest(arrays, told)
    return (arrays, told) if sound else None


def read_header(path: Path) -> dict[str, str] | None:
    """The strings of a safetensors file, unverified; None where there is no such file of the right length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _digest(arrays: Mapping[str, np.ndarray], told: Mapping[str, str]) -> str:
    """Hex SHA-256 of arrays with their names, types and shapes, and of strings."""
    digest = hashlib.sha256(json.dumps(sorted(told.items())).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()

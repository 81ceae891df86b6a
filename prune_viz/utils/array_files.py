"""Arrays in files, with a digest of what they hold.

Large arrays need not be in memory: they are written in parts, and read by mapping their files.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune_viz.utils.errors import UserError
from prune_viz.utils.file_arrays import FileArray, release
from prune_viz.utils.files import MARK, irregularity, written_aside

_CHUNK = 2**25  # bytes of a mapped file that are in memory at a time
_EXHAUSTED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_DIGEST, _WRITER = "sha256", "written_by"
_CODES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
}
_CODE_OF = {np.dtype(kind): code for code, kind in _CODES.items()}


def write_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray | Sequence[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays of at least one axis to a safetensors file, with strings and a digest of both.

    An array may come in parts that lie one behind the other along the first axis. (The library's own writer
    wants each array whole.)
    """
    parts = {name: [array] if isinstance(array, np.ndarray) else array for name, array in arrays.items()}
    order = sorted(parts, key=lambda name: (-parts[name][0].itemsize, name))  # so that each is aligned
    metadata = dict(metadata or {})
    own = {_WRITER: MARK, _DIGEST: _digest(parts, metadata)}
    header: dict[str, Any] = {"__metadata__": {**own, **metadata}}
    begin = 0
    for name in order:
        end = begin + sum(part.nbytes for part in parts[name])
        code, shape = _CODE_OF[parts[name][0].dtype], _shape(parts[name])
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    words = json.dumps(header, ensure_ascii=False).encode()  # what UTF-8 cannot hold is refused
    words += b" " * (-len(words) % 8)
    with written_aside(path) as aside, aside.open("wb") as stream:
        stream.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            for chunk in _chunks(parts[name]):
                stream.write(chunk)


def read_arrays(
    path: Path, strict: bool = True, mapped: Container[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """What `write_arrays` wrote, arrays and strings; None where there is nothing, or not just that.

    Parameters
    ----------
    path : Path
        The file.
    strict : bool
        False: files without a digest count too, as earlier versions wrote them.
    mapped : container of str
        Names of arrays to be left in the file, read-only; as `FileArray`.
        Meanwhile the file may be replaced or removed, but not cut short in place.

    Raises
    ------
    UserError
        If the file may be sound, but the machine cannot open or hold it.
    """
    from safetensors import SafetensorError, safe_open

    if irregularity(path):
        return None
    try:
        path.open("rb").close()  # the library calls a file absent that cannot be opened
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            arrays = {name: file.get_tensor(name) for name in names if name not in mapped}
        arrays.update(_mapped(path, [name for name in names if name in mapped]))
        metadata.pop(_WRITER, None)
        digest = metadata.pop(_DIGEST, None)
        parts = {name: [array] for name, array in arrays.items()}
        sound = not strict if digest is None else digest == _digest(parts, metadata)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        return None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return (arrays, metadata) if sound else None


def _mapped(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file, left there."""
    if not names:
        return {}
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    whole = FileArray(path, np.uint8, "r")
    arrays = {}
    for name in names:
        begin, end = (8 + length + place for place in header[name]["data_offsets"])
        arrays[name] = whole[begin:end].view(_CODES[header[name]["dtype"]]).reshape(header[name]["shape"])
    return arrays


def batches_of(array: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """So many rows of an array after each other, of what is kept in a file each only meanwhile in memory."""
    for begin in range(0, len(array), count):
        yield array[begin : begin + count]
        release(array)


def read_header(path: Path) -> dict[str, str] | None:
    """The strings of a safetensors file, unverified; None where there is no such file of the right length."""
    from safetensors import SafetensorError, safe_open

    if irregularity(path):
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return None


def _digest(arrays: Mapping[str, Sequence[np.ndarray]], metadata: Mapping[str, str]) -> str:
    """Hex SHA-256 of arrays, each in parts, with their names, types and shapes, and of strings."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(arrays):
        parts = arrays[name]
        digest.update(json.dumps([name, str(parts[0].dtype), _shape(parts)]).encode())
        for chunk in _chunks(parts):
            digest.update(chunk)
    return digest.hexdigest()


def _shape(parts: Sequence[np.ndarray]) -> list[int]:
    """Of the array whose parts lie one behind the other along the first axis."""
    return [sum(len(part) for part in parts), *parts[0].shape[1:]]


def _chunks(parts: Sequence[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of an array, each chunk in memory only until the next."""
    for part in parts:
        flat = (part if part.flags.c_contiguous else part.copy()).reshape(-1).view(np.uint8)
        for begin in range(0, len(flat), _CHUNK):
            yield flat[begin : begin + _CHUNK].data
            release(part)

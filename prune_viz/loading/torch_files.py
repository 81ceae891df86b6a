"""Files of torch.save, in its zip format and the one before it, read without trust in them."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prune_viz.loading.safe_unpickler import BoundsError, SafeUnpickler
from prune_viz.loading.stored_tensors import Finisher, Held
from prune_viz.loading.zip_directory import ZipEntry
from prune_viz.utils.errors import UserError, brief

_HEAD = 4096  # bytes that each of an old file's first pickles may have


@dataclass(frozen=True)
class Read:
    """What a file held.

    Attributes
    ----------
    content : object
        What `torch.save` was given: tensors on the CPU, parameters as plain tensors, and `UnusableTensor`
        and `Stub` in the place of what cannot be had.
    code : list of str
        Names of functions and classes in it that stubs stand for.
    """

    content: Any
    code: list[str]


def read_zip(path: Path, entries: Mapping[str, ZipEntry]) -> Read:
    """Read a file in PyTorch's zip format.

    Parameters
    ----------
    path : Path
        The file.
    entries : mapping of str to ZipEntry
        Its directory, checked (`check_entries`).

    Raises
    ------
    UserError
        If it is damaged.
    BoundsError
        If it holds too many Python objects.
    """
    return _reading(path, lambda stream, size: _from_zip(stream, size, entries))


def read_legacy(path: Path) -> Read:
    """Read a file as PyTorch wrote them before 1.6; the errors are those of `read_zip`."""
    return _reading(path, _from_legacy)


def _reading(path: Path, read: Callable[[BinaryIO, int], Read]) -> Read:
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            return read(stream, path.stat().st_size)
    except BoundsError as error:
        raise BoundsError(
            f"{path} {error}: save the model's state dict alone, or pass --trust-pickle if you trust where "
            "the file comes from"
        ) from None
    except Exception as error:  # untrusted content can be wrong in any way
        raise UserError(
            f"{path} is damaged and cannot be read ({brief(error)}); fetch or save it again"
        ) from None


def _from_zip(stream: BinaryIO, size: int, entries: Mapping[str, ZipEntry]) -> Read:
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnpicklingError("it holds several checkpoints")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order is not None and _seek(stream, order).read(min(order.size, 8)) != b"little":
        raise UnpicklingError("its numbers are big-endian: save it on a little-endian machine")
    unpickler = SafeUnpickler(_seek(stream, entries[pickles[0]]), entries[pickles[0]].size)
    content = unpickler.load()

    def read(key: str) -> Tensor:
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise UnpicklingError("a storage is missing")
        return _bytes_of(_seek(stream, entry), entry.size)

    return Read(Finisher(Held(read, size)).finish(content), unpickler.code)


def _seek(stream: BinaryIO, entry: ZipEntry) -> BinaryIO:
    """Go to where an entry's content begins."""
    stream.seek(entry.header)
    head = stream.read(30)
    flags, method, packed, size, name_length, extra_length = struct.unpack("<4x2xHH8xIIHH", head)
    # With bit 3 the sizes follow the content; with 2**32 - 1 they stand in a field of their own.
    unknown = {2**32 - 1, 0} if flags & 8 else {2**32 - 1}
    if (
        head[:4] != b"PK\x03\x04" or method or flags & 1 or {packed, size} - unknown - {entry.size}
        or stream.read(name_length) != entry.name
    ):  # fmt: skip
        raise UnpicklingError("an entry is not what the archive's directory says")
    stream.seek(extra_length, 1)
    return stream


def _bytes_of(stream: BinaryIO, size: int) -> Tensor:
    """The next bytes of a file that has as many."""
    held = torch.empty(size, dtype=torch.uint8)
    if stream.readinto(held.numpy()) != size:  # type: ignore[attr-defined]
        raise UnpicklingError("it ends early")
    return held


def _from_legacy(stream: BinaryIO, size: int) -> Read:
    for _ in range(3):  # the format's number, its version, and what the machine was
        SafeUnpickler(stream, min(_HEAD, size - stream.tell())).load()
    unpickler = SafeUnpickler(stream, size - stream.tell())
    content = unpickler.load()
    keys = SafeUnpickler(stream, size - stream.tell()).load()
    storages: dict[str, Tensor] = {}
    for key in map(str, keys if type(keys) is list else []):
        dtype = unpickler.storages.get(key)
        if dtype is None or key in storages:
            raise UnpicklingError("its list of storages does not fit its tensors")
        (count,) = struct.unpack("<q", stream.read(8))
        if not 0 <= count * dtype.itemsize <= size - stream.tell():
            raise UnpicklingError("a storage is larger than the file")
        storages[key] = _bytes_of(stream, count * dtype.itemsize)

    def read(key: str) -> Tensor:
        if key not in storages:
            raise UnpicklingError("a storage is missing")
        return storages[key]

    return Read(Finisher(Held(read, size)).finish(content), unpickler.code)

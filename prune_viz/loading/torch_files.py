"""Files of torch.save, in its zip format and the one before it, read without trust in them."""

from __future__ import annotations

import re
import stat
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from prune_viz.loading.safe_unpickler import BoundsError, SafeUnpickler
from prune_viz.loading.stored_tensors import Finisher, Held
from prune_viz.utils.errors import UserError, brief

_MOST_ENTRIES = 2**20
_HEAD = 4096  # bytes that each of an old file's first pickles may have


class ZipEntry(NamedTuple):
    """An entry of a zip archive, as the archive's directory has it.

    Attributes
    ----------
    name : bytes
    header : int
        Where its local header begins.
    size : int
        Bytes of its content, unpacked.
    plain : bool
        Whether it is stored as it is, neither compressed nor encrypted.
    link : bool
        Whether it is a link.
    """

    name: bytes
    header: int
    size: int
    plain: bool
    link: bool


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


def read_directory(path: Path) -> dict[str, ZipEntry]:
    """Read the directory of a zip archive.

    Parameters
    ----------
    path : Path
        The archive.

    Returns
    -------
    dict of str to ZipEntry
        The entries by name.

    Raises
    ------
    UserError
        If the directory does not end the file, lists more than about a million entries, lists one twice, or
        is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length, offset, count = _end_of_directory(stream, size)
            if count > _MOST_ENTRIES:
                raise UserError(f"{path} has {count:,} entries, more than a checkpoint has")
            stream.seek(offset)
            entries = [_read_entry(stream) for _ in range(count)]
            if stream.tell() != offset + length or any(entry.header > offset for entry in entries):
                raise ValueError("the directory is not where it is said to be")
    except (OSError, ValueError, struct.error):
        raise UserError(f"{path} is damaged or was cut short; fetch or save it again") from None
    named = {entry.name.decode("utf-8", "surrogateescape"): entry for entry in entries}
    if len(named) != len(entries):
        raise UserError(f"{path} is damaged: it has two entries of one name; fetch or save it again")
    return named


def _end_of_directory(stream: BinaryIO, size: int) -> tuple[int, int, int]:
    """Length, place and number of entries of the directory, which must end where its end record begins."""
    stream.seek(max(0, size - 98))
    tail = stream.read(98)
    record, locator, end = tail[-98:-42], tail[-42:-22], tail[-22:]
    if end[:4] != b"PK\x05\x06":
        raise ValueError("no end record")
    count, length, offset = short = struct.unpack("<HII", end[10:20])
    position = size - 22
    if locator[:4] == b"PK\x06\x07":
        position = size - 98
        count, length, offset = struct.unpack("<QQQ", record[32:56])
        agreed = all(
            one in (full, limit)
            for one, full, limit in zip(
                short, (count, length, offset), (2**16 - 1, 2**32 - 1, 2**32 - 1), strict=True
            )
        )
        if not agreed or record[:4] != b"PK\x06\x06" or struct.unpack("<Q", locator[8:16]) != (position,):
            raise ValueError("end records that disagree")
    if offset + length != position or 46 * count > length:
        raise ValueError("no directory before the end record")
    return length, offset, count


def _read_entry(stream: BinaryIO) -> ZipEntry:
    head = stream.read(46)
    flags, method, packed, size, name_length, extra_length, note_length, attributes, header = struct.unpack(
        "<4x4xHH8xIIHHH4xII", head
    )
    if head[:4] != b"PK\x01\x02":
        raise ValueError("no entry of a directory")
    name, extra = stream.read(name_length), stream.read(extra_length)
    stream.seek(note_length, 1)
    wide = [part for kind, part in _extra_fields(extra) if kind == 1]
    if len(wide) > 1:
        raise ValueError("an entry with two sizes")
    fields, place = [size, packed, header], 0
    for index, number in enumerate(fields):
        if number == 2**32 - 1:
            (fields[index],) = struct.unpack_from("<Q", wide[0] if wide else b"", place)
            place += 8
    size, packed, header = fields
    if not method and size != packed:
        raise ValueError("an entry with two sizes")
    return ZipEntry(name, header, size, not method and not flags & 1, stat.S_ISLNK(attributes >> 16))


def _extra_fields(extra: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        found.append((kind, extra[4 : 4 + length]))
        extra = extra[4 + length :]
    return found


def check_entries(path: Path, entries: Mapping[str, ZipEntry]) -> None:
    """Refuse an archive that `torch.save` cannot have written.

    Parameters
    ----------
    path : Path
        The archive.
    entries : mapping of str to ZipEntry
        Its directory.

    Raises
    ------
    UserError
        If entries are compressed or encrypted, overlap, together are larger than the file, are links, or
        have names that lead out of the archive.
    """
    listed = sorted(entries.values(), key=lambda entry: entry.header)
    ends = [entry.header + 30 + len(entry.name) + entry.size for entry in listed]
    size = path.stat().st_size
    if not all(entry.plain for entry in listed) or sum(entry.size for entry in listed) > size:
        raise UserError(f"{path} would unpack to more than it holds; save the state dict with torch.save")
    if (
        any(end > following.header for end, following in zip(ends, listed[1:], strict=False))
        or ends[-1] > size
    ):
        raise UserError(f"{path} is damaged: its entries overlap; fetch or save it again")
    for name, entry in entries.items():
        parts = name.replace("\\", "/").split("/")
        if entry.link or ".." in parts or not parts[0] or re.match("[A-Za-z]:[/\\\\]", name) or "\0" in name:
            raise UserError(f"{path} is damaged: it has entries that lead elsewhere; fetch or save it again")


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

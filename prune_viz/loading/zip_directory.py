"""The directory of a zip archive, read without trust in it, and before PyTorch is imported."""

from __future__ import annotations

import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from prune_viz.utils.errors import UserError

_MOST_ENTRIES = 2**20


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

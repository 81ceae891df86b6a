"""JSON that others may have written: decoded within bounds, and checked against the types it should have.

Whatever is wrong gets one line that names the field. Nothing in a text decides how deep or how long we work
on it: nesting, the size of numbers and the size of files are bounded.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from prune_viz.utils.errors import UserError
from prune_viz.utils.files import check_readable

LARGEST = 2**29  # bytes of a file; `decisions.json` of 100,000 filters takes about 2**24
_DIGITS = 20  # of an integer
_DEEPEST = 16  # mappings and lists in values of any type

T = TypeVar("T")


def decode_json(text: str | bytes, name: str) -> Any:
    """Decode JSON within bounds.

    Parameters
    ----------
    text : str or bytes
        The JSON, in UTF-8 if bytes.
    name : str
        What it is, for messages: a file, or an option.

    Returns
    -------
    object
        Mappings, lists, strings, finite numbers, booleans and None.

    Raises
    ------
    UserError
        If it is not JSON, nested too deep, names a field twice, or holds a number that is too large or a
        string that is not text.
    """
    try:
        decoded = json.loads(
            text,
            object_pairs_hook=_mapping,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
        if "\\ud" in (text if isinstance(text, str) else text.decode("utf-8")).lower():
            json.dumps(decoded, ensure_ascii=False).encode()  # halves of characters cannot be written
        return decoded
    except RecursionError:
        raise UserError(f"{name} cannot be read: it is nested too deep") from None
    except UnicodeError:
        raise UserError(f"{name} cannot be read: it holds text that is not valid Unicode") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name} is not JSON: {error.msg.lower()} (line {error.lineno}, column {error.colno})"
        ) from None
    except ValueError as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {_short(twice)} twice")
    return mapping


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"the number {digits[:_DIGITS]}... is too large")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {_short(digits)} is too large")
    return number


def _constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def convert_json(value: Any, kind: type[T], name: str) -> T:
    """Check decoded JSON against a type, and convert it.

    Parameters
    ----------
    value : object
        From `decode_json`.
    kind : type
        A dataclass, or whatever else msgspec converts to. Fields that it does not have are left out.
    name : str
        What `value` is, for messages.

    Raises
    ------
    UserError
        If it does not fit; names the field.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `")
        what = re.sub(r"`([^`]*)`", r"\1", what).replace("Object missing required field", "it has no field")
        place = place.rstrip("`").removeprefix("$").removeprefix(".")
        where = f"at {_short(place)}: " if place else ""
        raise UserError(f"{name} is damaged: {where}{what[:1].lower()}{what[1:]}") from None
    except RecursionError:
        raise UserError(f"{name} is damaged: it is nested too deep") from None


def read_json(path: Path, kind: type[T], name: str | None = None) -> T:
    """Read a JSON file of a type.

    Parameters
    ----------
    path : Path
        The file.
    kind : type
        As for `convert_json`.
    name : str, optional
        What the file is, for messages; its path by default.

    Raises
    ------
    UserError
        If there is no such regular file, it is larger than `LARGEST`, or does not hold what it should.
    """
    return convert_json(decode_json(read_text(path), name or str(path)), kind, name or str(path))


def read_text(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file of at most so many; raises `UserError` for any other."""
    check_readable(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(largest + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > largest:
        raise UserError(f"{path} cannot be read: it is larger than {largest:,} bytes")
    return content


def check_depth(value: Any, name: str, deepest: int = _DEEPEST) -> None:
    """Raise `ValueError` where a value of any type is nested deeper than any of ours is."""
    if deepest < 0:
        raise ValueError(f"{name} is nested too deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_depth(inner, name, deepest - 1)

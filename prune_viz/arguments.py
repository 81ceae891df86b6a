"""What the command line is given, read and checked before anything heavy is imported."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_viz.errors import UserError


def parse_kwargs(text: str | None) -> dict[str, Any] | None:
    """Read ``--arch-kwargs``; raises `UserError` unless it is a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--arch-kwargs is not JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise UserError(f'--arch-kwargs must be a JSON object such as {{"num_classes": 10}}, not {text}')
    return value


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Read ``--input-shape``; raises `UserError` unless it is one to four positive numbers."""
    if text is None:
        return None
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*(,\s*[1-9][0-9]{0,5}\s*){0,3}", text, re.ASCII):
        raise UserError(
            f"--input-shape {text}: expected channels and sizes by commas, such as 3,224,224, or "
            "the length of signals without a channel axis"
        )
    return tuple(int(size) for size in text.split(","))


def parse_shapes(texts: Sequence[str] | None) -> list[tuple[int, ...]]:
    """Read every ``--input-shape``, as `parse_shape` does."""
    return [shape for text in texts or () if (shape := parse_shape(text)) is not None]


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read ``--mean`` or ``--std``; raises `UserError` unless it is numbers by commas."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UserError(
            f"{option} {text}: expected numbers by commas, one a channel, or one for all"
        ) from None


def check_device(name: str) -> None:
    """Raise `UserError` unless `name` is one that ``--device`` takes."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")


def check_output(option: str, file: Path, inputs: Sequence[Path]) -> None:
    """Raise `UserError` unless `file`, which `option` names, can be written without overwriting an input."""
    if file.is_dir():
        raise UserError(f"{option} {file} is a directory; name a file")
    if file.exists() and any(given.exists() and file.samefile(given) for given in inputs):
        raise UserError(f"{option} {file} would overwrite an input; name another file")
    check_writable(file.absolute().parent)


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

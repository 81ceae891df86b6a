"""What the command line is given, read and checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_viz.utils.errors import UserError
from prune_viz.utils.json_files import decode_json
from prune_viz.utils.user_code import split_spec


def parse_kwargs(text: str | None) -> dict[str, Any] | None:
    """Read ``--arch-kwargs``; raises `UserError` unless it is a JSON object."""
    if text is None:
        return None
    value = decode_json(text, "--arch-kwargs")
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


def parse_memory(text: str | None) -> int | None:
    """Read ``--memory``, in bytes; raises `UserError` unless it is a size such as 8G, 500M or 1.5GiB."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.ASCII | re.I)
    size = 0 if found is None else int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    if size <= 0:
        raise UserError(f"--memory {text}: expected a size such as 8G or 500M")
    return size


def check_budget(**given: float | None) -> dict[str, float]:
    """The one of ``ratio, macs, tolerance`` that was given, or none; raises `UserError` for nonsense."""
    budget = {name: value for name, value in given.items() if value is not None}
    if len(budget) > 1:
        raise UserError(f"give one of --{' and --'.join(budget)}, not both")
    for name, value in budget.items():
        if not value >= 0:
            raise UserError(f"--{name} must be at least 0, not {value:g}")
        if name != "tolerance" and value >= 1:
            raise UserError(f"--{name} must be at least 0 and below 1, not {value:g}")
    return budget


def check_code(folder: Path | None) -> None:
    """Raise `UserError` unless what ``--code`` names is a directory, if anything."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--code {folder} is not a directory")


def check_spec(spec: str | None) -> None:
    """Raise `UserError` unless ``--arch`` has the form of a SPEC, if it is given."""
    if spec is not None:
        split_spec(spec)


def check_device(name: str) -> None:
    """Raise `UserError` unless `name` is one that ``--device`` takes."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")

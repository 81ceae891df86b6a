"""Importing modules of the user's own, such as those that an option names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_viz.utils.errors import UserError


def split_spec(spec: str) -> tuple[str, str]:
    """Split an architecture's SPEC into its library or module, and its name there.

    Raises
    ------
    UserError
        If it has not that form.
    """
    home, _, name = spec.partition(":")
    if not home or not name:
        raise UserError(f"--arch {spec}: expected torchvision:NAME, timm:NAME or package.module:factory")
    return home, name


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Let modules of the current directory be imported, as under ``python -m``."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    # Last, so that a file of the user's cannot take the place of an installed package.
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)

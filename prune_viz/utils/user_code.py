"""Importing modules of the user's own, such as those that an option names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

"""Arrays that stay in a file: what an operation reads or writes of them leaves memory again after it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


class FileArray(np.memmap[Any, np.dtype[Any]]):
    """A `numpy.memmap` whose pages leave memory after every operation on it.

    Arithmetic, numpy's functions and indexing by arrays or lists release what they brought into memory.
    Their results are ordinary arrays; views, as of a slice, are arrays of the same file.
    """

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **options: Any
    ) -> Any:
        if out:
            options["out"] = tuple(_plain(array) for array in out)
        result = getattr(ufunc, method)(*(_plain(value) for value in inputs), **options)
        _release([*inputs, *out])
        if not out:
            return result
        return out[0] if len(out) == 1 else out

    def __array_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[Any],
        arguments: Iterable[Any],
        options: Mapping[str, Any],
    ) -> Any:
        result = super().__array_function__(function, types, arguments, options)
        _release([*arguments, *options.values()])
        return result

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(found, FileArray):
            release(self)
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        release(self)


def release(array: np.ndarray) -> None:
    """Take out of memory what an array keeps in a file, with all else that is mapped with it."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, FileArray) else value


def _release(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, FileArray):
            release(value)
        elif isinstance(value, list | tuple):
            _release(value)

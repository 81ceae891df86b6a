"""Memory-mapped arrays whose pages leave memory after every operation on them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


class FileArray(np.memmap[Any, np.dtype[Any]]):
    """A `numpy.memmap` whose pages leave memory after every operation on it.

    Arithmetic, reductions, numpy's functions and indexing by arrays or lists release what they brought into
    memory; views, as of a slice, are arrays of the same file. Methods that copy, such as ``copy`` and
    ``astype``, and other libraries that read the array release nothing.
    """

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: tuple[Any, ...] = (), **options: Any
    ) -> Any:
        if out:
            options["out"] = tuple(_plain(array) for array in out)
        options = {name: value if name == "out" else _plain(value) for name, value in options.items()}
        result = getattr(ufunc, method)(*(_plain(value) for value in inputs), **options)
        _release([*inputs, *out])
        if len(out) == 1:
            return out[0]
        found = result if isinstance(result, tuple) else (result,)
        return result if not out else tuple(a if b is None else b for a, b in zip(found, out, strict=True))

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
        if getattr(found, "_mmap", None) is not None:
            return found  # a view
        release(self)
        return _plain(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        release(self)


def release(array: np.ndarray) -> None:
    """Drop an array's pages from memory, and those of all arrays of the same mapping."""
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

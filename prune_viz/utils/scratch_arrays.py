"""Large arrays: in memory, or, where a budget does not hold them, in files that vanish with them."""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from prune_viz.utils.errors import UserError
from prune_viz.utils.file_arrays import FileArray
from prune_viz.utils.memory import Budget, in_words

_SHARE = 4  # of what is left of main memory, one part at most is for a single array
_LEAST = 2**20  # bytes of an array that is worth a file


class ScratchArrays:
    """Where large arrays are kept.

    Parameters
    ----------
    budget : Budget or None
        None: all in memory.

    Attributes
    ----------
    most : int
        Bytes of the largest array that is kept in memory. (How many such arrays there are at a time is the
        caller's to bound.)
    """

    def __init__(self, budget: Budget | None) -> None:
        self.most = sys.maxsize if budget is None else max(_LEAST, budget.of_host().left() // _SHARE)
        self._folder = None if budget is None else budget.folder

    def zeros(self, shape: Sequence[int], dtype: type[np.floating] = np.float64) -> np.ndarray:
        """Zeros, in memory or, as a `FileArray`, in a file.

        Parameters
        ----------
        shape : sequence of int
            The array's.
        dtype : type
            Of its numbers.

        Raises
        ------
        UserError
            If it goes to a file, and the disk has no room for it.
        """
        size = np.dtype(dtype).itemsize * math.prod(shape)
        if size <= self.most:
            return np.zeros(shape, dtype)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # A full disk says so here, and does not kill us later.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                elif shutil.disk_usage(self._folder or tempfile.gettempdir()).free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return FileArray(file, dtype, "r+", shape=tuple(shape))
        except OSError as error:
            raise UserError(
                f"{in_words(size)} that memory does not hold cannot be kept in "
                f"{self._folder or tempfile.gettempdir()}: {error.strerror}; make room or give more --memory"
            ) from error

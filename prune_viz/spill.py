"""Large arrays: in memory, or, where a budget does not hold them, in files that vanish with them."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from prune_viz.errors import UserError
from prune_viz.memory import Budget, in_words

_SHARE = 4  # of what is left of main memory, one part at most is for a single array


class Store:
    """Where large arrays are kept.

    Parameters
    ----------
    budget : Budget or None
        None: all in memory.

    Attributes
    ----------
    most : int
        Bytes of the largest array that is kept in memory.
    """

    def __init__(self, budget: Budget | None) -> None:
        self.most = sys.maxsize if budget is None else budget.of_host().left() // _SHARE
        self._folder = None if budget is None else budget.folder

    def zeros(self, shape: Sequence[int]) -> np.ndarray:
        """Zeros of float64; what of a file leaves memory by `files.evict` comes back when it is used again.

        Raises
        ------
        UserError
            If it goes to a file, and the disk has no room for it.
        """
        size = 8 * math.prod(shape)
        if size <= self.most:
            return np.zeros(shape)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):  # a full disk says so here, and does not kill us later
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, np.float64, "r+", shape=tuple(shape))
        except OSError as error:
            raise UserError(
                f"{in_words(size)} that memory does not hold cannot be kept in "
                f"{self._folder or tempfile.gettempdir()}: {error.strerror}; make room or give more --memory"
            ) from error

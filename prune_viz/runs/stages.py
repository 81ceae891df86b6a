"""Where a run comes from and what it took: versions, seconds and memory a stage."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from prune_viz import __version__


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import pandas as pd  # late: what comes before a run's stages does without

    return {
        "prune_viz": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


Log = Callable[..., None]  # writes an event and what belongs to it, as `prune_viz.runs.log.RunLog` does


class Stages:
    """Seconds a stage and peak memory up to its end.

    Parameters
    ----------
    log : callable, optional
        Writes an event, such as the end of a stage, to the run's log.
    """

    def __init__(self, log: Log | None = None) -> None:
        self.log: Log = log or (lambda event, **_: None)
        self._seconds: dict[str, float] = {}
        self._peak: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to a stage's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self._peak[name] = peak_mib()
        self.log("stage done", stage=name, seconds=round(seconds, 2), peak_mib=round(peak_mib(), 1))

    def listed(self) -> list[dict[str, Any]]:
        """A dict a stage, ``name, seconds, peak_mib``, in the order in which they first ran."""
        return [
            {"name": name, "seconds": round(seconds, 2), "peak_mib": round(self._peak[name], 1)}
            for name, seconds in self._seconds.items()
        ]

    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self._seconds.values())


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

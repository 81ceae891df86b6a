"""How far work of several stages is, and the time it has left.

What each stage takes is expected in some unit that all share; how many seconds such a unit is shows as the
work goes on. Stages that are expected too short or too long shift the estimate gradually, so that it does not
jump.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEADY = 15.0  # seconds in which the time left follows two thirds of a change
_ENOUGH = 2.0  # seconds of work after which the first estimate is made
_LEAST = 1e-9  # share of the work


@dataclass(frozen=True)
class Expected:
    """A stage, and what it is expected to take, in any unit."""

    stage: str
    work: float


class TimeLeft:
    """Follows work through its stages.

    Parameters
    ----------
    expected : sequence of Expected
        The stages in order. The same name may stand there twice.
    """

    def __init__(self, expected: Sequence[Expected] = ()) -> None:
        self._expected = list(expected)
        self._whole = sum(one.work for one in expected)
        self._place = -1
        self._share = self._before = 0.0  # of the current stage: done, and before it was begun anew
        self._left = self._whole
        self._done = 0.0  # work of this process
        self._began: float | None = None
        self._shown: tuple[float, float] | None = None  # when, and seconds left then

    @property
    def number(self) -> int:
        """Which stage it is, from 1; 0 before the first."""
        return self._place + 1

    @property
    def count(self) -> int:
        """How many stages there are."""
        return len(self._expected)

    @property
    def share(self) -> float:
        """How much of all work is done, 0 to 1."""
        return 1 - self._left / self._whole if self._whole else 0.0

    def start(self, stage: str, share: float, now: float) -> None:
        """Begin a stage, of which some share was done before; stages that are passed over need nothing.

        A stage of an unexpected name, or the current one begun anew, goes on where the last one was.
        """
        self._began = now if self._began is None else self._began
        names = [one.stage for one in self._expected]
        if stage in names[self._place + 1 :]:
            self._place = names.index(stage, self._place + 1)
            self._before, self._share = 0.0, share
        else:
            self._before = self._share
        self._left = self._work_left()

    def advance(self, share: float) -> None:
        """Note what share of the current stage is done, since it was last begun."""
        self._share = self._before + (1 - self._before) * share
        left = self._work_left()
        self._done += max(self._left - left, 0.0)
        self._left = left

    def _work_left(self) -> float:
        if self._place < 0:
            return self._whole
        here = self._expected[self._place].work * (1 - self._share)
        return here + sum(one.work for one in self._expected[self._place + 1 :])

    def seconds(self, now: float) -> float | None:
        """Seconds left, or None where too little is done to tell."""
        if self._began is None or now - self._began < _ENOUGH or self._done <= _LEAST * self._whole:
            return None
        target = self._left * (now - self._began) / self._done
        if self._shown is None:
            shown = target
        else:
            then, last = self._shown
            shown = max(last - (now - then), 0.0)
            shown += (target - shown) * -math.expm1(-(now - then) / STEADY)
        self._shown = now, shown
        return shown


def rounded(seconds: float) -> str:
    """Write a time left as roughly as it is known: ``under 10 s``, ``40 s``, ``5 min``, ``2 h 10 min``."""
    if seconds < 10:
        return "under 10 s"
    if seconds < 55:
        return f"{round(seconds / 5) * 5} s"
    if seconds < 3570:
        return f"{max(round(seconds / 60), 1)} min"
    minutes = round(seconds / 600) * 10
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")

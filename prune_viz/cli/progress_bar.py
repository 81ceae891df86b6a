"""One bar for a whole analysis, on standard error: which stage, what it counts, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from prune_viz.utils.errors import one_line
from prune_viz.utils.progress import Progress
from prune_viz.utils.time_left import Expected, TimeLeft, rounded

_STEPS = 1000  # of the bar
_BAR, _ALL_BUT_NOTE, _SHORTEST_NOTE = 14, 79, 12  # columns


class _LeftColumn(ProgressColumn):
    """The time left, in words."""

    def __init__(self, left: Callable[[], float | None]) -> None:
        super().__init__(Column(no_wrap=True, min_width=15))
        self._left = left

    def render(self, task: Task) -> Text:
        """Write it; nothing where too little is done to tell, or all is."""
        seconds = None if task.finished else self._left()
        return Text("" if seconds is None else f"{rounded(seconds)} left")


class BarProgress(Progress):
    """A bar for all stages that are expected, or else for each.

    Parameters
    ----------
    console : Console, optional
        Where it is drawn; standard error by default.
    clock : callable, optional
        Gives the time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._work, self._is_planned = TimeLeft(), False
        self._done = self._total = 0
        console = console or Console(stderr=True)
        room = console.width - _ALL_BUT_NOTE
        self._room = room if room >= _SHORTEST_NOTE else 0
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.fields[place]}{task.description:<14}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=_BAR),
            TextColumn("{task.fields[counts]}", table_column=Column(no_wrap=True, justify="right")),
            TimeElapsedColumn(),
            _LeftColumn(lambda: self._work.seconds(self._clock())),
            TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True)),
            console=console,
            get_time=clock,
        )
        self._task = self._bar.add_task("", total=_STEPS, visible=False, place="", counts="", note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._work.number:
            self._bar.update(self._task, completed=_STEPS, description="done", place="", counts="", note="")
        self._bar.stop()

    def expect(self, stages: Callable[[], Sequence[Expected]]) -> None:
        """Say which stages are to come, in order, and what they will take."""
        self._work, self._is_planned = TimeLeft(stages()), True
        self._bar.reset(self._task, visible=False)

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begin `stage`, which has `total` steps, of which `done` were done by an earlier process."""
        if not self._is_planned:
            self._work = TimeLeft([Expected(stage, 1.0)])
        self._done, self._total = done, total
        self._work.start(stage, done / max(total, 1), self._clock())
        place = f"{self._work.number}/{self._work.count} " if self._work.count > 1 else ""
        self._bar.update(self._task, description=escape(stage), place=place, note="", visible=True)
        self._draw()

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more steps of the current stage are done."""
        self._done += steps
        self._work.advance(min(self._done / max(self._total, 1), 1.0))
        self._draw()

    def _draw(self) -> None:
        counts = f"{self._done:,}/{self._total:,}"
        self._bar.update(self._task, completed=_STEPS * self._work.share, counts=counts)

    def note(self, text: str) -> None:
        """Say what the current stage is working on, as far as the line has room."""
        shown = text.encode("ascii", "backslashreplace").decode()[: self._room]
        self._bar.update(self._task, note=escape(shown))

    def say(self, sentence: str) -> None:
        """Tell the user something that stays."""
        self._bar.console.print(escape(one_line(sentence)), style="bold", soft_wrap=True)

    def finish(self) -> None:
        """End the current stage."""
        self._bar.update(self._task, note="")

"""Progress of long work: a silent one for libraries, a bar with the time left for terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars

from prune_viz.utils.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor


class Progress:
    """Called with stages and their steps; this one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, stage: str, total: int) -> None:
        """Begin `stage`, which has `total` steps."""

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more steps of the current stage are done."""

    def note(self, text: str) -> None:
        """Say what the current stage is working on, a layer's name for instance."""

    def say(self, sentence: str) -> None:
        """Tell the user something before the work begins."""

    def finish(self) -> None:
        """End the current stage."""


def counted(
    progress: Progress, stage: str, batches: Iterable[tuple[Tensor, bool]], total: int
) -> Iterator[tuple[Tensor, bool]]:
    """Give batches on and record how many inputs of a stage are done."""
    progress.start(stage, total)
    for batch, held_out in batches:
        yield batch, held_out
        progress.advance(len(batch))
    progress.finish()


class PlainProgress(Progress):
    """No bars, but what is said before the work begins, on standard error."""

    def say(self, sentence: str) -> None:
        """Tell the user something before the work begins."""
        print(one_line(sentence), file=sys.stderr)


class BarProgress(Progress):
    """A bar a stage on standard error, with the layer in hand, counts and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """Begin `stage`, which has `total` steps."""
        self._task = self._bars.add_task(escape(stage), total=total, note="")

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more steps of the current stage are done."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def note(self, text: str) -> None:
        """Say what the current stage is working on, a layer's name for instance."""
        if self._task is not None:
            self._bars.update(self._task, note=escape(text.encode("ascii", "backslashreplace").decode()[:60]))

    def say(self, sentence: str) -> None:
        """Tell the user something before the work begins."""
        self._bars.console.print(escape(one_line(sentence)), style="bold")

    def finish(self) -> None:
        """End the current stage."""
        if self._task is not None:
            self._bars.update(self._task, note="")
        self._task = None

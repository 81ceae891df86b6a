"""Progress of long work: what stages tell whoever watches. Libraries hear of it, and show nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from prune_viz.utils.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from prune_viz.utils.time_left import Expected


class Progress:
    """Called with stages and their steps; this one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def expect(self, stages: Callable[[], Sequence[Expected]]) -> None:
        """Say which stages are to come, in order, and what they will take.

        They are counted only where someone watches, as that takes a moment. Others may come between.
        """

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """Begin `stage`, which has `total` steps, of which `done` were done by an earlier process."""

    def advance(self, steps: int = 1) -> None:
        """Record that `steps` more steps of the current stage are done."""

    def note(self, text: str) -> None:
        """Say what the current stage is working on, a layer's name for instance."""

    def say(self, sentence: str) -> None:
        """Tell the user something that stays, such as where a first report is."""

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
    """No bar, but what is said, on standard error."""

    def say(self, sentence: str) -> None:
        """Tell the user something that stays."""
        print(one_line(sentence), file=sys.stderr)

"""What all stages of a run share: its seed, what is known of inputs, memory, progress and the clock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from prune_viz.execution.quality import EFFORTS, Effort, Quality
from prune_viz.network.inputs import InputStatistics
from prune_viz.runs.output_kind import OutputKind
from prune_viz.runs.stages import Stages
from prune_viz.utils.devices import release_memory
from prune_viz.utils.memory import Budget
from prune_viz.utils.progress import Progress


@dataclass(frozen=True)
class RunContext:
    """What every stage of a run receives besides its data.

    Attributes
    ----------
    seed : int
        Of all random numbers.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    output : OutputKind
        What the network returns.
    budget : Budget or None
        Memory that may be taken; None for no bound.
    progress : Progress
        Shows how the work goes.
    stages : Stages
        Times each stage and writes it to the log.
    effort : Effort
        How much work each stage does.
    """

    seed: int = 0
    statistics: InputStatistics | None = None
    output: OutputKind = field(default_factory=OutputKind)
    budget: Budget | None = None
    progress: Progress = field(default_factory=Progress)
    stages: Stages = field(default_factory=Stages)
    effort: Effort = EFFORTS[Quality.STANDARD]

    def quietly(self) -> RunContext:
        """The same, showing no progress."""
        return replace(self, progress=Progress())

    def host_memory(self) -> int:
        """Bytes of main memory that may still be taken."""
        return sys.maxsize if self.budget is None else self.budget.of_host().left()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside as that stage; release the device's memory after it."""
        with self.stages.timed(name):
            yield
        release_memory(torch.device("cpu") if self.budget is None else self.budget.device)

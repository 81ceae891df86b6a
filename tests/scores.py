"""What most of the tests' networks return."""

from prune_viz.runs.output_kind import OutputKind, Task

SCORES = OutputKind(Task.CLASSES)

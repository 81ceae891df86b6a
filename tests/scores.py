"""What most of the tests' networks return."""

from prune_viz.execution.run_context import RunContext
from prune_viz.runs.output_kind import OutputKind, Task

SCORES = OutputKind(Task.CLASSES)
SCORING = RunContext(output=SCORES)

"""Tasks: stimuli of some filters each, run on this machine or a Ray cluster, kept in files."""

from prune_viz.execution.executors import LocalEngine, run_tasks
from prune_viz.execution.tasks import Task, plan_tasks

__all__ = ["LocalEngine", "Task", "plan_tasks", "run_tasks"]

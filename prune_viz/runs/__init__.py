"""The run directory: its files as typed data, who owns it, its log and its state."""

from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.status import read_status

__all__ = ["RunDirectory", "read_status"]

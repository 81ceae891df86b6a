"""The whole way from a model to a run directory, and what it would take."""

from prune_viz.analysis.found import Analysis
from prune_viz.analysis.pipeline import analyze, estimate

__all__ = ["Analysis", "analyze", "estimate"]

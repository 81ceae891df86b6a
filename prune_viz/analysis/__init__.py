"""The whole way from a model to a run directory, and what it would take."""

from prune_viz.analysis.pipeline import Analysis, analyze, estimate

__all__ = ["Analysis", "analyze", "estimate"]

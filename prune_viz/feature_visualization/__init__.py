"""Stimuli: the input that excites each filter most, how it is found, and what responds to it."""

from prune_viz.feature_visualization.stimuli import Stimuli, maximize

__all__ = ["Stimuli", "maximize"]

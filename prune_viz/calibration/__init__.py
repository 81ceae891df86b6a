"""Synthetic calibration images: where they start, the losses that move them, and how they are kept."""

from prune_viz.calibration.images import SyntheticImages
from prune_viz.calibration.synthetic_images import calibrate

__all__ = ["SyntheticImages", "calibrate"]

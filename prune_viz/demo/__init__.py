"""The demo: a small network trained on handwritten digits, with useless filters planted in it."""

from prune_viz.demo.digits import DigitsNet
from prune_viz.demo.run import run_demo

__all__ = ["DigitsNet", "run_demo"]

"""What a fork server imports before it forks: all that a run imports and compiles."""

from __future__ import annotations

import numpy as np
import torch

import prune_viz.report
from prune_viz.embedding.layer_map import FEW, draw_map

torch.set_num_threads(1)
MAP = draw_map(np.random.default_rng(0).standard_normal((FEW + 1, 6)), 0)  # has UMAP compiled

__all__ = ["MAP", "prune_viz"]

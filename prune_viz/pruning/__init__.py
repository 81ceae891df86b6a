"""Masks and what becomes of them: budgets, reviews, zeroed or smaller models, export."""

from prune_viz.pruning.apply import apply_masks, make_permanent
from prune_viz.pruning.masks import Masks, load_masks, save_masks
from prune_viz.pruning.remove import remove_filters

__all__ = ["Masks", "apply_masks", "load_masks", "make_permanent", "remove_filters", "save_masks"]

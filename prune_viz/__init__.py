"""See what every filter of a convolutional network does, and remove those that do nothing or only repeat.

Everything the command line does can be called from here; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_viz.analysis.pipeline import analyze
    from prune_viz.feature_visualization.stimuli import maximize
    from prune_viz.loading.checkpoints import load_model
    from prune_viz.pruning.apply import apply_masks, make_permanent
    from prune_viz.pruning.consistency import reconcile_masks
    from prune_viz.pruning.healing import heal
    from prune_viz.pruning.interop import prune_with_torch, to_indices, to_nni
    from prune_viz.pruning.masks import Masks, load_masks, save_masks
    from prune_viz.pruning.remove import remove_filters
    from prune_viz.utils.errors import UserError

__version__ = "0.2.0"

__all__ = [
    "Masks",
    "UserError",
    "analyze",
    "apply_masks",
    "heal",
    "load_masks",
    "load_model",
    "make_permanent",
    "maximize",
    "prune_with_torch",
    "reconcile_masks",
    "remove_filters",
    "save_masks",
    "to_indices",
    "to_nni",
]

_HOMES = {
    "Masks": "pruning.masks",
    "UserError": "utils.errors",
    "analyze": "analysis.pipeline",
    "apply_masks": "pruning.apply",
    "heal": "pruning.healing",
    "load_masks": "pruning.masks",
    "load_model": "loading.checkpoints",
    "make_permanent": "pruning.apply",
    "maximize": "feature_visualization.stimuli",
    "prune_with_torch": "pruning.interop",
    "reconcile_masks": "pruning.consistency",
    "remove_filters": "pruning.remove",
    "save_masks": "pruning.masks",
    "to_indices": "pruning.interop",
    "to_nni": "pruning.interop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

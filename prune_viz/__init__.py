"""See what every filter of a convolutional network does, and remove those that do nothing or only repeat.

Everything the command line does can be called from here; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune_viz.analysis import analyze
    from prune_viz.checkpoints import load_model
    from prune_viz.errors import UserError
    from prune_viz.mask_formats import prune_with_torch, to_indices, to_nni
    from prune_viz.masking import apply_masks, make_permanent
    from prune_viz.masks import Masks, load_masks, save_masks
    from prune_viz.reconciliation import reconcile_masks
    from prune_viz.stimuli import maximize
    from prune_viz.surgery import remove_filters

# Read by torch at its first allocation, on Linux: large feature maps on huge pages are made faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

__all__ = [
    "Masks",
    "UserError",
    "analyze",
    "apply_masks",
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
    "Masks": "masks",
    "UserError": "errors",
    "analyze": "analysis",
    "apply_masks": "masking",
    "load_masks": "masks",
    "load_model": "checkpoints",
    "make_permanent": "masking",
    "maximize": "stimuli",
    "prune_with_torch": "mask_formats",
    "reconcile_masks": "reconciliation",
    "remove_filters": "surgery",
    "save_masks": "masks",
    "to_indices": "mask_formats",
    "to_nni": "mask_formats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What an analysis found, as Python has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_viz.runs.run_directory import LayerTensors

if TYPE_CHECKING:
    import pandas as pd

    from prune_viz.pruning.masks import Masks


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes
    ----------
    filters : DataFrame
        A row a filter, columns `filters_csv.FILTER_COLUMNS`.
    masks : Masks
        A mask for every convolution that runs, True = keep, consistent over coupling groups.
    layers : mapping of str to LayerTensors
        Stimuli, activations and responses of each layer, read when asked for.
    summary : dict
        ``filters, keep, redundant, dead, parameters, parameters_after, macs, macs_after, seconds,
        peak_mib``.
    out : Path or None
        The run directory; None if the run was not kept.
    """

    filters: pd.DataFrame
    masks: Masks
    layers: Mapping[str, LayerTensors]
    summary: dict[str, Any]
    out: Path | None

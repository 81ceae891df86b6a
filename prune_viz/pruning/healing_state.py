"""Healing that was interrupted: what is kept of it beside the file that it makes, and read again."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_viz.loading.formats import read_content
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import write_torch


@dataclass(frozen=True)
class HealingState:
    """Where training is.

    Attributes
    ----------
    key : str
        Digest of all that training depends on.
    rate : float
        The highest rate, as trials found it.
    step : int
        Steps that are done.
    weights : dict of str to Tensor
        The network's state dict.
    optimiser : dict
        The optimiser's state dict.
    best : dict of str to Tensor
        The best network's state dict so far.
    number : int
        After how many steps that was.
    change : float
        Change of its output on images kept out.
    """

    key: str
    rate: float
    step: int
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]
    best: dict[str, Tensor]
    number: int
    change: float


def state_file(out: Path) -> Path:
    """Where healing is kept while it makes `out`."""
    return out.with_name(f".{out.name}.prune-viz-healing")


def write_state(path: Path, state: HealingState) -> None:
    """Write it, whole or not at all."""
    write_torch(path, {one.name: getattr(state, one.name) for one in fields(state)})


def read_state(path: Path, key: str) -> HealingState | None:
    """Read it; None where there is none, it is damaged, or it is of other training."""
    if not path.is_file():
        return None
    try:
        content = read_content(path)
    except UserError:
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    try:
        return HealingState(**content)
    except TypeError:
        return None

"""What masks do to a network, predicted and measured, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from prune_viz.network.copies import plain_copy
from prune_viz.pruning.compensation import meter_for
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.pruning.remove import compensated
from prune_viz.redundancy.basis import UNMEASURED
from prune_viz.runs.damage import Damage, Unit
from prune_viz.utils.errors import UserError

FAR = 2.0  # factor by which predicted and measured may differ without a word
_NOTHING = {Unit.OUTPUT: 1e-5}  # damage that is as good as none, whatever was predicted
_NOTHING_ELSE = 1e-4


@dataclass(frozen=True)
class Outcome:
    """What masks do.

    Attributes
    ----------
    removed, filters : int
        How many filters go, of how many.
    saved : float or None
        Share of the multiply-accumulates, of `whole`; None where that is not known.
    whole : int
        Multiply-accumulates of the whole network.
    predicted, measured : Damage or None
        Change of the output: predicted from the analysis, and measured on images that no fit saw.
    images : str
        What it was measured on, for people; empty where it was not.
    rough : str
        Why predictions are rough, and what would help.
    out : Path
        Where the masks were written.
    unmeasured : str
        Why nothing was measured, for people; empty where that was not asked for, or it was.
    """

    removed: int
    filters: int
    saved: float | None
    whole: int
    predicted: Damage | None
    measured: Damage | None
    images: str
    rough: str
    out: Path
    unmeasured: str = ""

    @classmethod
    def of(cls, masks: Masks, out: Path, saved: float | None, whole: int) -> Self:
        """What such masks do."""
        return cls(
            masks.removed, masks.filters, saved, whole, masks.predicted, masks.measured, masks.measured_on,
            masks.rough, out,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        known = self.measured or self.predicted
        of_output = self.predicted is not None and self.predicted.unit is not Unit.CONSUMERS
        predicted = self.predicted if of_output or self.measured is None else None
        return {
            "filters_removed": self.removed,
            "filters": self.filters,
            "macs_saved": self.saved,
            "predicted_total": None if predicted is None else predicted.value,
            "measured_total": None if self.measured is None else self.measured.value,
            "unit": None if known is None else known.unit.value,
            "measured_on": self.images or None,
            "rough": self.rough or None,
            "out": str(self.out),
        }

    def lines(self) -> list[str]:
        """What was done, for people."""
        share = self.removed / max(self.filters, 1)
        lines = [f"{self.removed:,} of {self.filters:,} filters go ({share:.1%})"]
        if self.saved is not None and self.whole:
            lines.append(f"that saves {self.saved:.1%} of {self.whole:,} multiply-accumulates")
        lines += describe_change(self.predicted, self.measured, self.images, self.rough)
        return [*lines, *([f"note: {self.unmeasured}"] if self.unmeasured else [])]


def describe_change(predicted: Damage | None, measured: Damage | None, images: str, rough: str) -> list[str]:
    """Predicted and measured change of the output side by side, and how far they can be trusted."""
    if predicted is not None and predicted.unit is Unit.CONSUMERS:
        predicted = None  # of the layers behind, not of the output
    parts = [] if predicted is None else [f"predicted {predicted}"]
    parts += [] if measured is None else [f"measured {measured} on {images}"]
    lines = [f"change of the output: {', '.join(parts)}"] if parts else []
    if predicted is not None and measured is not None and differ(predicted, measured):
        factor = max(predicted.value, measured.value) / max(min(predicted.value, measured.value), 1e-300)
        times = f"a factor of {factor:.1f}" if factor < 1e3 else "more than a factor of 1,000"
        lines.append(f"note: these differ by {times}; trust the measured one")
    if rough and parts:
        lines.append(f"note: {'both are' if len(parts) > 1 else 'this is'} rough: {rough}")
    return lines


def differ(predicted: Damage, measured: Damage) -> bool:
    """Whether a prediction and a measurement differ by more than `FAR`, and one of them is worth a word."""
    low, high = sorted((predicted.value, measured.value))
    return high > _NOTHING.get(measured.unit, _NOTHING_ELSE) and high > FAR * low


def measure_masks(model: nn.Module, masks: Masks) -> str:
    """Apply masks to a copy of the model, and measure the change of its output on images that no fit saw.

    Parameters
    ----------
    model : nn.Module
        The network that was analysed; left unchanged.
    masks : Masks
        Consistent masks, with merges and images; `measured` and `measured_on` are set.

    Returns
    -------
    str
        For people: why it could not be measured; empty where it was.

    Raises
    ------
    UserError
        If the masks are of another model.
    """
    check_masks(model, masks)
    if not masks.origin.has_weights_of(model):
        raise UserError("the model is not the one that was analysed: its weights differ")
    images = masks.images.kept_out
    if images is None:
        return "not measured: the run has no images to measure on"
    try:
        changed = compensated(plain_copy(model).float(), masks, images[:1])
    except UserError as error:
        return f"not measured: {error}"
    measure_change(model, changed, masks)
    return "" if masks.measured is not None else f"not measured: {UNMEASURED}"


def measure_change(model: nn.Module, changed: nn.Module, masks: Masks) -> None:
    """Measure how far a network's output moves, on the masks' images, and note it there."""
    whole, after = (plain_copy(network).float() for network in (model, changed))
    meter = meter_for(whole, masks)
    masks.measured = None if meter is None else meter.damage(after)
    masks.measured_on = ""
    if meter is not None and masks.measured is not None:
        masks.measured_on = meter.describe(masks.images.are_real)

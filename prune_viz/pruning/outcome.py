"""What masks do to a network, predicted and measured, for people and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from prune_viz.network.copies import plain_copy
from prune_viz.pruning.compensation import output_kind
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.pruning.measuring import meter_on
from prune_viz.pruning.remove import compensated
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
        Change of the output: predicted from the analysis, and measured on images kept out of all fits.
    images : str
        What it was measured on, for people; empty where it was not.
    rough : str
        Why predictions are rough, and what would help.
    out : Path
        Where the masks were written.
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

    @classmethod
    def of(cls, masks: Masks, out: Path, saved: float | None, whole: int) -> Self:
        """What such masks do."""
        images = "" if masks.measured is None else describe_images(masks)
        return cls(
            masks.removed, masks.filters, saved, whole, masks.predicted, masks.measured, images,
            masks.rough, out,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        unit = (self.measured or self.predicted or Damage(0.0, Unit.CONSUMERS)).unit
        return {
            "filters_removed": self.removed,
            "filters": self.filters,
            "macs_saved": self.saved,
            "predicted_total": None if self.predicted is None else self.predicted.value,
            "measured_total": None if self.measured is None else self.measured.value,
            "unit": unit.value,
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
        return [*lines, *describe_change(self.predicted, self.measured, self.images, self.rough)]


def describe_images(masks: Masks) -> str:
    """What masks are measured on, in words."""
    images = masks.images.kept_out
    kind = "inputs of --data" if masks.images.are_real else "synthetic images"
    return "" if images is None else f"{len(images)} {kind} kept out of every fit"


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
        lines.append(f"note: these differ by {times}; go by what was measured")
    if rough and parts:
        lines.append(f"note: {'both are' if len(parts) > 1 else 'this is'} rough: {rough}")
    return lines


def differ(predicted: Damage, measured: Damage) -> bool:
    """Whether a prediction and a measurement differ by more than `FAR`, and one of them is worth a word."""
    low, high = sorted((predicted.value, measured.value))
    return high > _NOTHING.get(measured.unit, _NOTHING_ELSE) and high > FAR * low


def measure_masks(model: nn.Module, masks: Masks) -> Damage | None:
    """Carry masks out on a copy of the model, and measure the change of its output on images kept out.

    Parameters
    ----------
    model : nn.Module
        The network that was analysed; left unchanged.
    masks : Masks
        Consistent masks, with merges and images.

    Returns
    -------
    Damage or None
        None without images, or where the network does not run on them.

    Raises
    ------
    UserError
        If the masks are of another model.
    """
    check_masks(model, masks)
    if not masks.origin.has_weights_of(model):
        raise UserError("the model is not the one that was analysed: its weights differ")
    images = masks.images.kept_out
    whole = plain_copy(model).float()
    meter = meter_on(whole, images, output_kind(whole, masks))
    if meter is None or images is None:
        return None
    return meter.damage(compensated(whole, masks, images[:1]))

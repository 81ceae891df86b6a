"""How far a change of a network moves its output, measured on images that no fit has seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prune_viz.network.outputs import mean_squares, output_change
from prune_viz.runs.damage import Damage
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.devices import is_out_of_memory
from prune_viz.utils.nested_tensors import tensors_of

BATCH = 32
FEWEST = 8  # images that are measured on, however long that takes
_MACS = 1e12  # multiply-accumulates for all measurements of a kind
_MOST_MACS = 3e13  # of `FEWEST` images; above that nothing is measured


class OutputMeter:
    """Measures changed networks against a whole one.

    Parameters
    ----------
    whole : nn.Module
        The network in eval mode.
    images : Tensor, shape (N, C, *size)
        Inputs in the model's own units.
    kind : OutputKind
        What the network returns.
    rows : int
        Images that run at a time.

    Raises
    ------
    Exception
        Whatever the network's forward pass raises.
    """

    def __init__(self, whole: nn.Module, images: Tensor, kind: OutputKind, rows: int = BATCH) -> None:
        self.images, self.kind = images, kind
        self._batches = torch.split(images, max(rows, 1))
        self._before = [_outputs(whole, batch) for batch in self._batches]
        squares = [
            [len(batch) * size for size in mean_squares(before)]
            for batch, before in zip(self._batches, self._before, strict=True)
        ]
        self._sizes = [sum(sizes) / len(images) for sizes in zip(*squares, strict=True)]

    def describe(self, real: bool) -> str:
        """What is measured on, for people: so many of the user's inputs, or of the synthetic images."""
        kind = "inputs of --data" if real else "synthetic images"
        return f"{len(self.images)} {kind} that no fit saw"

    def change(self, changed: nn.Module) -> float:
        """Mean change of the output over the images (`prune_viz.network.outputs.output_change`).

        Infinite where the changed network does not run on them, or puts out what is not finite.
        """
        total = 0.0
        try:
            for batch, before in zip(self._batches, self._before, strict=True):
                after = _outputs(changed, batch)
                change = output_change(before, after, self.kind, len(batch), self._sizes)
                total += len(batch) * change.value
        except Exception as error:  # whatever an untrusted forward pass raises
            if is_out_of_memory(error):
                raise
            return math.inf
        return total / len(self.images) if math.isfinite(total) else math.inf

    def damage(self, changed: nn.Module) -> Damage | None:
        """The same as `change` with its unit; None where that is infinite."""
        change = self.change(changed)
        return Damage(change, self.kind.task.unit) if math.isfinite(change) else None


def meter_on(
    whole: nn.Module, images: Tensor | None, kind: OutputKind, rows: int = BATCH
) -> OutputMeter | None:
    """A meter on images; None without any, or where the network does not run on them."""
    if images is None or not len(images):
        return None
    try:
        return OutputMeter(whole, images, kind, rows)
    except Exception as error:  # whatever an untrusted forward pass raises
        if is_out_of_memory(error):
            raise
        return None


def affordable(
    images: Tensor, macs: int, size: Sequence[int], passes: int, share: float = 1.0
) -> Tensor | None:
    """As many of the images, evenly spaced, as so many passes over them can afford.

    At least `FEWEST`, or None where that would take too long.

    Parameters
    ----------
    images : Tensor, shape (N, C, *size)
        What there is.
    macs : int
        Multiply-accumulates for one input of spatial size `size`.
    size : sequence of int
        Of the input that was counted.
    passes : int
        How often a network runs on all of them.
    share : float
        Of the usual work, what may be done.
    """
    each = passes * macs * math.prod(images.shape[2:]) / max(math.prod(size), 1)
    if each * min(FEWEST, len(images)) > _MOST_MACS:
        return None
    most = max(FEWEST, int(share * _MACS / max(each, 1)))
    if len(images) <= most:
        return images
    return images[torch.linspace(0, len(images) - 1, most).round().long()]


def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.no_grad():
        return tensors_of(model(batch.to(device, copy=True)))  # it may write into its input

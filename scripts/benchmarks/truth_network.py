"""A trained network with inputs of its kind, to measure predictions on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

MEASURED = 512  # inputs at most that are measured on


@dataclass(frozen=True)
class TruthNetwork:
    """A trained network with inputs of its kind.

    Attributes
    ----------
    name : str
        For people.
    model : nn.Module
        In eval mode.
    input_shape : tuple of int
        (C, *size).
    inputs : Tensor, shape (N, C, *size)
        To measure on.
    unlabelled : Tensor, shape (M, C, *size)
        Others, which an analysis may be given.
    score : callable
        How well a network does what it was trained to do, 0 to 1: it takes the outputs of `inputs`.
    what : str
        What the score is.
    """

    name: str
    model: nn.Module
    input_shape: tuple[int, ...]
    inputs: Tensor
    unlabelled: Tensor
    score: Callable[[Tensor], float]
    what: str


def accuracy(targets: Tensor) -> Callable[[Tensor], float]:
    """Share of inputs of which the likeliest class is right."""
    return lambda outputs: float((outputs.argmax(dim=1) == targets).double().mean())

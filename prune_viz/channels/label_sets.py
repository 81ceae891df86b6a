"""Labels of channels: sets of those that go together, and small tensors that say where each label lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_MOST = 2**31  # labels


class LabelSets:
    """Disjoint sets of labels. Label 0 stands for whatever belongs to no channel, and is in no set.

    Labels are numbers; one is made for every index of an axis of a parameter. Two are united where the
    channels that they stand for can only be removed together.
    """

    def __init__(self) -> None:
        self._parents = [0]
        self._refused: dict[int, str] = {}

    def fresh(self, count: int) -> Tensor:
        """Make labels that are in sets of their own, int64, shape (count,)."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Unite the labels at equal places of two tensors of one shape; label 0 unites with nothing."""
        one, other = shrunk([one, other])
        differ = (one != other) & (one != 0) & (other != 0)
        if bool(differ.any()):
            pairs = torch.unique(one[differ] * _MOST + other[differ])
            for first, second in zip((pairs // _MOST).tolist(), (pairs % _MOST).tolist(), strict=True):
                self._join(first, second)

    def unite_all(self, labels: Tensor) -> None:
        """Unite all labels of a tensor but 0."""
        first, *others = [label for label in torch.unique(labels).tolist() if label] or [0]
        for label in others:
            self._join(first, label)

    def are_one(self, labels: Tensor) -> bool:
        """Whether all labels of a tensor are in one set."""
        return len({self._root(label) for label in torch.unique(labels).tolist()}) == 1

    def refuse(self, labels: Tensor, why: str) -> None:
        """Note that channels cannot be removed; of several reasons the first one given counts.

        Parameters
        ----------
        labels : Tensor of int
            Of those channels.
        why : str
            The end of a sentence that begins with "Kept:".
        """
        for label in torch.unique(shrunk([labels])[0]).tolist():
            if label:
                self._refused.setdefault(label, why)

    def roots(self) -> np.ndarray:
        """The set of each label, as the smallest label in it, shape (labels,)."""
        return np.array([self._root(label) for label in range(len(self._parents))])

    def refused(self) -> dict[int, str]:
        """Why channels cannot be removed, by their sets."""
        reasons: dict[int, str] = {}
        for label, why in self._refused.items():
            reasons.setdefault(self._root(label), why)
        return reasons

    def _root(self, label: int) -> int:
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self._parents[second] = first


def blank(shape: Sequence[int]) -> Tensor:
    """Label 0 everywhere, without memory for it."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def is_constant(labels: Tensor, axes: Iterable[int]) -> bool:
    """Whether labels are the same all along some axes."""
    along = [axis % labels.ndim for axis in axes]
    (small,) = shrunk([labels])
    return all(small.shape[axis] < 2 or bool((small == small.narrow(axis, 0, 1)).all()) for axis in along)


def varying_axes(labels: Tensor) -> list[int]:
    """The axes along which labels change."""
    return [axis for axis in range(labels.ndim) if not is_constant(labels, [axis])]


def first_along(labels: Tensor, axes: Iterable[int]) -> Tensor:
    """Labels with some axes cut to their first index."""
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    return labels


def shrunk(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one number of axes, each axis cut to its first index along which none of them changes.

    What is expanded takes no memory, and neither does what is computed from it so.
    """
    found = list(tensors)
    for axis in range(found[0].ndim):
        if all(tensor.shape[axis] == 1 or not tensor.stride(axis) for tensor in found):
            found = [tensor.narrow(axis, 0, min(1, tensor.shape[axis])) for tensor in found]
    return found


def compact(labels: Tensor) -> Tensor:
    """The same labels, expanded along every axis along which they do not change."""
    (small,) = shrunk([labels])
    for axis in range(small.ndim):
        if small.shape[axis] > 1 and is_constant(small, [axis]):
            small = small.narrow(axis, 0, 1)
    return small.expand(labels.shape)

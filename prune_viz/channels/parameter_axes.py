"""Axes of a model's parameters and buffers: which labels lie along them, and what a view of one shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from prune_viz.channels.label_sets import LabelSets, blank, is_constant

READ, WRITTEN, PASSED = "read", "written", "passed"  # what happens to channels along an axis


@dataclass(frozen=True)
class ParameterView:
    """What a tensor shows of a parameter or buffer.

    Attributes
    ----------
    number : int
        Which one.
    places : tuple of Tensor of int
        For each axis of the parameter, the index at each place of the tensor; expanded where it can be.
    computed : bool
        Whether values were changed on the way, as a convolution does that standardises its weights.
    """

    number: int
    places: tuple[Tensor, ...]
    computed: bool = False

    def axis_along(self, axis: int) -> tuple[int, Tensor] | None:
        """The parameter's axis that runs along one of the tensor, and its indices there; None if none does.

        Raises
        ------
        AmbiguousError
            If several do, or its indices change along other axes too.
        """
        found = [number for number, place in enumerate(self.places) if not is_constant(place, [axis])]
        if not found:
            return None
        place = self.places[found[0]]
        others = [other for other in range(place.ndim) if other != axis % place.ndim]
        if len(found) > 1 or not is_constant(place, others):
            raise AmbiguousError
        return found[0], place.movedim(axis, 0).flatten(1)[:, 0] if place.ndim > 1 else place


class AmbiguousError(Exception):
    """Along an axis of a tensor no single axis of a parameter runs."""


class ParameterAxes:
    """The labels along every axis of a model's parameters and floating-point buffers.

    An axis of one index has label 0: its only channel can never be removed.

    Parameters
    ----------
    model : nn.Module
        The network.
    sets : LabelSets
        Where labels are made and united.

    Attributes
    ----------
    names : list of str
        Of the tensors; of one that stands at several places, the first.
    labels : dict of (int, int) to Tensor of int
        By tensor and axis, those along which labels lie.
    roles : dict of (int, int) to set of str
        What happens to channels along each: `READ`, `WRITTEN` or `PASSED`.
    """

    def __init__(self, model: nn.Module, sets: LabelSets) -> None:
        self._sets = sets
        self._views: Any = WeakIdKeyDictionary()
        self.names: list[str] = []
        self._tensors: list[Tensor] = []
        self.labels: dict[tuple[int, int], Tensor] = {}
        self.roles: dict[tuple[int, int], set[str]] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and tensor.ndim and tensor not in self._views:
                self._views[tensor] = ParameterView(len(self.names), _places(tensor))
                self.names.append(name)
                self._tensors.append(tensor)

    def view(self, tensor: Tensor) -> ParameterView | None:
        """What a tensor shows of a parameter; None if it is something else."""
        found: ParameterView | None = self._views.get(tensor)
        return found

    def number(self, tensor: Tensor) -> int | None:
        """Which parameter or buffer a tensor is, or shows; None if it is something else."""
        view = self.view(tensor)
        return None if view is None else view.number

    def note_view(self, tensor: Tensor, view: ParameterView) -> None:
        """Note what a tensor shows of a parameter."""
        self._views[tensor] = view

    def along(self, view: ParameterView, axis: int, role: str) -> Tensor:
        """The labels along an axis of a view, made where there are none yet; `AmbiguousError` as there."""
        found = view.axis_along(axis)
        if found is None:
            return blank([view.places[0].shape[axis]])
        key, indices = (view.number, found[0]), found[1]
        self.roles.setdefault(key, set()).add(role)
        if key not in self.labels:
            self.labels[key] = self._sets.fresh(self._tensors[key[0]].shape[key[1]])
        return self.labels[key][indices]

    def bind(self, view: ParameterView, axis: int, labels: Tensor, role: str) -> None:
        """Let labels, shape (size,), lie along an axis of a view; `AmbiguousError` as there."""
        found = view.axis_along(axis)
        if found is None:
            return
        key, indices = (view.number, found[0]), found[1]
        self.roles.setdefault(key, set()).add(role)
        size = self._tensors[key[0]].shape[key[1]]
        if key not in self.labels and torch.equal(indices, torch.arange(size)):
            self.labels[key] = labels.clone()
            return
        if key not in self.labels:
            self.labels[key] = self._sets.fresh(size)
        own = self.labels[key][indices]
        self._sets.unite(own, labels)
        self._sets.refuse(torch.where((own == 0) != (labels == 0), own + labels, 0), _CONSTANT)

    def combine(self, views: list[ParameterView], made: Tensor) -> None:
        """Note what is made of parameters alone, place by place: labels at equal places go together."""
        shown = [
            replace(view, places=tuple(_spread(place, made) for place in view.places), computed=True)
            for view in views
        ]
        widest = max(shown, key=lambda view: self._tensors[view.number].numel())
        for axis in range(made.ndim):
            for view in shown:
                if view is not widest and view.axis_along(axis) is not None:
                    self.bind(view, axis, self.along(widest, axis, PASSED), PASSED)
        self.note_view(made, widest)


_CONSTANT = "its weights also meet values that belong to no channel"


def _places(tensor: Tensor) -> tuple[Tensor, ...]:
    """`ParameterView.places` of a whole tensor."""
    shape = tensor.shape
    return tuple(
        torch.arange(size).view(-1, *(1,) * (tensor.ndim - axis - 1)).expand(shape)
        if size > 1
        else blank(shape)
        for axis, size in enumerate(shape)
    )


def _spread(place: Tensor, made: Tensor) -> Tensor:
    return place.broadcast_to(made.shape)

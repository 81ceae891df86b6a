"""One operation as it was called, and what all rules for operations share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_viz.channels.label_sets import LabelSets, blank, first_along, is_constant, shrunk
from prune_viz.channels.parameter_axes import READ, WRITTEN, AmbiguousError, ParameterAxes, ParameterView

Labels = Tensor | list[Tensor]


@dataclass(frozen=True)
class Ways:
    """How filters are grouped where there are two ways: numbers of weights (`ParameterAxes.names`).

    Attributes
    ----------
    by_position : frozenset of int
        Grouped convolutions of which the channels at one position in each group go; of others whole groups.
    by_head : frozenset of int
        Layers that write queries, keys or values, of which whole heads go.
    """

    by_position: frozenset[int] = frozenset()
    by_head: frozenset[int] = frozenset()


FINEST = Ways()


@dataclass(frozen=True)
class Call:
    """An operation as it was called.

    Attributes
    ----------
    name : str
        Of the operator, without its overload; what works in place has the name of what does not.
    function : OpOverload
        The operator.
    args, kwargs
        Its arguments.
    made : list of Tensor
        What it returned.
    sets : LabelSets
    axes : ParameterAxes
    labels : callable
        The labels of any tensor; 0 where it carries none.
    ways : Ways
        How filters are grouped where there are two ways.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor]
    sets: LabelSets
    axes: ParameterAxes
    labels: Callable[[Tensor], Tensor]
    ways: Ways = FINEST

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's signature, or what stands there by default."""
        for place, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                if name in self.kwargs:
                    return self.kwargs[name]
                return self.args[place] if place < len(self.args) else argument.default_value
        return default

    def view(self, tensor: Any) -> ParameterView | None:
        """What a tensor shows of a parameter; None for what is none, or no tensor."""
        return self.axes.view(tensor) if isinstance(tensor, Tensor) else None

    def of_heads(self, labels: Tensor) -> bool:
        """Whether channels are written by a layer of which whole heads go."""
        if not self.ways.by_head:
            return False
        written = [
            self.axes.labels[number, axis]
            for number, axis in self.axes.roles
            if number in self.ways.by_head and WRITTEN in self.axes.roles[number, axis]
        ]
        return bool(written) and bool(torch.isin(shrunk([labels])[0], torch.cat(written)).any())

    def refuse(self, labels: Sequence[Tensor], why: str) -> None:
        """Refuse channels."""
        for one in labels:
            self.sets.refuse(one, why)

    def bind(self, tensor: Tensor | None, axis: int, labels: Tensor, role: str) -> None:
        """Let labels lie along an axis of a parameter; they are refused where it is unclear which."""
        view = self.view(tensor)
        if view is None:
            if tensor is not None:
                self.sets.refuse(labels, f"{self.name} reads it with weights that are computed")
            return
        if view.computed and role == READ:
            self.sets.refuse(labels, "what reads it computes with all its weights together")
        try:
            self.axes.bind(view, axis, labels, role)
        except AmbiguousError:
            self.sets.refuse(labels, f"{self.name} meets it with a rearranged parameter")

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """The labels that a weight writes along one of its axes; 0 where that is unclear."""
        view = self.view(tensor)
        try:
            return blank([tensor.shape[axis]]) if view is None else self.axes.along(view, axis, WRITTEN)
        except AmbiguousError:
            return blank([tensor.shape[axis]])


Rule = Callable[[Call], Labels]


def join(call: Call, parts: Sequence[Tensor]) -> Tensor:
    """Labels of what is computed place by place from tensors of one shape: at equal places they unite."""
    shape = parts[0].shape
    first, *others = shrunk(parts)
    for other in others:
        one, two = _alike(first, other)
        call.sets.unite(one, two)
        first = torch.where(one == 0, two, one)
    return first.expand(shape)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of as many axes, each expanded to the sizes of the other."""
    shared = [max(pair) for pair in zip(one.shape, other.shape, strict=True)]
    return one.expand(shared), other.expand(shared)


def channels_of(call: Call, labels: Tensor, axis: int) -> Tensor:
    """One label for each index of an axis, shape (size,); those that differ along other axes unite."""
    axis %= labels.ndim
    others = [other for other in range(labels.ndim) if other != axis]
    if not labels.numel():
        return blank([labels.shape[axis]])
    if is_constant(labels, others):
        return first_along(labels, others).reshape(-1)
    (small,) = shrunk([labels])
    rows = small.movedim(axis, 0).flatten(1)
    if rows.shape[0] != labels.shape[axis]:
        rows = rows.expand(labels.shape[axis], -1)
    found = rows.amax(dim=1)
    call.sets.unite(rows, found[:, None].expand(rows.shape))
    call.sets.refuse(torch.where((rows == 0) & (found[:, None] != 0), found[:, None], 0), _PARTLY)
    return found


_PARTLY = "only some positions of what reads it belong to a channel"

"""Torch-Pruning's dependency graph, guarded against endless loops and growth of memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from prune_viz.utils.errors import brief
from prune_viz.utils.nested_tensors import tensors_of

_MOST_PLACES = 1 << 21  # indices that a group may have in one module, features behind a flatten included
_MOST_STEPS = 1 << 12  # from operation to operation of a group; DenseNet-121's widest takes 502


class UntraceableError(Exception):
    """The dependency graph could not be built or followed; the message says why."""


class BoundedGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph that gives up where the library would multiply indices, or go round, without end.

    Where maps are reshaped on a way that comes back to itself, as in Swin v2, the library spreads every
    channel over more features each time round, until memory is gone; where parts of a map are written in
    place, as in YOLO's heads, it finds new indices each time round.
    """

    def bound(self) -> None:
        """Bound how the dependencies that the graph has now are followed."""
        for node in self.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = _BoundedMappings(dependency.index_mapping, self)

    def step(self) -> None:
        """Count a dependency that is followed; raises `UntraceableError` if there are too many."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise UntraceableError("the dependency graph goes round without end")

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Sequence[int]) -> Any:
        """The library's group, found within bounds."""
        self._steps = 0
        return super().get_pruning_group(module, pruning_fn, idxs)


class _BoundedMappings(list[Any]):
    """How indices change along a dependency, each time it is followed within the bounds of a graph."""

    def __init__(self, mappings: Iterable[Any], graph: BoundedGraph) -> None:
        super().__init__(mappings)
        self._graph = graph

    def __iter__(self) -> Iterator[Any]:
        self._graph.step()
        return (mapping and partial(_map_within_bounds, mapping) for mapping in super().__iter__())


def _map_within_bounds(mapping: Callable[[Any], Any], places: Any) -> Any:
    stride = 1 if getattr(mapping, "reverse", False) else getattr(mapping, "_stride", 1)
    if len(places) * stride > _MOST_PLACES:
        raise UntraceableError("its maps are reshaped in ways that the dependency graph cannot follow")
    return mapping(places)


def build_graph(model: nn.Module, example_inputs: torch.Tensor) -> BoundedGraph:
    """Build Torch-Pruning's dependency graph over `model` itself, which ends in eval mode.

    Raises
    ------
    UntraceableError
        If the library cannot trace the model.
    """
    # A graph over frozen parameters comes out empty, without a word.
    model.requires_grad_(True)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = BoundedGraph()
            graph.build_dependency(
                model,
                example_inputs,
                forward_fn=lambda network, inputs: network(
                    inputs
                ),  # the library would unpack a batch into arguments
                output_transform=_outputs,
                verbose=False,
            )
    except Exception as error:  # the library asserts, indexes and divides its way through strange models
        raise UntraceableError(brief(error)) from error
    graph.bound()
    return graph


def _outputs(output: Any) -> list[torch.Tensor]:
    """Outputs by which the library finds back what made them."""
    found = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
    if not found:
        raise UntraceableError("the model returns nothing that depends on its weights")
    return found


def tied_to(graph: BoundedGraph, convolution: nn.Module, filters: Sequence[int]) -> Any:
    """The library's group of all that must go together with filters of a convolution.

    Raises
    ------
    UntraceableError
        If the library cannot find it.
    """
    try:
        return graph.get_pruning_group(convolution, tp.prune_conv_out_channels, list(filters))
    except Exception as error:  # see build_graph
        raise UntraceableError(brief(error)) from error

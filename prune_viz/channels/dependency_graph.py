"""Torch-Pruning's dependency graph, with its traps fenced off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import index_mapping
from torch_pruning.dependency.group import Group

from prune_viz.utils.errors import brief
from prune_viz.utils.nested_tensors import tensors_of

_MOST_PLACES = 1 << 21  # of a group's channels in one module, the features behind a flatten included
_MOST_ITEMS = 2048  # of a group before the library puts together what is in one module; DenseNet-201 has 198


class UntraceableError(Exception):
    """The dependency graph could not be built or followed; the message says why."""


def build_graph(model: nn.Module, example_inputs: torch.Tensor) -> tp.DependencyGraph:
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
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=lambda network, inputs: network(
                    inputs
                ),  # the library would take rows for arguments
                output_transform=_outputs,
                verbose=False,
            )
    except Exception as error:  # the library asserts, indexes and divides its way through strange models
        raise UntraceableError(brief(error)) from error


def _outputs(output: Any) -> list[torch.Tensor]:
    """Outputs by which the library finds back what made them."""
    found = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
    if not found:
        raise UntraceableError("the model returns nothing that depends on its weights")
    return found


def tied_to(graph: tp.DependencyGraph, convolution: nn.Module, filters: Sequence[int]) -> Any:
    """The library's group of all that must go together with filters of a convolution.

    Raises
    ------
    UntraceableError
        If the library cannot find it.
    """
    try:
        with _bounded():
            return graph.get_pruning_group(convolution, tp.prune_conv_out_channels, list(filters))
    except Exception as error:  # see build_graph
        raise UntraceableError(brief(error)) from error


@contextmanager
def _bounded() -> Iterator[None]:
    """Let the library give up where it would multiply places, or go round, without end.

    Where maps are reshaped on a way that comes back to itself, as in Swin v2, it spreads every channel over
    more features each time round, until memory is gone; where parts of a map are written in place, as in
    YOLO's heads, it finds new indices each time round.
    """
    kind = index_mapping._FlattenIndexMapping
    spread, add = kind.__call__, Group.add_dep

    def bounded(mapping: Any, places: Any) -> Any:
        if not mapping.reverse and len(places) * mapping._stride > _MOST_PLACES:
            raise UntraceableError("its maps are reshaped in ways that the dependency graph cannot follow")
        return spread(mapping, places)

    def counted(group: Any, dep: Any, idxs: Any) -> None:
        if len(group.items) >= _MOST_ITEMS:
            raise UntraceableError("the dependency graph goes round without end")
        add(group, dep, idxs)

    kind.__call__, Group.add_dep = bounded, counted
    try:
        yield
    finally:
        kind.__call__, Group.add_dep = spread, add

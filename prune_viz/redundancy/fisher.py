"""How much a network's output depends on the outputs of the consumers of coupling groups.

For scores of classes or labels it is the Fisher information of the network's own probabilities, carried back
to a place: half of what a small change makes of it is the Kullback-Leibler divergence of the changed output
from the old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.calibration.images import BATCH
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.layer_kinds import channel_axis, count_outputs
from prune_viz.network.outputs import by_inputs, scores_of
from prune_viz.runs.damage import Unit
from prune_viz.runs.output_kind import OutputKind, Task
from prune_viz.utils.devices import is_out_of_memory, with_fewer
from prune_viz.utils.memory import Budget, RowLimit
from prune_viz.utils.nested_tensors import tensors_of
from prune_viz.utils.scratch_arrays import ScratchArrays


@dataclass(frozen=True)
class FisherMatrices:
    """What changes of a network's maps do to its output.

    Attributes
    ----------
    consumers : dict of str to ndarray of float64, each shape (outputs, outputs)
        For each consumer S such that a change of its outputs with second moments D at every position, apart
        from place to place, costs ``trace(S D) / 2``.
    ablations : dict of int to ndarray of float64, each shape (channels,)
        By the group's number, what silencing one channel costs with nothing in its place: half the mean
        square, over inputs, of the channel's maps times the gradients with which they are read, summed
        over positions and consumers (Theis et al. 2018).
    unit : Unit
        Of the cost, by what the network returns (`prune_viz.runs.output_kind.Task`).
    """

    consumers: dict[str, np.ndarray]
    ablations: dict[int, np.ndarray]
    unit: Unit


def gather_fisher(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    inputs: Callable[[], Iterable[Tensor]],
    kind: OutputKind,
    seed: int,
    budget: Budget | None = None,
) -> FisherMatrices | None:
    """Sum the gradients of a network's output over inputs, at the inputs and outputs of groups' consumers.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode; left unchanged.
    groups : sequence of CouplingGroup
        Whose consumers to watch.
    inputs : callable
        Gives batches, each shape (B, C, *size); called again where memory ran out and all is begun anew with
        smaller ones.
    kind : OutputKind
        What the network returns.
    seed : int
        Of the drawn signs.
    budget : Budget, optional
        Memory that may be taken.

    Returns
    -------
    FisherMatrices or None
        None where gradients do not reach every consumer, are not finite or vanish, or cannot be separated
        by input.
    """
    device = next(model.parameters()).device
    return with_fewer(partial(_gather, model, groups, inputs, kind, seed, budget), BATCH, device)


def _gather(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    inputs: Callable[[], Iterable[Tensor]],
    kind: OutputKind,
    seed: int,
    budget: Budget | None,
    most: int,
) -> FisherMatrices | None:
    modules = dict(model.named_modules())
    names = sorted({places.module for group in groups for places in group.consumers})
    store = ScratchArrays(budget)
    squares = _squares({name: modules[name] for name in names}, store)
    watches = {name: _Watch(modules[name], squares[name]) for name in names}
    ablations = {group.number: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    count = 0
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    held = sum(square.nbytes for square in squares.values())
    limit = RowLimit(budget, model, backward=True, aside=min(held, store.most) if device.type == "cpu" else 0)
    try:
        for batch in inputs():
            cut = len(batch) > limit.rows(batch.shape[1:], most)
            by_size = cut and kind.task is Task.VALUES
            sizes = _sizes(model, list(limit.split(batch, most))) if by_size else None
            for part in limit.split(batch, most):
                if not _carry_back(model, part.to(device), kind, sizes, random):
                    return None
                for group in groups:
                    silenced = _silenced(group, watches, len(part))
                    if silenced is None:
                        return None
                    ablations[group.number] += silenced.square().sum(dim=0) / 2
                for watch in watches.values():
                    watch.read = None
                count += len(part)
    except Exception as error:  # whatever an untrusted forward or backward pass raises
        if is_out_of_memory(error):
            raise
        return None
    finally:
        for watch in watches.values():
            watch.remove()
    whole = torch.cat([*ablations.values(), torch.zeros(1)])
    finite = bool(whole.isfinite().all()) and all(watch.finish(count) for watch in watches.values())
    if not finite or not bool(whole.any()):
        return None
    return FisherMatrices(
        squares, {number: (total / count).numpy() for number, total in ablations.items()}, kind.task.unit
    )


def _squares(consumers: Mapping[str, nn.Module], store: ScratchArrays) -> dict[str, np.ndarray]:
    """Zeros for each consumer, a square of its outputs."""
    outputs = {name: count_outputs(module) for name, module in consumers.items()}
    flat = store.zeros((sum(count**2 for count in outputs.values()),))
    ends = np.cumsum([count**2 for count in outputs.values()])
    return {
        name: flat[end - count**2 : end].reshape(count, count)
        for (name, count), end in zip(outputs.items(), ends, strict=True)
    }


class _Watch:
    """The gradients with which one consumer takes its inputs, by input, and those of its outputs, summed.

    The second moments of the latter are summed into `given`, shape (outputs, outputs).
    """

    def __init__(self, module: nn.Module, given: np.ndarray) -> None:
        self.axis = channel_axis(module)
        self.read: Tensor | None = None  # (B, inputs): maps times gradients, of this batch
        self.given, self.reached = given, False
        self._handles = [
            module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)
        ]  # fmt: skip

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments[0].requires_grad:
            return None
        own = arguments[0].clone()  # so that its gradient is through this consumer alone
        values = own.detach()  # a hook that knew its own tensor would keep all that led to it for ever

        def add(gradient: Tensor) -> None:
            read = values * gradient
            if read.ndim > 2:
                read = read.movedim(self.axis, 1).flatten(2).sum(dim=2)
            self.read = read.cpu().double() + (0 if self.read is None else self.read)

        own.register_hook(add)
        return (own, *arguments[1:])

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            rows = gradient.movedim(self.axis, -1).flatten(0, -2)
            self.given += (rows.T @ rows).cpu().double().numpy()
            self.reached = True

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    def finish(self, count: int) -> bool:
        """Turn sums over so many inputs into means; whether a gradient came here, and all are finite."""
        self.given /= max(count, 1)
        finite = bool(np.isfinite(self.given).all())
        return self.reached and finite

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _silenced(group: CouplingGroup, watches: Mapping[str, _Watch], count: int) -> Tensor | None:
    """First-order change of the drawn scalar if a channel is silenced, shape (count, channels).

    None where a consumer was not called on the batch's inputs, one row each, and so cannot tell them apart.
    """
    total = torch.zeros(count, group.channels, dtype=torch.float64)
    for places in group.consumers:
        read = watches[places.module].read
        if read is None or len(read) != count:
            return None
        total.index_add_(1, torch.from_numpy(places.channels), read[:, torch.from_numpy(places.indices)])
    return total


def _carry_back(
    model: nn.Module,
    images: Tensor,
    kind: OutputKind,
    sizes: Sequence[Tensor] | None,
    random: torch.Generator,
) -> bool:
    """Have the watches see gradients of a drawn change of the outputs; False if there are no outputs.

    A function, so that nothing of the graph outlives it.
    """
    images = images.detach().requires_grad_()
    outputs = _outputs(model, images)
    if not outputs:
        return False
    change = _drawn_change(outputs, kind, sizes or _mean_squares(outputs), random)
    torch.autograd.grad(change, images, allow_unused=True)
    return True


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What of a network's outputs depends on its inputs, a row each."""
    # Cloned, as a first operation in place may not touch a leaf.
    outputs = by_inputs(tensors_of(model(images.clone())), len(images))
    return [output for output in outputs if output.requires_grad]


def _mean_squares(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output.detach().square().mean() for output in outputs]


def _sizes(model: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
    """Mean square of each output over all parts of a batch."""
    device = next(model.parameters()).device
    count = sum(len(part) for part in parts)
    found = [
        [len(part) / count * one for one in _mean_squares(_outputs(model, part.to(device).requires_grad_()))]
        for part in (one.detach() for one in parts)
    ]
    return [torch.stack(sizes).sum() for sizes in zip(*found, strict=True)]


def _drawn_change(
    outputs: Sequence[Tensor], kind: OutputKind, sizes: Sequence[Tensor], random: torch.Generator
) -> Tensor:
    """A scalar whose gradients' second moments are the output's sensitivity.

    Random signs draw one vector of the sensitivity's root for every input. For scores of classes that root is
    of the softmax's Fisher information, ``diag(p) - p p'``: with v the square roots of p with random signs,
    ``v - p sum(v)`` has just these second moments. For labels it is ``p (1 - p)``, each for itself. Both are
    a mean over positions where there are several.
    """
    total = outputs[0].new_zeros(())
    for output, size in zip(outputs, sizes, strict=True):
        if kind.task is Task.VALUES:
            share = 2 / (size.clamp_min(1e-24) * output[0].numel() * len(outputs))
            total = total + share.sqrt() * (_signs(output, random) * output).sum()
            continue
        scores = scores_of(output, kind)
        drawn = _drawn_scores(scores.detach(), kind.task, random)
        places = math.prod(scores.shape[2:]) * len(outputs)
        total = total + (drawn * scores).sum() / math.sqrt(places)
    return total


def _drawn_scores(scores: Tensor, task: Task, random: torch.Generator) -> Tensor:
    """One draw of the root of the scores' Fisher information for every input and position."""
    if task is Task.LABELS:
        p = scores.sigmoid()
        return (p * (1 - p)).sqrt() * _signs(p, random)
    p = scores.softmax(dim=1)
    root = p.sqrt() * _signs(p, random)
    return root - p * root.sum(dim=1, keepdim=True)


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=random).to(like) * 2 - 1

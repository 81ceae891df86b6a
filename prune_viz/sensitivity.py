"""How much a network's output depends on what the readers of coupling groups give.

The second moments of the output's gradients at a place are, for class scores and labels drawn from the
network's own probabilities, the Fisher information there: half of what a small change makes of it is the
Kullback-Leibler divergence of the changed output from the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prune_viz.coupling import CouplingGroup
from prune_viz.tracing import tensors_of


@dataclass(frozen=True)
class Sensitivities:
    """What changes of a network's maps do to its output.

    They are told in nats of divergence where the network gives one row of class scores for an input, else
    as the squared change of its outputs, a share of their square.

    Attributes
    ----------
    readers : dict of str to ndarray of float64, each shape (outputs, outputs)
        For each reader S such that a change of its outputs with second moments D at every position, apart
        from place to place, costs ``trace(S D) / 2``. Readers that no gradient reaches are left out.
    ablations : dict of int to ndarray of float64, each shape (channels,)
        By the group's number, what silencing one channel costs with nothing in its place: half the mean
        square, over inputs, of the channel's maps times the gradients with which they are read, summed
        over positions and readers (Theis et al. 2018).
    """

    readers: dict[str, np.ndarray]
    ablations: dict[int, np.ndarray]


def gather_sensitivities(
    model: nn.Module, groups: Sequence[CouplingGroup], inputs: Iterable[Tensor], seed: int
) -> Sensitivities:
    """Sum the gradients of a network's output over inputs, where the readers of groups take and give.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode; left unchanged.
    groups : sequence of CouplingGroup
        Whose readers to watch.
    inputs : iterable of Tensor, each shape (B, C, *size)
        Batches.
    seed : int
        Of the drawn labels.
    """
    modules = dict(model.named_modules())
    watches = {
        name: _Watch(modules[name])
        for name in sorted({places.module for group in groups for places in group.readers})
    }
    ablations = {group.number: torch.zeros(group.channels, dtype=torch.float64) for group in groups}
    count = 0
    random = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    try:
        for batch in inputs:
            images = batch.to(device).requires_grad_()
            # Cloned, as a first operation in place may not touch a leaf.
            outputs = [tensor for tensor in tensors_of(model(images.clone())) if tensor.requires_grad]
            if outputs:
                torch.autograd.grad(_drawn_change(outputs, random), images)
            for group in groups:
                ablations[group.number] += _silenced(group, watches, len(batch)).square().sum(dim=0) / 2
            for watch in watches.values():
                watch.read = None
            count += len(batch)
    finally:
        for watch in watches.values():
            watch.remove()
    count = max(count, 1)
    return Sensitivities(
        {
            name: (watch.given / count).cpu().numpy()
            for name, watch in watches.items()
            if watch.given is not None
        },
        {number: (total / count).numpy() for number, total in ablations.items()},
    )


class _Watch:
    """The gradients with which one reader takes its inputs, by input, and those of its outputs, summed."""

    def __init__(self, module: nn.Module) -> None:
        self.axis = 1 if isinstance(module, _ConvNd) else -1
        self.read: Tensor | None = None  # (B, inputs): maps times gradients, of this batch
        self.given: Tensor | None = None  # (outputs, outputs)
        self._handles = [
            module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)
        ]  # fmt: skip

    def _before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments[0].requires_grad:
            return None
        own = arguments[0].clone()  # so that its gradient is through this reader alone

        def add(gradient: Tensor) -> None:
            read = own.detach() * gradient
            if read.ndim > 2:
                read = read.movedim(self.axis, 1).flatten(2).sum(dim=2)
            self.read = read.double().cpu() + (0 if self.read is None else self.read)

        own.register_hook(add)
        return (own, *arguments[1:])

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            rows = gradient.movedim(self.axis, -1).flatten(0, -2).double()
            self.given = rows.T @ rows + (0 if self.given is None else self.given)

        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _silenced(group: CouplingGroup, watches: Mapping[str, _Watch], count: int) -> Tensor:
    """First-order change of the drawn scalar if a channel is silenced, shape (count, channels)."""
    total = torch.zeros(count, group.channels, dtype=torch.float64)
    for places in group.readers:
        read = watches[places.module].read
        if read is not None and len(read) == count:
            total.index_add_(1, torch.from_numpy(places.channels), read[:, torch.from_numpy(places.indices)])
    return total


def _drawn_change(outputs: Sequence[Tensor], random: torch.Generator) -> Tensor:
    """A scalar whose gradients' second moments are the output's sensitivity, summed over the batch."""
    scores = outputs[0]
    if len(outputs) == 1 and scores.ndim == 2 and scores.shape[1] > 1:
        logs = scores.log_softmax(dim=1)
        labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=random)
        return logs.gather(1, labels.to(logs.device)).sum()
    total = scores.new_zeros(())
    for output in outputs:
        signs = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
        size = output.detach().square().mean().clamp_min(1e-24)
        share = 2 / (size * output[0].numel() * len(outputs))
        total = total + share.sqrt() * (signs * output).sum()
    return total

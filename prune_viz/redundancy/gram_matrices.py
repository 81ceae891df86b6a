"""Second moments of filters' signed maps over calibration images, as the layers that read them see them.

Filters are compared where they are read. For every coupling group the inputs of its consumers are watched
while images run through the whole network, and the second moments of the group's channels are summed,
with a constant row so that means are carried too. A consumer's zero padding belongs to what it reads, so
padded positions count as samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_viz.calibration.images import BATCH
from prune_viz.channels.groups import CouplingGroup, Places
from prune_viz.network.copies import attached
from prune_viz.network.layer_kinds import (
    channel_axis,
    count_phases,
    is_convolution,
    is_strided_back,
    is_transposed,
    spread_by_inputs,
)
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.memory import Budget, RowLimit
from prune_viz.utils.scratch_arrays import ScratchArrays

POSITIONS = 64  # of a map that are sampled, a calibration image
# Squares of doubles, channels by channels, that one consumer's Gram matrices take, and that judging takes.
_MATRICES, _JUDGING = 8, 10


@dataclass
class GramMatrices:
    """Second moments of a group's channels as one consumer sees them, apart for fitting and for checking.

    Attributes
    ----------
    consumer : str
        Name of the reading module.
    fit, held_out : ndarray of float64, shape (n + 1, n + 1)
        Mean of ``v v'`` over samples, ``v`` the n channels and a 1, from the images to fit and to check
        (a 0 instead of the 1 where no bias can carry a constant).
    weight_gram : ndarray of float64, shape (n, n)
        ``sum over outputs and taps of W[:, i] W[:, j]``: what the consumer makes of a unit of channel
        i together with one of channel j, if what neighbouring taps see is independent.
    smooth_weight_gram : ndarray of float64, shape (n, n)
        The same if all taps (positions, behind a flatten) see the same: taps summed before squaring.
    output_variance : float
        Variance of the consumer's output over samples, summed over its outputs.
    unit : float
        By what ``weight_gram`` times squared errors are divided to be a damage: the output's variance, or 2
        where outputs count by how much the network's own output depends on them (`weigh_outputs`).
    peak : ndarray of float64, shape (n,)
        Largest absolute value of each channel over all calibration images.
    mean, variance : ndarray of float64, shape (n,)
        Of each channel over calibration images and positions, padding left out.
    """

    consumer: str
    fit: np.ndarray
    held_out: np.ndarray
    weight_gram: np.ndarray
    smooth_weight_gram: np.ndarray
    output_variance: float
    unit: float
    peak: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


class _Watch:
    """Sums one consumer's Gram matrices for one group while batches run, into four squares of zeros."""

    def __init__(
        self, places: Places, channels: int, module: Any, constant: float, squares: np.ndarray
    ) -> None:
        self.places = places
        self.constant = constant
        self.channels = channels
        self.module = module
        self.columns = _columns(places, channels)
        self.sums, self.weight_grams = squares[:2], squares[2:, :channels, :channels]
        self.counts = np.zeros(2)
        self.output = np.zeros((2, 0))
        self.output_count = 0
        self.peak = np.zeros(channels)
        self.first = np.zeros(channels)
        self.second = np.zeros(channels)
        self.inner_count = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor, held_out: bool) -> None:
        samples, inner = self._samples(arguments[0].detach(), output)
        self.peak = np.maximum(self.peak, self._peak(arguments[0].detach()))
        wide = inner.double()
        self.first += wide.sum(dim=0).cpu().numpy()
        self.second += wide.square().sum(dim=0).cpu().numpy()
        self.inner_count += len(inner)
        rows = F.pad(samples.double(), (0, 1), value=self.constant)
        half = int(held_out)
        self.sums[half] += (rows.T @ rows).cpu().numpy()
        self.counts[half] += len(rows)
        axis = channel_axis(module)
        values = output.detach().movedim(axis, -1).flatten(0, -2).double()
        sums = torch.stack([values.sum(dim=0), values.square().sum(dim=0)]).cpu().numpy()
        self.output = sums if self.output_count == 0 else self.output + sums
        self.output_count += len(values)

    def _samples(self, inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Samples (rows, n) with and without the positions that padding adds."""
        if is_convolution(self.module):
            maps = torch.cat([self._at(inputs, 1, place) for place in self.columns.T])
            inner = _thin(maps)
            padding = _padding(self.module, inputs, output)
            padded = _thin(F.pad(maps, padding)) if any(padding) else inner
            return padded, inner
        features = inputs if inputs.ndim == 2 else _thin(inputs.movedim(-1, 1))
        rows = torch.stack([self._at(features, 1, place) for place in self.columns.T], dim=1).flatten(0, 1)
        return rows, rows

    def _at(self, inputs: Tensor, axis: int, place: Tensor) -> Tensor:
        """The channels at one index each; zeros for those that are read at fewer."""
        taken = inputs.index_select(axis, place.clamp_min(0).to(inputs.device))
        if int(place.min()) < 0:
            taken = taken.index_fill(axis, (place < 0).nonzero().ravel().to(inputs.device), 0.0)
        return taken

    def _peak(self, inputs: Tensor) -> np.ndarray:
        """Each channel's largest absolute value, at all positions: one that fires rarely is not silent."""
        axis = channel_axis(self.module)
        largest = inputs.abs().movedim(axis, 0).flatten(1).amax(dim=1)
        peaks = [self._at(largest, 0, place) for place in self.columns.T]
        return np.asarray(torch.stack(peaks).amax(dim=0).double().cpu().numpy())

    def gram_matrices(self) -> GramMatrices:
        means = self.output / max(self.output_count, 1)
        mean = self.first / max(self.inner_count, 1)
        output_variance = float((means[1] - means[0] ** 2).clip(min=0).sum())
        self.sums /= self.counts.clip(min=1)[:, None, None]
        self.weight_grams[0], self.weight_grams[1] = _weight_grams(self.module, self.columns)
        return GramMatrices(
            self.places.module,
            self.sums[0],
            self.sums[1],
            self.weight_grams[0],
            self.weight_grams[1],
            output_variance,
            output_variance,
            self.peak,
            mean,
            (self.second / max(self.inner_count, 1) - mean**2).clip(min=0),
        )


def _columns(places: Places, channels: int) -> Tensor:
    """Where each channel lies in a consumer, (channels, K): behind a flatten at several features."""
    return torch.from_numpy(places.table(channels))


def _weight_grams(module: Any, columns: Tensor, root: Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What a consumer makes of each pair of channels, taps apart and together, seen through `root`."""
    weight = spread_by_inputs(module, module.weight.detach().double().cpu())
    weight = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    if root is not None:
        weight = torch.einsum("po,iot->ipt", root, weight)
    taken = weight[columns.clamp_min(0)]  # channels, spread, outputs, taps
    taken[columns < 0] = 0.0
    flat, summed = taken.flatten(1), taken.sum(dim=(1, 3))
    seen = count_phases(module)  # of which an output sees one
    return (flat @ flat.T).numpy() / seen, (summed @ summed.T).numpy() / seen


def weigh_outputs(
    model: nn.Module,
    group: CouplingGroup,
    gram_matrices: Sequence[GramMatrices],
    fisher: Mapping[str, np.ndarray],
    store: ScratchArrays,
) -> list[GramMatrices]:
    """Let the outputs of a group's consumers count by how much the network's output depends on them.

    Parameters
    ----------
    model : nn.Module
        The network.
    group : CouplingGroup
        The group.
    gram_matrices : sequence of GramMatrices
        One a consumer.
    fisher : mapping of str to ndarray
        From `prune_viz.redundancy.fisher.gather_fisher`, for every consumer.
    store : ScratchArrays
        Where what is new is kept.
    """
    modules = dict(model.named_modules())
    weighed = []
    squares = store.zeros((len(gram_matrices), 2, group.channels, group.channels))
    for places, found, weight_grams in zip(group.consumers, gram_matrices, squares, strict=True):
        values, vectors = np.linalg.eigh(fisher[places.module])
        root = torch.from_numpy(np.sqrt(values.clip(min=0))[:, None] * vectors.T)
        columns = _columns(places, group.channels)
        weight_grams[0], weight_grams[1] = _weight_grams(modules[places.module], columns, root)
        weighed.append(
            replace(found, weight_gram=weight_grams[0], smooth_weight_gram=weight_grams[1], unit=2.0)
        )
    return weighed


def pool_gram_matrices(
    parts: Sequence[Sequence[GramMatrices]], shares: Sequence[float]
) -> list[GramMatrices]:
    """Gram matrices over several sets of calibration images together, of one group.

    Parameters
    ----------
    parts : sequence of sequence of GramMatrices
        For each set, one a consumer. Second moments of the first set are overwritten.
    shares : sequence of float
        What each set counts for; they add to 1.
    """
    pooled = []
    for found in zip(*parts, strict=True):

        def mean(values: Sequence[Any]) -> Any:
            return sum(share * value for share, value in zip(shares, values, strict=True))

        first = mean([one.mean for one in found])
        second = mean([one.variance + one.mean**2 for one in found])
        spread = mean([one.output_variance for one in found])
        _pool_into([one.fit for one in found], shares)
        _pool_into([one.held_out for one in found], shares)
        pooled.append(
            replace(
                found[0],
                output_variance=spread,
                unit=spread,
                peak=np.max([one.peak for one in found], axis=0),
                mean=first,
                variance=(second - first**2).clip(min=0),
            )
        )
    return pooled


def _pool_into(matrices: Sequence[np.ndarray], shares: Sequence[float]) -> None:
    """Let the first become the mean over those that have samples of this half at all."""
    first, *others = matrices
    counting = np.array([share * one.any() for share, one in zip(shares, matrices, strict=True)])
    counting /= max(counting.sum(), 1e-300)
    first *= counting[0]
    for share, other in zip(counting[1:], others, strict=True):
        first += share * other


def _thin(maps: Tensor) -> Tensor:
    """Rows (samples, n) from maps (B, n, *spatial), at most `POSITIONS` places each."""
    flat = maps.flatten(2)
    count = flat.shape[2]
    if count > POSITIONS:
        # Drawn, not evenly spaced: a stride in step with the width would look at a few columns only.
        places = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:POSITIONS]
        flat = flat[:, :, places.to(flat.device)]
    return flat.transpose(1, 2).reshape(-1, flat.shape[1])


def _padding(module: Any, inputs: Tensor, output: Tensor) -> list[int]:
    """Zeros a convolution adds, in `F.pad`'s order, read off the sizes so that subclasses count too."""
    if is_transposed(module) or module.padding_mode != "zeros":
        return [0] * (2 * (inputs.ndim - 2))
    pads: list[int] = []
    for axis in reversed(range(inputs.ndim - 2)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        total = max(0, (output.shape[axis + 2] - 1) * module.stride[axis] + reach - inputs.shape[axis + 2])
        pads += [total // 2, total - total // 2]
    return pads


def rounds(groups: Sequence[CouplingGroup], most: int) -> Iterator[list[CouplingGroup]]:
    """Give groups in order, so many at a time that their Gram matrices take `most` bytes; one alone may more.

    With `most` half of what is left of main memory, `ScratchArrays` keeps the Gram matrices of several groups
    in memory, and those of a group that takes more in a file.
    """
    chosen: list[CouplingGroup] = []
    for group in groups:
        if chosen and _bytes_of_gram_matrices([*chosen, group]) > most:
            yield chosen
            chosen = []
        chosen.append(group)
    if chosen:
        yield chosen


def _bytes_of_gram_matrices(groups: Sequence[CouplingGroup]) -> int:
    """What the Gram matrices of groups take, and judging the widest."""
    squares = [8 * (group.channels + 1) ** 2 for group in groups]
    held = sum(_MATRICES * len(group.consumers) * size for group, size in zip(groups, squares, strict=True))
    return held + _JUDGING * max(squares)


def _bytes_at_a_time(group: CouplingGroup, store: ScratchArrays) -> int:
    """What a group's Gram matrices take of memory while they are summed: all, or of a file a few squares."""
    square = 8 * (group.channels + 1) ** 2
    gathered = 4 * len(group.consumers) * square
    return 3 * square + (gathered if gathered <= store.most else 0)


def gather_gram_matrices(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    batches: Callable[[], Iterable[tuple[Tensor, bool]]],
    budget: Budget | None = None,
) -> dict[int, list[GramMatrices]]:
    """Run calibration images through the whole network and sum every group's Gram matrices at its consumers.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode.
    groups : sequence of CouplingGroup
        Which groups to watch.
    batches : callable
        Gives batches, shape (B, C, *size), and whether they are held out for checking; called again where
        memory ran out and all is begun anew with smaller ones.
    budget : Budget, optional
        Memory that may be taken; Gram matrices that do not fit are kept in a file.

    Returns
    -------
    dict
        Group number -> one `GramMatrices` a consumer.

    Raises
    ------
    UserError
        If Gram matrices do not fit in memory, nor on the disk.
    """
    store = ScratchArrays(budget)
    device = next(model.parameters()).device
    aside = sum(_bytes_at_a_time(group, store) for group in groups) if device.type == "cpu" else 0
    limit = RowLimit(budget, model, backward=False, aside=aside)
    return with_fewer(partial(_gather, model, groups, batches, limit, store), BATCH, device)


def _gather(
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    batches: Callable[[], Iterable[tuple[Tensor, bool]]],
    limit: RowLimit,
    store: ScratchArrays,
    most: int,
) -> dict[int, list[GramMatrices]]:
    modules = dict(model.named_modules())
    watches: dict[int, list[_Watch]] = {}
    for group in groups:
        squares = store.zeros((len(group.consumers), 4, group.channels + 1, group.channels + 1))
        constant = _constant(group, modules)
        watches[group.number] = [
            _Watch(places, group.channels, modules[places.module], constant, own)
            for places, own in zip(group.consumers, squares, strict=True)
        ]
    half: bool | None = None  # which one the calibration images are of, held out or not

    def attach(watch: _Watch) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if half is not None:
                watch(module, arguments, output, half)

        return watch.module.register_forward_hook(hook)

    device = next(model.parameters()).device
    with attached(attach(watch) for found in watches.values() for watch in found), torch.no_grad():
        for batch, held_out in batches():
            for part in limit.split(batch, most):
                half = held_out
                model(part.to(device))
                half = None
    return {number: [watch.gram_matrices() for watch in found] for number, found in watches.items()}


def _constant(group: CouplingGroup, modules: dict[str, nn.Module]) -> float:
    """What stands in the constant's row: 1, or 0 where no bias of a consumer can make up for a constant.

    The outputs of a transposed convolution with a stride see different taps, so that a constant input
    gives a pattern.
    """
    consumers = [modules[places.module] for places in group.consumers]
    return 0.0 if any(is_strided_back(consumer) for consumer in consumers) else 1.0

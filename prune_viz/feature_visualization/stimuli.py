"""The input that excites a filter most: rounds of batched gradient ascent under a prior.

For each filter the L2 norm of its feature map is maximised over the inputs that a prior finds equally likely
(`priors`), by `optimiser`. It anneals its steps to nothing, so how far it gets depends on
how many it has. Each round is longer than the one before, starts where that ended, and a filter
leaves when it is close to what its activation allows or a round brought it little: those that soon saturate
cost a few steps, hard ones many. The first round shifts the input a little, at random, before each step, so
that no stimulus leans on one alignment of the strides (jitter; Mordvintsev et al. 2015). Where no activation
follows a layer, its maps may grow either way, and from noise in patches of opposite sign that block each
other; the first round therefore raises either sign, and the better goes on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_viz.feature_visualization.optimiser import (
    Round,
    draw_noise,
    draw_shifts,
    images_at,
    norms,
    one_side,
    optimise,
    points_at,
    rounds,
    until,
)
from prune_viz.feature_visualization.priors import check_name, make_prior, tile
from prune_viz.feature_visualization.rendering import plot_pictures
from prune_viz.loading.state_dicts import check_finite
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics, describe_inputs
from prune_viz.network.layers import LARGEST_CANVAS, Layer
from prune_viz.utils.devices import WHOLE, in_batches, one_thread_each, pick_device, workers_on
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import check_sizes
from prune_viz.utils.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 176
LEAVE = 0.3  # a filter leaves when a round raised its activation by less; on small canvases, cheap, less
LEAVE_FIRST = 1e-4  # the same where no other convolution comes before and the best is a closed form
CLOSE = 0.9  # it leaves, too, at this share of what a bounded activation allows
RESTARTS = 3  # for filters that stay silent
BATCH = {"cpu": 48, "cuda": 256, "mps": 64}
HALF_LIMIT = 65504.0  # the largest number of half precision
_POOL_VALUES = 2**26  # of the inputs searched for together: 256 MiB, held as points and as images


@dataclass(frozen=True)
class Stimuli:
    """Stimuli of some filters of a layer.

    Attributes
    ----------
    layer : str
        The layer's name.
    filters : list of int
        Which filters, in the order of the rows below.
    images : Tensor, shape (F, C, *canvas)
        The inputs found, in the model's own (normalised) input units, on the CPU.
    activations : Tensor, shape (F,)
        L2 norm of each filter's feature map on its own stimulus; 0 for a silent filter.
    steps : Tensor of int, shape (F,)
        How many steps led to each stimulus, vain starts not counted.
    diverged : list of int
        Filters whose optimisation met values that are not finite. Their stimulus is the best finite one
        found; where there is none it is zero and the activation NaN.
    statistics : InputStatistics or None
        What was known of the model's inputs; with it pictures have their true colours.
    """

    layer: str
    filters: list[int]
    images: Tensor
    activations: Tensor
    steps: Tensor
    diverged: list[int] = field(default_factory=list)
    statistics: InputStatistics | None = None

    derailed = property(lambda self: self.diverged)  # the older name

    def plot(self, columns: int = 8) -> Figure:
        """Draw the stimuli as a matplotlib figure, `columns` to a row, each stretched around grey."""
        return plot_pictures(self.images.numpy(), list(map(str, self.filters)), columns, self.statistics)


def maximize(
    model: nn.Module,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    input_shape: Sequence[int],
    prior: str = "natural",
    steps: int = STEPS,
    canvas: int | None = None,
    seed: int = 0,
    device: str = "auto",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    images: Tensor | None = None,
) -> Stimuli:
    """Find the inputs that excite filters of a layer most.

    Parameters
    ----------
    model : nn.Module
        The network; used in eval mode and left unchanged.
    layer : str
        Name of a convolution, or of a linear layer whose hidden units are looked into.
    filters : sequence of int, optional
        Which filters; all of the layer's by default.
    input_shape : sequence of int
        Shape of one input of the model, channels first: ``(3, 224, 224)``.
    prior : {"natural", "spectrogram", "none"}
        Bound the input by the covariance of natural inputs, by that of spectrograms (C, frequencies, times),
        or by its L2 norm alone.
    steps : int
        Most steps an optimisation may take, at least 1; nearly all take fewer.
    canvas : int, optional
        Size of the stimuli along each axis; from the receptive field by default.
    seed : int
        Seed of the starting noise and the jitter. A filter's stimulus depends on the model, the
        options, the seed, the layer and the filter alone: on CPUs of a kind to the bit, in batches of
        `WHOLE` or more, however many threads there are.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    mean, std : float or sequence of float, optional
        The model's normalisation, a number a channel: input = (pixel - mean) / std, pixels in [0, 1].
    images : Tensor, shape (N, C, *size), optional
        Pixels of example inputs, uint8 or floats in [0, 1]; what is natural is measured on them, and so
        are mean and std unless given.

    Returns
    -------
    Stimuli

    Raises
    ------
    UserError
        If the weights are not finite, the layer or a filter does not exist, an option is out of range or
        the input shape does not fit.
    """
    check_finite(model)
    check_sizes(input_shape, canvas)
    statistics = describe_inputs(input_shape[0], mean, std, images)
    network = FilterNetwork(model, input_shape, canvas, pick_device(device), linear=[layer])
    wanted = list(range(network.layer(layer).filters)) if filters is None else list(filters)
    workers = workers_on(network.device)
    share = max(1, WHOLE * math.ceil(len(wanted) / (WHOLE * workers)))

    stop = threading.Event()

    def search(begin: int) -> Stimuli:
        torch.set_num_threads(1)
        return find_stimuli(
            network, layer, wanted[begin : begin + share], prior=prior, steps=steps, seed=seed,
            statistics=statistics, stop=stop,
        )  # fmt: skip

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        try:
            return _joined(list(pool.map(search, range(0, max(len(wanted), 1), share))))
        finally:
            stop.set()  # for Ctrl-C


def find_stimuli(
    network: FilterNetwork,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    prior: str = "natural",
    steps: int = STEPS,
    seed: int = 0,
    statistics: InputStatistics | None = None,
    fed: Tensor | None = None,
    batch: int | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> Stimuli:
    """Find stimuli in a prepared network; parameters not named here are those of `maximize`.

    Parameters
    ----------
    statistics : InputStatistics, optional
        What is known of the model's inputs.
    fed : Tensor, shape (F, C, *canvas), optional
        For a depthwise layer, stimuli of the filters that feed `filters`, found with the same options;
        found here if not given. They are rounded to half precision, as a run keeps them.
    batch : int, optional
        Most filters at a time, where memory is short.
    stop : threading.Event, optional
        Once set, the next step raises `StoppedError`.
    progress : Progress, optional
        Advanced by each filter that is done.
    """
    found = network.layer(layer)
    wanted = list(range(found.filters)) if filters is None else [int(number) for number in filters]
    for number in wanted:
        if not 0 <= number < found.filters:
            raise UserError(f"{layer} has filters 0 to {found.filters - 1}, so there is no filter {number}")
    if not wanted:
        raise UserError("no filters were asked for; leave them out for all of the layer's")
    check_options(prior, steps)
    producer = network.producer(layer)
    if producer is not None and fed is None:
        fed = find_stimuli(
            network, producer, wanted, prior=prior, steps=steps, seed=seed, statistics=statistics,
            batch=batch, stop=stop,
        ).images  # fmt: skip
    progress = progress or Progress()
    pool = max(1, _POOL_VALUES // (network.input_shape[0] * math.prod(found.canvas)))
    parts = []
    for start in range(0, len(wanted), pool):
        part = slice(start, start + pool)
        search = _Search(network, found, wanted[part], prior, statistics, seed, batch, stop)
        parts.append(search.run(steps, None if fed is None else fed[part], progress))
    return _joined(parts)


def _joined(parts: Sequence[Stimuli]) -> Stimuli:
    """Stimuli of several sets of filters of a layer, one after the other."""
    return Stimuli(
        parts[0].layer,
        [number for part in parts for number in part.filters],
        torch.cat([part.images for part in parts]),
        torch.cat([part.activations for part in parts]),
        torch.cat([part.steps for part in parts]),
        [number for part in parts for number in part.diverged],
        parts[0].statistics,
    )


def check_options(prior: str, steps: int) -> None:
    """Raise `UserError` if the prior is unknown or there is no step to take."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    check_name(prior)


def as_stored(images: Tensor) -> Tensor:
    """Stimuli as a run keeps them: at half precision, where their values fit it."""
    return images.clamp(-HALF_LIMIT, HALF_LIMIT).half()


@dataclass(frozen=True)
class _Start:
    """Where first optimisations start, by default from noise, and which sign of the maps they raise."""

    fed: Tensor | None = None  # stimuli of the filters that feed the layer, row by row
    attempt: int = 0  # after the first, from strong, smooth patterns
    sign: int = 0  # 1, -1, or 0 for both


class _Search:
    """The optimisation of some filters of a layer, round after round; all tensors are kept on the CPU."""

    def __init__(
        self,
        network: FilterNetwork,
        layer: Layer,
        filters: list[int],
        prior: str,
        statistics: InputStatistics | None,
        seed: int,
        batch: int | None,
        stop: threading.Event | None,
    ) -> None:
        self.layer, self.filters, self.seed, self.device = layer, filters, seed, network.device
        self.statistics = statistics
        self.shape = (network.input_shape[0], *layer.canvas)
        self.maps = until(stop, network.maps(layer.name))
        self.prior = make_prior(prior, self.shape[0], layer.canvas, network.device, statistics)
        full = LARGEST_CANVAS[len(layer.canvas)] ** len(layer.canvas)
        self.leave = LEAVE * min(1.0, math.prod(layer.canvas) / full)
        if network.is_first(layer.name):
            self.leave = LEAVE_FIRST
        self.activation = network.has_activation(layer.name)
        self.bound = network.upper_bound(layer.name)
        self.ceiling = math.inf
        self.batch = min(BATCH[network.device.type], batch or BATCH[network.device.type])
        self.points = torch.zeros(len(filters), math.prod(self.shape) + 1)
        self.images = torch.zeros(len(filters), *self.shape)
        self.activations = torch.full((len(filters),), math.nan)
        self.steps = torch.zeros(len(filters), dtype=torch.long)
        self.sound = torch.ones(len(filters), dtype=torch.bool)

    def run(self, steps: int, fed: Tensor | None, progress: Progress) -> Stimuli:
        """Optimise in rounds until every filter has left."""
        first, *others = rounds(steps, self.activation)
        self._start(first, fed)
        staying = self._unfinished()
        staying = staying[self.activations[staying].isfinite()]
        progress.advance(len(self.filters) - len(staying))
        for turn in others:
            before = self.activations[staying].clone()
            self._round(staying, turn)
            reached = self.activations[staying]
            gained = (reached > before * (1 + self.leave)) & (reached < CLOSE * self.ceiling)
            progress.advance(int((~gained).sum()))
            staying = staying[gained]
        progress.advance(len(staying))
        diverged = [
            number for number, sound in zip(self.filters, self.sound.tolist(), strict=True) if not sound
        ]
        return Stimuli(
            self.layer.name,
            self.filters,
            self.images,
            self.activations,
            self.steps,
            diverged,
            self.statistics,
        )

    def _start(self, first: Round, fed: Tensor | None) -> None:
        """The first round: from the stimulus of what feeds the filter, from noise, from broad patterns.

        Faint noise wakes nearly every filter, but behind a silent or a saturated one no gradient comes
        back; a depthwise filter is helped by the stimulus of the one that feeds it. What is silent still,
        or met nothing finite, is tried again from strong, smooth patterns. The best start is gone on from.
        """
        if fed is not None:
            self._round(self._unfinished(), first, _Start(fed))
        for sign in (0,) if self.activation else (1, -1):
            self._round(self._unfinished(), first, _Start(sign=sign))
        for attempt in range(1, RESTARTS + 1):
            silent = torch.nonzero(~(self.activations > 0))[:, 0]
            self._round(silent, first, _Start(attempt=attempt))

    def _unfinished(self) -> Tensor:
        """Rows whose map is not yet close to the upper bound of its activation."""
        return torch.nonzero(~(self.activations >= CLOSE * self.ceiling))[:, 0]

    def _round(self, rows: Tensor, turn: Round, start: _Start | None = None) -> None:
        """Optimise some rows, batch by batch; halve the batch whenever memory runs out."""
        begin = start or _Start()
        self.batch = in_batches(
            len(rows), self.batch, lambda part, new: self._optimise(rows[part], new, turn, begin), self.device
        )

    def _optimise(self, rows: Tensor, count: int, turn: Round, start: _Start) -> None:
        """Optimise one batch and take over what was found for the first `count` rows; others repeat."""
        filters = [self.filters[row] for row in rows.tolist()]
        canvas = self.layer.canvas
        if turn.number == 0:
            keys = [f"{self.seed}/{self.layer.name}/{filter}/{start.attempt}" for filter in filters]
            shifts = torch.stack([draw_shifts(key, canvas, turn.steps) for key in keys], dim=1)
            points = points_at(self._white(keys, rows, start))
        else:
            shifts = torch.zeros(turn.steps, len(rows), len(canvas), dtype=torch.long)
            points = self.points[rows]
        maps = one_side(self.maps, start.sign) if start.sign else self.maps
        points, shifts = points.to(self.device), shifts.to(self.device)
        points, sound = optimise(maps, filters, self.prior, canvas, points, shifts, turn.angle)
        images = images_at(points, self.prior, canvas)
        with torch.no_grad():
            after = self.maps(images.detach())[1]
        activations = norms(after[list(range(len(filters))), filters])
        self.ceiling = self.bound * math.sqrt(after[0, 0].numel())
        found = (part[:count].cpu() for part in (points, images, activations, sound))
        self._keep(rows[:count], turn, *found)

    def _keep(
        self, rows: Tensor, turn: Round, points: Tensor, images: Tensor, reached: Tensor, sound: Tensor
    ) -> None:
        """Take over what was found: at first the best of several, later the last, and the best image."""
        known = self.activations[rows]
        better = reached.isfinite() & ((reached > known) | known.isnan())
        self.sound[rows] &= sound & reached.isfinite()
        self.images[rows[better]] = images[better]
        self.activations[rows[better]] = reached[better]
        if turn.number == 0:
            self.steps[rows] = turn.steps
            self.points[rows[better]] = points[better]
        else:
            self.steps[rows] += turn.steps
            self.points[rows] = points

    def _white(self, keys: Sequence[str], rows: Tensor, start: _Start) -> Tensor:
        """White coordinates of where a first optimisation starts, shape (B, *shape)."""
        if start.fed is not None:
            known = as_stored(start.fed[rows]).float().to(self.device)
            return self.prior.whiten(tile(known, self.layer.canvas))
        white = torch.stack([draw_noise(key, self.shape) for key in keys]).to(self.device)
        return self.prior.colour(white) if start.attempt > 0 else white

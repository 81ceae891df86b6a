"""The search for some filters' stimuli: rounds of batched gradient ascent, from drafts or from noise.

The optimiser anneals its steps to nothing, so how far it gets depends on how many it has. Each round is
longer than the one before and starts where that ended. A filter leaves when it is close to what its
activation allows, or a round brought it little: those that soon saturate cost a few steps, hard ones many.
The first round shifts the input a little, at random, before each step, so that no stimulus leans on one
alignment of the strides (jitter; Mordvintsev et al. 2015). Where no activation follows a layer, its maps
may grow either way, and from noise in patches of opposite sign that block each other. There the first step
raises either sign, and the better goes on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from prune_viz.feature_visualization.priors import make_prior, tile
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.layers import LARGEST_CANVAS, Layer
from prune_viz.network.precision import FULL
from prune_viz.utils.devices import in_batches
from prune_viz.utils.progress import Progress

LEAVE = 0.3  # a filter leaves when a round raised its activation by less; on small canvases, cheap, less
LEAVE_FIRST = 1e-4  # the same where no other convolution comes before and the best is a closed form
CLOSE = 0.9  # it leaves, too, at this share of what a bounded activation allows
RESTARTS, DRAFT_RESTARTS = 3, 1  # for filters that stay silent
BATCH = {"cpu": 48, "cuda": 256, "mps": 64}
HALF_LIMIT = 65504.0  # the largest number of half precision


def as_stored(images: Tensor) -> Tensor:
    """Stimuli as a run keeps them: at half precision, where their values fit it."""
    return images.clamp(-HALF_LIMIT, HALF_LIMIT).half()


@dataclass(frozen=True)
class _Start:
    """Where first optimisations start, by default from noise."""

    given: Tensor | None = None  # stimuli, row by row
    attempt: int = 0  # after the first, from strong, smooth patterns


class Search:
    """The optimisation of some filters of a layer, round after round; all tensors are kept on the CPU.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    layer : Layer
        The layer.
    filters : list of int
        Which of its filters.
    prior : str
        The prior's name.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    seed : int
        Of noise and jitter.
    batch : int or None
        Most filters at a time, where memory is short.
    stop : threading.Event or None
        Once set, the next step raises `StoppedError`.

    Attributes
    ----------
    images : Tensor, shape (F, C, *canvas)
        The best inputs found.
    activations : Tensor, shape (F,)
        What they reach; NaN where nothing finite was met.
    steps : Tensor of int, shape (F,)
        How many led there.
    """

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
        self.shape = (network.input_shape[0], *layer.canvas)
        self.maps = until(stop, network.maps(layer.name))
        self.climbed = self.maps
        if network.precision != FULL:
            self.climbed = until(stop, network.climbed_maps(layer.name))
        self.prior = make_prior(prior, self.shape[0], layer.canvas, network.device, statistics)
        full = LARGEST_CANVAS[len(layer.canvas)] ** len(layer.canvas)
        self.leave = LEAVE * min(1.0, math.prod(layer.canvas) / full)
        if network.is_first(layer.name):
            self.leave = LEAVE_FIRST
        self.activation = network.has_activation(layer.name)
        self.draft = network.is_draft
        self.bound = network.upper_bound(layer.name)
        self.ceiling = math.inf
        self.batch = min(BATCH[network.device.type], batch or BATCH[network.device.type])
        self.points = torch.zeros(len(filters), math.prod(self.shape) + 1)
        self.images = torch.zeros(len(filters), *self.shape)
        self.activations = torch.full((len(filters),), math.nan)
        self.steps = torch.zeros(len(filters), dtype=torch.long)
        self.sound = torch.ones(len(filters), dtype=torch.bool)

    def run(self, steps: int, given: Sequence[Tensor], progress: Progress) -> None:
        """Optimise in rounds, from sets of stimuli that are given, else from noise, until all have left."""
        first, *others = rounds(steps, self.activation, self.draft)
        self._start(first, given)
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

    @property
    def diverged(self) -> list[int]:
        """Filters whose optimisation met values that are not finite."""
        return [number for number, sound in zip(self.filters, self.sound.tolist(), strict=True) if not sound]

    def _start(self, first: Round, given: Sequence[Tensor]) -> None:
        """The first round: from stimuli of what feeds the filter, from drafts or noise, from broad patterns.

        Faint noise wakes nearly every filter, but behind a silent or a saturated one no gradient comes
        back; a depthwise filter is helped by the stimulus of the one that feeds it. What is silent still,
        or met nothing finite, is tried again from strong, smooth patterns. The best start is gone on from.
        """
        for one in given:
            rows = self._unfinished()
            shown = one[rows].flatten(1).any(dim=1)  # what none was found for is zero
            self._round(rows[shown], first, _Start(one))
        self._round(self._silent() if given else self._unfinished(), first)
        for attempt in range(1, (DRAFT_RESTARTS if self.draft else RESTARTS) + 1):
            self._round(self._silent(), first, _Start(attempt=attempt))

    def _silent(self) -> Tensor:
        """Rows whose map is silent still, or met nothing finite."""
        return torch.nonzero(~(self.activations > 0))[:, 0]

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
        points, shifts = points.to(self.device), shifts.to(self.device)
        maps, first = self.climbed, 0
        if turn.number == 0 and start.given is None and start.attempt == 0 and not self.activation:
            points, signs = self._better_sides(filters, points, shifts, turn.angle)
            maps, first = one_side(maps, signs), 1
        points, sound = optimise(maps, filters, self.prior, canvas, points, shifts, turn.angle, first)
        images = images_at(points, self.prior, canvas)
        with torch.no_grad():
            after = self.maps(images.detach())[1]
        activations = norms(after[list(range(len(filters))), filters])
        self.ceiling = self.bound * math.sqrt(after[0, 0].numel())
        found = (part[:count].cpu() for part in (points, images, activations, sound))
        self._keep(rows[:count], turn, *found)

    def _better_sides(
        self, filters: list[int], points: Tensor, shifts: Tensor, angle: float
    ) -> tuple[Tensor, Tensor]:
        """Where the first step leads that raises the better sign of each map, and that sign, 1 or -1."""
        rows, found = list(range(len(filters))), []
        for sign in (1.0, -1.0):
            maps = one_side(self.climbed, points.new_full((len(filters),), sign))
            moved, _ = optimise(maps, filters, self.prior, self.layer.canvas, points, shifts, angle, last=1)
            with torch.no_grad():
                reached = norms(maps(images_at(moved, self.prior, self.layer.canvas))[1][rows, filters])
            found.append((moved, reached))
        (up, above), (down, below) = found
        falls = below > above
        return torch.where(falls[:, None], down, up), 1 - 2 * falls.to(points.dtype)

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
        if start.given is not None:
            known = as_stored(start.given[rows]).float().to(self.device)
            return self.prior.whiten(tile(known, self.layer.canvas))
        white = torch.stack([draw_noise(key, self.shape) for key in keys]).to(self.device)
        return self.prior.colour(white) if start.attempt > 0 else white

"""The optimiser: conjugate gradients from given starts, one filter an input, many at once.

A stimulus is sought in the ball ``|z| <= r`` of a prior's white coordinates. Inside a ball is on a sphere
with one coordinate more, which takes up whatever length ``z`` leaves over; so every step is on a unit sphere,
along a great circle, and the bound holds exactly. Directions are conjugate (Polak and Ribiere, kept
non-negative) and the angle of a step falls as half a cosine, from wide leaps over poor summits to none:
no line search, one gradient a step.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_viz.feature_visualization.priors import Prior
from prune_viz.network.hooks import MapFunction
from prune_viz.utils.devices import may_pass
from prune_viz.utils.errors import LayerError, brief

SLACK = 0.1  # the coordinate beyond white ones, at the start; at zero it would stay there
JITTER = 1 / 12  # of the canvas, each way
# Steps of each round and the angle of its first, in radians; the last takes more or fewer if asked to.
ROUNDS = ((12, 0.4), (32, 0.3), (88, 0.2))
LAST = 2 / 3  # of the steps that are left, those that its last round takes; more gain little
OPEN_ROUNDS = ((16, 0.4), (160, 0.2))  # where no activation follows: little saturates, so few would leave
DRAFT_ANGLE = 0.6  # of the only round of a draft
OPEN_DRAFT = 1  # steps more that a draft takes where no activation follows
STILL = 0.5  # share of the steps, the last ones, without jitter


def settings() -> list[object]:
    """What stimuli depend on here, for the key of their results."""
    return [SLACK, JITTER, ROUNDS, LAST, OPEN_ROUNDS, DRAFT_ANGLE, OPEN_DRAFT, STILL]


def optimise(
    maps: MapFunction,
    filters: Sequence[int],
    prior: Prior,
    canvas: tuple[int, ...],
    points: Tensor,
    shifts: Tensor,
    angle: float,
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Move points of the sphere towards stronger feature maps.

    Parameters
    ----------
    maps : callable
        The network up to a layer, from `FilterNetwork.climbed_maps`.
    filters : sequence of int
        Which filter each point is optimised for.
    prior : Prior
        What bounds the inputs.
    canvas : tuple of int
        Their spatial size.
    points : Tensor, shape (B, n + 1)
        Unit vectors: the n white coordinates over the prior's radius, and the slack.
    shifts : Tensor of int, shape (steps, B, axes)
        How far each input is shifted at each step.
    angle : float
        Length of the first step, in radians.
    first, last : int
        Which of the steps are taken, from `first` to before `last`; all by default.

    Returns
    -------
    points : Tensor, shape (B, n + 1)
        Where the steps led.
    sound : Tensor of bool, shape (B,)
        False where a gradient was not finite; such a point goes back to the last one with a finite gradient.
    """
    numbers = torch.tensor(filters, device=points.device)
    sound = torch.ones(len(points), dtype=torch.bool, device=points.device)
    direction = previous = torch.zeros_like(points)
    before, safe = points.new_zeros(len(points), 1), points
    for step in range(len(shifts))[first:last]:
        shift = shifts[step]
        images = roll(images_at(points, prior, canvas), shift)
        gradient = roll(_gradient(images, maps, numbers), -shift)
        uphill = torch.nn.functional.pad(prior.colour(gradient).flatten(1), (0, 1))
        finite = norms(uphill).isfinite()
        if not bool(finite.all()):
            sound &= finite
            points = torch.where(finite[:, None], points, safe)
            uphill = torch.where(finite[:, None], uphill, 0.0)
        safe = points
        uphill = _tangent(uphill, points)
        squared = _dot(uphill, uphill)
        turned = (squared - _dot(uphill, previous)) / before.clamp_min(1e-30)
        direction = torch.addcmul(uphill, turned.clamp(0, 1), _tangent(direction, points))
        previous, before = uphill, squared
        length = angle * 0.5 * (1 + math.cos(math.pi * step / len(shifts)))
        turn = math.sin(length) / norms(direction).clamp_min(1e-30)[:, None]
        points = unit(torch.addcmul(math.cos(length) * points, turn, direction))
    return points, sound


@dataclass(frozen=True)
class Round:
    """One of a filter's optimisations: its place among them, how many steps, and how far the first goes."""

    number: int
    steps: int
    angle: float  # in radians


def rounds(steps: int, activation: bool, draft: bool = False) -> list[Round]:
    """The rounds that `steps` allow: the last takes what others leave, or `LAST` of it; drafts have one."""
    if draft:
        return [Round(0, steps if activation else steps + OPEN_DRAFT, DRAFT_ANGLE)]
    *shorter, (_, last) = ROUNDS if activation else OPEN_ROUNDS
    allowed = []
    for length, angle in shorter:
        allowed.append((min(length, steps), angle))
        steps -= allowed[-1][0]
    allowed.append((math.ceil(LAST * steps) if activation else steps, last))
    return [Round(number, length, angle) for number, (length, angle) in enumerate(allowed) if length > 0]


class StoppedError(Exception):
    """A search was stopped before its end."""


def until(stop: threading.Event | None, maps: MapFunction) -> MapFunction:
    """Maps that are given until `stop` is set; then `StoppedError` is raised."""

    def stoppable(inputs: Tensor) -> tuple[Tensor, Tensor]:
        if stop is not None and stop.is_set():
            raise StoppedError
        return maps(inputs)

    return stoppable


def one_side(maps: MapFunction, signs: Tensor) -> MapFunction:
    """The maps of which only what has a sign, 1 or -1, by the image, is left, as behind a rectifier."""

    def part(images: Tensor) -> tuple[Tensor, Tensor]:
        either = maps(images)[1]
        after = signs.view(-1, *(1,) * (either.ndim - 1)) * either
        return after, after.relu()

    return part


def points_at(white: Tensor) -> Tensor:
    """Points of the sphere, shape (B, n + 1), in the direction of white coordinates, shape (B, C, *canvas).

    All of them leave the same slack, whatever their length.
    """
    flat = math.sqrt(1 - SLACK**2) * unit(white.flatten(1))
    return torch.nn.functional.pad(flat, (0, 1), value=SLACK)


def images_at(points: Tensor, prior: Prior, canvas: tuple[int, ...]) -> Tensor:
    """The inputs, shape (B, C, *canvas), that points of the sphere stand for."""
    return prior.colour(prior.radius * points[:, :-1].reshape(len(points), -1, *canvas))


def draw_noise(key: str, shape: tuple[int, ...]) -> Tensor:
    """Draw white noise of a shape; the numbers depend on `key` alone."""
    return torch.randn(shape, generator=_generator(f"noise/{key}"))


def draw_shifts(key: str, canvas: tuple[int, ...], steps: int) -> Tensor:
    """Draw how far an input is shifted at each step, shape (steps, axes); the last steps stand still.

    The numbers depend on `key` alone.
    """
    reach = torch.tensor([int(size * JITTER) for size in canvas])
    moving = math.floor(steps * (1 - STILL))
    chance = 2 * torch.rand((moving, len(reach)), generator=_generator(f"shifts/{key}")) - 1
    shifts = torch.zeros(steps, len(reach), dtype=torch.long)
    shifts[:moving] = (chance * (reach + 0.5)).round().long().clamp(-reach, reach)
    return shifts


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def norms(maps: Tensor) -> Tensor:
    """L2 norm of each row of `maps`, shape (B,); of bfloat16, too, it is found at float32."""
    found: Tensor = torch.linalg.vector_norm(
        maps.flatten(1), dim=1, dtype=torch.promote_types(maps.dtype, torch.float32)
    )
    return found


def unit(vectors: Tensor) -> Tensor:
    """Vectors, shape (B, n), at length one; zero stays zero."""
    return vectors / norms(vectors).clamp_min(1e-30)[:, None]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=1, keepdim=True)


def _tangent(vectors: Tensor, points: Tensor) -> Tensor:
    return torch.addcmul(vectors, _dot(vectors, points), points, value=-1)


def _backward(*outputs_and_inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`; `LayerError` where an untrusted backward pass fails."""
    try:
        found: tuple[Tensor, ...] = torch.autograd.grad(*outputs_and_inputs, **options)
    except RuntimeError as error:
        if may_pass(error):
            raise
        raise LayerError(f"no gradient comes back from its maps ({brief(error)})") from error
    return found


def _gradient(images: Tensor, maps: MapFunction, filters: Tensor) -> Tensor:
    """Gradient of each input's own feature-map norm, redirected past the activation where it vanishes.

    A map that is silent, or saturated all over, passes no gradient back. Such a row is pulled along the
    map before the activation instead: a silent one where it is nearest to firing, a saturated one
    further on.
    """
    images = images.detach().requires_grad_()
    rows = torch.arange(len(images), device=images.device)
    before, after = maps(images)
    if not after.requires_grad:
        raise LayerError("no gradient leads from its maps to the input")
    reached = norms(after[rows, filters]).sum()
    if before is after:
        return _backward(reached, images)[0]
    (slope,) = _backward(reached, before, retain_graph=True, allow_unused=True)
    if slope is None:  # maps put together from runs of their own
        (gradient,) = _backward(reached, images, retain_graph=True)
        vanished = gradient.flatten(1).abs().amax(dim=1) <= 1e-12
        slope = torch.zeros_like(before)
        slope[rows, filters] = _pull(before[rows, filters], after[rows, filters])
        (redirected,) = _backward(before, images, slope)
        return torch.where(vanished.view(-1, *(1,) * (images.ndim - 1)), redirected, gradient)
    own = slope[rows, filters]
    vanished = own.flatten(1).abs().amax(dim=1) <= 1e-12
    if bool(vanished.any()):
        redirected = _pull(before[rows, filters], after[rows, filters])
        own = torch.where(vanished.view(-1, *(1,) * (own.ndim - 1)), redirected, own)
        slope = torch.zeros_like(slope)
        slope[rows, filters] = own
    return _backward(before, images, slope)[0]


def _pull(before: Tensor, after: Tensor) -> Tensor:
    """Where to pull maps, shape (B, *spatial), before an activation through which nothing comes back."""
    level, shown = before.detach().flatten(1), after.detach().flatten(1) != 0
    silent = ~shown.any(dim=1, keepdim=True)
    return torch.where(silent, level.softmax(dim=1), level * shown).view_as(before)


def roll(images: Tensor, shifts: Tensor) -> Tensor:
    """Shift each image around its canvas by its own offsets.

    Parameters
    ----------
    images : Tensor, shape (B, C, *canvas)
    shifts : Tensor of int, shape (B, axes)

    Returns
    -------
    Tensor
        Position ``p`` holds what was at ``p + shift``, modulo the canvas.
    """
    if not bool(shifts.any()):
        return images
    size = images.shape[2:]
    index = torch.zeros(len(images), *size, dtype=torch.long, device=images.device)
    for axis, extent in enumerate(size):
        positions = (torch.arange(extent, device=images.device) + shifts[:, axis, None]) % extent
        shape = [len(images)] + [1] * len(size)
        shape[axis + 1] = extent
        index = index * extent + positions.view(shape)
    flat = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    rolled: Tensor = images.flatten(2).gather(2, flat).view_as(images)
    return rolled

"""The input that excites a filter most: batched gradient ascent under a prior.

For each filter the L2 norm of its feature map is maximised over the inputs that a prior finds equally
likely (`prune_viz.priors`). Gradients are normalised, carried by momentum and projected back into the
ball, the step decays as a cosine, and the input is shifted a little, at random, before each evaluation
so that no stimulus leans on one alignment of the strides (jitter; Mordvintsev et al. 2015). A filter that
stays silent is tried again from other starts before it is reported at zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prune_viz.errors import UserError
from prune_viz.filters import FilterNetwork, Layer, MapFunction
from prune_viz.pictures import colour_axes, draw_pictures
from prune_viz.priors import Prior, make_prior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prune_viz.progress import Progress

STEPS = 32
STEP_SIZE = 0.6  # of the ball's radius, at the start
MOMENTUM = 0.8
JITTER = 1 / 12  # of the canvas, each way
STILL = 0.25  # share of the steps, the last ones, without jitter
BATCH = 32
RESTARTS = 3  # for filters that stay silent


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
    """

    layer: str
    filters: list[int]
    images: Tensor
    activations: Tensor

    def plot(self, columns: int = 8) -> Figure:
        """Draw the stimuli as a matplotlib figure, `columns` to a row, each stretched around grey."""
        from matplotlib.figure import Figure

        rows = math.ceil(len(self.filters) / columns)
        figure = Figure(figsize=(1.4 * columns, 1.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        images = self.images.numpy()
        drawn = draw_pictures(images, max(96, *images.shape[-2:]), colour_axes(images))
        for axis, number, picture in zip(axes, self.filters, drawn, strict=False):
            axis.imshow(picture)
            axis.set_title(str(number), fontsize=8)
        return figure


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
) -> Stimuli:
    """Find the inputs that excite filters of a layer most.

    Parameters
    ----------
    model : nn.Module
        The network; used in eval mode and left unchanged.
    layer : str
        Name of a convolution module.
    filters : sequence of int, optional
        Which filters; all of the layer's by default.
    input_shape : sequence of int
        Shape of one input of the model, channels first: ``(3, 224, 224)``.
    prior : {"natural", "none"}
        Bound the input by the covariance of natural images, or by its L2 norm alone.
    steps : int
        Steps of the ascent, at least 1.
    canvas : int, optional
        Size of the stimuli along each axis; from the receptive field by default.
    seed : int
        Seed of the starting noise and the jitter. A filter's stimulus depends on the model, the
        options, the seed, the layer and the filter alone.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Returns
    -------
    Stimuli

    Raises
    ------
    UserError
        If the layer or a filter does not exist, an option is out of range or the input shape does
        not fit.
    """
    network = FilterNetwork(model, input_shape, canvas, pick_device(device))
    return ascend(network, layer, filters, prior=prior, steps=steps, seed=seed)


def ascend(
    network: FilterNetwork,
    layer: str,
    filters: Sequence[int] | None = None,
    *,
    prior: str = "natural",
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Stimuli:
    """Find stimuli in a prepared network; the parameters are those of `maximize`."""
    found = network.layer(layer)
    wanted = list(range(found.filters)) if filters is None else [int(number) for number in filters]
    for number in wanted:
        if not 0 <= number < found.filters:
            raise UserError(f"{layer} has filters 0 to {found.filters - 1}, so there is no filter {number}")
    check_options(prior, steps)
    channels = network.input_shape[0]
    bounds = make_prior(prior, channels, found.canvas, network.device)
    maps = network.maps(layer)
    images = torch.empty(len(wanted), channels, *found.canvas)
    activations = torch.empty(len(wanted))
    for start in range(0, len(wanted), BATCH):
        rows = torch.arange(start, min(start + BATCH, len(wanted)))
        for attempt in range(1 + RESTARTS):
            chunk = [wanted[row] for row in rows]
            white, shifts = _start(network, found, chunk, bounds, steps, seed, attempt)
            white = _ascend_batch(maps, chunk, bounds, white, shifts)
            images[rows], activations[rows] = _measure(maps, chunk, bounds, white)
            rows = rows[activations[rows] == 0]
            if len(rows) == 0:
                break
        if progress is not None:
            progress.advance(min(BATCH, len(wanted) - start))
    return Stimuli(layer, wanted, images, activations)


def _start(
    network: FilterNetwork,
    layer: Layer,
    filters: Sequence[int],
    prior: Prior,
    steps: int,
    seed: int,
    attempt: int,
) -> tuple[Tensor, Tensor]:
    """Where an ascent starts, shape (B, C, *canvas), and its shifts, shape (steps, B, axes).

    First from faint noise. A filter that stayed silent is tried again: a depthwise one from the stimulus
    of the filter that feeds it, since while that is silent no gradient comes back; then any from broad,
    strong patterns.
    """
    shape = (network.input_shape[0], *layer.canvas)
    noise, shifts = (
        part.to(network.device) for part in _draw(seed, layer.name, filters, shape, steps, attempt)
    )
    feeder = network.feeder(layer.name)
    if attempt == 1 and feeder is not None:
        noise = _ascend_batch(network.maps(feeder), filters, prior, noise, shifts)
    elif attempt > 0:
        noise = prior.colour(noise)
    return noise, shifts


def check_options(prior: str, steps: int) -> None:
    """Raise `UserError` if the prior is unknown or there is no step to take."""
    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}")
    if prior not in ("natural", "none"):
        raise UserError(f"--prior is natural or none, not {prior!r}")


def _draw(
    seed: int, layer: str, filters: Sequence[int], shape: tuple[int, ...], steps: int, attempt: int = 0
) -> tuple[Tensor, Tensor]:
    """Starting noise (B, *shape) and shifts (steps, B, axes), each filter from its own generator."""
    noise, shifts = [], []
    reach = torch.tensor([int(size * JITTER) for size in shape[1:]])
    still = steps - math.floor(steps * STILL)
    for number in filters:
        key = hashlib.sha256(f"{seed}/{layer}/{number}/{attempt}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        noise.append(torch.randn(shape, generator=generator))
        unit = torch.rand((steps, len(reach)), generator=generator)
        jitter = ((2 * unit - 1) * (reach + 0.5)).round().long()
        jitter[still:] = 0
        shifts.append(jitter)
    return torch.stack(noise), torch.stack(shifts, dim=1)


def _ascend_batch(
    maps: MapFunction, filters: Sequence[int], prior: Prior, start: Tensor, shifts: Tensor
) -> Tensor:
    """Ascend from `start`, one filter an input, and give the white coordinates reached."""
    rows = torch.arange(len(filters), device=start.device)
    numbers = torch.tensor(filters, device=start.device)
    white = _to_radius(start, prior.radius)
    velocity = torch.zeros_like(white)
    steps = len(shifts)
    for step in range(steps):
        inputs = _as_input(roll(prior.colour(white), shifts[step])).requires_grad_()
        before, after = maps(inputs)
        gradient = _gradient(inputs, before, after, rows, numbers)
        pull = prior.colour(roll(gradient, -shifts[step]))
        pull = torch.nan_to_num(pull, nan=0.0, posinf=0.0, neginf=0.0)
        velocity = MOMENTUM * velocity + _to_radius(pull, 1.0)
        rate = STEP_SIZE * prior.radius * 0.5 * (1 + math.cos(math.pi * step / steps))
        white = _into_ball(white + rate * velocity, prior.radius)
    return white


def _measure(maps: MapFunction, filters: Sequence[int], prior: Prior, white: Tensor) -> tuple[Tensor, Tensor]:
    """Images, shape (B, C, *canvas), and the norm of each one's own feature map, on the CPU."""
    images = prior.colour(white)
    with torch.no_grad():
        after = maps(_as_input(images))[1]
    return images.cpu(), _norms(after[list(range(len(filters))), list(filters)]).cpu()


def _gradient(inputs: Tensor, before: Tensor, after: Tensor, rows: Tensor, filters: Tensor) -> Tensor:
    """Gradient of each row's own feature-map norm, redirected past the activation where it vanishes.

    A map that is silent, or saturated all over, passes no gradient back. Such a row is pulled along the
    map before the activation instead: a silent one where it is nearest to firing, a saturated one
    further up.
    """
    reached = _norms(after[rows, filters]).sum()
    if before is after:
        return torch.autograd.grad(reached, inputs)[0]
    (slope,) = torch.autograd.grad(reached, before, retain_graph=True)
    own = slope[rows, filters].flatten(1)
    vanished = own.abs().amax(dim=1) <= 1e-12
    if bool(vanished.any()):
        level = before[rows, filters].detach().flatten(1)
        silent = level.amax(dim=1, keepdim=True) <= 0
        redirected = torch.where(silent, level.softmax(dim=1), level.clamp_min(0))
        own = torch.where(vanished[:, None], redirected, own)
        slope = torch.zeros_like(slope)
        slope[rows, filters] = own.view(len(rows), *slope.shape[2:])
    return torch.autograd.grad(before, inputs, slope)[0]


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


def _as_input(images: Tensor) -> Tensor:
    images = images.detach()
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images.contiguous()


def _norms(maps: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(maps.flatten(1), dim=1)
    return norms


def _to_radius(vectors: Tensor, radius: float) -> Tensor:
    norms = _norms(vectors).clamp_min(1e-30)
    return vectors * (radius / norms).view(-1, *[1] * (vectors.ndim - 1))


def _into_ball(vectors: Tensor, radius: float) -> Tensor:
    shrink = (radius / _norms(vectors).clamp_min(1e-30)).clamp_max(1.0)
    return vectors * shrink.view(-1, *[1] * (vectors.ndim - 1))


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device that is there.

    Raises
    ------
    UserError
        If the name is not one of these or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is auto, cpu, cuda, cuda:N or mps, not {name!r}") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise UserError(f"--device {name}: this machine has no such device; use --device auto")
    return device

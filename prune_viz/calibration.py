"""Calibrated probes: inputs moved until every batch norm sees the mean and variance it saw in training.

Drawn pictures and stimuli alone drive a network where its training never led it, and what is fitted on them
does not hold on real inputs. A batch norm remembers what it was fed; inputs that feed all of them alike are
near the training data as far as the network can tell (Yin et al. 2020, DeepInversion). The statistics are
those of all the probes together, which no batch could match: each batch is moved given what the others
last gave. Steps are taken in the white coordinates of the natural prior, so that broad patterns move as
easily as fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_viz.ascent import roll, unit
from prune_viz.devices import is_out_of_memory
from prune_viz.inputs import InputStatistics
from prune_viz.priors import SCENE_EXPONENT, are_photographs, make_prior, scene_exponent
from prune_viz.progress import Progress
from prune_viz.runs import written_aside

PROBES = 96  # of `POSITIONS` pixels; of smaller ones more
POSITIONS = 160 * 160
MOST_PROBES = 384
PASSES = 76  # over all probes, at most
BATCH = 32
RATE = 0.1  # of the first steps, in deviations of a white coordinate
BETAS = 0.9, 0.99  # of the running means of gradients and of their squares
JITTER = 1 / 16  # of the size, each way
CONTRASTS = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4)  # tried at the start, in deviations of natural inputs
VARIANTS = 16  # shifted and, of photographs, mirrored and enlarged copies of each probe
ENLARGED = 1.25
# What probes depend on.
SETTINGS = (PROBES, POSITIONS, MOST_PROBES, PASSES, BATCH, RATE, BETAS, JITTER, CONTRASTS, SCENE_EXPONENT)
_PATIENCE = 10  # passes without a fall of the distance by `_FALL`, and it ends
_FALL = 0.01
_FLOOR = 1e-3  # of a layer's mean variance; what a channel's variance counts as at least


@dataclass(frozen=True)
class Calibrated:
    """Probes that feed the batch norms as training did, and how nearly.

    Attributes
    ----------
    images : Tensor, shape (N, C, *size)
        The probes, in the model's own input units, on the CPU.
    before, distance : float
        How far the batch norms' inputs were and are from their running statistics, over all channels and
        layers: mean squared error of the mean plus that of the deviation, in running deviations.
    passes : int
        How often each probe was moved.
    """

    images: Tensor
    before: float
    distance: float
    passes: int


def calibrate(
    model: nn.Module,
    starts: Sequence[Tensor],
    *,
    seed: int = 0,
    statistics: InputStatistics | None = None,
    passes: int = PASSES,
    progress: Progress | None = None,
) -> Calibrated | None:
    """Move inputs until the batch norms of a network see their running statistics.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, not folded; left unchanged.
    starts : sequence of Tensor, each shape (n, C, *size)
        Where the probes start, kind by kind. Every kind is brought to that of `CONTRASTS` at which the batch
        norms see what is nearest to their statistics.
    seed : int
        Seed of the jitter.
    statistics : InputStatistics, optional
        What is known of the model's inputs.
    passes : int
        How often each probe is moved, at most.
    progress : Progress, optional
        Advanced by every probe that is moved, and at the end by those that need not be.

    Returns
    -------
    Calibrated or None
        None where the network has no batch norm with running statistics, lets no gradient through or
        meets values that are not finite.
    """
    progress = progress or Progress()
    device = next(model.parameters()).device
    kinds = [kind for kind in starts if len(kind)]
    count, shape = sum(len(kind) for kind in kinds), kinds[0].shape[1:]
    prior = make_prior("natural", shape[0], tuple(shape[1:]), device, statistics, scene_exponent(shape))
    random = torch.Generator().manual_seed(seed)
    photographs = are_photographs(shape)

    def images(chunk: Tensor, contrast: float) -> Tensor:
        return contrast * prior.colour(chunk)

    with _Fed(model) as fed:
        chunks, contrasts, known = [], [], []
        for kind in kinds:
            white = unit(prior.whiten(kind.float().to(device)).flatten(1)) * math.sqrt(shape.numel())
            parts = torch.split(white.view_as(kind), BATCH)
            contrast, moments = _nearest(fed, parts, images)
            if not moments[0]:
                return None
            chunks += [part.clone() for part in parts]
            contrasts += [contrast] * len(parts)
            known += moments
        shares = [len(chunk) / count for chunk in chunks]
        steppers = [_Stepper(chunk) for chunk in chunks]
        distances = [_distance(_mean(known, shares))]
        for number in range(passes):
            rate = RATE * 0.5 * (1 + math.cos(math.pi * number / passes))
            for index, (chunk, stepper) in enumerate(zip(chunks, steppers, strict=True)):
                free = chunk.detach().requires_grad_()
                own = fed.moments(_shift(images(free, contrasts[index]), random, photographs))
                pooled = _mean([*known[:index], own, *known[index + 1 :]], shares)
                gradient = _gradient(_loss(pooled), free)
                if gradient is None:
                    return None
                known[index] = [moment.detach() for moment in own]
                stepper.step(gradient, rate)
                progress.advance(len(chunk))
            distances.append(_distance(_mean(known, shares)))
            if not math.isfinite(distances[-1]):
                return None
            if _settled(distances):
                progress.advance(count * (passes - number - 1))
                break
    found = torch.cat([images(chunk, own).cpu() for chunk, own in zip(chunks, contrasts, strict=True)])
    return Calibrated(found, distances[0], distances[-1], len(distances) - 1)


def _nearest(
    fed: _Fed, parts: Sequence[Tensor], images: Callable[[Tensor, float], Tensor]
) -> tuple[float, list[list[Tensor]]]:
    """The contrast at which probes feed the batch norms most nearly as training did, and their moments."""
    shares = [len(part) / sum(map(len, parts)) for part in parts]
    found = []
    with torch.no_grad():
        for contrast in CONTRASTS:
            known = [fed.moments(images(part, contrast)) for part in parts]
            if not known[0]:
                return contrast, known
            found.append((_distance(_mean(known, shares)), contrast, known))
    _, contrast, known = min(found, key=lambda one: one[0] if math.isfinite(one[0]) else math.inf)
    return contrast, known


def _gradient(loss: Tensor, chunk: Tensor) -> Tensor | None:
    """The gradient, or None where the forward pass lets none through."""
    try:
        return torch.autograd.grad(loss, chunk)[0]
    except RuntimeError as error:  # nothing to differentiate, or changed in place what a gradient needs
        if is_out_of_memory(error):
            raise
        return None


class _Stepper:
    """Adam (Kingma and Ba 2015) with one second moment an image instead of one a coordinate.

    With its own second moment every coordinate moves at first by the whole rate, as noise does, whether the
    loss asks for it or not. So the steps go where the gradient points, and leave the rest of a picture clean.
    """

    def __init__(self, chunk: Tensor) -> None:
        self._chunk = chunk
        self._mean = torch.zeros_like(chunk)
        self._square = torch.zeros(len(chunk), *(1,) * (chunk.ndim - 1), device=chunk.device)
        self._steps = 0

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move the chunk in place, shape (B, C, *size)."""
        self._steps += 1
        axes = tuple(range(1, gradient.ndim))
        self._mean.lerp_(gradient, 1 - BETAS[0])
        self._square.lerp_(gradient.square().mean(dim=axes, keepdim=True), 1 - BETAS[1])
        mean = self._mean / (1 - BETAS[0] ** self._steps)
        deviation = (self._square / (1 - BETAS[1] ** self._steps)).sqrt()
        self._chunk -= rate * mean / deviation.clamp_min(1e-12)


class _Fed:
    """What the batch norms of a network are fed while inputs run through it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                self._handles.append(module.register_forward_pre_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: Any, arguments: tuple[Tensor, ...]) -> None:
        variance = module.running_var
        deviation = (variance.clamp_min(_FLOOR * float(variance.mean())) + module.eps).sqrt()
        shape = [1, -1] + [1] * (arguments[0].ndim - 2)
        normal = (arguments[0] - module.running_mean.view(shape)) / deviation.view(shape)
        axes = [axis for axis in range(normal.ndim) if axis != 1]
        self._seen.append(torch.stack([normal.mean(dim=axes), normal.square().mean(dim=axes)]))

    def moments(self, images: Tensor) -> list[Tensor]:
        """Mean and mean square, shape (2, channels), of what each batch norm is fed, in its own units."""
        self._seen = []
        self._model(as_batch(images))
        return self._seen


def _mean(known: Sequence[Sequence[Tensor]], shares: Sequence[float]) -> list[Tensor]:
    """Each batch norm's moments over all probes, from those of the batches."""
    return [
        torch.stack([share * moment for share, moment in zip(shares, moments, strict=True)]).sum(dim=0)
        for moments in zip(*known, strict=True)
    ]


def _loss(pooled: Sequence[Tensor]) -> Tensor:
    """Squared errors of means and deviations, a mean over each layer's channels and over layers."""
    errors = []
    for mean, square in pooled:
        deviation = (square - mean.square()).clamp_min(1e-6).sqrt()
        errors.append((mean.square() + (deviation - 1).square()).mean())
    return torch.stack(errors).mean()


def _distance(pooled: Sequence[Tensor]) -> float:
    return float(_loss(pooled))


def _settled(distances: Sequence[float]) -> bool:
    """Whether the distance has stopped falling."""
    if len(distances) <= _PATIENCE:
        return False
    return min(distances[-_PATIENCE:]) > (1 - _FALL) * min(distances[:-_PATIENCE])


def _shift(images: Tensor, random: torch.Generator, mirror: bool) -> Tensor:
    """Shift each image around its canvas by up to `JITTER` of it, and mirror half of them if asked to."""
    size = images.shape[2:]
    reaches = torch.tensor([max(1, int(extent * JITTER)) for extent in size])
    chance = 2 * torch.rand((len(images), len(size)), generator=random) - 1
    shifts = (chance * (reaches + 0.5)).round().long().clamp(-reaches, reaches)
    moved = roll(images, shifts.to(images.device))
    if mirror:
        mirrored = torch.rand(len(images), generator=random) < 0.5
        moved = torch.where(mirrored.view(-1, 1, 1, 1).to(images.device), moved.flip(-1), moved)
    return moved


def variants(images: Tensor, enlarge: bool, seed: int = 0) -> Iterator[Tensor]:
    """Give `VARIANTS` copies of probes, each shifted at random; of photographs, mirrored and enlarged too.

    Calibration shifts and mirrors alike as it goes, so that these feed the batch norms as well as the probes
    themselves, and a deep layer, which sees few positions of each, gets samples enough for a regression.

    Parameters
    ----------
    images : Tensor, shape (N, C, *size)
        Probes.
    enlarge : bool
        Whether the network takes inputs `ENLARGED` times as large.
    seed : int
        Seed of the shifts.

    Yields
    ------
    Tensor, shape (N, C, *size), or larger for some copies of photographs
    """
    random = torch.Generator().manual_seed(seed)
    photographs = are_photographs(images.shape[1:])
    for number in range(VARIANTS):
        moved = _shift(images, random, photographs)
        if enlarge and photographs and number % 2:
            moved = F.interpolate(moved, size=enlarged(images.shape[2:]), mode="bicubic", antialias=True)
        yield moved


def enlarged(size: Sequence[int]) -> list[int]:
    """The size of enlarged probes."""
    return [round(ENLARGED * extent) for extent in size]


def probes_for(size: Sequence[int]) -> int:
    """How many probes of a spatial size are calibrated: small ones cost less and give fewer samples."""
    return int(min(max(PROBES * POSITIONS / math.prod(size), PROBES), MOST_PROBES))


def as_batch(images: Tensor) -> Tensor:
    """Images laid out in memory as convolutions like them."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images.contiguous()


def save_probes(calibrated: Calibrated, path: Path, key: str) -> None:
    """Write calibrated probes, and a digest of what they depend on."""
    from safetensors.torch import save_file

    numbers = {name: repr(getattr(calibrated, name)) for name in ("before", "distance", "passes")}
    with written_aside(path) as aside:
        save_file({"images": calibrated.images.contiguous()}, aside, {"key": key, **numbers})


def load_probes(path: Path, key: str | None = None) -> Calibrated | None:
    """Read calibrated probes; None where there are none, or they depend on something else than `key`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if key not in (None, told.get("key")):
                return None
            numbers = float(told["before"]), float(told["distance"]), int(told["passes"])
            return Calibrated(file.get_tensor("images"), *numbers)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None

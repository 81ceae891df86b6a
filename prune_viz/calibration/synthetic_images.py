"""Synthetic images: inputs moved until every batch norm sees the mean and variance it saw in training.

Drawn pictures and stimuli alone drive a network where its training never led it, and what is fitted on them
does not hold on real inputs. A batch norm remembers what it was fed; inputs that feed all of them alike are
near the training data as far as the network shows (Yin et al. 2020, DeepInversion). The statistics are
those of all the images together, which no batch could match: each batch is moved given what the others
last gave. What else is asked of images stands in `prune_viz.calibration.losses`. Steps are taken in the white
coordinates of the natural prior, so that broad patterns move as easily as fine ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prune_viz.calibration import dead_leaves, extent, losses
from prune_viz.calibration.images import Owner, Start, SyntheticImages
from prune_viz.calibration.losses import (
    Means,
    Seen,
    Watched,
    join,
    norms_error,
    own_shares,
    pool,
    total_error,
)
from prune_viz.calibration.variants import JITTER, shifted
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization import priors
from prune_viz.feature_visualization.optimiser import unit
from prune_viz.feature_visualization.priors import are_photographs, make_prior, scene_exponent
from prune_viz.feature_visualization.stimuli import DRAFT_STEPS
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.devices import is_out_of_memory, release_memory, with_fewer
from prune_viz.utils.memory import RowLimit, even_parts

ALGORITHM = 3  # raised with every change after which calibration images come out differently
BATCH = 32
RATE = 0.15  # of the first steps, in deviations of a white coordinate
BETAS = 0.9, 0.99  # of the running means of gradients and of their squares
CONTRASTS = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4)  # tried at the start, in deviations of natural inputs
_PATIENCE = 10  # passes without a fall of the distance by `_FALL`, and it ends
_FALL = 0.01


def settings() -> list[object]:
    """What calibration images depend on beside their arguments, for the key under which they are kept."""
    own = [ALGORITHM, BATCH, RATE, BETAS, JITTER, CONTRASTS, _PATIENCE, _FALL, DRAFT_STEPS]
    return [own, extent.settings(), losses.settings(), dead_leaves.settings(), priors.settings()]


def calibrate(
    model: nn.Module,
    starts: Sequence[Start],
    context: RunContext | None = None,
    passes: int = extent.PASSES,
) -> SyntheticImages | None:
    """Move inputs until the batch norms of a network see their running statistics.

    Meanwhile the network stays half sure of each and takes them for many classes, and those that start
    from stimuli go on exciting the filters whose they are.

    Parameters
    ----------
    model : nn.Module
        The network in eval mode, not folded; left unchanged.
    starts : sequence of Start
        Where the images start, kind by kind. Every kind is brought to that of `CONTRASTS` at which the batch
        norms see what is nearest to their statistics.
    context : RunContext, optional
        What the stages of a run share: its seed, of the jitter; its memory: where a batch does not fit, it
        runs through the network in parts, twice; its progress, advanced by every image that is moved, and at
        the end by those that need not be.
    passes : int
        How often each calibration image is moved, at most.

    Returns
    -------
    SyntheticImages or None
        None where the network has no batch norm with running statistics, lets no gradient through or
        meets values that are not finite.
    """
    device = next(model.parameters()).device
    context = context or RunContext()
    # A head may let no gradient through where the batch norms before it do.
    for kind in dict.fromkeys([context.output, OutputKind()]):
        found = with_fewer(partial(_calibrate, model, starts, context, passes, kind), BATCH, device)
        if found is not None:
            return found
    return None


def _calibrate(
    model: nn.Module,
    starts: Sequence[Start],
    context: RunContext,
    passes: int,
    output: OutputKind,
    most: int,
) -> SyntheticImages | None:
    device = next(model.parameters()).device
    kinds = [kind for kind in starts if len(kind.images)]
    count, shape = sum(len(kind.images) for kind in kinds), kinds[0].images.shape[1:]
    prior = make_prior(
        "natural", shape[0], tuple(shape[1:]), device, context.statistics, scene_exponent(shape)
    )
    random = torch.Generator().manual_seed(context.seed)
    photographs = are_photographs(shape, context.statistics)

    def images(chunk: Tensor, contrast: float) -> Tensor:
        return contrast * prior.colour(chunk)

    with Watched(model, output) as watched:
        rows = RowLimit(context.budget, watched.see, backward=True).rows(shape, most)
        parts: list[_Part] = []
        for kind in kinds:
            white = unit(prior.whiten(kind.images.float().to(device)).flatten(1)) * math.sqrt(shape.numel())
            parts += _nearest(watched, white.view_as(kind.images), kind.owners, images, rows)
            if not parts[-1].seen.norms:
                return None
        shares = [len(part.white) / count for part in parts]
        known = [part.seen.means() for part in parts]
        steppers = [_Stepper(part.white) for part in parts]
        distances = [_distance(known, shares)]
        for number in range(passes):
            rate = RATE * 0.5 * (1 + math.cos(math.pi * number / passes))
            for index, (part, stepper) in enumerate(zip(parts, steppers, strict=True)):
                free = part.white.detach().requires_grad_()
                moved, mirrored = shifted(images(free, part.contrast), random, photographs)
                asked = part.asked(mirrored)

                def error(seen: Seen, index: int = index, asked: Tensor | None = asked) -> Tensor:
                    pooled = pool([*known[:index], seen.means(), *known[index + 1 :]], shares)
                    return total_error(pooled, seen.own, asked)

                found = _differentiate(watched, moved, part.owners, error, rows)
                if found is None:
                    return None
                known[index] = found[0].means().detach()
                stepper.step(torch.autograd.grad(moved, free, found[1])[0], rate)
                context.progress.advance(len(part.white))
            distances.append(_distance(known, shares))
            if not math.isfinite(distances[-1]):
                return None
            if _settled(distances):
                context.progress.advance(count * (passes - number - 1))
                break
        ends = [images(part.white, part.contrast) for part in parts]
        kept = _activation_kept(watched, parts, ends, rows)
    ended = torch.cat([end.cpu() for end in ends])
    return SyntheticImages(ended, distances[0], distances[-1], len(distances) - 1, kept)


@dataclass
class _Part:
    """A batch of calibration images of one kind that moves together.

    Attributes
    ----------
    white : Tensor, shape (B, C, *size)
        In white coordinates; moved in place.
    contrast : float
        Of its kind.
    owners : sequence of (str, int)
        Whose stimuli they were.
    seen : Seen
        What it gave at the start.
    """

    white: Tensor
    contrast: float
    owners: Sequence[Owner]
    seen: Seen

    def asked(self, mirrored: Tensor) -> Tensor | None:
        """What own filters gave at the start, of mirrored stimuli nothing: they need not excite them."""
        if self.seen.own is None:
            return None
        return torch.where(mirrored[:, None].to(self.seen.own.device), 0.0, self.seen.own)


def _nearest(
    watched: Watched,
    white: Tensor,
    owners: Sequence[Owner],
    images: Callable[[Tensor, float], Tensor],
    rows: int,
) -> list[_Part]:
    """A kind's images in batches, at the contrast at which batch norms see what is nearest to training."""
    chunks = torch.split(white, BATCH)
    whose = [owners[start : start + BATCH] for start in range(0, len(white), BATCH)]
    shares = [len(chunk) / len(white) for chunk in chunks]
    found = []
    with torch.no_grad():
        for contrast in CONTRASTS:
            parts = [
                _Part(chunk, contrast, own, _see(watched, images(chunk, contrast), own, rows))
                for chunk, own in zip(chunks, whose, strict=True)
            ]
            if not parts[0].seen.norms:
                return parts
            found.append((_distance([part.seen.means() for part in parts], shares), parts))
    return min(found, key=lambda one: one[0] if math.isfinite(one[0]) else math.inf)[1]


def _see(watched: Watched, images: Tensor, owners: Sequence[Owner], rows: int) -> Seen:
    """Statistics of the network on images, so many at a time, without gradients."""
    with torch.no_grad():
        return join([watched.see(*part) for part in _split(images, owners, rows)])


def _split(images: Tensor, owners: Sequence[Owner], rows: int) -> list[tuple[Tensor, Sequence[Owner]]]:
    return [(images[part], owners[part]) for part in even_parts(len(images), rows)]


def _differentiate(
    watched: Watched, images: Tensor, owners: Sequence[Owner], error: Callable[[Seen], Tensor], rows: int
) -> tuple[Seen, Tensor] | None:
    """Statistics of the network on images, and the error's gradient by them; None where none comes through.

    More images than `rows` go through the network in parts, twice: the statistics of all decide what the
    error asks of each.
    """
    inputs = images.detach().requires_grad_()
    if len(inputs) <= rows:
        seen = watched.see(inputs, owners)
        gradient = _gradient(error(seen), inputs)
        return None if gradient is None else (seen, gradient)
    with torch.no_grad():
        parts = [watched.see(*part).leaves() for part in _split(inputs, owners, rows)]
    seen = join(parts)
    asked = iter(torch.autograd.grad(
        error(seen), [one for part in parts for one in part.tensors()], materialize_grads=True
    ))  # fmt: skip
    gradients = []
    for chunk, whose in _split(inputs.detach(), owners, rows):
        chunk = chunk.requires_grad_()
        given = watched.see(chunk, whose).tensors()
        asking = sum(((one * next(asked)).sum() for one in given), chunk.new_zeros(()))
        gradient = _gradient(asking, chunk)
        if gradient is None:
            return None
        gradients.append(gradient)
        release_memory(images.device)
    return seen, torch.cat(gradients)


def _activation_kept(
    watched: Watched, parts: Sequence[_Part], ends: Sequence[Tensor], rows: int
) -> float | None:
    """Median over stimuli of the response of their own filters, as a share of that at the start."""
    shares = []
    for part, end in zip(parts, ends, strict=True):
        own = _see(watched, end, part.owners, rows).own if part.owners else None
        if own is not None and part.seen.own is not None:
            shares.append(own_shares(own, part.seen.own))
    return float(torch.cat(shares).median()) if shares else None


def _distance(known: Sequence[Means], shares: Sequence[float]) -> float:
    return float(norms_error(pool(known, shares)))


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


def _settled(distances: Sequence[float]) -> bool:
    """Whether the distance has stopped falling."""
    if len(distances) <= _PATIENCE:
        return False
    return min(distances[-_PATIENCE:]) > (1 - _FALL) * min(distances[:-_PATIENCE])

"""Healing: a smaller network learns from the whole one, without labels, to do what that does.

The whole network is the teacher (Hinton et al. 2015). The smaller one is trained to give its outputs, and the
maps of its layers at the filters kept (`prune_viz.pruning.hints`), on calibration images or on inputs of the
user's. Statistics of batch norms stay as they are; scales, shifts and weights learn. What comes out is what
was best on images kept out of training. The network that was given counts among them, so none is worse.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz.calibration.image_files import RunImages
from prune_viz.calibration.images import fitted, kept_out
from prune_viz.calibration.variants import shifted
from prune_viz.feature_visualization.priors import are_photographs
from prune_viz.network.copies import plain_copy
from prune_viz.network.outputs import mean_squares, output_changes
from prune_viz.pruning.compensation import meter_for
from prune_viz.pruning.consistency import groups_for_removal, reconcile_with_groups
from prune_viz.pruning.healing_state import HealingState, read_state, write_state
from prune_viz.pruning.hints import Hints
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.runs.damage import Damage
from prune_viz.runs.fingerprint import hash_model
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.errors import RunInterruptedError, UserError, brief
from prune_viz.utils.memory import Budget, RowLimit
from prune_viz.utils.progress import Progress

ALGORITHM = 1  # raised with every change after which a healed network comes out differently
STEPS = 300
BATCH = 16
RATE = 1e-3  # of AdamW at its highest
WARM = 0.05  # of the steps, in which the rate rises
HINTS = 20.0  # what the layers' error counts beside the outputs' change
CLIP = 1.0  # most of the gradient's norm
CHECKS = 10  # measurements on images kept out
FEWEST = 8  # inputs of the user's


@dataclass(frozen=True)
class Healing:
    """How to heal.

    Attributes
    ----------
    steps : int
        Of training; at least 1.
    examples : Tensor or None, shape (N, C, *size)
        Inputs to learn from, in the model's own units; without them the masks' calibration images.
    seed : int
        Of which images come together, and how they are shifted.
    state : Path or None
        Where training is kept while it runs, so that it can go on after an interruption.
    progress : Progress
        Shows how the work goes.
    """

    steps: int = STEPS
    examples: Tensor | None = None
    seed: int = 0
    state: Path | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Healed:
    """A network after healing.

    Attributes
    ----------
    model : nn.Module
        In eval mode.
    before, after : Damage
        Change of the output from the whole network's, on images that were kept out of training.
    best : int
        After how many steps it was best; 0 where it is the network that was given.
    steps : int
        How many were taken.
    images : str
        What it was measured on, for people.
    """

    model: nn.Module
    before: Damage
    after: Damage
    best: int
    steps: int
    images: str

    def __str__(self) -> str:
        """A sentence for people."""
        if not self.best:
            return f"healing did not help in {self.steps:,} steps: the network is as it was before"
        return f"healed in {self.steps:,} steps: {self.before} -> {self.after} on {self.images}"

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        return {
            "steps": self.steps,
            "best": self.best,
            "before": self.before.value,
            "after": self.after.value,
            "unit": self.before.unit.value,
            "measured_on": self.images,
        }


def heal(
    smaller: nn.Module,
    whole: nn.Module,
    masks: Mapping[str, Tensor],
    steps: int = STEPS,
    examples: Tensor | None = None,
    seed: int = 0,
) -> Healed:
    """Let a smaller network learn from the whole one what it does.

    Parameters
    ----------
    smaller : nn.Module
        The network without the filters that masks remove (`prune_viz.remove_filters`); left unchanged.
    whole : nn.Module
        The network that it was made from.
    masks : mapping of str to bool Tensor
        True = keep; those that it was made with. `Masks` of a run bring calibration images.
    steps : int
        Of training.
    examples : Tensor, optional, shape (N, C, *size)
        Inputs to learn from, in the model's own units, unlabelled; at least `FEWEST`. A quarter of them is
        kept out to measure on.
    seed : int
        Of all that is random.

    Returns
    -------
    Healed

    Raises
    ------
    UserError
        If there is nothing to learn from, the masks are of another model, or the network cannot be trained.
    """
    check_masks(whole, masks)
    masks = masks if isinstance(masks, Masks) else Masks(masks)
    images, learned = learned_from(masks.images, examples)
    example = learned[:1].to(next(whole.parameters()).device)
    consistent = reconcile_with_groups(whole, masks, groups_for_removal(whole, example))
    consistent.images = images
    return heal_as(smaller, whole, consistent, Healing(steps, examples, seed))


def heal_as(smaller: nn.Module, whole: nn.Module, masks: Masks, healing: Healing) -> Healed:
    """`heal`, with all that can be chosen in `healing`, and masks that are consistent and have images.

    What is measured on are the masks' images that no fit saw (`learned_from`).

    Raises
    ------
    RunInterruptedError
        If it is interrupted, and can go on from what is kept in `Healing.state`.
    """
    if healing.steps < 1:
        raise UserError(f"healing takes at least 1 step, not {healing.steps}")
    masks = masks.copy()
    masks.images, images = learned_from(masks.images, healing.examples)
    student, teacher = plain_copy(smaller).float(), plain_copy(whole).float()
    device = next(student.parameters()).device
    teacher.to(device)
    meter = meter_for(teacher, masks, passes=CHECKS + 2)
    if meter is None:
        raise UserError("the network cannot be healed: it does not run on the images, or takes too long")
    training = _Training(student, teacher, masks, images.to(device), meter, healing)
    try:
        best = with_fewer(training.run, BATCH, device)
    except KeyboardInterrupt:
        if healing.state is not None and healing.state.exists():
            raise RunInterruptedError from None
        raise
    except RuntimeError as error:  # a forward pass that gradients do not come through
        raise UserError(f"the network cannot be healed: training it fails ({brief(error)})") from None
    healed = plain_copy(smaller)
    healed.load_state_dict(best.weights)
    unit = meter.kind.task.unit
    before, after = Damage(best.first, unit), Damage(best.change, unit)
    return Healed(healed, before, after, best.number, healing.steps, meter.describe(masks.images.are_real))


def learned_from(images: RunImages, examples: Tensor | None) -> tuple[RunImages, Tensor]:
    """The images with which a network is healed: those to measure on, and those to learn from.

    Parameters
    ----------
    images : RunImages
        What is beside the masks.
    examples : Tensor or None, shape (N, C, *size)
        The user's inputs.

    Returns
    -------
    RunImages
        Of which `RunImages.kept_out` are the user's where enough of them are kept out.
    Tensor, shape (N, C, *size)
        What is learned from.

    Raises
    ------
    UserError
        If there are none, or too few.
    """
    if examples is not None:
        if len(examples) < FEWEST:
            raise UserError(f"healing needs at least {FEWEST} inputs, not {len(examples)}")
        return replace(images, examples=kept_out(examples)), fitted(examples)
    if images.fitted is None or images.kept_out is None or not len(images.kept_out):
        raise UserError("there are no calibration images beside the masks to heal with; give --data")
    return images, images.fitted


@dataclass(frozen=True)
class _Best:
    """The best network so far: its weights, after how many steps, and its change on images kept out."""

    weights: dict[str, Tensor]
    number: int
    change: float
    first: float


class _Training:
    """Trains a smaller network; parameters are those of `heal_as`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        masks: Masks,
        images: Tensor,
        meter: OutputMeter,
        healing: Healing,
    ) -> None:
        self._student, self._images, self._meter = student, images, meter
        self._kind, self._healing, self._start = meter.kind, healing, copy.deepcopy(student.state_dict())
        self._hints = Hints(teacher, student, masks, images[:BATCH])
        self._sizes = mean_squares(self._hints.ask(images[:BATCH]).outputs)
        self._photographs = are_photographs(images.shape[1:])
        frozen = {
            parameter
            for name, module in student.named_modules()
            if name in self._hints.unchanged
            for parameter in module.parameters(recurse=False)
        }
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and parameter not in frozen)
        self._learning = [one for one in student.parameters() if one.requires_grad]
        budget = Budget.of(images.device)
        held = 4 * sum(one.nbytes for one in self._learning)  # gradients, two moments, the best weights
        self._rows = RowLimit(budget, self._run, backward=True, aside=held)
        self._key = self._digest(teacher, masks)

    def run(self, most: int) -> _Best:
        """Train with so many rows at a time, and return the best network."""
        steps, progress = self._healing.steps, self._healing.progress
        rows = self._rows.rows(self._images.shape[1:], most)
        self._student.load_state_dict(self._start)
        optimiser = torch.optim.AdamW(self._learning, lr=RATE, weight_decay=0.0)
        first = self._meter.change(self._student)
        best = _Best(self._start, 0, first, first)
        done = self._go_on(optimiser)
        if done is not None:
            best = _Best(done.best, done.number, done.change, first)
        begin = 0 if done is None else done.step
        checks = {round(steps * (number + 1) / CHECKS) for number in range(CHECKS)}
        progress.start("healing", steps, begin)
        for step in range(begin, steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * _rate(step, steps)
            optimiser.zero_grad(set_to_none=True)
            batch = self._batch(step)
            for part in torch.split(batch, max(rows, 1)):
                (self._loss(part) * (len(part) / len(batch))).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._learning, CLIP)
            optimiser.step()
            progress.advance()
            if step + 1 in checks:
                change = self._meter.change(self._student)
                if not math.isfinite(change):
                    break
                if change < best.change:
                    best = _Best(copy.deepcopy(self._student.state_dict()), step + 1, change, first)
                self._keep(step + 1, optimiser, best)
                progress.note(f"{best.change:.3g} left of {first:.3g}")
        progress.finish()
        return best

    def _batch(self, step: int) -> Tensor:
        """The images of a step: pairs of shifted ones, each mixed at a share of its own, contrast kept.

        They depend on the seed and the step alone.
        """
        random = torch.Generator().manual_seed((self._healing.seed << 32) + step)
        count = min(BATCH, len(self._images))
        one, other = (
            shifted(self._images[rows.to(self._images.device)], random, self._photographs)[0]
            for rows in (torch.randperm(len(self._images), generator=random)[:count] for _ in range(2))
        )
        share = (0.5 * torch.rand(count, generator=random)).view(-1, *[1] * (one.ndim - 1)).to(one.device)
        return ((1 - share) * one + share * other) / ((1 - share).square() + share.square()).sqrt()

    def _run(self, images: Tensor) -> list[Tensor]:
        """A forward pass whose gradients are wanted, for measuring what it holds."""
        outputs, missed = self._hints.answer(images, self._hints.ask(images))
        return [*outputs, missed]

    def _loss(self, images: Tensor) -> Tensor:
        asked = self._hints.ask(images)
        outputs, missed = self._hints.answer(images, asked)
        changes = output_changes(asked.outputs, outputs, self._kind, len(images), self._sizes)
        change = torch.stack(changes).mean() if changes else images.new_zeros(())
        return change + HINTS * missed

    def _keep(self, step: int, optimiser: torch.optim.Optimizer, best: _Best) -> None:
        if self._healing.state is None:
            return
        weights, moments = self._student.state_dict(), optimiser.state_dict()
        state = HealingState(self._key, step, weights, moments, best.weights, best.number, best.change)
        write_state(self._healing.state, state)

    def _go_on(self, optimiser: torch.optim.Optimizer) -> HealingState | None:
        """Take up training where an earlier process left it, if it did."""
        if self._healing.state is None:
            return None
        state = read_state(self._healing.state, self._key)
        if state is None:
            return None
        try:
            self._student.load_state_dict(state.weights)
            optimiser.load_state_dict(state.optimiser)
        except (RuntimeError, ValueError, KeyError):  # damaged
            self._student.load_state_dict(self._start)
            return None
        return state

    def _digest(self, teacher: nn.Module, masks: Masks) -> str:
        """Hex SHA-256 of all that the healed network depends on."""
        own = [ALGORITHM, BATCH, RATE, WARM, HINTS, CLIP, CHECKS, self._healing.steps, self._healing.seed]
        kind = [self._kind.task.value, self._kind.normalised]
        digest = hashlib.sha256(json.dumps([own, kind]).encode())
        for model in (teacher, self._student):
            digest.update(hash_model(model).encode())
        for images in (self._images, self._meter.images):
            digest.update(f"{tuple(images.shape)}".encode() + images.float().cpu().numpy().tobytes())
        for name, mask in masks.items():
            digest.update(name.encode() + mask.cpu().numpy().tobytes())
        return digest.hexdigest()


def _rate(step: int, steps: int) -> float:
    """Share of the highest rate: it rises linearly, and falls as a cosine."""
    rising = (step + 1) / max(1, round(WARM * steps))
    return min(rising, 0.5 * (1 + math.cos(math.pi * step / steps)))

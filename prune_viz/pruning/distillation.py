"""Distillation: a network trained to give another's outputs, and the maps of its layers.

Training is by AdamW (Loshchilov and Hutter 2019) at a rate that falls as a cosine. What rate serves best
differs from network to network by orders of magnitude, so short trials find it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.calibration.variants import shifted
from prune_viz.feature_visualization.priors import are_photographs
from prune_viz.network.outputs import mean_squares, output_changes
from prune_viz.pruning.healing_state import HealingState, read_state, write_state
from prune_viz.pruning.hints import Hints
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.runs.fingerprint import hash_model
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import Budget, RowLimit
from prune_viz.utils.progress import Progress

ALGORITHM = 1  # raised with every change after which a network comes out differently
STEPS = 300
BATCH = 16
RATES = (4e-3, 1e-3, 2.5e-4, 6.25e-5)  # tried in turn, as long as the next does better
TRIAL = 0.1  # of the steps, for each trial
WARM = 0.05  # of the steps, in which the rate rises
HINTS = 50.0  # what the layers' error counts beside the outputs' change
CLIP = 1.0  # most of the gradient's norm
CHECKS = 10  # measurements on images kept out
MEASUREMENTS = CHECKS + len(RATES) + 1
_MEASURED = 8  # images on which layers and outputs are measured before


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
class Best:
    """The best network so far: its weights, after how many steps, and its change on images kept out."""

    weights: dict[str, Tensor]
    number: int
    change: float
    first: float


class Distillation:
    """Trains a network to do what another does.

    Parameters
    ----------
    student : nn.Module
        What is trained, in place: the smaller network, in eval mode and single precision.
    teacher : nn.Module
        The whole network, alike, on the same device.
    masks : Masks
        Consistent masks, by which the student was made.
    images : Tensor, shape (N, C, *size)
        What is learned from, on that device.
    meter : OutputMeter
        Measures the student on images kept out.
    healing : Healing
        How it is trained.
    """

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
        self._hints = Hints(teacher, student, masks, images[:_MEASURED])
        self._sizes = mean_squares(self._hints.ask(images[:_MEASURED]).outputs)
        axes = [axis for axis in range(images.ndim) if axis != 1]
        self._mean = images.mean(dim=axes, keepdim=True)
        self._photographs = are_photographs(images.shape[1:])
        frozen = {
            parameter
            for name, module in student.named_modules()
            if name in self._hints.unchanged
            for parameter in module.parameters(recurse=False)
        }
        for parameter in student.parameters():
            learns = parameter.requires_grad and parameter.is_floating_point() and parameter not in frozen
            parameter.requires_grad_(learns)
        self._learning = [one for one in student.parameters() if one.requires_grad]
        if not self._learning:
            raise UserError(
                "the network cannot be healed: none of its parameters is to learn (requires_grad)"
            )
        budget = Budget.of(images.device)
        held = 4 * sum(one.nbytes for one in self._learning)  # gradients, two moments, the best weights
        self._rows = RowLimit(budget, self._run, backward=True, aside=held)
        self._key = self._digest(teacher, masks)

    def run(self, most: int) -> Best:
        """Train with at most so many rows at a time, and return the best network."""
        steps, progress = self._healing.steps, self._healing.progress
        rows = self._rows.rows(self._images.shape[1:], most)
        trial = max(1, round(TRIAL * steps))
        self._student.load_state_dict(self._start)
        first = self._meter.change(self._student)
        if first == 0:
            return Best(self._start, 0, first, first)
        optimiser, done = self._optimiser(), None
        if self._healing.state is not None:
            done = read_state(self._healing.state, self._key)
        if done is not None and not self._take_up(done, optimiser):
            done = None
        progress.start("healing", steps + len(RATES) * trial, done.step + len(RATES) * trial if done else 0)
        if done is None:
            if self._healing.state is not None:
                self._healing.state.unlink(missing_ok=True)  # of other healing
            rate, best, begin = self._best_rate(trial, rows), Best(self._start, 0, first, first), 0
            optimiser = self._optimiser()
            self._keep(0, rate, optimiser, best)
        else:
            rate, best, begin = done.rate, Best(done.best, done.number, done.change, first), done.step
        checks = {round(steps * (number + 1) / CHECKS) for number in range(CHECKS)}
        for step in self._steps(optimiser, rate, begin, steps, rows):
            if step in checks:
                change = self._meter.change(self._student)
                if not math.isfinite(change):
                    break
                if change < best.change:
                    best = Best(copy.deepcopy(self._student.state_dict()), step, change, first)
                self._keep(step, rate, optimiser, best)
                progress.note(f"{best.change:.3g} left of {first:.3g}")
        progress.finish()
        return best

    def _best_rate(self, steps: int, rows: int) -> float:
        """The rate after which, in so many steps each, the network is best on images kept out."""
        changes: dict[float, float] = {}
        for number, rate in enumerate(RATES):
            self._student.load_state_dict(self._start)
            for _ in self._steps(self._optimiser(), rate, 0, steps, rows):
                pass
            changes[rate] = self._meter.change(self._student)
            if number and math.inf > changes[rate] > changes[RATES[number - 1]]:
                self._healing.progress.advance((len(RATES) - number - 1) * steps)
                break
        self._student.load_state_dict(self._start)
        return min(changes, key=lambda rate: changes[rate])

    def _optimiser(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._learning, weight_decay=0.0)

    def _steps(
        self, optimiser: torch.optim.Optimizer, rate: float, begin: int, steps: int, rows: int
    ) -> Iterator[int]:
        """Take the steps from `begin` on; after each, give how many are done."""
        for step in range(begin, steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * _share_of_rate(step, steps)
            optimiser.zero_grad(set_to_none=True)
            batch = self._batch(step)
            for part in torch.split(batch, max(rows, 1)):
                (self._loss(part) * (len(part) / len(batch))).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._learning, CLIP)
            optimiser.step()
            self._healing.progress.advance()
            yield step + 1

    def _batch(self, step: int) -> Tensor:
        """The images of a step: pairs of shifted ones, each mixed at a share of its own.

        They are mixed around the mean of each channel, so that it stays, and so does the contrast.

        They depend on the seed and the step alone.
        """
        # PyTorch takes 32 bits of a seed.
        (own,) = np.random.SeedSequence([self._healing.seed, step]).generate_state(1)
        random = torch.Generator().manual_seed(int(own))
        count = min(BATCH, len(self._images))
        one, other = (
            shifted(self._images[rows.to(self._images.device)], random, self._photographs)[0]
            for rows in (torch.randperm(len(self._images), generator=random)[:count] for _ in range(2))
        )
        share = (0.5 * torch.rand(count, generator=random)).view(-1, *[1] * (one.ndim - 1)).to(one.device)
        mixed = (1 - share) * (one - self._mean) + share * (other - self._mean)
        return self._mean + mixed / ((1 - share).square() + share.square()).sqrt()

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

    def _keep(self, step: int, rate: float, optimiser: torch.optim.Optimizer, best: Best) -> None:
        """Write where training is, for a process that goes on after this one."""
        if self._healing.state is None:
            return
        weights, moments = self._student.state_dict(), optimiser.state_dict()
        state = HealingState(self._key, rate, step, weights, moments, best.weights, best.number, best.change)
        write_state(self._healing.state, state)

    def _take_up(self, done: HealingState, optimiser: torch.optim.Optimizer) -> bool:
        """Go back to where an earlier process was; whether what it left is whole."""
        try:
            self._student.load_state_dict(done.weights)
            optimiser.load_state_dict(done.optimiser)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            self._student.load_state_dict(self._start)
            return False
        return True

    def _digest(self, teacher: nn.Module, masks: Masks) -> str:
        """Hex SHA-256 of all that the healed network depends on."""
        own = [ALGORITHM, BATCH, RATES, TRIAL, WARM, HINTS, CLIP, CHECKS]
        asked = [self._healing.steps, self._healing.seed]
        kind = [self._kind.task.value, self._kind.normalised]
        digest = hashlib.sha256(json.dumps([own, asked, kind]).encode())
        for model in (teacher, self._student):
            digest.update(hash_model(model).encode())
        for images in (self._images, self._meter.images):
            digest.update(f"{tuple(images.shape)}".encode() + images.float().cpu().numpy().tobytes())
        for name, mask in masks.items():
            digest.update(name.encode() + mask.cpu().numpy().tobytes())
        return digest.hexdigest()


def _share_of_rate(step: int, steps: int) -> float:
    """Share of the highest rate: it rises linearly, and falls as a cosine."""
    rising = (step + 1) / max(1, round(WARM * steps))
    return min(rising, 0.5 * (1 + math.cos(math.pi * step / steps)))

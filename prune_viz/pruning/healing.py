"""Healing: a smaller network learns from the whole one, without labels, to do what that does.

The whole network is the teacher (Hinton et al. 2015). The smaller one is trained to give its outputs, and the
maps of its layers at the filters kept (`prune_viz.pruning.hints`), on calibration images or on inputs of the
user's. Statistics of batch norms stay as they are; scales, shifts and weights learn. What comes out is what
was best on images kept out of training. The network that was given counts among them, so none is worse there.

What is better on synthetic images may be worse on the network's own inputs. So it was for EfficientNet-lite0
where the change of the output fell by a quarter, and on them it must fall by a factor of `MARGIN`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz.calibration.image_files import RunImages
from prune_viz.calibration.images import fitted, kept_out
from prune_viz.network.copies import plain_copy
from prune_viz.pruning.compensation import meter_for
from prune_viz.pruning.consistency import groups_for_removal, reconcile_with_groups
from prune_viz.pruning.distillation import BATCH, MEASUREMENTS, STEPS, Best, Distillation, Healing
from prune_viz.pruning.masks import Masks, check_masks
from prune_viz.runs.damage import Damage
from prune_viz.utils.devices import with_fewer
from prune_viz.utils.errors import RunInterruptedError, UserError, brief
from prune_viz.utils.files import jsonable

FEWEST = 8  # inputs of the user's
MARGIN = 2.0  # by which the change on synthetic images must fall


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
    are_real : bool
        Whether that was the user's inputs.
    """

    model: nn.Module
    before: Damage
    after: Damage
    best: int
    steps: int
    images: str
    are_real: bool

    def __str__(self) -> str:
        """A sentence for people."""
        if not self.before.value:
            return "nothing to heal: the output is as it was"
        if not self.best:
            if self.are_real:
                return f"healing did not help in {self.steps:,} steps: the network is as it was before"
            return (
                f"{self.steps:,} steps of healing did not halve the change on {self.images}: the network is "
                "as it was before. --data with 128 unlabelled inputs would help"
            )
        return f"healed in {self.steps:,} steps: {self.before} -> {self.after} on {self.images}"

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        return {
            "steps": self.steps,
            "best": self.best,
            "before": jsonable(self.before.value),
            "after": jsonable(self.after.value),
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
        True = keep; those that `smaller` was made with. `Masks` of a run bring calibration images.
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
    example = learned[:1].to(next(whole.parameters()).device, copy=True)
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
    if healing.seed < 0:
        raise UserError(f"a seed is at least 0, not {healing.seed}")
    masks = masks.copy()
    masks.images, images = learned_from(masks.images, healing.examples)
    student, teacher = plain_copy(smaller).float(), plain_copy(whole).float()
    device = next(student.parameters()).device
    teacher.to(device)
    meter = meter_for(teacher, masks, passes=MEASUREMENTS)
    if meter is None:
        raise UserError("the network cannot be healed: it does not run on the images, or takes too long")

    start = copy.deepcopy(student.state_dict())

    def trained(most: int) -> Best:
        student.load_state_dict(start)
        return Distillation(student, teacher, masks, images.to(device), meter, healing).run(most)

    try:
        best = with_fewer(trained, BATCH, device)
    except KeyboardInterrupt:
        if healing.state is not None and healing.state.exists():
            raise RunInterruptedError from None
        raise
    except UserError:
        raise
    except Exception as error:  # whatever an untrusted forward pass raises, on these images or with gradients
        raise UserError(f"the network cannot be healed: training it fails ({brief(error)})") from None
    unit, are_real = meter.kind.task.unit, masks.images.are_real
    before, after = Damage(best.first, unit), Damage(best.change, unit)
    healed = plain_copy(smaller)
    number = best.number if are_real or MARGIN * best.change <= best.first else 0
    if number:
        healed.load_state_dict(best.weights)
    return Healed(
        healed, before, after if number else before, number, healing.steps, meter.describe(are_real), are_real
    )


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
        examples = examples.to(torch.float32, copy=True)  # networks may write into their input
        return replace(images, examples=kept_out(examples)), fitted(examples)
    if images.fitted is None or images.kept_out is None or not len(images.kept_out):
        raise UserError("there are no calibration images beside the masks to heal with; give --data")
    return images, images.fitted

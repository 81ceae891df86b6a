"""Writing pruned models to files: the same network with zeros, or a smaller one that can be built again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_viz.loading.checkpoints import Checkpoint
from prune_viz.loading.smaller_networks import compose_steps
from prune_viz.network.calls import does_not_run
from prune_viz.network.copies import parametrised, plain_copy
from prune_viz.network.cost import count_cost
from prune_viz.pruning.apply import apply_masks, are_zero, make_permanent
from prune_viz.pruning.compensation import Compensation
from prune_viz.pruning.consistency import groups_for_removal, reconcile_with_groups
from prune_viz.pruning.distillation import Healing
from prune_viz.pruning.export import export_model
from prune_viz.pruning.healing import Healed, heal_as, learned_from
from prune_viz.pruning.latency import Latency, Runtime, compare_latency
from prune_viz.pruning.masks import Masks, check_masks, load_masks
from prune_viz.pruning.outcome import Outcome, describe_change, measure_change
from prune_viz.pruning.remove import remove_and_compensate
from prune_viz.utils.errors import UserError, few
from prune_viz.utils.files import write_torch


@dataclass(frozen=True)
class Applied:
    """What applying masks did.

    Attributes
    ----------
    outcome : Outcome
        What went, and how far the output moved.
    how : str
        What was done with the filters, for people.
    notes : tuple of str
        What the masks asked for but had to stay, and what else is to be known.
    cost : pair of (int, int), or None
        Parameters and multiply-accumulates before and after; None where the network is as large as before.
    exported : str
        Where the network itself was written too, for people; empty where it was not.
    healed : Healed or None
        What healing did, where it was asked for.
    latencies : tuple of Latency
        Time for one input before and after, by each runtime that was asked for.
    """

    outcome: Outcome
    how: str
    notes: tuple[str, ...] = ()
    cost: tuple[tuple[int, int], tuple[int, int]] | None = None
    exported: str = ""
    healed: Healed | None = None
    latencies: tuple[Latency, ...] = ()

    def lines(self) -> list[str]:
        """What was done, for people."""
        one = self.outcome
        lines = [f"note: {note}" for note in self.notes]
        lines.append(f"{one.removed:,} of {one.filters:,} filters {self.how}")
        if self.cost is not None:
            for what, old, new in zip(("parameters", "MACs"), *self.cost, strict=True):
                lines.append(f"{what}: {old:,} -> {new:,} ({new / max(old, 1) - 1:+.1%})")
        lines += [str(one) for one in self.latencies]
        lines += [] if self.healed is None else [str(self.healed)]
        lines += describe_change(one.predicted, one.measured, one.images, one.rough)
        return [*lines, *filter(None, [self.exported])]

    def as_json(self) -> dict[str, Any]:
        """One object for programs: what `Outcome.as_json` has, and the network's size."""
        names = ("parameters", "macs", "parameters_after", "macs_after")
        sizes = [None] * 4 if self.cost is None else [*self.cost[0], *self.cost[1]]
        return {
            **self.outcome.as_json(),
            **dict(zip(names, sizes, strict=True)),
            "latency": [one.as_json() for one in self.latencies],
            "healed": None if self.healed is None else self.healed.as_json(),
            "notes": list(self.notes),
        }


def write_zeroed(
    checkpoint: Checkpoint,
    masks_file: Path,
    out: Path,
    export: Path | None = None,
    input_shape: Sequence[int] = (),
) -> Applied:
    """Write the state dict of a model with its masked filters at zero.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model; its own weights are changed too.
    masks_file : Path
        A run's ``masks.pt``.
    out : Path
        Where to write. A plain state dict, save where the model was made smaller before: then what
        `write_removed` writes.
    export : Path, optional
        Where to write the network itself too (`prune_viz.pruning.export.export_model`).
    input_shape : sequence of int
        Shape of one input, (C, *spatial), to export it for.

    Returns
    -------
    Applied

    Raises
    ------
    UserError
        If the masks cannot be read or are for another model, or that has parametrised tensors.
    """
    masks = load_masks(masks_file)
    check_origin(checkpoint, masks, masks_file)
    check_plain(checkpoint.model)
    whole = plain_copy(checkpoint.model)
    model = make_permanent(apply_masks(checkpoint.model, masks))
    masks.predicted = None  # of merging
    measure_change(whole, model, masks)
    exported = "" if export is None else export_model(model, input_shape, export)
    if checkpoint.pruning:
        save_checkpoint(checkpoint, model, out, checkpoint.input_shape or ())
    else:
        write_torch(out, model.state_dict())
    return Applied(Outcome.of(masks, out, None, 0), "set to zero", exported=exported)


def write_removed(
    checkpoint: Checkpoint,
    masks_file: Path,
    input_shape: Sequence[int],
    out: Path,
    compensate: str | None = None,
    export: Path | None = None,
    healing: Healing | None = None,
    runtimes: Sequence[Runtime] = (),
) -> Applied:
    """Write a checkpoint of a model without its masked filters.

    It loads with ``torch.load(out, weights_only=True)``: ``state_dict``, and what `load_checkpoint` needs
    to build the smaller network again: ``arch``, ``arch_kwargs``, ``input_shape`` and ``pruning``, the
    masks applied so far, as one step.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model, left unchanged.
    masks_file : Path
        A run's ``masks.pt``, or one made for a budget; merges and calibration images are read from beside it.
    input_shape : sequence of int
        Shape of one input, (C, *spatial).
    out : Path
        Where to write.
    compensate : {"none", "merge"}, optional
        Whether what the filters contributed is folded into the weights that are left, and batch norms
        are set anew where that helps; by default where the masks carry merges fitted to this model.
    export : Path, optional
        Where to write the smaller network itself too (`prune_viz.pruning.export.export_model`).
    healing : Healing, optional
        How to heal the smaller network before it is written; by default it is not healed.
    runtimes : sequence of Runtime
        By what both networks are timed.

    Returns
    -------
    Applied
        With notes on what the masks asked for but had to stay.

    Raises
    ------
    UserError
        If the masks cannot be read, are for another model, carry no merges though they are asked for,
        there is nothing to heal with, or the input shape does not fit.
    """
    masks = load_masks(masks_file)
    if compensate is None:
        fitted = masks.merges and masks.origin.is_of(checkpoint.model, checkpoint.sha256)
        compensate = "merge" if fitted else "none"
    if compensate == "merge" and masks.removed and not masks.merges:
        raise UserError(f"there is no decisions.json with merges beside {masks_file}; use --compensate none")
    check_origin(checkpoint, masks, masks_file, merge=compensate == "merge")
    if healing is not None:
        masks.images, _ = learned_from(masks.images, healing.examples)
    example = torch.zeros(1, *input_shape)
    _check_input(checkpoint.model, example)
    groups = groups_for_removal(checkpoint.model, example)
    consistent = reconcile_with_groups(checkpoint.model, masks, groups)
    smaller, done = remove_and_compensate(checkpoint.model, consistent, example, compensate, groups)
    healed = None if healing is None else heal_as(smaller, checkpoint.model, consistent, healing)
    smaller = smaller if healed is None else healed.model
    foreseen = (
        (healed is None or not healed.best)
        and compensate == "merge"
        and not consistent.notes
        and consistent.removed == masks.removed
    )
    consistent.predicted = masks.predicted if foreseen else None
    measure_change(checkpoint.model, smaller, consistent)
    exported = "" if export is None else export_model(smaller, input_shape, export)
    steps = compose_steps([*checkpoint.pruning, consistent])
    save_checkpoint(replace(checkpoint, pruning=[steps]), smaller, out, input_shape)
    notes = [*consistent.notes, *_left_unmerged(done)]
    if checkpoint.arch is None:
        notes.append("the model was pickled whole; loading the new file needs --arch")
    before, after = count_cost(checkpoint.model, input_shape), count_cost(smaller, input_shape)
    saved = 1 - after[1] / before[1] if before[1] else None
    how = f"removed, {'merged into the rest' if done.merged else 'nothing in their place'}"
    if healing is not None and healing.state is not None:
        healing.state.unlink(missing_ok=True)
    latencies, untimed = _timed(checkpoint.model, smaller, input_shape, runtimes)
    outcome = Outcome.of(consistent, out, saved, 0)
    return Applied(outcome, how, (*notes, *untimed), (before, after), exported, healed, latencies)


def _timed(
    whole: nn.Module, smaller: nn.Module, input_shape: Sequence[int], runtimes: Sequence[Runtime]
) -> tuple[tuple[Latency, ...], list[str]]:
    """How long both networks take by each runtime, and notes on those that do not run them."""
    found, notes = [], []
    for runtime in runtimes:
        try:
            found.append(compare_latency(whole, smaller, input_shape, runtime))
        except UserError as error:
            notes.append(f"not timed: {error}")
    return tuple(found), notes


def _left_unmerged(done: Compensation) -> list[str]:
    """A note on groups in which merging was measured to hurt."""
    if not done.unmerged:
        return []
    where = few(list(done.unmerged))
    return [f"removed without merging, which measured better: {where}"]


def check_origin(checkpoint: Checkpoint, masks: Masks, masks_file: Path, merge: bool = False) -> None:
    """Refuse masks of another model, save where this one has their filters at zero already.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    masks : Masks
        The masks.
    masks_file : Path
        Where they were read, for the message.
    merge : bool
        Whether their merges are to be used: they fit the weights of one model only.

    Raises
    ------
    UserError
        If they were made for another model.
    """
    check_masks(checkpoint.model, masks)
    if masks.origin.is_of(checkpoint.model, checkpoint.sha256):
        return
    if merge:
        raise UserError(
            f"the merges beside {masks_file} were fitted to another model file; analyze this one, or use "
            "--compensate none"
        )
    if not are_zero(checkpoint.model, masks):
        raise UserError(
            f"{masks_file} was made for another model file (its SHA-256 differs, and the filters that go "
            "are not at zero in this one); analyze this one"
        )


def check_plain(model: nn.Module) -> None:
    """Raise `UserError` if masks at zero could not be written under the model's own names.

    A parametrised tensor (weight norm, spectral norm) is made from others, of which none need be zero.
    """
    derived = parametrised(model)
    if derived:
        raise UserError(
            f"{derived[0]} is made from other tensors, so it cannot be saved at zero; make it plain first "
            "(prune_viz.make_permanent), or use --mode remove"
        )


def save_checkpoint(checkpoint: Checkpoint, model: nn.Module, out: Path, input_shape: Sequence[int]) -> None:
    """Write a model with what `load_checkpoint` needs to build it again.

    Parameters
    ----------
    checkpoint : Checkpoint
        What the model came from: its architecture, what inputs are held, and the masks applied to it.
    model : nn.Module
        The model, with weights of its own.
    out : Path
        Where to write.
    input_shape : sequence of int
        Shape of one input, (C, *spatial).
    """
    content: dict[str, Any] = {
        "arch": checkpoint.arch,
        "arch_kwargs": checkpoint.arch_kwargs,
        "input_shape": list(input_shape),
        "pruning": checkpoint.pruning,
        "state_dict": model.state_dict(),
    }
    if checkpoint.held is not None:
        content["held_inputs"] = asdict(checkpoint.held)
    write_torch(out, content)


def _check_input(model: nn.Module, example: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        raise does_not_run(example.shape[1:], error, "; give the right --input-shape") from error

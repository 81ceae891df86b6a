"""Masks for any budget from one analysis: which channels go, what rebuilds them, and what that costs.

Every group has its removal order, flagged channels first and then the least missed; `allocation` says how
far each goes. What is removed is rebuilt from all that its group keeps, by least squares on the second
moments over the calibration images, save where only flagged channels go, with representatives of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from prune_viz.calibration.image_files import RunImages, read_run_images
from prune_viz.channels.groups import NormChannel, Places, norm_channels
from prune_viz.pruning.allocation import Counts, counts_for_share, counts_for_tolerance
from prune_viz.pruning.curves import predicted_total, preferred
from prune_viz.pruning.masks import Masks, masks_as_stored, read_beside, save_masks
from prune_viz.pruning.outcome import Outcome, measure_masks
from prune_viz.pruning.rankings import Ranking, Saving, read_rankings
from prune_viz.redundancy.elimination import rebuild_all
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import Allocation, Decisions, Merge
from prune_viz.runs.run_directory import RunDirectory, merges_beside
from prune_viz.utils.errors import UserError


def write_masks(
    run: Path,
    out: Path | None = None,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    tolerance: float | None = None,
    round_to: int = 1,
    model: nn.Module | None = None,
) -> Outcome:
    """Write masks for a budget from what a run directory holds; without a budget, those of its verdicts.

    Parameters
    ----------
    run : Path
        A run directory.
    out : Path, optional
        Where to write; the run's own ``masks.pt`` by default. What makes up for the filters is written
        beside it: the merges, and outside the run its images.
    ratio, macs, tolerance : float, optional
        At most one of them: share of the filters, share of the multiply-accumulates, predicted damage.
    round_to : int
        Of a group that loses channels for such a budget, a multiple of this stays.
    model : nn.Module, optional
        The network that was analysed; with it the change of its output is measured.

    Returns
    -------
    Outcome
        What was done, and what it costs.

    Raises
    ------
    UserError
        If the run is not complete, the budget asks for more than can go, or the model is another one.
    """
    directory = RunDirectory(run)
    decisions = directory.read_decisions()
    rankings = read_rankings(decisions)
    out = out or directory.masks_file
    inside = out.resolve().parent == directory.path.resolve()
    asked = (ratio, macs, tolerance) != (None, None, None)
    if asked:
        if not rankings:
            raise UserError("no filter of this run was judged, so no budget can be met; filters.csv says why")
        counts, allocation = _counts(decisions, rankings, ratio, macs, tolerance, round_to)
        channels = {one.number: one.order[: counts[one.number]] for one in rankings}
        total = predicted_total(sum(one.damage_of(counts) for one in rankings), decisions.budgets, allocation)
        masks = masks_for_channels(
            decisions,
            rankings,
            channels,
            directory.read_gram_matrices(),
            Damage(total, decisions.damage_unit),
        )
    else:
        channels = flagged_channels(rankings)
        masks = read_beside(directory.decisions_file)
        masks.update(_masks_of_verdicts(decisions))
    return finish_masks(
        directory, decisions, rankings, channels, masks, out, model, keep_beside=asked or not inside
    )


def finish_masks(
    directory: RunDirectory,
    decisions: Decisions,
    rankings: Sequence[Ranking],
    channels: Mapping[int, Sequence[int]],
    masks: Masks,
    out: Path,
    model: nn.Module | None,
    keep_beside: bool = True,
) -> Outcome:
    """Measure masks where the model is at hand, write them, and say what they do.

    Parameters
    ----------
    directory : RunDirectory
        The run.
    decisions : Decisions
        Its `decisions.json`.
    rankings : sequence of Ranking
        Its ranked groups.
    channels : mapping of int to sequence of int
        Channels of these that go.
    masks : Masks
        The masks, with their merges and what they are predicted to cost.
    out : Path
        Where to write.
    model : nn.Module or None
        The network that was analysed.
    keep_beside : bool
        Whether merges stand in a file of their own; False where `decisions.json` says the same.
    """
    masks.images = read_run_images(directory.calibration_images_file)
    images = masks.images
    unmeasured = "" if model is None else measure_masks(model, masks)
    if out.resolve().parent == directory.path.resolve():
        masks.images = RunImages()  # they are there already
    save_masks(masks, out)
    if not keep_beside:
        merges_beside(out).unlink(missing_ok=True)
    masks.images = images
    saving = saving_of_channels(rankings, channels, decisions.macs)
    outcome = Outcome.of(masks, out, saved=saving, whole=sum(decisions.macs.values()))
    return replace(outcome, unmeasured=unmeasured)


def saving_of_channels(
    rankings: Sequence[Ranking], channels: Mapping[int, Sequence[int]], macs: Mapping[str, int]
) -> float:
    """Share of the multiply-accumulates that is saved by removing such channels, by the group's number."""
    first = []
    for ranking in rankings:
        gone = list(channels.get(ranking.number, ()))
        rest = [channel for channel in range(ranking.channels) if channel not in set(gone)]
        first.append(replace(ranking, order=[*gone, *rest]))
    return Saving(first, macs).of({one.number: len(channels.get(one.number, ())) for one in first})


def flagged_channels(rankings: Sequence[Ranking]) -> dict[int, list[int]]:
    """Channels on which there is a verdict, by the group's number."""
    return {one.number: one.order[: one.flagged] for one in rankings}


def _counts(
    decisions: Decisions,
    rankings: Sequence[Ranking],
    ratio: float | None,
    macs: float | None,
    tolerance: float | None,
    round_to: int,
) -> tuple[Counts, Allocation]:
    """How many channels go for a budget, and how it was shared."""
    if tolerance is not None:
        return counts_for_tolerance(rankings, tolerance, round_to), Allocation.DAMAGE
    saving = Saving(rankings, decisions.macs if ratio is None else None, sum(decisions.filters.values()))
    wanted = ratio if macs is None else macs
    assert wanted is not None  # noqa: S101  (one of them was given)
    tried = decisions.budgets
    allocation = preferred(tried, wanted) if ratio is None else Allocation.DAMAGE
    return counts_for_share(saving, wanted, allocation, round_to), allocation


def _masks_of_verdicts(decisions: Decisions) -> dict[str, torch.Tensor]:
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in decisions.filters.items()}
    for verdict in decisions.verdicts:
        masks[verdict.layer][verdict.filter] = False
    return masks


def masks_for_channels(
    decisions: Decisions,
    rankings: Sequence[Ranking],
    channels: Mapping[int, Sequence[int]],
    gram_matrices: Mapping[int, np.ndarray],
    predicted: Damage,
) -> Masks:
    """Masks that remove such channels of each group, with the merges that make up for them.

    Parameters
    ----------
    decisions : Decisions
        What the run decided.
    rankings : sequence of Ranking
        Its ranked groups.
    channels : mapping of int to sequence of int
        Channels to remove, by the group's number.
    gram_matrices : mapping of int to ndarray, each shape (channels + 1, channels + 1)
        Second moments of each group's channels and a constant.
    predicted : Damage
        What that is predicted to cost.
    """
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in decisions.filters.items()}
    merges: list[Merge] = []
    passed: list[NormChannel] = []
    for ranking in rankings:
        gone = channels.get(ranking.number, [])
        if not len(gone):
            continue
        producers = [
            Places(layer, placed[placed >= 0], np.nonzero(placed >= 0)[0])
            for layer, placed in ranking.filters.items()
        ]
        passed += norm_channels(producers, ranking.norms, set(gone))
        for layer, placed in ranking.filters.items():
            own = placed[list(gone)]
            masks[layer][own[own >= 0]] = False
        if set(gone) <= set(ranking.order[: ranking.flagged]):
            merges += [merge for merge in decisions.merges if merge.layer in ranking.filters]
            continue
        matrix = gram_matrices.get(ranking.number)
        if matrix is None or matrix.shape != (ranking.channels + 1, ranking.channels + 1):
            raise UserError("moments.safetensors does not fit decisions.json; run analyze again")
        merges += _merges(ranking, gone, matrix)
    made = masks_as_stored(decisions)
    made.update(masks)
    made.merges = tuple(merge for merge in merges if made.holds(merge))
    made.norm_channels, made.predicted, made.measured = passed, predicted, None
    return made


def _merges(ranking: Ranking, gone: Sequence[int], gram: np.ndarray) -> list[Merge]:
    """How a group's removed channels are rebuilt from filters of a layer that has them all."""
    whole = next((layer for layer, placed in ranking.filters.items() if (placed[:, 0] >= 0).all()), None)
    if whole is None:
        return []
    kept = sorted(set(range(ranking.channels)) - set(gone))
    weights = rebuild_all(gone, kept, gram)
    placed = ranking.filters[whole][:, 0]
    representatives = tuple(placed[kept].tolist())
    return [
        Merge(whole, int(placed[channel]), representatives, tuple(map(_short, row[:-1])), _short(row[-1]))
        for channel, row in zip(gone, weights, strict=True)
    ]


def _short(number: float) -> float:
    """A number at single precision, so that files of a million of them stay small."""
    return float(f"{number:.7g}")

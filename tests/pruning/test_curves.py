"""Measured curves and budgets: what a run says of them is what removal costs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import random_residual
from torch import nn
from torch.fx import GraphModule

from prune_viz.analysis.pipeline import analyze
from prune_viz.channels.coupling import find_groups
from prune_viz.network import tracing
from prune_viz.pruning.allocation import counts_for_share
from prune_viz.pruning.budgets import masks_for_channels
from prune_viz.pruning.compensation import ROUGH_MARGIN
from prune_viz.pruning.curves import BUDGETS, SHARES, predicted_total, preferred
from prune_viz.pruning.masks import Masks, load_masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.pruning.merging import merge_filters
from prune_viz.pruning.rankings import Ranking, Saving, read_rankings
from prune_viz.pruning.remove import remove_filters
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import Allocation, MeasuredBudget
from prune_viz.runs.run_directory import RunDirectory

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Run:
    """A run, and what removing any channels of it costs."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.decisions = self.directory.read_decisions()
        self.rankings = read_rankings(self.decisions)
        self.model = random_residual()
        stored = load_masks(self.directory.masks_file)
        self.rough = stored.is_unfounded
        self.every = OutputMeter(self.model, stored.images.fitted, stored.origin.output)
        self.kept_out = OutputMeter(self.model, stored.images.kept_out, stored.origin.output)

    def masks(self, counts: dict[int, int]) -> Masks:
        channels = {one.number: one.order[: counts.get(one.number, 0)] for one in self.rankings}
        gram_matrices = self.directory.read_gram_matrices()
        nothing = Damage(0.0, self.decisions.damage_unit)
        return masks_for_channels(self.decisions, self.rankings, channels, gram_matrices, nothing)

    def merged(self, counts: dict[int, int]) -> nn.Module:
        return merge_filters(random_residual(), self.masks(counts), find_groups(self.model, EXAMPLE))

    def cost(self, model: nn.Module) -> float:
        """The larger change of the two."""
        return max(self.every.change(model), self.kept_out.change(model))

    def raw(self, counts: dict[int, int]) -> nn.Module:
        return remove_filters(self.model, self.masks(counts), EXAMPLE)


@pytest.fixture(scope="module")
def run(analysed: Callable[[str], Path]) -> Run:
    return Run(analysed("residual"))


def _points(ranking: Ranking) -> list[int]:
    most, flagged = len(ranking.order), ranking.flagged
    return [flagged + round(share * (most - flagged)) for share in SHARES]


@pytest.mark.slow
def test_points_of_a_curve_are_what_they_cost(run: Run) -> None:
    for ranking in run.rankings:
        highest = 0.0
        for count in filter(None, _points(ranking)):
            counts = {ranking.number: count}
            merged, raw = (run.cost(model) for model in (run.merged(counts), run.raw(counts)))
            if run.rough and merged * ROUGH_MARGIN > raw:
                merged = raw
            highest = max(highest, merged)  # more never costs less
            assert ranking.damage_of_first(count) == pytest.approx(highest, rel=1e-2, abs=1e-9)
        assert ranking.damage == sorted(ranking.damage)


@pytest.mark.slow
def test_budgets_tried_are_what_they_cost(run: Run) -> None:
    saving = Saving(run.rankings, run.decisions.macs)
    tried = run.decisions.budgets
    assert len(tried) == len(BUDGETS) * len(Allocation)
    for wanted, allocation in ((wanted, allocation) for wanted in BUDGETS for allocation in Allocation):
        counts = counts_for_share(saving, wanted, allocation)
        (one,) = [one for one in tried if one.allocation is allocation and one.saved == saving.of(counts)]
        assert one.filters == saving.removed_filters(counts)
        merged, raw = run.merged(counts), run.raw(counts)
        if run.rough and run.cost(merged) * ROUGH_MARGIN > run.cost(raw):
            merged = raw
        for found, meter in ((one.seen, run.every), (one.measured, run.kept_out)):
            assert found == pytest.approx(meter.change(merged), rel=1e-2, abs=1e-9)


@pytest.mark.slow
def test_no_network_is_traced_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Counter[bool]()
    trace = tracing.trace

    def noting(model: nn.Module) -> GraphModule | None:
        called[threading.current_thread() is threading.main_thread()] += 1
        return trace(model)

    monkeypatch.setattr(tracing, "trace", noting)
    torch.set_num_threads(2)
    try:
        analyze(random_residual(), input_shape=(3, 16, 16), steps=2)
    finally:
        torch.set_num_threads(1)
    assert called[True]
    assert not called[False]


def _tried(allocation: Allocation, saved: float, predicted: float, cost: float) -> MeasuredBudget:
    return MeasuredBudget(allocation, saved, 1, predicted, seen=cost, measured=cost / 2)


def test_a_budget_is_shared_as_cost_least_near_it() -> None:
    tried = [
        _tried(Allocation.DAMAGE, 0.1, 1, 1), _tried(Allocation.EVEN, 0.1, 1, 2),
        _tried(Allocation.DAMAGE, 0.5, 1, 4), _tried(Allocation.EVEN, 0.5, 1, 3),
    ]  # fmt: skip
    assert preferred(tried, 0.2) is Allocation.DAMAGE
    assert preferred(tried, 0.9) is Allocation.EVEN
    close = [tried[0], _tried(Allocation.EVEN, 0.1, 1, 0.9)]  # not clearly less
    assert preferred(close, 0.1) is Allocation.DAMAGE
    unseen_says_more = replace(close[1], seen=0.1, measured=2.0)
    assert preferred([tried[0], unseen_says_more], 0.1) is Allocation.DAMAGE
    assert preferred(tried[:1], 0.9) is preferred([], 0.5) is Allocation.DAMAGE


def test_totals_follow_what_was_measured() -> None:
    tried = [_tried(Allocation.DAMAGE, 0.1, 1e-3, 2e-3), _tried(Allocation.DAMAGE, 0.5, 1e-1, 8e-1)]
    assert predicted_total(1e-3, tried, Allocation.DAMAGE) == pytest.approx(2e-3)
    assert predicted_total(1e-2, tried, Allocation.DAMAGE) == pytest.approx(4e-2)  # between the two
    assert predicted_total(10.0, tried, Allocation.DAMAGE) == pytest.approx(80.0)
    assert predicted_total(1e-3, tried, Allocation.EVEN) == 1e-3
    assert predicted_total(0.0, tried, Allocation.DAMAGE) == 0.0
    far = [_tried(Allocation.DAMAGE, 0.1, 1e-3, 1.0)]
    assert predicted_total(1e-3, far, Allocation.DAMAGE) == pytest.approx(16e-3)

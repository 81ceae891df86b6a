"""Budgets in the report: what they save and cost, and how that is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from report_fixture import write_run

from prune_viz.pruning.allocation import counts_for_share
from prune_viz.pruning.rankings import Saving, read_rankings
from prune_viz.report import write_report
from prune_viz.report.savings import Budget, budgets, default_budget, draw_curve, measured_budgets
from prune_viz.report.wording import magnitude
from prune_viz.runs.damage import Unit
from prune_viz.runs.decisions_json import Allocation, MeasuredBudget, PredictionRecord
from prune_viz.runs.run_directory import RunDirectory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = write_run(tmp_path_factory.mktemp("run"))
    decisions = made.read_decisions()
    orders = tuple(
        replace(order, damage=tuple(1e-6 * 1.3**step for step in range(len(order.channels))))
        for order in decisions.removal_order
    )
    predicted = PredictionRecord(2e-5, Unit.NATS)
    made.write_decisions(replace(decisions, removal_order=orders, predicted=predicted))
    return made


def test_budgets_are_those_of_the_command_line(run: RunDirectory) -> None:
    decisions = run.read_decisions()
    found = budgets(decisions)
    rankings = read_rankings(decisions)
    assert len(found) > 5
    for share, budget in zip((0.05, 0.1, 0.15), found, strict=False):
        counts = counts_for_share(Saving(rankings, decisions.macs), share)
        assert budget.saved >= share
        assert budget.filters == sum(counts.values())
        assert budget.damage == pytest.approx(sum(ranking.damage_of(counts) for ranking in rankings))
    assert budgets(replace(decisions, removal_order=())) == []
    assert budgets(replace(decisions, macs={})) == []


def test_the_curve_is_drawn_where_its_figures_say(run: RunDirectory) -> None:
    known = [Budget(0.1, 3, 1e-4), Budget(0.2, 6, 1e-3), Budget(0.4, 9, 1e-2)]
    tried = [Budget(0.2, 6, 1e-3, measured=1e-2)]
    curve = draw_curve(known, tried, Budget(0.2, 5, 1e-3))
    assert curve is not None
    assert [tick.value for tick in curve.up] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert [tick.value for tick in curve.across] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    for (x, y, _), across, up in zip(curve.points, (1, 2, 4), (0, 1, 2), strict=True):
        assert (x, y) == pytest.approx((curve.across[across].place, curve.up[up].place), abs=0.2)
    assert curve.default == curve.points[1][:2]
    ((x, y, budget),) = curve.measured
    assert (x, y) == pytest.approx((curve.across[2].place, curve.up[2].place), abs=0.2)
    assert budget is tried[0]
    measured = draw_curve(known, [], Budget(0.2, 5, 1e-3, measured=1e-4))
    assert measured is not None
    assert measured.default == pytest.approx((curve.across[2].place, curve.up[0].place), abs=0.2)
    assert curve.up[-1].place == curve.top
    assert draw_curve(known[:1], [], None) is None
    nothing = draw_curve([Budget(0.1, 3, 0.0), Budget(0.2, 6, 0.0)], [], None)
    assert nothing is not None
    assert {y for _, y, _ in nothing.points} == {nothing.bottom}


def test_the_default_is_what_the_verdicts_take(run: RunDirectory) -> None:
    decisions, summary = run.read_decisions(), run.read_provenance().summary
    default = default_budget(decisions, summary)
    assert default == Budget(1 - 322_190_000 / 385_811_000, len(decisions.verdicts), 2e-5)
    assert default_budget(replace(decisions, predicted=None), summary) is None
    assert default_budget(replace(decisions, verdicts=()), summary) is None
    assert default_budget(decisions, replace(summary, macs_after=None)) is None


TRIED = (
    MeasuredBudget(Allocation.DAMAGE, 0.11, 30, 1e-4, 2e-4, 3e-4),
    MeasuredBudget(Allocation.EVEN, 0.10, 40, 2e-4, 4e-4, 1e-4),
    MeasuredBudget(Allocation.DAMAGE, 0.21, 60, 1e-3, 8e-3, 1e-3),
    MeasuredBudget(Allocation.EVEN, 0.20, 70, 2e-3, 4e-3, 5e-3),
)


def test_budgets_tried_stand_as_masks_would_share_them(run: RunDirectory) -> None:
    decisions = replace(run.read_decisions(), budgets=TRIED)
    found = measured_budgets(decisions)
    assert [(one.saved, one.filters, one.measured) for one in found] == [(0.11, 30, 3e-4), (0.2, 70, 5e-3)]
    assert [one.damage for one in found] == pytest.approx([3e-4, 5e-3])  # the larger of what was measured
    saving = Saving(read_rankings(decisions), decisions.macs)
    predicted = budgets(decisions)
    for place, share, allocation in ((1, 0.1, Allocation.DAMAGE), (3, 0.2, Allocation.EVEN)):
        counts = counts_for_share(saving, share, allocation)
        assert (predicted[place].saved, predicted[place].filters) == (
            saving.of(counts), saving.removed_filters(counts),
        )  # fmt: skip


def test_the_default_has_what_was_measured_too(run: RunDirectory) -> None:
    decisions = replace(run.read_decisions(), measured=PredictionRecord(3e-5, Unit.NATS))
    default = default_budget(decisions, run.read_provenance().summary)
    assert default is not None
    assert (default.damage, default.measured) == (2e-5, 3e-5)


def test_the_page_has_the_curve_and_its_figures(run: RunDirectory) -> None:
    page = write_report(run).read_text()
    section = page[page.index('<section id="budgets">') :].partition("</section>")[0]
    assert section.count("<circle") == len(budgets(run.read_decisions()))
    assert 'class="default"' in page
    assert "10⁻" in page


def test_runs_without_an_order_have_no_curve(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run")
    made.write_decisions(replace(made.read_decisions(), removal_order=()))
    assert "Budgets" not in write_report(made).read_text()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1e-6, Unit.NATS, "10⁻⁶ nats"), (0.01, Unit.NATS, "0.01 nats"), (10.0, Unit.NATS, "10 nats"),
        (0.01, Unit.CONSUMERS, "1 %"), (1e-6, Unit.OUTPUT, "10⁻⁴ %"),
    ],
)  # fmt: skip
def test_magnitudes(value: float, unit: str, text: str) -> None:
    assert magnitude(value, unit).replace("\u202f", " ") == text

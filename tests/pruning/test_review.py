"""What a person decided, and the masks that follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Concatenating, residual_with_a_copy
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz import cli
from prune_viz.pruning.curves import predicted_total
from prune_viz.pruning.rankings import read_rankings
from prune_viz.pruning.review import Review, identity, read_review, write_review
from prune_viz.pruning.reviewed_masks import reviewed_masks
from prune_viz.runs.decisions_json import Allocation
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError


@pytest.fixture(scope="module")
def run(analysed: Callable[[str], Path]) -> RunDirectory:
    return RunDirectory(analysed("residual with a copy"))


def _review(run: RunDirectory, decisions: dict[tuple[str, int], str]) -> Review:
    return Review(identity(run), decisions)


def _flagged(run: RunDirectory) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for verdict in run.read_decisions().verdicts:
        found.setdefault(verdict.layer, []).append(verdict.filter)
    return found


def test_undecided_filters_follow_their_verdicts(run: RunDirectory) -> None:
    masks = reviewed_masks(run, _review(run, {})).masks
    assert masks == pv.load_masks(run.masks_file)
    assert masks.removed >= 2


def test_masks_follow_what_was_decided(run: RunDirectory) -> None:
    (copy,) = {1, 5} & set(_flagged(run)["inner"])
    decisions = {("inner", copy): "keep", ("inner", 7): "remove", ("inner", 0): "remove"}
    masks = reviewed_masks(run, _review(run, decisions)).masks
    assert masks["inner"].tolist() == [number not in (0, 7) for number in range(8)]
    merged = {merge.filter for merge in masks.merges if merge.layer == "inner"}
    assert merged == {0, 7}
    assert masks.predicted is not None
    assert masks.predicted.value > 0
    model, images = residual_with_a_copy(), torch.rand(4, 3, 16, 16)
    smaller = pv.remove_filters(model, masks, images[:1], compensate="merge")
    assert smaller.inner.out_channels == 6
    with torch.no_grad():
        torch.testing.assert_close(smaller(images).shape, model(images).shape)


def test_following_all_verdicts_is_predicted_as_their_masks_are(run: RunDirectory) -> None:
    decided, own = reviewed_masks(run, _review(run, {})).masks, pv.load_masks(run.masks_file)
    assert decided.predicted is not None
    assert own.predicted is not None
    assert decided.predicted.value == pytest.approx(own.predicted.value, rel=1e-3)


def test_chosen_filters_cost_no_less_than_the_first_in_order(run: RunDirectory) -> None:
    ranking = next(one for one in read_rankings(run.read_decisions()) if "inner" in one.filters)
    chosen = ranking.filters["inner"][ranking.order[-3:], 0].tolist()
    others = {(one.layer, one.filter): "keep" for one in run.read_decisions().verdicts}
    removed = {("inner", number): "remove" for number in chosen}
    masks = reviewed_masks(run, _review(run, {**others, **removed})).masks
    assert masks.predicted is not None
    alone = run.read_filters().set_index(["layer", "filter"]).loc["inner"].loc[chosen, "damage"]
    least = max(ranking.damage_of_first(3), float(alone.sum()))
    total = predicted_total(least, run.read_decisions().budgets, Allocation.DAMAGE)
    assert masks.predicted.value == pytest.approx(total, rel=1e-6)


def test_filters_of_one_channel_are_decided_together(run: RunDirectory) -> None:
    masks = reviewed_masks(run, _review(run, {("outer", 3): "remove"})).masks
    assert [layer for layer in ("stem", "outer", "project") if not masks[layer][3]] == [
        "stem",
        "outer",
        "project",
    ]
    with pytest.raises(
        UserError, match=r"keeps and removes what goes only together: filter 3 of .*, filter 3 of"
    ):
        reviewed_masks(run, _review(run, {("outer", 3): "remove", ("stem", 3): "keep"}))


def test_what_cannot_go_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    everything = {("inner", number): "remove" for number in range(8)}
    with pytest.raises(UserError, match="leaves no filter of inner"):
        reviewed_masks(run, _review(run, everything))
    torch.manual_seed(0)
    pv.analyze(Concatenating(), input_shape=(3, 16, 16), steps=3, out=tmp_path / "run")
    other = RunDirectory(tmp_path / "run")
    with pytest.raises(
        UserError, match="filter 1 of out cannot be removed: its filters are the network's output"
    ):
        reviewed_masks(other, _review(other, {("out", 1): "remove"}))


def _broken(**changes: Any) -> Callable[[RunDirectory], str]:
    return lambda run: json.dumps({"format": 1, "run": identity(run), "decisions": [], **changes})


def _deciding(layer: Any, number: Any, decision: Any) -> Callable[[RunDirectory], str]:
    return _broken(decisions=[{"layer": layer, "filter": number, "decision": decision}])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run: "{", "is not JSON"),
        (lambda run: "[]", "is not a review"),
        (_broken(format=2), "is not a review"),
        (_broken(run="ab" * 32), "is of another run"),
        (_broken(run=None), "at run: expected str, got null"),
        (_broken(decisions={}), "at decisions: expected array, got object"),
        (_broken(decisions=[3]), "is damaged"),
        (_deciding("inner", 1, "x"), "is damaged"),
        (_deciding("inner", True, "keep"), "is damaged"),
        (_deciding(["inner"], 1, "keep"), "is damaged"),
        (_deciding("inner", 8, "keep"), "filter 8 of inner, which the run does not have"),
        (_deciding("other", 0, "keep"), "filter 0 of other, which the run does not have"),
    ],
)
def test_files_that_are_no_review_of_the_run_get_one_line(
    run: RunDirectory, tmp_path: Path, make: Callable[[RunDirectory], str], says: str
) -> None:
    (tmp_path / "review.json").write_text(make(run))
    with pytest.raises(UserError, match=says):
        read_review(tmp_path / "review.json", run)


def test_masks_of_a_review_from_the_command_line(run: RunDirectory, tmp_path: Path) -> None:
    review, out = tmp_path / "review.json", tmp_path / "masks.pt"
    write_review(_review(run, {("inner", 7): "keep", ("inner", 0): "remove"}), review)
    assert read_review(review, run).decisions == {("inner", 7): "keep", ("inner", 0): "remove"}
    given = ["masks", str(run.path), "--review", str(review), "--out", str(out)]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert "0 accepted, 1 rejected" in done.output
    masks = pv.load_masks(out)
    assert masks["inner"][7]
    assert not masks["inner"][0]
    assert masks.merges
    for more, says in (
        (["--ratio", "0.2"], "not both"),
        (["--review", str(tmp_path / "none")], "does not exist"),
    ):
        refused = CliRunner().invoke(cli.app, [*given, *more])
        assert refused.exit_code == 2
        assert says in refused.output

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import slow
from networks import Concatenating, Dense, Flattening, Residual, randomise_norms
from torch import nn
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.analysis.pipeline import analyze
from prune_viz.calibration.images import natural_noise
from prune_viz.channels.coupling import find_groups
from prune_viz.network.cost import count_cost
from prune_viz.pruning.allocation import counts_for_share, counts_for_tolerance
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.compensation import compensate_filters
from prune_viz.pruning.masks import load_masks
from prune_viz.pruning.measuring import OutputMeter
from prune_viz.pruning.merging import merge_filters
from prune_viz.pruning.rankings import Ranking, Saving, read_rankings
from prune_viz.pruning.remove import remove_filters
from prune_viz.runs.decisions_json import Allocation
from prune_viz.runs.ownership import claimed
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError

SHAPES = {
    "residual": (3, 16, 16),
    "concatenating": (3, 12, 12),
    "flattening": (1, 8, 8),
    "dense": (3, 12, 12),
}
NAMES = ["residual", slow("concatenating"), slow("flattening"), slow("dense")]


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    kinds = {
        "residual": Residual, "concatenating": Concatenating, "flattening": Flattening, "dense": Dense
    }  # fmt: skip
    return randomise_norms(kinds[name]())


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a network, made when it is first asked for."""
    out = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        if not (out / name).exists():
            analyze(_model(name), input_shape=SHAPES[name], out=out / name, steps=8)
        return out / name

    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_share_of_the_macs_is_saved_as_predicted(
    run_of: Callable[[str], Path], name: str, ratio: float, tmp_path: Path
) -> None:
    write_masks(run_of(name), tmp_path / "masks.pt", macs=ratio)
    masks = load_masks(tmp_path / "masks.pt")
    model, decisions = _model(name), RunDirectory(run_of(name)).read_decisions()
    before = count_cost(model, SHAPES[name])[1]
    after = count_cost(remove_filters(model, masks, torch.zeros(1, *SHAPES[name])), SHAPES[name])[1]
    assert sum(decisions.macs.values()) == before
    assert after <= (1 - ratio) * before
    rankings = read_rankings(decisions)
    counts = {r.number: sum(not bool(masks[layer][f]) for layer in [next(iter(r.filters))]
                            for f in r.filters[layer][r.filters[layer] >= 0]) for r in rankings}  # fmt: skip
    if name != "concatenating":  # there a group's first layer does not hold all of its channels
        assert Saving(rankings, decisions.macs).left(counts) == pytest.approx(after)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.4])
def test_a_share_of_the_filters_goes_the_least_missed_first(
    run_of: Callable[[str], Path], name: str, ratio: float, tmp_path: Path
) -> None:
    write_masks(run_of(name), tmp_path / "masks.pt", ratio=ratio)
    masks = load_masks(tmp_path / "masks.pt")
    rankings = read_rankings(RunDirectory(run_of(name)).read_decisions())
    assert ratio <= masks.removed / masks.filters <= ratio + 0.15  # small layers: coarse shares
    assert (masks.removed == 0) == (ratio == 0)
    for ranking in rankings:
        for layer, placed in ranking.filters.items():
            gone = [place for place, channel in enumerate(ranking.order) if placed[channel] >= 0
                    and not masks[layer][placed[channel]]]  # fmt: skip
            reach = [place for place, channel in enumerate(ranking.order) if placed[channel] >= 0]
            assert gone == reach[: len(gone)]
    # Every representative stays, and every removed channel is rebuilt.
    for merge in masks.merges:
        assert not masks[merge.layer][merge.filter]
        assert masks[merge.layer][list(merge.representatives)].all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [{"ratio": 0.3}, {"macs": 0.3}, {"tolerance": 0.6}])
def test_what_stays_of_a_group_is_a_multiple(
    run_of: Callable[[str], Path], name: str, budget: dict[str, float], tmp_path: Path
) -> None:
    write_masks(run_of(name), tmp_path / "fine.pt", **budget)
    write_masks(run_of(name), tmp_path / "coarse.pt", round_to=2, **budget)
    fine, coarse = load_masks(tmp_path / "fine.pt"), load_masks(tmp_path / "coarse.pt")
    assert coarse.removed > 0
    for ranking in read_rankings(RunDirectory(run_of(name)).read_decisions()):
        gone = {
            channel
            for layer, placed in ranking.filters.items()
            for channel in np.flatnonzero(placed >= 0).tolist()
            if not coarse[layer][placed[channel]]
        }
        assert gone == set(ranking.order[: len(gone)])
        assert not gone or (ranking.channels - len(gone)) % 2 == 0
    if "tolerance" in budget:
        assert all(bool((coarse[layer] >= fine[layer]).all()) for layer in fine)
    elif "macs" in budget:
        model, example = _model(name), torch.zeros(1, *SHAPES[name])
        before, after = (
            count_cost(m, SHAPES[name])[1] for m in (model, remove_filters(model, coarse, example))
        )
        assert after <= 0.7 * before
    else:
        assert coarse.removed / coarse.filters >= 0.3


def _groups(
    costs: tuple[int, ...], damages: tuple[float, ...], flagged: int = 0
) -> tuple[list[Ranking], dict[str, int]]:
    """Groups of eight channels, one layer each, every channel of a group costing the same damage."""
    rankings = [
        Ranking(
            number, 8, list(range(7)), [damage * (place + 1) for place in range(7)],
            {f"layer{number}": np.arange(8)[:, None]}, {}, [], flagged,
        )
        for number, damage in enumerate(damages)
    ]  # fmt: skip
    return rankings, {f"layer{number}": cost for number, cost in enumerate(costs)}


def test_rounding_gives_back_the_most_missed() -> None:
    saving = Saving(*_groups((800, 800, 100), (1.0, 5.0, 3.0)))
    # Every group must go down to 4 for 30%, which saves 50%; one costly group can have its 4 back.
    for wanted, counts in ((0.3, (4, 4, 0)), (0.2, (4, 0, 0)), (0.5, (4, 4, 4))):
        found = counts_for_share(saving, wanted, Allocation.EVEN, round_to=4)
        assert found == dict(enumerate(counts))


def test_a_group_smaller_than_the_multiple_is_kept_whole() -> None:
    rankings, costs = _groups((1, 1), (1.0, 1.0))
    assert counts_for_tolerance(rankings, 100.0, round_to=16) == {0: 0, 1: 0}
    assert counts_for_tolerance(rankings, 100.0, round_to=3) == {0: 5, 1: 5}
    assert counts_for_tolerance(rankings, 3.5) == {0: 3, 1: 3}
    with pytest.raises(UserError, match="can go and leave multiples of 16; ask"):
        counts_for_share(Saving(rankings, costs), 0.1, round_to=16)


def test_the_cheapest_damage_goes_first_and_far() -> None:
    saving = Saving(*_groups((800, 800, 100), (1.0, 5.0, 3.0)))
    for wanted, counts in (
        (0.3, (6, 0, 0)),  # of 1700: 600
        (0.5, (7, 2, 0)),  # 900
        (0.85, (7, 7, 4)),  # 1450
    ):
        assert counts_for_share(saving, wanted, Allocation.DAMAGE) == dict(enumerate(counts))


def test_a_costly_channel_does_not_stop_a_group() -> None:
    rankings, costs = _groups((800, 800), (1.0, 2.0))
    rankings[0].damage[:] = [5.0] * 7  # the first is costly, and the others with it free
    assert counts_for_share(Saving(rankings, costs), 0.4) == {0: 7, 1: 0}


def test_the_last_step_is_the_cheapest_that_suffices() -> None:
    rankings, costs = _groups((1600, 800), (3.0, 2.0))  # a channel of the first saves twice as much
    assert counts_for_share(Saving(rankings, costs), 0.1) == {0: 1, 1: 1}
    assert counts_for_share(Saving(rankings, costs), 0.08) == {0: 1, 1: 0}


@pytest.mark.parametrize("allocation", Allocation)
def test_flagged_channels_go_before_all_others(allocation: Allocation) -> None:
    saving = Saving(*_groups((800, 800, 100), (1.0, 50.0, 30.0), flagged=2))
    # Two of eight of each are a quarter of all; for less, only flagged ones go, the cheapest of them.
    assert counts_for_share(saving, 0.25, allocation) == {0: 2, 1: 2, 2: 2}
    assert counts_for_share(saving, 0.1, allocation) == {0: 2, 1: 0, 2: 0}
    more = counts_for_share(saving, 0.5, allocation)
    assert min(more.values()) >= 2


def test_rough_runs_merge_only_what_helps_a_lot(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    write_masks(run_of("flattening"), tmp_path / "masks.pt", ratio=0.3)
    masks, model = load_masks(tmp_path / "masks.pt"), _model("flattening")
    assert "no batch norm shows what the training inputs were like" in masks.rough
    meter = OutputMeter(model, masks.images.kept_out, masks.origin.output)
    example = torch.zeros(1, *SHAPES["flattening"])
    groups = find_groups(model, example)
    raw = meter.change(remove_filters(model, masks, example))
    merged = meter.change(merge_filters(_model("flattening"), masks, groups))
    done = compensate_filters(_model("flattening"), masks, groups)
    assert merged < raw < 2 * merged
    assert (done.merged, done.unmerged) == ((), ("conv",))
    masks.is_unfounded = False
    done = compensate_filters(_model("flattening"), masks, groups)
    assert (done.merged, done.unmerged) == (("conv",), ())


@pytest.mark.parametrize("name", ["residual", "flattening"])
def test_merging_comes_nearer_than_removing(run_of: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    run = run_of(name)
    if name == "flattening":  # without norms, merging needs inputs to rest on
        run = tmp_path / "run"
        inputs = natural_noise(SHAPES[name], 128, seed=7)
        analyze(_model(name), input_shape=SHAPES[name], out=run, steps=8, data=inputs)
    write_masks(run, tmp_path / "masks.pt", ratio=0.3)
    masks, model = load_masks(tmp_path / "masks.pt"), _model(name)
    inputs = natural_noise(SHAPES[name], 64, seed=99)
    with torch.no_grad():
        whole = model(inputs)
        raw = remove_filters(model, masks, inputs[:1])(inputs)
        merged = remove_filters(model, masks, inputs[:1], compensate="merge")(inputs)
    assert (merged - whole).square().mean() < 0.7 * (raw - whole).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_masks_from_disk_silence_what_they_remove(
    run_of: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    write_masks(run_of(name), tmp_path / "masks.pt", ratio=0.3)
    masks, inputs = load_masks(tmp_path / "masks.pt"), torch.randn(4, *SHAPES[name])
    assert bool(masks.norm_channels) == (name in ("residual", "dense"))
    smaller = remove_filters(_model(name), masks, inputs)
    with torch.no_grad():
        torch.testing.assert_close(
            apply_masks(_model(name), masks)(inputs), smaller(inputs), rtol=0, atol=1e-4
        )


def test_a_tolerance_bounds_the_predicted_damage(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    removed = []
    for tolerance in (0.0, 0.01, 0.1, 0.9):
        write_masks(run_of("residual"), tmp_path / "masks.pt", tolerance=tolerance)
        masks = load_masks(tmp_path / "masks.pt")
        removed.append(masks.removed)
        for ranking in read_rankings(RunDirectory(run_of("residual")).read_decisions()):
            layer, placed = next(iter(ranking.filters.items()))
            gone = int((~masks[layer][placed]).sum())
            assert gone == 0 or ranking.damage[gone - 1] <= tolerance
            assert gone == len(ranking.order) or ranking.damage[gone] > tolerance
    assert removed == sorted(removed)
    assert removed[-1] > removed[0]


def test_without_a_budget_the_verdicts_masks_come_back(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("residual"), run)
    verdicts = (run / "masks.pt").read_bytes()
    merges = load_masks(run / "masks.pt").merges
    write_masks(run, ratio=0.3)
    assert (run / "masks.pt").read_bytes() != verdicts
    assert load_masks(run / "masks.pt").merges != merges
    write_masks(run, tmp_path / "elsewhere.pt")
    assert load_masks(tmp_path / "elsewhere.pt").merges == merges
    again = RunDirectory(shutil.copytree(run, tmp_path / "again"))
    with claimed(again, again.read_provenance().model.sha256, fresh=False):
        pass
    assert not list((tmp_path / "again").glob("*.merges.json"))  # nor would they outlive a new analysis
    write_masks(run)
    assert (run / "masks.pt").read_bytes() == verdicts
    assert load_masks(run / "masks.pt").merges == merges
    assert not list(run.glob("*.merges.json"))


def test_more_than_can_go_is_refused_and_nothing_written(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"at most .+ of the multiply-accumulates"):
        write_masks(run_of("concatenating"), tmp_path / "masks.pt", macs=0.999)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "says"), [
    (["--ratio", "0.2", "--macs", "0.2"], "give one of --ratio and --macs"),
    (["--ratio", "1.2"], "--ratio must be at least 0 and below 1, not 1.2"),
    (["--tolerance", "-1"], "--tolerance must be at least 0"),
    (["--out", "."], "is a directory"),
])  # fmt: skip
def test_wrong_budgets_are_refused(run_of: Callable[[str], Path], options: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.app, ["masks", str(run_of("residual")), *options])
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_command_says_what_it_did(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "budget.pt"
    result = CliRunner().invoke(
        cli.app, ["masks", str(run_of("residual")), "--macs", "0.25", "--out", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    assert "multiply-accumulates" in result.stdout
    assert str(out) in result.stdout
    saved = float(result.stdout.split("saves ")[1].split("%")[0])
    assert 25 <= saved < 40
    missing = CliRunner().invoke(cli.app, ["masks", str(tmp_path / "none"), "--macs", "0.25"])
    assert missing.exit_code == 2
    assert "is not a prune-viz run" in missing.stderr


def test_partial_layers_count_their_channels(run_of: Callable[[str], Path]) -> None:
    rankings = read_rankings(RunDirectory(run_of("concatenating")).read_decisions())
    for ranking in rankings:
        counts = {other.number: 0 for other in rankings}
        for count in range(len(ranking.order) + 1):
            counts[ranking.number] = count
            held = np.concatenate([placed[ranking.order[:count]] for placed in ranking.filters.values()])
            assert Saving(rankings).removed_filters(counts) == (held >= 0).sum()


@pytest.mark.parametrize("allocation", list(Allocation))
def test_multiples_stay_where_the_order_is_short(allocation: Allocation) -> None:
    """Of a layer that must keep some filters, only whole steps of eight go, or none."""
    filters = {"conv": np.arange(16)[:, None]}
    short = Ranking(0, 16, list(range(5)), [0.1] * 5, filters, {}, [])
    longer = Ranking(
        1, 16, list(range(11)), [0.1 * step for step in range(11)], {"b": filters["conv"]}, {}, []
    )
    saving = Saving([short, longer], None, 32)
    assert counts_for_share(saving, 0.2, allocation, round_to=8) == {0: 0, 1: 8}
    with pytest.raises(UserError, match=r"at most 25.0% .* leave multiples of 8"):
        counts_for_share(saving, 0.3, allocation, round_to=8)

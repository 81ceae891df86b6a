import copy
import io
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch import nn

from prune_viz.demo.digits import PLANTED_LAYERS, Digits, DigitsNet, Planted, accuracy, found, plant
from prune_viz.demo.run import Stage, read_planted, run_demo, save_demo_model
from prune_viz.loading.checkpoints import load_checkpoint
from prune_viz.utils.errors import UserError


@pytest.fixture(scope="module")
def wide(trained: DigitsNet, digits: Digits) -> tuple[DigitsNet, list[Planted]]:
    return plant(trained, digits)


def feature_maps(model: DigitsNet, layer: str, images: torch.Tensor) -> torch.Tensor:
    """What the next layer reads of `layer`: (filters, everything else)."""
    norm, _ = PLANTED_LAYERS[layer]
    seen = []
    hook = model.get_submodule(norm).register_forward_hook(lambda _, __, out: seen.append(out.relu()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0].transpose(0, 1).flatten(1)


def test_training_reaches_the_promised_accuracy(trained: DigitsNet, digits: Digits) -> None:
    assert len(digits.held_labels) == 450
    assert accuracy(trained, digits) >= 0.97


def test_training_leaves_the_random_state_alone(digits: Digits) -> None:
    from prune_viz.demo import digits as module

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    few = Digits(digits.images[:64], digits.labels[:64], digits.held_images, digits.held_labels)
    first = module.train_digits_net(few)
    assert torch.equal(torch.rand(1), expected)
    again = module.train_digits_net(few)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_planting_leaves_the_function_unchanged(
    trained: DigitsNet, wide: tuple[DigitsNet, list[Planted]], digits: Digits
) -> None:
    noise = 3 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for images in (digits.held_images, noise):
        torch.testing.assert_close(wide[0](images), trained(images), atol=1e-4, rtol=1e-4)
    assert wide[0].widths == [12, 21, 24, 37]


def test_planted_filters_are_what_they_are_said_to_be(
    wide: tuple[DigitsNet, list[Planted]], digits: Digits
) -> None:
    model, planted = wide
    assert [truth.layer for truth in planted] == ["conv2", "conv4"]
    for truth in planted:
        noise = 3 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        maps = feature_maps(model, truth.layer, torch.cat([digits.images, noise]))
        assert len(truth.copies) == 3
        for first, second in truth.copies:
            scale = maps[second].norm() / maps[first].norm()
            torch.testing.assert_close(maps[second], scale * maps[first], atol=1e-4, rtol=1e-4)
            assert maps[first].norm() > 1
        assert len(truth.dead) == 2
        consumer = model.get_submodule(PLANTED_LAYERS[truth.layer][1])
        for number, kind in truth.dead:
            read = consumer.weight[:, number]
            if kind == "silent":
                assert maps[number].max() == 0
                assert read.norm() > 0
            elif kind == "constant":
                assert maps[number].min() == maps[number].max() == 0.5
                assert read.norm() > 0
            else:
                assert kind == "unread"
                assert read.norm() == 0
                assert maps[number].std() > 0.1


def test_a_disturbed_copy_would_be_noticed(wide: tuple[DigitsNet, list[Planted]], digits: Digits) -> None:
    """The check above can fail: copies are read, so losing one changes the function."""
    model = copy.deepcopy(wide[0])
    _, second = wide[1][0].copies[0]
    nn.init.zeros_(model.conv3.weight[:, second].detach())
    with torch.no_grad():
        assert (model(digits.held_images) - wide[0](digits.held_images)).abs().max() > 0.1


def test_the_demo_file_says_what_it_is(
    wide: tuple[DigitsNet, list[Planted]], digits: Digits, tmp_path
) -> None:
    path = tmp_path / "model.pt"
    save_demo_model(*wide, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.arch == "prune_viz.demo:DigitsNet"
    assert checkpoint.input_shape == (1, 8, 8)
    assert read_planted(path) == wide[1]
    assert accuracy(checkpoint.model, digits) == accuracy(wide[0], digits)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
    save_demo_model(*wide, tmp_path / "other.pt")
    assert path.read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_another_model_is_not_taken_for_the_demos(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(DigitsNet().state_dict(), path)
    with pytest.raises(UserError, match="is not the demo's model"):
        read_planted(path)


def test_recall_counts_either_copy_and_true_dead() -> None:
    planted = [Planted("a", [(0, 1), (2, 3), (4, 5)], [(6, "silent"), (7, "unread")])]
    verdicts = ["redundant", "keep", "keep", "redundant", "keep", "keep", "dead", "redundant"]
    table = pd.DataFrame({"layer": "a", "filter": range(8), "verdict": verdicts})
    assert found(table, planted) == (2, 1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, io.StringIO, list[Stage]]:
    """Run the demo for real."""
    out = tmp_path_factory.mktemp("demo") / "run"
    text = io.StringIO()
    return out, text, run_demo(out, console=Console(file=text, width=200))


@pytest.mark.slow
def test_the_demo_finds_everything_planted(ran: tuple[Path, io.StringIO, list[Stage]]) -> None:
    out, text, _ = ran
    assert "found 6 of 6 planted copies" in text.getvalue()
    assert "found 4 of 4 planted dead filters" in text.getvalue()
    assert str(out / "report" / "index.html") in text.getvalue()
    for name in ("model.pt", "run.json", "filters.csv", "masks.pt", "decisions.json", "report/index.html"):
        assert (out / name).stat().st_size > 0
    assert not list(out.rglob(".prune-viz*"))


@pytest.mark.slow
def test_the_demos_table_holds_what_it_promises(ran: tuple[Path, io.StringIO, list[Stage]]) -> None:
    _, text, (before, masked, merged, tuned) = ran
    for stage in (before, masked, merged, tuned):
        assert f"{stage.parameters:,}" in text.getvalue()
        assert f"{stage.accuracy:.4f}" in text.getvalue()
    assert before.filters == 94
    assert before.accuracy >= 0.97
    assert masked.filters == merged.filters == tuned.filters <= 84
    assert (masked.parameters, masked.macs) == (before.parameters, before.macs)
    assert merged.parameters == tuned.parameters < 0.85 * before.parameters
    assert merged.macs == tuned.macs < 0.85 * before.macs
    assert merged.accuracy >= before.accuracy - 0.005
    assert tuned.accuracy >= before.accuracy - 0.01


@pytest.mark.slow
def test_a_second_demo_uses_the_first_ones_model(
    ran: tuple[Path, io.StringIO, list[Stage]], monkeypatch
) -> None:
    out, _, rows = ran

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("prune_viz.demo.run.train_digits_net", refuse)
    before = (out / "model.pt").read_bytes()
    assert run_demo(out, console=Console(file=io.StringIO())) == rows
    assert (out / "model.pt").read_bytes() == before


def test_the_demo_leaves_other_directories_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="give another --out"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

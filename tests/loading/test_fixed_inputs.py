"""Networks of several inputs: one varied, the others held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from marks import slow
from networks import randomise_norms
from torch import Tensor, nn
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.loading.checkpoints import load_model
from prune_viz.loading.fixed_inputs import (
    FixedInputs,
    fix_inputs,
    fixed_at_noise,
    fixed_from,
    free_inputs,
    read_example,
)
from prune_viz.network.tracing import trace
from prune_viz.utils.errors import UserError


class Signal(nn.Module):
    """Takes signals of shape (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(1, 6, 9, stride=2), nn.Conv1d(6, 4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.two(self.one(signals[:, None]).relu()).relu().mean(dim=2))


class Stereo(nn.Module):
    """Two pictures, numbers and a switch; the pictures pass the same first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.both = nn.Conv2d(12, 8, 3, padding=1)
        self.words = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor, word: Tensor | None = None, loud: bool = False) -> Tensor:
        """Scores of three classes."""
        seen = [self.norm(self.eye(picture)).relu() for picture in (left, right)]
        pooled = self.both(torch.cat(seen, dim=1)).relu().mean(dim=(2, 3))
        if word is not None:
            pooled = pooled + self.words(word)
        return self.head(pooled) * (2.0 if loud else 1.0)


def _stereo() -> Stereo:
    torch.manual_seed(0)
    return randomise_norms(Stereo())


EXAMPLE = {
    "left": torch.rand(4, 1, 12, 12),
    "right": torch.rand(4, 1, 12, 12),
    "word": torch.tensor([3, 1, 0, 0]),
    "loud": True,
}


def test_what_is_held_is_what_it_was_called_with(tmp_path: Path) -> None:
    torch.save(EXAMPLE, tmp_path / "example.pt")
    inputs = read_example(tmp_path / "example.pt")
    assert (inputs.varied, inputs.input_shape) == ("left", (1, 12, 12))
    model, images = _stereo(), torch.rand(5, 1, 12, 12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        right, word = EXAMPLE["right"][:1].expand(5, -1, -1, -1), EXAMPLE["word"][:1].expand(5)
        expected = model(images, right=right, word=word, loud=True)
        held = fix_inputs(model, inputs)
        torch.testing.assert_close(held(images), expected)
        torch.testing.assert_close(held.double()(images.double()), expected.double())
    assert held.state_dict().keys() == state.keys()
    traced = trace(held.float())
    assert traced is not None
    torch.testing.assert_close(traced(images), expected)
    assert type(free_inputs(held)) is Stereo
    assert [name for name, _ in held.named_buffers()] == [name for name, _ in _stereo().named_buffers()]


def test_positions_and_single_rows() -> None:
    model, inputs = _stereo(), fixed_at_noise([(1, 12, 12), (1, 12, 12)])
    images = torch.rand(3, 1, 12, 12)
    with torch.no_grad():
        expected = model(images, inputs.arguments[1].expand(3, -1, -1, -1))
        torch.testing.assert_close(fix_inputs(model, inputs)(images), expected)
    assert inputs.digest == fixed_at_noise([(1, 12, 12), (1, 12, 12)]).digest
    assert inputs.digest != fixed_at_noise([(1, 12, 12), (1, 12, 13)]).digest
    assert inputs.digest != FixedInputs({**inputs.arguments, 2: 7}, 0).digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("word", "holds a str; save a tensor"),
        ({"word": torch.tensor([1, 2])}, "nothing to vary"),
        ([torch.ones(3)], "nothing to vary"),
        ([torch.ones(0, 3, 8, 8)], "nothing to vary"),
    ],
)
def test_examples_without_pictures_get_one_line(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "example.pt")
    with pytest.raises(UserError, match=says):
        read_example(tmp_path / "example.pt")


class Anything:
    """What a pickle names, and nobody should import."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.rand(1, 3, 8, 8), torch.zeros(1).expand(36_000, 36_000)], "1 claims the shape"),
        ({"x": torch.rand(1, 3, 8, 8), "more": {"y": [torch.eye(3).to_sparse()]}}, "more.y.0 is sparse"),
        ([torch.rand(1, 3, 8, 8), Anything()], "1 holds .*Anything, not tensors and plain values"),
        ([torch.rand(1, 3, 8, 8)] * 65, "holds 65 arguments; at most 64"),
        ({(1, 2): torch.rand(1, 3, 8, 8), 2.5: torch.rand(1, 3, 8, 8)}, "neither places nor names"),
        (
            [torch.rand(1, 3, 8, 8), *[torch.zeros(1).expand(150_000)] * 60],
            "0 claims|1 claims|together claim",
        ),
    ],
)
def test_impossible_examples_are_refused(tmp_path: Path, content, says: str) -> None:
    torch.save(content, tmp_path / "example.pt")
    with pytest.raises(UserError, match=says) as caught:
        read_example(tmp_path / "example.pt")
    assert "\n" not in str(caught.value)


PICTURES = torch.rand(1, 1, 12, 12)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (3, "not arguments and the one"),
        ({"arguments": {0: PICTURES}}, "not arguments and the one"),
        ({"arguments": {0: PICTURES}, "varied": 0, "more": 1}, "not arguments and the one"),
        ({"arguments": [PICTURES], "varied": 0}, "held_inputs.arguments are not a dict"),
        ({"arguments": {0: PICTURES}, "varied": 1}, "varied is none of the arguments"),
        ({"arguments": {0: PICTURES}, "varied": [0]}, "varied is none of the arguments"),
        ({"arguments": {0: PICTURES.int()}, "varied": 0}, "arguments.0 is varied, but"),
        ({"arguments": {0: PICTURES.expand(2, -1, -1, -1)}, "varied": 0}, "arguments.0 is varied, but"),
        ({"arguments": {0: PICTURES, "x": object()}, "varied": 0}, "arguments.x holds object"),
    ],
)
def test_held_inputs_of_a_file_are_what_prune_viz_writes(tmp_path: Path, content, says: str) -> None:
    (tmp_path / "model.pt").write_bytes(bytes(10_000))
    with pytest.raises(UserError, match=says):
        fixed_from(content, tmp_path / "model.pt")
    assert (
        fixed_from({"arguments": {"x": PICTURES, 1: None}, "varied": "x"}, tmp_path / "model.pt").varied
        == "x"
    )


@pytest.mark.parametrize("given", [slow("example"), "length"])
def test_signals_without_an_axis_for_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Signal()
    torch.save(model.state_dict(), "model.pt")
    torch.save(torch.rand(3, 200), "example.pt")
    options = ["--arch", f"{__name__}:Signal"]
    options += ["--example", "example.pt"] if given == "example" else ["--input-shape", "200"]
    run = CliRunner().invoke(cli.app, ["analyze", "model.pt", *options, "--out", "run", "--steps", "4"])
    assert run.exit_code == 0, run.output
    provenance = json.loads(Path("run/run.json").read_text())
    assert provenance["model"]["input_shape"] == [1, 200]
    assert provenance["model"]["inputs_said"] == options[2:]
    masks = CliRunner().invoke(cli.app, ["masks", "run", "--ratio", "0.3", "--out", "masks.pt"])
    assert masks.exit_code == 0, masks.output
    removed = CliRunner().invoke(
        cli.app, ["apply", "model.pt", "masks.pt", *options, "--mode", "remove", "--out", "smaller.pt"]
    )
    assert removed.exit_code == 0, removed.output
    smaller = load_model("smaller.pt", arch=f"{__name__}:Signal")
    assert smaller(torch.rand(2, 200)).shape == (2, 3)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("given", ["example", slow("shapes")])
def test_analyze_and_remove_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = _stereo()
    with torch.no_grad():
        model.eye.weight[4], model.eye.bias[4] = model.eye.weight[1], model.eye.bias[1]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model.norm, name)[4] = getattr(model.norm, name)[1]
    torch.save(model.state_dict(), "model.pt")
    # An embedding added to channels would fix them.
    torch.save({name: value for name, value in EXAMPLE.items() if name != "word"}, "example.pt")
    options = ["--arch", f"{__name__}:Stereo"]
    options += ["--example", "example.pt"] if given == "example" else ["--input-shape", "1,12,12"] * 2
    run = CliRunner().invoke(cli.app, ["analyze", "model.pt", *options, "--out", "run", "--steps", "8"])
    assert run.exit_code == 0, run.output
    provenance = json.loads(Path("run/run.json").read_text())
    assert provenance["model"]["input_shape"] == [1, 12, 12]
    assert len(provenance["model"]["held_inputs"]) == 64
    assert {layer["name"] for layer in provenance["layers"]} == {"eye", "both"}
    said = "--example example.pt" if given == "example" else "--input-shape 1,12,12 --input-shape 1,12,12"
    report = Path("run/report/index.html").read_text()
    assert f"Stereo {said} --out smaller.pt" in report
    assert "remove_filters" not in report  # which would need the inputs held

    masks = CliRunner().invoke(cli.app, ["masks", "run", "--ratio", "0.3", "--out", "masks.pt"])
    assert masks.exit_code == 0, masks.output
    removed = CliRunner().invoke(
        cli.app, ["apply", "model.pt", "masks.pt", *options, "--mode", "remove", "--out", "smaller.pt"]
    )
    assert removed.exit_code == 0, removed.output
    smaller = load_model("smaller.pt", arch=f"{__name__}:Stereo")
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    pictures = torch.rand(2, 1, 12, 12), torch.rand(2, 1, 12, 12)
    with torch.no_grad():
        assert smaller(*pictures).shape == (2, 3)

    both = CliRunner().invoke(
        cli.app,
        [
            "analyze",
            "model.pt",
            *options,
            "--example",
            "example.pt",
            "--input-shape",
            "1,12,12",
            "--out",
            "x",
        ],
    )
    assert both.exit_code == 2
    assert not Path("x").exists()

"""The fine-tuning script, run as a user runs it: on a folder of pictures, killed in the middle, resumed."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import mask_without
from PIL import Image

from prune_viz.demo.digits import Digits, DigitsNet
from prune_viz.loading.checkpoints import load_checkpoint, load_model
from prune_viz.pruning.masks import Masks, save_masks
from prune_viz.pruning.write import write_removed
from prune_viz.runs.fingerprint import Origin

SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
ARCH = ["--arch", "prune_viz.demo:DigitsNet"]
MASKS = Masks({"conv2": mask_without(16, 1, 4, 9), "conv3": mask_without(24, 0, 5)})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """Folders `train` and `val` of 8x8 digits as PNG files."""
    root = tmp_path_factory.mktemp("pictures")
    for name, images, labels, count in (
        ("train", digits.images, digits.labels, 320), ("val", digits.held_images, digits.held_labels, 100)
    ):  # fmt: skip
        low, high = float(images.min()), float(images.max())
        for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
            folder = root / name / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (255 * (image[0] - low) / (high - low)).round().byte().numpy()
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.fixture
def model(tmp_path: Path, trained: DigitsNet) -> Path:
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    save_masks(MASKS, tmp_path / "masks.pt")
    return tmp_path / "model.pt"


def _command(pictures: Path, *arguments: str | Path) -> list[str]:
    folders = ["--train", pictures / "train", "--val", pictures / "val", "--workers", "0"]
    return [str(part) for part in (sys.executable, SCRIPT, *arguments, *folders)]


def _run(pictures: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(pictures, *arguments), capture_output=True, text=True, check=False)


def _losses(said: str) -> list[float]:
    rows = [line.split() for line in said.splitlines()]
    return [float(row[2]) for row in rows if len(row) == 4 and row[0].isdigit()]


@pytest.mark.slow
def test_masked_filters_stay_at_zero_and_the_rest_learns(pictures: Path, model: Path) -> None:
    out = model.with_name("tuned.pt")
    done = _run(
        pictures, model, *ARCH, "--masks", model.with_name("masks.pt"), "--out", out, "--epochs", "3",
        "--rate", "2e-3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = _losses(done.stderr)
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    tuned = load_model(out, ARCH[1])
    assert (tuned.conv2.weight[[1, 4, 9]] == 0).all()
    assert (tuned.bn2.bias[[1, 4, 9]] == 0).all()
    assert not torch.equal(tuned.conv2.weight, load_model(model, ARCH[1]).conv2.weight)
    assert not list(model.parent.glob("*.checkpoint"))


@pytest.mark.slow
def test_a_smaller_network_trains_and_loads_again(pictures: Path, model: Path) -> None:
    smaller, out = model.with_name("smaller.pt"), model.with_name("tuned.pt")
    write_removed(load_checkpoint(model, ARCH[1]), model.with_name("masks.pt"), (1, 8, 8), smaller)
    done = _run(pictures, smaller, "--out", out, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert load_model(out).conv2.out_channels == 13
    assert not torch.equal(load_model(out).conv2.weight, load_model(smaller).conv2.weight)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(pictures: Path, model: Path) -> None:
    whole, cut = model.with_name("whole.pt"), model.with_name("cut.pt")
    options = [model, *ARCH, "--masks", model.with_name("masks.pt"), "--epochs", "4"]
    assert _run(pictures, *options, "--out", whole).returncode == 0
    killed = subprocess.Popen(_command(pictures, *options, "--out", cut), stderr=subprocess.DEVNULL)
    checkpoint = cut.with_name("cut.pt.checkpoint")
    for _ in range(600):
        if checkpoint.exists():
            break
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    assert checkpoint.exists()
    assert not cut.exists()
    other = _run(pictures, *options[:-1], "9", "--out", cut)
    assert other.returncode == 2
    assert "is of another model or other options; delete it to start over" in other.stderr
    done = _run(pictures, *options, "--out", cut)
    assert done.returncode == 0, done.stderr
    assert "going on after epoch" in done.stderr
    one, two = (load_model(path, ARCH[1]).state_dict() for path in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_in_one_line(
    pictures: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    (empty / "one").mkdir(parents=True)
    few = tmp_path / "few"
    for digit in ("0", "1"):
        (few / digit).mkdir(parents=True)
        Image.new("L", (8, 8)).save(few / digit / "x.png")
    torn = tmp_path / "torn"
    for digit in range(10):
        (torn / str(digit)).mkdir(parents=True)
        (torn / str(digit) / "x.png").write_text("no picture")
    foreign = tmp_path / "foreign.pt"
    Masks(MASKS, origin=Origin("ab" * 32)).save(foreign)
    whole = ["--train", pictures / "train", "--val", pictures / "val"]
    for given, says in (
        (["--train", empty, "--val", empty], "--train"),
        (["--train", few, "--val", pictures / "val"], "do not hold the same folders"),
        (["--train", few, "--val", few], "the network knows 10 classes, but --train has 2 folders"),
        (["--train", torn, "--val", torn, "--workers", "1"], "x.png cannot be read as a picture"),
        ([*whole, "--masks", foreign], "foreign.pt was made for another model file"),
        ([*whole, "--masks", foreign, "--out", foreign], "would overwrite an input"),
        ([*whole, "--input-shape", "3,8,8"], "the network does not run on inputs of shape"),
        ([*whole, "--input-shape", "4,8,8"], "pictures have one channel or three"),
        ([*whole, "--std", "0"], "--std none below 0"),
        ([*whole, "--arch-kwargs", "[1]"], "--arch-kwargs must be a JSON object"),
        ([*whole, "--rate", "1e30", "--workers", "0"], "values that are not finite"),
    ):
        command = [SCRIPT, model, *ARCH, "--out", tmp_path / "x.pt", *given]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        complaints = capsys.readouterr().err
        assert ended.value.code == 2, complaints
        assert says in complaints
        assert "Traceback" not in complaints
        assert len([line for line in complaints.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "x.pt").exists()

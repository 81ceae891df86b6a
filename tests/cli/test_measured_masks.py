"""What `masks` and `apply` measure on the model that was analysed, for people and for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from networks import Residual, residual_with_a_copy
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.analysis.pipeline import analyze
from prune_viz.loading.checkpoints import load_model
from prune_viz.network.cost import count_cost

ARCH = ["--arch", "networks:Residual"]
SHAPE = (3, 16, 16)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def _said(*arguments: object) -> str:
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def _object(*arguments: object) -> dict[str, Any]:
    """The only line that a command printed."""
    (line,) = _said(*arguments, "--json").splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its run."""
    home = tmp_path_factory.mktemp("home")
    torch.save(residual_with_a_copy().state_dict(), home / "model.pt")
    given = ["analyze", home / "model.pt", *ARCH, "--input-shape", "3,16,16", "--steps", "12"]
    _said(*given, "--out", home / "run")
    return home


def test_masks_are_measured_on_the_model_named(home: Path, tmp_path: Path) -> None:
    said = _said("masks", home / "run", "--ratio", "0.4", "--out", tmp_path / "a.pt", *ARCH).splitlines()
    (line,) = [line for line in said if line.startswith("change of the output: ")]
    assert "predicted" in line
    assert line.endswith("nats on 8 synthetic images that no fit saw")
    assert any(line.startswith("note: both are rough: ") for line in said)
    assert said[-1] == f"written to {tmp_path / 'a.pt'}"
    (home / "model.pt").rename(home / "moved.pt")
    try:
        given = ["masks", home / "run", "--ratio", "0.4", "--out", tmp_path / "b.pt", *ARCH]
        assert "not measured: the model file is not there; --model FILE names it" in _said(*given)
        assert line in _said(*given, "--model", home / "moved.pt", "--force").splitlines()
    finally:
        (home / "moved.pt").rename(home / "model.pt")


def test_a_run_builds_no_code_without_being_asked(home: Path, tmp_path: Path) -> None:
    said = _said("masks", home / "run", "--ratio", "0.4", "--out", tmp_path / "a.pt")
    assert "asks for code, networks:Residual: pass --arch networks:Residual if you trust it" in said
    assert "change of the output: predicted" in said
    assert "measured on" not in said


def test_masks_of_another_model_are_not_measured(home: Path, tmp_path: Path) -> None:
    torch.save(Residual().state_dict(), tmp_path / "other.pt")
    given = ["masks", home / "run", "--ratio", "0.4", "--out", tmp_path / "a.pt", *ARCH]
    refused = _run(*given, "--model", tmp_path / "other.pt")
    assert refused.exit_code == 2
    assert "other.pt is not the model that was analysed: its weights differ" in refused.stderr
    assert not (tmp_path / "a.pt").exists()


def test_masks_and_apply_tell_programs_the_same(home: Path, tmp_path: Path) -> None:
    masks, out = tmp_path / "masks.pt", tmp_path / "small.pt"
    made = _object("masks", home / "run", "--macs", "0.4", "--out", masks, *ARCH)
    removed = sum(int((~mask).sum()) for mask in torch.load(masks, weights_only=True).values())
    assert made["filters_removed"] == removed > 0
    assert made["macs_saved"] >= 0.4
    assert made["unit"] == "nats"
    assert made["predicted_total"] > 0
    assert made["measured_total"] > 0
    assert made["measured_on"] == "8 synthetic images that no fit saw"
    assert made["out"] == str(masks)
    given = ["apply", home / "model.pt", masks, *ARCH, "--input-shape", "3,16,16", "--mode", "remove"]
    done = _object(*given, "--out", out)
    assert done["out"] == str(out)
    same = ("filters_removed", "filters", "predicted_total", "unit", "measured_on", "rough")
    assert {name: done[name] for name in same} == {name: made[name] for name in same}
    assert done["measured_total"] == pytest.approx(made["measured_total"], rel=1e-2)
    assert done["macs_saved"] == pytest.approx(made["macs_saved"])
    assert (done["parameters"], done["macs"]) == count_cost(Residual(), SHAPE)
    assert done["macs_after"] == pytest.approx((1 - done["macs_saved"]) * done["macs"])
    assert done["parameters_after"] < done["parameters"]
    (timed,) = done["latency"]
    assert timed["runtime"] == "eager"
    assert timed["seconds_after"] > 0


def test_a_smaller_network_is_healed(home: Path, tmp_path: Path) -> None:
    _said("masks", home / "run", "--ratio", "0.4", "--out", tmp_path / "a.pt", *ARCH)
    apply = ["apply", home / "model.pt", tmp_path / "a.pt", *ARCH, "--input-shape", "3,16,16"]
    apply += ["--mode", "remove"]
    plain = _object(*apply, "--out", tmp_path / "plain.pt")
    healed = _object(*apply, "--heal", "60", "--out", tmp_path / "healed.pt")
    assert plain["healed"] is None
    assert healed["healed"]["steps"] == 60
    assert healed["healed"]["before"] == pytest.approx(plain["measured_total"])
    assert healed["healed"]["after"] == pytest.approx(healed["measured_total"])
    assert healed["measured_total"] < 0.7 * plain["measured_total"]
    assert healed["predicted_total"] is None
    loaded = load_model(tmp_path / "healed.pt", arch=ARCH[1])
    with torch.no_grad():
        assert loaded(torch.zeros(1, *SHAPE)).shape == (1, 4)
    assert sorted(one.name for one in tmp_path.iterdir() if "healed" in one.name) == ["healed.pt"]

    # And once more, from what came out.
    _said("analyze", tmp_path / "healed.pt", *ARCH, "--steps", "4", "--out", tmp_path / "again")
    given = ["apply", tmp_path / "healed.pt", tmp_path / "again" / "masks.pt", *ARCH, "--mode", "remove"]
    assert _object(*given, "--heal", "10", "--out", tmp_path / "less.pt")["healed"]["steps"] == 10

    inputs = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(5))
    torch.save(inputs, tmp_path / "inputs.pt")
    said = _said(*apply, "--heal", "30", "--data", tmp_path / "inputs.pt", "--out", tmp_path / "real.pt")
    (line,) = [line for line in said.splitlines() if line.startswith("healed in 30 steps: ")]
    assert line.endswith(" nats on 10 inputs of --data that no fit saw")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--heal", "5"], "--heal needs --mode remove"),
        (["--runtime", "eager"], "--runtime needs --mode remove"),
        (["--mode", "remove", "--data", "inputs.pt"], "give --heal STEPS too"),
        (["--mode", "remove", "--heal", "5", "--mean", "0.5"], "give --data too"),
        (["--mode", "remove", "--heal", "5", "--data", "few.pt"], "at least 8 inputs, not 3"),
        (["--mode", "remove", "--heal", "5", "--data", "none.pt"], "there is no file or folder none.pt"),
    ],
)
def test_healing_that_cannot_be_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.randn(3, *SHAPE), "few.pt")
    apply = ["apply", home / "model.pt", home / "run" / "masks.pt", *ARCH, "--input-shape", "3,16,16"]
    done = _run(*apply, "--out", "out.pt", *given)
    assert done.exit_code == 2
    assert says in done.stderr
    assert [one.name for one in tmp_path.iterdir()] == ["few.pt"]


def test_what_was_not_merged_has_no_prediction(home: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks.pt"
    merged = _object("masks", home / "run", "--macs", "0.4", "--out", masks, *ARCH)
    given = ["apply", home / "model.pt", masks, *ARCH, "--input-shape", "3,16,16"]
    bare = _object(*given, "--mode", "remove", "--compensate", "none", "--out", tmp_path / "bare.pt")
    zeroed = _object(*given, "--mode", "zero", "--out", tmp_path / "zeroed.pt")
    for one in (bare, zeroed):
        assert one["predicted_total"] is None
        assert one["measured_total"] > merged["measured_total"]
    assert zeroed["measured_total"] == pytest.approx(bare["measured_total"], rel=1e-2)
    assert zeroed["parameters_after"] is None
    said = _said(*given, "--mode", "zero", "--out", tmp_path / "zeroed.pt", "--force")
    assert "change of the output: measured" in said


@pytest.mark.slow
def test_runs_from_python_are_measured_on_a_file(tmp_path: Path) -> None:
    model = residual_with_a_copy()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    analyze(model, input_shape=SHAPE, steps=4, out=tmp_path / "run")
    given = ["masks", tmp_path / "run", "--ratio", "0.3", "--out", tmp_path / "a.pt", *ARCH]
    assert "not measured: the model file is not there" in _said(*given)
    assert "measured" in _said(*given, "--model", tmp_path / "model.pt", "--force").splitlines()[2]


def test_a_run_may_not_ask_for_a_huge_network(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    stored = json.loads((run / "run.json").read_text())
    stored["model"] |= {"arch": "torchvision:resnet18", "arch_kwargs": {"num_classes": 20_000_000}}
    (run / "run.json").write_text(json.dumps(stored))
    said = _said("masks", run, "--ratio", "0.4", "--out", tmp_path / "a.pt")
    assert "which is far larger than the file" in said
    assert "measured on" not in said

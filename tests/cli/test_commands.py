import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import slow
from torch import nn
from torchvision import models
from typer.testing import CliRunner

from prune_viz import __version__, cli
from prune_viz.analysis.options import STIMULI
from prune_viz.cli import commands
from prune_viz.cli.options import Only, QualityName
from prune_viz.cli.progress_bar import BarProgress
from prune_viz.demo.digits import Digits, DigitsNet, accuracy, plant
from prune_viz.demo.run import save_demo_model
from prune_viz.execution.quality import Quality
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import sha256
from prune_viz.utils.progress import PlainProgress

DIGITS = ["--arch", "prune_viz.demo:DigitsNet"]
RUNNER = CliRunner()


def run(*arguments: object):
    return RUNNER.invoke(cli.app, [str(a) for a in arguments])


def assert_refused(result, *says: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = without_start(result.stderr)
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in says:
        assert text in lines[0]


def without_start(stderr: str) -> list[str]:
    """The lines of standard error but for the one that says what is loaded."""
    lines = stderr.splitlines()
    return lines[1:] if lines and lines[0].startswith("loading ") else lines


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights(here: Path) -> Path:
    torch.save(DigitsNet().state_dict(), "model.pt")
    return Path("model.pt")


def written(here: Path) -> set[str]:
    return {str(path.relative_to(here)) for path in here.rglob("*")}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    source = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["analyze", "--help"], ["apply", "--help"], ["demo", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom prune_viz import cli\n"
        f"try: cli.app({arguments!r}, prog_name='prune-viz')\n"
        "finally: print('HEAVY', {'torch', 'torchvision', 'pandas', 'numpy', 'sklearn'} & set(sys.modules))\n"
    )
    result = python("-c", code)
    assert result.returncode == 0
    assert "Usage: prune-viz" in result.stdout
    assert "HEAVY set()" in result.stdout


# The compiler takes as long to import as the rest of torch.
LATE = {"torch._dynamo", "pandas", "sklearn", "matplotlib", "umap"}


def refused_without(modules: set[str], *arguments: str) -> list[str]:
    """The lines on standard error of a command that is refused before any of the modules is imported."""
    code = (
        "import atexit, sys\nfrom prune_viz import cli\n"
        f"atexit.register(lambda: print('imported', sorted({modules!r} & set(sys.modules))))\ncli.main()\n"
    )
    result = python("-c", code, *arguments)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (2, "imported []")
    return result.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("analyze model.pt --nonsense", "--nonsense"),
        ("analyze model.pt --steps 0", "--steps"),
        ("analyze missing.pt", "missing.pt does not exist"),
        ("analyze text.pt", "is not a PyTorch checkpoint"),
        ("analyze cut.pt", "was cut short"),
        ("analyze .", "is a directory"),
        ("analyze model.pt --arch resnet18", "expected torchvision:NAME"),
        ("analyze model.pt --code nowhere", "--code nowhere is not a directory"),
        ("analyze model.pt --out text.pt", "is not a directory"),
        ("apply missing.pt masks.pt --out new.pt", "missing.pt does not exist"),
        ("apply model.pt missing.pt --out new.pt", "missing.pt does not exist"),
        ("status nowhere", "nowhere is not a prune-viz run"),
        ("masks nowhere", "nowhere is not a prune-viz run"),
        ("report nowhere", "nowhere is not a prune-viz run"),
        ("figure nowhere --out new.svg", "nowhere is not a prune-viz run"),
        ("review nowhere", "nowhere is not a prune-viz run"),
    ],
)
def test_what_is_plainly_wrong_is_refused_before_torch_is_imported(
    here: Path, weights: Path, command: str, says: str
) -> None:
    Path("text.pt").write_text("just some text that is no model")
    Path("cut.pt").write_bytes(weights.read_bytes()[:-30])
    (line,) = refused_without({"torch", "torchvision", *LATE}, *command.split())
    assert says in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        slow(["--arch", "torchvision:squeezenet1_2"], "did you mean squeezenet1_1"),
        slow(["--arch", "torchvision:squeezenet1_1", "--layers", "nope*"], "matches 'nope*'"),
        slow(["--arch", "torchvision:squeezenet1_1", "--input-shape", "1,64,64"], "does not run on an input"),
        slow(["--layers", "nope*"], "matches 'nope*'"),
    ],
)
def test_what_is_wrong_with_a_model_is_refused_before_more_than_torch_is_imported(
    here: Path, options: list[str], says: str
) -> None:
    torch.save(models.squeezenet1_1().state_dict(), "model.pt")
    assert says in refused_without(LATE, "analyze", "model.pt", *options)[-1]


@pytest.mark.parametrize("options", [[], ["--quiet"], ["--json"]])
def test_what_is_loaded_is_said_before_torch_is_imported(weights: Path, options: list[str]) -> None:
    code = (
        "import sys\nfrom prune_viz import cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit('torch is imported')\n"
        "sys.meta_path.insert(0, Finder())\ncli.main()\n"
    )
    said = [] if options else ["loading model.pt"]
    assert python("-c", code, "analyze", "model.pt", *options).stderr.splitlines() == [
        *said, "torch is imported"
    ]  # fmt: skip


def test_version() -> None:
    result = python("-m", "prune_viz", "--version")
    assert (result.returncode, result.stdout) == (0, f"prune-viz {__version__}\n")


def test_qualities_are_those_of_the_library() -> None:
    assert [one.value for one in QualityName] == [one.value for one in Quality]
    assert [one.value for one in Only] == [STIMULI]


def test_options_of_the_contract_exist() -> None:
    pages = {name: run(name, "--help").stdout for name in ("analyze", "apply", "report", "demo")}
    model_options = ["--arch", "--arch-kwargs", "--trust-pickle", "--input-shape", "--out"]
    of_analyze = ["--layers", "--prior", "--steps", "--canvas", "--seed", "--device", "--fresh"]
    for option in model_options + of_analyze:
        assert option in pages["analyze"]
    for option in [*model_options, "--mode", "--compensate"]:
        assert option in pages["apply"]
    assert "--out" in pages["demo"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--arch-kwargs", "{width: 3}"], "--arch-kwargs is not JSON"),
        (["--arch-kwargs", "[1]"], "--arch-kwargs must be a JSON object"),
        (["--input-shape", "3x8x8"], "--input-shape 3x8x8: expected channels and sizes"),
        (["--input-shape", "1,0,8"], "--input-shape 1,0,8: expected"),
        (["--input-shape", "8,"], "--input-shape 8,: expected"),
        (["--input-shape", "999999,999999"], "one such input takes 3725"),
        (["--input-shape", "1,999999,999999", "--input-shape", "1,8,8"], "may be taken"),
        (["--canvas", "999999"], "may be taken"),
        (["--arch-kwargs", '{"a": 1, "a": 2}'], "names a twice"),
        (["--arch-kwargs", '{"a": ' * 5000], "nested too deep"),
        (["--arch-kwargs", '{"a": 1' + "0" * 400 + "}"], "is too large"),
        (["--input-shape", "8"], "does not run on an input of shape 1,8"),
        (["--device", "gpu"], "--device gpu: expected"),
        (["--out", "model.pt"], "is not a directory"),
        (["--out", "model.pt/below"], "is not a directory"),
        (["--out", "/proc/none"], "cannot be written"),
        (["--arch", "torchvision:resnet81"], "did you mean"),
        (["--arch", "prune_viz.demo:DigitsNot"], "did you mean DigitsNet"),
        (["--arch", "torchvision:squeezenet1_1"], "do not fit"),
        (["--arch-kwargs", '{"widths": [4, 4, 4, 4]}'], "of another shape"),
        (["--arch-kwargs", '{"depth": 4}'], "TypeError"),
    ],
)
def test_options_at_fault(here: Path, weights: Path, options: list[str], says: str) -> None:
    before = written(here)
    assert_refused(run("analyze", weights, *([] if "--arch" in options else DIGITS), *options), says)
    assert written(here) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"just some text that is no model", "is not a PyTorch checkpoint"),
        (b"PK\x03\x04 and then it stops", "was cut short"),
    ],
)
@pytest.mark.parametrize("command", ["analyze model.pt", "apply model.pt masks.pt --out new.pt"])
def test_files_at_fault(here: Path, content: bytes | None, says: str, command: str) -> None:
    if content is not None:
        Path("model.pt").write_bytes(content)
    before = written(here)
    assert_refused(run(*command.split()), says, "model.pt")
    assert written(here) == before


@pytest.mark.parametrize("name", ["model.pt", "masks.pt", "example.pt"])
def test_pipes_are_not_waited_for(here: Path, weights: Path, name: str) -> None:
    torch.save({"conv1": torch.tensor([False] + [True] * 11)}, "masks.pt")
    Path(name).unlink(missing_ok=True)
    os.mkfifo(name)
    given = ["--example", "example.pt"] if name == "example.pt" else []
    result = run("apply", "model.pt", "masks.pt", *DIGITS, *given, "--out", "new.pt", "--mode", "remove")
    assert_refused(result, f"{name} is a named pipe, not a regular file")


@pytest.mark.slow
def test_warnings_of_a_crafted_file_stay_silent(here: Path) -> None:
    model = DigitsNet()
    torch.save({**model.state_dict(), "warned": torch.eye(3).to_sparse_csr()}, "sparse.pt")
    state = {name: tensor.to(torch.complex64) for name, tensor in model.state_dict().items()}
    torch.save(state, "complex.pt")
    for name in ("sparse.pt", "complex.pt"):
        result = python("-W", "always", "-m", "prune_viz", "analyze", name, *DIGITS, "--out", "run")
        assert result.returncode == 2
        assert len(without_start(result.stderr)) == 1, result.stderr


@pytest.mark.slow
def test_pickled_code_is_refused_and_never_runs(here: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return os.system, ("touch ran",)

    torch.save(Hostile(), "model.pt")
    result = python("-m", "prune_viz", "analyze", "model.pt")
    assert result.returncode == 2
    (line,) = without_start(result.stderr)
    assert line.startswith("error: model.pt holds pickled code")
    assert "--trust-pickle" in result.stderr
    assert written(here) == {"model.pt"}


@pytest.mark.slow
def test_a_state_dict_without_architecture(here: Path, weights: Path) -> None:
    assert_refused(run("analyze", weights), "--arch")
    assert written(here) == {"model.pt"}


def test_weights_that_are_not_finite(here: Path) -> None:
    model = DigitsNet()
    model.bn3.running_var[2] = float("nan")
    torch.save(model.state_dict(), "model.pt")
    assert_refused(run("analyze", "model.pt", *DIGITS), "bn3.running_var")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["analyze"], "Missing argument"),
        (["analyze", "m.pt", "--steps", "0"], "--steps"),
        (["analyze", "m.pt", "--prior", "x"], "natural"),
        (["analyse"], "analyse"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_get_one_line_too(monkeypatch, capsys, arguments: list[str], says: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prune-viz", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert says in stderr
    assert stderr.count("\n") == 1


def test_no_arguments_show_the_help(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["prune-viz"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "analyze" in capsys.readouterr().out


def test_report_of_no_run(here: Path) -> None:
    assert_refused(run("report", here), "is not a prune-viz run")
    assert_refused(run("report", "nowhere"), "is not a prune-viz run")
    assert written(here) == set()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad\n\x1b[31mlayer\x07 \u202e"), 2, r"error: bad \x1b[31mlayer\x07 \u202e"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("oh"), 1, "failed: ZeroDivisionError: oh (PRUNE_VIZ_TRACEBACK=1 shows where)"),
    ],
)
def test_exit_codes(monkeypatch, error: BaseException, code: int, line: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "check_writable", fail)
    monkeypatch.delenv("PRUNE_VIZ_TRACEBACK", raising=False)
    result = run("demo")
    assert result.exit_code == code
    assert result.stderr == line + "\n"
    monkeypatch.setenv("PRUNE_VIZ_TRACEBACK", "1")
    assert ("Traceback" in run("demo").stderr) == (code == 1)


def test_check_writable_leaves_no_trace(here: Path) -> None:
    commands.check_writable(here / "a" / "b")
    commands.check_writable(Path("relative"))
    assert written(here) == set()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--layers", "conv9"], "conv9"),
        (["--input-shape", "3,8,8"], "3,8,8"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--canvas", "0"], "--canvas"),
        (["--mean", "0.5"], "--std"),
        (["--mean", "0.5", "--std", "grey"], "--std grey"),
        (["--mean", "0.1,0.2", "--std", "1"], "--mean"),
        (["--mean", "0.5", "--std", "0"], "--std"),
        (["--data", "nowhere"], "--data"),
        (["--data", "."], "--data"),
    ],
)
@pytest.mark.slow
def test_what_only_the_analysis_can_see(
    here: Path, weights: Path, options: list[str], says: str, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys, "argv", ["prune-viz", "analyze", str(weights), *DIGITS, *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert len(without_start(shown.err)) == 1
    assert written(here) == {"model.pt"}


def test_a_model_without_convolutions(here: Path, monkeypatch) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), "model.pt")
    Path("flat.py").write_text("import torch\ndef build(): return torch.nn.Linear(3, 2)\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for shape in ([], ["--input-shape", "3,8,8"]):
        assert_refused(run("analyze", "model.pt", "--arch", "flat:build", *shape), "convolution")
    assert written(here) == {"model.pt", "flat.py"}


def test_analyze_reports_and_guards_its_directory(here: Path, trained: DigitsNet) -> None:
    """One layer of the trained network, through the command line, into the default directory."""
    torch.save(trained.state_dict(), "digits.pt")
    result = run("analyze", "digits.pt", *DIGITS, "--layers", "conv1", "--steps", "4")
    assert result.exit_code == 0, result.output
    assert result.stderr == "loading digits.pt\n"
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["filters", "12"]
    parameters = f"{sum(parameter.numel() for parameter in trained.parameters()):,}"
    assert any(line.split()[:3] == ["parameters", parameters, "->"] for line in lines)
    for what, path in (("report:", "report/index.html"), ("masks:", "masks.pt"), ("table:", "filters.csv")):
        assert f"{what:<8}reports/digits/{path}" in lines
        assert Path("reports/digits", path).exists()
    provenance = json.loads(Path("reports/digits/run.json").read_text())
    assert provenance["model"]["arch"] == "prune_viz.demo:DigitsNet"
    assert provenance["model"]["path"] == "digits.pt"
    assert provenance["state"] == "complete"

    torch.save(DigitsNet().state_dict(), "other.pt")
    before = {path: (here / path).stat().st_mtime_ns for path in written(here)}
    assert_refused(run("analyze", "other.pt", *DIGITS, "--out", "reports/digits"), "another model's run")
    assert {path: (here / path).stat().st_mtime_ns for path in written(here)} == before

    assert run("report", "reports/digits").stdout == "report: reports/digits/report/index.html\n"


@pytest.fixture
def planted(here: Path, trained: DigitsNet, digits: Digits) -> DigitsNet:
    """Write `model.pt` and masks that remove the planted filters, with their merges; give the model."""
    model, truth = plant(trained, digits)
    save_demo_model(model, truth, Path("model.pt"))
    masks, merges = {}, []
    for layer in truth:
        mask = torch.ones(model.get_submodule(layer.layer).out_channels, dtype=torch.bool)
        mask[[second for _, second in layer.copies] + [number for number, _ in layer.dead]] = False
        masks[layer.layer] = mask
        for (first, second), scale in zip(layer.copies, (1.0, 2.0, 0.5), strict=True):
            merges.append((layer.layer, second, [first], [scale], 0.0))
        for number, kind in layer.dead:
            merges.append((layer.layer, number, [], [], 0.5 if kind == "constant" else 0.0))
    torch.save(masks, "masks.pt")
    keys = ("layer", "filter", "representatives", "coefficients", "constant")
    decisions = {
        "format": 1,
        "model_sha256": sha256(Path("model.pt")),
        "predicted": {"damage": 0.25, "unit": "nats"},
        "merges": [dict(zip(keys, merge, strict=True)) for merge in merges],
    }
    Path("decisions.json").write_text(json.dumps(decisions))
    return model


def load(path: str, *options: str) -> nn.Module:
    from prune_viz.loading.checkpoints import load_model

    return load_model(path, *options)


def test_apply_zero_writes_a_plain_state_dict(here: Path, planted: DigitsNet, digits: Digits) -> None:
    before = Path("model.pt").read_bytes(), Path("masks.pt").read_bytes()
    result = run("apply", "model.pt", "masks.pt", "--out", "deep/zeroed.pt")
    assert result.exit_code == 0, result.output
    assert "10 of 58 filters set to zero" in result.stdout
    assert "deep/zeroed.pt" in result.stdout
    state = torch.load("deep/zeroed.pt", weights_only=True)
    assert state.keys() == planted.state_dict().keys()
    gone = ~torch.load("masks.pt", weights_only=True)["conv2"]
    assert int(gone.sum()) == 5
    for name in ("conv2.weight", "bn2.weight", "bn2.bias"):
        assert not state[name][gone].any()
        assert state[name][~gone].flatten(1).any(1).all() if state[name].ndim > 1 else True
    assert (Path("model.pt").read_bytes(), Path("masks.pt").read_bytes()) == before
    assert [p.name for p in Path("deep").iterdir()] == ["zeroed.pt"]


def test_apply_remove_writes_a_smaller_model_that_loads(
    here: Path, planted: DigitsNet, digits: Digits
) -> None:
    merged = run("apply", "model.pt", "masks.pt", "--out", "small.pt", "--mode", "remove")
    assert merged.exit_code == 0, merged.output
    assert merged.stderr == "loading model.pt\n"
    assert "10 of 94 filters removed, merged into the rest" in merged.stdout
    assert "\nchange of the output: predicted 0.25 nats\n" in merged.stdout
    assert "parameters: 15,472 -> 12,702 (-17.9%)" in merged.stdout
    small = load("small.pt")
    assert small.conv2.weight.shape == (16, 12, 3, 3)
    assert small.conv4.weight.shape == (32, 24, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(
            small(digits.held_images), planted(digits.held_images), atol=1e-4, rtol=1e-4
        )
    assert accuracy(small, digits) == accuracy(planted, digits)

    bare = ["--mode", "remove", "--compensate", "none"]
    plain = run("apply", "model.pt", "masks.pt", "--out", "plain.pt", *bare)
    assert plain.exit_code == 0
    assert "nothing in their place" in plain.stdout
    assert "predicted" not in plain.stdout
    with torch.no_grad():
        difference = load("plain.pt")(digits.held_images) - planted(digits.held_images)
    assert difference.abs().max() > 0.1


def test_a_smaller_model_can_be_pruned_again(here: Path, planted: DigitsNet, digits: Digits) -> None:
    assert run("apply", "model.pt", "masks.pt", "--out", "small.pt", "--mode", "remove").exit_code == 0
    Path("second").mkdir()
    mask = torch.ones(24, dtype=torch.bool)
    mask[3:7] = False
    torch.save({"conv3": mask}, "second/masks.pt")
    assert run("apply", "small.pt", "second/masks.pt", "--out", "less.pt", "--mode", "remove").exit_code == 0
    less, small = load("less.pt"), load("small.pt")
    assert less.conv3.weight.shape == (20, 16, 3, 3)
    assert torch.equal(less.conv3.weight, small.conv3.weight[mask])
    assert run("apply", "small.pt", "second/masks.pt", "--out", "zero.pt").exit_code == 0
    zero = load("zero.pt")
    with torch.no_grad():
        torch.testing.assert_close(zero(digits.held_images), less(digits.held_images), atol=1e-4, rtol=1e-4)


def test_apply_at_fault(here: Path, planted: DigitsNet) -> None:
    before = written(here)
    for arguments, says in (
        (["model.pt", "masks.pt", "--out", "model.pt"], "would overwrite an input"),
        (["model.pt", "masks.pt", "--out", "./masks.pt"], "would overwrite an input"),
        (["model.pt", "masks.pt", "--out", "."], "is a directory"),
        (["model.pt", "masks.pt", "--out", "model.pt/x.pt"], "is not a directory"),
        (["model.pt", "none.pt", "--out", "x.pt"], "none.pt does not exist"),
        (["model.pt", "decisions.json", "--out", "x.pt"], "is not a masks file"),
        (["model.pt", "masks.pt", "--out", "x.pt", "--compensate", "merge"], "needs --mode remove"),
        (["model.pt", "masks.pt", "--out", "x.pt", "--mode", "remove", "--input-shape", "3,8,8"], "3,8,8"),
        (["model.pt", "masks.pt", "--out", "x.pt", "--export", "x.tflite"], "should end in .pt2"),
        (["model.pt", "masks.pt", "--out", "x.pt2", "--export", "x.pt2"], "is the file that --out names"),
        (["model.pt", "masks.pt", "--out", "x.pt", "--export", "model.pt"], "would overwrite an input"),
    ):
        assert_refused(run("apply", *arguments), says)
    decisions = json.loads(Path("decisions.json").read_text())
    Path("decisions.json").write_text(json.dumps({**decisions, "model_sha256": 64 * "0"}))
    merge = ["--mode", "remove", "--compensate", "merge"]
    apply_merging = ["apply", "model.pt", "masks.pt", "--out", "x.pt", *merge]
    assert_refused(run(*apply_merging), "another model file")
    for mode in ("zero", "remove"):
        foreign = run("apply", "model.pt", "masks.pt", "--out", "x.pt", "--mode", mode)
        assert_refused(foreign, "masks.pt was made for another model file")
    Path("decisions.json").unlink()
    assert_refused(run(*apply_merging), "no decisions.json with merges")
    torch.save({"conv2": torch.ones(3, dtype=torch.bool)}, "other.pt")
    assert_refused(run("apply", "model.pt", "other.pt", "--out", "x.pt"), "masks are for another model")
    assert written(here) == (before | {"other.pt"}) - {"decisions.json"}


def test_fine_tuned_masked_model_is_removed_from(here: Path, planted: DigitsNet, digits: Digits) -> None:
    assert run("apply", "model.pt", "masks.pt", "--out", "tuned.pt").exit_code == 0
    content = torch.load("model.pt", weights_only=True)  # which says how wide the planted network is
    content["state_dict"] = torch.load("tuned.pt", weights_only=True)
    content["state_dict"]["head.weight"] *= 1.1
    torch.save(content, "tuned.pt")
    made = run("apply", "tuned.pt", "masks.pt", "--out", "small.pt", "--mode", "remove")
    assert made.exit_code == 0, made.output
    assert "nothing in their place" in made.stdout
    tuned = load("tuned.pt")
    with torch.no_grad():
        expected = tuned(digits.held_images)
        torch.testing.assert_close(load("small.pt")(digits.held_images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["zero", "remove"])
@pytest.mark.slow
def test_the_pruned_network_is_exported_too(
    here: Path, planted: DigitsNet, digits: Digits, mode: str
) -> None:
    made = run("apply", "model.pt", "masks.pt", "--out", "x.pt", "--mode", mode, "--export", "x.pt2")
    assert made.exit_code == 0, made.output
    assert "exported to x.pt2, for batches of any size" in made.stdout
    exported = torch.export.load("x.pt2").module()
    content = torch.load("x.pt", weights_only=True)
    model = load("x.pt") if mode == "remove" else planted
    if mode == "zero":
        model.load_state_dict(content)
    with torch.no_grad():
        expected = model.eval()(digits.held_images)
        torch.testing.assert_close(exported(digits.held_images), expected, atol=1e-4, rtol=1e-4)


def test_a_parametrised_model_is_not_saved_at_zero(here: Path) -> None:
    Path("normed.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3))\n"
        "    return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(1))\n"
    )
    import sys

    sys.path.insert(0, str(here))
    try:
        model = __import__("normed").make()
        torch.save(model.state_dict(), "model.pt")
        torch.save({"0": torch.tensor([True, False, True, True])}, "masks.pt")
        result = run("apply", "model.pt", "masks.pt", "--arch", "normed:make", "--out", "x.pt")
    finally:
        sys.path.remove(str(here))
    assert_refused(result, "0.weight is made from other tensors")


def test_code_says_where_modules_of_ones_own_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "only_here.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.save({"0.weight": torch.randn(2, 1, 3, 3), "0.bias": torch.zeros(2)}, "model.pt")
    given = ["analyze", "model.pt", "--arch", "only_here:build", "--input-shape", "1,8,8", "--steps", "2"]
    result = CliRunner().invoke(cli.app, [*given, "--out", "no"])
    assert result.exit_code == 2
    assert "only_here could not be imported" in result.stderr
    result = CliRunner().invoke(cli.app, [*given, "--code", "nowhere", "--out", "no"])
    assert result.exit_code == 2
    assert "--code nowhere is not a directory" in result.stderr
    assert not Path("no").exists()
    result = CliRunner().invoke(cli.app, [*given, "--code", "mine", "--out", "run"])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_scripts_get_json_alone_or_nothing(digits: Digits, trained: DigitsNet, here: Path) -> None:
    save_demo_model(trained, [], here / "model.pt")
    result = run("analyze", "model.pt", "--steps", 4, "--json", "--out", "one")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert result.stderr == ""
    assert summary["filters"] == summary["keep"] + summary["redundant"] + summary["dead"]
    assert summary["out"] == "one"
    result = run("analyze", "model.pt", "--steps", 4, "--quiet", "--out", "two", "--workers", 1)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (here / "one" / "filters.csv").read_bytes() == (here / "two" / "filters.csv").read_bytes()


def test_status_is_for_people_and_for_scripts(trained: DigitsNet, here: Path) -> None:
    save_demo_model(trained, [], here / "model.pt")
    assert run("analyze", "model.pt", "--steps", 2, "--quiet", "--out", "run").exit_code == 0
    shown = run("status", "run")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[0] == "complete"
    assert lines[2] == "layers:  4 of 4"
    said = json.loads(run("status", "run", "--json").stdout)
    assert (said["state"], said["left"], said["failed"]) == ("complete", 0, [])
    assert_refused(run("status", "nowhere"), "not a prune-viz run")


def test_where_no_work_can_be_done_is_refused(weights: Path) -> None:
    assert_refused(run("analyze", weights, *DIGITS, "--memory", "lots"), "--memory lots", "8G")
    assert_refused(run("analyze", weights, *DIGITS, "--memory", "1M"), "--memory 1 MiB is too little")


def test_what_is_said_before_a_run_is_safe_for_terminals(capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (PlainProgress(), BarProgress()):
        progress.say("name \x1b[31mconv[bold]\u202e too")
    said = capfd.readouterr().err
    assert said.count("[bold]") == 2
    assert "\x1b[31m" not in said
    assert "\u202e" not in said

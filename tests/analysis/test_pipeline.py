from __future__ import annotations

import copy
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from networks import Concatenating, Plain, Residual, Untraceable, randomise_norms
from PIL import Image
from torch import Tensor, nn

from prune_viz.analysis.pipeline import Analysis, analyze
from prune_viz.calibration.image_files import load_synthetic_images
from prune_viz.channels.coupling import find_groups
from prune_viz.demo.digits import Digits, DigitsNet, Planted, accuracy, found, plant
from prune_viz.execution import tasks
from prune_viz.execution.run_context import RunContext
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.masks import load_masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.redundancy.importance import CalibrationImages, measure_groups
from prune_viz.runs.filters_csv import FILTER_COLUMNS
from prune_viz.runs.fingerprint import hash_model
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import ASIDE
from prune_viz.utils.progress import Progress


@pytest.fixture(scope="module")
def planted(trained: DigitsNet, digits: Digits) -> tuple[DigitsNet, list[Planted]]:
    return plant(trained, digits)


@pytest.fixture(scope="module")
def run(planted: tuple[DigitsNet, list[Planted]], tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("run") / "digits"
    return analyze(planted[0], input_shape=(1, 8, 8), out=out)


def test_every_planted_copy_and_dead_filter_is_found(run: Analysis, planted) -> None:
    copies, dead = found(run.filters, planted[1])
    assert copies == sum(len(place.copies) for place in planted[1])
    assert dead == sum(len(place.dead) for place in planted[1])


def test_decisions_follow_the_schema_beside_them(run: Analysis) -> None:
    files = RunDirectory(run.out)
    schema, decisions = (json.loads(file.read_text()) for file in (files.schema_file, files.decisions_file))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(decisions, schema)
    for field, wrong in (("verdicts", [{"layer": "conv1"}]), ("groups", [{"id": -1}]), ("damage_unit", "m")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**decisions, field: wrong}, schema)


def test_copies_share_a_cluster(run: Analysis, planted) -> None:
    clusters = run.filters.set_index(["layer", "filter"])["cluster"]
    together = [
        clusters[place.layer, one] == clusters[place.layer, other] != -1
        for place in planted[1]
        for one, other in place.copies
    ]
    assert np.mean(together) >= 0.8


def test_clusters_agree_with_the_verdicts(run: Analysis, planted) -> None:
    rows = run.filters.set_index(["layer", "filter"])
    copies = run.filters[
        (run.filters["verdict"] == "redundant") & run.filters["representative"].str.fullmatch(r"\d+")
    ]
    assert len(copies) >= 4
    for layer, number, kin in zip(copies["layer"], copies["filter"], copies["representative"], strict=True):
        assert rows.loc[(layer, number), "cluster"] == rows.loc[(layer, int(kin)), "cluster"] >= 0
    for place in planted[1]:
        for number, kind in place.dead:
            if kind in ("silent", "constant"):
                assert rows.loc[(place.layer, number), "cluster"] == -1


def test_every_filter_has_a_place_on_the_map_of_the_network(run: Analysis) -> None:
    places = run.filters[["network_x", "network_y"]].to_numpy()
    assert np.isfinite(places).all()
    assert len(np.unique(places.round(6), axis=0)) > 0.9 * len(places)


def test_what_is_flagged_can_be_removed_at_next_to_no_cost(run: Analysis, planted, digits: Digits) -> None:
    model = planted[0]
    smaller = remove_filters(model, run.masks, digits.held_images[:1], compensate="merge")
    with torch.no_grad():
        before, after = model(digits.held_images), smaller(digits.held_images)
    divergence = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    assert float(divergence) < 0.01
    assert accuracy(smaller, digits) >= accuracy(model, digits) - 0.005
    assert (
        run.summary["parameters_after"]
        == sum(p.numel() for p in smaller.parameters())
        < run.summary["parameters"]
    )
    assert run.summary["macs_after"] < run.summary["macs"]


def test_the_run_directory_holds_the_contract(run: Analysis, planted) -> None:
    files = RunDirectory(run.out)
    table = files.read_filters()
    assert list(table.columns) == FILTER_COLUMNS
    assert len(table) == sum(
        conv.out_channels for conv in planted[0].modules() if isinstance(conv, torch.nn.Conv2d)
    )
    assert set(table["verdict"]) == {"keep", "redundant", "dead"}
    assert (table["reason"].str.len() > 10).all()
    flagged = table[table["verdict"] == "redundant"]
    assert (flagged["representative"] != "").all()
    provenance = files.read_provenance()
    assert provenance.state == "complete"
    assert provenance.model.sha256 == hash_model(planted[0])
    assert {stage.name for stage in provenance.stages} >= {
        "stimuli",
        "gram matrices",
        "verdicts",
        "report",
    }
    assert all(stage.seconds >= 0 and stage.peak_mib > 0 for stage in provenance.stages)
    calibration = provenance.calibration
    images = load_synthetic_images(files.calibration_images_file).images
    with torch.no_grad():
        shares = planted[0](images).softmax(dim=1)
    assert calibration["confidence"] == pytest.approx(float(shares.amax(dim=1).mean()), rel=1e-4)
    assert calibration["classes"] == len(shares.argmax(dim=1).unique())
    (said,) = [note for note in provenance.notes if note.startswith("The removal order")]
    assert f"for {calibration['classes']} classes" in said
    assert 0.3 < calibration["activation_kept"] < 2
    assert f"still activate their filters at {calibration['activation_kept']:.2f} (median) of before" in said
    decisions = files.read_decisions()
    assert len(decisions.verdicts) == (table["verdict"] != "keep").sum()
    for order in decisions.removal_order:
        assert list(order.damage) == sorted(order.damage)
    assert (run.out / "report" / "index.html").stat().st_size > 1000
    assert not list(run.out.rglob(f"{ASIDE}*"))
    for record in files.layers():
        tensors = files.read_layer(record.file)
        assert tensors.images.shape == (record.filters, 1, *record.canvas)
        assert tensors.responses.shape == (record.filters, record.filters)
        # The diagonal is each filter on its own stimulus, stored to half precision.
        np.testing.assert_allclose(np.diag(tensors.responses), tensors.activations, rtol=1e-3, atol=1e-3)


def test_masks_on_disk_are_the_verdicts(run: Analysis) -> None:
    plain = torch.load(run.out / "masks.pt", weights_only=True)
    for layer, rows in run.filters.groupby("layer"):
        assert torch.equal(plain[layer], torch.tensor((rows["verdict"] == "keep").to_numpy()))
    loaded = load_masks(run.out / "masks.pt")
    assert loaded.merges == run.masks.merges != ()


@pytest.mark.slow
def test_the_same_again_gives_the_same(run: Analysis, planted, tmp_path: Path) -> None:
    again = analyze(planted[0], input_shape=(1, 8, 8), out=tmp_path / "again")
    pd.testing.assert_frame_equal(again.filters, run.filters)
    for name in run.layers:
        assert np.array_equal(again.layers[name].images, run.layers[name].images)


@pytest.mark.slow
def test_a_run_cut_short_is_taken_up_where_it_stopped(
    planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = analyze(planted[0], input_shape=(1, 8, 8), steps=6)
    done: list[str] = []
    find_stimuli = tasks.find_stimuli

    def stopping(network, layer, *rest, **options):
        if network.is_draft:
            pass
        elif len(done) < 2:
            done.append(layer)
        else:  # Ctrl-C while the third is under way
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert options["stop"].wait(30)
        return find_stimuli(network, layer, *rest, **options)

    monkeypatch.setattr(tasks, "find_stimuli", stopping)
    with pytest.raises(KeyboardInterrupt):
        analyze(planted[0], input_shape=(1, 8, 8), out=tmp_path / "cut", steps=6, workers=1)
    stopped = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert (stopped["state"], stopped["stopped_by"]) == ("stopped", "interrupted")
    assert not (tmp_path / "cut" / "masks.pt").exists()
    rest: list[str] = []

    def noting(network, layer, *filters, **options):
        rest.append(f"draft of {layer}" if network.is_draft else layer)
        return find_stimuli(network, layer, *filters, **options)

    monkeypatch.setattr(tasks, "find_stimuli", noting)
    result = analyze(planted[0], input_shape=(1, 8, 8), out=tmp_path / "cut", steps=6, workers=1)
    assert done == ["conv1", "conv2"]
    assert rest == ["conv3", "conv4"]
    pd.testing.assert_frame_equal(result.filters, run.filters)
    # Other options reuse nothing.
    rest.clear()
    analyze(planted[0], input_shape=(1, 8, 8), out=tmp_path / "cut", steps=3, workers=1)
    layers = ["conv1", "conv2", "conv3", "conv4"]
    assert rest == [*(f"draft of {layer}" for layer in layers), *layers]


def test_without_a_directory_nothing_is_kept_on_disk() -> None:
    result = analyze(randomise_norms(Plain()), input_shape=(3, 16, 16), steps=2)
    assert result.out is None
    assert result.layers["conv1"].images.shape == (8, 3, 16, 16)
    assert list(result.masks) == ["conv1", "conv2", "conv3"]


def test_only_layers_asked_for_are_looked_at() -> None:
    model = randomise_norms(Residual())
    with torch.no_grad():  # a dead channel of the stem, and a dead one inside the block
        model.bn1.weight[2] = model.bn1.bias[2] = 0
    result = analyze(model, input_shape=(3, 16, 16), steps=2, layers=["inner", "exp*"])
    assert result.filters["layer"].unique().tolist() == ["inner", "expand"]
    rows = result.filters.set_index(["layer", "filter"])
    assert rows.loc[("inner", 2), "verdict"] == "dead"
    assert (rows.loc["expand", "verdict"] == "unjudged").all()
    assert "depthwise, which this run did not analyse" in rows.loc[("expand", 0), "reason"]
    assert len(result.masks) == 6


def test_cut_groups_are_said_before_the_run(tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, sentence: str) -> None:
            assert not (tmp_path / "run").exists()
            said.append(sentence)

    model = randomise_norms(Residual())
    result = analyze(
        model, input_shape=(3, 16, 16), steps=2, layers=["exp*"], out=tmp_path / "run", progress=Heard()
    )
    assert said == [
        "--layers names only a part of 1 coupling group, which cannot be judged so. "
        "To have them judged, name depthwise too: 16 more filters."
    ]
    assert result.summary["unjudged"] == len(result.filters) == 16
    with pytest.raises(UserError, match="no filter of this run was judged"):
        write_masks(tmp_path / "run", ratio=0.1)


@pytest.mark.slow
def test_strange_networks_are_analysed_as_far_as_they_go() -> None:
    model = randomise_norms(Untraceable())
    with torch.no_grad():
        model.bn1.weight[2], model.bn1.bias[2] = 0, -1
    result = analyze(model, input_shape=(3, 16, 16), steps=2)
    assert result.filters.set_index(["layer", "filter"]).loc[("conv1", 2), "verdict"] == "dead"
    result = analyze(Concatenating(), input_shape=(3, 16, 16), steps=2)
    assert result.filters[result.filters["layer"] == "out"]["reason"].str.contains("output").all()


def test_signals_and_volumes() -> None:
    for conv, shape in [(torch.nn.Conv1d, (2, 100)), (torch.nn.Conv3d, (1, 10, 10, 10))]:
        model = torch.nn.Sequential(
            conv(shape[0], 6, 3), torch.nn.ReLU(), conv(6, 4, 3), torch.nn.ReLU(), conv(4, 2, 1)
        )
        result = analyze(model, input_shape=shape, steps=2)
        assert len(result.filters) == 12


@pytest.mark.slow
def test_spectrograms_are_no_pictures(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 1, 16, 20))
    analyze(model, input_shape=(1, 16, 20), prior="spectrogram", steps=2, out=tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["inputs"]["separable"]
    assert "the inputs are not pictures" in RunDirectory(tmp_path / "run").read_decisions().rough
    with pytest.raises(UserError, match="--prior spectrogram is for inputs of two axes"):
        analyze(nn.Sequential(nn.Conv1d(1, 4, 3)), input_shape=(1, 64), prior="spectrogram", steps=2)


@pytest.mark.slow
def test_what_is_natural_is_measured_on_example_inputs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(10):
        pixels = np.repeat(random.integers(60, 200, (20, 24, 1), dtype=np.uint8), 3, axis=2)
        pixels[..., 0] //= 2
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    model = randomise_norms(Plain())
    out = tmp_path / "run"
    with pytest.raises(UserError, match="lies in"):
        analyze(model, input_shape=(3, 16, 16), steps=3, out=pictures / "run", data=pictures)
    found = analyze(model, input_shape=(3, 16, 16), steps=3, out=out, data=pictures)
    stored = json.loads((out / "run.json").read_text())
    assert stored["inputs"]["mean"] == pytest.approx([0.25, 0.51, 0.51], abs=0.02)
    covariance = np.array(stored["inputs"]["covariance"])
    assert covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]) > 0.9
    assert stored["inputs"]["exponent"] == pytest.approx(0.5, abs=0.01)  # white noise, at the lower bound
    assert any("left out: 1 of the files" in note for note in stored["notes"])
    assert (out / "report" / "index.html").exists()
    measured = found.layers["conv1"].images
    plain = analyze(model, input_shape=(3, 16, 16), steps=3)
    assert not np.allclose(plain.layers["conv1"].images, measured, atol=1e-2)
    again = analyze(model, input_shape=(3, 16, 16), steps=3, mean=[0.4, 0.5, 0.6], std=0.2, out=out)
    stored = json.loads((out / "run.json").read_text())
    assert stored["inputs"] == {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2] * 3,
        "covariance": None,
        "exponent": None,
        "separable": False,
    }
    assert not np.allclose(again.layers["conv1"].images, measured, atol=1e-2)


def _folder_of_pictures(folder: Path, count: int, side: int = 16) -> Path:
    """Pictures without any green."""
    folder.mkdir()
    random = np.random.default_rng(1)
    for index in range(count):
        pixels = random.integers(0, 255, (side, side, 3), dtype=np.uint8)
        pixels[..., 1] = 0
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.slow
def test_silent_on_user_images_is_not_dead(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = randomise_norms(Plain())
    with torch.no_grad():  # filter 3 sees green alone, and only a lot of it
        model.conv1.weight[3] = 0
        model.conv1.weight[3, 1] = 1
        model.bn1.running_mean[3], model.bn1.running_var[3] = 0, 1
        model.bn1.weight[3], model.bn1.bias[3] = 1, -1
    pictures = _folder_of_pictures(tmp_path / "pictures", 12)
    options = {"input_shape": (3, 16, 16), "mean": 0.0, "std": 1.0, "steps": 24}
    without = analyze(model, **options).filters.set_index(["layer", "filter"])
    out = tmp_path / "run"
    found = analyze(model, **options, data=pictures, out=out).filters.set_index(["layer", "filter"])
    said = found["reason"].str.contains("never fires on the inputs of --data")
    assert found.loc[("conv1", 3), "verdict"] == "keep"
    images = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(path))).permute(2, 0, 1) / 255 for path in pictures.iterdir()]
    )
    with torch.no_grad():
        first = torch.relu(model.bn1(model.conv1(images)))
        second = torch.relu(model.bn2(model.conv2(first)))
        maps = {"conv1": first, "conv2": second, "conv3": torch.relu(model.conv3(second))}
    for layer, filter_ in found.index[found["verdict"] == "keep"]:
        assert said[(layer, filter_)] == (float(maps[layer][:, filter_].abs().max()) == 0)
    assert said[("conv1", 3)]
    assert not without["reason"].str.contains("--data").any()
    assert any(
        "the 12 inputs of --data" in note for note in json.loads((out / "run.json").read_text())["notes"]
    )


def test_user_images_join_calibration_images() -> None:
    model = randomise_norms(Plain()).requires_grad_(False)
    groups = find_groups(model, torch.zeros(1, 3, 16, 16))
    synthetic, images = torch.randn(24, 3, 16, 16), 3 + torch.rand(24, 3, 16, 16)
    alone, both, seen = (
        measure_groups(
            model, groups, {}, CalibrationImages(calibrated, examples, 0), None, RunContext()
        ).gram_matrices
        for calibrated, examples in ((synthetic, None), (synthetic, images), (None, images))
    )
    for number, consumers in both.items():
        for one, mixed, other in zip(alone[number], consumers, seen[number], strict=True):
            np.testing.assert_allclose(mixed.fit, (one.fit + other.fit) / 2, rtol=1e-6)
            np.testing.assert_array_equal(mixed.peak, np.maximum(one.peak, other.peak))
    # Two images leave none to hold out; those that there are count whole.
    few = measure_groups(
        model, groups, {}, CalibrationImages(synthetic, images[:2], 0), None, RunContext()
    ).gram_matrices
    for number, consumers in few.items():
        for one, mixed in zip(alone[number], consumers, strict=True):
            np.testing.assert_allclose(mixed.held_out, one.held_out, rtol=1e-9)
            assert mixed.held_out[-1, -1] == pytest.approx(1)


@pytest.mark.slow
def test_synthetic_images_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = randomise_norms(Plain()), tmp_path / "run"
    options = {"input_shape": (3, 16, 16), "steps": 3, "out": out}
    analyze(model, **options)
    first, run = (out / "filters.csv").read_bytes(), json.loads((out / "run.json").read_text())
    assert run["damage_unit"] == "nats"
    assert json.loads((out / "decisions.json").read_text())["damage_unit"] == "nats"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    with monkeypatch.context() as patched:
        patched.setattr("prune_viz.analysis.conclude.synthesise_images", never)
        analyze(model, **options)
        assert (out / "filters.csv").read_bytes() == first
        with pytest.raises(AssertionError, match="calibrated again"):
            analyze(model, **{**options, "seed": 1})


def test_diverged_filters_are_in_the_notes(tmp_path: Path) -> None:
    class Cliff(nn.Conv2d):
        """Noise stays below its edge, what excites its filters does not."""

        def forward(self, input: Tensor) -> Tensor:
            found = super().forward(input)
            return torch.where(found > 50, found / 0, found)

    torch.manual_seed(0)
    model = nn.Sequential(Cliff(3, 3, 7, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    model[0].weight.data.mul_(0.1)
    nn.init.ones_(model[0].weight.data[1])
    out = tmp_path / "run"
    for _ in range(2):  # the second time from the run directory
        analyze(model, input_shape=(3, 16, 16), steps=24, out=out)
        notes = json.loads((out / "run.json").read_text())["notes"]
        assert any(
            note.startswith("0: the optimisation of filters") and "diverged" in note for note in notes
        ), notes


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = Plain()
    model.bn2.running_var[3] = float("inf")
    with pytest.raises(UserError, match=r"bn2\.running_var"):
        analyze(model, input_shape=(3, 16, 16))


def test_weights_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    model = Plain()
    model.conv1.weight.data[2] = 3e38
    with pytest.raises(UserError, match="conv1 has outputs on noise that are not finite"):
        analyze(model, input_shape=(3, 16, 16), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_foreign_directories_are_left_alone(tmp_path: Path, run: Analysis) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a prune-viz run"):
        analyze(Plain(), input_shape=(3, 16, 16), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="is a file"):
        analyze(Plain(), input_shape=(3, 16, 16), out=tmp_path / "notes.txt")
    before = (run.out / "run.json").read_bytes()
    with pytest.raises(UserError, match="another model's run"):
        analyze(Plain(), input_shape=(3, 16, 16), out=run.out)
    assert (run.out / "run.json").read_bytes() == before


@pytest.mark.slow
def test_fresh_replaces_another_models_run(tmp_path: Path) -> None:
    first, second = randomise_norms(Plain()), randomise_norms(Plain(), seed=1)
    analyze(first, input_shape=(3, 16, 16), out=tmp_path / "run", steps=2, layers=["conv1"])
    result = analyze(
        second, input_shape=(3, 16, 16), out=tmp_path / "run", steps=2, layers=["conv3"], fresh=True
    )
    assert result.filters["layer"].unique().tolist() == ["conv3"]
    assert [path.name for path in (tmp_path / "run" / "layers").iterdir()] == ["002-conv3.safetensors"]


def _weight_normed() -> nn.Module:
    model = Plain()
    nn.utils.parametrizations.weight_norm(model.conv2)
    return model


@pytest.mark.parametrize("network", [Residual, slow(Untraceable), slow(_weight_normed)])
def test_the_model_is_left_alone(network: Callable[[], nn.Module]) -> None:
    model = randomise_norms(network()).train()
    before = copy.deepcopy(model.state_dict())
    analyze(model, input_shape=(3, 16, 16), steps=2)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())

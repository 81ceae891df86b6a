"""Work in pieces: what they are, that they add up, and that nobody sees who did them."""

from __future__ import annotations

import copy
import json
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tortured
from marks import slow
from networks import Plain, Untraceable, randomise_norms
from torch import Tensor, nn

from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.pipeline import analyze
from prune_viz.calibration import dead_leaves, losses, synthetic_images
from prune_viz.execution import tasks
from prune_viz.execution.executors import LocalEngine, run_tasks
from prune_viz.execution.task_results import TaskResults
from prune_viz.execution.tasks import (
    StartingStimuli,
    StimulusSettings,
    Task,
    TaskResult,
    failing_together,
    plan_tasks,
    run_task,
)
from prune_viz.feature_visualization import algorithm, optimiser, priors, search, stimuli
from prune_viz.feature_visualization.optimiser import StoppedError
from prune_viz.feature_visualization.responses import response_matrix
from prune_viz.feature_visualization.stimuli import find_stimuli, maximize
from prune_viz.network import layers
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.runs.log import RunLog
from prune_viz.runs.report_files import NEW_REPORT
from prune_viz.runs.run_directory import RunDirectory, slug
from prune_viz.runs.run_json import LayerRecord
from prune_viz.runs.status import read_status
from prune_viz.utils.array_files import read_arrays
from prune_viz.utils.errors import IncompleteError, UserError
from prune_viz.utils.files import ASIDE

SETTINGS = StimulusSettings("natural", 12, 0, None)
PROVENANCE = {
    "model": dict.fromkeys(
        ["sha256", "weights", "structure", "arch", "arch_kwargs", "held_inputs", "input_shape"]
    ),
    "options": dict.fromkeys(["prior", "quality", "steps", "canvas", "device", "precision"]),
    "inputs": None, "seed": 0, "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> FilterNetwork:
    return FilterNetwork(tortured.network(), (3, 16, 16))


def records(network: FilterNetwork) -> list[LayerRecord]:
    return [
        LayerRecord(**vars(layer), group=None, file=f"layers/{slug(layer.depth, layer.name)}.safetensors")
        for layer in network.layers
    ]


def test_tasks_cover_each_filter_once_with_inputs(
    network: FilterNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.BATCH, "cpu", 2)  # eight filters a task
    planned = plan_tasks(network, records(network), "key")
    for layer in network.layers:
        own = [task for task in planned if task.layer == layer.name]
        assert [number for task in own for number in range(task.start, task.stop)] == list(
            range(layer.filters)
        )
        assert max(task.filters for task in own) == 8
    fed = {task.layer: task.producer for task in planned if task.producer}
    assert fed == {f"blocks.{n}.depthwise": f"blocks.{n}.expand" for n in (0, 1)}
    assert len({task.key for task in planned}) == len({task.file for task in planned}) == len(planned)
    # A layer that was not asked for feeds nobody.
    some = plan_tasks(network, records(network)[2:3], "key")
    assert {task.producer for task in some} == {None}
    # Of another run, other keys.
    other = plan_tasks(network, records(network), "other")
    assert not {task.file for task in planned} & {task.file for task in other}


def key_of(run: dict) -> str:
    return tasks.stimuli_key(run, AnalysisOptions.of_stimuli(run["options"]))


@pytest.mark.parametrize("change", [
    {"model": {"sha256": "x"}}, {"model": {"input_shape": [3, 8, 8]}}, {"model": {"held_inputs": "x"}},
    {"options": {"prior": "none"}}, {"options": {"steps": 3}}, {"options": {"canvas": 8}},
    {"options": {"device": "cuda"}}, {"options": {"precision": "bfloat16"}}, {"seed": 1},
    {"inputs": {"mean": [0.5]}}, {"versions": {"torch": "x"}},
])  # fmt: skip
def test_the_key_tells_whatever_stimuli_depend_on(change: dict) -> None:
    run = {**PROVENANCE, "started": "now"}
    key = key_of(run)
    assert key_of({**run, "started": "later"}) == key
    other = copy.deepcopy(run)
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(other[name], dict):
            other[name].update(value)
        else:
            other[name] = value
    assert key_of(other) != key


def test_the_key_tells_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(PROVENANCE)
    monkeypatch.setattr(tasks, "__version__", "99")
    assert key_of(PROVENANCE) != key


def test_pieces_of_any_cut_add_up_to_the_layer(network: FilterNetwork) -> None:
    whole = find_stimuli(network, "blocks.0.project", steps=12)
    responses = response_matrix(network, "blocks.0.project", whole.images)
    for cut in ((0, 12), (0, 4, 12), (0, 5, 7, 12)):
        results = [
            run_task(network, Task("blocks.0.project", *ends, None, "", ""), SETTINGS, None)
            for ends in pairwise(cut)
        ]
        assert failing_together(results) == results
        for name, expected in (
            ("images", whole.images.half().numpy()),
            ("activations", whole.activations.numpy()),
            ("responses", responses),
        ):
            assert np.array_equal(np.concatenate([getattr(result, name) for result in results]), expected)


@pytest.mark.parametrize("batch", [4, 8, 12])
@pytest.mark.slow
def test_a_smaller_batch_gives_the_same(network: FilterNetwork, batch: int) -> None:
    task = Task("blocks.1.expand", 0, 24, None, "", "")
    result = run_task(network, task, SETTINGS, None, batch)
    whole = run_task(network, task, SETTINGS, None)
    assert np.array_equal(result.images, whole.images)
    assert np.array_equal(result.responses, whole.responses)


def test_one_failed_piece_fails_its_layer() -> None:
    sound = TaskResult(
        np.ones((2, 1, 3), np.float16), np.ones(2, np.float32), np.ones((2, 4), np.float32), (1,), "", 1
    )
    failed = TaskResult(
        np.zeros((2, 1, 3), np.float16), np.ones(2, np.float32), np.ones((2, 4), np.float32), (), "no", 2
    )
    results = failing_together([sound, failed])
    assert [result.seconds for result in results] == [1, 2]
    for result in results:
        assert result.failed == "no"
        assert not result.images.any()
        assert not result.responses.any()
        assert np.isnan(result.activations).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        slow(tortured.network(), id="traced"),
        pytest.param(randomise_norms(Untraceable()), id="hooked"),
    ],
)
def test_workers_and_threads_do_not_show(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.BATCH, "cpu", 1)  # four filters a task
    for workers, threads in ((1, 1), (2, 1), (3, 2)):
        torch.set_num_threads(threads)
        try:
            analyze(model, input_shape=(3, 16, 16), out=tmp_path / str(workers), steps=12, workers=workers)
        finally:
            torch.set_num_threads(1)
    for file in sorted((tmp_path / "1" / "layers").iterdir()):
        for workers in "23":
            (one, _), (other, _) = read_arrays(file), read_arrays(tmp_path / workers / "layers" / file.name)
            assert all(np.array_equal(one[name], other[name]) for name in one), (file.name, workers)


@pytest.mark.slow
def test_what_is_maximised_in_python_is_what_a_run_finds() -> None:
    model = tortured.network()
    found = analyze(model, input_shape=(3, 16, 16), steps=12, layers=["blocks.0.project"])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            some = maximize(model, "blocks.0.project", [1, 5, 8, 9, 11], input_shape=(3, 16, 16), steps=12)
        finally:
            torch.set_num_threads(1)
        images = found.layers["blocks.0.project"].images[[1, 5, 8, 9, 11]]
        assert np.array_equal(some.images.half().numpy(), images)


def test_work_stops_at_the_next_step(network: FilterNetwork) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        run_task(network, Task("stem", 0, 4, None, "", ""), SETTINGS, None, stop=stop)


class _Failing(LocalEngine):
    """Fails at some tasks, with some error."""

    def __init__(self, network: FilterNetwork, error: Exception, doomed: str) -> None:
        super().__init__(network, SETTINGS, workers=2)
        self.error, self.doomed, self.tried = error, doomed, []

    def submit(self, task: Task, starts: StartingStimuli):
        self.tried.append(task.layer)
        if self.doomed in task.layer:
            return self._pool.submit(self._fail)
        return super().submit(task, starts)

    def _fail(self) -> TaskResult:
        raise self.error


@pytest.mark.parametrize(("error", "kind"), [
    (RuntimeError("broken <b>\n"), IncompleteError), (UserError("not enough memory"), UserError),
])  # fmt: skip
def test_a_task_that_fails_costs_only_what_starts_from_it(
    network: FilterNetwork, tmp_path: Path, error: Exception, kind: type[Exception]
) -> None:
    run, planned = RunDirectory(tmp_path), plan_tasks(network, records(network), "key")
    results = TaskResults(run, records(network), planned, "key", lambda name: None)
    log = RunLog(run.log_file)
    with _Failing(network, error, "0.expand") as engine, pytest.raises(kind) as said:
        run_tasks(planned, results, engine, log, lambda task: None)
    assert "1 of 7 tasks failed (blocks.0.expand, filters 0 to 23: " in str(said.value)
    assert "\n" not in str(said.value)
    assert results.whole == {layer.name for layer in network.layers} - {
        "blocks.0.expand",
        "blocks.0.depthwise",
    }
    assert "blocks.0.depthwise" not in engine.tried
    failed = [json.loads(line) for line in run.log_file.read_text().splitlines() if "failed" in line]
    assert [event["task"] for event in failed] == ["blocks.0.expand, filters 0 to 23"]


class _Moody(nn.ConvTranspose2d):
    """A convolution that fails once it is given an error to raise."""

    error: Exception | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(("error", "kept"), [
    (RuntimeError("CUDA error: unspecified launch failure"), False), (OSError("no such node"), False),
    (ValueError("the model's own"), True),
])  # fmt: skip
def test_only_a_models_own_failure_is_kept_as_its_layers(
    error: Exception, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(_Moody(3, 3, 1), nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    network = FilterNetwork(model, (3, 8, 8))
    monkeypatch.setattr(_Moody, "error", error)
    task = Task("1", 0, 4, None, "", "")
    if kept:
        assert "the model's own" in run_task(network, task, SETTINGS, None).failed
    else:
        with pytest.raises(type(error)):
            run_task(network, task, SETTINGS, None)


def test_where_everything_fails_little_is_tried(network: FilterNetwork, tmp_path: Path) -> None:
    run, planned = RunDirectory(tmp_path), plan_tasks(network, records(network), "key")
    results = TaskResults(run, records(network), planned, "key", lambda name: None)
    with (
        _Failing(network, ValueError("x"), "") as engine,
        pytest.raises(IncompleteError, match="the same command"),
    ):
        run_tasks(planned, results, engine, RunLog(run.log_file), lambda task: None)
    assert len(engine.tried) <= 4


@pytest.mark.slow
def test_status_tells_done_and_left(tmp_path: Path) -> None:
    analyze(tortured.network(), input_shape=(3, 16, 16), steps=2, out=tmp_path / "run", layers=["blocks.0*"])
    status = read_status(RunDirectory(tmp_path / "run"))
    assert (status["state"], status["filters"], status["done"], status["left"]) == ("complete", 60, 60, 0)
    assert [layer["done"] for layer in status["layers"]] == [24, 24, 12]
    (tmp_path / "run" / "layers" / "001-blocks-0-expand.safetensors").unlink()
    status = read_status(RunDirectory(tmp_path / "run"))
    assert (status["done"], status["left"]) == (36, 24)
    with pytest.raises(UserError, match="not a prune-viz run"):
        read_status(RunDirectory(tmp_path))


def test_failures_first_do_not_stop_the_rest(network: FilterNetwork, tmp_path: Path) -> None:
    run, cut = RunDirectory(tmp_path), records(network)
    planned = plan_tasks(network, cut, "key")
    results = TaskResults(run, cut, planned, "key", lambda name: None)
    with LocalEngine(network, SETTINGS, 1) as engine:
        run_tasks(planned[:1], results, engine, RunLog(run.log_file), lambda task: None)
    again = TaskResults(run, cut, planned, "key", lambda name: None)
    with _Failing(network, ValueError("x"), "blocks.0") as engine, pytest.raises(IncompleteError):
        run_tasks(planned, again, engine, RunLog(run.log_file), lambda task: None)
    assert again.whole == {"stem", *(f"blocks.1.{part}" for part in ("expand", "depthwise", "project"))}


@pytest.mark.slow
def test_an_engine_that_shrinks_is_given_nothing_more(network: FilterNetwork, tmp_path: Path) -> None:
    class Shrinking(LocalEngine):
        room, most = 3, 0

        def slots(self) -> int:
            type(self).room -= 1
            return max(self.room, 1)

        def submit(self, task: Task, starts: StartingStimuli):
            type(self).most = max(self.most, self._pool._work_queue.qsize() + 1)
            return super().submit(task, starts)

    run, planned = RunDirectory(tmp_path), plan_tasks(network, records(network), "key")
    results = TaskResults(run, records(network), planned, "key", lambda name: None)
    with Shrinking(network, SETTINGS, 1) as engine:
        run_tasks(planned, results, engine, RunLog(run.log_file), lambda task: None)
    assert len(results.whole) == 7
    assert Shrinking.most <= 3


KEY = 64 * "a"  # as a digest is


def test_pieces_of_layers_not_asked_for_stay(network: FilterNetwork, tmp_path: Path) -> None:
    run, cut = RunDirectory(tmp_path), records(network)
    result = run_task(network, Task("stem", 0, 4, None, "", ""), SETTINGS, None)
    halves = [replace(task, stop=4) for task in plan_tasks(network, cut, KEY)[:1]]
    TaskResults(run, cut[:1], [*halves, replace(halves[0], start=4, stop=12)], KEY, lambda name: None).add(
        halves[0], result
    )
    other = TaskResults(run, cut[1:2], plan_tasks(network, cut[1:2], KEY), KEY, lambda name: None)
    other.tidy()
    assert (tmp_path / halves[0].file).exists()
    TaskResults(run, cut[1:2], plan_tasks(network, cut[1:2], "new"), "new", lambda name: None).tidy()
    assert not (tmp_path / "tasks").exists()


def keys(tmp_path: Path, *models: nn.Module) -> list[str]:
    """The run keys of models, as if all came from one file."""
    found = []
    for model in models:
        analyze(model, input_shape=(3, 8, 8), out=tmp_path / "run", steps=1, source={"sha256": "file"})
        found.append(json.loads((tmp_path / "run" / "run.json").read_text())["key"])
    return found


@pytest.mark.slow
def test_the_key_tells_weights_and_structure_of_one_file(tmp_path: Path) -> None:
    def make(*parts: nn.Module, weight: float = 1.0) -> nn.Module:
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        conv.weight.data *= weight
        return nn.Sequential(conv, *parts)

    held = make(nn.ReLU())
    held.register_buffer("held", torch.ones(2), persistent=False)
    models = [
        make(nn.ReLU()), make(nn.ReLU(), weight=2.0), make(nn.GELU()), make(nn.ReLU(), nn.AvgPool2d(2)), held,
    ]  # fmt: skip
    found = keys(tmp_path, *models)
    assert len(set(found)) == len(found)
    assert keys(tmp_path, make(nn.ReLU()))[0] == found[0]


@pytest.mark.slow
def test_a_convolution_that_remembers_does_not_mix_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Remembering(nn.ConvTranspose2d):
        def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
            self.seen = x * 1
            time.sleep(0.001)
            return super().forward(self.seen)

    model = tortured.network()
    model.stem = Remembering(3, 12, 3, padding=1)
    monkeypatch.setitem(tasks.BATCH, "cpu", 1)
    for workers in (1, 3):
        analyze(
            model,
            input_shape=(3, 16, 16),
            out=tmp_path / str(workers),
            steps=6,
            workers=workers,
            layers=["s*"],
        )
    one, three = (read_arrays(tmp_path / n / "layers" / "000-stem.safetensors")[0] for n in "13")
    assert np.array_equal(one["images"], three["images"])


def test_wrong_call_leaves_an_earlier_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    analyze(tortured.network(), input_shape=(3, 16, 16), out=out, steps=1, layers=["stem"])
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for wrong in ({"memory": 1000}, {"engine": "ray", "gpus_per_task": 1.5}, {"engine": "x"}, {"canvas": 0}):
        with pytest.raises(UserError):
            analyze(tortured.network(), input_shape=(3, 16, 16), out=out, steps=1, fresh=True, **wrong)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_run_that_died_in_its_report_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    analyze(tortured.network(), input_shape=(3, 16, 16), out=out, steps=1, layers=["stem"])
    (out / NEW_REPORT / "layers").mkdir(parents=True)
    (out / NEW_REPORT / "index.html").write_text("half")
    (out / f"{ASIDE}abcd_123").write_text("half")
    analyze(tortured.network(), input_shape=(3, 16, 16), out=out, steps=1, layers=["stem"])
    assert (out / "report" / "index.html").exists()
    assert not [file for file in out.iterdir() if file.name.startswith(".") and file.name != ".lock"]


def test_a_backward_pass_that_fails_names_its_layer(tmp_path: Path) -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no way <back>")

    class Wall(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return OneWay.apply(x) if x.isfinite().all() else x  # which cannot be traced

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Wall(), nn.Conv2d(4, 4, 3))
    analyze(model, input_shape=(3, 16, 16), out=tmp_path / "run", steps=2)
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert any("2 could not be analysed: no gradient comes back" in note for note in notes), notes


@pytest.mark.slow
def test_results_of_an_older_algorithm_are_not_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, model = tmp_path / "run", randomise_norms(Plain())

    def written() -> tuple[tuple[int, int], tuple[int, int]]:
        """Which files hold a layer's stimuli and the calibration images now, and since when."""
        analyze(model, input_shape=(3, 16, 16), out=out, steps=1)
        layer, images = out / "layers" / "000-conv1.safetensors", out / "probes.safetensors"
        return tuple((one.stat().st_ino, one.stat().st_mtime_ns) for one in (layer, images))

    first = written()
    assert written() == first
    monkeypatch.setattr(synthetic_images, "ALGORITHM", synthetic_images.ALGORITHM + 1)
    second = written()
    assert second[0] == first[0]
    assert second[1] != first[1]
    monkeypatch.setattr(algorithm, "ALGORITHM", algorithm.ALGORITHM + 1)
    third = written()
    assert third[0] != second[0]
    assert third[1] != second[1]


@pytest.mark.parametrize(
    ("module", "name", "stage"),
    [
        (optimiser, "STILL", algorithm), (priors, "RADIUS", algorithm), (search, "LEAVE", algorithm),
        (stimuli, "DRAFT_STEPS", algorithm),
        (optimiser, "OPEN_DRAFT", algorithm),
        (layers, "LARGEST_CANVAS", algorithm), (losses, "SURE", synthetic_images),
        (dead_leaves, "TEXTURE", synthetic_images), (synthetic_images, "RATE", synthetic_images),
    ],
)  # fmt: skip
def test_keys_hold_the_constants_of_their_stage(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, stage: Any
) -> None:
    before = json.dumps(stage.settings())
    monkeypatch.setattr(module, name, "another")
    assert json.dumps(stage.settings()) != before

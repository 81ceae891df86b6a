"""What `--dry-run` adds up. How near its seconds come is measured, not tested."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tortured
from torch import nn
from typer.testing import CliRunner

from prune_viz import cli
from prune_viz.analysis import dry_run as module
from prune_viz.analysis import stage_costs
from prune_viz.analysis.dry_run import REPORT_BYTES, LayerCost, disk_bytes, makespan
from prune_viz.analysis.expected_work import A_LAYER, macs_of_passes
from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.pipeline import analyze, estimate
from prune_viz.analysis.prepare import prepare
from prune_viz.calibration.images import NOISE_IMAGES
from prune_viz.demo.digits import DigitsNet
from prune_viz.demo.run import save_demo_model
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.run_context import RunContext
from prune_viz.network.cost import count_macs
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.redundancy.group_verdicts import calibration_copy
from prune_viz.utils.progress import Progress


def cost(filters: int, seconds: float) -> LayerCost:
    return LayerCost(Layer("x", "", filters, 0, None, (8, 8)), seconds, 48, 0)


def test_tasks_are_shared_by_workers() -> None:
    assert makespan([cost(100, 10)], 1, 100) == pytest.approx(10)
    assert makespan([cost(100, 10)], 4, 100) == pytest.approx(10)  # one task
    assert makespan([cost(100, 10)], 4, 25) == pytest.approx(2.5)
    assert makespan([cost(100, 10), cost(10, 8)], 2, 50) == pytest.approx(13)  # the long one came last
    assert makespan([], 2, 50) == 0


@pytest.mark.slow
def test_disk_is_about_what_a_run_takes(tmp_path: Path) -> None:
    analyze(tortured.network(), input_shape=(3, 16, 16), steps=2, out=tmp_path / "run")
    real = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    said = estimate(tortured.network(), input_shape=(3, 16, 16), steps=2).disk
    assert 1 / 1.5 < said / real < 1.5


def test_layers_between_those_tried_cost_by_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every step takes as many seconds as its passes have operations, so does every layer's search."""
    network = FilterNetwork(tortured.network(), (3, 16, 16))
    macs = count_macs(tortured.network(), (3, 16, 16))
    deep = macs_of_passes(network, macs)
    monkeypatch.setattr(module, "_step_seconds", lambda network, layer, workers: deep[layer.name])
    plan = MemoryPlan(network, None, 2)
    costs = module.estimate_stimuli(network, network.layers, macs, 30.0, plan, Progress())
    said = [cost.seconds - A_LAYER for cost in costs]
    assert said == pytest.approx([10 * cost.layer.filters * deep[cost.layer.name] for cost in costs])
    assert all(cost.batch > 0 and cost.taken > 0 for cost in costs)


def test_passes_grow_with_depth_and_canvas() -> None:
    network = FilterNetwork(DigitsNet(), (1, 16, 16))
    macs = count_macs(DigitsNet(), (1, 16, 16))
    deep = macs_of_passes(network, macs)
    first, second = network.layers[:2]
    scale = [math.prod(layer.canvas) / 16**2 for layer in (first, second)]
    assert deep[first.name] == pytest.approx(scale[0] * macs[first.name])
    assert deep[second.name] == pytest.approx(scale[1] * (macs[first.name] + macs[second.name]))


def test_the_middles_of_equal_shares_are_chosen() -> None:
    assert module._spread(np.ones(9), 3).tolist() == [1, 4, 7]
    assert module._spread(np.array([1, 1, 1, 97.0]), 4).tolist() == [2, 3]
    assert module._spread(np.ones(2), 4).tolist() == [0, 1]


def test_responses_count_by_the_square() -> None:
    one, two = (disk_bytes([cost(count, 0).layer], (3, 8, 8), [], None) for count in (1000, 2000))
    assert two - one == 1000 * (2 * 3 * 64 + 4 + REPORT_BYTES[1]) + 4 * (2000**2 - 1000**2)


def test_every_layer_and_stage_is_listed_and_nothing_written(tmp_path: Path) -> None:
    save_demo_model(DigitsNet(), [], tmp_path / "model.pt")
    before = set(tmp_path.rglob("*"))
    options = ["analyze", str(tmp_path / "model.pt"), "--out", str(tmp_path / "run"), "--dry-run"]
    result = CliRunner().invoke(cli.app, [*options, "--json", "--steps", "4", "--workers", "2"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "conv3", "conv4"]
    assert found["workers"] == 2
    assert {"preparation", "stimuli", "gram matrices", "calibration", "ranking", "verdicts"} <= found[
        "stages"
    ].keys()
    assert all(seconds >= 0 for seconds in found["stages"].values())
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()))
    assert found["memory"] > found["disk"] > 0
    shown = CliRunner().invoke(cli.app, [*options, "--steps", "4"])
    assert shown.exit_code == 0
    assert "conv4" in shown.stdout
    assert "in all" in shown.stdout
    assert "MiB on disk" in shown.stdout
    assert set(tmp_path.rglob("*")) == before
    refused = CliRunner().invoke(cli.app, [*options, "--engine", "ray"])
    assert refused.exit_code == 2
    assert "leave out --engine" in refused.stderr


def test_gram_matrices_are_estimated_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every pixel takes a second, seconds are pixels: those of stimuli, noise and examples."""
    monkeypatch.setattr(stage_costs, "_gathering", lambda *_: (0.0, 0.0, 1.0))
    monkeypatch.setattr(stage_costs, "_calibration_seconds", lambda *_: 0.0)
    examples = torch.rand(24, 1, 16, 16)
    prepared = prepare(DigitsNet(), AnalysisOptions(input_shape=(1, 16, 16)), None, "")
    prepared = replace(prepared, examples=examples)
    twin = calibration_copy(prepared.model, prepared.network)
    found = stage_costs.estimate_conclusions(twin, prepared, RunContext())
    filters = sum(layer.filters for layer in prepared.layers)
    assert found["gram matrices"] == (filters + NOISE_IMAGES + len(examples)) * 16**2


def test_gathering_is_timed_by_image_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that a batch moves by 2 seconds, an image by 3 more, and the rest by 5."""
    clock = [0.0]

    def gather(twin: nn.Module, groups: Any, batches: Any, budget: Any) -> None:
        for images, _ in batches():
            clock[0] += 2 + 3 * len(images)
        clock[0] += 5

    monkeypatch.setattr(stage_costs.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(stage_costs, "gather_gram_matrices", gather)
    found = stage_costs._gathering(DigitsNet(), [], torch.zeros(8, 1, 2, 2), None)
    assert found == pytest.approx((5, 2, 3 / 4))

"""Drafts, and what a higher quality begins with."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from networks import random_residual
from torch import nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.execution import tasks
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.redundancy import importance
from prune_viz.redundancy.group_verdicts import choose_stimuli
from prune_viz.runs.run_directory import LayerTensors, RunDirectory

SHAPE = (3, 72, 72)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_residual()


@pytest.fixture(scope="module")
def drafted(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drafts") / "run"
    analyze(model, input_shape=SHAPE, quality="draft", out=out)
    return out


def _dead(out: Path) -> set[tuple[str, int]]:
    filters = RunDirectory(out).read_filters()
    return set(map(tuple, filters.loc[filters["verdict"] == "dead", ["layer", "filter"]].to_numpy().tolist()))


def test_a_draft_shows_and_judges_every_filter(model: nn.Module, drafted: Path) -> None:
    run = RunDirectory(drafted)
    filters = run.read_filters()
    network = FilterNetwork(model, SHAPE)
    assert len(filters) == sum(layer.filters for layer in network.layers)
    assert (filters["activation"] > 0).mean() > 0.7
    assert run.report_page.exists()
    assert run.read_provenance().options["quality"] == "draft"
    assert "This is a draft" in run.report_page.read_text()
    for record, draft, whole in zip(
        run.read_provenance().layers, network.draft.layers, network.layers, strict=True
    ):
        assert run.read_layer(record.file).images.shape[2:] == draft.canvas
        assert np.prod(draft.canvas) < np.prod(whole.canvas)


@pytest.mark.slow
def test_a_higher_quality_begins_where_the_draft_ended(
    model: nn.Module, drafted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = analyze(model, input_shape=SHAPE, steps=8, out=tmp_path / "alone")
    dead = _dead(drafted)
    sought: list[bool] = []
    find_stimuli = tasks.find_stimuli

    def noting(network, *given, **options):
        sought.append(network.is_draft)
        return find_stimuli(network, *given, **options)

    def never(*_: object) -> None:
        raise AssertionError("calibrated twice")

    monkeypatch.setattr(tasks, "find_stimuli", noting)
    monkeypatch.setattr(importance, "calibrate", never)
    after = analyze(model, input_shape=SHAPE, steps=8, out=drafted)
    assert sought == [False] * len(after.layers)
    pd.testing.assert_frame_equal(after.filters, alone.filters)
    assert dead
    assert dead <= _dead(drafted)
    for name in alone.layers:
        assert np.array_equal(after.layers[name].images, alone.layers[name].images)


def test_stimuli_alone_are_shown_not_judged(tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = analyze(random_residual(), input_shape=(3, 16, 16), steps=2, only="stimuli", out=out)
    assert set(found.filters["verdict"]) == {"unjudged"}
    assert set(found.filters["reason"]) == {"Not judged: only stimuli were asked for."}
    assert (out / "report" / "index.html").exists()
    assert not RunDirectory(out).calibration_images_file.exists()
    assert not found.masks.removed


def test_few_stimuli_leave_no_live_filter_silent() -> None:
    # Filter 5 answers to its own stimulus alone, and filter 6 to none.
    responses = np.ones((9, 9), dtype=np.float32)
    responses[:, 5:7] = 0
    responses[5, 5] = 1
    found = LayerTensors(np.zeros((9, 1, 2, 2), np.float16), np.diag(responses).copy(), responses)
    assert choose_stimuli(found, 0.3).tolist() == [0, 4, 5, 8]
    assert choose_stimuli(found, 1.0).tolist() == list(range(9))

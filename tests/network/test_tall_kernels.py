"""Tall kernels on their side: they compute the same, in copies alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import prune_viz as pv
from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.prepare import prepare
from prune_viz.network.tall_kernels import turned

SIGNALS = torch.randn(2, 1, 200, 1, generator=torch.Generator().manual_seed(0))


def _network(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, (32, 1), **options),  # type: ignore[arg-type]
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, (16, 1)),
    ).eval()


@pytest.mark.parametrize(
    "options", [{}, {"stride": (4, 1)}, {"padding": (14, 0), "dilation": (2, 1)}, {"bias": False}]
)
@pytest.mark.parametrize("columns", [1, 3])
def test_turned_kernels_compute_the_same(options: dict[str, object], columns: int) -> None:
    model = _network(**options)
    twin = turned(model)
    signals = SIGNALS.expand(-1, -1, -1, columns)
    for one in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert "_conv_forward" in vars(one[0])
        torch.testing.assert_close(one(signals), model(signals))
    assert twin[0].weight.data_ptr() == model[0].weight.data_ptr()


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": (1, 0), "padding_mode": "circular"}])
def test_other_kernels_stay(options: dict[str, object]) -> None:
    model = _network(**options)
    assert turned(model) is model


def test_an_analysis_turns_kernels_and_the_model_keeps_them() -> None:
    model = _network()
    prepared = prepare(model, AnalysisOptions(input_shape=(1, 200, 1)))
    assert "_conv_forward" in vars(prepared.model[0])
    assert "_conv_forward" in vars(prepared.network._graph.get_submodule("0"))
    masks = {"0": torch.arange(6) > 1}
    for one in (model, pv.remove_filters(model, masks, SIGNALS[:1])):
        assert not any("_conv_forward" in vars(module) for module in one.modules())

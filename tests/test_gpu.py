"""What only a GPU can show; `scripts/gpu_check.sh` runs these."""

from pathlib import Path

import pytest
import torch
from networks import random_residual

from prune_viz.analysis.pipeline import analyze
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.network.filter_network import FilterNetwork

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here"),
]
SHAPE = (3, 40, 40)


def _network(device: str) -> FilterNetwork:
    return FilterNetwork(random_residual(), SHAPE, device=device)


def test_stimuli_excite_as_on_the_cpu() -> None:
    here, there = _network("cpu"), _network("cuda")
    for layer in here.layers:
        filters = range(layer.filters)
        one, other = (find_stimuli(network, layer.name, filters) for network in (here, there))
        fires = one.activations > 0
        shares = other.activations[fires].cpu() / one.activations[fires]
        assert shares.median().item() == pytest.approx(1, abs=0.02)


def test_a_stimulus_does_not_depend_on_its_batch() -> None:
    network = _network("cuda")
    name = network.layers[2].name
    together = find_stimuli(network, name, range(8)).activations
    alone = torch.cat([find_stimuli(network, name, [number]).activations for number in range(8)])
    torch.testing.assert_close(together, alone, rtol=0.05, atol=1e-4)


def test_verdicts_are_those_of_the_cpu(tmp_path: Path) -> None:
    found = [
        analyze(random_residual(), input_shape=SHAPE, steps=24, device=device, out=tmp_path / device).filters
        for device in ("cpu", "cuda")
    ]
    assert (found[0]["verdict"] == found[1]["verdict"]).mean() > 0.95

"""The README's Python, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import prune_viz as pv
from prune_viz.runs.decisions_json import Merge

README = Path(__file__).parents[1] / "README.md"


def _fine_tune(model: nn.Module) -> None:
    """A loop that knows nothing of masks, and pulls at every weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    model.eval()


@pytest.mark.slow
def test_readme_python_runs_and_zeros_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), "model.pt")
    masks = {
        name: torch.arange(module.out_channels) % 4 > 0
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and name.endswith("conv1") and name.startswith("layer")
    }
    merge = Merge("layer1.0.conv1", 0, (1,), (0.5,), 0.0)
    pv.Masks(masks, (merge,), calibration_images=torch.randn(8, 3, 64, 64)).save("reports/model/masks.pt")

    names: dict[str, Any] = {"fine_tune": _fine_tune}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block.replace("steps=300", "steps=2"), names)

    tuned = torch.load("tuned.pt", weights_only=True)
    assert tuned.keys() == network.state_dict().keys()
    for layer, mask in masks.items():
        weight, norm = tuned[f"{layer}.weight"], tuned[f"{layer.replace('conv1', 'bn1')}.weight"]
        assert not weight[~mask].any()
        assert not norm[~mask].any()
        assert weight[mask].flatten(1).abs().sum(dim=1).all()
        assert not torch.equal(weight[mask], network.get_submodule(layer).weight[mask])
    smaller = dict(names["smaller"].named_modules())
    assert smaller["layer1.0.conv1"].out_channels == 48
    healed = names["healed"].state_dict()
    assert {name: one.shape for name, one in healed.items()} == {
        name: one.shape for name, one in names["smaller"].state_dict().items()
    }
    assert names["stimuli"].activations.shape == (2,)

"""Architectures recognised by the names and shapes of their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from marks import slow
from torch import Tensor, nn

from prune_viz.loading.architecture_inference import recognise
from prune_viz.loading.checkpoints import load_checkpoint
from prune_viz.utils.errors import UserError


def _weights(name: str, **kwargs: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **kwargs).state_dict()


@pytest.mark.parametrize(
    ("name", "built", "kwargs"),
    [
        slow("resnet18", {}, {}),
        slow("resnet34", {"num_classes": 7}, {"num_classes": 7}),
        slow("wide_resnet50_2", {}, {}),
        ("vgg16", {}, {}),
        slow("vgg16_bn", {"num_classes": 2}, {"num_classes": 2}),
        ("squeezenet1_0", {"num_classes": 5}, {"num_classes": 5}),
        ("mobilenet_v3_small", {}, {}),
        slow("densenet121", {}, {}),
        slow("efficientnet_b1", {}, {}),
        slow("googlenet", {"init_weights": False}, {}),
        ("googlenet", {"init_weights": False, "aux_logits": False, "num_classes": 4},
         {"aux_logits": False, "num_classes": 4}),
        slow("deeplabv3_resnet50", {"weights_backbone": None, "aux_loss": True}, {"aux_loss": True}),
        ("r3d_18", {"num_classes": 9}, {"num_classes": 9}),
        slow("vit_b_32", {}, {}),
    ],
)  # fmt: skip
def test_torchvision_networks_are_told_apart(
    name: str, built: dict[str, object], kwargs: dict[str, object]
) -> None:
    (found,) = recognise(_weights(name, **built))
    assert (found.arch, found.kwargs, found.misfits) == (f"torchvision:{name}", kwargs, [])


def test_a_plain_checkpoint_needs_no_option(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    network = torchvision.models.resnet18(weights=None, num_classes=6).eval()
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, file)
    checkpoint = load_checkpoint(file)
    assert checkpoint.describe() == ["recognised torchvision:resnet18, 6 classes"]
    assert checkpoint.source["arch"] == "torchvision:resnet18"
    assert checkpoint.source["recognised"]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(checkpoint.model(images), network(images))


@pytest.mark.slow
def test_what_comes_near_is_listed_with_what_differs(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(weights=None)
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "model.pt")
    text = str(caught.value)
    assert "nearest: torchvision:resnet18 has 2 missing (fc.bias, fc.weight)" in text
    assert "2 unexpected (fc.1.bias, fc.1.weight)" in text
    assert "\n" not in text
    assert len(text) < 1500


def test_nothing_is_made_of_strangers() -> None:
    assert recognise({"a": torch.zeros(1), "b": torch.zeros(2)}) == []
    assert recognise({}) == []

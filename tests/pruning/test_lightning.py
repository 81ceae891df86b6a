from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Plain, mask_without, randomise_norms
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from prune_viz.lightning import HoldMasks
from prune_viz.pruning.masks import save_masks
from prune_viz.utils.errors import UserError

MASKS = {"conv1": mask_without(8, 0, 3), "conv3": mask_without(8, 7)}
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and workers


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)
        self.model = randomise_norms(Plain())

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def _fit(
    module: Classifier, folder: Path, epochs: int, *callbacks: object, resume: Path | None = None
) -> None:
    data = TensorDataset(torch.randn(16, 3, 16, 16), torch.randint(0, 5, (16,)))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 8), ckpt_path=resume)


def _at_zero(network: Plain) -> bool:
    tensors = [network.conv1.weight[[0, 3]], network.bn1.weight[[0, 3]], network.conv3.bias[[7]]]
    return not any(bool(tensor.any()) for tensor in tensors)


@pytest.mark.parametrize("network", [None, "model"])
def test_masks_hold_through_lightning_training(tmp_path: Path, network: str | None) -> None:
    module = Classifier()
    before = copy.deepcopy(module.model.state_dict())
    save_masks(MASKS, tmp_path / "masks.pt")
    _fit(module, tmp_path, 2, HoldMasks(tmp_path / "masks.pt", network))
    assert _at_zero(module.model)
    assert set(module.model.state_dict()) == set(before)
    assert not torch.equal(module.model.conv1.weight[1], before["conv1.weight"][1])


def test_training_goes_on_from_lightnings_own_checkpoint(tmp_path: Path) -> None:
    first = Classifier()
    _fit(first, tmp_path, 1, HoldMasks(MASKS), ModelCheckpoint(tmp_path, filename="one"))
    plain = Classifier.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)  # without the callback
    assert _at_zero(plain.model)
    assert torch.equal(plain.model.conv1.weight, first.model.conv1.weight)
    second = Classifier()
    _fit(second, tmp_path, 3, HoldMasks(MASKS), resume=tmp_path / "one.ckpt")
    assert _at_zero(second.model)
    assert not torch.equal(second.model.conv1.weight, first.model.conv1.weight)


def test_masks_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no network in the LightningModule"):
        _fit(Classifier(), tmp_path, 1, HoldMasks({"conv9": mask_without(8, 1)}))
    with pytest.raises(UserError, match="has no network 'net'"):
        _fit(Classifier(), tmp_path, 1, HoldMasks(MASKS, "net"))


def test_masks_are_zeros_again_when_training_fails(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> torch.Tensor:
            raise RuntimeError("no")

    module = Failing()
    with pytest.raises(RuntimeError, match="no"):
        _fit(module, tmp_path, 1, HoldMasks(MASKS))
    assert _at_zero(module.model)
    assert set(module.model.state_dict()) == set(Plain().state_dict())

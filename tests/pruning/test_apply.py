from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import Dense, Plain, mask_without, randomise_norms
from torch import nn

from prune_viz.channels.groups import NormChannel
from prune_viz.pruning.apply import apply_masks, are_zero, make_permanent
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.masks import Masks, load_masks, save_masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.errors import UserError


@pytest.mark.parametrize("optimiser", [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5),
], ids=["sgd", "nesterov", "adam", "adamw", "rmsprop"])  # fmt: skip
@pytest.mark.parametrize("masked_first", [True, False])
def test_masked_filters_stay_at_zero_through_training(optimiser, masked_first: bool) -> None:
    torch.manual_seed(0)
    model = randomise_norms(Plain())
    masks = {"conv1": mask_without(8, 0, 3), "conv3": mask_without(8, 7)}
    if masked_first:
        apply_masks(model, masks)
    steps = optimiser(model.parameters())
    x, y = torch.randn(16, 3, 16, 16), torch.randint(0, 5, (16,))
    model.train()
    if not masked_first:  # momentum from before the masks must not move them either
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
        apply_masks(model, masks)
    kept = model.conv1.weight[1].detach().clone()
    for _ in range(5):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    assert not torch.equal(model.conv1.weight[1], kept)
    for tensor in (model.conv1.weight, model.bn1.weight, model.bn1.bias):
        assert (tensor[[0, 3]] == 0).all()
        assert (tensor[[1, 2]] != 0).any()
    assert (model.conv3.weight[7] == 0).all()
    assert model.conv3.bias[7] == 0
    make_permanent(model)
    assert (model.conv1.weight[[0, 3]] == 0).all()
    assert set(model.state_dict()) == set(Plain().state_dict())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


def test_masked_map_is_zero_after_copy_and_save(tmp_path: Path) -> None:
    model = apply_masks(randomise_norms(Plain()), {"conv1": mask_without(8, 2)})
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    maps = twin.bn1(twin.conv1(x))
    assert (maps[:, 2] == 0).all()
    assert (maps[:, 3] != 0).any()
    torch.save(make_permanent(twin).state_dict(), tmp_path / "zeroed.pt")
    fresh = Plain().eval()
    fresh.load_state_dict(torch.load(tmp_path / "zeroed.pt", weights_only=True))
    torch.testing.assert_close(fresh(x), model(x))


def test_masks_can_be_applied_twice() -> None:
    model = apply_masks(randomise_norms(Plain()), {"conv1": mask_without(8, 2)})
    apply_masks(model, {"conv1": mask_without(8, 5)})
    assert (model.conv1.weight[[2, 5]] == 0).all()
    assert (model.conv1.weight[[0, 1]] != 0).any()


@pytest.mark.parametrize("conv", [
    nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv3d(4, 6, 3),
])  # fmt: skip
def test_every_kind_of_convolution_is_masked_on_its_filters(conv: nn.Module) -> None:
    model = apply_masks(nn.Sequential(conv), {"0": mask_without(6, 1, 4)})
    axes = conv.weight.ndim - 2
    out = model(torch.randn(2, 4, *[5] * axes))
    silent = [bool((out[:, index] == 0).all()) for index in range(6)]
    assert silent == [False, True, False, False, True, False]


def test_masks_of_another_model_are_refused() -> None:
    for masks, message in [
        ({"conv9": mask_without(8)}, "no layer of filters"),
        ({"conv1": mask_without(8).byte()}, "bool"),
        ({"conv1": mask_without(7)}, "has 8 filters, its mask 7"),
        ({"conv1": torch.zeros(8, dtype=torch.bool)}, "every filter"),
    ]:
        with pytest.raises(UserError, match=message):
            apply_masks(Plain(), masks)


def test_norm_without_scale_stays_at_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    model[1].running_mean.fill_(0.7)
    apply_masks(model.eval(), {"0": mask_without(4, 1)})
    x = torch.randn(2, 3, 8, 8)
    assert (model[1](model[0](x))[:, 1] == 0).all()
    model.train()
    for _ in range(3):
        assert (model[1](model[0](x))[:, 1] == 0).all()
    assert (model.eval()[1](model[0](x))[:, 1] == 0).all()


def test_filters_at_zero_are_recognised() -> None:
    model = randomise_norms(Plain())
    masks = {"conv1": mask_without(8, 2), "conv3": mask_without(8, 0)}
    assert not are_zero(model, masks)
    apply_masks(model, masks)
    assert are_zero(model, masks)
    make_permanent(model)
    assert are_zero(model, masks)
    for tensor in (model.bn1.bias, model.conv1.weight, model.conv3.bias):
        other = copy.deepcopy(model)
        own = dict(other.named_parameters())[next(n for n, p in model.named_parameters() if p is tensor)]
        with torch.no_grad():
            own[mask_without(8, 2, 0).logical_not()] = 0.1
        assert not are_zero(other, masks)


def test_norms_are_silenced_for_current_masks_only(tmp_path: Path) -> None:
    model, x = randomise_norms(Dense()), torch.randn(2, 3, 12, 12)
    masks = reconcile_masks(model, {"stem": mask_without(6, 1, 3)}, x)
    masks["stem"][3] = True  # a reviewer's second thought
    masked = apply_masks(copy.deepcopy(model), masks)
    torch.testing.assert_close(masked(x), remove_filters(model, masks, x)(x), rtol=0, atol=1e-5)
    masks.save(tmp_path / "decisions.pt")
    (tmp_path / "decisions.merges.json").rename(tmp_path / "decisions.json")  # as if of a run
    save_masks({"stem": mask_without(6, 5)}, tmp_path / "mine.pt")
    mine = load_masks(tmp_path / "mine.pt")
    assert mine.norm_channels  # the run's
    masked = apply_masks(copy.deepcopy(model), mine)
    assert (masked.norm2.weight[[1, 3]] != 0).all()


def test_masks_given_stay_the_callers_own() -> None:
    model = randomise_norms(Plain())
    masks = {"conv3": mask_without(8, 1)}
    apply_masks(model, masks)
    apply_masks(model, {"conv3": mask_without(8, 5)})
    assert masks["conv3"].tolist() == mask_without(8, 1).tolist()
    masks["conv3"][2] = False
    assert (model.conv3.weight[2] != 0).any()


def test_masks_that_do_not_fit_change_nothing() -> None:
    model = randomise_norms(Plain())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for norm_channel in (NormChannel("nope", 1, (("conv1", 1),)), NormChannel("bn1", 9, (("conv1", 1),))):
        with pytest.raises(UserError, match="no such norm"):
            apply_masks(model, Masks({"conv1": mask_without(8, 1)}, norm_channels=[norm_channel]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

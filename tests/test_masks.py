from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torchvision
from networks import Concatenating, Plain, Residual, Untraceable, randomise_norms
from torch import nn

from prune_viz.errors import UserError
from prune_viz.masks import (
    Masks,
    apply_masks,
    load_masks,
    make_permanent,
    reconcile_masks,
    save_masks,
)
from prune_viz.tracing import norms_behind

IMAGE = torch.zeros(1, 3, 16, 16)


def _mask(count: int, *gone: int) -> torch.Tensor:
    mask = torch.ones(count, dtype=torch.bool)
    mask[list(gone)] = False
    return mask


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
    masks = {"conv1": _mask(8, 0, 3), "conv3": _mask(8, 7)}
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


def test_the_masked_feature_map_is_zero_and_the_model_copies_and_saves(tmp_path: Path) -> None:
    model = apply_masks(randomise_norms(Plain()), {"conv1": _mask(8, 2)})
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
    model = apply_masks(randomise_norms(Plain()), {"conv1": _mask(8, 2)})
    apply_masks(model, {"conv1": _mask(8, 5)})
    assert (model.conv1.weight[[2, 5]] == 0).all()
    assert (model.conv1.weight[[0, 1]] != 0).any()


@pytest.mark.parametrize("conv", [
    nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv3d(4, 6, 3),
])  # fmt: skip
def test_every_kind_of_convolution_is_masked_on_its_filters(conv: nn.Module) -> None:
    model = apply_masks(nn.Sequential(conv), {"0": _mask(6, 1, 4)})
    axes = conv.weight.ndim - 2
    out = model(torch.randn(2, 4, *[5] * axes))
    silent = [bool((out[:, index] == 0).all()) for index in range(6)]
    assert silent == [False, True, False, False, True, False]


def test_norms_are_found_by_tracing_and_by_order_where_that_fails() -> None:
    expected = {"conv1": "bn1", "conv2": "bn2"}
    assert norms_behind(Plain()) == expected
    assert norms_behind(Untraceable()) == expected


def test_masks_survive_the_disk_and_load_without_pickle(tmp_path: Path) -> None:
    masks = {"conv1": _mask(8, 1), "conv2": _mask(8)}
    save_masks(masks, tmp_path / "masks.pt")
    plain = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert type(plain) is dict
    loaded = load_masks(tmp_path / "masks.pt")
    assert all(torch.equal(loaded[name], plain[name]) and loaded[name].dtype == torch.bool for name in masks)
    assert (loaded.removed, loaded.filters, loaded.merges) == (1, 16, ())


def test_merges_come_from_the_decisions_beside_the_masks(tmp_path: Path) -> None:
    save_masks({"conv1": _mask(8, 1)}, tmp_path / "masks.pt")
    merge = {"layer": "conv1", "filter": 1, "representatives": [0], "coefficients": [2.0], "constant": 0.5}
    (tmp_path / "decisions.json").write_text(json.dumps({"merges": [merge], "model_sha256": "5a"}))
    (loaded,) = load_masks(tmp_path / "masks.pt").merges
    assert (loaded.filter, loaded.representatives, loaded.coefficients, loaded.constant) == (
        1,
        (0,),
        (2.0,),
        0.5,
    )
    (tmp_path / "decisions.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_masks(tmp_path / "masks.pt")


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_masks(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a masks file"):
        load_masks(tmp_path / "text.pt")
    torch.save({"conv1": torch.zeros(3)}, tmp_path / "floats.pt")
    with pytest.raises(UserError, match="bool"):
        load_masks(tmp_path / "floats.pt")


def test_masks_of_another_model_are_refused() -> None:
    for masks, message in [
        ({"conv9": _mask(8)}, "no convolution"),
        ({"conv1": _mask(8).byte()}, "bool"),
        ({"conv1": _mask(7)}, "has 8 filters, its mask 7"),
        ({"conv1": torch.zeros(8, dtype=torch.bool)}, "every filter"),
    ]:
        with pytest.raises(UserError, match=message):
            apply_masks(Plain(), masks)


def test_a_coupled_channel_goes_only_where_every_filter_tied_to_it_goes() -> None:
    masks = {
        "stem": _mask(8, 0, 1), "outer": _mask(8, 1, 2), "project": _mask(8, 1),
        "expand": _mask(16, 3, 4), "depthwise": _mask(16, 4),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="tied"):
        reconciled = reconcile_masks(Residual(), masks, IMAGE)
    for layer in ("stem", "outer", "project"):
        assert (~reconciled[layer]).nonzero().ravel().tolist() == [1]
    for layer in ("expand", "depthwise"):
        assert (~reconciled[layer]).nonzero().ravel().tolist() == [4]
    assert reconciled["inner"].all()
    assert any("stem: 1 masked filters are kept" in note for note in reconciled.notes)
    again = reconcile_masks(Residual(), reconciled, IMAGE)
    assert all(torch.equal(again[name], reconciled[name]) for name in reconciled)
    assert again.notes == []


def test_filters_of_the_output_are_kept_and_the_note_says_why() -> None:
    with pytest.warns(UserWarning, match="output"):
        reconciled = reconcile_masks(Concatenating(), {"out": _mask(2, 0)}, IMAGE)
    assert reconciled["out"].all()


def test_what_cannot_be_reconciled_is_said_rightly() -> None:
    shuffling = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    with pytest.raises(UserError, match="cannot be traced"):
        reconcile_masks(shuffling, {}, torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="does not run on an input of shape 9,16,16"):
        reconcile_masks(Plain(), Masks({"conv1": _mask(8, 0)}), torch.zeros(1, 9, 16, 16))


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    for name in ("one.pt", "other.pt"):
        save_masks({"conv1": _mask(8, 1)}, tmp_path / name)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()

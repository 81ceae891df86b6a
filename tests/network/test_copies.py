"""Copies without parametrisations, and copies that share them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Plain, randomise_norms
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from prune_viz.network.copies import plain_copy
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.redundancy.group_verdicts import calibration_copy

LAID_OVER = {
    "nothing": lambda conv: None,
    "weight norm": parametrizations.weight_norm,
    "older weight norm": weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "older spectral norm": spectral_norm,
    "a mask": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("lay_over", LAID_OVER.values(), ids=list(LAID_OVER))
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_copies_are_plain_and_give_the_same(lay_over: Callable[[nn.Module], object], share: bool) -> None:
    model = randomise_norms(Plain()).eval()
    lay_over(model.conv2)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    before = copy.deepcopy(model.state_dict())
    twin = plain_copy(model, share=share)
    assert set(twin.state_dict()) == set(Plain().state_dict())
    torch.testing.assert_close(twin(images), expected)
    twin.requires_grad_(False).float().to(memory_format=torch.channels_last)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(images), expected)


def test_sharing_copy_has_only_its_own_buffers() -> None:
    model = randomise_norms(Plain()).eval()
    twin = plain_copy(model, share=True)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(one is not two and one.data_ptr() == two.data_ptr() for one, two in pairs)
    buffers = zip(model.buffers(), twin.buffers(), strict=True)
    assert all(one.data_ptr() != two.data_ptr() for one, two in buffers)
    apart = zip(model.parameters(), plain_copy(model).parameters(), strict=True)
    assert all(one.data_ptr() != two.data_ptr() for one, two in apart)


class Writing(nn.Sequential):
    """Scales its weights down whenever it is called."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self[0].weight.mul_(0.9)
        return super().forward(images)


class Ready(nn.Sequential):
    """Sets a scale by what it is called with first."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if not self.ready:
                self.scale.copy_(1 / (images.std() + torch.arange(4)))
                self.ready.fill_(True)
        return super().forward(images) * self.scale[:, None, None]


@pytest.mark.parametrize("make", [lambda: Writing(nn.Conv2d(3, 4, 3), nn.ReLU()), Ready])
def test_what_a_call_writes_does_not_reach_the_model(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    network = FilterNetwork(model, (3, 8, 8))
    assert not network.shares
    network.maps(network.layers[0].name)(torch.randn(2, 3, 8, 8))
    calibration_copy(model, network)(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_made_for_inference_alone_is_copied() -> None:
    with torch.inference_mode():
        model = randomise_norms(Plain()).eval()
        expected = model(torch.ones(1, 3, 16, 16))
    assert all(parameter.requires_grad for parameter in plain_copy(model, share=True).parameters())
    torch.testing.assert_close(plain_copy(model, share=True)(torch.ones(1, 3, 16, 16)), expected)


def test_a_copy_leaves_gradients_on_their_way() -> None:
    model = randomise_norms(Plain()).eval()
    parametrizations.spectral_norm(model.conv2)
    loss = model(torch.ones(1, 3, 16, 16)).sum()
    plain_copy(model, share=True)
    loss.backward()


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    twin = plain_copy(model, share=True)
    assert twin[1].weight is twin[0].weight


def test_prepared_network_shares_other_weights() -> None:
    model = randomise_norms(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    )
    network = FilterNetwork(model, (3, 8, 8))
    assert network.shares
    held = {parameter.data_ptr() for parameter in model.parameters()}
    prepared = dict(network._graph.named_parameters())
    assert prepared["3.weight"].data_ptr() in held
    assert prepared["0.weight"].data_ptr() not in held

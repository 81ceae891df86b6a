"""Searching at half precision: where it is done, and that what is found is as good."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prune_viz as pv
from prune_viz.network.calls import ordinary_input
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.precision import AUTO, FULL, HALF, pick_precision
from prune_viz.utils.errors import UserError

CPU = torch.device("cpu")
SHAPE = (3, 64, 64)


class Minding(nn.Module):
    """Raises unless it reads numbers of full precision."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.dtype != torch.float32:
            raise TypeError("float32 only")
        return inputs


def wide(*between: nn.Module) -> nn.Sequential:
    """Two convolutions of enough weights for half precision, with something between."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), *between, nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()
    ).eval()


def computed_in(network: FilterNetwork, name: str) -> torch.dtype:
    """The type of the maps that a search follows."""
    return network.climbed_maps(name)(ordinary_input(SHAPE, 4))[1].dtype


def last(model: nn.Sequential) -> str:
    return str(len(model) - 2)


@pytest.mark.parametrize("has_halves", [True, False])
def test_auto_takes_half_precision_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, has_halves: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_halves})

    assert pick_precision(AUTO, CPU) == (HALF if has_halves else FULL)
    assert pick_precision(FULL, CPU) == FULL


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="--precision is auto, float32 or bfloat16, not 'int8'"):
        pick_precision("int8", CPU)


def test_large_layers_are_climbed_at_half_precision_when_asked_for() -> None:
    model = wide()

    assert computed_in(FilterNetwork(model, SHAPE, precision=HALF), last(model)) == torch.bfloat16
    assert computed_in(FilterNetwork(model, SHAPE), last(model)) == torch.float32


def test_small_layers_are_climbed_at_full_precision() -> None:
    assert computed_in(FilterNetwork(wide(), SHAPE, precision=HALF), "0") == torch.float32


def test_layers_behind_what_minds_the_type_are_climbed_at_full_precision() -> None:
    model = wide(Minding())

    assert computed_in(FilterNetwork(model, SHAPE, precision=HALF), last(model)) == torch.float32


def test_layers_whose_maps_come_out_otherwise_are_climbed_at_full_precision() -> None:
    model = wide()
    model[2].padding = (0, 0)
    with torch.no_grad():  # small differences of large numbers, which half precision rounds off
        model[0].weight *= 1e-3
        model[0].bias[:] = 1000
        model[2].weight -= model[2].weight.mean(dim=(1, 2, 3), keepdim=True)
        model[2].bias[:] = 0

    assert computed_in(FilterNetwork(model, SHAPE, precision=HALF), last(model)) == torch.float32


def test_strided_convolutions_in_groups_stay_at_full_precision() -> None:
    model = nn.Sequential(*wide(), nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64)).eval()
    network = FilterNetwork(model, SHAPE, precision=HALF)
    example = ordinary_input(SHAPE, 4)
    climbed, exact = network.climbed_maps("4")(example)[1], network.maps("4")(example)[1]

    assert computed_in(network, "2") == torch.bfloat16
    assert climbed.dtype == torch.float32
    assert not torch.equal(climbed, exact)  # what they read is bfloat16
    assert "forward" not in vars(model[4])  # the model given is never changed
    assert model[2].weight.dtype == torch.float32


def test_strided_convolutions_in_groups_take_what_else_they_are_called_with() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = wide()
            self.up = nn.ConvTranspose2d(64, 64, 2, stride=2, groups=64)

        def forward(self, inputs: Tensor) -> Tensor:
            encoded = self.encode(inputs)
            return self.up(encoded, output_size=[2 * encoded.size(2), 2 * encoded.size(3)])

    torch.manual_seed(0)
    model = Decoder().eval()
    climbed, exact = (
        FilterNetwork(model, SHAPE, precision=kind).climbed_maps("up")(ordinary_input(SHAPE, 4))[1]
        for kind in (HALF, FULL)
    )
    assert not torch.equal(climbed, exact)
    torch.testing.assert_close(climbed, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))


class Particular(torch.autograd.Function):
    """Minds the type of gradients alone."""

    @staticmethod
    def forward(context: object, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        if gradient.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return gradient


class Doubling(nn.Conv2d):
    """No plain convolution, and whose gradients must be float32."""

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = Particular.apply(2 * super().forward(input))
        return found


def test_layers_without_a_gradient_at_half_precision_are_climbed_at_full_precision() -> None:
    model = nn.Sequential(Doubling(3, 64, 3, padding=1), *wide()[1:]).eval()

    assert computed_in(FilterNetwork(model, SHAPE, precision=HALF), last(model)) == torch.float32


def test_stimuli_found_at_half_precision_are_as_strong() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    found = {
        kind: pv.maximize(model, "layer2.0.conv2", range(12), input_shape=SHAPE, steps=44, precision=kind)
        for kind in (FULL, HALF)
    }

    stronger = (found[HALF].activations / found[FULL].activations).log()
    assert not torch.equal(found[HALF].images, found[FULL].images)
    assert stronger.mean().abs() < 0.03
    maps = FilterNetwork(model, SHAPE).maps("layer2.0.conv2")(found[HALF].images)[1]
    own = torch.linalg.vector_norm(maps[range(12), range(12)].flatten(1), dim=1)
    torch.testing.assert_close(found[HALF].activations, own, rtol=1e-4, atol=0)  # bfloat16 is off by 1e-3


@pytest.mark.skipif(
    pick_precision(AUTO, CPU) != HALF, reason="no bfloat16 here; emulated, it may round by batch"
)
def test_at_half_precision_too_a_stimulus_depends_on_its_own_filter_alone() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    several, alone = (
        pv.maximize(model, "layer1.1.conv1", filters, input_shape=SHAPE, steps=12, precision=HALF)
        for filters in (range(8), range(4, 8))
    )

    assert torch.equal(several.images[4:], alone.images)
    assert torch.equal(several.activations[4:], alone.activations)

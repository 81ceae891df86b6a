from __future__ import annotations

import math

import pytest
import torch
from networks import Concatenating, Plain, Residual, Untraceable, randomise_norms
from torch import nn

from prune_viz.network import tracing
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import choose_canvas, describe, select_layers
from prune_viz.utils.errors import UserError


@pytest.mark.parametrize("model", [Plain(), Residual()])
def test_folding_keeps_what_the_network_computes(model: nn.Module) -> None:
    randomise_norms(model)
    traced = tracing.trace(model)
    folded = tracing.fold_batch_norms(traced, torch.randn(1, 3, 16, 16))
    assert not any(isinstance(folded.get_submodule(str(n.target)), nn.BatchNorm2d)
                   for n in folded.graph.nodes if n.op == "call_module")  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_folding_leaves_the_model_alone() -> None:
    model = randomise_norms(Plain())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tracing.fold_batch_norms(tracing.trace(model), torch.randn(1, 3, 16, 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tap_is_what_the_next_layer_reads() -> None:
    model = randomise_norms(Residual())
    network = FilterNetwork(model, (3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    before, after = network.maps("inner")(x)
    stem = torch.relu(model.bn0(model.stem(x)))
    torch.testing.assert_close(before, model.bn1(model.inner(stem)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, torch.relu(model.bn1(model.inner(stem))), rtol=1e-4, atol=1e-5)
    # Behind `outer` comes a sum, not an activation of its own.
    before, after = network.maps("outer")(x)
    assert before is after


def test_in_place_activation_keeps_the_map_before_it() -> None:
    network = FilterNetwork(randomise_norms(Plain()), (3, 16, 16))
    before, after = network.maps("conv1")(torch.randn(2, 3, 16, 16))
    assert (before < 0).any()
    torch.testing.assert_close(after, before.clamp_min(0))


def test_nothing_runs_behind_the_layer() -> None:
    traced = tracing.trace(Plain())
    part = tracing.cut(traced, tracing.find_taps(traced)["conv1"])
    assert {str(node.target) for node in part.graph.nodes if node.op == "call_module"} == {
        "conv1", "bn1", "tapped_activation",
    }  # fmt: skip


def test_hooks_give_the_same_maps_where_tracing_fails() -> None:
    plain = randomise_norms(Plain())
    strange = Untraceable()
    strange.load_state_dict(plain.state_dict())
    strange.eval()
    assert tracing.trace(strange) is None
    x = torch.randn(2, 3, 16, 16)
    for layer in ("conv1", "conv2"):
        expected = FilterNetwork(plain, (3, 16, 16)).maps(layer)(x)
        given = FilterNetwork(strange, (3, 16, 16)).maps(layer)(x)
        for one, other in zip(expected, given, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _seen_by_gradient(network: FilterNetwork, layer: str, size: int) -> tuple[int, int]:
    """Extent of the inputs that one position's gradient reaches, with every weight positive."""
    x = torch.ones(1, 3, size, size, requires_grad=True)
    after = network.maps(layer)(x)[1]
    middle = after.shape[-1] // 2
    (gradient,) = torch.autograd.grad(after[0, :, middle, middle].sum(), x)
    touched = gradient[0].abs().sum(dim=0) > 0
    rows, columns = touched.any(dim=1).nonzero(), touched.any(dim=0).nonzero()
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_receptive_field_is_what_the_gradient_reaches(layer: str) -> None:
    model = Plain()
    for parameter in model.parameters():
        parameter.data.abs_()
    network = FilterNetwork(model, (3, 64, 64))
    assert network.layer(layer).receptive_field == _seen_by_gradient(network, layer, 64)


def test_receptive_field_through_pools_and_dilation() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.AvgPool2d(3, 1),
        nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    fields = {layer.name: layer.receptive_field for layer in FilterNetwork(model, (3, 64, 64)).layers}
    # 5; pooled to 6 with stride 2; 3x3 adds 2 * 2; 3x3 pool adds 2 * 2.
    assert fields == {"0": (5, 5), "3": (10, 10), "5": (14, 14)}


def test_canvas_follows_the_receptive_field_within_bounds() -> None:
    assert choose_canvas((224, 224), (3, 3)) == (64, 64)
    assert choose_canvas((224, 224), (36, 36)) == (80, 80)
    assert choose_canvas((224, 224), (400, 30)) == (80, 64)
    assert choose_canvas((224, 224), None) == (80, 80)
    assert choose_canvas((8, 8), (3, 3)) == (8, 8)
    assert choose_canvas((224, 224), (3, 3), canvas=50) == (50, 50)


def test_layers_in_execution_order_unused_named() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(4, 4, 1)
            self.unused = nn.Conv2d(4, 4, 1)
            self.first = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    network = FilterNetwork(Backwards(), (3, 8, 8))
    assert [layer.name for layer in network.layers] == ["first", "second"]
    assert network.skipped == ["unused"]


def test_bad_networks_and_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="no convolutions"):
        FilterNetwork(nn.Sequential(nn.Linear(3, 3)), (3,))
    with pytest.raises(UserError, match="--input-shape"):
        FilterNetwork(Plain(), (4, 16, 16))
    with pytest.raises(UserError, match="2 spatial axes"):
        FilterNetwork(Plain(), (3, 16))


def test_patterns_select_layers_and_misses_list_near_names() -> None:
    layers = FilterNetwork(Residual(), (3, 16, 16)).layers
    assert [layer.name for layer in select_layers(layers, ["*e*r"])] == ["inner", "outer"]
    with pytest.raises(UserError, match="expand"):
        select_layers(layers, ["expnad"])


def test_kinds_are_named_for_people() -> None:
    assert describe(nn.Conv2d(8, 8, 5, stride=2, groups=8)) == "5x5 depthwise convolution, stride 2"
    assert describe(nn.ConvTranspose2d(8, 4, 3)) == "3x3 transposed convolution"
    assert describe(nn.Conv1d(8, 4, 3, groups=2, dilation=4)) == "3 grouped (2) convolution, dilation 4"


class _Padding(nn.Conv2d):
    """Pads its input itself, as convolutions carried over from other frameworks do."""

    def __init__(self, *args: object, sides: tuple[int, int, int, int], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d(sides)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = self.pad(input)
        return nn.functional.conv2d(
            padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


def test_self_padding_convolutions_become_plain() -> None:
    model = nn.Sequential(
        _Padding(3, 4, 3, sides=(1, 1, 1, 1), bias=False),
        nn.BatchNorm2d(4),
        _Padding(4, 4, 3, sides=(2, 2, 2, 2), dilation=2, groups=4),
        nn.Conv2d(4, 4, 3),
    )
    randomise_norms(model)
    example = torch.randn(1, 3, 17, 18)
    folded = tracing.fold_batch_norms(tracing.trace(model), example)
    kinds = [type(folded.get_submodule(name)) for name in ("0", "2", "3")]
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(folded(example), model(example), rtol=1e-4, atol=1e-5)
    assert type(model[0]) is _Padding


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "sides", "becomes"),
    [
        (3, 2, 1, (0, 1, 0, 1), nn.Conv2d), (5, 2, 1, (1, 2, 1, 2), nn.Conv2d),
        (5, 2, 2, (3, 4, 3, 4), nn.Conv2d), (4, 1, 1, (1, 2, 1, 2), nn.Conv2d),
        (7, (2, 4), 1, (1, 2, 2, 3), nn.Conv2d), (1, 2, 1, (0, 0, 0, 0), nn.Conv2d),
        (3, 2, 1, (1, 0, 1, 0), _Padding), (3, 2, 1, (0, 2, 0, 2), _Padding),
    ],
)  # fmt: skip
def test_uneven_padding_of_their_own_becomes_plain_where_tensorflow_pads_so(
    kernel: int,
    stride: int | tuple[int, int],
    dilation: int,
    sides: tuple[int, int, int, int],
    becomes: type[nn.Module],
) -> None:
    model = nn.Sequential(
        _Padding(3, 4, kernel, stride, dilation=dilation, sides=sides), nn.BatchNorm2d(4), nn.ReLU()
    )
    randomise_norms(model)
    folded = tracing.fold_batch_norms(tracing.trace(model), torch.randn(1, 3, 32, 33))

    assert type(folded.get_submodule("0")) is becomes
    for size in [(32, 33), (17, 16), (18, 19)]:
        example = torch.randn(2, 3, *size)
        torch.testing.assert_close(folded(example), model(example), rtol=1e-4, atol=1e-5)


def test_norms_are_folded_where_maps_must_be_contiguous() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.padding = _Padding(3, 4, 3, 2, sides=(0, 1, 0, 1))
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.padding(x).view(x.size(0), -1).sum() + self.norm(self.conv(x))

    model = randomise_norms(Viewed())
    folded = tracing.fold_batch_norms(tracing.trace(model), torch.randn(1, 3, 16, 16))

    assert "norm" not in folded.code
    assert type(folded.get_submodule("padding")) is _Padding


def test_padding_that_follows_the_input_is_left_alone() -> None:
    class Following(nn.Conv2d):
        """Pads so that every stride has a position, whatever the size."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            short = [max(0, 3 - (size % 2 or 2)) for size in input.shape[:1:-1]]
            sides = [part for each in short for part in (each // 2, each - each // 2)]
            return nn.functional.conv2d(nn.functional.pad(input, sides), self.weight, self.bias, self.stride)

    model = nn.Sequential(Following(3, 4, 3, 2), nn.ReLU())
    folded = tracing.fold_batch_norms(tracing.trace(model), torch.randn(1, 3, 32, 32))

    assert type(folded.get_submodule("0")) is Following
    for size in [(32, 32), (17, 16)]:
        example = torch.randn(2, 3, *size)
        torch.testing.assert_close(folded(example), model(example), rtol=1e-4, atol=1e-5)


def test_hooks_find_layers_that_are_called_by_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.detach().abs().sum()) < 0:
                return x
            return self.norm(input=self.conv(input=x)).relu()

    model = randomise_norms(ByKeyword()).eval()
    example = torch.randn(2, 3, 8, 8)
    before, after = FilterNetwork(model, (3, 8, 8)).maps("conv")(example)

    torch.testing.assert_close(before, model.conv(example))
    assert after is before  # a norm that is called so is not taken for the layer's own


@pytest.mark.parametrize(
    ("activation", "bound"),
    [
        (nn.ReLU6(inplace=True), 6.0), (nn.Sigmoid(), 1.0), (nn.Tanh(), 1.0), (nn.Hardtanh(-2, 3), 3.0),
        (nn.Hardtanh(-5, 0), 5.0),
        (nn.Hardsigmoid(), 1.0), (nn.ReLU(), math.inf), (nn.PReLU(4), math.inf), (nn.SiLU(), math.inf),
        (nn.Identity(), math.inf),
    ],
)  # fmt: skip
def test_upper_bound_of_a_map_is_its_activations(activation: nn.Module, bound: float) -> None:
    network = FilterNetwork(nn.Sequential(nn.Conv2d(3, 4, 3), activation), (3, 8, 8))
    assert network.upper_bound("0") == pytest.approx(bound)


def test_upper_bound_of_functions_and_untraceable_networks() -> None:
    class Clipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.other(nn.functional.hardtanh(self.one(x), 0, 2.5)))

    network = FilterNetwork(Clipping(), (3, 12, 12))
    assert network.upper_bound("one") == 2.5
    assert network.upper_bound("other") == math.inf
    assert FilterNetwork(Untraceable(), (3, 16, 16)).upper_bound("conv1") == math.inf


def test_first_layers_read_the_input_directly() -> None:
    network = FilterNetwork(Concatenating(), (3, 8, 8))
    assert [layer.name for layer in network.layers if network.is_first(layer.name)] == ["left", "right"]
    hooked = FilterNetwork(Untraceable(), (3, 16, 16))
    assert [layer.name for layer in hooked.layers if hooked.is_first(layer.name)] == ["conv1"]


def test_norms_found_by_trace_else_by_order() -> None:
    expected = {"conv1": "bn1", "conv2": "bn2"}
    assert tracing.norms_behind(Plain()) == expected
    assert tracing.norms_behind(Untraceable()) == expected

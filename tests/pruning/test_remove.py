from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from marks import slow
from networks import Concatenating, Dense, Flattening, Plain, Residual, mask_without, randomise_norms
from torch import Tensor, nn

from prune_viz.channels.coupling import find_groups
from prune_viz.loading.smaller_networks import resize_to
from prune_viz.network.cost import count_cost, count_macs
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.merging import merge_filters
from prune_viz.pruning.remove import remove_filters
from prune_viz.runs.decisions_json import Merge
from prune_viz.utils.errors import UserError


def _random_masks(model: nn.Module, share: float = 0.3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Masks that agree wherever layers have as many filters, so that coupled channels do go."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            generator = torch.Generator().manual_seed(seed + module.out_channels)
            mask = torch.rand(module.out_channels, generator=generator) > share
            mask[0] = True
            masks[name] = mask
    return masks


SMALL = {"plain": (Plain, 3, 16), "residual": (Residual, 3, 16), "concatenating": (Concatenating, 3, 16),
         "flattening": (Flattening, 1, 8), "dense": (Dense, 3, 16)}  # fmt: skip


def _check_removed_equals_masked(model: nn.Module, channels: int, size: int, tolerance: float) -> None:
    example = torch.randn(2, channels, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some random masks cut through groups
        masks = reconcile_masks(model, _random_masks(model), example)
    assert masks.removed > 0
    smaller = remove_filters(model, masks, example)
    masked = apply_masks(copy.deepcopy(model), masks).eval()
    with torch.no_grad():
        torch.testing.assert_close(smaller(example), masked(example), rtol=0, atol=tolerance)
    again = copy.deepcopy(model).eval()
    resize_to(again, masks, smaller.state_dict())  # from the shapes of the weights alone
    with torch.no_grad():
        assert torch.equal(again(example), smaller(example))
    before, after = count_cost(model, (channels, size, size)), count_cost(smaller, (channels, size, size))
    assert after[0] < before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("name", SMALL)
def test_removed_equals_masked(name: str) -> None:
    torch.manual_seed(0)
    make, channels, size = SMALL[name]
    _check_removed_equals_masked(randomise_norms(make()), channels, size, 1e-4)


FAST = ["squeezenet1_1"]
SLOW = ["resnet18", "mobilenet_v2", "mnasnet0_5",
        "vgg11_bn", "resnext50_32x4d", "densenet121", "mobilenet_v3_small", "efficientnet_b0",
        "regnet_y_400mf", "googlenet"]  # fmt: skip


@pytest.mark.parametrize("name", [*FAST, *(slow(name) for name in SLOW)])
def test_removed_equals_masked_on_torchvision_networks(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet's, of how weights will be drawn
        model = torchvision.models.get_model(name, weights=None, num_classes=10)
    size = 224 if name.startswith("vgg") else 96
    _check_removed_equals_masked(randomise_norms(model), 3, size, 1e-4)


@pytest.mark.slow
def test_channels_mixed_by_a_norm_are_kept_and_noted() -> None:
    torch.manual_seed(0)
    model = torchvision.models.convnext_tiny(weights=None, num_classes=10).eval()
    with pytest.warns(UserWarning, match="layer norm"):
        masks = reconcile_masks(model, _random_masks(model), torch.zeros(1, 3, 64, 64))
    assert masks.removed == 0
    masked = apply_masks(copy.deepcopy(model), _random_masks(model))  # masking still works
    assert (masked.features[0][0].weight[~_random_masks(model)["features.0.0"]] == 0).all()


def _with_copy(model: Plain, scale: float) -> Masks:
    """Make filter 6 of conv2 `scale` times filter 1, and give the masks that merge it away."""
    with torch.no_grad():
        model.conv2.weight[6] = model.conv2.weight[1]
        for name in ("running_mean", "running_var"):
            getattr(model.bn2, name)[6] = getattr(model.bn2, name)[1]
        for name in ("weight", "bias"):
            getattr(model.bn2, name)[6] = scale * getattr(model.bn2, name)[1]
    mask = torch.ones(8, dtype=torch.bool)
    mask[6] = False
    return Masks({"conv2": mask}, (Merge("conv2", 6, (1,), (scale,), 0.0),))


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_merging_a_copy_is_exact(scale: float) -> None:
    model = randomise_norms(Plain())
    masks = _with_copy(model, scale)
    x = torch.randn(4, 3, 16, 16)
    smaller = remove_filters(model, masks, x, compensate="merge")
    plain = remove_filters(model, masks, x)
    assert smaller.conv2.out_channels == 7
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)
        assert (plain(x) - model(x)).abs().max() > 20 * (smaller(x) - model(x)).abs().max()


def test_merging_through_a_flatten_is_exact() -> None:
    model = Flattening()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.conv, name)[4] = 3 * getattr(model.conv, name)[2]
    mask = torch.tensor([True, True, True, True, False, True])
    x = torch.randn(4, 1, 8, 8)
    smaller = remove_filters(
        model, Masks({"conv": mask}, (Merge("conv", 4, (2,), (3.0,), 0.0),)), x, compensate="merge"
    )
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_constant_moves_into_bias_or_norm(layer: str) -> None:
    model = randomise_norms(Plain(padding=0))
    with torch.no_grad():
        if layer == "conv3":
            model.conv3.weight[2], model.conv3.bias[2] = 0, 0.7
        else:
            norm = {"conv1": model.bn1, "conv2": model.bn2}[layer]
            norm.weight[2], norm.bias[2] = 0, 0.7
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    x = torch.randn(4, 3, 16, 16)
    smaller = remove_filters(
        model, Masks({layer: mask}, (Merge(layer, 2, (), (), 0.7),)), x, compensate="merge"
    )
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)


def test_merge_reaches_through_a_depthwise_chain() -> None:
    model = randomise_norms(Residual())
    with torch.no_grad():
        for conv, norm in ((model.expand, model.bn3), (model.depthwise, model.bn4)):
            conv.weight[9] = conv.weight[4]
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name)[9] = getattr(norm, name)[4]
    mask = torch.ones(16, dtype=torch.bool)
    mask[9] = False
    x = torch.randn(2, 3, 12, 12)
    masks = Masks({"expand": mask, "depthwise": mask}, (Merge("expand", 9, (4,), (1.0,), 0.0),))
    smaller = remove_filters(model, masks, x, compensate="merge")
    assert smaller.depthwise.groups == 15
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_merge_of_a_filter_that_stays_is_left_out() -> None:
    model = randomise_norms(Plain())
    masks = _with_copy(model, 1.0)
    masks["conv2"][6] = True
    before = model.conv3.weight.clone()
    merge_filters(model, masks, find_groups(model, torch.zeros(1, 3, 16, 16)))
    assert torch.equal(model.conv3.weight, before)


@pytest.mark.parametrize("compensate", ["none", "merge"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_removal_leaves_the_model_and_trains(compensate: str, share: float) -> None:
    model = randomise_norms(Plain()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = _random_masks(model, share)
    smaller = remove_filters(model, masks, torch.zeros(1, 3, 16, 16), compensate)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    smaller.train()(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())
    torch.optim.SGD(smaller.parameters(), lr=1.0).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_masked_model_can_be_made_smaller() -> None:
    model = randomise_norms(Plain())
    masks, x = _random_masks(model), torch.randn(2, 3, 16, 16)
    apply_masks(model, masks)
    smaller = remove_filters(model, masks, x)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-5)
    assert (model.conv1.weight[~masks["conv1"]] == 0).all()


def test_smaller_network_loads_from_its_checkpoint() -> None:
    model = randomise_norms(Plain(padding=0))
    with torch.no_grad():
        model.bn2.weight[2], model.bn2.bias[2] = 0, 0.7
    mask = torch.ones(8, dtype=torch.bool)
    mask[2] = False
    x = torch.randn(4, 3, 16, 16)
    masks = Masks({"conv2": mask}, (Merge("conv2", 2, (), (), 0.7),))
    smaller = remove_filters(model, masks, x, compensate="merge")
    again = Plain(padding=0).eval()
    resize_to(again, masks, smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), smaller(x))
    state = dict(smaller.state_dict())
    with pytest.raises(UserError, match="conv2 has 3 filters, its mask keeps 7"):
        resize_to(Plain(padding=0), masks, {**state, "conv2.weight": state["conv2.weight"][:3]})
    with pytest.raises(UserError, match="not what is left of"):
        resize_to(Plain(padding=0), masks, {**state, "conv1.weight": torch.zeros(9, 3, 3, 3)})
    with pytest.raises(UserError, match="do not fit"):
        resize_to(
            Plain(padding=0), masks, {name: one for name, one in state.items() if name != "conv1.weight"}
        )


def test_cost_of_a_known_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 10))
    parameters, macs = count_cost(model, (3, 4, 4))
    assert parameters == 8 * 27 + 8 * 16 * 10 + 10
    assert macs == 16 * 8 * 27 + 8 * 16 * 10


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="--compensate"):
        remove_filters(Plain(), {}, torch.zeros(1, 3, 16, 16), compensate="magic")
    with pytest.raises(UserError, match="another model"):
        remove_filters(Plain(), {"nope": torch.ones(3, dtype=torch.bool)}, torch.zeros(1, 3, 16, 16))


def test_each_modules_own_cost_is_counted() -> None:
    class Padded(nn.Conv2d):
        """A convolution that holds the module which pads its input."""

        def __init__(self) -> None:
            super().__init__(3, 4, 3)
            self.pad = nn.ZeroPad2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.pad(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([Padded(), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1))])
            self.mix = nn.Parameter(torch.ones(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.body:
                x = part(x)
            return x.mean(dim=(2, 3)) @ self.mix

    costs = count_macs(Net(), (3, 8, 8))
    assert costs == {"": 4, "body.0": 3 * 4 * 9 * 64, "body.1.1": 4 * 2 * 64}
    assert sum(costs.values()) == count_cost(Net(), (3, 8, 8))[1]


class _Shared(nn.Module):
    """Two convolutions whose outputs pass one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(6)
        self.one, self.two = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.one(self.first(x))).relu() + self.norm(self.two(x)).relu())


def test_constant_stays_out_of_a_norm_that_others_use() -> None:
    torch.manual_seed(0)
    model = randomise_norms(_Shared())
    with torch.no_grad():
        model.first.weight[3], model.first.bias[3] = 0, 0.7
    masks = Masks({"first": mask_without(8, 3)}, (Merge("first", 3, (), (), 0.7),))
    images = torch.randn(2, 3, 8, 8)
    smaller = remove_filters(model, masks, images[:1], compensate="merge")
    torch.testing.assert_close(smaller(images), model(images), rtol=1e-4, atol=1e-5)


def test_masks_on_a_deep_copy_leave_a_parametrised_original() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), nn.Conv2d(8, 2, 1))
    images = torch.randn(1, 3, 4, 4)
    before = model(images)
    apply_masks(copy.deepcopy(model), {"0": mask_without(8, 1)})
    assert torch.equal(model(images), before)


def test_cost_of_a_network_with_a_class_token() -> None:
    class Token(nn.Module):
        """Hands a layer a parameter that is expanded over the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.token.expand(len(x), -1, -1))

    model = Token()
    assert count_cost(model, (3, 4, 4)) == (8 + 8 * 8 + 8, 8 * 8)
    assert all(parameter.requires_grad for parameter in model.parameters())

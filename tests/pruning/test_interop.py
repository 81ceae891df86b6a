from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from networks import Plain, Residual, mask_without, randomise_norms
from torch import nn
from torch.nn.utils import prune

from prune_viz.network.copies import plain_copy
from prune_viz.pruning.apply import apply_masks, make_permanent
from prune_viz.pruning.interop import prune_with_torch, to_indices, to_nni
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.errors import UserError

MASKS = {"conv1": mask_without(8, 0, 3), "conv2": mask_without(8), "conv3": mask_without(8, 7)}


def test_torch_pruning_masks_the_same() -> None:
    model = randomise_norms(Plain())
    ours = apply_masks(copy.deepcopy(model), MASKS)
    prune_with_torch(model, MASKS)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,))
    torch.testing.assert_close(model(x), ours(x))
    assert prune.is_pruned(model)
    assert {"conv1.weight_orig", "conv1.weight_mask", "bn1.bias_mask"} <= set(model.state_dict())
    steps = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    model.eval()(x)
    assert (model.bn1(model.conv1(x))[:, [0, 3]] == 0).all()
    trained = model(x)
    twin = plain_copy(model)  # though torch's hooks leave tensors behind that cannot be copied
    torch.testing.assert_close(twin(x), trained)
    smaller = remove_filters(model, MASKS, x)
    assert smaller.conv1.out_channels == 6
    torch.testing.assert_close(smaller(x), trained, rtol=0, atol=1e-5)
    assert prune.is_pruned(model)
    make_permanent(model)
    assert set(model.state_dict()) == set(Plain().state_dict())
    torch.testing.assert_close(model(x), trained)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.parametrize("first", [apply_masks, prune_with_torch])
@pytest.mark.parametrize("then", [apply_masks, prune_with_torch])
def test_masks_of_both_kinds_can_follow_each_other(first, then) -> None:
    model = randomise_norms(Plain())
    then(first(model, {"conv1": mask_without(8, 2)}), {"conv1": mask_without(8, 5)})
    maps = model.bn1(model.conv1(torch.randn(2, 3, 16, 16)))
    silent = [bool((maps[:, index] == 0).all()) for index in range(8)]
    assert silent == [False, False, True, False, False, True, False, False]


def test_nni_gets_a_float_mask_of_each_parameters_shape() -> None:
    model = randomise_norms(Plain())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = to_nni(model, MASKS)
    assert set(found) == {"conv1", "conv3"}
    assert set(found["conv1"]) == {"weight"}
    assert set(found["conv3"]) == {"weight", "bias"}
    assert found["conv1"]["weight"].shape == model.conv1.weight.shape
    assert found["conv1"]["weight"].dtype == torch.float32
    assert found["conv1"]["weight"].flatten(1).mean(dim=1).tolist() == [0, 1, 1, 0, 1, 1, 1, 1]
    assert found["conv3"]["bias"].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_of_another_model_are_refused() -> None:
    for export in (prune_with_torch, to_nni):
        with pytest.raises(UserError, match="no layer of filters 'conv9'"):
            export(Plain(), {"conv9": mask_without(8, 1)})


def test_torch_pruning_indices_remove_the_same() -> None:
    model = randomise_norms(Residual())
    masks = {"expand": mask_without(16, 4, 9), "depthwise": mask_without(16, 4, 9)}
    assert to_indices({**masks, "inner": mask_without(8)}) == {"expand": [4, 9], "depthwise": [4, 9]}
    x = torch.randn(2, 3, 16, 16)
    ours = remove_filters(model, masks, x)
    theirs = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(theirs, x, verbose=False)
    graph.get_pruning_group(theirs.expand, tp.prune_conv_out_channels, to_indices(masks)["expand"]).prune()
    torch.testing.assert_close(theirs.eval()(x), ours(x))

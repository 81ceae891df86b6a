from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Concatenating, Flattening, Plain, Residual, randomise_norms
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import group_of_layer
from prune_viz.channels.labelling import UntraceableError

IMAGE = torch.zeros(1, 3, 16, 16)


def test_a_plain_chain_has_a_group_a_layer() -> None:
    groups = find_groups(Plain(), IMAGE)
    assert [(group.layers, [consumer.module for consumer in group.consumers]) for group in groups] == [
        (["conv1"], ["conv2"]), (["conv2"], ["conv3"]), (["conv3"], ["head"]),
    ]  # fmt: skip
    assert all(group.removable for group in groups)


def test_residual_and_depthwise_tie_filters() -> None:
    groups = group_of_layer(find_groups(Residual(), IMAGE))
    assert groups["stem"].layers == ["stem", "outer", "project"]
    assert {consumer.module for consumer in groups["stem"].consumers} == {"inner", "expand", "head"}
    assert groups["expand"].layers == ["expand", "depthwise"]
    assert [consumer.module for consumer in groups["expand"].consumers] == ["project"]


def test_a_concatenation_shifts_the_second_branch() -> None:
    groups = group_of_layer(find_groups(Concatenating(), IMAGE))
    (consumer,) = groups["right"].consumers
    assert consumer.module == "consumer"
    assert consumer.indices[np.argsort(consumer.channels)].tolist() == [4, 5, 6, 7, 8, 9]


def test_a_flatten_spreads_a_channel_over_features() -> None:
    (group,) = find_groups(Flattening(), torch.zeros(1, 1, 8, 8))
    (consumer,) = group.consumers
    assert sorted(consumer.indices[consumer.channels == 2].tolist()) == list(range(2 * 64, 3 * 64))


def test_what_cannot_be_removed_is_said() -> None:
    groups = group_of_layer(find_groups(Concatenating(), IMAGE))
    assert not groups["out"].removable
    assert "output" in groups["out"].note
    grouped = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
    )
    groups = group_of_layer(find_groups(grouped, IMAGE))
    assert not groups["3"].removable
    assert groups["0"] is groups["1"]  # whole groups of the grouped convolution go
    assert groups["0"].channels == 2


def test_frozen_training_models_are_traced_unchanged() -> None:
    model = Plain().requires_grad_(False).train()
    assert len(find_groups(model, IMAGE)) == 3
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


class FindsNothing(nn.Module):
    """A detector whose heads see only what it finds, which is nothing on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.neck = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.inner, self.outer = nn.Conv2d(6, 5, 3), nn.Conv2d(5, 2, 1)
        self.whole = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = torch.relu(self.stem(images))
        regions = torch.relu(self.neck(maps))
        regions = regions[images.mean(dim=(1, 2, 3)) > 1e6]
        return self.whole(maps), self.outer(torch.relu(self.inner(regions)))


def test_what_only_sees_findings_is_kept_where_there_are_none() -> None:
    groups = group_of_layer(find_groups(FindsNothing(), IMAGE))
    assert groups["stem"].removable
    assert {consumer.module for consumer in groups["stem"].consumers} == {"neck", "whole"}
    for name in ("neck", "inner", "outer"):
        assert not groups[name].removable
    for name in ("neck", "inner"):
        assert groups[name].note.startswith("nothing is found on the input that it is traced on")


def test_a_model_that_does_not_run_is_untraceable() -> None:
    with pytest.raises(UntraceableError):
        find_groups(Plain(), torch.zeros(1, 5, 16, 16))


class Normalised(nn.Module):
    """Channels scaled to one norm together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=1)


class Between(nn.Module):
    """Two convolutions with something in between, and what is returned."""

    def __init__(self, between, reads: int = 8, returned=lambda first, second: second) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second = nn.Conv2d(reads, 4, 1)
        self.third = nn.Conv2d(4, 2, 1)
        self.returned = returned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.between(self.first(x))
        return self.returned(maps, self.third(self.second(maps)))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Between(nn.Softmax(dim=1)), "mixes"),
        (Between(lambda maps: maps - maps.mean(dim=1, keepdim=True)), "mixes"),
        (Between(lambda maps: nn.functional.normalize(maps, dim=1)), "mixes"),
        (Between(torch.sigmoid), "another value"),
        (
            Between(nn.Sequential(randomise_norms(nn.BatchNorm2d(8)), nn.Sigmoid())),
            "another value",
        ),
        (Between(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(8, affine=False))), "another value"),
        (Between(nn.Sequential(nn.InstanceNorm2d(8), Normalised())), "mixes"),
        (Between(torch.relu, returned=lambda first, second: (second, first)), "output"),
    ],
    ids=[
        "softmax",
        "mean",
        "normalize",
        "sigmoid",
        "norm and sigmoid",
        "sigmoid and norm",
        "instance norm and normalize",
        "returned",
    ],
)
def test_mixed_or_returned_channels_are_kept(model: nn.Module, why: str) -> None:
    group = group_of_layer(find_groups(model.eval(), IMAGE))["first"]
    assert not group.removable
    assert why in group.note


@pytest.mark.parametrize("between", [
    nn.ReLU(), nn.MaxPool2d(2), nn.Hardswish(), nn.Dropout2d(), nn.PReLU(8),
    nn.Sequential(nn.ReLU(), randomise_norms(nn.BatchNorm2d(8))),
])  # fmt: skip
def test_what_leaves_channels_apart_is_removable(between: nn.Module) -> None:
    groups = group_of_layer(find_groups(Between(between).eval(), IMAGE))
    assert groups["first"].removable
    assert groups["second"].removable
    assert not groups["third"].removable


def test_reshaped_windows_end_in_time() -> None:
    swin = SwinTransformer(
        [4, 4], 24, [2, 2], [1, 2], [8, 8], num_classes=3, block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )  # fmt: skip
    stream, *hidden = find_groups(swin, torch.zeros(1, 3, 64, 64))
    assert not stream.removable
    assert "layer norm" in stream.note
    mlps = {f"features.{stage}.{block}.mlp.0" for stage in (1, 3) for block in (0, 1)}
    assert mlps <= {layer for group in hidden if group.removable for layer in group.layers}


class _SumOfConcatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.both, self.consumer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.left(images), self.right(images)], dim=1)
        return self.consumer((joined + self.both(images)).relu()).mean(dim=(2, 3))


def test_sum_with_concatenation_is_one_group() -> None:
    groups = group_of_layer(find_groups(_SumOfConcatenation(), IMAGE))
    group = groups["left"]
    assert group is groups["right"] is groups["both"]
    assert group.channels == 8
    placed = {places.module: places.channels.tolist() for places in group.producers}
    assert placed == {"left": [0, 1, 2, 3], "right": [4, 5, 6, 7], "both": list(range(8))}


def test_indices_of_positions_are_no_labels() -> None:
    class Best(nn.Module):
        """Returns where its maps are largest, as detectors choose their boxes."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.scores = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scores = self.scores(self.first(x).relu())
            places = scores[0].flatten().topk(40).indices
            return scores, places[places.argsort(descending=True)[:5]]

    torch.manual_seed(0)
    groups = group_of_layer(find_groups(Best().eval(), torch.randn(1, 3, 32, 32)))
    assert groups["first"].removable
    assert "topk" in groups["scores"].note


class _EquallyWide(nn.Module):
    """Attention over positions whose output is given the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 8, 1)
        self.between, self.last, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.third(self.second(self.first(images)).relu())
        return self.out(self.last(self.between(maps).relu()).reshape(maps.shape)).mean(dim=(2, 3))


def test_groups_that_must_be_equally_wide_do_not_both_go() -> None:
    groups = group_of_layer(find_groups(_EquallyWide().eval(), IMAGE))
    assert [groups[name].removable for name in ("first", "second", "between")] == [True] * 3
    assert not (groups["third"].removable and groups["last"].removable)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Concatenating, Flattening, Plain, Residual, randomise_norms
from torch import nn

from prune_viz.calibration.images import NOISE_IMAGES, calibration_size, natural_noise, noise_and_stimuli
from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup, group_of_layer
from prune_viz.feature_visualization.priors import tile
from prune_viz.feature_visualization.responses import response_matrix
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.redundancy import gram_matrices as module
from prune_viz.redundancy.gram_matrices import gather_gram_matrices
from prune_viz.redundancy.judge import judge
from prune_viz.utils.memory import Budget


def test_response_matrix_holds_the_norms_of_feature_maps() -> None:
    model = randomise_norms(Plain())
    images = torch.randn(5, 3, 16, 16)
    matrix = response_matrix(FilterNetwork(model, (3, 16, 16)), "conv1", images)
    maps = torch.relu(model.bn1(model.conv1(images)))
    expected = [[float(maps[i, j].norm()) for j in range(8)] for i in range(5)]
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)


def _gram_matrices(model: nn.Module, layer: str, images: torch.Tensor, channels: int = 3):
    groups = find_groups(model, images[:1])
    group = group_of_layer(groups)[layer]
    return gather_gram_matrices(model, [group], lambda: [(images[:6], False), (images[6:], True)])[
        group.number
    ]


def _slow(rows: np.ndarray) -> np.ndarray:
    with_one = np.hstack([rows, np.ones((len(rows), 1))])
    return sum(np.outer(row, row) for row in with_one) / len(with_one)


def test_gram_matrix_equals_slow_sum_with_padding() -> None:
    model = randomise_norms(Plain()).double()
    images = torch.randn(9, 3, 6, 6, dtype=torch.float64)
    (gram_matrices,) = _gram_matrices(model, "conv1", images)
    maps = F.pad(
        torch.relu(model.bn1(model.conv1(images))), (1, 0, 1, 0)
    ).detach()  # stride 2: one side is read
    rows = maps.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gram_matrices.fit, _slow(rows[:6].reshape(-1, 8)), rtol=1e-9)
    np.testing.assert_allclose(gram_matrices.held_out, _slow(rows[6:].reshape(-1, 8)), rtol=1e-9)
    inner = rows[:, 1:, 1:].reshape(-1, 8)
    np.testing.assert_allclose(gram_matrices.mean, inner.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(gram_matrices.variance, inner.var(axis=0), rtol=1e-9)
    np.testing.assert_allclose(gram_matrices.peak, np.abs(inner).max(axis=0), rtol=1e-9)


def test_gram_matrix_behind_a_flatten_takes_positions() -> None:
    model = Flattening().double()
    images = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    (gram_matrices,) = _gram_matrices(model, "conv", images)
    rows = torch.relu(model.conv(images)).detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(gram_matrices.fit, _slow(rows[:6].reshape(-1, 6)), rtol=1e-9)
    weight = model.head.weight.detach().view(3, 6, 64)
    np.testing.assert_allclose(
        gram_matrices.weight_gram, torch.einsum("oip,ojp->ij", weight, weight), rtol=1e-6
    )


def test_gram_matrix_of_a_concatenated_branch_is_its_own() -> None:
    model = Concatenating().double()
    images = torch.randn(9, 3, 6, 6, dtype=torch.float64)
    (gram_matrices,) = _gram_matrices(model, "right", images)
    maps = F.pad(torch.relu(model.right(images)), (1, 1, 1, 1)).detach()
    np.testing.assert_allclose(
        gram_matrices.fit, _slow(maps[:6].permute(0, 2, 3, 1).reshape(-1, 6).numpy()), rtol=1e-9
    )


def test_residual_stream_has_gram_matrices_per_consumer() -> None:
    gram_matrices = _gram_matrices(randomise_norms(Residual()), "stem", torch.randn(9, 3, 8, 8))
    assert sorted(consumer.consumer for consumer in gram_matrices) == ["expand", "head", "inner"]


def test_weight_gram_predicts_loss_of_1x1_consumer() -> None:
    model = randomise_norms(Plain()).double()
    images = torch.randn(9, 3, 6, 6, dtype=torch.float64)
    (gram_matrices,) = _gram_matrices(model, "conv2", images)
    maps = torch.relu(model.bn2(model.conv2(torch.relu(model.bn1(model.conv1(images)))))).detach()
    without = maps.clone()
    without[:, [2, 5]] = 0
    lost = (model.conv3(maps) - model.conv3(without))[:6].square().sum(dim=1).mean()
    removed = [2, 5]
    predicted = (
        gram_matrices.weight_gram[np.ix_(removed, removed)] * gram_matrices.fit[np.ix_(removed, removed)]
    ).sum()
    assert float(predicted) == pytest.approx(float(lost), rel=1e-9)
    outputs = model.conv3(maps).detach().transpose(0, 1).flatten(1).numpy()
    assert gram_matrices.output_variance == pytest.approx(outputs.var(axis=1).sum(), rel=1e-9)


def test_padding_is_read_off_sizes_so_that_subclasses_count() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(F.pad(x, (1, 2, 1, 2)))

    conv = Same(2, 2, 4)
    inputs = torch.randn(1, 2, 9, 9)
    assert module._padding(conv, inputs, conv(inputs)) == [1, 2, 1, 2]
    assert module._padding(nn.Conv2d(2, 2, 3), inputs, torch.zeros(1, 2, 7, 7)) == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [24, 28, 40, 56, 64, 112])
def test_large_maps_are_thinned_over_rows_and_columns(size: int) -> None:
    grid = torch.arange(float(size * size)).view(1, 1, size, size)
    picked = module._thin(grid).ravel()
    assert len(picked.unique()) == module.POSITIONS
    assert len((picked // size).unique()) > min(size, 64) / 2
    assert len((picked % size).unique()) > min(size, 64) / 2


def test_strided_transposed_consumer_takes_no_constant() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0.7
    images = torch.randn(8, 3, 8, 8)
    group = group_of_layer(find_groups(model, images[:1]))["0"]
    gram_matrices = gather_gram_matrices(model, [group], lambda: [(images, False), (images, True)])[
        group.number
    ]
    assert (gram_matrices[0].fit[:, -1] == 0).all()
    assert judge(group, gram_matrices).channels[2].verdict == "keep"


def test_smooth_weight_gram_is_response_to_flat_loss() -> None:
    model = randomise_norms(Plain(padding=0)).double()
    (gram_matrices,) = _gram_matrices(model, "conv1", torch.randn(9, 3, 12, 12, dtype=torch.float64))
    flat = torch.zeros(1, 8, 9, 9, dtype=torch.float64)
    flat[:, 3] = 1
    assert gram_matrices.smooth_weight_gram[3, 3] == pytest.approx(
        float(model.conv2(flat)[0, :, 2, 2].square().sum())
    )


def test_tiles_repeat_the_stimulus() -> None:
    image = torch.randn(2, 3, 4, 5)
    tiled = tile(image, (9, 7))
    assert tiled.shape == (2, 3, 9, 7)
    assert torch.equal(tiled[..., 4:8, 5:7], image[..., :4, :2])


def test_images_are_noise_then_stimuli_a_quarter_held_out() -> None:
    layers = [torch.randn(10, 3, 4, 4).half().numpy(), torch.randn(7, 3, 8, 8).half().numpy()]
    batches = list(noise_and_stimuli(layers, 3, (8, 8), seed=0))
    assert sum(len(batch) for batch, _ in batches) == NOISE_IMAGES + 17
    assert all(batch.shape[1:] == (3, 8, 8) for batch, _ in batches)
    held_out = sum(len(batch) for batch, flag in batches if flag)
    assert held_out == NOISE_IMAGES // 4 + 2 + 1
    assert torch.equal(natural_noise((3, 8, 8), 4, 0), natural_noise((3, 8, 8), 4, 0))


def test_calibration_size_is_fixed_behind_a_flatten() -> None:
    assert calibration_size(Flattening(), (1, 8, 8), (4, 4)) == (8, 8)
    assert calibration_size(Plain().eval(), (3, 64, 64), (32, 32)) == (32, 32)


def test_batches_in_parts_give_the_same_gram_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise_norms(Residual()).eval()
    groups = [group for group in find_groups(model, torch.zeros(1, 3, 16, 16)) if group.removable]
    images = [(torch.randn(32, 3, 16, 16), False), (torch.randn(8, 3, 20, 20), True)]
    whole = gather_gram_matrices(model, groups, lambda: images)
    begun = []
    forward = model.forward

    def short(x: torch.Tensor) -> torch.Tensor:
        found = forward(x)
        if len(x) > 16:  # when the hooks have summed their part already
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(model, "forward", short)
    parts = gather_gram_matrices(model, groups, lambda: begun.append(1) or images)
    assert len(begun) == 2
    monkeypatch.undo()
    budgeted = gather_gram_matrices(
        model, groups, lambda: images, Budget(torch.device("cpu"), 0)
    )  # a row at a time
    for other in (parts, budgeted):
        for number, consumers in whole.items():
            for one, same in zip(consumers, other[number], strict=True):
                np.testing.assert_allclose(same.fit, one.fit, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(same.held_out, one.held_out, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(same.peak, one.peak, rtol=1e-4)
                assert same.output_variance == pytest.approx(one.output_variance, rel=1e-4)


def test_groups_are_taken_in_turns_that_fit() -> None:
    groups = find_groups(Residual(), torch.zeros(1, 3, 16, 16))

    def size(turn: list[CouplingGroup]) -> int:
        squares = [8 * (group.channels + 1) ** 2 for group in turn]
        kept = sum(8 * len(group.consumers) * square for group, square in zip(turn, squares, strict=True))
        return kept + 10 * max(squares)

    for most in (0, max(size([group]) for group in groups), size(groups) - 1, size(groups)):
        turns = list(module.rounds(groups, most))
        assert [group for turn in turns for group in turn] == groups
        assert all(len(turn) == 1 or size(turn) <= most for turn in turns)
        # No turn could have taken the next one's first group too.
        for turn, later in pairwise(turns):
            assert size([*turn, later[0]]) > most
    assert len(list(module.rounds(groups, size(groups)))) == 1
    assert len(list(module.rounds(groups, 0))) == len(groups)

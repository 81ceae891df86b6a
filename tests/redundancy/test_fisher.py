"""Sensitivities against closed forms and against what really happens to the output."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from networks import Flattening, Plain, Residual, randomise_norms
from scipy.stats import spearmanr
from torch import Tensor, nn

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.output_kinds import find_output_kind
from prune_viz.redundancy.fisher import FisherMatrices, gather_fisher
from prune_viz.runs.damage import Unit
from prune_viz.runs.output_kind import OutputKind, Task

SHAPES = {Plain: (3, 12, 12), Residual: (3, 12, 12), Flattening: (1, 8, 8)}


def _case(kind: type[nn.Module]) -> tuple[nn.Module, list[CouplingGroup], Tensor]:
    torch.manual_seed(1)
    model = randomise_norms(kind())
    for parameter in model.head.parameters():
        parameter.data *= 3  # scores that differ enough to tell one input from another
    shape = SHAPES[kind]
    images = torch.randn(64, *shape)
    return model, find_groups(model, torch.zeros(1, *shape)), images


def _fisher(
    model: nn.Module, groups: list[CouplingGroup], inputs: Callable[[], Iterable[Tensor]], seed: int
) -> FisherMatrices | None:
    """`gather_fisher`, what the network returns being found out."""
    return gather_fisher(model, groups, inputs, find_output_kind(model, next(iter(inputs()))[:4]), seed)


def _drawn_often(images: Tensor, times: int) -> list[Tensor]:
    return [images] * times


def _divergence(before: Tensor, after: Tensor) -> float:
    before, after = before.double().log_softmax(1), after.double().log_softmax(1)
    return float((before.exp() * (before - after)).sum(1).mean())


@pytest.mark.parametrize("kind", SHAPES)
def test_ablation_is_divergence_of_a_weakened_channel(kind: type[nn.Module]) -> None:
    model, groups, images = _case(kind)
    found = _fisher(model, groups, lambda: _drawn_often(images, 40), seed=0)
    before = model(images).detach()
    modules = dict(model.named_modules())
    share = 0.02
    for group in groups:
        if not group.removable:
            continue
        expected = []
        for channel in range(group.channels):
            handles = []
            for places in group.consumers:
                index = torch.from_numpy(places.indices[places.channels == channel])

                def turn_down(module: nn.Module, arguments: tuple, index: Tensor = index) -> tuple:
                    maps = arguments[0].clone()
                    maps[:, index] *= 1 - share
                    return (maps,)

                handles.append(modules[places.module].register_forward_pre_hook(turn_down))
            with torch.no_grad():
                expected.append(_divergence(before, model(images)) / share**2)
            for handle in handles:
                handle.remove()
        # 2,560 drawn labels: a few percent of noise.
        assert np.array(expected) == pytest.approx(
            found.ablations[group.number], rel=0.2, abs=0.02 * max(expected)
        )


def test_fisher_at_scores_is_softmax_fisher() -> None:
    model, groups, images = _case(Plain)
    found = _fisher(model, groups, lambda: _drawn_often(images, 60), seed=0)
    p = model(images).detach().softmax(1).double()
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(torch.from_numpy(found.consumers["head"]), fisher, rtol=0.1, atol=0.01)


def test_fisher_at_labels_is_that_of_each_alone() -> None:
    model, groups, images = _case(Plain)
    kind = OutputKind(Task.LABELS)
    found = gather_fisher(model, groups, lambda: _drawn_often(images, 60), kind, seed=0)
    p = model(images).detach().sigmoid().double()
    fisher = torch.diag((p * (1 - p)).mean(0))
    torch.testing.assert_close(torch.from_numpy(found.consumers["head"]), fisher, rtol=0.1, atol=0.01)
    assert found.unit is Unit.LABELS


def test_fisher_at_dense_scores_is_a_mean_over_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    images = torch.randn(16, 3, 8, 8)
    groups = find_groups(model, images[:1])
    found = gather_fisher(model, groups, lambda: _drawn_often(images, 60), OutputKind(Task.DENSE), seed=0)
    p = model(images).detach().softmax(1).double().movedim(1, -1).flatten(0, -2)
    fisher = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(torch.from_numpy(found.consumers["2"]), fisher, rtol=0.1, atol=0.01)
    assert found.unit is Unit.POSITION


def test_without_scores_damage_is_squared_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Identity()).eval()
    model.add_module("last", nn.Conv2d(3, 2, 1, bias=False))
    images = torch.randn(32, 2, 6, 6)
    groups = find_groups(model, images[:1])
    group = next(group for group in groups if group.layers == ["2"])
    found = _fisher(model, groups, lambda: _drawn_often(images, 200), seed=0)
    with torch.no_grad():
        maps = model[2](model[1](model[0](images)))
        output = model(images)
        for channel in range(3):
            silenced = maps.clone()
            silenced[:, channel] = 0
            change = (model.last(silenced) - output).square().mean() / output.square().mean()
            assert found.ablations[group.number][channel] == pytest.approx(float(change), rel=0.15)
    # A change of the consumer's outputs at every position apart: squares add.
    expected = 2 * torch.eye(2, dtype=torch.float64) / (output.double().square().mean() * 2)
    torch.testing.assert_close(
        torch.from_numpy(found.consumers["last"]), expected, rtol=0.1, atol=0.05 * float(expected.max())
    )


def test_same_seed_same_images_model_unchanged() -> None:
    model, groups, images = _case(Residual)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = [_fisher(model, groups, lambda: images.split(16), seed=3) for _ in range(2)]
    for name, matrix in runs[0].consumers.items():
        assert np.array_equal(matrix, runs[1].consumers[name])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_gradient_means_no_fisher_matrices() -> None:
    class Closed(Plain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = randomise_norms(Closed())
    groups = find_groups(Plain().eval(), torch.zeros(1, 3, 12, 12))
    assert _fisher(model, groups, lambda: [torch.randn(4, 3, 12, 12)], seed=0) is None


class _Odd(Plain):
    """`Plain` whose output is made strange by a function of its scores."""

    def __init__(self, ending: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.ending = ending

    def forward(self, x: Tensor) -> object:
        return self.ending(super().forward(x))


@pytest.mark.parametrize(
    ("ending", "unit"),
    [
        (lambda y: y, "nats"),
        (lambda y: y.softmax(1), "nats"),
        (lambda y: {"scores": y, "penalty": y.square().mean()}, "nats"),
        (lambda y: [y, y], "output"),
        (lambda y: (y, y.argmax(1)), "nats"),
        (lambda y: y[:, :1], "output"),
        (lambda y: y[:, :, None], "output"),
        (lambda y: torch.fft.fft(y), None),
        (lambda y: y.square().sum(), None),
        (lambda y: 1e6 * y, None),
        (lambda y: y * float("nan"), None),
        (lambda y: torch.cat([y, y]), None),
    ],
)
def test_any_output_is_measured_in_its_unit_or_not_at_all(
    ending: Callable[[Tensor], object], unit: str | None
) -> None:
    torch.manual_seed(0)
    model = randomise_norms(_Odd(ending))
    groups = find_groups(randomise_norms(Plain()), torch.zeros(1, 3, 12, 12))
    found = _fisher(model, groups, lambda: [torch.randn(8, 3, 12, 12)], seed=0)
    assert (None if found is None else found.unit) == unit


def test_probabilities_equal_their_scores() -> None:
    torch.manual_seed(0)
    scores, probabilities = Plain(), _Odd(lambda y: y.softmax(1))
    probabilities.load_state_dict(randomise_norms(scores).state_dict())
    groups = find_groups(scores, torch.zeros(1, 3, 12, 12))
    images = [torch.randn(32, 3, 12, 12)]
    one, other = (_fisher(model.eval(), groups, lambda: images, seed=0) for model in (scores, probabilities))
    for number, ablations in one.ablations.items():
        np.testing.assert_allclose(ablations, other.ablations[number], rtol=1e-3)


def test_consumers_of_other_rows_are_not_silent() -> None:
    class Halves(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv3(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))))
            rows = torch.cat([x[..., :3].mean((2, 3)), x[..., 3:].mean((2, 3))])
            return self.head(rows).view(2, -1, 5).mean(0)

    model = randomise_norms(Halves())
    groups = find_groups(model, torch.zeros(1, 3, 12, 12))
    assert _fisher(model, groups, lambda: [torch.randn(8, 3, 12, 12)], seed=0) is None


def test_silencing_is_ranked_as_it_really_goes() -> None:
    model, groups, images = _case(Plain)
    found = _fisher(model, groups, lambda: _drawn_often(images, 20), seed=0)
    before = model(images).detach()
    group = next(group for group in groups if group.layers == ["conv2"])
    real = []
    for channel in range(group.channels):
        weight = model.conv3.weight.data.clone()
        model.conv3.weight.data[:, channel] = 0
        real.append(_divergence(before, model(images).detach()))
        model.conv3.weight.data.copy_(weight)
    assert spearmanr(real, found.ablations[group.number])[0] > 0.8


@pytest.mark.parametrize("change", [lambda y: y, lambda y: y[:, None]])
def test_batches_that_run_in_parts_give_the_same(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise_norms(_Odd(change)).eval()
    groups = find_groups(randomise_norms(Plain()), torch.zeros(1, 3, 12, 12))
    images = torch.randn(32, 3, 12, 12)
    kind = find_output_kind(model, images[:4])
    whole = gather_fisher(model, groups, lambda: [images], kind, seed=0)
    begun, most = [], []
    forward = model.forward

    def short(x: Tensor) -> Tensor:
        most.append(len(x))
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x)

    monkeypatch.setattr(model, "forward", short)
    parts = gather_fisher(model, groups, lambda: begun.append(1) or [images], kind, seed=0)
    assert len(begun) == 3
    assert max(most[2:]) == 8
    assert parts.unit == whole.unit
    for name, matrix in parts.consumers.items():
        scale = np.abs(whole.consumers[name]).max()
        np.testing.assert_allclose(matrix, whole.consumers[name], rtol=1e-4, atol=1e-6 * scale)
    for number, ablations in parts.ablations.items():
        np.testing.assert_allclose(ablations, whole.ablations[number], rtol=1e-4)


def test_no_map_outlives_the_measuring() -> None:
    model, groups, images = _case(Residual)
    maps: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, given, output: maps.append(weakref.ref(given[0])))
    gc.collect()
    gc.disable()  # cycles through a graph would wait for it, and a network's maps with them
    try:
        assert _fisher(model, groups, lambda: images.split(16), seed=0) is not None
        assert maps
        assert not [ref for ref in maps if ref() is not None]
    finally:
        gc.enable()

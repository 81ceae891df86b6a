from __future__ import annotations

import math

import pytest
import torch
from marks import slow
from networks import Plain, Residual, randomise_norms
from torch import Tensor, nn

from prune_viz.feature_visualization import search, stimuli
from prune_viz.feature_visualization.optimiser import (
    OPEN_ROUNDS,
    ROUNDS,
    draw_noise,
    images_at,
    points_at,
    rounds,
)
from prune_viz.feature_visualization.priors import NaturalPrior, make_prior
from prune_viz.feature_visualization.stimuli import STEPS, find_stimuli, maximize
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.devices import pick_device
from prune_viz.utils.errors import UserError

LINEAR = {
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (3, 10, 10)),
    "strided": (nn.Conv2d(3, 4, 5, stride=2), (3, 11, 11)),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2), (2, 10, 10)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), (4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(2, 4, 3, stride=2), (2, 7, 7)),
    "1d": (nn.Conv1d(3, 4, 5), (3, 24)),
    "3d": (nn.Conv3d(2, 3, 3), (2, 5, 5, 5)),
}


def _matrix(conv: nn.Module, shape: tuple[int, ...], filter: int, colour) -> Tensor:
    """The linear map from white coordinates to one filter's map, column by column."""
    size = math.prod(shape)
    with torch.no_grad():
        return conv(colour(torch.eye(size).view(size, *shape)))[:, filter].flatten(1).T


@pytest.mark.parametrize("prior", ["none", "natural"])
@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_best_linear_input_is_a_singular_vector(kind: str, prior: str, seed: int) -> None:
    conv, shape = LINEAR[kind]
    torch.manual_seed(seed)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(conv.bias)
    model = nn.Sequential(conv)
    bounds = make_prior(prior, shape[0], shape[1:])
    found = maximize(model, "0", input_shape=shape, prior=prior, canvas=max(shape[1:]))
    for index, activation in enumerate(found.activations.tolist()):
        best = float(torch.linalg.svdvals(_matrix(conv, shape, index, bounds.colour))[0]) * bounds.radius
        assert 0.999 * best <= activation <= 1.0001 * best


def test_reported_activation_is_the_norm_of_the_feature_map() -> None:
    model = randomise_norms(Plain())
    found = maximize(model, "conv2", [1, 5], input_shape=(3, 24, 24), steps=8)
    x = torch.relu(model.bn1(model.conv1(found.images)))
    maps = torch.relu(model.bn2(model.conv2(x)))
    expected = torch.stack([maps[0, 1].norm(), maps[1, 5].norm()])
    torch.testing.assert_close(found.activations, expected, rtol=1e-4, atol=1e-4)


def test_stimuli_stay_inside_the_prior() -> None:
    model = randomise_norms(Plain())
    for prior in ("none", "natural"):
        bounds = make_prior(prior, 3, (24, 24))
        found = maximize(model, "conv2", input_shape=(3, 24, 24), prior=prior, steps=8)
        white = found.images
        if isinstance(bounds, NaturalPrior):
            white = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(bounds.mix), white)
            white = torch.fft.irfft2(torch.fft.rfft2(white) / bounds.amplitude, s=(24, 24))
        assert (white.flatten(1).norm(dim=1) <= 1.001 * bounds.radius).all()


@pytest.mark.slow
def test_a_stimulus_depends_on_its_own_filter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FilterNetwork(randomise_norms(Residual()), (3, 24, 24))
    for layer in ("outer", "depthwise"):
        together = find_stimuli(network, layer, steps=24)
        with monkeypatch.context() as patch:
            patch.setitem(search.BATCH, "cpu", 4)
            patch.setattr(stimuli, "_POOL_VALUES", 5 * 3 * 24 * 24)
            turned = find_stimuli(network, layer, [3, 5, 2, 0, 1, 7], steps=24)
            # Batches of odd sizes round differently, which the searches of these two do not widen.
            patch.setitem(search.BATCH, "cpu", 1)
            alone = find_stimuli(network, layer, [3, 5], steps=24)
        chosen = [3, 5, 2, 0, 1, 7]
        assert torch.equal(turned.images, together.images[chosen])
        assert torch.equal(turned.activations, together.activations[chosen])
        assert torch.equal(turned.steps, together.steps[chosen])
        torch.testing.assert_close(alone.images, together.images[[3, 5]], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.activations, together.activations[[3, 5]], rtol=1e-4, atol=1e-4)
        other = find_stimuli(network, layer, [3], steps=24, seed=1)
        assert not torch.allclose(other.images, turned.images[:1], atol=1e-2)


def test_what_feeds_a_depthwise_filter_may_be_given() -> None:
    network = FilterNetwork(randomise_norms(Residual()), (3, 24, 24))
    fed = find_stimuli(network, "expand", [3, 9], steps=12).images
    given = find_stimuli(
        network, "depthwise", [3, 9], steps=12, fed=fed.half()
    )  # as a run directory holds them
    assert torch.equal(given.images, find_stimuli(network, "depthwise", [3, 9], steps=12).images)


@pytest.mark.parametrize(("activation", "known"), [(True, ROUNDS), (False, OPEN_ROUNDS)])
def test_rounds_take_the_steps_but_for_a_third_of_the_last_one_before_an_activation(
    activation: bool, known: tuple[tuple[int, float], ...]
) -> None:
    turns = rounds(STEPS, activation)
    assert [(turn.steps, turn.angle) for turn in turns] == list(known)
    assert [turn.number for turn in turns] == list(range(len(known)))
    for steps in range(1, 600):
        lengths = [turn.steps for turn in rounds(steps, activation)]
        left_over = (steps - 44) // 3 if activation and steps > 44 else 0
        assert sum(lengths) == steps - left_over
        assert lengths[:-1] == [length for length, _ in known][: len(lengths) - 1]


@pytest.mark.parametrize("weight", [1.0, 1.3])
def test_maps_without_an_activation_are_raised_to_one_sign(weight: float) -> None:
    # Six or -6 * weight at every position: from noise, patches of either would stand against each other.
    model = nn.Sequential(
        nn.Conv2d(1, 2, 5, padding=2, bias=False), nn.ReLU6(), nn.Conv2d(2, 1, 1, bias=False)
    )
    model[0].weight.data = torch.stack([torch.ones(1, 5, 5), -torch.ones(1, 5, 5)])
    model[2].weight.data = torch.tensor([1.0, -weight]).view(1, 2, 1, 1)
    for seed in range(3):
        found = maximize(model, "2", input_shape=(1, 32, 32), steps=16, seed=seed)
        torch.testing.assert_close(float(found.activations), 6 * weight * 32, rtol=0.01, atol=0)
        values = model(found.images).detach()
        assert float(values.sum().abs()) > 0.99 * float(values.abs().sum())


def test_easy_filters_stop_early_bounded_at_bound() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU6())
    model[0].weight.data.mul_(50)
    model[2].weight.data.abs_().mul_(50)
    found = maximize(model, "2", input_shape=(3, 24, 24))
    bound = 6 * math.sqrt(20 * 20)
    assert (found.activations > 0.9 * bound).all()
    assert (found.activations <= 1.0001 * bound).all()
    assert (found.steps == ROUNDS[0][0]).all()
    assert maximize(model, "2", [1], input_shape=(3, 24, 24), steps=5).steps.tolist() == [5]


class _Greedy:
    """A network whose maps need more memory than there is for more than some inputs at once."""

    def __init__(self, network: FilterNetwork, most: int, error: Exception) -> None:
        self.network, self.most, self.error, self.sizes = network, most, error, []

    def __getattr__(self, name: str):
        return getattr(self.network, name)

    def maps(self, name: str):
        inner = self.network.maps(name)

        def limited(inputs: Tensor) -> tuple[Tensor, Tensor]:
            self.sizes.append(len(inputs))
            if len(inputs) > self.most:
                raise self.error
            return inner(inputs)

        return limited


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        slow(RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: "
                          "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)")),
        slow(MemoryError()),
    ],
)  # fmt: skip
def test_out_of_memory_halves_the_batch_and_goes_on(error: Exception) -> None:
    network = FilterNetwork(randomise_norms(Residual(16)), (3, 16, 16))
    greedy = _Greedy(network, 8, error)
    found = find_stimuli(greedy, "expand", steps=24)
    assert max(greedy.sizes) == 32
    assert greedy.sizes.count(32) == greedy.sizes.count(16) == 1  # halved twice, and stays so
    assert torch.equal(found.images, find_stimuli(network, "expand", steps=24).images)


def test_one_input_too_many_is_said() -> None:
    greedy = _Greedy(FilterNetwork(Plain(), (3, 16, 16)), 0, MemoryError())
    with pytest.raises(UserError, match="not enough memory for a single input"):
        find_stimuli(greedy, "conv1", steps=2)
    broken = _Greedy(FilterNetwork(Plain(), (3, 16, 16)), 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        find_stimuli(broken, "conv1", steps=2)


def test_the_model_is_left_alone() -> None:
    model = randomise_norms(Residual()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    maximize(model, "inner", [0], input_shape=(3, 16, 16), steps=2)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _threshold_net(bias: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(model[0].bias, bias)
    return model


def test_a_filter_that_starts_silent_gets_going() -> None:
    model = _threshold_net(-6.0)
    bounds = make_prior("natural", 3, (16, 16))
    noise = torch.stack([draw_noise(f"0/0/{number}/0", (3, 16, 16)) for number in (0, 1)])
    assert (model(images_at(points_at(noise), bounds, (16, 16))) == 0).all()
    found = maximize(model, "0", input_shape=(3, 16, 16), steps=32)
    assert (found.activations > 1).all()


def test_a_filter_behind_a_silent_one_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first convolution fires on inputs of some strength only, so faint noise sends no gradient back.
    model = nn.Sequential(*_threshold_net(-3.0), nn.Conv2d(2, 2, 1), nn.ReLU())
    nn.init.constant_(model[2].weight, 1.0)
    nn.init.constant_(model[2].bias, -0.1)
    found = maximize(model, "2", input_shape=(3, 16, 16), steps=16)
    assert (found.activations > 1).all()
    for name in ("RESTARTS", "DRAFT_RESTARTS"):
        monkeypatch.setattr(search, name, 0)
    assert (maximize(model, "2", input_shape=(3, 16, 16), steps=16).activations == 0).all()


def test_a_depthwise_filter_starts_from_what_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first convolution answers to a fine pattern alone, which neither noise nor a broad pattern holds.
    first, second = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 3, groups=2)
    first.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(2, 1, 2, 2).clone()
    nn.init.constant_(first.bias, -0.7)
    nn.init.constant_(second.weight, 1.0)
    nn.init.zeros_(second.bias)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(2, 2, 1))
    network = FilterNetwork(model, (1, 16, 16))
    assert [network.producer(layer.name) for layer in network.layers] == [None, "0", None]
    assert (find_stimuli(network, "2", steps=16).activations > 1).all()
    monkeypatch.setattr(FilterNetwork, "producer", lambda self, name: None)
    assert (find_stimuli(network, "2", steps=16).activations == 0).all()


def test_a_dead_filter_is_reported_at_zero() -> None:
    found = maximize(_threshold_net(-1e4), "0", input_shape=(3, 16, 16), steps=8)
    assert (found.activations == 0).all()
    assert torch.isfinite(found.images).all()


def test_a_saturated_map_is_pulled_further_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU6())
    model[0].weight.data.mul_(200)
    network = FilterNetwork(model, (3, 16, 16))
    short, long = find_stimuli(network.draft, "0", steps=2), find_stimuli(network, "0", steps=32)
    before = [
        network.maps("0")(s.images)[0][[0, 1], [0, 1]].clamp_min(0).flatten(1).norm(dim=1)
        for s in (short, long)
    ]
    assert (before[1] > 1.05 * before[0]).all()


def test_non_finite_values_stay_with_their_filter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3, groups=3))
    healthy = maximize(model, "0", input_shape=(3, 16, 16), steps=24)
    assert healthy.diverged == []
    model[0].weight.data[1] = 3e38
    ill = maximize(model, "0", input_shape=(3, 16, 16), steps=24)
    assert ill.diverged == [1]
    assert torch.equal(ill.images[[0, 2]], healthy.images[[0, 2]])
    assert torch.isfinite(ill.images).all()
    assert math.isnan(ill.activations[1])
    assert ill.plot().axes[1].get_title() == "1"
    model[0].weight.data[1] = math.nan  # which reaches every input's gradient
    with pytest.raises(UserError, match="not finite"):
        maximize(model, "0", input_shape=(3, 16, 16), steps=24)


def test_a_passing_overflow_leaves_the_best_finite_stimulus() -> None:
    class Cliff(nn.Conv2d):
        """Answers to brightness, until there is too much of it."""

        def forward(self, input: Tensor) -> Tensor:
            bright = super().forward(input)
            return torch.where(bright > 0.45, bright / 0, bright)

    model = nn.Sequential(Cliff(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    found = maximize(model, "0", input_shape=(1, 16, 16), steps=24)
    assert found.diverged == [0]
    assert torch.isfinite(found.images).all()
    assert 0 < float(found.activations[0]) <= 0.45 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv9"}, "no layer of filters matches"),
        ({"filters": [8]}, "no filter 8"),
        ({"filters": []}, "no filters were asked for"),
        ({"steps": 0}, "--steps"),
        ({"prior": "strange"}, "--prior"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        maximize(Plain(), **{"layer": "conv1", "input_shape": (3, 16, 16), **options})
    with pytest.raises(UserError, match="--device"):
        pick_device("abacus")


@pytest.mark.parametrize("prior", ["natural", "none"])
def test_stimuli_follow_the_units_of_inputs(prior: str) -> None:
    model = randomise_norms(Plain())
    twin = randomise_norms(Plain())
    twin.load_state_dict(model.state_dict())
    twin.conv1.weight.data /= 256
    shape, pixels = (3, 24, 24), torch.rand(12, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    measured = {"images": pixels, "mean": [0.5, 0.4, 0.3], "std": [1.0, 0.5, 2.0]}
    for known in ({"mean": 0.5, "std": 1.0}, measured):
        larger = {**known, "std": torch.tensor(known["std"]).div(256).tolist()}
        one = maximize(model, "conv2", [0, 3], input_shape=shape, steps=24, prior=prior, **known)
        other = maximize(twin, "conv2", [0, 3], input_shape=shape, steps=24, prior=prior, **larger)
        torch.testing.assert_close(other.images / 256, one.images, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(other.activations, one.activations, rtol=1e-3, atol=1e-3)
        assert one.statistics is not None
        assert one.plot().axes[0].get_title() == "0"


def test_plot_draws_every_filter() -> None:
    figure = maximize(Plain(), "conv1", [0, 3, 4], input_shape=(3, 16, 16), steps=2).plot(columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["0", "3", "4", ""]

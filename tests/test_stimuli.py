from __future__ import annotations

import math

import pytest
import torch
from networks import Plain, Residual, randomise_norms
from torch import Tensor, nn

from prune_viz import stimuli as module
from prune_viz.ascent import roll
from prune_viz.devices import pick_device
from prune_viz.errors import UserError
from prune_viz.filters import FilterNetwork
from prune_viz.priors import NaturalPrior, make_prior, natural_amplitude
from prune_viz.stimuli import ascend, maximize

LINEAR = {
    "2d": (nn.Conv2d(3, 4, 3, padding=1), (3, 10, 10)),
    "strided": (nn.Conv2d(3, 4, 5, stride=2), (3, 11, 11)),
    "dilated": (nn.Conv2d(2, 4, 3, dilation=2), (2, 10, 10)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), (4, 9, 9)),
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
def test_best_input_of_a_linear_convolution_is_a_singular_vector(kind: str, prior: str) -> None:
    conv, shape = LINEAR[kind]
    torch.manual_seed(0)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(conv.bias)
    model = nn.Sequential(conv)
    bounds = make_prior(prior, shape[0], shape[1:])
    found = maximize(model, "0", input_shape=shape, prior=prior, steps=256, canvas=max(shape[1:]))
    for index, activation in enumerate(found.activations.tolist()):
        best = float(torch.linalg.svdvals(_matrix(conv, shape, index, bounds.colour))[0]) * bounds.radius
        assert activation >= 0.97 * best  # close singular values part slowly
        assert activation <= 1.0001 * best


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


def test_a_stimulus_depends_on_its_own_filter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FilterNetwork(randomise_norms(Plain()), (3, 24, 24))
    together = ascend(network, "conv2", steps=12)
    monkeypatch.setattr(module, "BATCH", 3)
    turned = ascend(network, "conv2", [6, 2, 5, 0], steps=12)
    torch.testing.assert_close(turned.images, together.images[[6, 2, 5, 0]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(turned.activations, together.activations[[6, 2, 5, 0]], rtol=1e-4, atol=1e-4)
    again = ascend(network, "conv2", [6, 2, 5, 0], steps=12)
    assert torch.equal(again.images, turned.images)
    other = ascend(network, "conv2", [6], steps=12, seed=1)
    assert not torch.allclose(other.images, turned.images[:1], atol=1e-2)


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
    noise, _ = module._draw(0, "0", [0, 1], (3, 16, 16), 1)
    assert (model(bounds.colour(module._to_radius(noise, bounds.radius))) == 0).all()
    found = maximize(model, "0", input_shape=(3, 16, 16), steps=32)
    assert (found.activations > 1).all()


def test_a_filter_behind_a_silent_one_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first convolution fires on inputs of some strength only, so faint noise sends no gradient back.
    model = nn.Sequential(*_threshold_net(-3.0), nn.Conv2d(2, 2, 1), nn.ReLU())
    nn.init.constant_(model[2].weight, 1.0)
    nn.init.constant_(model[2].bias, -0.1)
    found = maximize(model, "2", input_shape=(3, 16, 16), steps=16)
    assert (found.activations > 1).all()
    monkeypatch.setattr(module, "RESTARTS", 0)
    assert (maximize(model, "2", input_shape=(3, 16, 16), steps=16).activations == 0).all()


def test_a_depthwise_filter_starts_from_what_feeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first convolution answers to a fine pattern alone, which neither noise nor a broad pattern holds.
    first, second = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 3, groups=2)
    first.weight.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(2, 1, 2, 2).clone()
    nn.init.constant_(first.bias, -0.5)
    nn.init.constant_(second.weight, 1.0)
    nn.init.zeros_(second.bias)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(2, 2, 1))
    network = FilterNetwork(model, (1, 16, 16))
    assert [network.feeder(layer.name) for layer in network.layers] == [None, "0", None]
    assert (ascend(network, "2", steps=16).activations > 1).all()
    monkeypatch.setattr(FilterNetwork, "feeder", lambda self, name: None)
    assert (ascend(network, "2", steps=16).activations == 0).all()


def test_a_dead_filter_is_reported_at_zero() -> None:
    found = maximize(_threshold_net(-1e4), "0", input_shape=(3, 16, 16), steps=8)
    assert (found.activations == 0).all()
    assert torch.isfinite(found.images).all()


def test_a_saturated_map_is_pulled_further_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU6())
    model[0].weight.data.mul_(200)
    network = FilterNetwork(model, (3, 16, 16))
    short, long = (ascend(network, "0", steps=steps) for steps in (2, 32))
    before = [
        network.maps("0")(s.images)[0][[0, 1], [0, 1]].clamp_min(0).flatten(1).norm(dim=1)
        for s in (short, long)
    ]
    assert (before[1] > 1.05 * before[0]).all()


def test_infinity_in_one_ascent_stays_there() -> None:
    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = Overflowing()
    healthy = maximize(model, "conv", input_shape=(3, 16, 16), steps=6)
    model.conv.weight.data[1] = 3e38
    ill = maximize(model, "conv", input_shape=(3, 16, 16), steps=6)
    torch.testing.assert_close(ill.images[[0, 2]], healthy.images[[0, 2]], rtol=1e-3, atol=1e-3)


def test_roll_is_torch_roll_with_offsets_of_its_own() -> None:
    images = torch.randn(3, 2, 5, 7)
    shifts = torch.tensor([[0, 0], [2, -3], [-1, 6]])
    expected = torch.stack(
        [torch.roll(i, (-int(s[0]), -int(s[1])), (1, 2)) for i, s in zip(images, shifts, strict=True)]
    )
    assert torch.equal(roll(images, shifts), expected)
    assert torch.equal(roll(roll(images, shifts), -shifts), images)


def test_natural_prior_is_symmetric_and_has_variance_one() -> None:
    bounds = make_prior("natural", 3, (12, 10))
    one, other = torch.randn(2, 1, 3, 12, 10)
    torch.testing.assert_close(
        (bounds.colour(one) * other).sum(), (one * bounds.colour(other)).sum(), rtol=1e-4, atol=1e-4
    )
    noise = make_prior("natural", 3, (32, 32)).colour(torch.randn(400, 3, 32, 32))
    assert abs(float(noise.square().mean()) - 1) < 0.1
    red, blue = noise[:, 0].flatten(), noise[:, 2].flatten()
    assert abs(float(torch.corrcoef(torch.stack([red, blue]))[0, 1]) - 0.79) < 0.05


def test_natural_amplitude_falls_as_one_over_frequency() -> None:
    amplitude = natural_amplitude((64, 64), 1.0)
    assert float(amplitude[0, 4] / amplitude[0, 16]) == pytest.approx(4.0, rel=1e-4)
    assert float(amplitude[0, 0]) == pytest.approx(float(amplitude[0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "conv9"}, "no convolution matches"),
        ({"filters": [8]}, "no filter 8"),
        ({"steps": 0}, "--steps"),
        ({"prior": "strange"}, "--prior"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        maximize(Plain(), **{"layer": "conv1", "input_shape": (3, 16, 16), **options})
    with pytest.raises(UserError, match="--device"):
        pick_device("abacus")


def test_plot_draws_every_filter() -> None:
    figure = maximize(Plain(), "conv1", [0, 3, 4], input_shape=(3, 16, 16), steps=2).plot(columns=2)
    assert [axis.get_title() for axis in figure.axes] == ["0", "3", "4", ""]

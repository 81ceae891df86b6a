"""Networks of every make that people have: analysed, and made smaller, as far as they go."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from networks import Plain, mask_without
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from prune_viz.analysis.pipeline import analyze
from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import group_of_layer
from prune_viz.feature_visualization.optimiser import optimise, points_at
from prune_viz.feature_visualization.priors import make_prior
from prune_viz.feature_visualization.responses import map_norms
from prune_viz.network.copies import plain_copy
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.map_reading import read_maps
from prune_viz.pruning.apply import apply_masks, make_permanent
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.remove import remove_filters
from prune_viz.utils.errors import LayerError, UserError
from prune_viz.utils.nested_tensors import tensors_of

PICTURE = (3, 16, 16)


class Two(nn.Module):
    """Two convolutions with a rectifier after each, and a head over the means of what they give."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        self.one = wrap(nn.Conv2d(3, 6, 3))
        self.two = wrap(nn.Conv2d(6, 6, 3))
        self.head = nn.Linear(6, 3)
        nn.init.constant_(self.two.bias, 0.3)  # none is silent by chance

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x).mean(dim=(2, 3)))


class Causal(nn.Conv1d):
    """Pads what lies before alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


class WaveNet(nn.Module):
    """Gated causal convolutions in lists, their outputs summed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Causal(1, 6, 2)
        self.filters = nn.ModuleList(Causal(6, 6, 2, dilation=2**power) for power in range(2))
        self.gates = nn.ModuleList(Causal(6, 6, 2, dilation=2**power) for power in range(2))
        self.last = nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for given, gate in zip(self.filters, self.gates, strict=True):
            x = x + torch.tanh(given(x)) * torch.sigmoid(gate(x))
        return self.last(F.relu(x))


class Recurrent(Two):
    """Runs its second convolution three times, and a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.never = nn.Conv2d(6, 2, 1)

    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        for _ in range(3):
            x = F.relu(self.two(x))
        return x


class Shared(Two):
    """Two names of one layer, two layers of one weight, which all stay, and one that may lose filters."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.named = nn.ModuleDict({"same": self.two, "like": nn.Conv2d(6, 6, 3, padding=1)})
        self.named["like"].weight = self.two.weight
        self.last = nn.Conv2d(6, 6, 1)

    def maps(self, x: Tensor) -> Tensor:
        x = F.silu(self.one(x))
        for layer in self.named.values():
            x = F.gelu(layer(x))
        return F.relu(self.last(x))


@dataclasses.dataclass
class Scores:
    scores: Tensor
    maps: Tensor
    threshold: float = 0.5


class Named(NamedTuple):
    scores: Tensor
    aux: Tensor | None


class Returning(Two):
    """Returns what `wrap` makes of its scores and maps."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        return self.wrap(self.head(maps.mean(dim=(2, 3))), maps)


class Listing(Two):
    """Takes pictures one by one, as detectors do."""

    def forward(self, images: Any) -> Any:
        return [{"scores": Two.forward(self, image[None])[0]} for image in images]


class Spectrogram(Two):
    """Convolves over time and frequency what comes as a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        window = torch.hann_window(32, device=x.device)
        spectrum = torch.stft(x.flatten(1), 32, 16, window=window, return_complex=True)
        return super().forward(spectrum.abs().add(1e-3).log()[:, None])


class Film(Two):
    """Looks at every frame of (C, T, H, W), the frames of all films in one batch, and reads them in order."""

    def __init__(self) -> None:
        super().__init__()
        self.consumer = nn.GRU(6, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, frames, *size = x.shape
        maps = self.maps(x.transpose(1, 2).reshape(count * frames, channels, *size))
        read, _ = self.consumer(maps.mean(dim=(2, 3)).view(count, frames, -1))
        return self.head(read[:, -1])


class Checkpointed(Two):
    def maps(self, x: Tensor) -> Tensor:
        return F.relu(checkpoint(self.two, F.relu(self.one(x)), use_reentrant=False))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.up, self.both = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        shallow = F.relu(self.down(x))
        up = self.up(F.relu(self.deep(shallow)))
        return self.out(F.relu(self.both(torch.cat([shallow, up], dim=1))))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def _symmetric() -> nn.Module:
    model = Two()
    parametrize.register_parametrization(model.two, "weight", Symmetric())
    return model


def _quantised_in_training() -> nn.Module:
    quantization = torch.ao.quantization
    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
        quantization.DeQuantStub(),
    ).train()  # fmt: skip
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.fuse_modules_qat(model, ["1", "2", "3"], inplace=True)
        prepared = quantization.prepare_qat(model)
    prepared(torch.randn(4, *PICTURE))
    return prepared


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "causal": (WaveNet, (1, 64)),
    "recurrent": (Recurrent, PICTURE),
    "shared": (Shared, PICTURE),
    "weight norm": (lambda: Two(parametrizations.weight_norm), PICTURE),
    "older weight norm": (lambda: Two(weight_norm), PICTURE),
    "spectral norm": (lambda: Two(parametrizations.spectral_norm), PICTURE),
    "older spectral norm": (lambda: Two(spectral_norm), PICTURE),
    "parametrised": (_symmetric, PICTURE),
    "dataclass": (lambda: Returning(Scores), PICTURE),
    "named tuple": (lambda: Returning(lambda scores, maps: Named(scores, None)), PICTURE),
    "dictionary": (lambda: Returning(lambda *parts: {"deep": {"scores": parts[0]}, "number": 3}), PICTURE),
    "list of pictures": (Listing, PICTURE),
    "spectrogram": (Spectrogram, (1, 256)),
    "film": (Film, (3, 3, 12, 12)),
    "checkpointed": (Checkpointed, PICTURE),
    "transposed and joined": (UNet, PICTURE),
    "half precision": (lambda: Two().half(), PICTURE),
    "bfloat16": (lambda: Two().bfloat16(), PICTURE),
    "double": (lambda: Two().double(), PICTURE),
}
SLOW = (
    "causal", "recurrent", "shared", "transposed and joined", "weight norm", "older spectral norm",
    "dataclass", "named tuple", "list of pictures", "half precision", "double", "film", "spectrogram",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", [name if name not in SLOW else slow(name) for name in NETWORKS])
def test_networks_are_looked_at_judged_and_made_smaller(name: str) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    found = analyze(model, input_shape=shape, steps=3)
    assert (found.filters["activation"] > 0).mean() > 0.5
    assert found.filters["damage"].notna().any()

    masks = {layer: mask_without(len(mask), 0) for layer, mask in found.masks.items()}
    example = torch.zeros(1, *shape)
    consistent = reconcile_masks(model, masks, example)
    assert not all(mask.all() for mask in consistent.values())
    smaller = remove_filters(model, masks, example).float()
    masked = apply_masks(plain_copy(model).float(), consistent)
    given = torch.randn(2, *shape)
    with torch.no_grad():
        for one, other in zip(tensors_of(smaller(given)), tensors_of(masked(given)), strict=True):
            if one.shape == other.shape:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_networks_that_quantise_in_training_are_looked_at() -> None:
    found = analyze(_quantised_in_training().eval(), input_shape=PICTURE, steps=3)
    assert (found.filters["activation"] > 0).all()


def test_failing_layer_is_reported_others_go_on(tmp_path: Path) -> None:
    class Stepped(Recurrent):
        def maps(self, x: Tensor) -> Tensor:
            return F.relu(self.two((self.one(x) > 0).float()))

    torch.manual_seed(0)
    found = analyze(Stepped(), input_shape=PICTURE, steps=3, out=tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert "two could not be analysed: no gradient leads from its maps to the input." in notes
    assert any(note.startswith("never never runs") for note in notes)
    by_layer = found.filters.groupby("layer")["activation"]
    assert by_layer.get_group("one").gt(0).all()
    assert by_layer.get_group("two").isna().all()
    assert found.filters["verdict"].ne("dead").all()
    again = analyze(Stepped(), input_shape=PICTURE, steps=3, out=tmp_path / "run", fresh=True)
    assert again.summary["filters"] == 12


def test_a_layer_that_fails_on_a_stimulus_is_reported(tmp_path: Path) -> None:
    class Fussy(Two):
        def maps(self, x: Tensor) -> Tensor:
            x = F.relu(self.one(x))
            if len(x) > 2:
                raise ValueError("too many")
            return F.relu(self.two(x))

    network = FilterNetwork(Fussy(), PICTURE)
    with pytest.raises(LayerError, match=r"two: the model fails on a stimulus \(too many\)"):
        network.maps("two")(torch.zeros(3, *PICTURE))


def test_layers_that_run_several_times_are_named(tmp_path: Path) -> None:
    network = FilterNetwork(Recurrent(), PICTURE)
    assert network.repeated == {"two": 3}
    assert network.skipped == ["never"]


class OneAtATime(Two):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(1, -1)


def test_single_input_networks_are_not_judged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = analyze(OneAtATime(), input_shape=PICTURE, steps=3, out=tmp_path / "run")
    assert (found.filters["activation"] > 0).all()
    assert (found.filters["verdict"] == "unjudged").all()
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert any("one input at a time" in note for note in notes)


class Mixing(Two):
    """Its batch norm takes the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.norm(self.one(x)))))


@pytest.mark.parametrize(("make", "shape"), [(Mixing, PICTURE), (Listing, PICTURE), (Film, (3, 3, 12, 12))])
def test_rows_of_a_batch_give_what_they_give_alone(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    network = FilterNetwork(make(), shape)
    inputs = torch.randn(3, *shape)
    for layer in ("one", "two"):
        maps = network.maps(layer)
        together = torch.linalg.vector_norm(maps(inputs)[1].flatten(2), dim=2)
        alone = [torch.linalg.vector_norm(maps(row[None])[1].flatten(2), dim=2) for row in inputs]
        torch.testing.assert_close(together, torch.cat(alone))
        torch.testing.assert_close(read_maps(network, [layer], lambda: [inputs], map_norms)[layer], together)
    model = make().eval()
    if make is Film:  # by hand: every frame alone
        model.load_state_dict(network._model.state_dict())
        with torch.no_grad():
            frames = [model.one(inputs[:, :, frame]).relu() for frame in range(3)]
        expected = torch.linalg.vector_norm(torch.stack(frames, dim=2).flatten(2), dim=2)
        torch.testing.assert_close(read_maps(network, ["one"], lambda: [inputs], map_norms)["one"], expected)


def test_a_silent_map_made_row_by_row_is_pulled_up() -> None:
    torch.manual_seed(0)
    model = Listing()
    with torch.no_grad():
        model.one.bias.fill_(-3.0)
    network = FilterNetwork(model, PICTURE)
    maps = network.maps("one")
    prior = make_prior("none", 3, PICTURE[1:])
    points = points_at(0.01 * torch.randn(2, *PICTURE))
    shifts = torch.zeros(6, 2, 2, dtype=torch.long)
    before = maps(torch.zeros(2, *PICTURE))[0].amax()
    moved, sound = optimise(maps, [0, 1], prior, PICTURE[1:], points, shifts, 0.4)
    images = prior.colour(prior.radius * moved[:, :-1].reshape(2, *PICTURE))
    reached = maps(images)[0]
    assert sound.all()
    assert reached[0, 0].amax() > before + 0.5
    assert reached[1, 1].amax() > before + 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        weight_norm,
        spectral_norm,
        lambda layer: weight_norm(layer, dim=None),
        lambda layer: weight_norm(layer, dim=1),
    ],
    ids=["weight", "spectral", "weight, whole", "weight, inputs"],
)
def test_masks_hold_over_the_older_norms(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        wrap(nn.Conv2d(3, 6, 3)),
        nn.ReLU(),
        wrap(nn.ConvTranspose2d(6, 5, 2, 2)),
        nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    )
    x = torch.randn(2, 3, 9, 9)
    model.train()(x)
    expected = plain_copy(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(expected(x), model(x))
        expected[0].weight[1], expected[0].bias[1] = 0, 0
        expected[2].weight[:, 2], expected[2].bias[2] = 0, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    apply_masks(model, {"0": mask_without(6, 1), "2": mask_without(5, 2)})
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    make_permanent(model.eval())
    assert (model[0].weight[1] == 0).all()
    assert (model[2].weight[:, 2] == 0).all()
    assert not torch.allclose(model[0].weight[0], expected[0].weight[0])
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"}


class Viewing(nn.Module):
    """Flattens and shuffles by `view`, which minds how maps lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.one(x)), 2)
        x = x.view(len(x), 2, -1, 8, 8).transpose(1, 2).contiguous().view(x.size(0), -1, 8, 8)
        return self.head(F.relu(self.two(x)).view(len(x), -1))


class Usual(Viewing):
    """The same, with control flow on data."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().sum()) >= 0 else x


@pytest.mark.parametrize("make", [slow(Viewing), Usual])
def test_maps_may_be_viewed_as_they_usually_lie(make: Callable[[], nn.Module], capfd: Any) -> None:
    model = make()
    network = FilterNetwork(model, PICTURE)
    assert not network.channels_last
    assert FilterNetwork(Two(), PICTURE).channels_last
    found = analyze(model, input_shape=PICTURE, steps=3)
    assert (found.filters["activation"] > 0).mean() > 0.8
    assert found.filters["damage"].notna().any()
    assert capfd.readouterr().err == ""


class Remembering(Two):
    """Adds what it saw last, counts its calls, and is read by a hook that keeps maps."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.calls = 0
        self.one.register_forward_hook(lambda module, given, output: self.seen.append(output))

    def maps(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.one(x))
        if self.last is not None:
            x = x + self.last
        self.last = x
        return F.relu(self.two(x))


def test_stateful_networks_are_left_as_they_were() -> None:
    model = Remembering().eval()
    model(torch.rand(1, *PICTURE))
    kept = model.last
    found = analyze(model, input_shape=PICTURE, steps=3)
    assert (found.filters["activation"] > 0).all()
    assert found.filters["damage"].notna().any()
    assert model.last is kept
    assert model.calls == 1
    assert len(model.one._forward_hooks) == 1
    network = FilterNetwork(model, PICTURE)
    x = torch.rand(2, *PICTURE)
    torch.testing.assert_close(network.maps("two")(x)[1], network.maps("two")(x)[1])


class Detecting(Two):
    """Returns what passes a threshold: nothing, as a rule."""

    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return scores, scores[scores > 1e6]


class Sequential(nn.Module):
    """Reads text off pictures: gives (columns, B, letters)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, (16, 3), padding=(0, 1))
        self.consumer, self.head = nn.LSTM(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.two(F.relu(self.one(x))))
        return self.head(self.consumer(maps.squeeze(2).permute(2, 0, 1))[0])


@pytest.mark.parametrize(("make", "shape"), [(Detecting, PICTURE), (Sequential, (1, 16, 24))])
def test_outputs_that_are_empty_or_sequences_are_judged(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = make()
    assert group_of_layer(find_groups(model, torch.zeros(1, *shape)))["one"].removable
    found = analyze(model, input_shape=shape, steps=3)
    assert found.filters[found.filters["layer"] == "one"]["damage"].notna().all()


class Standardised(nn.Conv2d):
    """Gives its weights zero mean and deviation one, filter by filter, as BiT and NFNets do."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        mean, deviation = flat.mean(dim=1)[:, None, None, None], flat.std(dim=1)[:, None, None, None]
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, self.stride, self.padding)


class Padding(nn.Conv2d):
    """Pads what it is given by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


@pytest.mark.parametrize(("kind", "removable"), [(Standardised, False), (Padding, True)])
def test_whole_weight_use_keeps_its_inputs(kind: type[nn.Conv2d], removable: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), kind(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    groups = group_of_layer(find_groups(model, torch.zeros(1, *PICTURE)))
    assert groups["0"].removable is removable
    assert groups["2"].removable
    if not removable:
        assert groups["0"].note == "what reads it computes with all its weights together"


class Written(Two):
    """Writes parts of its output in place, as YOLO's heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.det = nn.Conv2d(6, 14, 1)

    def forward(self, x: Tensor) -> Any:
        found = self.det(self.maps(x))
        count, _, height, width = found.shape
        found = found.reshape(count, 2, 7, height, width).permute(0, 1, 3, 4, 2).contiguous()
        boxes = found.sigmoid()
        boxes[..., 0:2] = boxes[..., 0:2] * 2 - 0.5
        boxes[..., 2:4] = (boxes[..., 2:4] * 2) ** 2
        return torch.cat([boxes.view(count, -1, 7)], 1), found


def test_output_written_in_place_is_kept() -> None:
    groups = group_of_layer(find_groups(Written(), torch.zeros(1, *PICTURE)))
    assert groups["one"].removable
    assert not groups["det"].removable
    assert "output" in groups["det"].note


class Mel(nn.Module):
    """A spectrum by convolution, its halves put together, and weighed: what the graph loses count of."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 6, 8, stride=4)
        self.register_buffer("bank", torch.rand(3, 5))
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.spectrum(x)
        power = (both[:, :3] ** 2 + both[:, 3:] ** 2).transpose(1, 2) @ self.bank
        return self.head(F.relu(self.two(F.relu(self.one(power[:, None])))).mean(dim=(2, 3)))


def test_one_layer_is_removed_despite_another_kept() -> None:
    smaller = remove_filters(Mel(), {"one": mask_without(6, 2)}, torch.zeros(1, 1, 64))
    assert smaller.one.out_channels == 5
    assert smaller.spectrum.out_channels == 6


class Complex(Two):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 6, 3).to(torch.complex64)

    def maps(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)).to(torch.complex64)).abs()


class WithMask(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.ones(len(x))


class Partial(Two):
    def __init__(self) -> None:
        super().__init__()
        self.two = WithMask(6, 6, 3)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x)))[0])


@pytest.mark.parametrize(
    ("make", "why"), [(Complex, "complex64, not real numbers"), (Partial, "no feature map but a tuple")]
)
def test_maps_that_are_none_are_reported(make: Callable[[], nn.Module], why: str, tmp_path: Path) -> None:
    found = analyze(make(), input_shape=PICTURE, steps=3, out=tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert any(note.startswith("two could not be analysed") and why in note for note in notes)
    assert found.filters[found.filters["layer"] == "one"]["activation"].gt(0).all()


def test_outputs_of_all_makes_give_their_tensors() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert tensors_of(Scores(one, two)) == [one, two]
    assert tensors_of(Named(one, None)) == [one]
    assert tensors_of({"a": [one, {"b": two}], "c": "word"}) == [one, two]
    assert tensors_of(Scores) == []


def test_what_returns_nothing_is_looked_at() -> None:
    torch.manual_seed(0)
    found = analyze(Returning(lambda *parts: None), input_shape=PICTURE, steps=3)
    assert (found.filters["verdict"] == "keep").all()


def test_masks_of_attention_may_hold_infinity() -> None:
    model = Plain()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    found = analyze(model, input_shape=PICTURE, steps=2, layers=["conv1"])
    assert len(found.filters) == 8


def test_layers_without_values_yet_get_one_line() -> None:
    with pytest.raises(UserError, match=r"0\.weight has no values yet"):
        FilterNetwork(nn.Sequential(nn.LazyConv2d(4, 3)), PICTURE)


def test_input_axes_beyond_first_convolution_are_tried() -> None:
    with pytest.raises(UserError, match="its first convolution works on 2 spatial axes"):
        FilterNetwork(Two(), (3, 64))
    with pytest.raises(UserError, match="the channels and one to three sizes"):
        FilterNetwork(Two(), (64,))
    network = FilterNetwork(Spectrogram(), (1, 256))
    assert [layer.receptive_field for layer in network.layers] == [None, None]
    assert [layer.canvas for layer in network.layers] == [(256,), (256,)]


class Conversing(nn.Module):
    """A recurrent layer reads one layer's maps, whose weights cannot be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.pool = nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d((4, 2))
        self.two, self.consumer = nn.Conv2d(8, 8, 3, padding=1), nn.GRU(64, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.two(self.pool(F.relu(self.one(x)))))
        return self.head(self.consumer(maps.permute(0, 3, 1, 2).flatten(2))[0])


def test_untraceable_layer_does_not_keep_others() -> None:
    groups = group_of_layer(find_groups(Conversing(), torch.zeros(1, 1, 32, 40)))
    assert groups["one"].removable
    assert not groups["two"].removable
    assert "which is no weight of a layer" in groups["two"].note

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from marks import slow
from networks import Concatenating, Flattening, Plain, Residual, randomise_norms
from safetensors.torch import save_file
from scores import SCORES, SCORING
from torch import Tensor, nn

from prune_viz.calibration import synthetic_images as calibration
from prune_viz.calibration.image_files import RunImages, load_synthetic_images, write_run_images
from prune_viz.calibration.images import Start, SyntheticImages, calibration_starts, natural_noise
from prune_viz.calibration.losses import Watched
from prune_viz.calibration.synthetic_images import calibrate
from prune_viz.calibration.variants import VARIANTS, variants
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.priors import make_prior, scene_exponent
from prune_viz.feature_visualization.stimuli import DRAFT_STEPS, find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import as_spectrograms
from prune_viz.utils import memory
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import Budget, RowBytes

pytestmark = pytest.mark.usefixtures("whole_calibration")


def _fed_with(model: nn.Module, images: Tensor) -> nn.Module:
    """Give the batch norms the statistics that some images feed them with."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over what comes
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def _distance(model: nn.Module, images: Tensor) -> float:
    """The distance, computed plainly from what a forward pass over all images feeds the batch norms."""
    errors = []

    def note(module: nn.BatchNorm2d, arguments: tuple[Tensor, ...]) -> None:
        values = arguments[0].transpose(0, 1).flatten(1)
        deviation = module.running_var.sqrt()
        mean = (values.mean(dim=1) - module.running_mean) / deviation
        spread = values.std(dim=1, correction=0) / deviation - 1
        errors.append((mean.square() + spread.square()).mean())

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(errors).mean())


def _truth(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network that was fed with smooth, bright images of low contrast."""
    torch.manual_seed(seed)
    images = 0.3 * natural_noise((3, 16, 16), 256, seed=5) + torch.tensor([0.5, 0.0, -0.5]).view(3, 1, 1)
    return _fed_with(randomise_norms(Residual()), images), images


@pytest.mark.parametrize("seed", [slow(0), slow(1)])
def test_the_batch_norms_come_to_see_what_they_saw(seed: int) -> None:
    model, images = _truth(seed)
    starts = natural_noise((3, 16, 16), 96, seed=1)
    found = calibrate(model, [Start(starts)], RunContext(seed, output=SCORES))
    assert found is not None
    assert found.images.shape == starts.shape
    assert found.distance < 0.1 * found.before
    # By an independent measure as well, of the images given back; real ones come to next to nothing.
    assert _distance(model, found.images) < 0.15 * _distance(model, starts)
    assert _distance(model, images) < 1e-3
    assert abs(_distance(model, found.images) - found.distance) < 0.3 * found.distance + 0.01


def test_calibration_repeats_and_leaves_the_model_alone() -> None:
    model, _ = _truth()
    before = copy.deepcopy(model.state_dict())
    starts = natural_noise((3, 16, 16), 40, seed=1)
    first, again, other = (
        calibrate(model, [Start(starts)], RunContext(seed, output=SCORES), passes=4) for seed in (0, 0, 1)
    )
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("model", [Concatenating(), Flattening()])
def test_no_batch_norm_no_calibration(model: nn.Module) -> None:
    channels = next(model.parameters()).shape[1]
    assert calibrate(model.eval(), [Start(torch.randn(8, channels, 8, 8))], SCORING) is None


class _Overflowing(nn.Module):
    """Squares that soon leave what floats hold, behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.late = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.late((1e30 * self.norm(x)) ** 2)


class _Closed(Plain):
    """A forward pass that lets no gradient through."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("model", [_Overflowing(), _Closed()])
def test_where_nothing_can_be_moved_it_says_so(model: nn.Module) -> None:
    assert calibrate(model.eval(), [Start(torch.randn(8, 3, 8, 8))], SCORING, passes=3) is None


def test_it_ends_when_the_distance_no_longer_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _truth()
    monkeypatch.setattr(calibration, "RATE", 0.0)
    found = calibrate(model, [Start(natural_noise((3, 16, 16), 32, seed=1))], SCORING, passes=200)
    assert found.passes < 60


def test_steps_follow_gradients_at_equal_length() -> None:
    gradient = torch.randn(3, 2, 5, 5) * torch.tensor([1e-6, 1.0, 1e3]).view(3, 1, 1, 1)
    chunk = torch.zeros(3, 2, 5, 5)
    stepper = calibration._Stepper(chunk)
    for _ in range(4):
        stepper.step(gradient, 0.1)
    for moved, pointed in zip(chunk, gradient, strict=True):
        expected = -0.4 * pointed / pointed.square().mean().sqrt()
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6)


def test_variants_are_shifted_mirrored_and_enlarged() -> None:
    signals = torch.randn(5, 2, 64)
    shifted = list(variants(signals, enlarge=True, seed=3))
    assert len(shifted) == VARIANTS
    for moved in shifted:
        assert moved.shape == signals.shape
        torch.testing.assert_close(moved.sort(dim=2)[0], signals.sort(dim=2)[0])
    assert len({float(moved[0, 0, 0]) for moved in shifted}) > 3
    pictures = torch.randn(4, 3, 16, 16)
    sizes = [moved.shape[2] for moved in variants(pictures, enlarge=True)]
    assert sizes == [16, 20] * (VARIANTS // 2)
    assert {moved.shape[2] for moved in variants(pictures, enlarge=False)} == {16}
    spectrograms = as_spectrograms(None, (3, 16, 16))
    assert {moved.shape[2] for moved in variants(pictures, enlarge=True, statistics=spectrograms)} == {16}


def test_half_of_starts_are_deep_live_drafts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(4)))
    with torch.no_grad():
        for block in model:
            block[0].weight.abs_()
        model[2][0].weight[1] = 0
        model[2][0].bias[1] = -1  # never active
    network = FilterNetwork(model, (3, 24, 24))
    leaves, stimuli = calibration_starts(network, (24, 24), 12, seed=0)
    assert leaves.images.shape == (7, 3, 24, 24)
    assert stimuli.images.shape == (5, 3, 24, 24)
    assert not leaves.owners
    assert stimuli.owners == (("2.0", 0), ("2.0", 2), ("3.0", 0), ("3.0", 1), ("3.0", 2))
    found = find_stimuli(network.draft, "3.0", steps=DRAFT_STEPS)
    torch.testing.assert_close(stimuli.images[2:], found.images)


def test_each_start_takes_its_own_contrast() -> None:
    prior = make_prior("natural", 3, (16, 16), exponent=scene_exponent((3, 16, 16)))
    random = torch.Generator().manual_seed(1)
    varied, seen = (prior.colour(torch.randn(n, 3, 16, 16, generator=random)) for n in (64, 256))
    flat = torch.randn(64, 3, 1, 1, generator=random).expand(-1, -1, 16, 16)
    for contrast in (0.2, 0.75):
        model = _fed_with(Plain(), contrast * seen)
        found = calibrate(model, [Start(varied), Start(flat), Start(flat[:0])], SCORING, passes=1).images
        assert found.shape == (128, 3, 16, 16)
        own, other = (float(prior.whiten(kind).square().mean().sqrt()) for kind in (found[:64], found[64:]))
        assert own == pytest.approx(contrast, rel=0.1)
        assert other < 0.8 * own  # all of it lies at the strongest frequency


@pytest.mark.slow
def test_a_channel_that_never_varied_does_not_rule_the_rest() -> None:
    model, _ = _truth()
    model.bn1.running_var[0] = 0.0
    found = calibrate(model, [Start(natural_noise((3, 16, 16), 64, seed=1))], SCORING)
    assert found.images.isfinite().all()
    assert found.distance < found.before


def test_a_network_in_one_dimension_is_calibrated_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 6, 5, padding=2), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 1))
    _fed_with(model, 0.3 * natural_noise((2, 64), 256, seed=5) + torch.tensor([[0.5], [-0.5]]))
    found = calibrate(model, [Start(natural_noise((2, 64), 64, seed=0))], SCORING)
    assert found.distance < 0.1 * found.before


def test_networks_fed_with_noise_are_near_from_the_start() -> None:
    images = 0.4 * natural_noise((3, 16, 16), 192, seed=2)
    model = _fed_with(Plain(), images)
    found = calibrate(model, [Start(natural_noise((3, 16, 16), 192, seed=3))], SCORING, passes=2)
    assert found.before < 0.05


def test_calibration_images_read_back_older_too(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 8, 8)
    for kept in (None, 0.5):
        made = SyntheticImages(images, 0.5, 0.125, 7, kept)
        write_run_images(RunImages(images), tmp_path / "images", made, "key")
        found = load_synthetic_images(tmp_path / "images", "key")
        assert found is not None
        assert (found.before, found.distance, found.passes, found.activation_kept) == (0.5, 0.125, 7, kept)
        assert torch.equal(found.images, images)
        assert load_synthetic_images(tmp_path / "images", "other key") is None
    said = {"key": "key", "before": "0.5", "distance": "0.125", "passes": "7"}
    save_file({"images": images}, tmp_path / "earlier", said)
    earlier = load_synthetic_images(tmp_path / "earlier")
    assert earlier is not None
    assert earlier.activation_kept is None


@pytest.mark.parametrize("rows", [4, 12, 16])
@pytest.mark.slow
def test_batches_that_run_in_parts_come_to_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _truth()
    starts = natural_noise((3, 16, 16), 40, seed=1)
    kinds = [Start(starts[:32]), Start(starts[32:], tuple(("stem", row) for row in range(8)))]
    whole = calibrate(model, kinds, SCORING, passes=6)
    most: list[int] = []
    see = Watched.see

    def spied(watched: Watched, images: Tensor, owners: Sequence[tuple[str, int]] = ()) -> object:
        most.append(len(images))
        return see(watched, images, owners)

    monkeypatch.setattr(Watched, "see", spied)
    monkeypatch.setattr(memory, "measure_row", lambda *_: RowBytes(2**20, 0, 0))
    monkeypatch.setattr(Budget, "left", lambda _: math.ceil(rows * 2**20 * memory.SLACK))
    parts = calibrate(
        model, kinds, RunContext(output=SCORES, budget=Budget(torch.device("cpu"), 0)), passes=6
    )
    assert max(most) == rows
    assert parts.passes == whole.passes
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)
    assert parts.activation_kept == pytest.approx(whole.activation_kept, rel=1e-4)


def test_out_of_memory_restarts_with_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = _truth()
    starts = [Start(natural_noise((3, 16, 16), 40, seed=1))]
    whole = calibrate(model, starts, SCORING, passes=3)
    see = Watched.see

    def short(watched: Watched, images: Tensor, owners: Sequence[tuple[str, int]] = ()) -> object:
        if len(images) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return see(watched, images, owners)

    monkeypatch.setattr(Watched, "see", short)
    parts = calibrate(model, starts, SCORING, passes=3)
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(Watched, "see", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out")))
    with pytest.raises(UserError, match="not enough memory for a single input"):
        calibrate(model, starts, SCORING, passes=3)

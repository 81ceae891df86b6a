from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from marks import slow
from networks import Plain, Residual, randomise_norms
from scores import SCORES
from torch import Tensor, nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.calibration.images import natural_noise
from prune_viz.channels.coupling import find_groups
from prune_viz.pruning import batch_norms as recalibration
from prune_viz.pruning.apply import apply_masks
from prune_viz.pruning.batch_norms import recalibrate_norms
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.compensation import compensate_filters
from prune_viz.pruning.consistency import reconcile_masks
from prune_viz.pruning.masks import Masks, load_masks
from prune_viz.pruning.measuring import OutputMeter, meter_on
from prune_viz.pruning.merging import merge_filters
from prune_viz.pruning.remove import remove_filters
from prune_viz.runs.damage import Unit
from prune_viz.runs.output_kind import OutputKind
from prune_viz.runs.run_directory import RunDirectory

SHAPE = (3, 16, 16)


def _whole(make: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(make()).eval()


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def _meter(whole: nn.Module, images: Tensor | None = None, kind: OutputKind = SCORES) -> OutputMeter:
    made = meter_on(whole, natural_noise(SHAPE, 24, seed=9) if images is None else images, kind)
    assert made is not None
    return made


def _off(images: Tensor, whole: nn.Module, pruned: nn.Module) -> float:
    return _meter(whole, images).change(pruned)


def _given(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Mean and deviation, shape (2, channels), of what every norm gives, plainly."""
    found = {}

    def hook(name: str) -> None:
        def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            values = output.transpose(0, 1).flatten(1)
            found[name] = torch.stack([values.mean(dim=1), values.std(dim=1, correction=0)])

        handles.append(modules[name].register_forward_hook(note))

    handles: list = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d):
            hook(name)
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_norm_undoes_scale_and_shift() -> None:
    whole = _whole(Plain)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.conv2.weight *= 0.4
        pruned.bn2.running_mean -= 0.3  # as a merge's constant is carried
    images = natural_noise(SHAPE, 24, seed=0)
    fresh = natural_noise(SHAPE, 24, seed=1)
    off = _off(fresh, whole, pruned)
    assert recalibrate_norms(pruned, whole, images, _meter(whole))
    assert _off(fresh, whole, pruned) < 1e-4 * off


def test_each_norm_is_set_after_those_before_it() -> None:
    whole = _whole()
    images = natural_noise(SHAPE, 32, seed=0)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        for module in pruned.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[:, : module.weight.shape[1] // 3] = 0.0
    assert recalibrate_norms(pruned, whole, images, _meter(whole))
    aims, found = _given(whole, images), _given(pruned, images)
    assert len(aims) > 2
    for name, aim in aims.items():
        torch.testing.assert_close(found[name], aim, rtol=0.02, atol=0.02)


def test_where_nothing_is_to_be_gained_nothing_is_changed() -> None:
    whole = _whole()
    pruned = copy.deepcopy(whole)
    for count in (16, 1):
        assert not recalibrate_norms(pruned, whole, natural_noise(SHAPE, count, seed=0), _meter(whole))
    for name, value in _statistics(pruned).items():
        assert torch.equal(value, _statistics(whole)[name])


def test_norms_that_do_not_generalise_are_restored() -> None:
    """What goes matters in the images that are fitted to, and little in those that are measured on."""
    whole = _whole(Plain)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.conv1.weight[:, 0] = 0.0
    images = 0.3 * natural_noise(SHAPE, 32, seed=0)
    others = images[16:].clone()
    images[:, 0] *= 30
    others[:, 0] *= 0.1
    before = _statistics(pruned)
    assert _off(others, whole, pruned) > 0
    assert not recalibrate_norms(pruned, whole, images[:16], _meter(whole, others))
    for name, value in _statistics(pruned).items():
        assert torch.equal(value, before[name])


def test_a_norm_makes_up_for_no_more_than_its_eps_lets_it() -> None:
    whole = _whole(Plain)
    whole.bn2.eps = 1e-3
    whole.bn2.running_var.fill_(1e-4)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.conv2.weight *= 0.3
    images = natural_noise(SHAPE, 32, seed=0)
    aims = _given(whole, images)
    recalibrate_norms(pruned, whole, images, _meter(whole))
    found = _given(pruned, images)
    torch.testing.assert_close(found["bn2"][0], aims["bn2"][0], rtol=0.01, atol=0.01)
    assert (found["bn2"][1] < aims["bn2"][1]).all()


class _Strange(Plain):
    """Gives what cannot be laid end to end: time before batch, a number, indices."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = super().forward(x)
        return scores[None].expand(5, -1, -1), scores.mean(), scores.topk(2).indices


@pytest.mark.parametrize("count", [33, 64])
def test_strange_outputs_are_compared_batch_by_batch(count: int) -> None:
    whole = _whole(_Strange)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.conv2.weight *= 0.4
    images = natural_noise(SHAPE, count, seed=0)
    meter = _meter(whole, natural_noise(SHAPE, count, seed=1), OutputKind())
    found = meter.damage(pruned)
    assert found is not None
    assert found.value > 0
    assert found.unit is Unit.OUTPUT
    assert recalibrate_norms(pruned, whole, images, meter)
    assert meter.change(pruned) < 0.1 * found.value


def test_images_that_do_not_fit_change_nothing() -> None:
    whole = _whole()
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.stem.weight *= 0.4
    unfit = torch.zeros(8, 5, 16, 16)
    assert not recalibrate_norms(pruned, whole, unfit, _meter(whole))
    for images in (unfit, unfit[:0], None):
        assert meter_on(whole, images, SCORES) is None
    for name, value in _statistics(pruned).items():
        assert torch.equal(value, _statistics(whole)[name])


def test_out_of_memory_uses_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _whole(Plain)
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.conv2.weight *= 0.4
    run, tried = recalibration._run, []

    def scarce(model: nn.Module, norms: dict, images: Tensor, see: object) -> None:
        tried.append(len(images))
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(model, norms, images, see)

    monkeypatch.setattr(recalibration, "_run", scarce)
    assert recalibrate_norms(pruned, whole, natural_noise(SHAPE, 32, seed=0), _meter(whole))
    assert tried == [32, 16, 8, 8]  # the whole network, and then the pruned one


def test_weights_of_other_precision_come_back_to_the_bit(run: Path) -> None:
    write_masks(run, run / "some.pt", macs=0.4)
    masks, whole = load_masks(run / "some.pt"), _whole().double()
    with torch.no_grad():
        whole.stem.weight += 1e-12
    example = torch.zeros(1, *SHAPE, dtype=torch.float64)
    groups = find_groups(_whole(), example.float())
    consistent = reconcile_masks(whole, masks, example)
    changed = copy.deepcopy(whole)
    assert compensate_filters(changed, consistent, groups).norms
    assert torch.equal(changed.stem.weight, whole.stem.weight)


class _Twice(nn.Module):
    """One norm behind two convolutions: no statistics could serve both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x)).relu()
        return self.head(self.last(self.norm(self.other(x))).mean(dim=(2, 3)))


def test_a_norm_that_runs_twice_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    whole = randomise_norms(_Twice()).eval()
    pruned = copy.deepcopy(whole)
    with torch.no_grad():
        pruned.other.weight *= 0.3
    assert recalibrate_norms(pruned, whole, natural_noise(SHAPE, 16, seed=0), _meter(whole))
    assert torch.equal(pruned.norm.running_mean, whole.norm.running_mean)
    assert not torch.equal(pruned.last.running_mean, whole.last.running_mean)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    analyze(_whole(), input_shape=SHAPE, out=out, steps=8)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_smaller_network_is_merged_with_norms_set(run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_masks(run, tmp_path / "masks.pt", macs=0.4)
    masks = load_masks(tmp_path / "masks.pt")
    whole, example = _whole().to(dtype), torch.zeros(1, *SHAPE)
    consistent = reconcile_masks(whole, masks, example)
    groups = find_groups(_whole(), example)
    merged = merge_filters(copy.deepcopy(whole), consistent, groups)
    changed = copy.deepcopy(whole)
    assert compensate_filters(changed, consistent, groups).norms
    images = masks.calibration_images
    assert images is not None
    smaller = remove_filters(whole, masks, example.to(dtype), compensate="merge")
    masked = apply_masks(copy.deepcopy(changed), consistent)
    given = [model.float()(images) for model in (smaller, masked)]
    torch.testing.assert_close(*given, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)
    unseen = masks.images.kept_out  # by which it is chosen
    assert _off(unseen, _whole(), smaller) < _off(unseen, _whole(), merged.float())


@pytest.mark.slow
def test_calibration_images_go_with_the_masks(run: Path, tmp_path: Path) -> None:
    own = load_masks(run / "masks.pt").calibration_images
    assert own is not None
    (run / "half.probes.safetensors").write_bytes(b"of earlier masks")
    away = tmp_path / "half.pt"
    for file in (run / "half.pt", away):
        write_masks(run, file, ratio=0.4)
        images = load_masks(file).calibration_images
        assert images is not None
        assert torch.equal(images, own)
    assert not (run / "half.probes.safetensors").exists()
    # Masks of a run without calibration images take none that lie there, not even in another run.
    other = tmp_path / "other"
    analyze(randomise_norms(Residual(), seed=3).eval(), input_shape=SHAPE, out=other, steps=4)
    RunDirectory(run).calibration_images_file.rename(tmp_path / "put aside")
    write_masks(run, away, ratio=0.4)
    write_masks(run, other / "half.pt", ratio=0.4)
    assert load_masks(other / "masks.pt").calibration_images is not None
    assert load_masks(away).calibration_images is None
    assert load_masks(other / "half.pt").calibration_images is None
    (tmp_path / "put aside").rename(RunDirectory(run).calibration_images_file)


def test_removed_columns_are_zero_with_or_without_merge() -> None:
    whole = _whole(Plain)
    mask = torch.ones(8, dtype=torch.bool)
    mask[3] = False
    merged = merge_filters(
        copy.deepcopy(whole), Masks({"conv2": mask}), find_groups(whole, torch.zeros(1, *SHAPE))
    )
    assert not merged.conv3.weight[:, 3].any()
    assert torch.equal(merged.conv3.weight[:, :3], whole.conv3.weight[:, :3])

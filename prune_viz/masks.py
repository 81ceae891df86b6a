"""Prune masks: one boolean a filter, True = keep; loading, saving, applying them to a model in training."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from prune_viz import tracing
from prune_viz.coupling import CouplingGroup, UntraceableError, find_groups
from prune_viz.errors import UserError
from prune_viz.filters import bake_parametrizations, plain_copy
from prune_viz.probes import load_probes
from prune_viz.runs import FORMAT, merges_beside, probes_beside, write_json, written_aside


@dataclass(frozen=True)
class Merge:
    """How what a removed filter contributed is rebuilt from kept ones.

    Attributes
    ----------
    layer : str
        A convolution that writes the coupled channel; the filters below are its own.
    filter : int
        The removed filter.
    representatives : tuple of int
        Kept filters.
    coefficients : tuple of float
        Their weights.
    constant : float
        What is added.
    """

    layer: str
    filter: int
    representatives: tuple[int, ...]
    coefficients: tuple[float, ...]
    constant: float


class Masks(dict[str, Tensor]):
    """Module name -> bool tensor, shape (out_channels,), True = keep.

    Parameters
    ----------
    masks : mapping
        The masks.
    merges : sequence of Merge
        How the removed filters can be rebuilt; empty where nothing is known.
    model_sha256 : str, optional
        Digest of the model file that was analysed.
    probes : Tensor, optional, shape (N, C, *size)
        Calibrated probes, on which batch norms are set anew after merging.

    Attributes
    ----------
    merges : tuple of Merge
    model_sha256 : str or None
    probes : Tensor or None
    notes : list of str
        What `reconcile_masks` kept, and why.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        merges: tuple[Merge, ...] = (),
        model_sha256: str | None = None,
        probes: Tensor | None = None,
    ) -> None:
        super().__init__(masks or {})
        self.merges = tuple(merges)
        self.model_sha256 = model_sha256
        self.probes = probes
        self.notes: list[str] = []

    @property
    def removed(self) -> int:
        """How many filters the masks remove."""
        return int(sum(int((~mask).sum()) for mask in self.values()))

    @property
    def filters(self) -> int:
        """How many filters the masks speak of."""
        return int(sum(mask.numel() for mask in self.values()))


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks as a plain dict that ``torch.load(path, weights_only=True)`` reads."""
    plain = {name: mask.detach().cpu().bool() for name, mask in masks.items()}
    # Through a stream, since torch writes the name of a file into it and equal masks should be equal files.
    stream = io.BytesIO()
    torch.save(plain, stream)
    with written_aside(Path(path)) as aside:
        aside.write_bytes(stream.getvalue())


def load_masks(path: str | Path) -> Masks:
    """Read masks, and what stands beside them to make up for what they remove.

    That is the merges, of a budget's masks or of a run's `decisions.json`, and calibrated probes.

    Raises
    ------
    UserError
        If the file is missing or is not a dict of bool tensors.
    """
    path = Path(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; masks.pt stands in the run directory of an analysis"
        ) from None
    except Exception:  # torch raises nearly anything on a damaged file
        raise UserError(f"{path} is not a masks file, or it is damaged; make it again with analyze") from None
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1
        for name, mask in loaded.items()
    ):
        raise UserError(f"{path} is not a masks file: it should hold a bool tensor a convolution")
    own, run = merges_beside(path), path.with_name("decisions.json")
    beside = own if own.exists() else run
    if not beside.exists():
        return Masks(loaded)
    merges, sha256 = read_merges(beside)
    probes = load_probes(probes_beside(path))
    if probes is None and run.exists() and (beside == run or read_merges(run)[1] == sha256):
        probes = load_probes(path.with_name("probes.safetensors"))
    return Masks(loaded, merges, sha256, None if probes is None else probes.images)


def save_merges(masks: Masks, path: Path) -> None:
    """Write the merges of masks to a JSON file."""
    listed = [asdict(merge) for merge in masks.merges]
    write_json(path, {"format": FORMAT, "model_sha256": masks.model_sha256, "merges": listed})


def read_merges(path: Path) -> tuple[tuple[Merge, ...], str | None]:
    """Read merges, and the digest of the model they were fitted to, from `path`.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        merges = tuple(
            Merge(
                entry["layer"],
                entry["filter"],
                tuple(entry["representatives"]),
                tuple(entry["coefficients"]),
                entry["constant"],
            )
            for entry in content["merges"]
        )
        return merges, content["model_sha256"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} beside the masks is damaged; make it again") from None


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that masks were made for a network like `model`.

    Raises
    ------
    UserError
        If a mask names no convolution of the model, is not bool, has another number of filters, or
        keeps none.
    """
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        module = modules.get(name)
        if not isinstance(module, _ConvNd):
            raise UserError(f"these masks are for another model: it has no convolution {name!r}")
        if mask.dtype != torch.bool:
            raise UserError(f"the mask of {name} is {mask.dtype}; masks are bool tensors, True = keep")
        if mask.shape != (module.out_channels,):
            raise UserError(
                f"these masks are for another model: {name} has {module.out_channels} filters, its mask "
                f"{mask.numel()}"
            )
        if not bool(mask.any()):
            raise UserError(f"the mask of {name} removes every filter; keep at least one")


def reconcile_masks(model: nn.Module, masks: Mapping[str, Tensor], example_inputs: Tensor) -> Masks:
    """Make masks consistent over coupling groups, so that what they remove can be removed.

    A coupled channel goes only where every filter tied to it is masked out; the rest is kept.

    Parameters
    ----------
    model : nn.Module
        The network; not changed.
    masks : mapping of str to bool Tensor
        True = keep; layers not named are kept whole.
    example_inputs : Tensor, shape (B, C, *size)
        An input the model runs on.

    Returns
    -------
    Masks
        A mask for every convolution that runs. `notes` says what was kept and why; a warning does too.

    Raises
    ------
    UserError
        If the masks are for another model or keep nothing of a layer.
    """
    check_masks(model, masks)
    groups = groups_for_removal(model, example_inputs)
    reconciled = reconcile_with_groups(model, masks, groups)
    if reconciled.notes:
        warnings.warn("; ".join(reconciled.notes), stacklevel=2)
    return reconciled


def groups_for_removal(model: nn.Module, example_inputs: Tensor) -> list[CouplingGroup]:
    """Coupling groups, or a `UserError` that says whether the input or the architecture is at fault."""
    try:
        with torch.no_grad():
            plain_copy(model).float()(example_inputs.float())
    except Exception as error:  # whatever a stranger's forward pass raises
        text = " ".join(str(error).split())[:160]
        shape = ",".join(str(size) for size in example_inputs.shape[1:])
        raise UserError(f"the model does not run on an input of shape {shape} ({text})") from None
    try:
        return find_groups(model, example_inputs)
    except UntraceableError as error:
        raise UserError(
            f"this architecture cannot be traced, so its filters can be masked but not removed: {error}"
        ) from None


def reconcile_with_groups(
    model: nn.Module, masks: Mapping[str, Tensor], groups: Sequence[CouplingGroup]
) -> Masks:
    """Make masks consistent over groups that are known already; see `reconcile_masks`."""
    reconciled = Masks(merges=getattr(masks, "merges", ()), probes=getattr(masks, "probes", None))
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    for name, module in convolutions.items():
        reconciled[name] = torch.ones(module.out_channels, dtype=torch.bool)
    for group in groups:
        gone = channels_gone(group, masks)
        if len(gone) == group.channels:
            raise UserError(f"the masks remove every filter of {group.layers[0]}; keep at least one")
        for places in group.writers:
            removed = places.indices[[channel in gone for channel in places.channels]]
            reconciled[places.module][torch.from_numpy(removed)] = False
            wished = int((~masks[places.module]).sum()) if places.module in masks else 0
            if wished > len(removed):
                why = group.note or "filters tied to them are kept in " + ", ".join(
                    layer for layer in group.layers if layer != places.module
                )
                kept = wished - len(removed)
                reconciled.notes.append(f"{places.module}: {kept} masked filters are kept, {why}")
    return reconciled


def channels_gone(group: CouplingGroup, masks: Mapping[str, Tensor]) -> set[int]:
    """Channels of a group that every filter tied to them gives up."""
    if not group.removable:
        return set()
    gone = set(range(group.channels))
    for places in group.writers:
        mask = masks.get(places.module)
        kept = places.channels if mask is None else places.channels[mask.cpu().numpy()[places.indices]]
        gone -= set(kept.tolist())
    return gone


class FilterMask(nn.Module):
    """Parametrisation that multiplies a parameter by a mask, so that no optimiser can revive a filter."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, parameter: Tensor) -> Tensor:
        """Zero what the mask removes."""
        return parameter * self.mask


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Zero the masked filters now and keep them at zero through any optimiser's steps.

    The weights and biases of masked filters, and the scale and shift of the batch norm behind them, are
    parametrised (`torch.nn.utils.parametrize`): the values read are always the masked ones. Parameters
    stay the same objects, so an optimiser made before goes on working.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    masks : mapping of str to bool Tensor
        True = keep.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    UserError
        If the masks are for another model.
    """
    check_masks(model, masks)
    norms = tracing.norms_behind(model)
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        if bool(mask.all()):
            continue
        conv = modules[name]
        _mask_parameter(conv, "weight", _over_weight(conv, mask))
        _mask_parameter(conv, "bias", mask)
        if name in norms:
            _mask_parameter(modules[norms[name]], "weight", mask)
            _mask_parameter(modules[norms[name]], "bias", mask)
    return model


def make_permanent(model: nn.Module) -> nn.Module:
    """Turn masks that `apply_masks` set into plain zeros, with the state dict's own keys again.

    Other parametrisations of the model, weight norm say, become plain values with them.
    """
    bake_parametrizations(model)
    return model


def _over_weight(conv: Any, mask: Tensor) -> Tensor:
    """The mask in the shape that multiplies the weight: filters lie on axis 0, or 1 if transposed."""
    tail = [1] * (conv.weight.ndim - 2)
    if not isinstance(conv, _ConvTransposeNd):
        return mask.view(-1, 1, *tail)
    per_group = mask.view(conv.groups, -1)
    return per_group.repeat_interleave(conv.in_channels // conv.groups, dim=0).view(
        conv.in_channels, -1, *tail
    )


def _mask_parameter(module: nn.Module, name: str, mask: Tensor) -> None:
    parameter = getattr(module, name, None)
    if parameter is None:
        return
    if parametrize.is_parametrized(module, name):
        for step in module.parametrizations[name]:  # type: ignore[index]
            if isinstance(step, FilterMask):
                step.mask.mul_(mask.to(step.mask.device))
                return
    with torch.no_grad():
        parameter.mul_(mask.to(parameter.device))
    parametrize.register_parametrization(module, name, FilterMask(mask.to(parameter.device)))

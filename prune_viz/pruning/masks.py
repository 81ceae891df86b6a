"""Prune masks: one boolean a filter, True = keep; how they are combined, summed up, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import pandas as pd
import torch
from torch import Tensor, nn

from prune_viz.calibration.image_files import RunImages, read_run_images, write_run_images
from prune_viz.channels.groups import NormChannel
from prune_viz.loading.formats import read_content
from prune_viz.loading.tensor_checks import check_all_tensors, check_tensor
from prune_viz.network.copies import opened
from prune_viz.network.layer_kinds import count_outputs, reads_channels
from prune_viz.runs.damage import Damage
from prune_viz.runs.decisions_json import BesideMasks, Merge, prediction_record
from prune_viz.runs.fingerprint import Origin
from prune_viz.runs.run_directory import calibration_images_beside, merges_beside
from prune_viz.runs.run_json import FORMAT
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import MARK, check_readable, check_replaceable, write_json, write_torch
from prune_viz.utils.json_files import read_json


class Masks(dict[str, Tensor]):
    """Module name -> bool tensor, shape (out_channels,), True = keep.

    Two are equal if they keep the same filters of the same layers, whatever makes up for the others.

    Parameters
    ----------
    masks : mapping
        The masks.
    merges : sequence of Merge
        How the removed filters can be rebuilt; empty where nothing is known.
    origin : Origin, optional
        The model that they were made for.
    calibration_images : Tensor, optional, shape (N, C, *size)
        Synthetic images, on which merging is measured and batch norms are set anew after it.
    predicted : Damage, optional
        What they are predicted to cost.
    measured : Damage, optional
        What that was measured to be, on images that no fit saw.
    rough : str
        Why that is rough, and what would help; empty where it is not.
    norm_channels : sequence of NormChannel, optional
        Channels of norms that removed filters pass on their way to what reads them, silenced with them.

    Attributes
    ----------
    merges : tuple of Merge
    origin : Origin
    images : RunImages
        Synthetic calibration images, and the user's that no fit saw.
    predicted, measured : Damage or None
    measured_on : str
        What `measured` was measured on, for people.
    rough : str
    is_unfounded : bool
        Whether it can be wrong either way, so that merging must be clearly better to be used.
    norm_channels : list of NormChannel
    notes : list of str
        What `reconcile_masks` kept, and why.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        merges: tuple[Merge, ...] = (),
        origin: Origin | None = None,
        calibration_images: Tensor | None = None,
        predicted: Damage | None = None,
        norm_channels: Sequence[NormChannel] = (),
        measured: Damage | None = None,
        rough: str = "",
    ) -> None:
        super().__init__(masks or {})
        self.merges = tuple(merges)
        self.origin = origin or Origin()
        self.images = RunImages(calibration_images)
        self.predicted, self.measured, self.rough = predicted, measured, rough
        self.measured_on = ""
        self.is_unfounded = False
        self.norm_channels = list(norm_channels)
        self.notes: list[str] = []

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """`load_masks`."""
        return load_masks(path)

    def save(self, path: str | Path) -> None:
        """`save_masks`."""
        save_masks(self, path)

    @property
    def calibration_images(self) -> Tensor | None:
        """The synthetic calibration images, shape (N, C, *size)."""
        return self.images.synthetic

    @calibration_images.setter
    def calibration_images(self, images: Tensor | None) -> None:
        self.images = replace(self.images, synthetic=images)

    @property
    def probes(self) -> Tensor | None:
        """`calibration_images`, by the name of version 0.1."""
        return self.calibration_images

    @probes.setter
    def probes(self, images: Tensor | None) -> None:
        self.calibration_images = images

    @property
    def removed(self) -> int:
        """How many filters the masks remove."""
        return int(sum(int((~mask).sum()) for mask in self.values()))

    @property
    def filters(self) -> int:
        """How many filters the masks speak of."""
        return int(sum(mask.numel() for mask in self.values()))

    def __repr__(self) -> str:
        touched = sum(not bool(mask.all()) for mask in self.values())
        return f"Masks({self.removed:,} of {self.filters:,} filters go, in {touched} of {len(self)} layers)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            isinstance(other[name], Tensor) and torch.equal(mask.cpu(), other[name].cpu())
            for name, mask in self.items()
        )

    def __ne__(self, other: object) -> bool:  # a dict has one of its own
        return not self == other

    def combine(self, other: Mapping[str, Tensor], remove: Literal["any", "both"] = "any") -> Masks:
        """Masks that remove what any of the two removes, or what both do.

        Merges stay as far as they still hold (`holds`). Where both masks rebuild a filter, these masks'
        own merge is taken. A new analysis or a new budget makes better ones.

        Parameters
        ----------
        other : mapping of str to bool Tensor
            Masks of the same model; a layer that only one of the two names is whole in the other.
        remove : {"any", "both"}
            Which filters go.

        Raises
        ------
        UserError
            If the two are known to be of different models, or differ in how many filters a layer has.
        """
        theirs = other if isinstance(other, Masks) else Masks(other)
        if remove not in ("any", "both"):
            raise UserError(f"masks are combined by removing any or both, not {remove!r}")
        origin = self.origin.agreed(theirs.origin)
        if origin is None:
            raise UserError("masks of two different models cannot be combined")
        combined = Masks(origin=origin)
        for name in {**self, **theirs}:
            pair = [masks[name].cpu() for masks in (self, theirs) if name in masks]
            if pair[0].shape != pair[-1].shape:
                raise UserError(
                    f"masks of two different models cannot be combined: {name} has {len(pair[0])} filters "
                    f"in one, {len(pair[-1])} in the other"
                )
            if len(pair) == 1:
                pair.append(torch.ones_like(pair[0]))
            combined[name] = pair[0] & pair[1] if remove == "any" else pair[0] | pair[1]
        combined._take_over(self, theirs)
        return combined

    def copy(self) -> Masks:
        """The same masks, with all that makes up for what they remove."""
        return copy.copy(self)

    def __or__(self, other: Mapping[str, Tensor]) -> Masks:  # type: ignore[override]
        """All layers of both, the other's masks where both name a layer; merges stay as far as they hold."""
        if not isinstance(other, Mapping):
            return NotImplemented
        theirs = other if isinstance(other, Masks) else Masks(other)
        origin = self.origin.agreed(theirs.origin)
        if origin is None:
            raise UserError("masks of two different models cannot be combined")
        united = Masks({**self, **theirs}, origin=origin)
        united._take_over(theirs, self)
        return united

    def __ror__(self, other: Mapping[str, Tensor]) -> Masks:  # type: ignore[override]
        return Masks(other) | self if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Mapping[str, Tensor]) -> Masks:  # type: ignore[override]
        united = self | other
        self.update(united)
        vars(self).update(vars(united))
        return self

    def _take_over(self, first: Masks, second: Masks) -> None:
        """Take what two masks hold to make up for removed filters, as far as it holds here.

        Where both do, the first one's is taken.
        """
        self.images = first.images or second.images
        self.rough, self.is_unfounded = first.rough or second.rough, first.is_unfounded or second.is_unfounded
        passed = dict.fromkeys((*first.norm_channels, *second.norm_channels))
        self.norm_channels = [norm_channel for norm_channel in passed if self.silences(norm_channel)]
        merges = {(merge.layer, merge.filter): merge for merge in (*second.merges, *first.merges)}
        self.merges = tuple(merge for merge in merges.values() if self.holds(merge))

    def holds(self, merge: Merge) -> bool:
        """Whether these masks remove a merge's filter and keep all that rebuild it."""
        mask = self.get(merge.layer)
        if mask is None or max(merge.filter, *merge.representatives, 0) >= len(mask) or mask[merge.filter]:
            return False
        return bool(mask[list(merge.representatives)].all())

    def silences(self, norm_channel: NormChannel) -> bool:
        """Whether these masks remove all that writes a norm's channel."""
        return all(
            layer in self and index < len(self[layer]) and not self[layer][index]
            for layer, index in norm_channel.filters
        )

    def summary(self) -> pd.DataFrame:
        """A row a layer: ``filters``, ``removed``, and ``share``, the removed ones' share, 0 to 1."""
        rows = [(name, mask.numel(), int((~mask).sum())) for name, mask in self.items()]
        table = pd.DataFrame(rows, columns=["layer", "filters", "removed"]).set_index("layer")
        return table.assign(share=table["removed"] / table["filters"].clip(lower=1))


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks, and beside them what `Masks` hold to make up for what they remove.

    The file itself is a plain dict that ``torch.load(path, weights_only=True)`` reads. Merges go to
    ``NAME.merges.json``, synthetic images to ``NAME.probes.safetensors``.

    Raises
    ------
    UserError
        If something else than a regular file stands at one of them, or nothing can be written there.
    """
    path = Path(path)
    held = masks if isinstance(masks, Masks) else Masks(masks)
    merges, images = merges_beside(path), calibration_images_beside(path)
    for file in (path, merges, images):
        check_replaceable(file)
    path.resolve().unlink(missing_ok=True)  # never beside what belongs to other masks
    if held.merges or held.norm_channels or held.origin != Origin() or held.predicted is not None:
        beside = msgspec.to_builtins(beside_masks(held))
        write_json(merges, {"format": FORMAT, "written_by": MARK, **beside})
    else:
        merges.unlink(missing_ok=True)
    write_run_images(held.images, images)
    write_plain_masks(masks, path)


def write_plain_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write masks alone, as a plain dict."""
    write_torch(path, {name: mask.detach().cpu().bool() for name, mask in masks.items()})


def beside_masks(masks: Masks) -> BesideMasks:
    """All that JSON files say of masks beside the masks themselves; `read_beside` reads it."""
    return BesideMasks(
        model_sha256=masks.origin.file,
        weights_sha256=masks.origin.weights,
        predicted=prediction_record(masks.predicted),
        measured=prediction_record(masks.measured),
        measured_on=masks.measured_on,
        rough=masks.rough,
        unfounded=masks.is_unfounded,
        passages=tuple(astuple(one) for one in masks.norm_channels),
        output=masks.origin.output,
        merges=masks.merges,
    )


def load_masks(path: str | Path) -> Masks:
    """Read masks, and what stands beside them to make up for what they remove.

    That is the merges, of a budget's masks or of a run's `decisions.json`, and synthetic images.

    Raises
    ------
    UserError
        If the file is missing or is not a dict of bool tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; masks.pt stands in the run directory of an analysis")
    check_readable(path)
    try:
        loaded = read_content(path)
    except UserError:
        raise UserError(f"{path} is not a masks file, or it is damaged; make it again with analyze") from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path} is not a masks file: it should hold a bool tensor a layer")
    check_all_tensors(loaded, path)
    for name, mask in loaded.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1:
            raise UserError(f"{path} is not a masks file: {name[:80]!r} is not a bool tensor of one axis")
    own, run = merges_beside(path), path.with_name("decisions.json")
    beside = own if own.exists() else run
    if not beside.exists():
        return Masks(loaded)
    masks = read_beside(beside)
    masks.update(loaded)
    masks.images = read_run_images(calibration_images_beside(path))
    own_run = run.exists() and (beside == run or read_beside(run).origin == masks.origin)
    if not masks.images and own_run:
        masks.images = read_run_images(path.with_name("probes.safetensors"))
    return masks


def read_beside(path: Path) -> Masks:
    """Read from a JSON file what stands beside masks: origin, prediction, channels of norms and merges.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    return masks_as_stored(read_json(path, BesideMasks, f"{path} beside the masks"))


def masks_as_stored(beside: BesideMasks) -> Masks:
    """What files say of masks beside the masks themselves."""
    masks = Masks(
        merges=beside.merges,
        origin=Origin(beside.model_sha256, beside.weights_sha256, beside.output),
        predicted=beside.prediction,
        norm_channels=[NormChannel(*one) for one in beside.passages],
        measured=beside.measurement,
        rough=beside.rough,
    )
    masks.measured_on, masks.is_unfounded = beside.measured_on, beside.is_unfounded
    return masks


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that masks were made for a network like `model`.

    Raises
    ------
    UserError
        If a mask names no convolution or linear layer of the model, is not a dense bool tensor on the CPU or
        where the layer is, has another number of filters, or keeps none.
    """
    modules: dict[str, Any] = dict(opened(model).named_modules())
    for name, mask in masks.items():
        module = modules.get(name)
        if module is None or not reads_channels(module):
            raise UserError(f"these masks are for another model: it has no layer of filters {name!r}")
        check_tensor(f"the mask of {name}", mask)
        if mask.device not in (torch.device("cpu"), module.weight.device):
            raise UserError(
                f"the mask of {name} is on {mask.device}; put it on the CPU or on {module.weight.device}"
            )
        if mask.dtype != torch.bool:
            raise UserError(f"the mask of {name} is {mask.dtype}; masks are bool tensors, True = keep")
        if mask.shape != (count_outputs(module),):
            raise UserError(
                f"these masks are for another model: {name} has {count_outputs(module)} filters, its mask "
                f"{mask.numel()}"
            )
        if not bool(mask.any()):
            raise UserError(f"the mask of {name} removes every filter; keep at least one")

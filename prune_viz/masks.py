"""Prune masks: one boolean a filter, True = keep; how they are combined, summed up, saved and loaded."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prune_viz.errors import UserError
from prune_viz.files import write_json, written_aside
from prune_viz.groups import Passage
from prune_viz.origin import Origin
from prune_viz.probes import read_images, write_images
from prune_viz.runs import FORMAT, merges_beside, probes_beside


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


@dataclass(frozen=True)
class Predicted:
    """What removing all that masks remove, merged, is predicted to cost.

    Attributes
    ----------
    damage : float
        Summed over coupling groups.
    unit : {"nats", "output", "readers"}
        Divergence of the network's output, its squared change as a share of its square, or a share of
        what the layers give that read the filters.
    """

    damage: float
    unit: str


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
    probes : Tensor, optional, shape (N, C, *size)
        Calibrated probes, on which batch norms are set anew after merging.
    predicted : Predicted, optional
        What they are predicted to cost.
    passages : sequence of Passage, optional
        Channels of norms that removed filters pass on their way to what reads them, silenced with them.

    Attributes
    ----------
    merges : tuple of Merge
    origin : Origin
    probes : Tensor or None
    predicted : Predicted or None
    passages : list of Passage
    notes : list of str
        What `reconcile_masks` kept, and why.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | None = None,
        merges: tuple[Merge, ...] = (),
        origin: Origin | None = None,
        probes: Tensor | None = None,
        predicted: Predicted | None = None,
        passages: Sequence[Passage] = (),
    ) -> None:
        super().__init__(masks or {})
        self.merges = tuple(merges)
        self.origin = origin or Origin()
        self.probes = probes
        self.predicted = predicted
        self.passages = list(passages)
        self.notes: list[str] = []

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """`load_masks`."""
        return load_masks(path)

    def save(self, path: str | Path) -> None:
        """`save_masks`."""
        save_masks(self, path)

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

        Merges stay as far as they still hold (`carries_out`). Where both masks rebuild a filter, these masks'
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
        combined.probes = theirs.probes if self.probes is None else self.probes
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
        passed = dict.fromkeys((*self.passages, *theirs.passages))
        combined.passages = [passage for passage in passed if combined.silences(passage)]
        merges = {(merge.layer, merge.filter): merge for merge in (*theirs.merges, *self.merges)}
        combined.merges = tuple(merge for merge in merges.values() if combined.carries_out(merge))
        return combined

    def carries_out(self, merge: Merge) -> bool:
        """Whether these masks remove a merge's filter and keep all that rebuild it."""
        mask = self.get(merge.layer)
        if mask is None or max(merge.filter, *merge.representatives, 0) >= len(mask) or mask[merge.filter]:
            return False
        return bool(mask[list(merge.representatives)].all())

    def silences(self, passage: Passage) -> bool:
        """Whether these masks remove all that writes a norm's channel."""
        return all(
            layer in self and index < len(self[layer]) and not self[layer][index]
            for layer, index in passage.filters
        )

    def summary(self) -> pd.DataFrame:
        """A row a layer: ``filters``, ``removed``, and ``share``, the removed ones' share, 0 to 1."""
        rows = [(name, mask.numel(), int((~mask).sum())) for name, mask in self.items()]
        table = pd.DataFrame(rows, columns=["layer", "filters", "removed"]).set_index("layer")
        return table.assign(share=table["removed"] / table["filters"].clip(lower=1))


def save_masks(masks: Mapping[str, Tensor], path: str | Path) -> None:
    """Write masks, and beside them what `Masks` hold to make up for what they remove.

    The file itself is a plain dict that ``torch.load(path, weights_only=True)`` reads. Merges go to
    ``NAME.merges.json``, calibrated probes to ``NAME.probes.safetensors``.
    """
    path = Path(path)
    held = masks if isinstance(masks, Masks) else Masks(masks)
    merges, probes = merges_beside(path), probes_beside(path)
    path.unlink(missing_ok=True)  # never beside what belongs to other masks
    if held.merges or held.passages or held.origin != Origin() or held.predicted is not None:
        write_json(merges, {"format": FORMAT, **beside_json(held)})
    else:
        merges.unlink(missing_ok=True)
    if held.probes is not None:
        write_images(held.probes, probes)
    else:
        probes.unlink(missing_ok=True)
    write_plain_masks(masks, path)


def write_plain_masks(masks: Mapping[str, Tensor], path: Path) -> None:
    """Write masks alone, as a plain dict."""
    plain = {name: mask.detach().cpu().bool() for name, mask in masks.items()}
    # Through a stream, since torch writes the name of a file into it and equal masks should be equal files.
    stream = io.BytesIO()
    torch.save(plain, stream)
    with written_aside(path) as aside:
        aside.write_bytes(stream.getvalue())


def beside_json(masks: Masks) -> dict[str, Any]:
    """All that JSON files say of masks beside the masks themselves; `read_beside` reads it."""
    return {
        "model_sha256": masks.origin.file,
        "weights_sha256": masks.origin.weights,
        "predicted": None if masks.predicted is None else asdict(masks.predicted),
        "passages": [astuple(passage) for passage in masks.passages],
        "merges": [asdict(merge) for merge in masks.merges],
    }


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
    masks = read_beside(beside)
    masks.update(loaded)
    masks.probes = read_images(probes_beside(path))
    if masks.probes is None and run.exists() and (beside == run or read_beside(run).origin == masks.origin):
        masks.probes = read_images(path.with_name("probes.safetensors"))
    return masks


def read_beside(path: Path) -> Masks:
    """Read from a JSON file what stands beside masks: origin, prediction, passages and merges.

    Raises
    ------
    UserError
        If the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.get("predicted") or {}
        predicted = None
        if told.get("damage") is not None:
            predicted = Predicted(float(told["damage"]), str(told["unit"]))
        return Masks(
            merges=tuple(_read_merge(entry) for entry in content["merges"]),
            origin=Origin(content["model_sha256"], content.get("weights_sha256")),
            predicted=predicted,
            passages=[_read_passage(*entry) for entry in content.get("passages", [])],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} beside the masks is damaged; make it again") from None


def _read_merge(entry: Mapping[str, Any]) -> Merge:
    representatives = tuple(_index(number) for number in entry["representatives"])
    coefficients = tuple(float(number) for number in entry["coefficients"])
    if len(representatives) != len(coefficients):
        raise ValueError("a coefficient is missing")
    layer, constant = str(entry["layer"]), float(entry["constant"])
    return Merge(layer, _index(entry["filter"]), representatives, coefficients, constant)


def _read_passage(norm: str, channel: int, filters: Sequence[tuple[str, int]]) -> Passage:
    return Passage(norm, _index(channel), tuple((str(layer), _index(number)) for layer, number in filters))


def _index(number: object) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError("not the number of a filter")
    return number


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

"""Which architecture weights belong to: their names and shapes are held against all that are known.

A network is built without memory for its weights, so that even the largest takes a fraction of a second. Of
each of a library's files of architectures one is built first; where its names are like the weights', all are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prune_viz.loading.architectures import resolve_architecture
from prune_viz.loading.state_dicts import (
    StateDict,
    misfits,
    nearest_reading,
    number_of_classes,
    readings,
    tensors_in,
)
from prune_viz.loading.torchvision_models import torchvision_models
from prune_viz.utils.errors import UserError

_ALIKE = 0.2  # share of names, numbers left out, that a file of architectures must have in common
_FILES = 4  # of architectures, that are compared whole
_AUXILIARY: tuple[dict[str, Any], ...] = ({"aux_logits": False}, {"aux_loss": True})  # heads, gone or there
NEAREST = 3  # that are named where none fits


@dataclass(frozen=True)
class Candidate:
    """An architecture that weights may belong to.

    Attributes
    ----------
    arch : str
        Its SPEC.
    kwargs : dict
        What it was built with.
    misfits : list of str
        What keeps the weights from filling it, in words; empty where they do.
    alike : float
        Share of the names that both have, of those that either has, shapes the same; 0 to 1.
    """

    arch: str
    kwargs: dict[str, Any]
    misfits: list[str]
    alike: float


def recognise(state: StateDict, said: str | None = None) -> list[Candidate]:
    """Find the architectures of torchvision, and of timm where installed, that weights may belong to.

    Parameters
    ----------
    state : dict of str to Tensor
        The weights, under their names in the file.
    said : str, optional
        What the file calls its architecture, as training scripts do; tried first.

    Returns
    -------
    list of Candidate
        One alone if it fits; otherwise the nearest, the likeliest first.
    """
    found: list[Candidate] = []
    named = readings(state)
    for home in ("torchvision", "timm") if said else ():
        candidate = _nearest_variant(named, f"{home}:{said}")
        if not candidate.misfits:
            return [candidate]
    for library in (_torchvision, _timm):
        for candidate in _candidates(named, library()):
            if not candidate.misfits:
                return [candidate]
            found.append(candidate)
    found.sort(key=lambda candidate: -candidate.alike)
    return [candidate for candidate in found[:NEAREST] if candidate.alike > 0]


def _torchvision() -> dict[str, list[str]]:
    """SPECs by the file that defines them, those of classifiers first: they are built soonest."""
    models = torchvision_models()
    files: dict[str, list[str]] = {}
    # Quantised ones have the names of the others, and no weights of theirs that could be analysed.
    for name in (name for name in models.list_models() if not name.startswith("quantized_")):
        files.setdefault(models.get_model_builder(name).__module__, []).append(f"torchvision:{name}")
    return dict(sorted(files.items(), key=lambda item: item[0].count(".")))


def _timm() -> dict[str, list[str]]:
    try:
        import timm
    except ImportError:
        return {}
    return {
        file: specs
        for file in timm.list_modules()
        if (specs := [f"timm:{name}" for name in timm.list_models(module=file)])
    }


def _candidates(named: Sequence[StateDict], files: Mapping[str, Sequence[str]]) -> Iterator[Candidate]:
    """What of a library's architectures is alike, from the files that are most so.

    A file whose names are all the weights' is tried as soon as it is found.
    """
    shapes = [_without_numbers(names) for names in named]
    likeness: dict[str, float] = {}
    for file, specs in files.items():
        own = _without_numbers(shapes_of(specs[0], {}))
        likeness[file] = max((len(own & other) / len(own | other) for other in shapes), default=0.0)
        if likeness[file] == 1:
            del likeness[file]
            for spec in specs:
                yield _nearest_variant(named, spec)
    nearest = sorted(
        (file for file in likeness if likeness[file] >= _ALIKE), key=lambda file: -likeness[file]
    )
    for file in nearest[:_FILES]:
        for spec in files[file]:
            yield _nearest_variant(named, spec)


def _nearest_variant(named: Sequence[StateDict], spec: str) -> Candidate:
    """The architecture as it is by default or, where auxiliary heads make the difference, otherwise."""
    variants = [_held_against(named, spec, {})]
    if any("aux" in text for text in variants[0].misfits):
        variants += [_held_against(named, spec, kwargs) for kwargs in _AUXILIARY]
    return min(variants, key=lambda one: (bool(one.misfits), -one.alike))


def _held_against(named: Sequence[StateDict], spec: str, kwargs: dict[str, Any]) -> Candidate:
    """Weights held against an architecture, built for as many classes as they have."""
    wanted = shapes_of(spec, kwargs)
    state = nearest_reading(named, wanted)
    classes = number_of_classes(state, wanted)
    if classes is not None:
        with_classes = shapes_of(spec, {**kwargs, "num_classes": classes})
        if len(misfits(state, with_classes)) < len(misfits(state, wanted)):
            kwargs, wanted = {**kwargs, "num_classes": classes}, with_classes
    same = sum(name in state and state[name].shape == tensor.shape for name, tensor in wanted.items())
    alike = same / max(len(state.keys() | wanted.keys()), 1)
    return Candidate(spec, kwargs, misfits(state, wanted), alike)


def shapes_of(spec: str, kwargs: Mapping[str, Any]) -> StateDict:
    """Names and shapes of an architecture's weights; none where it cannot be built so."""
    try:
        with warnings.catch_warnings(), _Weightless():
            warnings.simplefilter("ignore")
            return tensors_in(resolve_architecture(spec, kwargs).state_dict())
    except UserError:
        return {}


class _Weightless(TorchFunctionMode):
    """Weights are made without memory and values; what networks compute their own shapes with is not."""

    _MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.randn)
    _FILLERS = (
        Tensor.fill_, Tensor.zero_, Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.mul_, Tensor.add_,
        Tensor.clamp_, nn.init.constant_, nn.init.ones_, nn.init.zeros_, nn.init.normal_, nn.init.uniform_,
        nn.init.trunc_normal_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
    )  # fmt: skip
    _SCALERS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func in self._FILLERS and (filled := args[0] if args else kwargs["tensor"]).is_meta:
            return filled
        if func in self._SCALERS and args[0].is_meta and isinstance(args[1], (int, float)):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        return func(*args, **kwargs)


def _without_numbers(state: Mapping[str, Any]) -> set[str]:
    return {re.sub(r"\d+", "#", name) for name in state}

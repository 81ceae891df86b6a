"""Weights: found in what a checkpoint holds, given a network's own names, and put into it."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_viz.loading.stubs import Stub, is_network, weights_of
from prune_viz.loading.tensor_checks import UnusableTensor, check_claim, check_tensor, claims_too_much
from prune_viz.utils.errors import UserError, brief, few

StateDict = dict[str, torch.Tensor]

# Where training loops keep the weights, the plain ones before their moving averages.
_PLACES = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip
_DEEPEST = 5  # mappings and lists in mappings and lists
_LONGEST = 64  # of a list that is looked through
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# Counters, of training and of profilers, which the outputs of a network in eval mode do not depend on.
_IDLE = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
_SHARED = 0.5  # of the names that begin alike, so that it may be the name of what is around the network
# Names of DenseNet's layers as torchvision's published files still have them.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")


def find_weights(
    content: Any, path: Path, key: str | None = None
) -> tuple[StateDict | nn.Module | Stub, str, list[str]]:
    """Find the weights in what a checkpoint holds.

    Of several places the first is taken that has a name which training loops give to weights, plain ones
    before moving averages, if it has half as many tensors as any; without such a name the one with the most.

    Parameters
    ----------
    content : object
        What the file held.
    path : Path
        The file, for messages.
    key : str, optional
        Which place to take instead, mappings in mappings parted by dots, places in lists as numbers from 0.

    Returns
    -------
    weights : dict of str to Tensor, nn.Module or Stub
        The tensors there, or a whole module, or the stub of one that was pickled (`prune_viz.loading.stubs`).
    key : str
        Where they were; empty for the top.
    others : list of str
        Where else there are as many.

    Raises
    ------
    UserError
        If there are none, none at `key`, or ones that cannot be a network's (`check_tensors`).
    """
    places = dict(_places(content))
    if not places and isinstance(content, Stub):
        raise UserError(
            f"{path} holds pickled code, which could do anything ({content.name}): save the model's state "
            "dict, or pass --trust-pickle if you trust where the file comes from"
        )
    if not places:
        raise UserError(f"{path} holds no tensors under string names, so it is not a model's checkpoint")
    sizes = {place: len(_state_of(weights)) for place, weights in places.items()}
    if key is None:
        full = [place for place in places if 2 * sizes[place] >= max(sizes.values())]
        named = [place for place in full if place and all(part in _PLACES for part in place)]
        chosen = min(named, key=_rank) if named else max(places, key=lambda place: sizes[place])
    else:
        found = {".".join(place): place for place in places}
        if key not in found:
            there = ", ".join(sorted(repr(one) for one in found if one)) or "none: the weights are at the top"
            raise UserError(f"{path} holds no weights at --key {key}; there are: {there}")
        chosen = found[key]
    others = [".".join(place) for place in places if place != chosen and 2 * sizes[place] >= sizes[chosen]]
    check_tensors(_state_of(places[chosen], whole=True), path)
    return places[chosen], ".".join(chosen), others


def _places(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place that holds a module or tensors under names, the top's first; nothing twice."""
    seen = set() if seen is None else seen
    if id(content) in seen:
        return
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, nn.Module) or is_network(content):
        yield path, content
    elif isinstance(content, Mapping):
        seen.add(id(content))
        if own := tensors_in(content):
            yield path, own
        inner = content.items()
    elif isinstance(content, Stub):
        seen.add(id(content))
        inner = ((str(place), part) for place, part in enumerate(content.arguments or ()))
    elif isinstance(content, (list, tuple)) and len(content) <= _LONGEST:
        seen.add(id(content))
        inner = ((str(place), part) for place, part in enumerate(content))
    if len(path) < _DEEPEST:
        for name, part in inner:
            if isinstance(name, str):
                yield from _places(part, (*path, name), seen)


def _rank(place: tuple[str, ...]) -> tuple[int, ...]:
    """Where a named place stands among others: as its names do, what is in a place before the place."""
    return (*(_PLACES.index(part) for part in place), len(_PLACES))


def _state_of(weights: StateDict | nn.Module | Stub, whole: bool = False) -> StateDict:
    if isinstance(weights, Stub):
        return weights_of(weights, whole)
    return tensors_in(weights.state_dict()) if isinstance(weights, nn.Module) else weights


def check_tensors(weights: StateDict, path: Path) -> None:
    """Raise `UserError`, naming the tensor, for what is sparse, quantised, without values or too large."""
    size, claimed = path.stat().st_size, 0
    for name, tensor in weights.items():
        if nn.parameter.is_lazy(tensor):
            continue
        check_tensor(f"{path}: {name}", tensor)
        if tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path}: {name} {claims_too_much(tuple(tensor.shape)).why}")
        claimed += 4 * tensor.numel()  # as single-precision numbers
    check_claim(claimed, size, path)


def tensors_in(mapping: Mapping[Any, Any]) -> StateDict:
    """What of a mapping is a tensor under a string, usable or not (`check_tensors`)."""
    kinds: Any = (torch.Tensor, UnusableTensor)
    named: dict[str, Any] = {key: value for key, value in mapping.items() if isinstance(key, str)}
    return {key: value for key, value in named.items() if isinstance(value, kinds)}


def plain_state(model: nn.Module) -> StateDict:
    """Give a model's tensors whose shapes are known before the first forward pass."""
    state = tensors_in(model.state_dict())
    return {name: tensor for name, tensor in state.items() if not nn.parameter.is_lazy(tensor)}


def readings(state: StateDict) -> list[StateDict]:
    """A state dict under its own names, and under those that are left without prefixes of training wrappers.

    With a prefix gone, what did not have it belongs to something beside the network (a loss, say).
    """
    # Compiling a part of a network leaves its mark inside the names.
    level = [
        {
            _OLD_DENSENET.sub(r"\1\2", name.replace("._orig_mod.", ".")): tensor
            for name, tensor in state.items()
        }
    ]
    found = [state, *level]
    for _ in range(3):
        level = [
            {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
            for names in level
            for prefix in _prefixes(names)
        ]
        found += level
    return found


def _prefixes(names: StateDict) -> list[str]:
    """What may be around a network of which these are the names."""
    first = Counter(name.partition(".")[0] + "." for name in names if "." in name)
    shared = [prefix for prefix, count in first.items() if count >= _SHARED * len(names)]
    return [prefix for prefix in dict.fromkeys((*_PREFIXES, *shared)) if prefix in first]


def matching(state: StateDict, wanted: StateDict) -> StateDict:
    """The reading of a state dict that has the most of the names that are wanted."""
    return nearest_reading(readings(state), wanted)


def nearest_reading(found: Sequence[StateDict], wanted: StateDict) -> StateDict:
    """Of several `readings`, the one that has the most of the names that are wanted."""
    return max(found, key=lambda names: len(wanted.keys() & names.keys()))


def number_of_classes(state: StateDict, wanted: StateDict) -> int | None:
    """How many classes weights are for, where they differ from what is wanted in that number alone.

    Parameters
    ----------
    state : dict of str to Tensor
        The weights, under the names that the network has (`matching`).
    wanted : dict of str to Tensor
        Those of the network, built for another number of classes.
    """
    differing = {
        (wanted[name].shape[0], tensor.shape[0])
        for name, tensor in state.items()
        if name in wanted
        and wanted[name].shape != tensor.shape
        and wanted[name].shape[1:] == tensor.shape[1:]
        and tensor.ndim
    }
    return differing.pop()[1] if len(differing) == 1 else None


def misfits(state: StateDict, wanted: StateDict) -> list[str]:
    """What keeps weights from filling a network, in words; empty where they do.

    Parameters
    ----------
    state : dict of str to Tensor
        The weights, under the names that the network has (`matching`).
    wanted : dict of str to Tensor
        The network's own, those too whose shapes are known only after a first forward pass.
    """
    odd = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and not nn.parameter.is_lazy(tensor) and state[name].shape != tensor.shape
    ]
    missing = sorted(name for name in wanted.keys() - state.keys() if not name.endswith(_IDLE))
    unexpected = sorted(name for name in state.keys() - wanted.keys() if not name.endswith(_IDLE))
    return [
        f"{len(names)} {what} ({few(names, 3)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", odd))
        if names
    ]


def fill(model: nn.Module, state: StateDict, path: Path) -> None:
    """Load weights into a model.

    Parameters
    ----------
    model : nn.Module
        The network they belong to.
    state : dict of str to Tensor
        The weights, under their names in the file.
    path : Path
        The file, for messages.

    Raises
    ------
    UserError
        If they do not fit; says what does not.
    """
    state = matching(state, plain_state(model))
    check_real(state, plain_state(model), path)
    problems = misfits(state, tensors_in(model.state_dict()))
    if not problems:
        try:
            named = OrderedDict(state)
            # Some modules read versions there; prefixes and pickles of others lose them.
            named._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
            model.load_state_dict(named, strict=False)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            problems = [brief(error)]
    if problems:
        raise UserError(f"the weights of {path} do not fit the architecture: {'; '.join(problems)}")


def check_real(state: StateDict, wanted: StateDict, path: Path) -> None:
    """Raise `UserError`, naming the tensor, for complex numbers where a network has real ones."""
    for name, tensor in state.items():
        if tensor.is_complex() and name in wanted and not wanted[name].is_complex():
            raise UserError(f"{path}: {name} holds complex numbers, the network's are real")


def check_finite(model: nn.Module) -> None:
    """Raise `UserError`, naming the tensor, for weights and statistics of norms that cannot be computed with.

    Those are NaN and infinity, negative variances, and tensors that are sparse, quantised or without values.
    Other buffers may hold any number: attention is masked with infinity, observers of ranges begin with it.
    """
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in plain_state(model).items():
        watched = name in weights or name.endswith(("running_mean", "running_var"))
        if watched or tensor.is_meta:
            check_tensor(name, tensor)
        if not watched or not tensor.is_floating_point():
            continue
        values = tensor if tensor.element_size() > 1 else tensor.float()  # of 8 bits few things are known
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"{name} holds {bad} values that are not finite (NaN or infinity); repair the model first"
            )
        negative = int((values < 0).sum()) if name.endswith("running_var") else 0
        if negative:
            raise UserError(f"{name} holds {negative} negative values; repair the model first")

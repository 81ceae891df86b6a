"""From a file to a model: state dicts, training checkpoints, safetensors and, if trusted, pickled modules.

`formats` reads the file, `state_dicts` finds the weights in it, and here they are put into the architecture
they belong to, which `architecture_inference` finds where nobody names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_viz.loading.architecture_inference import recognise, shapes_of
from prune_viz.loading.architectures import resolve_architecture
from prune_viz.loading.fixed_inputs import FixedInputs, fix_inputs, fixed_from
from prune_viz.loading.formats import read_content
from prune_viz.loading.smaller_networks import build_smaller, removed_before
from prune_viz.loading.state_dicts import (
    StateDict,
    check_finite,
    fill,
    find_weights,
    matching,
    number_of_classes,
    plain_state,
    tensors_in,
)
from prune_viz.loading.stubs import Stub, rebuild_network, weights_of
from prune_viz.utils.errors import UserError, few, one_line
from prune_viz.utils.files import sha256

# A file may name its own architecture, but not a module of the file's choosing to import.
_OWN_ARCHITECTURES = ("prune_viz.demo:DigitsNet",)
_LARGEST_OWN = 64  # times the file, of the network that it names
_LONGEST_LIST = 64  # among the arguments of an architecture
_LARGEST_SUM = 4096  # of the whole numbers in all such lists, which may be numbers of layers
_LONGEST_LINE = 1_000  # of a message, in which names from a file may stand


@dataclass(frozen=True)
class Checkpoint:
    """A model and where it came from.

    Attributes
    ----------
    model : nn.Module
        On the CPU, float32, eval mode.
    path : Path
        The file it was read from.
    sha256 : str
        Hex digest of that file.
    arch : str or None
        The architecture's SPEC; None for a pickled module.
    arch_kwargs : dict
        What the architecture was built with.
    recognised : bool
        Whether the architecture was inferred from the weights alone.
    key : str
        Where in the file the weights were; empty for the top.
    other_keys : list of str
        Where else in the file there are some.
    trust_pickle : bool
        Whether pickled code was allowed.
    input_shape : tuple of int or None
        (C, *spatial), where the file itself says it.
    pruning : list of dict
        The masks that `prune-viz apply --mode remove` has already applied to it, as one step.
    held : FixedInputs or None
        Where it takes several inputs, what all but one of them are held at (`hold`).
    inputs_said : tuple of str
        How the command line said what it takes, as words; empty where it did not.
    """

    model: nn.Module
    path: Path
    sha256: str
    arch: str | None = None
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    recognised: bool = False
    key: str = ""
    other_keys: list[str] = field(default_factory=list)
    trust_pickle: bool = False
    input_shape: tuple[int, ...] | None = None
    pruning: list[dict[str, torch.Tensor]] = field(default_factory=list)
    held: FixedInputs | None = None
    inputs_said: tuple[str, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """Provenance as `run.json` holds it."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "arch": self.arch,
            "arch_kwargs": self.arch_kwargs,
            "recognised": self.recognised,
            "key": self.key,
            "trust_pickle": self.trust_pickle,
            "held_inputs": None if self.held is None else self.held.digest,
            "inputs_said": list(self.inputs_said),
        }

    def hold(self, inputs: FixedInputs) -> Checkpoint:
        """The same with its model, changed in place, one of a single input (`fix_inputs`)."""
        fix_inputs(self.model, inputs)
        return replace(self, held=inputs, input_shape=inputs.input_shape)

    def describe(self) -> list[str]:
        """What reading the file decided by itself, in words; empty where nothing."""
        lines = []
        if self.recognised:
            classes = self.arch_kwargs.get("num_classes")
            lines.append(f"recognised {self.arch}" + (f", {classes} classes" if classes is not None else ""))
        if self.other_keys:
            place = f"under {self.key}" if self.key else "at the top"
            others = few([other or "''" for other in self.other_keys])
            lines.append(
                f"weights {place} of the file are used; there are others, which --key takes: {others}"
            )
        return lines


def load_model(
    path: Path | str,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    key: str | None = None,
) -> nn.Module:
    """Read a model from a file; the arguments and errors are `load_checkpoint`'s.

    Returns
    -------
    nn.Module
        On the CPU, float32, eval mode.
    """
    return load_checkpoint(path, arch, arch_kwargs, trust_pickle, key).model


def load_checkpoint(
    path: Path | str,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    key: str | None = None,
) -> Checkpoint:
    """Read a model and its provenance from a file.

    Parameters
    ----------
    path : path
        A state dict, a training checkpoint that wraps one, a safetensors file, a checkpoint written by
        prune-viz, or a pickled ``nn.Module``: of torch's, torchvision's and timm's classes the whole, of
        others the weights alone or, with `trust_pickle`, the whole.
    arch : str, optional
        SPEC of the architecture, see `prune_viz.loading.architectures.resolve_architecture`. By default the
        one that the file names, if it is torchvision's or prune-viz's own, or else the one whose names and
        shapes are the weights' (`prune_viz.loading.architecture_inference`).
    arch_kwargs : mapping, optional
        Keyword arguments for the architecture. For a torchvision or timm SPEC without ``num_classes`` the
        number of classes is read from the weights.
    trust_pickle : bool
        Let the file run code while it is read.
    key : str, optional
        Where in the file the weights are, if not where `prune_viz.loading.state_dicts.find_weights` looks
        first.

    Raises
    ------
    UserError
        If the file is missing, damaged, not a checkpoint, wants to run code, does not fit the
        architecture, or holds weights that are not finite.
    """
    try:
        return _load(Path(path), arch, arch_kwargs, trust_pickle, key)
    except UserError as error:  # its words may be the file's
        raise UserError(one_line(error)[:_LONGEST_LINE]) from error.__cause__


def _load(
    path: Path, arch: str | None, arch_kwargs: Mapping[str, Any] | None, trust_pickle: bool, key: str | None
) -> Checkpoint:
    content = read_content(path, trust_pickle)
    weights, key, other_keys = find_weights(content, path, key)
    about = content if isinstance(content, Mapping) and "state_dict" in content else {}
    pruning, input_shape = removed_before(path, about)
    kwargs = dict(arch_kwargs or {})
    recognised, strange = False, ""
    if isinstance(weights, Stub):
        weights, strange = _from_stub(weights, arch)
    if isinstance(weights, nn.Module) and arch is None:
        model = _unwrap(weights)
    else:
        state = tensors_in(_unwrap(weights).state_dict()) if isinstance(weights, nn.Module) else weights
        named, kwargs = architecture_of(path, about, arch, arch_kwargs)
        if named is None:
            recognised = True
            named, kwargs = _recognised(path, state, about.get("arch"), kwargs, strange)
        arch = named
        if pruning and input_shape:
            held = about.get("held_inputs")
            inputs = None if held is None else fixed_from(held, path)
            model = build_smaller(path, arch, kwargs, pruning[0], input_shape, inputs, state)
        else:
            model, kwargs = _build_for(state, arch, kwargs)
            fill(model, state, path)
    model = model.cpu().float().eval()
    check_finite(model)
    return Checkpoint(
        model=model,
        path=path,
        sha256=sha256(path),
        arch=arch,
        arch_kwargs=kwargs,
        recognised=recognised,
        key=key,
        other_keys=other_keys,
        trust_pickle=trust_pickle,
        input_shape=input_shape,
        pruning=pruning,
    )


def _unwrap(model: nn.Module) -> nn.Module:
    """Take the network out of what data-parallel training and `torch.compile` put around it."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "the file holds a TorchScript model, which cannot be taken apart; save its state dict"
        )
    if isinstance(model, nn.DataParallel):
        return _unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrap(inner) if isinstance(inner, nn.Module) else model


def architecture_of(
    path: Path, about: Mapping[str, Any], arch: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[str | None, dict[str, Any]]:
    """Choose the architecture to build: the caller's, else the one named for the file where that is safe.

    Parameters
    ----------
    path : Path
        The file.
    about : mapping
        What the file, or a run of it, says: ``arch`` and ``arch_kwargs``. It is not trusted.
    arch, kwargs : str and mapping, optional
        The caller's.

    Returns
    -------
    arch : str or None
        None where there is none.
    kwargs : dict

    Raises
    ------
    UserError
        If what is named would run code, or asks for far more than the file holds.
    """
    said, said_kwargs = about.get("arch"), about.get("arch_kwargs")
    if arch is None:
        if not isinstance(said, str) or ":" not in said:
            return None, dict(kwargs or {})
        if not said.startswith("torchvision:") and said not in _OWN_ARCHITECTURES:
            raise UserError(f"{path} asks for code, {said}: pass --arch {said} if you trust it")
        arch = said
    if arch == said and kwargs is None:
        said_kwargs = {} if said_kwargs is None else said_kwargs
        if not isinstance(said_kwargs, dict) or not _are_arguments(said_kwargs):
            raise UserError(f"{path} is damaged: its arch_kwargs are not names and plain values")
        named = sum(tensor.numel() for tensor in shapes_of(arch, said_kwargs).values())
        if 4 * named > _LARGEST_OWN * path.stat().st_size + 2**28:
            raise UserError(
                f"{path} asks for {arch} with {said_kwargs}, which is far larger than the file: pass --arch "
                "and --arch-kwargs if you trust it"
            )
        kwargs = said_kwargs
    return arch, dict(kwargs or {})


def _are_arguments(kwargs: Mapping[Any, Any]) -> bool:
    """Whether a file's arguments of an architecture are plain, and ask for no network without end."""
    plain, total, left = (type(None), bool, int, float, str), 0, list(kwargs.values())
    for depth in range(4):
        lists = [value for value in left if type(value) in (list, tuple)]
        if any(type(value) not in plain for value in left if type(value) not in (list, tuple)):
            return False
        if any(len(value) > _LONGEST_LIST for value in lists) or len(lists) > _LONGEST_LIST:
            return False
        if any(type(value) is int and abs(value) >= 2**31 for value in left):
            return False
        total += sum(abs(value) for value in left if type(value) is int) if depth else 0
        left = [item for value in lists for item in value]
    return not left and total <= _LARGEST_SUM and all(isinstance(name, str) for name in kwargs)


def _from_stub(stub: Stub, arch: str | None) -> tuple[StateDict | nn.Module, str]:
    """A pickled network, or its weights and what of it would have run as code."""
    if arch is not None:
        return weights_of(stub), ""
    try:
        return rebuild_network(stub), ""
    except UserError as error:
        return weights_of(stub), str(error)


def _recognised(
    path: Path, state: StateDict, said: object, kwargs: dict[str, Any], strange: str
) -> tuple[str, dict[str, Any]]:
    """The architecture whose names and shapes are the weights', or `UserError` with those that come near."""
    found = recognise(state, said if isinstance(said, str) else None)
    if found and not found[0].misfits:
        return found[0].arch, {**found[0].kwargs, **kwargs}
    if strange:
        raise UserError(
            f"{path} holds pickled code, which could do anything ({strange}): name its architecture with "
            "--arch, and its weights are taken, or pass --trust-pickle if you trust where the file comes from"
        )
    near = "; ".join(f"{one.arch} has {', '.join(one.misfits)}" for one in found)
    raise UserError(
        f"{path} holds weights but no network, and they fit none that is known: name their architecture with "
        "--arch, such as --arch package.module:factory" + (f" (nearest: {near})" if near else "")
    )


def _build_for(state: StateDict, arch: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build `arch`, with the number of classes that the weights have if nobody gave one."""
    model = resolve_architecture(arch, kwargs)
    if not arch.startswith(("torchvision:", "timm:")) or "num_classes" in kwargs:
        return model, kwargs
    wanted = plain_state(model)
    classes = number_of_classes(matching(state, wanted), wanted)
    if classes is None:
        return model, kwargs
    with_classes = {**kwargs, "num_classes": classes}
    try:
        return resolve_architecture(arch, with_classes), with_classes
    except UserError:
        return model, kwargs

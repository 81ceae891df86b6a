"""From a file to a model: state dicts, training checkpoints, safetensors and, if trusted, pickled modules.

`archives` reads the file; here its weights are found and put into the architecture they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune_viz.architectures import resolve_architecture
from prune_viz.archives import few, read_content
from prune_viz.errors import UserError
from prune_viz.runs import sha256

StateDict = dict[str, torch.Tensor]

# Where training loops keep the weights, the plain ones before their moving averages.
_WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema",
)  # fmt: skip
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# A file may name its own architecture, but not a module of the file's choosing to import.
_OWN_ARCHITECTURES = ("prune_viz.demo:DigitsNet",)


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
    trust_pickle : bool
        Whether pickled code was allowed.
    input_shape : tuple of int or None
        (C, *spatial), where the file itself says it.
    pruning : list of dict
        The masks that `prune-viz apply --mode remove` has already carried out on it, in order.
    """

    model: nn.Module
    path: Path
    sha256: str
    arch: str | None = None
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    input_shape: tuple[int, ...] | None = None
    pruning: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def source(self) -> dict[str, Any]:
        """Provenance as `run.json` holds it."""
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "arch": self.arch,
            "arch_kwargs": self.arch_kwargs,
            "trust_pickle": self.trust_pickle,
        }


def load_model(
    path: Path | str,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> nn.Module:
    """Read a model from a file; the arguments and errors are `load_checkpoint`'s.

    Returns
    -------
    nn.Module
        On the CPU, float32, eval mode.
    """
    return load_checkpoint(path, arch, arch_kwargs, trust_pickle).model


def load_checkpoint(
    path: Path | str,
    arch: str | None = None,
    arch_kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
) -> Checkpoint:
    """Read a model and its provenance from a file.

    Parameters
    ----------
    path : path
        A state dict, a training checkpoint that wraps one, a safetensors file, a checkpoint written by
        prune-viz, or, with `trust_pickle`, a whole pickled ``nn.Module``.
    arch : str, optional
        SPEC of the architecture, see `prune_viz.architectures.resolve_architecture`. Files without code
        need it, unless they name a torchvision architecture or prune-viz's own.
    arch_kwargs : mapping, optional
        Keyword arguments for the architecture. For a torchvision SPEC without ``num_classes`` the number
        of classes is read from the weights.
    trust_pickle : bool
        Let the file run code while it is read.

    Raises
    ------
    UserError
        If the file is missing, damaged, not a checkpoint, wants to run code, does not fit the
        architecture, or holds weights that are not finite.
    """
    path = Path(path)
    content = read_content(path, trust_pickle)
    weights = _find_weights(content)
    if weights is None:
        raise UserError(f"{path} holds no tensors under string names, so it is not a model's checkpoint")
    about = content if isinstance(content, Mapping) and "state_dict" in content else {}
    pruning, input_shape = _pruning_of(about)
    kwargs = dict(arch_kwargs or {})
    if isinstance(weights, nn.Module) and arch is None:
        model = _unwrap(weights)
    else:
        state = _tensors(_unwrap(weights).state_dict()) if isinstance(weights, nn.Module) else weights
        arch, kwargs = _architecture_of(path, about, arch, arch_kwargs)
        if pruning and input_shape:
            model = _build_pruned(path, arch, kwargs, pruning, input_shape, state)
        else:
            model, kwargs = _build_for(state, arch, kwargs)
            _fill(model, state, path)
    model = model.cpu().float().eval()
    check_finite(model)
    return Checkpoint(
        model=model,
        path=path,
        sha256=sha256(path),
        arch=arch,
        arch_kwargs=kwargs,
        trust_pickle=trust_pickle,
        input_shape=input_shape,
        pruning=pruning,
    )


def _tensors(mapping: Mapping[Any, Any]) -> StateDict:
    return {key: value for key, value in mapping.items() if isinstance(key, str) and torch.is_tensor(value)}


def _find_weights(content: Any, depth: int = 3) -> StateDict | nn.Module | None:
    """Find the state dict or module in a checkpoint, under the names that training loops give it."""
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, Mapping) or depth == 0:
        return None
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, (Mapping, nn.Module)) and (found := _find_weights(inner, depth - 1)) is not None:
            return found
    inner_ones = [_tensors(value) for value in content.values() if isinstance(value, Mapping)]
    return max([_tensors(content), *inner_ones], key=len) or None


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


def _architecture_of(
    path: Path, about: Mapping[str, Any], arch: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Choose the architecture to build: the caller's, else the file's own where that is safe."""
    said, said_kwargs = about.get("arch"), about.get("arch_kwargs") or {}
    if arch is None:
        if not isinstance(said, str) or ":" not in said:
            raise UserError(f"{path} holds weights but no network: name its architecture with --arch")
        if not said.startswith("torchvision:") and said not in _OWN_ARCHITECTURES:
            raise UserError(f"{path} asks for code, {said}: pass --arch {said} if you trust it")
        arch = said
    if arch == said and kwargs is None:
        if not isinstance(said_kwargs, dict) or not all(isinstance(key, str) for key in said_kwargs):
            raise UserError(f"{path} is damaged: its arch_kwargs are not names and values")
        kwargs = said_kwargs
    return arch, dict(kwargs or {})


def _pruning_of(about: Mapping[str, Any]) -> tuple[list[dict[str, torch.Tensor]], tuple[int, ...] | None]:
    """Give what prune-viz removed before it wrote the file, and the shape of the network's input."""
    shape, pruning = about.get("input_shape"), about.get("pruning")
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size > 0 for size in shape):
        return [], None
    if not isinstance(pruning, list) or not all(isinstance(masks, dict) for masks in pruning):
        return [], tuple(shape)
    return pruning, tuple(shape)


def _build_pruned(
    path: Path,
    arch: str,
    kwargs: Mapping[str, Any],
    pruning: Sequence[dict[str, torch.Tensor]],
    input_shape: tuple[int, ...],
    state: StateDict,
) -> nn.Module:
    """Build the architecture, remove from it the filters that the file's weights lack, and load those."""
    from prune_viz.surgery import rebuild_smaller, remove_filters

    model = resolve_architecture(arch, kwargs).cpu().float().eval()
    try:
        example = torch.zeros(1, *input_shape)
        for masks in pruning[:-1]:
            model = remove_filters(model, masks, example)
        return rebuild_smaller(model, pruning[-1], state, example)
    except Exception as error:  # a stranger's record can be wrong in any way
        raise UserError(f"{path}: its record of removed filters does not fit {arch}: {error}") from error


def _build_for(state: StateDict, arch: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Build `arch`, with the number of classes that the weights have if nobody gave one."""
    model = resolve_architecture(arch, kwargs)
    if not arch.startswith("torchvision:") or "num_classes" in kwargs:
        return model, kwargs
    wanted = _plain_state(model)
    misfits = {
        (wanted[name].shape[:1], tensor.shape[:1])
        for name, tensor in _matching(state, wanted).items()
        if name in wanted
        and wanted[name].shape != tensor.shape
        and wanted[name].shape[1:] == tensor.shape[1:]
    }
    if len(misfits) != 1:
        return model, kwargs
    with_classes = {**kwargs, "num_classes": misfits.pop()[1][0]}
    try:
        return resolve_architecture(arch, with_classes), with_classes
    except UserError:
        return model, kwargs


def _plain_state(model: nn.Module) -> StateDict:
    """Give the model's tensors whose shapes are known before the first forward pass."""
    state = _tensors(model.state_dict())
    return {name: tensor for name, tensor in state.items() if not nn.parameter.is_lazy(tensor)}


def _matching(state: StateDict, wanted: StateDict) -> StateDict:
    """Give `state` the names that fit best once the prefixes of training wrappers are gone.

    With a prefix gone, what did not have it belongs to something beside the network (a loss, say).
    """
    # Compiling a part of a network leaves its mark inside the names.
    level = [{name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}]
    readings = [state, *level]
    for _ in range(3):
        level = [
            {name.removeprefix(prefix): tensor for name, tensor in names.items() if name.startswith(prefix)}
            for names in level
            for prefix in _PREFIXES
            if any(name.startswith(prefix) for name in names)
        ]
        readings += level
    return max(readings, key=lambda names: len(wanted.keys() & names.keys()))


def _fill(model: nn.Module, state: StateDict, path: Path) -> None:
    """Load `state` into `model`, or say in one line what does not fit."""
    wanted = _plain_state(model)
    state = _matching(state, wanted)
    odd = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing: list[str] = []
    unexpected: list[str] = []
    if not odd:
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"the weights of {path} do not fit the architecture: {error}") from error
    else:
        missing, unexpected = list(wanted.keys() - state.keys()), list(state.keys() - wanted.keys())
    # Counters, which the outputs of a network in eval mode do not depend on.
    idle = ("num_batches_tracked", "n_averaged")
    problems = [
        f"{len(names)} {what} ({few(sorted(names) if what != 'of another shape' else names, 3)})"
        for what, names in (
            ("missing", [name for name in missing if not name.endswith(idle)]),
            ("unexpected", [name for name in unexpected if not name.endswith(idle)]),
            ("of another shape", odd),
        )
        if names
    ]
    if problems:
        raise UserError(f"the weights of {path} do not fit the architecture: {'; '.join(problems)}")


def check_finite(model: nn.Module) -> None:
    """Raise `UserError`, naming the tensor, if a parameter or buffer holds NaN or infinity."""
    for name, tensor in _plain_state(model).items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{name} holds {bad} values that are not finite (NaN or infinity); repair the model first"
            )

"""Networks without parametrised tensors: masks, weight norm, torch's own pruning."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from prune_viz.network.attention_heads import narrow_attention
from prune_viz.network.packed_attention import PackedAttention
from prune_viz.utils.errors import UserError, brief

_Network = TypeVar("_Network", bound=nn.Module)


def plain_copy(model: _Network, *, share: bool = False) -> _Network:
    """A copy of `model` in eval mode, its parametrisations baked into its tensors (`bake_parameters`).

    Parameters
    ----------
    model : nn.Module
        The network.
    share : bool
        As in `free_copy`.

    Raises
    ------
    UserError
        If the model cannot be copied.
    """
    twin = free_copy(model, share=share).eval()
    bake_parameters(twin)
    narrow_attention(twin)  # again: some was parametrised
    return twin


def opened(model: _Network) -> _Network:
    """The model, or, where it has torch's own attention, a plain copy that shares its parameters.

    In copies that attention has a layer more (`prune_viz.network.packed_attention`). So a model whose layers
    are looked up by name is opened first.
    """
    attention = [one for one in model.modules() if isinstance(one, nn.MultiheadAttention)]
    if all(isinstance(one, PackedAttention) for one in attention):
        return model
    return plain_copy(model, share=True)


def free_copy(model: _Network, *, share: bool = False) -> _Network:
    """A copy of a model, without the history of tensors that it keeps beside its weights.

    Such are made by hooks, anew at each call, or kept for later; with a history they cannot be copied. Its
    attention has forms whose heads can be followed (`prune_viz.network.attention_heads.narrow_attention`).

    Parameters
    ----------
    model : nn.Module
        The network.
    share : bool
        Whether the copy's parameters lie where the model's do, which costs no memory. Then nothing may write
        into them, nor a call of it; its buffers are its own.

    Raises
    ------
    UserError
        If the model cannot be copied.
    """
    known: dict[int, Any] = {}
    for parameter in model.parameters() if share else ():
        if type(parameter) is nn.Parameter and not parameter.is_inference():
            known[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    for module in model.modules():
        for kept in vars(module).values():
            inner = list(kept.values()) if isinstance(kept, dict) else kept
            for made in (kept, *(inner if isinstance(inner, (list, tuple)) else ())):
                if torch.is_tensor(made) and not made.is_leaf:
                    known[id(made)] = made.detach().clone()
    try:
        twin = copy.deepcopy(model, known)
    except Exception as error:  # whatever an untrusted module holds
        raise UserError(f"the model cannot be copied ({brief(error)})") from None
    narrow_attention(twin)
    return twin


def have_same_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Whether two copies of a model have parameters of the same values."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@contextmanager
def attached(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks, by the handles that registering them returned, which are removed in the end whatever happens."""
    hooks = list(handles)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Let a model be run or traced, and restore the attributes that it had before.

    Networks that keep state from call to call, or what they saw, then do not take it from one use to another.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    # Containers stay the same objects: handles of hooks know them.
    containers = [
        (value, value.copy())
        for _, kept in attributes
        for value in kept.values()
        if type(value) in (dict, list, set, OrderedDict)
    ]
    try:
        yield
    finally:
        for now, before in (*attributes, *containers):
            now.clear()
            (now.extend if isinstance(now, list) else now.update)(before)


def bake_parameters(model: nn.Module) -> None:
    """Turn what parametrises tensors of `model` (masks, weight norm) into plain values.

    That is every parametrisation, the masks of `torch.nn.utils.prune`, and the hooks of the older weight norm
    and spectral norm.
    """
    for module in list(model.modules()):
        for name in pruned_by_torch(module):
            prune.remove(module, name)  # type: ignore[no-untyped-call]
        _bake_parametrisations(module)
        for name, norm in normed_by_hooks(module).items():
            _remove_norm(module, name, norm)


def _bake_parametrisations(module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    unshare_class(module)
    for name in list(module.parametrizations):  # type: ignore[arg-type]
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def unshare_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own: deep copies share the one that parametrising made."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))


def parametrised(model: nn.Module) -> list[str]:
    """Names of the tensors that are made from others, as with weight norm, by parametrisations or hooks."""
    return [
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        for name in (
            *(module.parametrizations if parametrize.is_parametrized(module) else ()),
            *normed_by_hooks(module),
        )
    ]


def normed_by_hooks(module: nn.Module) -> dict[str, WeightNorm | SpectralNorm]:
    """The older weight norms and spectral norms of a module, by the tensor that they make."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name: hook for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


def parametrise_norms(module: nn.Module) -> None:
    """Turn the older norms of a module, in place, into parametrisations, over which more can be laid.

    Parameters stay the same objects.
    """
    for name, norm in normed_by_hooks(module).items():
        if isinstance(norm, WeightNorm):
            length, direction = getattr(module, f"{name}_g"), getattr(module, f"{name}_v")
            _remove_norm(module, name, norm)
            parametrizations.weight_norm(module, name, norm.dim)
            made: Any = module.parametrizations[name]  # type: ignore[index]
            made.original0, made.original1 = length, direction
        else:
            source = getattr(module, f"{name}_orig")
            left, right = getattr(module, f"{name}_u"), getattr(module, f"{name}_v")
            _remove_norm(module, name, norm)
            parametrizations.spectral_norm(module, name, norm.n_power_iterations, norm.eps, norm.dim)
            made = module.parametrizations[name]  # type: ignore[index]
            made.original = source
            made[0]._u, made[0]._v = left, right


def _remove_norm(module: nn.Module, name: str, norm: WeightNorm | SpectralNorm) -> None:
    (remove_weight_norm if isinstance(norm, WeightNorm) else remove_spectral_norm)(module, name)


def pruned_by_torch(module: nn.Module) -> set[str]:
    """Names of the parameters that `torch.nn.utils.prune` has put masks over."""
    hooks = module._forward_pre_hooks.values()
    return {hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)}

"""Stubs that stand for what an untrusted file would call, and networks put together again from them.

`prune_viz.loading.safe_unpickler` makes the stubs. Networks of torch's, torchvision's and timm's own
classes are put together again attribute by attribute, none of those classes being called.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.loading.tensor_checks import UnusableTensor
from prune_viz.utils.errors import UserError

# Where the classes of networks live that are put together again.
_PACKAGES = re.compile(
    r"(torch\.nn\.modules|torch\.nn\.parallel\.data_parallel|torchvision\.(models|ops)|timm\.(models|layers))(\.|$)"
)
_HOOKS = re.compile(r"_(state_dict|load_state_dict|forward|backward)(_pre|_post)?_hooks\w*")
_INNER = ("_parameters", "_buffers", "_modules")
_DEEPEST = 100  # things in things
_MOST_LAYERS = 100_000  # of a network, one that stands in several others counted for each
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype)


class Stub:
    """What a pickle would have made by calling something; one subclass a name.

    Attributes
    ----------
    name : str
        Of what would have been called.
    state : object
        What it would have been given as its attributes.
    arguments : tuple
        What it would have been called with.
    """

    name = ""
    state: Any = None
    arguments: Any = ()

    def __new__(cls, *arguments: Any, **named: Any) -> Stub:
        """A stub, whatever it is called with."""
        stub = object.__new__(cls)
        stub.arguments = arguments
        return stub


def stub_for(name: str) -> type[Stub]:
    """A class of stubs that stands for a name."""
    return type("Stub", (Stub,), {"name": name})


def is_network(stub: Any) -> bool:
    """Whether a stub stands for an ``nn.Module``."""
    return isinstance(stub, Stub) and isinstance(stub.state, dict) and all(k in stub.state for k in _INNER)


def weights_of(stub: Stub, whole: bool = False) -> dict[str, Tensor]:
    """The state dict of a network that a stub stands for.

    Parameters
    ----------
    stub : Stub
        Stands for the network.
    whole : bool
        Take buffers too that are no part of its state dict.

    Raises
    ------
    UserError
        If its layers stand in one another so often that they could not be counted.
    """
    return _weights_of(stub, "", _DEEPEST, [_MOST_LAYERS], whole)


def _weights_of(stub: Any, prefix: str, depth: int, left: list[int], whole: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if depth == 0 or not is_network(stub):
        return found
    _count_down(left)
    skipped = () if whole else _skipped(stub)
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(stub.state[kind]):
            if isinstance(value, (Tensor, UnusableTensor)) and not (kind == "_buffers" and name in skipped):
                found[prefix + name] = value  # type: ignore[assignment]
    for name, child in _items(stub.state["_modules"]):
        found.update(_weights_of(child, f"{prefix}{name}.", depth - 1, left, whole))
    return found


def _skipped(stub: Stub) -> frozenset[Any]:
    """Names of buffers that are no part of the state dict."""
    names = stub.state.get("_non_persistent_buffers_set")
    return frozenset(names) if isinstance(names, (set, frozenset)) else frozenset()


def _count_down(left: list[int]) -> None:
    left[0] -= 1
    if left[0] < 0:
        raise UserError("the file's layers stand in one another without end")


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in mapping.items() if isinstance(k, str)] if isinstance(mapping, Mapping) else []


def rebuild_network(stub: Stub) -> nn.Module:
    """Put a network together again, from classes of torch, torchvision and timm, none of them called.

    Raises
    ------
    UserError
        Naming what is not theirs, or not plain data.
    """
    try:
        weights_of(stub)  # before anything that walks all layers by name
        return _rebuilt(stub, {}, _DEEPEST)
    except (KeyError, TypeError) as error:  # names that cannot be
        raise UserError(str(error)) from None


def _rebuilt(stub: Any, made: dict[int, nn.Module | None], depth: int) -> nn.Module:
    if id(stub) in made:
        known = made[id(stub)]
        if known is None:
            raise UserError(f"{stub.name} inside itself")
        return known
    if depth == 0 or not is_network(stub):
        raise UserError("a layer that is none")
    kind = _network_class(stub.name)
    if kind is None:
        raise UserError(stub.name)
    module: nn.Module = kind.__new__(kind)
    nn.Module.__init__(module)
    made[id(stub)] = None
    state = stub.state
    skipped = _skipped(stub)
    for name, value in _items(state["_parameters"]):
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(f"{stub.name}.{name}")
        module.register_parameter(name, None if value is None else nn.Parameter(value))
    for name, value in _items(state["_buffers"]):
        if value is not None and not isinstance(value, Tensor):
            raise UserError(f"{stub.name}.{name}")
        module.register_buffer(name, value, persistent=name not in skipped)
    for name, child in _items(state["_modules"]):
        module.add_module(name, None if child is None else _rebuilt(child, made, depth - 1))
    for name, value in state.items():
        if name in _INNER or name == "_non_persistent_buffers_set":
            continue
        if isinstance(name, str) and _HOOKS.fullmatch(name):
            if value:
                raise UserError(f"{stub.name}.{name}")
            continue
        if isinstance(value, type) and issubclass(value, Stub):
            continue  # a class, with which layers were made
        if not _may_be_set(kind, name) or not _is_plain(value):
            raise UserError(f"{stub.name}.{name}")
        module.__dict__[name] = value
    made[id(stub)] = module
    return module


def _network_class(name: str) -> type[nn.Module] | None:
    """The class of a network or layer that torch, torchvision or timm define under this name, if any."""
    home, _, own = name.rpartition(".")
    if not _PACKAGES.match(home):
        return None
    try:
        found = getattr(importlib.import_module(home), own, None)
    except Exception:  # no such module, or one for what is not installed
        return None
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != home:
        return None
    return None if issubclass(found, fx.GraphModule) else found  # which makes code of its attributes


def _may_be_set(kind: type, name: Any) -> bool:
    """Whether an attribute is data, and hides nothing that the class does."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        return False
    own = inspect.getattr_static(kind, name, None)
    return own is None or isinstance(own, (*_PLAIN, list, tuple))


def _is_plain(value: Any, depth: int = 8, plain: set[int] | None = None) -> bool:
    """Whether there is nothing but plain data in a thing; what was found `plain` is not searched again."""
    plain = set() if plain is None else plain
    if id(value) in plain:
        return True
    if depth and type(value) in (list, tuple, set, frozenset, dict, OrderedDict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if not all(_is_plain(one, depth - 1, plain) for one in inner):
            return False
        plain.add(id(value))
        return True
    return type(value) in _PLAIN

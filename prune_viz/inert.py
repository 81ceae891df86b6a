"""Checkpoints read without anything of theirs being called: what is not plain data becomes an inert stub.

A pickle names functions and classes, and calls them as it is read. Here every name stands for a stub that
keeps its attributes alone, but for the few that make tensors, which are made by functions of our own.
Networks of torch's, torchvision's and timm's own classes are put together again from their stubs, attribute
by attribute.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from prune_viz.errors import UserError, brief

# Where the classes of networks live that are put together again.
_PACKAGES = re.compile(
    r"(torch\.nn\.modules|torch\.nn\.parallel\.data_parallel|torchvision\.(models|ops)|timm\.(models|layers))(\.|$)"
)
_HOOKS = re.compile(r"_(state_dict|load_state_dict|forward|backward)(_pre|_post)?_hooks\w*")
_INNER = ("_parameters", "_buffers", "_modules")
_DEEPEST = 100  # things in things
_MOST_LAYERS = 100_000  # of a network, one that stands in several others counted for each
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype)
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip


class Stub:
    """What a pickle would have made by calling something; one subclass a name. Calling it gives another.

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

    def __call__(self, *arguments: Any, **named: Any) -> Stub:
        """What came of something that came of a name."""
        return Stub()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Nothing is kept of a list's items."""

    def extend(self, items: Any) -> None:
        """Nothing is kept of a list's items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is kept of a mapping's items."""


def stub_for(name: str) -> type[Stub]:
    """A class of stubs that stands for a name."""
    return type("Stub", (Stub,), {"name": name})


class _Maker:
    """Something that a pickle may call; its attributes cannot be set, as pickles set those of functions."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("attributes of a function")


class _Values:
    """A tensor, out of reach of what a pickle may do to an object."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: Any) -> None:
        """Nothing of a tensor but its values is kept."""


class _Mapping(dict[Any, Any]):
    """An ordered mapping; of its attributes what state dicts say of their modules' versions is kept."""

    __slots__ = ("_metadata",)

    def __setstate__(self, state: Any) -> None:
        metadata = state.get("_metadata") if type(state) is dict else None
        if isinstance(metadata, dict) and _is_plain(metadata):
            self._metadata = metadata


def read_inert(path: Path) -> Any:
    """Read what a checkpoint in PyTorch's zip format holds, stubs in the place of what is not plain data.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    object
        What `torch.save` was given, tensors on the CPU; parameters are plain tensors.

    Raises
    ------
    UserError
        If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(pickled) as stream:
                read = _Reader(stream, archive, pickled.removesuffix("data.pkl")).load()
        return _unwrapped(read, {}, _DEEPEST, {})
    except Exception as error:  # a stranger's pickle can be wrong in any way
        text = brief(error)
        raise UserError(f"{path} is damaged and cannot be read ({type(error).__name__}: {text})") from None


class _Reader(pickle._Unpickler):
    """Calls nothing but what is written here. In Python: the other one sets memory aside as a pickle says."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}
        ordered, some = _Maker(_ordered), _Maker(_some)
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): ordered,
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(self._tensor),
            ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
            ("torch", "Size"): _Maker(_tuple),
            ("builtins", "set"): some,
            ("__builtin__", "set"): some,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Give what stands for a name."""
        if (module, name) not in self._known:
            found = getattr(torch, name, None) if module == "torch" else None
            if not isinstance(found, torch.dtype):
                found = stub_for(f"{module}.{name}")
            self._known[module, name] = found
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, Tensor]:
        """The type of what is in a storage, and its bytes."""
        kind, storage, key, _, _ = pid
        name = storage.name.rpartition(".")[2]
        if kind != "storage" or name not in _STORAGES or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage of a kind that is not known")
        if key not in self._storages:
            held = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            empty = torch.empty(0, dtype=torch.uint8)
            self._storages[key] = torch.frombuffer(held, dtype=torch.uint8) if held else empty
        return _STORAGES[name], self._storages[key]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Values:
        dtype, held = storage
        if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor of a shape that cannot be")
        values = held.view(dtype)
        last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        if math.prod(size) and (last >= values.numel() or math.prod(size) > values.numel()):
            raise pickle.UnpicklingError("a tensor that is larger than what the file holds of it")
        return _Values(torch.as_strided(values, tuple(size), tuple(stride), offset))


def _ordered(*items: Any) -> _Mapping:
    return _Mapping(*(item for item in items if type(item) is list))


def _parameter(data: Any, *rest: Any) -> _Values:
    if not isinstance(data, _Values):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return data


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items) if type(items) in (list, tuple) else ()


def _some(items: Any = ()) -> frozenset[str]:
    return frozenset(item for item in items if isinstance(item, str)) if type(items) is list else frozenset()


def _unwrapped(value: Any, seen: dict[int, Any], depth: int, alive: dict[int, Any]) -> Any:
    """The same with tensors themselves; what lies deeper than `depth` is left out.

    `seen` holds what came of each thing, `alive` the things themselves, so that no other takes their place.
    """
    if isinstance(value, _Values):
        return value.tensor
    if depth == 0 or isinstance(value, (_Maker, type)):
        return value if isinstance(value, type) else None
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, Stub):
        seen[id(value)] = value
        value.state = _unwrapped(value.state, seen, depth - 1, alive)
        value.arguments = _unwrapped(value.arguments, seen, depth - 1, alive)
    elif isinstance(value, dict):
        seen[id(value)] = value
        for key in list(value):
            value[key] = _unwrapped(value[key], seen, depth - 1, alive)
    elif isinstance(value, list):
        seen[id(value)] = value
        value[:] = [_unwrapped(item, seen, depth - 1, alive) for item in value]
    elif isinstance(value, tuple):
        alive[id(value)] = value
        seen[id(value)] = tuple(_unwrapped(item, seen, depth - 1, alive) for item in value)
        return seen[id(value)]
    return value


def is_network(stub: Any) -> bool:
    """Whether a stub stands for an ``nn.Module``."""
    return isinstance(stub, Stub) and isinstance(stub.state, dict) and all(k in stub.state for k in _INNER)


def weights_of(stub: Stub) -> dict[str, Tensor]:
    """The state dict of a network that a stub stands for.

    Raises
    ------
    UserError
        If its layers stand in one another so often that they could not be counted.
    """
    return _weights_of(stub, "", _DEEPEST, [_MOST_LAYERS])


def _weights_of(stub: Any, prefix: str, depth: int, left: list[int]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if depth == 0 or not is_network(stub):
        return found
    _count_down(left)
    skipped = stub.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(stub.state[kind]):
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in skipped):
                found[prefix + name] = value
    for name, child in _items(stub.state["_modules"]):
        found.update(_weights_of(child, f"{prefix}{name}.", depth - 1, left))
    return found


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
    skipped = state.get("_non_persistent_buffers_set") or ()
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
    """Whether there is nothing but plain data in a thing; what was found `plain` is not looked at again."""
    plain = set() if plain is None else plain
    if id(value) in plain:
        return True
    if depth and type(value) in (list, tuple, frozenset, dict, OrderedDict):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if not all(_is_plain(one, depth - 1, plain) for one in inner):
            return False
        plain.add(id(value))
        return True
    return type(value) in _PLAIN

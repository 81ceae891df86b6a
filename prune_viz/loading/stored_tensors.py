"""What pickles of `torch.save` say of tensors, checked, and the tensors once their bytes are read."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from prune_viz.loading.stubs import Stub
from prune_viz.loading.tensor_checks import UnusableTensor, claims_too_much

DEEPEST = 100  # things in things
_MOST_AXES = 64
_LARGEST_EMPTY = 2**31  # of a tensor without elements, the product of the other sizes
_FIELDS = 16  # that a state dict says of a module's version

_NAMES = (
    "float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32", "int64", "int32",
    "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "float8_e5m2", "float8_e4m3fn",
    "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits16",
)  # fmt: skip
_ALIASES = {
    "double": "float64", "float": "float32", "half": "float16", "cdouble": "complex128",
    "cfloat": "complex64", "long": "int64", "int": "int32", "short": "int16",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, full)
    for name, full in ({name: name for name in _NAMES} | _ALIASES).items()
    if hasattr(torch, full)
}
STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8, "_UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8, "QUInt8Storage": torch.uint8, "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8, "QUInt2x4Storage": torch.uint8,
}  # fmt: skip


def is_size(number: Any) -> bool:
    """Whether something may be a size, a stride or an offset."""
    return type(number) is int and 0 <= number < 2**63


def parameter_of(data: Any, *rest: Any) -> Any:
    """Give the tensor that a parameter was made of."""
    if not isinstance(data, (Values, UnusableTensor)):
        raise UnpicklingError("a parameter that is no tensor")
    return data


def device_of(*named: Any) -> torch.device | None:
    """Give a device by its name and number; None where there cannot be one."""
    try:
        return torch.device(*named) if all(type(part) in (str, int) for part in named) else None
    except (RuntimeError, TypeError, OverflowError):
        return None


def complex_of(real: Any, imaginary: Any) -> complex:
    """Give a complex number."""
    if type(real) is not float or type(imaginary) is not float:
        raise UnpicklingError("a complex number that cannot be")
    return complex(real, imaginary)


class Maker:
    """Something that a pickle may call; it has no attribute that a pickle could set."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class Storage:
    """Where bytes are kept, of which a part is meant: `count` elements from `start`, or all.

    Its attributes cannot be set by a pickle, nor can those of `Values`.
    """

    __slots__ = ("count", "dtype", "key", "start")

    def __init__(self, key: str, dtype: torch.dtype, start: int = 0, count: int | None = None) -> None:
        self.key, self.dtype, self.start, self.count = key, dtype, start, count


def storage_of(pid: Any) -> Storage:
    """Give what a persistent id means, which `torch.save` writes in the place of a storage."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise UnpicklingError("a reference to something that is not known")
    kind, key, view = pid[1], pid[2], pid[5] if len(pid) == 6 else None
    name = kind.name.rpartition(".")[2] if isinstance(kind, type) and issubclass(kind, Stub) else ""
    if name not in STORAGES or type(key) not in (str, int) or not is_size(pid[4]):
        raise UnpicklingError("a storage of a kind that is not known")
    if view is None:
        return Storage(str(key), STORAGES[name])
    if type(view) is not tuple or len(view) != 3 or not all(map(is_size, view[1:])):
        raise UnpicklingError("a view that cannot be")
    return Storage(str(key), STORAGES[name], *view[1:])


class Values:
    """A tensor whose bytes are not read yet."""

    __slots__ = ("conjugate", "dtype", "made", "negative", "offset", "size", "storage", "stride")

    def __init__(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None, metadata: Any = None
    ) -> None:
        dtype = storage.dtype if dtype is None and isinstance(storage, Storage) else dtype
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise UnpicklingError("a tensor without a storage")
        for sizes in (size, stride):
            if type(sizes) not in (list, tuple) or len(sizes) > _MOST_AXES or not all(map(is_size, sizes)):
                raise UnpicklingError("a tensor of a shape that cannot be")
        if not is_size(offset) or len(size) != len(stride):
            raise UnpicklingError("a tensor of a shape that cannot be")
        self.storage, self.dtype, self.offset = storage, dtype, offset
        self.size, self.stride = tuple(size), tuple(stride)
        marks = metadata if type(metadata) is dict else {}
        self.conjugate, self.negative = marks.get("conj") is True, marks.get("neg") is True
        self.made: Tensor | UnusableTensor | None = None


class Held:
    """The storages of a file.

    Parameters
    ----------
    read : callable
        Gives a storage's bytes by its key.
    size : int
        Bytes of the file.
    """

    def __init__(self, read: Callable[[str], Tensor], size: int) -> None:
        self._read, self._size = read, size
        self._bytes: dict[str, Tensor] = {}
        self._truths: set[str] = set()

    def tensor(self, values: Values) -> Tensor | UnusableTensor:
        """Make a tensor, the same one each time."""
        if values.made is None:
            values.made = self._made(values)
        return values.made

    def _made(self, values: Values) -> Tensor | UnusableTensor:
        width, count = values.dtype.itemsize, math.prod(values.size)
        room = math.prod(max(size, 1) for size in values.size)
        if room * width > (self._size if count else _LARGEST_EMPTY):
            return claims_too_much(values.size)
        held = self._stored(values.storage)
        stored = held[: len(held) // width * width].view(values.dtype)
        last = values.offset + sum(
            (size - 1) * stride for size, stride in zip(values.size, values.stride, strict=True)
        )
        if count == 0:
            return torch.empty(values.size, dtype=values.dtype)
        if last >= len(stored):
            raise UnpicklingError("a tensor is larger than what the file holds of it")
        if values.dtype == torch.bool:
            self._check_truths(values.storage.key)
        start = stored.storage_offset() + values.offset
        tensor = torch.as_strided(stored, values.size, values.stride, start)
        tensor = tensor.conj() if values.conjugate else tensor
        return torch._neg_view(tensor) if values.negative else tensor

    def _check_truths(self, key: str) -> None:
        """Refuse a storage of bools whose bytes are anything else, with which nothing could be counted."""
        if key not in self._truths and int(self._bytes[key].max()) > 1:
            raise UnpicklingError("a truth value is neither 0 nor 1")
        self._truths.add(key)

    def _stored(self, storage: Storage) -> Tensor:
        if storage.key not in self._bytes:
            self._bytes[storage.key] = self._read(storage.key)
        held, width = self._bytes[storage.key], storage.dtype.itemsize
        if storage.count is None:
            return held
        if (storage.start + storage.count) * width > len(held):
            raise UnpicklingError("a view is larger than its storage")
        return held[storage.start * width : (storage.start + storage.count) * width]


class Finisher:
    """Puts tensors in the places of `Values` throughout what a pickle made.

    Parameters
    ----------
    held : Held
        The storages.
    """

    def __init__(self, held: Held) -> None:
        self._held = held
        self._seen: dict[int, Any] = {}  # what came of each thing
        self._alive: list[Any] = []  # the things themselves, so that no other takes their place in memory

    def finish(self, value: Any, depth: int = DEEPEST) -> Any:
        """Give the same with tensors; what lies deeper than `depth` is left out."""
        if isinstance(value, Values):
            return self._held.tensor(value)
        if isinstance(value, (type, str, bytes, bool, int, float, type(None))):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)]
        if depth == 0:
            return None
        self._alive.append(value)
        self._seen[id(value)] = value
        if isinstance(value, Stub):
            value.state = self.finish(value.state, depth - 1)
            value.arguments = self.finish(value.arguments, depth - 1)
        elif isinstance(value, dict):
            for key in list(value):
                value[key] = self.finish(value[key], depth - 1)
        elif isinstance(value, list):
            value[:] = [self.finish(item, depth - 1) for item in value]
        elif isinstance(value, tuple):
            self._seen[id(value)] = tuple(self.finish(item, depth - 1) for item in value)
        elif isinstance(value, Storage):
            self._seen[id(value)] = Stub()
        elif not isinstance(value, _FINISHED):
            self._seen[id(value)] = None
        return self._seen[id(value)]


_FINISHED = (set, frozenset, bytearray, complex, torch.dtype, torch.device, UnusableTensor)


def keep_versions(attributes: Iterable[tuple[OrderedDict[Any, Any], Any]]) -> None:
    """Give mappings what state dicts say of their modules' versions, where that is plain data.

    Parameters
    ----------
    attributes : iterable of (OrderedDict, object)
        Mappings, each with the attributes that it should get.
    """
    plain: dict[int, bool] = {}  # of what many mappings may share
    for mapping, state in attributes:
        versions = state.get("_metadata") if type(state) is dict else None
        if isinstance(versions, dict):
            if id(versions) not in plain:
                plain[id(versions)] = all(map(_is_version, versions.items()))
            if plain[id(versions)]:
                mapping._metadata = versions  # type: ignore[attr-defined]


def _is_version(named: tuple[Any, Any]) -> bool:
    """Whether a name stands with a few plain values that have names."""
    name, fields = named
    if not isinstance(name, str) or not isinstance(fields, dict) or len(fields) > _FIELDS:
        return False
    return all(
        isinstance(field, str) and type(value) in (bool, int, float, str) for field, value in fields.items()
    )

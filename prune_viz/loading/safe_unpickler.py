"""An unpickler for untrusted files of torch.save: it calls nothing that they name, and is bounded.

A pickle names functions and classes, and calls them as it is read. Here every name stands for a stub that
keeps its attributes alone (`prune_viz.loading.stubs`); the few names that make tensors and plain data stand
for functions of our own. Every length is checked against the bytes left before memory is allocated.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch

from prune_viz.loading.stored_tensors import (
    DTYPES,
    STORAGES,
    Maker,
    Values,
    complex_of,
    device_of,
    keep_versions,
    parameter_of,
    storage_of,
)
from prune_viz.loading.stubs import Stub, stub_for
from prune_viz.loading.tensor_checks import META, NESTED, QUANTISED, SPARSE, UnusableTensor
from prune_viz.utils.errors import UserError

_LARGEST_PICKLE = 2**26  # bytes; those of networks with 300,000 tensors are smaller
_MOST_OPCODES = 2**24
# Bytes of objects, each counted generously: what any file may take, more for each of its bytes, and the most.
_MEMORY, _MEMORY_A_BYTE, _MOST_MEMORY = 2**28, 40, 3 * 2**29
_LONGEST_INT = 17  # bytes: 128 bits and a sign, as the states of random generators have
_LONGEST_NAME = 1024  # characters of a key, or of a function's name
_MOST_NAMES = 2**12  # of functions and classes
_SMALL = 2**20  # numbers below it are keys whose hashes cannot be made to collide
_MOST_ODD_KEYS = 2**14  # other numbers among the keys of one file
_LONGEST_NUMBER = 64  # characters of a number that is written as text

# What the objects take that opcodes make, and what more it takes to make some.
_COSTS = [32] * 256
for _opcodes, _cost in (
    ((pickle.EMPTY_DICT, pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.BINPERSID), 240),
    ((pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST), 400),
    ((pickle.EMPTY_LIST, pickle.LIST, pickle.MARK), 100),
):
    for _opcode in _opcodes:
        _COSTS[_opcode[0]] = _cost
_ITEM, _TENSOR = 60, 600


class BoundsError(UserError):
    """A file holds more Python objects than are read from files that nobody trusts."""


class SafeUnpickler(pickle._Unpickler):
    """Calls nothing but what is written here, and allocates no more than the bytes that are left.

    In Python, since the other one allocates what a pickle claims.

    Parameters
    ----------
    stream : binary file
        Where the pickle begins.
    size : int
        Bytes that it may have at most.

    Attributes
    ----------
    storages : dict of str to dtype
        Keys of the storages that tensors were found in.
    code : list of str
        Names of functions and classes that stubs stand for.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: BinaryIO, size: int) -> None:
        super().__init__(stream)
        self._stream, self._left, self._cut = stream, min(size, _LARGEST_PICKLE), size > _LARGEST_PICKLE
        self.read, self.readline = self._take, self._line
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self._memo: list[Any] = []
        self.storages: dict[str, torch.dtype] = {}
        self.code: list[str] = []
        self._memory = min(_MOST_MEMORY, _MEMORY + _MEMORY_A_BYTE * size)
        self._odd_keys = 0
        self._attributes: list[tuple[OrderedDict[Any, Any], Any]] = []
        self._known: dict[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in DTYPES.items()}
        self._known.update({place: Maker(make) for place, make in self._makers().items()})

    def load(self) -> Any:
        """Read one pickle; tensors in it are `Values`."""
        for _ in range(_MOST_OPCODES):
            opcode = self._take(1)[0]
            if opcode == pickle.STOP[0]:
                keep_versions(self._attributes)
                return self.stack.pop()
            self._spend(_COSTS[opcode])
            self.dispatch.get(opcode, SafeUnpickler._refuse)(self)
        raise BoundsError("holds too many Python objects")

    def _take(self, length: int) -> bytes:
        if length > self._left and self._cut:
            raise BoundsError(f"holds more than {_LARGEST_PICKLE >> 20} MiB of Python objects")
        if not 0 <= length <= self._left:
            raise pickle.UnpicklingError("it ends early")
        self._left -= length
        data = self._stream.read(length)
        if len(data) != length:
            raise pickle.UnpicklingError("it ends early")
        return data

    def _line(self) -> bytes:
        data = self._stream.readline(self._left)
        self._left -= len(data)
        if not data.endswith(b"\n"):
            raise pickle.UnpicklingError("a line without an end")
        return data

    def _length(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _spend(self, memory: int) -> None:
        self._memory -= memory
        if self._memory < 0:
            raise BoundsError("holds too many Python objects")

    def _frame(self) -> None:
        self._take(8)  # a hint alone

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an opcode that torch.save does not write")

    def _number(self) -> bytes:
        text = self._line()[:-1]
        if len(text) > _LONGEST_NUMBER:
            raise pickle.UnpicklingError("a number that is too long")
        return text

    def _int(self) -> None:
        text = self._number()
        truth = {b"00": False, b"01": True}.get(text)
        self.append(int(text.removesuffix(b"L")) if truth is None else truth)

    def _long(self, width: int) -> None:
        length = self._length(width)
        if length > _LONGEST_INT:
            raise pickle.UnpicklingError("a number that is too long")
        self.append(int.from_bytes(self._take(length), "little", signed=True))

    def _decode_string(self, value: bytes) -> str:
        """Text of Python 2, which may be bytes."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")

    def _put(self, index: int) -> None:
        if not 0 <= index <= len(self._memo) + 1:  # Python 2 counts from 1
            raise pickle.UnpicklingError("a memo that is not in order")
        self._memo += [None] * (index + 1 - len(self._memo))
        self._memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        if not 0 <= index < len(self._memo):
            raise pickle.UnpicklingError("a reference to something that is not there")
        self.append(self._memo[index])

    def pop_mark(self) -> list[Any]:
        """Give what lies above the last mark."""
        items, self.stack = self.stack, self.metastack.pop()
        self.append = self.stack.append
        return items

    def _is_key(self, key: Any) -> bool:
        """Whether something may be a key; others are left out, as their hashes could be made to collide."""
        kind = type(key)
        if kind is str or kind is bytes:
            return len(key) <= _LONGEST_NAME
        if kind is bool or key is None or (kind is int and 0 <= key < _SMALL):
            return True
        self._odd_keys += 1
        return kind in (int, float) and self._odd_keys <= _MOST_ODD_KEYS

    def _fill(self, items: list[Any]) -> None:
        """Set keys of the mapping on the stack, that stand with their values in a row."""
        mapping = self.stack[-1]
        if len(items) % 2 or not (type(mapping) in (dict, OrderedDict) or isinstance(mapping, Stub)):
            raise pickle.UnpicklingError("items of something that is no mapping")
        self._spend(_ITEM * len(items))
        if not isinstance(mapping, Stub):
            mapping.update(
                (key, value) for key, value in zip(items[::2], items[1::2], strict=True) if self._is_key(key)
            )

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _set_item(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._fill(items)

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif not isinstance(self.stack[-1], Stub):
            raise pickle.UnpicklingError("items of something that is no list")

    def _add(self) -> None:
        items = self._frozen(self.pop_mark())
        if type(self.stack[-1]) is set:
            self.stack[-1].update(items)
        elif not isinstance(self.stack[-1], Stub):
            raise pickle.UnpicklingError("items of something that is no set")

    def _frozen(self, items: Any = ()) -> frozenset[Any]:
        return frozenset(item for item in self._items(items) if self._is_key(item))

    def _items(self, items: Any) -> Any:
        """What a copy is made of, paid for."""
        if type(items) not in (list, tuple, dict, OrderedDict):
            raise pickle.UnpicklingError("items of something that has none")
        self._spend(2 * _ITEM * len(items))
        return items

    def find_class(self, module: str, name: str) -> Any:
        """Give what stands for a name."""
        place = module, name
        if place not in self._known:
            if len(module) + len(name) > _LONGEST_NAME or len(self._known) > _MOST_NAMES:
                raise pickle.UnpicklingError("too many names of functions, or too long ones")
            self._known[place] = stub_for(f"{module}.{name}")
            if not (module.partition(".")[0] == "torch" and name in STORAGES):
                self.code.append(f"{module}.{name}")
        return self._known[place]

    def _call(self, function: Any, arguments: Any) -> Any:
        if type(arguments) not in (list, tuple):
            raise pickle.UnpicklingError("a call without arguments")
        self._spend(_ITEM * len(arguments))  # which are copied
        if type(function) is Maker:
            return function.make(*arguments)
        if isinstance(function, type) and issubclass(function, Stub):
            return function(*arguments)
        if isinstance(function, Stub):
            return Stub()
        raise pickle.UnpicklingError("a call of something that is no function")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _reduce_named(self) -> None:
        self.stack.pop()
        self._reduce()

    def _object(self) -> None:
        function, *arguments = self.pop_mark()
        self.append(self._call(function, arguments))

    def _instance(self) -> None:
        module, name = self._line()[:-1].decode(), self._line()[:-1].decode()
        self.append(self._call(self.find_class(module, name), self.pop_mark()))

    def _build(self) -> None:
        state = self.stack.pop()
        built = self.stack[-1]
        if isinstance(built, Stub):
            built.state = state
        elif type(built) is OrderedDict:
            self._attributes.append((built, state))
        elif not isinstance(built, (Values, UnusableTensor)):
            raise pickle.UnpicklingError("attributes of something that has none")

    def persistent_load(self, pid: Any) -> Any:
        """Give a storage."""
        if (
            type(pid) is tuple and len(pid) == 4 and pid[0] == "module"
        ):  # a layer's class and source, in old files
            return pid[1]
        storage = storage_of(pid)
        self.storages.setdefault(storage.key, storage.dtype)
        return storage

    def _makers(self) -> dict[tuple[str, str], Callable[..., Any]]:
        utils = "torch._utils"
        made: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): self._ordered,
            ("collections", "defaultdict"): lambda *_: {},
            ("collections", "Counter"): lambda items=(): dict(self._pairs(items)),
            ("torch", "Size"): lambda items=(): tuple(self._items(items)),
            ("torch", "device"): device_of,
            ("torch.serialization", "_get_layout"): lambda *_: None,
            ("_codecs", "encode"): self._encoded,
            (utils, "_rebuild_tensor"): self._tensor,
            (utils, "_rebuild_tensor_v2"): self._tensor,
            (utils, "_rebuild_tensor_v3"): self._typed_tensor,
            (utils, "_rebuild_parameter"): parameter_of,
            (utils, "_rebuild_parameter_with_state"): parameter_of,
            (utils, "_rebuild_device_tensor_from_cpu_tensor"): parameter_of,
            (utils, "_rebuild_sparse_tensor"): lambda *_: SPARSE,
            (utils, "_rebuild_qtensor"): lambda *_: QUANTISED,
            (utils, "_rebuild_meta_tensor_no_storage"): lambda *_: META,
            (utils, "_rebuild_nested_tensor"): lambda *_: NESTED,
            ("torch._tensor", "_rebuild_from_type_v2"): self._of_type,
            ("torch._tensor", "_rebuild_from_type"): self._of_type,
        }
        for module in ("builtins", "__builtin__"):
            made[module, "set"] = lambda items=(): set(self._frozen(items))
            made[module, "frozenset"] = self._frozen
            made[module, "bytearray"] = lambda *given: bytearray(self._encoded(*given) if given else b"")
            made[module, "complex"] = complex_of
        return made

    def _pairs(self, items: Any) -> list[tuple[Any, Any]]:
        pairs = self._items(items)
        pairs = items.items() if isinstance(items, dict) else pairs
        return [(pair[0], pair[1]) for pair in pairs if type(pair) in (list, tuple) and self._is_key(pair[0])]

    def _ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        return OrderedDict(self._pairs(items))

    def _encoded(self, text: Any, encoding: Any = "latin-1") -> bytes:
        """Bytes, which old pickles hold as text."""
        if type(text) not in (str, bytes) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes that cannot be")
        self._spend(len(text))
        return text.encode("latin-1") if isinstance(text, str) else bytes(text)

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any = None,
        hooks: Any = None,
        *rest: Any,
    ) -> Values:
        self._spend(_TENSOR)
        return Values(storage, offset, size, stride, None, *rest[:1])

    def _typed_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
    ) -> Values:
        self._spend(_TENSOR)
        return Values(storage, offset, size, stride, dtype, *rest[:1])

    def _of_type(self, function: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
        """A tensor of a type of its own, as a plain one."""
        made = self._call(function, arguments)
        return made if isinstance(made, (Values, UnusableTensor)) else Stub()


def _dispatch() -> dict[int, Callable[[Any], None]]:
    """What is done for opcodes whose arguments have to be checked."""
    actions: dict[bytes, Callable[[SafeUnpickler], None]] = {
        **dict.fromkeys((pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4), SafeUnpickler._refuse),
        **dict.fromkeys((pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), SafeUnpickler._refuse),
        **dict.fromkeys((pickle.INT, pickle.LONG), SafeUnpickler._int),
        pickle.FRAME: SafeUnpickler._frame,
        pickle.FLOAT: lambda self: self.append(float(self._number())),
        pickle.LONG1: lambda self: self._long(1),
        pickle.LONG4: lambda self: self._long(4),
        pickle.BYTEARRAY8: lambda self: self.append(bytearray(self._take(self._length(8)))),
        pickle.GET: lambda self: self._get(int(self._number())),
        pickle.BINGET: lambda self: self._get(self._length(1)),
        pickle.LONG_BINGET: lambda self: self._get(self._length(4)),
        pickle.PUT: lambda self: self._put(int(self._number())),
        pickle.BINPUT: lambda self: self._put(self._length(1)),
        pickle.MEMOIZE: lambda self: self._put(len(self._memo)),
        pickle.LONG_BINPUT: lambda self: self._put(self._length(4)),
        pickle.DICT: SafeUnpickler._dict,
        pickle.SETITEM: SafeUnpickler._set_item,
        pickle.SETITEMS: lambda self: self._fill(self.pop_mark()),
        pickle.APPEND: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS: lambda self: self._extend(self.pop_mark()),
        pickle.ADDITEMS: SafeUnpickler._add,
        pickle.FROZENSET: lambda self: self.append(self._frozen(self.pop_mark())),
        pickle.REDUCE: SafeUnpickler._reduce,
        pickle.NEWOBJ: SafeUnpickler._reduce,
        pickle.NEWOBJ_EX: SafeUnpickler._reduce_named,
        pickle.OBJ: SafeUnpickler._object,
        pickle.INST: SafeUnpickler._instance,
        pickle.BUILD: SafeUnpickler._build,
    }
    return {opcode[0]: action for opcode, action in actions.items()}


SafeUnpickler.dispatch.update(_dispatch())

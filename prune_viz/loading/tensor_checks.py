"""Refusing, by their names, tensors that nothing can be computed with or that claim too much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_viz.utils.errors import UserError, one_line

_OFTENEST = 16  # times its own size that the tensors of a file may claim together
_SPARE = 2**20  # bytes that they may claim in any case
_DEEPEST = 16  # containers in containers
_MOST_VALUES = 2**20  # visited in a content
_PLAIN = (type(None), bool, int, float, complex, str)


@dataclass(frozen=True)
class UnusableTensor:
    """What stands in a file's content for a tensor that prune-viz does not build.

    Attributes
    ----------
    why : str
        What is wrong with it and what to do, to be read after its name.
    """

    why: str


SPARSE = UnusableTensor("is sparse; save it dense, with to_dense()")
QUANTISED = UnusableTensor("is quantised; prune the network before that, or save dequantize()")
META = UnusableTensor("has no values (it was on the meta device)")
NESTED = UnusableTensor("is a nested tensor; save its parts as plain tensors")


def claims_too_much(shape: tuple[int, ...]) -> UnusableTensor:
    """What stands for a tensor that is larger than its file."""
    return UnusableTensor(f"claims the shape {shape}, more than the file holds")


def check_tensor(name: str, tensor: object) -> None:
    """Refuse what is not a dense tensor with values.

    Parameters
    ----------
    name : str
        How the message calls it.
    tensor : object
        Whatever was given as a tensor.

    Raises
    ------
    UserError
        Naming it, if it is sparse, quantised, nested, on the meta device, or no tensor at all.
    """
    if isinstance(tensor, UnusableTensor):
        raise UserError(f"{name} {tensor.why}")
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is of type {type(tensor).__name__}, not a tensor")
    for found, kind in (
        (tensor.is_nested, NESTED),
        (tensor.layout != torch.strided, SPARSE),
        (tensor.is_quantized, QUANTISED),
        (tensor.is_meta, META),
    ):
        if found:
            raise UserError(f"{name} {kind.why}")


def check_all_tensors(content: object, path: Path, place: str = "") -> None:
    """Refuse content of a file that is not made of usable tensors and plain values, naming the place.

    Parameters
    ----------
    content : object
        Tensors, numbers, strings, None, and lists, tuples and dicts of those.
    path : Path
        The file that it was read from.
    place : str
        Where in the file it stands, such as ``held_inputs``.

    Raises
    ------
    UserError
        If a value is anything else, if a tensor is unusable (`check_tensor`) or claims more than the file
        holds, or if all tensors together claim many times the size of the file.
    """
    try:
        _check_all(content, path, place)
    except UserError as error:  # in which names from the file stand
        raise UserError(one_line(error)) from None


def _check_all(content: object, path: Path, place: str) -> None:
    size = path.stat().st_size
    claimed = 0
    for visited, (where, value) in enumerate(_values(content, place, _DEEPEST)):
        if visited > _MOST_VALUES:
            raise UserError(f"{path}: {place or 'the file'} holds too many values")
        if isinstance(value, (Tensor, UnusableTensor)):
            check_tensor(f"{path}: {where or 'the tensor'}", value)
            assert isinstance(value, Tensor)  # noqa: S101
            nbytes = value.numel() * value.element_size()
            if nbytes > size:
                raise UserError(f"{path}: {where} {claims_too_much(tuple(value.shape)).why}")
            claimed += nbytes
        elif type(value) not in _PLAIN:
            kind = getattr(value, "name", "") or type(value).__name__  # a stub's name says more
            raise UserError(
                f"{path}: {where or 'the file'} holds {str(kind)[:80]}, not tensors and plain values"
            )
    check_claim(claimed, size, path)


def check_claim(claimed: int, size: int, path: Path) -> None:
    """Refuse tensors that take many times the size of their file, as views of the same values can.

    Parameters
    ----------
    claimed : int
        Bytes that they take together, each for itself.
    size : int
        Bytes of the file.
    path : Path
        The file, for the message.

    Raises
    ------
    UserError
        If they claim far more than the file holds.
    """
    if claimed > _OFTENEST * size + _SPARE:
        raise UserError(f"{path}: its tensors together claim far more than the file holds")


def _values(content: object, place: str, depth: int) -> Iterator[tuple[str, object]]:
    """Everything in nested content that is not a container, with its place."""
    if isinstance(content, Mapping):
        items: Any = content.items()
    elif type(content) in (list, tuple):
        items = enumerate(content)  # type: ignore[arg-type]
    else:
        yield place, content
        return
    yield place, None  # so that empty containers count too
    if depth == 0:
        raise UserError(f"{place[:80]} is nested too deeply")
    for key, value in items:
        if not isinstance(key, (str, int)):
            raise UserError(f"{place[:80]} has a key that is neither a name nor a number")
        yield from _values(value, f"{place}.{key}"[-200:] if place else f"{key}"[-200:], depth - 1)

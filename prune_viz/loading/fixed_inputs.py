"""Networks of several inputs, one of them varied and the others held, or of signals without a channel axis.

Everything else in the package then sees a network of one input, channels first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_viz.loading.formats import read_content
from prune_viz.loading.tensor_checks import UnusableTensor, check_all_tensors
from prune_viz.utils.errors import UserError

_HELD = "held_input_"
_MOST = 64  # arguments that a file may hold


@dataclass(frozen=True)
class FixedInputs:
    """All that a network is called with.

    Attributes
    ----------
    arguments : dict of (int or str) to object
        By place or by name; tensors have a batch axis of 1.
    varied : int or str
        Which of them is varied: pictures, signals or volumes, or plain signals of shape (1, T).
    """

    arguments: dict[int | str, Any]
    varied: int | str

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what is varied, (C, *spatial); one channel for signals that have no axis for it."""
        shape = tuple(self.arguments[self.varied].shape[1:])
        return (1, *shape) if self.is_plain_signal else shape

    @property
    def is_plain_signal(self) -> bool:
        """Whether what is varied has no channel axis."""
        return self.varied in self.arguments and self.arguments[self.varied].ndim == 2

    @property
    def digest(self) -> str:
        """Of what is held, for provenance; hex."""
        digest = hashlib.sha256(str(self.varied).encode())
        for place, value in self.arguments.items():
            if place != self.varied:
                plain = value.tolist() if torch.is_tensor(value) else value
                digest.update(repr((place, plain)).encode())
        return digest.hexdigest()


def fixed_at_noise(shapes: Sequence[Sequence[int]]) -> FixedInputs:
    """Inputs of the shapes given, without their batch axes: the first is varied, the others are one noise."""
    random = torch.Generator().manual_seed(0)
    noise: dict[int | str, Any] = {}
    for place, shape in enumerate(shapes):
        noise[place] = torch.randn(1, *shape, generator=random)
    return FixedInputs(noise, 0)


def read_example(path: Path) -> FixedInputs:
    """Read what a network is called with from a file.

    Parameters
    ----------
    path : Path
        A tensor, a sequence of arguments or a mapping of named ones, as `torch.save` or safetensors wrote
        them; plain values may be among them. The first that is a batch of floating-point maps,
        (B, C, *spatial), is varied, or else the first batch of signals, (B, T); of batches the first row is
        taken.

    Raises
    ------
    UserError
        If the file cannot be read without running code, holds anything but usable tensors and plain values,
        or nothing in it can be varied.
    """
    content = read_content(path)
    if isinstance(content, (Tensor, UnusableTensor)):
        content = [content]
    if isinstance(content, Mapping):
        arguments = dict(content)
    elif isinstance(content, Sequence) and not isinstance(content, str):
        arguments = dict(enumerate(content))
    else:
        raise UserError(
            f"{path} holds a {type(content).__name__}; save a tensor, or a tuple or dict of inputs"
        )
    _check_arguments(arguments, path)
    varied = next(
        (place for axes in (3, 2) for place, value in arguments.items() if _is_batch(value, axes)), None
    )
    if varied is None:
        raise UserError(
            f"{path} holds no floating-point tensor of shape (B, C, *sizes) or (B, T), so there is "
            "nothing to vary"
        )
    rows = len(arguments[varied])
    first = {
        place: value[:1] if torch.is_tensor(value) and value.ndim and len(value) == rows else value
        for place, value in arguments.items()
    }
    return FixedInputs(first, varied)


def fixed_from(content: Any, path: Path) -> FixedInputs:
    """Return the fixed inputs that a checkpoint of prune-viz holds.

    Parameters
    ----------
    content : object
        What the file holds of them: ``arguments`` and ``varied``.
    path : Path
        The file.

    Raises
    ------
    UserError
        If they are not what prune-viz writes.
    """
    if not isinstance(content, dict) or set(content) != {"arguments", "varied"}:
        raise UserError(f"{path}: held_inputs are not arguments and the one that is varied")
    arguments, place = content["arguments"], content["varied"]
    if not isinstance(arguments, dict):
        raise UserError(f"{path}: held_inputs.arguments are not a dict")
    _check_arguments(arguments, path, "held_inputs.arguments")
    if type(place) not in (int, str) or place not in arguments:
        raise UserError(f"{path}: held_inputs.varied is none of the arguments")
    varied = arguments[place]
    if not _is_batch(varied, 2) or len(varied) != 1:
        raise UserError(
            f"{path}: held_inputs.arguments.{place} is varied, but is not a floating-point tensor of shape "
            "(1, C, *sizes) or (1, T)"
        )
    return FixedInputs(dict(arguments), place)


def _check_arguments(arguments: Mapping[Any, Any], path: Path, place: str = "") -> None:
    """Refuse what no network is called with."""
    if len(arguments) > _MOST:
        raise UserError(f"{path} holds {len(arguments):,} arguments; at most {_MOST} are read")
    if not all(type(name) in (int, str) for name in arguments):
        raise UserError(f"{path} holds arguments that have neither places nor names")
    check_all_tensors(arguments, path, place)


def _is_batch(value: Any, axes: int) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and axes <= value.ndim <= 5 and len(value) > 0


def fix_inputs(model: nn.Module, inputs: FixedInputs) -> nn.Module:
    """Make a network one of a single input, the others held at what they are.

    Names and weights of the network stay as they are. Held tensors are repeated for every row of a batch.

    Parameters
    ----------
    model : nn.Module
        The network; changed in place.
    inputs : FixedInputs
        All that it is called with.

    Returns
    -------
    nn.Module
        `model`.
    """
    kind: Any = type(model)
    buffers: dict[int | str, str] = {}  # so that tensors go where the weights go
    for number, (place, value) in enumerate(inputs.arguments.items()):
        if place != inputs.varied and torch.is_tensor(value):
            buffers[place] = f"{_HELD}{number}"
            model.register_buffer(buffers[place], value, persistent=False)

    def forward(self: nn.Module, varied: Tensor) -> Any:
        rows = torch.zeros_like(varied.flatten(1)[:, 0])
        given = dict(inputs.arguments)
        given[inputs.varied] = varied.squeeze(1) if inputs.is_plain_signal else varied
        for place, name in buffers.items():
            given[place] = _repeated(getattr(self, name), rows)
        ordered = [value for place, value in given.items() if isinstance(place, int)]
        return kind.forward(self, *ordered, **{str(p): value for p, value in given.items() if p in named})

    named = [place for place in inputs.arguments if isinstance(place, str)]
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model


def free_inputs(model: nn.Module) -> nn.Module:
    """Undo `fix_inputs`, in place."""
    model.__class__ = type(model).__mro__[1]
    for name in [name for name in model._buffers if name.startswith(_HELD)]:
        delattr(model, name)
    return model


def _repeated(held: Tensor, rows: Tensor) -> Tensor:
    """Repeat a fixed input for every row of a batch, by operations that can be traced."""
    if not held.ndim or len(held) != 1:
        return held
    return held + rows.to(held.dtype).view(-1, *(1,) * (held.ndim - 1))

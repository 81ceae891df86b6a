"""Reading model files of any kind: what they are by their content, and no code in them runs without trust.

Files of torch.save are read by `prune_viz.loading.torch_files`, which calls nothing that they name;
PyTorch's own reader reads those alone that hold code and are trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prune_viz.loading.file_kinds import FileKind, identify
from prune_viz.loading.safe_unpickler import BoundsError
from prune_viz.loading.torch_files import read_legacy, read_zip
from prune_viz.loading.zip_directory import ZipEntry
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.user_code import current_directory_importable

_LARGEST_HEADER = 2**26  # bytes, of safetensors


def read_content(path: Path, trust_pickle: bool = False) -> Any:
    """Read what a model file holds, whatever its format.

    Parameters
    ----------
    path : Path
        The file.
    trust_pickle : bool
        Let the file run code while it is read.

    Returns
    -------
    object
        A mapping of tensors for safetensors, TorchScript and exported programs; whatever `torch.save` was
        given otherwise, with stubs (`prune_viz.loading.stubs`) where code would have run and
        `UnusableTensor` for tensors that cannot be had.

    Raises
    ------
    UserError
        If the file is missing, empty, damaged, of another kind, or wants to run code it may not.
    """
    found = identify(path, trust_pickle)
    if found.kind in (FileKind.TORCHSCRIPT, FileKind.EXPORTED):
        return _read_program(path, found.kind)
    if found.kind is FileKind.SAFETENSORS:
        return _read_safetensors(path)
    return _read_torch(path, trust_pickle, found.entries if found.kind is FileKind.TORCH else None)


def _read_program(path: Path, kind: FileKind) -> dict[str, torch.Tensor]:
    """The weights of TorchScript or an exported program, whose code prune-viz cannot take apart."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind is FileKind.TORCHSCRIPT:
                return dict(torch.jit.load(path, map_location="cpu").state_dict())  # type: ignore[no-untyped-call]
            return dict(torch.export.load(path).state_dict)
    except Exception as error:  # a program can fail in any way
        raise UserError(f"{path} is {kind}, but cannot be read: {brief(error)}") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > _LARGEST_HEADER:
        raise UserError(f"{path} has a header of {length:,} bytes, more than prune-viz reads")
    try:
        tensors = dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {brief(error)}") from None
    for tensor in tensors.values():
        if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
            raise UserError(f"{path} is damaged: a truth value is neither 0 nor 1")
    return tensors


def _read_torch(path: Path, trust_pickle: bool, entries: Mapping[str, ZipEntry] | None) -> Any:
    """What `torch.save` wrote; code in it runs only if trusted, and only where there is some."""
    try:
        read = read_legacy(path) if entries is None else read_zip(path, entries)
        if not (trust_pickle and read.code):
            return read.content
        damage = None
    except BoundsError:
        if not trust_pickle:
            raise
        damage = None
    except UserError as error:
        if not trust_pickle:
            raise
        damage = error
    with warnings.catch_warnings(), current_directory_importable():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise damage or UserError(
                f"{path} could not be unpickled ({brief(error)}); is its code installed?"
            ) from error

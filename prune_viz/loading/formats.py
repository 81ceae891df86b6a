"""Reading model files of any kind: what they are by their content, and no code in them runs without trust.

Files of torch.save are read by `prune_viz.loading.torch_files`, which calls nothing that they name;
PyTorch's own reader reads those alone that hold code and are trusted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from prune_viz.loading.safe_unpickler import BoundsError
from prune_viz.loading.torch_files import ZipEntry, check_entries, read_directory, read_legacy, read_zip
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.files import check_readable
from prune_viz.utils.user_code import current_directory_importable

_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")

# What else people have under the name of a model, by how it begins, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the model itself; fetch it with: git lfs pull"),
    (b"<!doctype html", "a web page, not a model; download the file itself"),
    (b"<html", "a web page, not a model; download the file itself"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x89hdf", "an HDF5 file, as Keras writes them; prune-viz reads PyTorch's checkpoints and safetensors"),
    (b"gguf", "a GGUF file; prune-viz reads PyTorch's checkpoints and safetensors"),
    (b"\x08", "perhaps an ONNX model; prune-viz needs the PyTorch checkpoint it was made from"),
)
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
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the model file inside it")
    check_readable(path)
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
            size = stream.seek(0, 2)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size == 0:
        raise UserError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        entries = read_directory(path)
        kind = _kind_of_archive(path, entries)
        if kind is not None:
            return _read_program(path, kind, trust_pickle)
        check_entries(path, entries)
        return _read_torch(path, trust_pickle, entries)
    if _LEGACY_MAGIC in head[:32]:
        return _read_torch(path, trust_pickle, None)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle that torch.save did not write; save the state dict with torch.save"
        )
    other = next((what for start, what in _OTHERS if head.lstrip().lower().startswith(start)), None)
    if other is not None:
        raise UserError(f"{path} is {other}")
    raise UserError(
        f"{path} is not a PyTorch checkpoint or safetensors file; save the model's state dict with torch.save"
    )


def _kind_of_archive(path: Path, names: Iterable[str]) -> str | None:
    """What a zip archive is if not a checkpoint: ``TorchScript`` or ``an exported program``."""
    names = list(names)
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "TorchScript"
    if any("/models/" in name or name.endswith("archive_format") for name in names):
        return "an exported program"
    if not any(name.endswith("/data.pkl") for name in names):
        what = "of numpy's arrays, " if names and all(name.endswith(".npy") for name in names) else ""
        raise UserError(
            f"{path} is a zip archive {what}but not a PyTorch checkpoint; save the state dict with torch.save"
        )
    return None


def _read_program(path: Path, kind: str, trust_pickle: bool) -> dict[str, torch.Tensor]:
    """The weights of TorchScript or an exported program, whose code prune-viz cannot take apart."""
    if not trust_pickle:
        raise UserError(
            f"{path} is {kind}, which is code with weights: save the model's state dict instead, or pass "
            "--trust-pickle if you trust where the file comes from, and its weights are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "TorchScript":
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

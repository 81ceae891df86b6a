"""Reading a stranger's file: what it is by its content, and never running what is in it unless told to.

Without trust nothing that a file names is called, but for what torch itself takes for plain data: the rest is
read as `prune_viz.inert` does.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from prune_viz.architectures import current_directory_importable
from prune_viz.errors import UserError, brief, few
from prune_viz.inert import read_inert, stub_for

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

# What training loops left beside the weights in files of the old format; stubs stand for it.
_LEFT_BESIDE = (
    "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"
)  # fmt: skip


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
        given otherwise, with stubs (`prune_viz.inert`) where code would have run.

    Raises
    ------
    UserError
        If the file is missing, empty, damaged, of another kind, or wants to run code it may not.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
            size = stream.seek(0, 2)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory; give the model file inside it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if size == 0:
        raise UserError(f"{path} is empty")
    if head.startswith(b"PK\x03\x04"):
        kind = _kind_of_archive(path, size)
        if kind is not None:
            return _read_program(path, kind, trust_pickle)
        return _read_torch(path, trust_pickle, zipped=True)
    if _LEGACY_MAGIC in head[:32]:
        return _read_torch(path, trust_pickle, zipped=False)
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


def _kind_of_archive(path: Path, size: int) -> str | None:
    """What a zip archive is if not a checkpoint: ``TorchScript`` or ``an exported program``."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(f"{path} is damaged or was cut short; fetch or save it again") from None
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return "TorchScript"
    if any("/models/" in name or name.endswith("archive_format") for name in names):
        return "an exported program"
    if not any(name.endswith("/data.pkl") for name in names):
        what = "of numpy's arrays, " if names and all(name.endswith(".npy") for name in names) else ""
        raise UserError(
            f"{path} is a zip archive {what}but not a PyTorch checkpoint; save the state dict with torch.save"
        )
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size or not _has_one_directory(path, size):
        # No checkpoint that PyTorch wrote does.
        raise UserError(f"{path} would unpack to more than it holds; save the state dict with torch.save")
    return None


def _has_one_directory(path: Path, size: int) -> bool:
    """Whether a zip archive ends with its directory, so that all who read it find the same one."""
    with path.open("rb") as stream:
        stream.seek(max(0, size - 98))
        tail = stream.read()
    end, locator, record = tail[-22:], tail[-42:-22], tail[-98:-42]
    if end[:4] != b"PK\x05\x06":
        return False
    length, offset = struct.unpack("<II", end[12:20])
    position = size - len(end)
    if locator[:4] == b"PK\x06\x07":
        if record[:4] != b"PK\x06\x06":
            return False
        length, offset = struct.unpack("<QQ", record[40:56])
        position = size - 98
    return bool(offset + length == position)


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
    except Exception as error:  # whatever a stranger's program runs into
        raise UserError(f"{path} is {kind}, but cannot be read: {brief(error)}") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _read_torch(path: Path, trust_pickle: bool, zipped: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stubs: list[Any] = [] if zipped else [(stub_for(name), name) for name in _LEFT_BESIDE]
            with torch.serialization.safe_globals(stubs):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            wanted = _wanted_code(path, error)
        if not wanted:
            raise UserError(f"{path} is damaged and cannot be read; fetch or save it again")
        if not trust_pickle and zipped:
            return read_inert(path)
        if not trust_pickle:
            raise UserError(
                f"{path} holds pickled code, which could do anything ({few(wanted)}): save the model's "
                "state dict and give --arch, or pass --trust-pickle if you trust where the file comes from"
            )
        with current_directory_importable():
            try:
                return torch.load(path, map_location="cpu", weights_only=False)
            except Exception as error:
                raise UserError(
                    f"{path} could not be unpickled ({brief(error)}); is its code installed?"
                ) from error


def _wanted_code(path: Path, error: Exception) -> list[str]:
    """Names of what a checkpoint wants to import beyond plain data."""
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        wanted = []
    found = re.findall(r"GLOBAL (\S+)", str(error))
    return sorted({*wanted, *found})

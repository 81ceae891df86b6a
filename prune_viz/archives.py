"""Reading a stranger's file: what it is by its content, and never running what is in it unless told to."""

from __future__ import annotations

import argparse
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prune_viz.architectures import current_directory_importable
from prune_viz.errors import UserError
from prune_viz.weights import few

_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
# What training loops leave beside the weights: options and best scores. Plain data, no code.
_HARMLESS: list[Any] = [
    argparse.Namespace, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType,
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
]  # fmt: skip


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
        A mapping of tensors for safetensors; whatever `torch.save` was given otherwise.

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
        _check_archive(path)
        return _read_torch(path, trust_pickle)
    if _LEGACY_MAGIC in head[:32]:
        return _read_torch(path, trust_pickle)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle that torch.save did not write; save the state dict with torch.save"
        )
    raise UserError(f"{path} is not a PyTorch checkpoint or safetensors file")


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        raise UserError(f"{path} is damaged or was cut short; fetch or save it again") from None
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            f"{path} is TorchScript, which cannot be taken apart; save the state dict, and give --arch"
        )
    if any("/models/" in name or name.endswith("archive_format") for name in names):
        raise UserError(
            f"{path} is an exported program; save the model's state dict instead, and give --arch"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise UserError(f"{path} is a zip archive but not a PyTorch checkpoint")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _read_torch(path: Path, trust_pickle: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.serialization.safe_globals(_HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            wanted = _wanted_code(path, error)
        if not wanted:
            raise UserError(f"{path} is damaged and cannot be read; fetch or save it again")
        if not trust_pickle:
            raise UserError(
                f"{path} holds pickled code, which could do anything ({few(wanted)}): save the model's "
                "state dict and give --arch, or pass --trust-pickle if you trust where the file comes from"
            )
        with current_directory_importable():
            try:
                return torch.load(path, map_location="cpu", weights_only=False)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{path} could not be unpickled ({problem}); is its code installed?"
                ) from error


def _wanted_code(path: Path, error: Exception) -> list[str]:
    """Names of what a checkpoint wants to import beyond plain data."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        wanted = []
    found = re.findall(r"GLOBAL (\S+)", str(error))
    return sorted({*wanted, *found})

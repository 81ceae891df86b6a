"""Reading a stranger's file: what it is by its content, and never running what is in it unless told to.

Without trust a file may name nothing to be called or made but tensors, plain data and the classes of networks
that torch, torchvision and timm themselves are made of.
"""

from __future__ import annotations

import argparse
import importlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

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
# Where the classes of networks live that a file may name without trust.
_PACKAGES = re.compile(
    r"(torch\.nn\.modules|torch\.nn\.parallel\.data_parallel|torchvision\.(models|ops)|timm\.(models|layers))(\.|$)"
)


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
        given otherwise.

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
        return _read_torch(path, trust_pickle) if kind is None else _read_program(path, kind, trust_pickle)
    if _LEGACY_MAGIC in head[:32]:
        return _read_torch(path, trust_pickle)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        raise UserError(
            f"{path} is a pickle that torch.save did not write; save the state dict with torch.save"
        )
    raise UserError(f"{path} is not a PyTorch checkpoint or safetensors file")


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
        raise UserError(f"{path} is a zip archive but not a PyTorch checkpoint")
    if sum(entry.file_size for entry in entries) > size:  # no checkpoint that PyTorch wrote is compressed
        raise UserError(f"{path} would unpack to more than it holds; save the state dict with torch.save")
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
    except Exception as error:  # whatever a stranger's program runs into
        raise UserError(f"{path} is {kind}, but cannot be read: {_short(error)}") from None


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
            return _load_without_code(path, [])
        except Exception as error:
            wanted = _wanted_code(path, error)
        if not wanted:
            raise UserError(f"{path} is damaged and cannot be read; fetch or save it again")
        classes = {name: _network_class(name) for name in wanted}
        strange = [name for name, found in classes.items() if found is None]
        if not strange:
            with suppress(Exception):  # files of the old format hold source code, which is never read
                return _load_without_code(path, [found for found in classes.values() if found])
        if not trust_pickle:
            what = "a pickled network that cannot be read without running code"
            if strange:
                what = f"pickled code, which could do anything ({few(strange)})"
            raise UserError(
                f"{path} holds {what}: save the model's state dict and give --arch, or pass --trust-pickle "
                "if you trust where the file comes from"
            )
        with current_directory_importable():
            try:
                return torch.load(path, map_location="cpu", weights_only=False)
            except Exception as error:
                raise UserError(
                    f"{path} could not be unpickled ({_short(error)}); is its code installed?"
                ) from error


def _load_without_code(path: Path, classes: Sequence[Any]) -> Any:
    with torch.serialization.safe_globals([*_HARMLESS, *classes]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _network_class(name: str) -> type[nn.Module] | None:
    """The class of a network or layer that torch, torchvision or timm define under this name, if any."""
    home, _, own = name.rpartition(".")
    if not _PACKAGES.match(home):
        return None
    try:
        found = getattr(importlib.import_module(home), own, None)
    except Exception:  # no such module, or one for what is not installed
        return None
    if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == home:
        return found
    return None


def _wanted_code(path: Path, error: Exception) -> list[str]:
    """Names of what a checkpoint wants to import beyond plain data."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        wanted = []
    found = re.findall(r"GLOBAL (\S+)", str(error))
    return sorted({*wanted, *found})


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

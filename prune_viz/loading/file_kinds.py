"""What a model file is, by its content: known before PyTorch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prune_viz.loading.zip_directory import ZipEntry, check_entries, read_directory
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import check_readable

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


class FileKind(StrEnum):
    """The kinds of model files."""

    TORCH = "a PyTorch checkpoint"
    LEGACY = "a PyTorch checkpoint of before 1.6"
    SAFETENSORS = "safetensors"
    TORCHSCRIPT = "TorchScript"
    EXPORTED = "an exported program"


@dataclass(frozen=True)
class Identified:
    """What a model file is.

    Attributes
    ----------
    kind : FileKind
        Its kind.
    entries : mapping of str to ZipEntry
        Of a checkpoint in the zip format, the directory; of others, empty.
    """

    kind: FileKind
    entries: Mapping[str, ZipEntry]


def identify(path: Path, trust_pickle: bool = False) -> Identified:
    """Find what a model file is.

    Parameters
    ----------
    path : Path
        The file.
    trust_pickle : bool
        Whether it may run code while it is read.

    Raises
    ------
    UserError
        If the file is missing, empty, cut short, of another kind, or a program that may not run.
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
        return _identify_archive(path, trust_pickle)
    if _LEGACY_MAGIC in head[:32]:
        return Identified(FileKind.LEGACY, {})
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return Identified(FileKind.SAFETENSORS, {})
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


def _identify_archive(path: Path, trust_pickle: bool) -> Identified:
    entries = read_directory(path)
    program = _kind_of_program(entries)
    if program is not None:
        if not trust_pickle:
            raise UserError(
                f"{path} is {program}, which is code with weights: save the model's state dict instead, or "
                "pass --trust-pickle if you trust where the file comes from, and its weights are taken"
            )
        return Identified(program, {})
    if not any(name.endswith("/data.pkl") for name in entries):
        arrays = entries and all(name.endswith(".npy") for name in entries)
        what = "of numpy's arrays, " if arrays else ""
        raise UserError(
            f"{path} is a zip archive {what}but not a PyTorch checkpoint; save the state dict with torch.save"
        )
    check_entries(path, entries)
    return Identified(FileKind.TORCH, entries)


def _kind_of_program(names: Iterable[str]) -> FileKind | None:
    """What a zip archive is that holds code: TorchScript or an exported program; None if neither."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return FileKind.TORCHSCRIPT
    if any("/models/" in name or name.endswith("archive_format") for name in names):
        return FileKind.EXPORTED
    return None

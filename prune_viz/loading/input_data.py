"""Example inputs as people have them: pictures, arrays, tensors, sounds, or what a function of theirs yields.

Pictures, and arrays of bytes, are pixels: the model's normalisation brings them to its units. Arrays of
floats, sounds and what a function yields are taken to be in the model's own units already.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_viz.loading.formats import read_content
from prune_viz.loading.pictures import files_in, read_pictures
from prune_viz.network.inputs import (
    InputStatistics,
    describe_inputs,
    measure_own_units,
    measure_statistics,
)
from prune_viz.utils.errors import UserError, brief
from prune_viz.utils.nested_tensors import tensors_of
from prune_viz.utils.user_code import current_directory_importable

MOST_INPUTS = 512  # that are used
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ARRAYS = {".npy", ".npz", ".pt", ".pth", ".safetensors"}
_SOUNDS = {".wav", ".flac", ".ogg", ".aiff", ".aif"}
_FRAMES_OF_A_SOUND = 16

Data = Any  # a path, module:function, tensor, array, or an iterable of batches


def read_inputs(
    input_shape: tuple[int, ...],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    data: Data,
    out: str | Path | None,
) -> tuple[InputStatistics | None, Tensor | None, list[str]]:
    """What is known of an analysis's inputs, example inputs, and a note on those that could not be read.

    Parameters
    ----------
    input_shape : tuple of int
        (C, *size).
    mean, std : float or sequence of float, optional
        The normalisation.
    data : path, str, Tensor, ndarray or iterable, optional
        Example inputs: a folder of pictures, arrays or sounds; a file of arrays or a sound; the name of a
        function, ``module:function``, that returns a DataLoader or another iterable of batches; or a tensor,
        an array or such an iterable itself. Of a batch that is a tuple or dict, the first tensor counts.
    out : path, optional
        The run directory, which may not lie in `data`.

    Returns
    -------
    statistics : InputStatistics or None
    examples : Tensor or None, shape (N, C, *size)
        In the model's own input units, at most `MOST_INPUTS`; None without `data`.
    notes : list of str

    Raises
    ------
    UserError
        If `out` lies in `data`, or what is given is empty, not finite, or does not fit the input.
    """
    if data is None:
        return describe_inputs(input_shape[0], mean, std), None, []
    if isinstance(data, (str, Path)) and _is_folder_around(data, out):
        raise UserError(
            f"--data: the run directory {out} lies in {data}, so its pictures would be read; move --out"
        )
    found, skipped = _read(data, input_shape)
    notes = (
        [f"Example inputs that could not be read and were left out: {skipped} of the files."]
        if skipped
        else []
    )
    if found.dtype == torch.uint8:
        statistics = measure_statistics(found, mean, std)
        return statistics, normalise(found, statistics), notes
    if not bool(found.isfinite().all()):
        raise UserError("--data: some values are not finite (NaN or infinite); leave those inputs out")
    return measure_own_units(found, mean, std), found, notes


def normalise(images: Tensor, statistics: InputStatistics) -> Tensor:
    """Bring pixels, uint8 of shape (N, C, *size), to the model's own input units."""
    mean, std = (
        torch.tensor(numbers).view(-1, *[1] * (images.ndim - 2))
        for numbers in (statistics.mean, statistics.std)
    )
    return (images.float() / 255 - mean) / std


def describe_data(data: Data) -> str | None:
    """What `run.json` says of the data: its path or name, or its kind and shape."""
    if data is None or isinstance(data, (str, Path)):
        return None if data is None else str(data)
    shape = getattr(data, "shape", None)
    return type(data).__name__ + (f" {tuple(shape)}" if shape is not None else "")


def _is_folder_around(data: str | Path, out: str | Path | None) -> bool:
    path = Path(data)
    return out is not None and path.is_dir() and Path(out).resolve().is_relative_to(path.resolve())


def _read(data: Data, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Inputs, uint8 or float of shape (N, C, *size), and how many files were passed over."""
    if isinstance(data, (np.ndarray, Tensor)):
        return _fitting(data, shape, "the array of --data"), 0
    if not isinstance(data, (str, Path)):
        return _from_batches(data, shape, "--data"), 0
    path = Path(data)
    if path.is_dir():
        return _from_folder(path, shape)
    if path.is_file():
        return _from_file(path, shape), 0
    if _FACTORY.fullmatch(str(data)):
        return _from_factory(str(data), shape), 0
    raise UserError(f"--data: there is no file or folder {data}; a function is named as module:function")


def _from_folder(folder: Path, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Pictures, where the input is one and there are any; else arrays; else sounds."""
    skipped = 0
    if shape[0] in (1, 3) and len(shape) == 3:
        images, skipped = read_pictures(folder, shape)
        if images is not None:
            return images, skipped
    kinds = (_ARRAYS, _SOUNDS) if len(shape) == 2 else (_ARRAYS,)
    tried = skipped
    for suffixes in kinds:
        parts: list[Tensor] = []
        paths = files_in(folder, suffixes)
        if suffixes is _SOUNDS and paths:
            _check_soundfile()
        for path in paths:
            try:
                parts.append(_some(_from_file(path, shape), -(-MOST_INPUTS // len(paths))))
            except UserError:
                continue
        tried += len(paths)
        if parts:
            pixels = {part.dtype == torch.uint8 for part in parts}
            if len(pixels) > 1:
                raise UserError(f"--data: some arrays in {folder} are bytes, others floats; use one kind")
            return _some(torch.cat(parts)), skipped + len(paths) - len(parts)
    wanted = f"inputs of shape {shape} or larger"
    raise UserError(
        f"--data: no file in {folder} holds {wanted} ({tried} tried): pictures for one or three channels on "
        "two axes, .npy, .npz, .pt or .safetensors for any, sounds for one axis"
    )


def _from_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    suffix = path.suffix.lower()
    if suffix in _SOUNDS:
        return _from_sound(path, shape)
    if suffix not in _ARRAYS:
        raise UserError(f"--data: {path} is none of {', '.join(sorted(_ARRAYS | _SOUNDS))}")
    try:
        stored = _stored(path, suffix)
    except Exception as error:  # what a broken file raises depends on its format
        raise UserError(f"--data: {path} cannot be read: {brief(error)}") from None
    if stored is None:
        raise UserError(f"--data: {path} holds no array")
    return _fitting(stored, shape, str(path))


def _stored(path: Path, suffix: str) -> np.ndarray | Tensor | None:
    """The first array of a file; nothing is unpickled but plain data."""
    if suffix == ".npy":
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as held:
            return next((np.asarray(held[name]) for name in held.files), None)
    return next(iter(tensors_of(read_content(path))), None)


def _check_soundfile() -> None:
    if importlib.util.find_spec("soundfile") is None:
        raise UserError("--data: sounds need soundfile: pip install 'prune-viz[sound]'")


def _from_sound(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Frames of a sound file, evenly spaced, of its first channels."""
    if len(shape) != 2:
        raise UserError(f"--data: {path} is a sound, and the model takes inputs of shape {shape}")
    _check_soundfile()
    import soundfile

    try:
        with soundfile.SoundFile(path) as sound:
            if sound.channels < shape[0] or sound.frames < shape[1]:
                raise UserError(f"--data: {path} is shorter, or of fewer channels, than inputs of {shape}")
            count = min(_FRAMES_OF_A_SOUND, sound.frames // shape[1])
            starts = np.linspace(0, sound.frames - shape[1], count).astype(int)
            frames = []
            for start in starts:
                sound.seek(int(start))
                frames.append(sound.read(shape[1], dtype="float32", always_2d=True).T[: shape[0]])
    except soundfile.LibsndfileError as error:
        raise UserError(f"--data: {path} cannot be read: {brief(error)}") from None
    return torch.from_numpy(np.stack(frames))


def _from_factory(name: str, shape: tuple[int, ...]) -> Tensor:
    """What the batches hold that a function of the user's yields."""
    module_name, function = name.split(":")
    with current_directory_importable():  # while it yields too: what it imports may come then
        try:
            made = getattr(importlib.import_module(module_name), function)()
        except Exception as error:  # whatever the user's own code raises
            raise UserError(f"--data {name} failed: {brief(error)}") from None
        if isinstance(made, (np.ndarray, Tensor)):
            return _fitting(made, shape, f"what --data {name} returns")
        return _from_batches(made, shape, f"--data {name}")


def _from_batches(batches: Iterable[Any], shape: tuple[int, ...], what: str) -> Tensor:
    """The first `MOST_INPUTS` inputs of an iterable of batches."""
    found: list[Tensor] = []
    try:
        for batch in _inputs_of(batches):
            found.append(_fitting(batch, shape, f"a batch of {what}"))
            if sum(map(len, found)) >= MOST_INPUTS:
                break
    except UserError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{what} failed: {brief(error)}") from None
    if not found:
        raise UserError(f"{what} holds no inputs")
    return torch.cat(found)[:MOST_INPUTS]


def _inputs_of(batches: Iterable[Any]) -> Iterator[np.ndarray | Tensor]:
    for batch in batches:
        if isinstance(batch, np.ndarray):
            yield batch
        elif found := tensors_of(batch):
            yield found[0]


def _fitting(stored: np.ndarray | Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    """An array as inputs of `shape`, larger ones cropped about their centre.

    It holds one or many, with or without an axis for a single channel.
    """
    if stored.ndim == len(shape) + 1 and len(stored) > MOST_INPUTS:
        stored = stored[np.linspace(0, len(stored) - 1, MOST_INPUTS).round().astype(int)]
    if isinstance(stored, Tensor):
        found = stored.detach().cpu()
    elif stored.dtype.kind not in "iuf" or stored.dtype.itemsize > 8:
        raise UserError(f"--data: {what} holds {stored.dtype}, not numbers of bytes or floats")
    else:
        found = torch.from_numpy(np.array(stored, dtype=stored.dtype.newbyteorder("=")))
    if found.dtype != torch.uint8:
        if found.dtype == torch.bool or found.is_complex():
            raise UserError(f"--data: {what} holds {found.dtype}, not numbers of bytes or floats")
        found = found.float()
    if found.ndim == len(shape):
        one = found.shape[0] == shape[0] and _covers(found.shape[1:], shape[1:])
        found = found[None] if one or shape[0] != 1 else found[:, None]
    elif found.ndim == len(shape) - 1 and shape[0] == 1:
        found = found[None, None]
    fits = found.ndim == len(shape) + 1 and found.shape[1] == shape[0] and _covers(found.shape[2:], shape[1:])
    if not fits or not len(found):
        given = " x ".join(map(str, stored.shape))
        raise UserError(
            f"--data: {what} is {given or 'empty'}; the model takes inputs of {shape}, one or many"
        )
    found = _some(found)
    for axis, wanted in enumerate(shape[1:], start=2):
        found = found.narrow(axis, (found.shape[axis] - wanted) // 2, wanted)
    return found.clone()


def _covers(size: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(size) == len(wanted) and all(have >= want for have, want in zip(size, wanted, strict=True))


def _some(inputs: Tensor, most: int = MOST_INPUTS) -> Tensor:
    """At most so many of the inputs, evenly spaced."""
    if len(inputs) <= most:
        return inputs
    return inputs[torch.linspace(0, len(inputs) - 1, most).round().long()]

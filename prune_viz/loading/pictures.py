"""Pictures of a folder, as a model's example inputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from prune_viz.utils.errors import UserError

MOST_FILES = 512  # of a folder that are read
# Only these are decoded: some of Pillow's other formats start programs or read further files.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def files_in(folder: Path, suffixes: set[str], limit: int = MOST_FILES) -> list[Path]:
    """Files with such endings in a folder and the folders in it, in the order of their names.

    Of more than `limit` as many evenly spaced ones. Links that lead outside the folder, and what is no
    regular file, are left out.

    Raises
    ------
    UserError
        If there is no such folder.
    """
    root = folder.resolve()
    if not root.is_dir():
        raise UserError(f"--data: there is no folder {folder}")
    paths = [Path(place, name) for place, _, names in os.walk(root) for name in names]
    paths = sorted((path for path in paths if path.suffix.lower() in suffixes), key=Path.as_posix)
    paths = [path for path in paths if path.is_file() and path.resolve().is_relative_to(root)]
    if len(paths) > limit:
        paths = [paths[rank * len(paths) // limit] for rank in range(limit)]
    return paths


def read_pictures(
    folder: Path, input_shape: Sequence[int], limit: int = MOST_FILES
) -> tuple[Tensor | None, int]:
    """Read the pictures of a folder and of the folders in it, grey or RGB as the input is.

    They are scaled and cropped about their centre to the input's size.

    Parameters
    ----------
    folder : Path
        Where they are.
    input_shape : sequence of int
        (C, height, width), of one or three channels.
    limit : int
        How many files to read at most.

    Returns
    -------
    images : Tensor of uint8 or None, shape (N, C, height, width)
        None where there is no picture that can be read.
    skipped : int
        How many files were passed over: broken, or too large to decode safely.

    Raises
    ------
    UserError
        If there is no such folder.
    """
    paths = files_in(folder, _SUFFIXES, limit)
    images = list(_readable(paths, tuple(input_shape)))
    found = torch.from_numpy(np.stack(images)) if images else None
    return found, len(paths) - len(images)


def _readable(paths: Sequence[Path], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for path in paths:
        try:
            yield _read_picture(path, shape)
        except Exception:  # noqa: S112  (what a broken file raises depends on its format)
            continue


def _read_picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels of a picture, uint8, shape (C, H, W); raises whatever Pillow does."""
    channels, height, width = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as opened:
            opened.draft(None, (2 * width, 2 * height))  # decodes a large JPEG at a fraction of its size
            picture: Image.Image = opened
            if picture.mode.startswith("I;16"):  # Pillow would clip these at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode in ("I", "F"):
                raise ValueError("pixels of unknown range")
            picture = picture.convert("L" if channels == 1 else "RGB")
    fitted = np.asarray(ImageOps.fit(picture, (width, height)))
    return fitted.reshape(height, width, channels).transpose(2, 0, 1)

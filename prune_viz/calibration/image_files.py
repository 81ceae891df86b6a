"""The images that a run keeps: its synthetic calibration images, and of the user's those to measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prune_viz.calibration.images import SyntheticImages, fitted, kept_out
from prune_viz.utils.array_files import read_arrays, write_arrays

MOST_EXAMPLES = 128  # of the user's images that are kept to measure on
MOST_VALUES = 2**24  # of them together
FEWEST_EXAMPLES = 4  # fewer are not measured on where there are synthetic ones
_SYNTHETIC, _EXAMPLES = "images", "examples"


@dataclass(frozen=True)
class RunImages:
    """Images of a run, in the model's own input units.

    Attributes
    ----------
    synthetic : Tensor or None, shape (N, C, *size)
        All synthetic calibration images.
    examples : Tensor or None, shape (M, C, *size)
        Of the user's images, those kept out of all that was fitted or ranked.
    """

    synthetic: Tensor | None = None
    examples: Tensor | None = None

    @property
    def fitted(self) -> Tensor | None:
        """Synthetic images to fit on, shape (N, C, *size)."""
        return None if self.synthetic is None else fitted(self.synthetic)

    @property
    def are_real(self) -> bool:
        """Whether `kept_out` are the user's images."""
        return self.examples is not None and (len(self.examples) >= FEWEST_EXAMPLES or self.synthetic is None)

    @property
    def kept_out(self) -> Tensor | None:
        """Images that no fit saw, to measure on: the user's where there are enough, else synthetic ones."""
        if self.are_real:
            return self.examples
        return None if self.synthetic is None else kept_out(self.synthetic)

    def __bool__(self) -> bool:
        return self.synthetic is not None or self.examples is not None


def examples_to_keep(examples: Tensor | None) -> Tensor | None:
    """Of the user's images, shape (N, C, *size), those that are kept out, as many as a run keeps."""
    if examples is None:
        return None
    chosen = kept_out(examples)
    most = min(MOST_EXAMPLES, MOST_VALUES // max(chosen[:1].numel(), 1))
    return chosen[:most] if len(chosen) and most else None


def write_run_images(
    images: RunImages,
    path: Path,
    synthetic: SyntheticImages | None = None,
    key: str = "",
) -> None:
    """Write images; without any, remove the file, and leave one that holds the same as it is.

    Parameters
    ----------
    images : RunImages
        The images.
    path : Path
        The file.
    synthetic : SyntheticImages, optional
        What is known of the synthetic ones.
    key : str
        Digest of all that they depend on.
    """
    arrays = {
        name: one.cpu().numpy()
        for name, one in ((_SYNTHETIC, images.synthetic), (_EXAMPLES, images.examples))
        if one is not None
    }
    if not arrays:
        path.unlink(missing_ok=True)
        return
    numbers = {}
    if synthetic is not None:
        names = ("before", "distance", "passes", "activation_kept")
        numbers = {name: repr(getattr(synthetic, name)) for name in names}
    metadata = {"key": key, **numbers} if key else numbers
    if not _holds(path, arrays, metadata):
        write_arrays(path, arrays, metadata)


def _holds(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bool:
    """Whether a file holds just these arrays, and says the same of them."""
    read = read_arrays(path)
    if read is None or read[0].keys() != arrays.keys() or not metadata.items() <= read[1].items():
        return False
    return all(np.array_equal(read[0][name], array) for name, array in arrays.items())


def load_synthetic_images(path: Path, key: str | None = None) -> SyntheticImages | None:
    """Read synthetic images.

    Parameters
    ----------
    path : Path
        The file.
    key : str, optional
        Digest of all that they must depend on; any will do without it.

    Returns
    -------
    SyntheticImages or None
        None where there are none, the file is damaged, or it has another key.
    """
    read = read_arrays(path, strict=key is not None)
    if read is None or _SYNTHETIC not in read[0] or key not in (None, read[1].get("key")):
        return None
    metadata = read[1]
    try:
        return SyntheticImages(
            torch.from_numpy(read[0][_SYNTHETIC]),
            _number(metadata["before"]),
            _number(metadata["distance"]),
            int(metadata["passes"]),
            _number(metadata.get("activation_kept", "None")),  # not there in earlier versions
        )
    except (KeyError, ValueError):
        return None


def _number(written: str) -> float | None:
    return None if written == "None" else float(written)


def read_run_images(path: Path) -> RunImages:
    """Read a run's images, those of earlier versions too; empty where there are none."""
    read = read_arrays(path, strict=False)
    arrays: Mapping[str, np.ndarray] = {} if read is None else read[0]
    synthetic, examples = (
        torch.from_numpy(arrays[name]) if name in arrays else None for name in (_SYNTHETIC, _EXAMPLES)
    )
    return RunImages(synthetic, examples)

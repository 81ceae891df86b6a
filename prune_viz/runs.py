"""The run directory: what is in it, and writing so that each file is complete or absent.

::

    run.json              provenance, the layers, the stages' seconds and memory, the summary
    filters.csv           a row a filter (`FILTER_COLUMNS`)
    masks.pt              module name -> bool tensor (out_channels,), True = keep
    decisions.json        verdicts, coupling groups, removal order, merges
    moments.safetensors   second moments of every group's channels, for masks at any budget
    probes.safetensors    calibrated probes
    examples.safetensors  example images, and which parts of them excite each filter most
    layers/NNN-name.safetensors   images, activations, responses of a layer, a first layer's weights
    report/index.html     the report
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune_viz.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
FILTER_COLUMNS = [
    "layer", "filter", "verdict", "representative", "score", "cluster", "x", "y", "activation", "damage",
    "reason", "network_x", "network_y",
]  # fmt: skip
_FIGURES = ["score", "x", "y", "network_x", "network_y", "activation", "damage"]


@dataclass(frozen=True)
class LayerRecord:
    """What `run.json` says of a layer.

    Attributes
    ----------
    name : str
        The module's dotted name in the model, as a stranger wrote it: escape before showing.
    kind : str
        For people: ``"3x3 convolution, stride 2"``, ``"5x5 depthwise convolution"``.
    filters : int
        Number of filters.
    depth : int
        Position in the order of execution, from 0.
    receptive_field : tuple of int or None
        Input pixels that one position of the feature map sees, a spatial axis each; None if unknown.
    canvas : tuple of int
        Spatial size of the layer's stimuli.
    group : int or None
        Index into the coupling groups of `decisions.json`; None if it was not found.
    file : str
        Path of the layer's tensors below the run directory, ``layers/NNN-name.safetensors``.
    """

    name: str
    kind: str
    filters: int
    depth: int
    receptive_field: tuple[int, ...] | None
    canvas: tuple[int, ...]
    group: int | None
    file: str

    @property
    def slug(self) -> str:
        """File name without ending, safe on any file system and in any URL."""
        return Path(self.file).stem


@dataclass(frozen=True)
class LayerTensors:
    """A layer's tensors as the run directory holds them.

    Attributes
    ----------
    images : ndarray of float16, shape (F, C, *canvas)
        Stimuli in the model's own (normalised) input units.
    activations : ndarray of float32, shape (F,)
        L2 norm of each filter's feature map on its own stimulus.
    responses : ndarray of float32, shape (F, F)
        ``responses[i, j]``: L2 norm of filter j's feature map on stimulus i.
    weights : ndarray of float32, shape (F, C, *kernel), or None
        Of a layer that reads the input itself, each filter all its channels.
    """

    images: np.ndarray
    activations: np.ndarray
    responses: np.ndarray
    weights: np.ndarray | None = None


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it into place if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, whole or not at all. NaN becomes null."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=True) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def merges_beside(masks_file: Path) -> Path:
    """Where the merges of masks stand that were made for a budget."""
    return masks_file.with_suffix(".merges.json")


def probes_beside(masks_file: Path) -> Path:
    """Where the calibrated probes stand of masks that lie outside their run."""
    return masks_file.with_suffix(".probes.safetensors")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def slug(depth: int, name: str) -> str:
    """File name for a layer: its place in the network and what of its name is safe in a path."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "layer"
    return f"{depth:03d}-{safe}"


class RunDirectory:
    """A run directory on disk: paths, and reading and writing of its parts.

    Parameters
    ----------
    path : Path
        The directory; it need not exist before something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def report_page(self) -> Path:
        """The report's first page."""
        return self.path / "report" / "index.html"

    @property
    def masks_file(self) -> Path:
        """The prune masks."""
        return self.path / "masks.pt"

    @property
    def decisions_file(self) -> Path:
        """Verdicts, coupling groups, removal order and merges."""
        return self.path / "decisions.json"

    @property
    def moments_file(self) -> Path:
        """Second moments of the coupling groups' channels."""
        return self.path / "moments.safetensors"

    @property
    def probes_file(self) -> Path:
        """Calibrated probes."""
        return self.path / "probes.safetensors"

    @property
    def examples_file(self) -> Path:
        """Example images, and which parts of them excite each filter most."""
        return self.path / "examples.safetensors"

    @property
    def filters_file(self) -> Path:
        """The table of filters."""
        return self.path / "filters.csv"

    def claim(self, model_sha256: str, fresh: bool) -> None:
        """Make sure that a run of this model may be written here, and clear away what an earlier one said.

        Raises
        ------
        UserError
            If the directory cannot be written, holds another model's run or something that is no run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --out a directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not (self.path / "run.json").exists():
                raise UserError(
                    f"{self.path} holds something that is not a prune-viz run; give another --out"
                )
            try:
                there = self.read_provenance()["model"]["sha256"]
            except (UserError, KeyError, TypeError):
                there = None
            if there != model_sha256 and not fresh:
                raise UserError(
                    f"{self.path} holds another model's run; give another --out, or --fresh to replace it"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); give another --out") from None
        if fresh:
            shutil.rmtree(self.path / "layers", ignore_errors=True)
            self.probes_file.unlink(missing_ok=True)
        # While a run is under way, no verdicts of an earlier one stand beside its provenance.
        shutil.rmtree(self.path / "report", ignore_errors=True)
        merges = merges_beside(self.masks_file)
        probes = probes_beside(self.masks_file)
        files = (
            self.masks_file,
            merges,
            probes,
            self.decisions_file,
            self.filters_file,
            self.moments_file,
            self.examples_file,
        )
        for file in files:
            file.unlink(missing_ok=True)
        (self.path / "layers").mkdir(exist_ok=True)

    def write_provenance(self, provenance: Mapping[str, Any]) -> None:
        """Write `run.json`."""
        write_json(self.path / "run.json", provenance)

    def read_provenance(self) -> dict[str, Any]:
        """Read `run.json`.

        Raises
        ------
        UserError
            If the directory is not a run of this format.
        """
        return self._read_json(self.path / "run.json")

    def read_decisions(self) -> dict[str, Any]:
        """Read `decisions.json`; raises `UserError` as `read_provenance` does."""
        return self._read_json(self.decisions_file)

    def _read_json(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a prune-viz run: it has no {path.name}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{path} was written by another version of prune-viz; run analyze again")
        return value

    def layers(self) -> list[LayerRecord]:
        """The run's layers in order of depth."""
        records = self.read_provenance()["layers"]
        return [
            LayerRecord(
                **{
                    **record,
                    "canvas": tuple(record["canvas"]),
                    "receptive_field": record["receptive_field"] and tuple(record["receptive_field"]),
                }
            )
            for record in records
        ]

    def write_layer(self, file: str, tensors: LayerTensors, metadata: Mapping[str, str]) -> None:
        """Write a layer's tensors, with `metadata` (strings) in the file's header."""
        from safetensors.numpy import save_file

        arrays = {
            name: np.ascontiguousarray(array) for name, array in vars(tensors).items() if array is not None
        }
        with written_aside(self.path / file) as aside:
            save_file(arrays, aside, metadata=dict(metadata))

    def read_layer(self, file: str) -> LayerTensors:
        """Read a layer's tensors.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return LayerTensors(**load_file(self.path / file))
        except (OSError, SafetensorError, TypeError) as error:
            raise UserError(f"{self.path / file} cannot be read ({error}); run analyze again") from None

    def layer_metadata(self, file: str) -> dict[str, str] | None:
        """The header strings of a layer's file, or None if there is no such complete file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / file, framework="numpy") as tensors:
                return tensors.metadata() or {}
        except (OSError, SafetensorError):
            return None

    def write_moments(self, moments: Mapping[int, np.ndarray]) -> None:
        """Write each group's second moments, (channels + 1, channels + 1), at single precision."""
        from safetensors.numpy import save_file

        arrays = {str(number): matrix.astype(np.float32) for number, matrix in moments.items()}
        with written_aside(self.moments_file) as aside:
            save_file(arrays, aside)

    def read_moments(self) -> dict[int, np.ndarray]:
        """Read each group's second moments.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return {int(number): matrix for number, matrix in load_file(self.moments_file).items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{self.moments_file} cannot be read ({error}); run analyze again") from None

    def write_filters(self, table: pd.DataFrame) -> None:
        """Write `filters.csv`, columns `FILTER_COLUMNS` in that order."""
        with written_aside(self.filters_file) as aside:
            table[FILTER_COLUMNS].to_csv(aside, index=False, lineterminator="\n")

    def read_filters(self) -> pd.DataFrame:
        """Read `filters.csv`; `representative` is a string, empty where there is none."""
        import pandas as pd

        return pd.read_csv(
            self.filters_file,
            dtype={"layer": str, "representative": str, "reason": str},
            keep_default_na=False,
            lineterminator="\n",  # a carriage return may stand in a layer's name
            na_values={name: [""] for name in _FIGURES},
        )


class LayerFiles(Mapping[str, LayerTensors]):
    """A run's layers by name, each read from the run directory when asked for."""

    def __init__(self, run: RunDirectory, records: Sequence[LayerRecord]) -> None:
        self._run = run
        self._files = {record.name: record.file for record in records}

    def __getitem__(self, name: str) -> LayerTensors:
        return self._run.read_layer(self._files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

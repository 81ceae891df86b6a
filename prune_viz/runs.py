"""The run directory: what is in it, and writing so that each file is complete or absent.

::

    run.json              provenance, the layers, the stages' seconds and memory, the summary
    filters.csv           a row a filter (`FILTER_COLUMNS`)
    masks.pt              module name -> bool tensor (out_channels,), True = keep
    decisions.json        verdicts, coupling groups, removal order, merges
    moments.safetensors   second moments of every group's channels, for masks at any budget
    probes.safetensors    calibrated probes
    examples.safetensors  example images, and which parts of them excite each filter most
    log.jsonl             what happened when, an event a line
    tasks/                pieces of layers that are not whole yet
    layers/NNN-name.safetensors   images, activations, responses of a layer, a first layer's weights
    report/index.html     the report
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prune_viz.errors import UserError
from prune_viz.files import ASIDE, read_arrays, write_arrays, write_json, written_aside

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
FILTER_COLUMNS = [
    "layer", "filter", "verdict", "representative", "score", "cluster", "x", "y", "activation", "damage",
    "reason", "network_x", "network_y",
]  # fmt: skip
_LOCK = ".lock"
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
        Stimuli in the model's own (normalised) input units. Read from a file they stay there, read-only, and
        come into memory as they are used, until `files.evict`.
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


def merges_beside(masks_file: Path) -> Path:
    """Where the merges of masks stand that were made for a budget."""
    return masks_file.with_suffix(".merges.json")


def probes_beside(masks_file: Path) -> Path:
    """Where the calibrated probes stand of masks that lie outside their run."""
    return masks_file.with_suffix(".probes.safetensors")


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
    def log_file(self) -> Path:
        """What happened when, an event a line."""
        return self.path / "log.jsonl"

    @property
    def layers_folder(self) -> Path:
        """The layers' tensors."""
        return self.path / "layers"

    @property
    def tasks_folder(self) -> Path:
        """Pieces of layers that are not whole yet."""
        return self.path / "tasks"

    @property
    def filters_file(self) -> Path:
        """The table of filters."""
        return self.path / "filters.csv"

    @contextmanager
    def claimed(self, model_sha256: str, fresh: bool) -> Iterator[None]:
        """Hold the directory for a run of this model, and clear away what an earlier one concluded.

        Raises
        ------
        UserError
            If the directory cannot be written, another process works in it, or it holds another model's run
            or something that is no run.
        """
        from filelock import FileLock, Timeout

        self._check_owner(model_sha256, fresh)
        lock = FileLock(self.path / _LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another prune-viz is at work in {self.path}: wait until it ends, or give another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); give another --out") from None
        except NotImplementedError:
            raise UserError(f"{self.path} lies where no file can be locked; give another --out") from None
        with lock:
            self._check_owner(model_sha256, fresh)
            with suppress(UserError):  # there may be none yet, or another version's
                self.write_provenance({**self.read_provenance(), "state": "running"})
            self._clear(fresh)
            yield

    def in_use(self) -> bool | None:
        """Whether a process holds the directory for a run; None where this user cannot tell."""
        from filelock import FileLock, Timeout

        if not (self.path / _LOCK).exists():
            return False
        try:
            with FileLock(self.path / _LOCK, timeout=0):
                return False
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            return None

    def _check_owner(self, model_sha256: str, fresh: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give --out a directory")
        there = list(self.path.iterdir()) if self.path.is_dir() else []
        if all(file.name == _LOCK or file.suffix == ASIDE for file in there):
            return
        if not (self.path / "run.json").exists():
            raise UserError(f"{self.path} holds something that is not a prune-viz run; give another --out")
        try:
            owner = self.read_provenance()["model"]["sha256"]
        except (UserError, KeyError, TypeError):
            owner = None
        if owner != model_sha256 and not fresh:
            raise UserError(
                f"{self.path} holds another model's run; give another --out, or --fresh to replace it"
            )

    def _clear(self, fresh: bool) -> None:
        """Take away halves of a run that died and conclusions of an earlier one; with `fresh`, everything."""
        for left in [*self.path.rglob(f".*{ASIDE}"), self.path / ".report.old"]:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        if fresh:
            shutil.rmtree(self.layers_folder, ignore_errors=True)
            shutil.rmtree(self.tasks_folder, ignore_errors=True)
            self.probes_file.unlink(missing_ok=True)
            self.log_file.unlink(missing_ok=True)
        # While a run is under way, no verdicts of an earlier one stand beside its provenance.
        shutil.rmtree(self.path / "report", ignore_errors=True)
        files = (
            self.masks_file,
            merges_beside(self.masks_file),
            probes_beside(self.masks_file),
            self.decisions_file,
            self.filters_file,
            self.moments_file,
            self.examples_file,
        )
        for file in files:
            file.unlink(missing_ok=True)

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
            if path.name != "run.json" and (self.path / "run.json").exists():
                raise UserError(
                    f"the run in {self.path} has not come to its end: it has no {path.name}; the same "
                    "analyze command goes on"
                ) from None
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

    def read_layer(self, file: str) -> LayerTensors:
        """Read a layer's tensors.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        read = read_arrays(self.path / file, mapped=("images",))
        if read is None:
            raise UserError(f"{self.path / file} cannot be read: missing or damaged; run analyze again")
        return LayerTensors(**read[0])

    def layer_metadata(self, file: str) -> dict[str, str]:
        """The strings in a layer's file; empty if there is no such file, or it is damaged."""
        read = read_arrays(self.path / file, mapped=("images",))
        return {} if read is None else read[1]

    def write_moments(self, moments: Mapping[int, np.ndarray]) -> None:
        """Write each group's second moments, (channels + 1, channels + 1), at single precision."""
        arrays = {str(number): matrix.astype(np.float32, copy=False) for number, matrix in moments.items()}
        write_arrays(self.moments_file, arrays)

    def read_moments(self) -> dict[int, np.ndarray]:
        """Read each group's second moments.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        read = read_arrays(self.moments_file)
        if read is None:
            raise UserError(f"{self.moments_file} cannot be read: missing or damaged; run analyze again")
        return {int(number): matrix for number, matrix in read[0].items()}

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

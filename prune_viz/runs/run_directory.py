"""The run directory: what is in it, and writing so that each file is complete or absent.

::

    run.json              provenance, the layers, the stages' seconds and memory, the summary
    filters.csv           a row a filter (`FILTER_COLUMNS`)
    masks.pt              module name -> bool tensor (out_channels,), True = keep
    decisions.json        verdicts, coupling groups, removal order, merges
    decisions.schema.json the JSON Schema of that
    moments.safetensors   second moments of every group's channels, for masks at any budget
    probes.safetensors    synthetic calibration images
    examples.safetensors  example images, and which parts of them excite each filter most
    log.jsonl             what happened when, an event a line
    tasks/                results of tasks, until their layer is whole
    layers/NNN-name.safetensors   images, activations, responses of a layer, a first layer's weights
    report/index.html     the report
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from prune_viz import __version__
from prune_viz.runs.decisions_json import Decisions, decisions_schema
from prune_viz.runs.filters_csv import read_filters, write_filters
from prune_viz.runs.run_json import FORMAT, LayerRecord, Provenance
from prune_viz.utils.array_files import read_arrays, write_arrays
from prune_viz.utils.destinations import check_destination
from prune_viz.utils.errors import UserError
from prune_viz.utils.files import write_json
from prune_viz.utils.json_files import convert_json, decode_json, read_text

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

TASKS, LAYERS = "tasks", "layers"  # folders


@dataclass(frozen=True)
class LayerTensors:
    """A layer's tensors as the run directory holds them.

    Attributes
    ----------
    images : ndarray of float16, shape (F, C, *canvas)
        Stimuli in the model's own (normalised) input units. Read from a file they stay there, read-only, and
        come into memory as they are used, and leave it again (`prune_viz.utils.file_arrays`).
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


def calibration_images_beside(masks_file: Path) -> Path:
    """Where the synthetic images stand of masks that lie outside their run."""
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
    def schema_file(self) -> Path:
        """The JSON Schema of `decisions.json`."""
        return self.path / "decisions.schema.json"

    @property
    def gram_matrices_file(self) -> Path:
        """Second moments of the coupling groups' channels."""
        return self.path / "moments.safetensors"

    @property
    def calibration_images_file(self) -> Path:
        """Synthetic calibration images."""
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
        return self.path / LAYERS

    @property
    def tasks_folder(self) -> Path:
        """Results of tasks, until their layer is whole."""
        return self.path / TASKS

    @property
    def filters_file(self) -> Path:
        """The table of filters."""
        return self.path / "filters.csv"

    @property
    def conclusions(self) -> list[Path]:
        """Files that follow from stimuli and calibration images, and are written anew by every run."""
        return [
            self.masks_file,
            merges_beside(self.masks_file),
            calibration_images_beside(self.masks_file),
            self.decisions_file,
            self.schema_file,
            self.filters_file,
            self.gram_matrices_file,
            self.examples_file,
        ]

    @property
    def files(self) -> list[Path]:
        """Every file of fixed name that a run writes."""
        return [*self.conclusions, self.provenance_file, self.calibration_images_file, self.log_file]

    @property
    def provenance_file(self) -> Path:
        """Provenance, the layers, the stages and the summary."""
        return self.path / "run.json"

    def check_masks_destination(self, out: Path | None, review: Path | None, force: bool) -> None:
        """Check where masks made from this run are to be written (`destinations.check_destination`).

        Parameters
        ----------
        out : Path or None
            The file; the run's own masks for None, which may always be replaced.
        review : Path or None
            A review that they follow.
        force : bool
            Whether a file that prune-viz did not write may be replaced.

        Raises
        ------
        UserError
            If they may not be written there.
        """
        masks = self.masks_file if out is None else out
        own = os.path.realpath(masks) == os.path.realpath(self.masks_file)
        replaced = [
            self.masks_file,
            merges_beside(self.masks_file),
            calibration_images_beside(self.masks_file),
        ]
        given = [*self.files, *([] if review is None else [review])]
        inputs = [file for file in given if not (own and file in replaced)]
        check_destination("--out", masks, inputs, force or own)
        for file in (merges_beside(masks), calibration_images_beside(masks)):
            check_destination("--out", file, inputs, force or own)

    def write_provenance(self, provenance: Mapping[str, Any]) -> None:
        """Write `run.json` from the fields of `Provenance`, with the mark by which a run is known."""
        mark = {"format": FORMAT, "written_by": f"prune-viz {__version__}"}
        write_json(self.provenance_file, {**mark, **provenance})

    def mark_running(self) -> None:
        """Say in `run.json` that a process works on the run; a directory without one stays as it is."""
        with suppress(UserError):
            value = decode_json(read_text(self.provenance_file), "run.json")
            self.write_provenance({**value, "state": "running"})

    def read_provenance(self) -> Provenance:
        """Read `run.json`.

        Raises
        ------
        UserError
            If the directory is not a run of this format, or the file is damaged.
        """
        return self._read(self.provenance_file, Provenance)

    def write_decisions(self, decisions: Decisions) -> None:
        """Write `decisions.json`, and its JSON Schema beside it."""
        write_json(self.schema_file, decisions_schema())
        write_json(self.decisions_file, msgspec.to_builtins(decisions))

    def read_decisions(self) -> Decisions:
        """Read `decisions.json`; raises `UserError` as `read_provenance` does."""
        return self._read(self.decisions_file, Decisions)

    def decisions_so_far(self) -> Decisions:
        """Read `decisions.json`; of an unfinished run, which has none yet, decisions without a verdict."""
        found = self.read_provenance()
        if not found.to_come or self.decisions_file.exists():
            return self.read_decisions()
        filters = {record.name: record.filters for record in found.layers}
        return Decisions(
            model_sha256=found.model.sha256, merges=(), filters=filters, macs={}, groups=(), verdicts=(),
            removal_order=(),
        )  # fmt: skip

    def _read(self, path: Path, kind: type[T]) -> T:
        if not path.exists():
            if path.name != "run.json" and self.provenance_file.exists():
                raise UserError(
                    f"the run in {self.path} has not come to its end: it has no {path.name}; the same "
                    "analyze command goes on"
                )
            raise UserError(f"{self.path} is not a prune-viz run: it has no {path.name}")
        value = decode_json(read_text(path), str(path))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{path} was written by another version of prune-viz; run analyze again")
        return convert_json(value, kind, str(path))

    def layers(self) -> list[LayerRecord]:
        """The run's layers in order of depth."""
        return list(self.read_provenance().layers)

    def read_layer(self, file: str) -> LayerTensors:
        """Read a layer's tensors.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        read = read_arrays(self.path / file, mapped=("images",))
        if read is None or not _are_layer(read[0]):
            raise UserError(f"{self.path / file} cannot be read: missing or damaged; run analyze again")
        return LayerTensors(**read[0])

    def read_layer_of(self, record: LayerRecord, channels: int) -> LayerTensors:
        """Read a layer's tensors that belong to its record, of inputs of so many channels.

        Raises
        ------
        UserError
            If the file is missing or damaged, or does not fit `run.json`.
        """
        tensors = self.read_layer(record.file)
        images = tensors.images
        fits = images.ndim <= 5 and images.shape[:2] == (record.filters, channels) and images.size
        if not fits or images.dtype.kind != "f" or tensors.responses.dtype.kind != "f":
            raise UserError(f"{self.path / record.file} does not fit run.json; run analyze again")
        return tensors

    def layer_metadata(self, file: str) -> dict[str, str]:
        """The strings in a layer's file; empty if there is no such file, or it is damaged."""
        read = read_arrays(self.path / file, mapped=("images",))
        return {} if read is None else read[1]

    def write_gram_matrices(self, gram_matrices: Mapping[int, np.ndarray]) -> None:
        """Write each group's second moments, (channels + 1, channels + 1), at single precision."""
        arrays = {
            str(number): matrix.astype(np.float32, copy=False) for number, matrix in gram_matrices.items()
        }
        write_arrays(self.gram_matrices_file, arrays)

    def read_gram_matrices(self) -> dict[int, np.ndarray]:
        """Read each group's second moments.

        Raises
        ------
        UserError
            If the file is missing or damaged.
        """
        read = read_arrays(self.gram_matrices_file)
        sound = read is not None and all(
            re.fullmatch(r"[0-9]{1,9}", number) and matrix.ndim == 2 and len(set(matrix.shape)) == 1
            for number, matrix in read[0].items()
        )
        if read is None or not sound:
            raise UserError(
                f"{self.gram_matrices_file} cannot be read: missing or damaged; run analyze again"
            )
        return {int(number): matrix for number, matrix in read[0].items()}

    def write_filters(self, table: pd.DataFrame) -> None:
        """Write `filters.csv`, columns `FILTER_COLUMNS` in that order."""
        write_filters(table, self.filters_file)

    def read_filters(self) -> pd.DataFrame:
        """Read `filters.csv` (`prune_viz.runs.filters_csv.read_filters`)."""
        return read_filters(self.filters_file)


def _are_layer(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether arrays of a file are a layer's, of shapes that belong together."""
    names = {"images", "activations", "responses"}
    if not names <= arrays.keys() <= names | {"weights"}:
        return False
    count = len(arrays["images"])
    shapes = arrays["activations"].shape, arrays["responses"].shape
    weights = arrays.get("weights")
    sound = arrays["images"].ndim >= 3 and shapes == ((count,), (count, count))
    return sound and (
        weights is None or (3 <= weights.ndim <= 5 and len(weights) == count and weights.dtype.kind == "f")
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

"""What `run.json` holds, as plain typed data, checked as it is read.

Types and ranges are msgspec's to check; what one field must have to do with another is checked here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from prune_viz.runs.damage import Unit
from prune_viz.runs.output_kind import OutputKind
from prune_viz.utils.json_files import check_depth

FORMAT = 1
MOST_FILTERS = 2**20  # of a layer; the largest layers of today's networks have 2**14

Index = Annotated[int, Meta(ge=0, lt=MOST_FILTERS)]
Count = Annotated[int, Meta(ge=0, le=MOST_FILTERS)]
Amount = Annotated[int, Meta(ge=0, le=2**60)]
Extent = Annotated[int, Meta(ge=1, le=2**26)]
State = Literal["running", "stopped", "complete"]

_LAYER_FILE = re.compile(r"layers/[A-Za-z0-9_-]{1,100}\.safetensors")


@dataclass(frozen=True)
class LayerRecord:
    """What `run.json` holds of a layer.

    Attributes
    ----------
    name : str
        The module's dotted name in the model, from an untrusted file: escape it before showing it.
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
    filters: Count
    depth: Index
    receptive_field: tuple[Amount, ...] | None
    canvas: tuple[Extent, ...]
    group: Index | None
    file: str

    def __post_init__(self) -> None:
        if not _LAYER_FILE.fullmatch(self.file):
            raise ValueError("its file is not one that prune-viz would write")
        if math.prod(self.canvas) > 2**26:
            raise ValueError("its canvas is larger than any stimulus")

    @property
    def slug(self) -> str:
        """File name without ending, safe on any file system and in any URL."""
        return Path(self.file).stem


@dataclass(frozen=True)
class ModelRecord:
    """The model that a run analysed, as `run.json` describes it.

    Attributes
    ----------
    sha256 : str
        Of its file; of its weights where it came from Python.
    path, arch, arch_kwargs, key, recognised, trust_pickle, held_inputs, inputs_said
        From `prune_viz.loading.checkpoints.Checkpoint.source`.
    weights, structure : str or None
        Digests of the weights, and of what the network is beside them.
    class_name : str
        Name of its class.
    parameters, macs : int
        Its size, and its cost for one input.
    input_shape : tuple of int
        (C, *size).
    """

    sha256: str
    path: str | None = None
    arch: str | None = None
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_pickle: bool = False
    held_inputs: str | None = None
    recognised: bool = False
    key: str = ""
    inputs_said: tuple[str, ...] = ()
    weights: str | None = None
    structure: str | None = None
    class_name: str = ""
    parameters: Amount = 0
    macs: Amount = 0
    input_shape: tuple[Extent, ...] = ()

    def __post_init__(self) -> None:
        check_depth(self.arch_kwargs, "arch_kwargs")


@dataclass(frozen=True)
class StageRecord:
    """Seconds of a stage, and the process's peak memory at its end in MiB."""

    name: str
    seconds: float
    peak_mib: float | None = None


@dataclass(frozen=True)
class Summary:
    """Filters by verdict, and the network's size before and after removal of all that is flagged."""

    filters: Amount
    keep: Amount
    redundant: Amount
    dead: Amount
    unjudged: Amount = 0
    parameters: Amount | None = None
    parameters_after: Amount | None = None
    macs: Amount | None = None
    macs_after: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What `run.json` holds: the model, the options, the layers, and how far the run has come.

    Attributes
    ----------
    format : int
        Of the run directory.
    model : ModelRecord
    state : {"running", "stopped", "complete"}
        As the last process left it.
    written_by : str
        Program and version.
    options : dict
        By name; whatever `analyze` was given.
    key : str or None
        Digest of what all stimuli depend on (`prune_viz.execution.tasks.stimuli_key`).
    output : OutputKind or None
        What the network returns.
    inputs : dict or None
        Statistics of the model's inputs (`prune_viz.network.inputs.stored_statistics`).
    to_come : tuple of str
        What the run has still to find, for people; empty once it has all.
    summary, damage_unit, calibration, finished
        Once the run is complete; of an unfinished one with a report, a `summary` that counts its filters.
    """

    format: int
    model: ModelRecord
    state: State
    layers: tuple[LayerRecord, ...] = ()
    written_by: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    output: OutputKind | None = None
    inputs: dict[str, Any] | None = None
    device: str = "cpu"
    threads: int = 1
    started: str = ""
    finished: str | None = None
    notes: tuple[str, ...] = ()
    key: str | None = None
    tasks: int = 0
    stages: tuple[StageRecord, ...] = ()
    to_come: tuple[str, ...] = ()
    summary: Summary | None = None
    damage_unit: Unit = Unit.CONSUMERS
    calibration: dict[str, Any] | None = None
    stopped_by: str | None = None

    def __post_init__(self) -> None:
        for name in ("options", "inputs", "calibration"):
            check_depth(getattr(self, name), name)

    @property
    def channels(self) -> int:
        """Channels of the model's input; 0 where that is not known."""
        return self.model.input_shape[0] if self.model.input_shape else 0

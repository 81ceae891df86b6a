"""The options of an analysis, of the command line, `analyze`, `estimate` and the keys of results alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Required, TypedDict

from prune_viz.execution.quality import EFFORTS, Effort, Quality
from prune_viz.execution.tasks import StimulusSettings
from prune_viz.feature_visualization.stimuli import DRAFT_STEPS, check_options
from prune_viz.loading.input_data import Data, describe_data
from prune_viz.network.inputs import InputStatistics
from prune_viz.network.precision import AUTO
from prune_viz.network.precision import check_name as check_precision
from prune_viz.redundancy.judge import TOLERANCE
from prune_viz.runs.output_kind import Task
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import check_sizes

ENGINES = ("local", "ray")
STIMULI = "stimuli"


class OptionFields(TypedDict, total=False):
    """The fields of `AnalysisOptions` as keywords, for type checkers."""

    input_shape: Required[Sequence[int]]
    layers: Sequence[str]
    task: str | None
    prior: str
    only: str | None
    quality: str
    steps: int | None
    canvas: int | None
    seed: int
    device: str
    precision: str
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None
    data: Data
    engine: str
    workers: int | None
    gpus_per_task: float
    memory: int | None


def _of_stimuli(default: Any) -> Any:
    """A field on which stimuli depend, so that it is part of their key under its own name."""
    return field(default=default, metadata={"stimuli": True})


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What a user asks of an analysis, checked.

    Attributes
    ----------
    input_shape : sequence of int
        Shape of one input, channels first: ``(3, 224, 224)``.
    layers : sequence of str
        Shell patterns of the names of layers to analyse; all layers by default.
    task : {"classes", "labels", "dense", "values"}, optional
        What the network returns (`prune_viz.runs.output_kind.Task`); by default it is found out.
    prior : {"natural", "spectrogram", "none"}
        What bounds stimuli (`prune_viz.maximize`).
    only : {"stimuli"}, optional
        What alone is done: pictures without verdicts.
    quality : {"draft", "standard", "fine"}
        How much work is done (`prune_viz.execution.quality`).
    steps : int, optional
        Most steps of the optimiser for each stimulus; by default by `quality`.
    canvas : int or None
        Spatial size of the stimuli; by default that of each layer's receptive field.
    seed : int
        Of all random numbers.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
    precision : {"auto", "float32", "bfloat16"}
        Precision of the gradients that searches follow (`prune_viz.maximize`).
    mean, std : float or sequence of float, optional
        The model's normalisation, of pixels in 0..1.
    data : path, str, Tensor, ndarray or iterable of batches, optional
        Example inputs (`prune_viz.loading.input_data.read_inputs`). The statistics of the natural prior are
        measured on them, of pictures mean and std too unless given; filters are compared on most of them, and
        on the others the change of the output is measured.
    engine : {"local", "ray"}
        Where stimuli are sought: on this machine, or on a Ray cluster (`prune_viz.execution.ray_executor`).
    workers : int, optional
        How many tasks at a time; by default a CPU's cores, of other devices one, of a cluster all it takes.
    gpus_per_task : float
        Of a GPU, how much each task on a Ray cluster takes.
    memory : int, optional
        Bytes that the run may take (`prune_viz.utils.memory.Budget`).

    Raises
    ------
    UserError
        If a value is out of its range, or inputs of that shape would not fit the memory allowed.
    """

    input_shape: Sequence[int]
    layers: Sequence[str] = ()
    task: str | None = None
    prior: str = _of_stimuli("natural")
    only: str | None = None
    quality: str = Quality.STANDARD.value
    steps: int | None = None
    canvas: int | None = _of_stimuli(None)
    seed: int = 0
    device: str = "auto"
    precision: str = AUTO
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    data: Data = None
    engine: str = "local"
    workers: int | None = None
    gpus_per_task: float = 1.0
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.only not in (None, STIMULI):
            raise UserError(f"--only is {STIMULI}, not {self.only!r}")
        if self.quality not in set(Quality):
            raise UserError(f"--quality is {', '.join(Quality)}, not {self.quality!r}")
        if self.steps is not None and self.effort.is_draft:
            raise UserError("--steps is for pictures of full quality: leave it out with --quality draft")
        check_options(self.prior, self.effort.steps)
        check_precision(self.precision)
        if self.task is not None and self.task not in set(Task):
            raise UserError(f"--task is {', '.join(Task)}, not {self.task!r}")
        if self.canvas is not None and self.canvas < 1:
            raise UserError(f"--canvas must be at least 1, not {self.canvas}")
        if self.engine not in ENGINES:
            raise UserError(f"--engine is {' or '.join(ENGINES)}, not {self.engine!r}")
        if self.engine == "ray" and self.memory is not None:
            raise UserError("--memory is for this machine: leave it out with --engine ray")
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs Ray: pip install 'prune-viz[ray]'")
        share = self.gpus_per_task
        if not (0 < share <= 1 or share == int(share) > 0):
            raise UserError(f"--gpus-per-task is a share of a GPU, or a whole number, not {share:g}")
        check_sizes(self.input_shape, self.canvas, self.memory)

    @property
    def effort(self) -> Effort:
        """How much work each stage does."""
        effort = EFFORTS[Quality(self.quality)]
        return effort if self.steps is None else replace(effort, steps=self.steps)

    def recorded(self, device: str, precision: str) -> dict[str, Any]:
        """The options as `run.json` holds them, with the tolerance; seed and inputs stand by themselves.

        Parameters
        ----------
        device, precision : str
            Those that are used.
        """
        return {
            **{one.name: getattr(self, one.name) for one in fields(self) if one.metadata.get("stimuli")},
            "quality": self.quality,
            "steps": self.effort.steps,
            "data": describe_data(self.data),
            "layers": list(self.layers),
            "task": self.task,
            "only": self.only,
            "device": device,
            "precision": precision,
            "tolerance": TOLERANCE,
        }

    @staticmethod
    def of_stimuli(recorded: dict[str, Any], draft: bool = False) -> dict[str, Any]:
        """Of recorded options, those on which stimuli depend, or the drafts from which they are sought."""
        draft = draft or recorded["quality"] == Quality.DRAFT
        names = [one.name for one in fields(AnalysisOptions) if one.metadata.get("stimuli")]
        steps = DRAFT_STEPS if draft else recorded["steps"]
        used = {name: recorded[name] for name in [*names, "device", "precision"]}
        return {**used, "steps": steps, "draft": draft}

    def stimulus_settings(self, statistics: InputStatistics | None, draft: bool) -> StimulusSettings:
        """What a task needs to know of them, or of those of drafts."""
        steps = DRAFT_STEPS if draft else self.effort.steps
        return StimulusSettings(self.prior, steps, self.seed, statistics)

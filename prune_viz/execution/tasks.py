"""The tasks of a run: some filters of one layer each, by itself, whoever does it and when.

A task's key is the digest of all that its result depends on, and the result is a file of that name: what is
there need not be done again, and what another model, option or version left behind is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from prune_viz import __version__
from prune_viz.feature_visualization import algorithm
from prune_viz.feature_visualization.responses import response_matrix
from prune_viz.feature_visualization.search import BATCH, as_stored
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics
from prune_viz.runs.run_json import LayerRecord
from prune_viz.utils.errors import LayerError, one_line
from prune_viz.utils.progress import Progress

_MODEL = ("sha256", "weights", "structure", "arch", "arch_kwargs", "held_inputs", "input_shape")
BATCHES = 4  # a task: with fewer, the last rounds have too few filters left for a good batch


@dataclass(frozen=True)
class Task:
    """Some filters of a layer.

    Attributes
    ----------
    layer : str
        The layer's name.
    start, stop : int
        Its filters from `start` up to but not including `stop`.
    producer : str or None
        A layer whose stimuli for the same filters the work starts from, so that it must be done before.
    key : str
        Hex SHA-256 of all that the result depends on.
    file : str
        Path of the result below the run directory.
    """

    layer: str
    start: int
    stop: int
    producer: str | None
    key: str
    file: str

    @property
    def filters(self) -> int:
        """How many filters."""
        return self.stop - self.start

    @property
    def title(self) -> str:
        """For people: the layer and which filters, counted from 0."""
        return f"{self.layer}, filters {self.start} to {self.stop - 1}"


@dataclass(frozen=True)
class StartingStimuli:
    """What a task's search begins with.

    Attributes
    ----------
    fed : ndarray of float16, shape (F, C, *canvas), or None
        Stimuli of the filters that feed the task's.
    drafts : ndarray of float16, shape (F, C, *draft canvas), or None
        Drafts of the task's own stimuli.
    """

    fed: np.ndarray | None = None
    drafts: np.ndarray | None = None


@dataclass(frozen=True)
class StimulusSettings:
    """What stimuli depend on beside the network.

    Attributes
    ----------
    prior : {"natural", "spectrogram", "none"}
        What bounds them.
    steps : int
        Most steps of the optimiser.
    seed : int
        Seed of noise and jitter.
    statistics : InputStatistics or None
        What is known of the model's inputs.
    """

    prior: str
    steps: int
    seed: int
    statistics: InputStatistics | None


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    Attributes
    ----------
    images : ndarray of float16, shape (F, C, *canvas)
        Stimuli, zeros where the layer cannot be analysed.
    activations : ndarray of float32, shape (F,)
        L2 norm of each filter's map on its own stimulus, NaN where it is not known.
    responses : ndarray of float32, shape (F, all filters of the layer)
        L2 norm of every filter's map on each stimulus.
    diverged : tuple of int
        Filters whose optimisation met values that are not finite.
    failed : str
        Why the layer cannot be analysed; empty if it can.
    seconds : float
        How long it took.
    worker : str
        Who did it: host and process.
    """

    images: np.ndarray
    activations: np.ndarray
    responses: np.ndarray
    diverged: tuple[int, ...]
    failed: str
    seconds: float
    worker: str = ""


def stimuli_key(provenance: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Digest of what all stimuli of a run depend on.

    Parameters
    ----------
    provenance : mapping
        The run's `run.json`.
    options : mapping
        Of its options, those on which stimuli depend (`prune_viz.analysis.options.AnalysisOptions`).
    """
    model = provenance["model"]
    parts = {
        "model": [model[name] for name in _MODEL],
        "options": dict(options),
        "inputs": provenance["inputs"],
        "seed": provenance["seed"],
        "versions": [__version__, provenance["versions"]["torch"]],
        "stage": algorithm.settings(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def task_filters(network: FilterNetwork) -> int:
    """How many filters a task has at most."""
    return BATCHES * BATCH[network.device.type]


def plan_tasks(network: FilterNetwork, records: Sequence[LayerRecord], key: str) -> list[Task]:
    """Cut layers into tasks, in order of depth.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    records : sequence of LayerRecord
        The layers.
    key : str
        From `stimuli_key`.
    """
    names = {record.name for record in records}
    size = task_filters(network)
    tasks = []
    for record in records:
        producer = network.producer(record.name)
        for start in range(0, record.filters, size):
            stop = min(start + size, record.filters)
            parts = json.dumps([key, record.name, start, stop])
            own = hashlib.sha256(parts.encode()).hexdigest()
            file = f"tasks/{record.slug}-{start}-{own[:16]}.safetensors"
            tasks.append(Task(record.name, start, stop, producer if producer in names else None, own, file))
    return tasks


def run_task(
    network: FilterNetwork,
    task: Task,
    settings: StimulusSettings,
    starts: StartingStimuli | None = None,
    batch: int | None = None,
    stop: threading.Event | None = None,
    progress: Progress | None = None,
) -> TaskResult:
    """Find stimuli of a task's filters and what all filters of the layer respond to them.

    Parameters
    ----------
    network : FilterNetwork
        The prepared network.
    task : Task
        The task.
    settings : StimulusSettings
        What the stimuli depend on.
    starts : StartingStimuli, optional
        What the search begins with; found here as far as it is not given.
    batch : int, optional
        Most filters at a time, where memory is short.
    stop : threading.Event, optional
        Once set, the work ends at the next step with `StoppedError`.
    progress : Progress, optional
        Advanced by each filter that is done.
    """
    starts = starts or StartingStimuli()
    layer, worker = network.layer(task.layer), f"{platform.node()}/{os.getpid()}"
    start = time.perf_counter()
    try:
        stimuli = find_stimuli(
            network,
            task.layer,
            range(task.start, task.stop),
            prior=settings.prior,
            steps=settings.steps,
            seed=settings.seed,
            statistics=settings.statistics,
            fed=None if starts.fed is None else torch.from_numpy(starts.fed),
            drafts=None if starts.drafts is None else torch.from_numpy(starts.drafts),
            batch=batch,
            stop=stop,
            progress=progress,
        )
        matrix = response_matrix(network, task.layer, stimuli.images, batch)
    except LayerError as error:
        blank = np.zeros((task.filters, network.input_shape[0], *layer.canvas), dtype=np.float16)
        unknown = np.full(task.filters, np.nan, dtype=np.float32)
        nothing = np.zeros((task.filters, layer.filters), dtype=np.float32)
        return TaskResult(blank, unknown, nothing, (), one_line(error), time.perf_counter() - start, worker)
    return TaskResult(
        as_stored(stimuli.images).numpy(),
        stimuli.activations.numpy().astype(np.float32),
        matrix,
        tuple(stimuli.diverged),
        "",
        time.perf_counter() - start,
        worker,
    )


def failing_together(results: Sequence[TaskResult]) -> list[TaskResult]:
    """All pieces of a layer; where one failed, all as if they had."""
    failed = next((result.failed for result in results if result.failed), "")
    if not failed:
        return list(results)
    return [
        replace(
            result,
            images=np.zeros(result.images.shape, result.images.dtype),
            activations=np.full(result.activations.shape, np.nan, result.activations.dtype),
            responses=np.zeros(result.responses.shape, result.responses.dtype),
            failed=failed,
        )
        for result in results
    ]

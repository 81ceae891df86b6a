"""Results of tasks as a run directory keeps them, until they make a layer's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prune_viz.execution.tasks import StartingStimuli, Task, TaskResult, failing_together
from prune_viz.runs.ownership import own_tensors, remove_tensors
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.run_json import LayerRecord
from prune_viz.utils.array_files import read_arrays, read_header, write_arrays
from prune_viz.utils.errors import UserError

_ARRAYS = ("images", "activations", "responses")


class TaskResults:
    """Results of tasks in a run directory, until a layer's are all there and make its file.

    Parameters
    ----------
    run : RunDirectory
        The run directory.
    records : sequence of LayerRecord
        The layers.
    tasks : sequence of Task
        All tasks of the run.
    key : str
        From `tasks.stimuli_key`.
    weights : callable
        From a layer's name to the weights to be shown, if any.
    draft_key : str
        The key of drafts that layers' files may still hold; empty if there are none.
    """

    def __init__(
        self,
        run: RunDirectory,
        records: Sequence[LayerRecord],
        tasks: Sequence[Task],
        key: str,
        weights: Callable[[str], np.ndarray | None],
        draft_key: str = "",
    ) -> None:
        self._run, self._key, self._weights, self._draft_key = run, key, weights, draft_key
        self._files = {record.name: record.file for record in records}
        self._tasks: dict[str, list[Task]] = {record.name: [] for record in records}
        for task in tasks:
            self._tasks[task.layer].append(task)
        self.metadata = {name: run.layer_metadata(file) for name, file in self._files.items()}
        whole = {one.name: {"run": key, "layer": one.name, "filters": str(one.filters)} for one in records}
        self.whole = {
            name
            for name, metadata in self.metadata.items()
            if "key" not in metadata  # else a piece stands in the layer's place
            and whole[name].items() <= metadata.items()
            and {"failed", "diverged"} <= metadata.keys()
        }
        self.done = {task for task in tasks if task.layer in self.whole or self._read(task) is not None}
        for name in self._files:
            self._complete(name)

    def add(self, task: Task, result: TaskResult) -> None:
        """Keep a result, and write the layer's file once all are there."""
        arrays = {name: getattr(result, name) for name in _ARRAYS}
        metadata = {"key": task.key, **self._describe(task.layer, [result])}
        write_arrays(self._run.path / task.file, arrays, metadata)
        self.done.add(task)
        self._complete(task.layer)

    def ready(self, task: Task) -> bool:
        """Whether the layer that the task starts from is there."""
        return task.producer is None or task.producer in self.whole

    def starting_stimuli(self, task: Task) -> StartingStimuli:
        """What a task's search begins with, as far as it is there."""
        header = read_header(self._run.path / self._files[task.layer]) or {}
        drafted = self._draft_key and header.get("run") == self._draft_key and not header.get("failed")
        return StartingStimuli(
            None if task.producer is None else self._images(task.producer, task),
            self._images(task.layer, task) if drafted else None,
        )

    def _images(self, layer: str, task: Task) -> np.ndarray:
        return np.array(self._run.read_layer(self._files[layer]).images[task.start : task.stop])

    def tidy(self) -> None:
        """Remove results of other options, and of layers that are whole; those of other layers stay."""
        files = own_tensors(self._run.tasks_folder)
        headers = {file.name: read_header(file) or {} for file in files}
        keep = {
            name
            for name, header in headers.items()
            if header.get("run") == self._key and header.get("layer") not in self.whole
        }
        remove_tensors(self._run.tasks_folder, frozenset(keep))

    def _complete(self, name: str) -> None:
        tasks = self._tasks[name]
        if name in self.whole or not self.done.issuperset(tasks):
            return
        results = failing_together([self._sound(task) for task in tasks])
        arrays = {part: [getattr(result, part) for result in results] for part in _ARRAYS}
        weights = None if results[0].failed else self._weights(name)
        if weights is not None:
            arrays["weights"] = [weights]
        self.metadata[name] = self._describe(name, results)
        write_arrays(self._run.path / self._files[name], arrays, self.metadata[name])
        self.whole.add(name)
        for task in tasks:
            (self._run.path / task.file).unlink(missing_ok=True)

    def _sound(self, task: Task) -> TaskResult:
        result = self._read(task)
        if result is None:
            raise UserError(f"{self._run.path / task.file} was damaged meanwhile; the same command goes on")
        return result

    def _read(self, task: Task) -> TaskResult | None:
        read = read_arrays(self._run.path / task.file, mapped=("images",))
        if read is None or read[1].get("key") != task.key:
            return None
        arrays, metadata = read
        try:
            diverged = tuple(int(number) for number in metadata["diverged"].split(", ") if number)
            seconds, failed = float(metadata["seconds"]), metadata["failed"]
            images, activations, responses = (arrays[name] for name in _ARRAYS)
        except (KeyError, ValueError):  # not as we write them
            return None
        shapes = images.shape[:1], activations.shape, responses.shape[:1]
        if any(shape != (task.filters,) for shape in shapes) or responses.ndim != 2:
            return None
        return TaskResult(images, activations, responses, diverged, failed, seconds)

    def _describe(self, layer: str, results: Sequence[TaskResult]) -> dict[str, str]:
        return {
            "run": self._key,
            "layer": layer,
            "filters": str(sum(len(result.activations) for result in results)),
            "diverged": ", ".join(str(number) for result in results for number in result.diverged),
            "failed": results[0].failed,
            "seconds": f"{sum(result.seconds for result in results):.3f}",
        }

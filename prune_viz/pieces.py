"""Results of tasks as a run directory keeps them, until they make a layer's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from prune_viz.errors import UserError
from prune_viz.files import read_arrays, read_header, write_arrays
from prune_viz.runs import LayerRecord, LayerTensors, RunDirectory
from prune_viz.tasks import Piece, Task, join_pieces


class Pieces:
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
    """

    def __init__(
        self,
        run: RunDirectory,
        records: Sequence[LayerRecord],
        tasks: Sequence[Task],
        key: str,
        weights: Callable[[str], np.ndarray | None],
    ) -> None:
        self._run, self._key, self._weights = run, key, weights
        self._files = {record.name: record.file for record in records}
        self._tasks: dict[str, list[Task]] = {record.name: [] for record in records}
        for task in tasks:
            self._tasks[task.layer].append(task)
        self.told = {name: run.layer_told(file) for name, file in self._files.items()}
        whole = {one.name: {"run": key, "layer": one.name, "filters": str(one.filters)} for one in records}
        self.whole = {
            name
            for name, told in self.told.items()
            if "key" not in told  # else a piece stands in the layer's place
            and whole[name].items() <= told.items()
        }
        self.done = {task for task in tasks if task.layer in self.whole or self._read(task) is not None}
        for name in self._files:
            self._complete(name)

    def add(self, task: Task, piece: Piece) -> None:
        """Keep a result, and write the layer's file once all are there."""
        arrays = {name: getattr(piece, name) for name in ("images", "activations", "responses")}
        told = {"key": task.key, **self._told(task.layer, piece)}
        write_arrays(self._run.path / task.file, arrays, told)
        self.done.add(task)
        self._complete(task.layer)

    def ready(self, task: Task) -> bool:
        """Whether the layer that the task starts from is there."""
        return task.feeder is None or task.feeder in self.whole

    def fed(self, task: Task) -> np.ndarray | None:
        """The stimuli that a task starts from."""
        if task.feeder is None:
            return None
        return self._run.read_layer(self._files[task.feeder]).images[task.start : task.stop]

    def tidy(self) -> None:
        """Take away results of other options, and of layers that are whole; those of other layers stay."""
        for file in self._run.tasks_folder.glob("*.safetensors"):
            told = read_header(file) or {}
            if told.get("run") != self._key or told.get("layer") in self.whole:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or not there
            self._run.tasks_folder.rmdir()

    def _complete(self, name: str) -> None:
        tasks = self._tasks[name]
        if name in self.whole or not self.done.issuperset(tasks):
            return
        joined = join_pieces(self._sound(task) for task in tasks)
        weights = None if joined.failed else self._weights(name)
        tensors = LayerTensors(joined.images, joined.activations, joined.responses, weights)
        self.told[name] = self._told(name, joined)
        self._run.write_layer(self._files[name], tensors, self.told[name])
        self.whole.add(name)
        for task in tasks:
            (self._run.path / task.file).unlink(missing_ok=True)

    def _sound(self, task: Task) -> Piece:
        piece = self._read(task)
        if piece is None:
            raise UserError(f"{self._run.path / task.file} was damaged meanwhile; the same command goes on")
        return piece

    def _read(self, task: Task) -> Piece | None:
        read = read_arrays(self._run.path / task.file)
        if read is None or read[1].get("key") != task.key:
            return None
        arrays, told = read
        derailed = tuple(int(number) for number in told["derailed"].split(", ") if number)
        return Piece(
            arrays["images"], arrays["activations"], arrays["responses"], derailed, told["failed"],
            float(told["seconds"]),
        )  # fmt: skip

    def _told(self, layer: str, piece: Piece) -> dict[str, str]:
        return {
            "run": self._key,
            "layer": layer,
            "filters": str(len(piece.activations)),
            "derailed": ", ".join(map(str, piece.derailed)),
            "failed": piece.failed,
            "seconds": f"{piece.seconds:.3f}",
        }

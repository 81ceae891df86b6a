"""Finding out what a network returns: by its last operations, its values on noise, and its output's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from prune_viz.network.copies import plain_copy
from prune_viz.network.dispatch import DispatchMode
from prune_viz.network.outputs import by_inputs
from prune_viz.runs.output_kind import Evidence, OutputKind, Task
from prune_viz.utils.errors import UserError, few
from prune_viz.utils.nested_tensors import tensors_of

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_SIGMOID = {"sigmoid", "hardsigmoid"}
# What scores of classes usually come out of; embeddings end in norms and activations more often.
_LINEAR = {
    "addmm", "mm", "bmm", "baddbmm", "linear", "convolution", "_convolution", "mean", "add", "sub", "mul",
    "div", "log_softmax", "_log_softmax", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool2d",
}  # fmt: skip
# What leaves scores what they are: the operation before it counts.
_PASSED = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze", "unsqueeze",
    "select", "slice", "expand", "clone", "detach", "alias", "contiguous", "_to_copy", "upsample_bilinear2d",
    "upsample_nearest2d", "native_dropout", "dropout",
}  # fmt: skip
_DENSE_NAME = "out"  # under which torchvision's segmentation networks return their scores
_SURE = 1e-4  # how near sums of probabilities come to 1, and lengths of embeddings


def find_output_kind(model: nn.Module, inputs: Tensor, task: Task | None = None) -> OutputKind:
    """Find out what a network returns.

    Parameters
    ----------
    model : nn.Module
        The network; left unchanged.
    inputs : Tensor, shape (B, C, *size)
        Noise that it runs on in single precision.
    task : Task, optional
        What the user says that it is.

    Raises
    ------
    UserError
        If the outputs cannot be what the user says.
    """
    twin = plain_copy(model).float()
    last = _LastOperations()
    try:
        with torch.no_grad(), last:
            returned = twin(inputs)
    except Exception:  # what cannot be watched can still run, as compiled code
        with torch.no_grad():
            returned = twin(inputs)
    outputs = by_inputs(tensors_of(returned), len(inputs))
    operations = {last.of(output) for output in outputs}
    if task is not None:
        _check(task, outputs)
        return OutputKind(task, _normalised(task, outputs), Evidence.GIVEN)
    if isinstance(returned, Mapping) and _DENSE_NAME in returned and all(one.ndim > 2 for one in outputs):
        return OutputKind(Task.DENSE, _normalised(Task.DENSE, outputs), Evidence.STRUCTURE)
    if len(outputs) != 1:
        return OutputKind(Task.VALUES, evidence=Evidence.STRUCTURE)
    return _of_one(outputs[0], operations.pop())


def _of_one(output: Tensor, operation: str) -> OutputKind:
    """What a single output is, made by that operation."""
    many = output.ndim > 1 and output.shape[1] > 1
    over_classes = Task.DENSE if output.ndim > 2 else Task.CLASSES
    if many and _normalised(over_classes, [output]):
        structure = operation in _SOFTMAX
        return OutputKind(over_classes, True, Evidence.STRUCTURE if structure else Evidence.RANGE)
    if operation in _SIGMOID:
        return OutputKind(Task.LABELS, True, Evidence.STRUCTURE)
    if not many or output.ndim != 2 or operation not in _LINEAR or _has_unit_length(output):
        return OutputKind(Task.VALUES)
    return OutputKind(Task.CLASSES)


def _normalised(task: Task, outputs: Sequence[Tensor]) -> bool:
    """Whether outputs are probabilities already, if that is what they are of."""
    if task is Task.VALUES:
        return False
    if task is Task.LABELS:
        return all(bool(((one >= 0) & (one <= 1)).all()) for one in outputs)
    return all(bool((one >= 0).all()) and bool(((one.sum(dim=1) - 1).abs() < _SURE).all()) for one in outputs)


def _has_unit_length(output: Tensor) -> bool:
    return bool(((output.norm(dim=1) - 1).abs() < _SURE).all())


def _check(task: Task, outputs: Sequence[Tensor]) -> None:
    """Refuse a task that outputs of these shapes cannot have."""
    shapes = [tuple(one.shape[1:]) for one in outputs]
    fits = {
        Task.CLASSES: len(shapes) == 1 and len(shapes[0]) == 1 and shapes[0][0] > 1,
        Task.LABELS: len(shapes) == 1,
        Task.DENSE: bool(shapes) and all(len(shape) > 1 and shape[0] > 1 for shape in shapes),
        Task.VALUES: True,
    }
    if not fits[task]:
        needs = {
            Task.CLASSES: "one row of at least two scores for an input",
            Task.LABELS: "a single output",
            Task.DENSE: "scores of at least two classes at every position",
        }
        given = few([f"({', '.join(map(str, shape))})" for shape in shapes]) or "nothing"
        raise UserError(
            f"--task {task.value} takes {needs[task]}; for each input this network returns {given}"
        )


class _LastOperations(DispatchMode):
    """Notes the operation that made each tensor, and hands it on to those that are the same values."""

    def __init__(self) -> None:
        super().__init__()
        self._made: Any = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> str:
        """The operation that made a tensor; empty where none did."""
        return str(self._made.get(tensor, ""))

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what an operation does, and note what it made."""
        made = func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        name = name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
        if name in _PASSED and args and isinstance(args[0], Tensor):
            name = self.of(args[0])
        for tensor in tensors_of(made):
            self._made[tensor] = name
        return made

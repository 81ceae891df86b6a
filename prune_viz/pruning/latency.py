"""How long networks take for one input on this machine, one beside the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.network.calls import ordinary_input
from prune_viz.network.copies import plain_copy
from prune_viz.pruning.export import check_onnx, quietly, to_onnx
from prune_viz.utils.errors import UserError, brief

SECONDS = 3.0  # of measuring, about
PATIENCE = 5.0  # times that, for networks of which `FEWEST` rounds take longer
FEWEST, MOST = 5, 101  # rounds
_WARM = 3  # rounds before

Run = Callable[[Tensor], object]


class Runtime(StrEnum):
    """What runs a network."""

    EAGER = "eager"
    """PyTorch, operation by operation."""
    COMPILE = "compile"
    """PyTorch's compiler."""
    ONNX = "onnx"
    """ONNX Runtime."""


@dataclass(frozen=True)
class Timing:
    """How long a network takes.

    Attributes
    ----------
    seconds : float
        Median over rounds.
    spread : float
        Half the distance of the quartiles, as a share of the median.
    """

    seconds: float
    spread: float


@dataclass(frozen=True)
class Latency:
    """How long a network and a smaller one take for one input.

    Attributes
    ----------
    runtime : Runtime
        What ran them.
    before, after : Timing
        Of the whole and of the smaller network.
    device : str
        Where, for people.
    """

    runtime: Runtime
    before: Timing
    after: Timing
    device: str

    def __str__(self) -> str:
        """A sentence for people."""
        change = self.after.seconds / self.before.seconds - 1
        spread = max(self.before.spread, self.after.spread)
        return (
            f"time for one input ({self.runtime}, {self.device}): {_in_ms(self.before)} -> "
            f"{_in_ms(self.after)} ({change:+.0%}); half of the measurements lie within {spread:.0%}"
        )

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        return {
            "runtime": self.runtime.value,
            "device": self.device,
            "seconds": self.before.seconds,
            "seconds_after": self.after.seconds,
            "spread": self.before.spread,
            "spread_after": self.after.spread,
        }


def _in_ms(timing: Timing) -> str:
    return f"{1e3 * timing.seconds:.3g} ms"


def check_runtime(runtime: Runtime) -> None:
    """Raise `UserError` where what a runtime needs is not installed."""
    if runtime is Runtime.ONNX:
        check_onnx("--runtime onnx")


def compare_latency(
    whole: nn.Module, smaller: nn.Module, input_shape: Sequence[int], runtime: Runtime = Runtime.EAGER
) -> Latency:
    """Time a network and a smaller one, in turn, so that both meet what else the machine does.

    Parameters
    ----------
    whole, smaller : nn.Module
        The networks; copied, not changed. They run where they are, by ONNX Runtime on the CPU.
    input_shape : sequence of int
        (C, *size).
    runtime : Runtime
        What runs them; compiling takes a minute or so.

    Returns
    -------
    Latency

    Raises
    ------
    UserError
        If a network does not run so.
    """
    parameter = next(whole.parameters())
    example = ordinary_input(input_shape).to(parameter)
    example = example.cpu() if runtime is Runtime.ONNX else example
    try:
        with torch.no_grad(), quietly():
            twins = [plain_copy(one).requires_grad_(False) for one in (whole, smaller)]
            runs = [_MAKERS[runtime](twin, example) for twin in twins]
            before, after = time_in_turn(runs, example)
    except Exception as error:  # whatever an untrusted forward pass or a compiler raises
        raise UserError(f"this network does not run with {runtime} ({brief(error)})") from None
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' if threads > 1 else ''}" if example.device.type == "cpu" else "GPU"
    return Latency(runtime, before, after, where)


def time_in_turn(
    runs: Sequence[Run], example: Tensor, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Time functions of an input in turn, for about `SECONDS` in all, and at least once each.

    Parameters
    ----------
    runs : sequence of callable
        What is timed.
    example : Tensor
        What they are called with.
    clock : callable, optional
        Gives the time in seconds.

    Returns
    -------
    list of Timing
    """
    begun = clock()
    for number in range(_WARM):
        for run in runs:
            run(example)
        if number + 1 < _WARM and clock() - begun > SECONDS:
            break
    taken: list[list[float]] = []
    begun = clock()

    def goes_on() -> bool:
        spent = clock() - begun
        return spent < SECONDS if len(taken) >= FEWEST else spent < PATIENCE * SECONDS

    while not taken or (len(taken) < MOST and goes_on()):
        row = []
        for run in runs:
            start = clock()
            run(example)
            if example.device.type == "cuda":
                torch.cuda.synchronize(example.device)
            row.append(clock() - start)
        taken.append(row)
    low, median, high = np.quantile(np.array(taken), (0.25, 0.5, 0.75), axis=0)
    return [
        Timing(float(middle), float((above - below) / 2 / middle))
        for below, middle, above in zip(low, median, high, strict=True)
    ]


def _eager(model: nn.Module, example: Tensor) -> Run:
    return model


def _compiled(model: nn.Module, example: Tensor) -> Run:
    torch._dynamo.reset()  # no other network's code counts towards the limit of recompilations
    return torch.compile(model, dynamic=False)


def _onnx(model: nn.Module, example: Tensor) -> Run:
    return to_onnx(model.cpu(), example, None)[1]


_MAKERS: dict[Runtime, Callable[[nn.Module, Tensor], Run]] = {
    Runtime.EAGER: _eager,
    Runtime.COMPILE: _compiled,
    Runtime.ONNX: _onnx,
}

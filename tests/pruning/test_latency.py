"""Time for one input: networks are timed in turn, and what does not run is said."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import Plain, randomise_norms
from torch import Tensor, nn

from prune_viz.pruning import latency
from prune_viz.pruning.latency import Latency, Runtime, Timing, compare_latency, time_in_turn
from prune_viz.utils.errors import UserError

SHAPE = (3, 12, 12)


def test_median_and_quartiles_are_of_each_function_alone() -> None:
    now = [0.0]
    takes = [itertools.chain([0.0] * 3, itertools.cycle([0.1, 0.2, 0.3, 0.4, 0.5])), itertools.repeat(0.05)]
    calls: list[int] = []

    def run(number: int) -> None:
        calls.append(number)
        now[0] += next(takes[number])

    runs = [lambda _, number=number: run(number) for number in range(2)]
    one, other = time_in_turn(runs, torch.zeros(1), clock=lambda: now[0])
    assert one.seconds == pytest.approx(0.3, abs=0.11)
    assert one.spread == pytest.approx(0.1 / one.seconds, abs=0.2)
    assert (other.seconds, other.spread) == (pytest.approx(0.05), pytest.approx(0, abs=1e-9))
    assert calls == [0, 1] * (len(calls) // 2)
    assert latency.FEWEST + 3 <= len(calls) // 2 <= latency.MOST + 3
    assert now[0] < latency.SECONDS + 1


def test_slow_networks_are_timed_in_few_rounds() -> None:
    now = [0.0]

    def run(_: Tensor) -> None:
        now[0] += 60

    assert time_in_turn([run], torch.zeros(1), clock=lambda: now[0]) == [Timing(60, 0)]
    assert now[0] == 60 * 2  # once to warm up


@pytest.mark.parametrize("runtime", [Runtime.EAGER, pytest.param(Runtime.ONNX, marks=pytest.mark.slow)])
def test_networks_are_timed_and_stay_as_they_are(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime is Runtime.ONNX:
        pytest.importorskip("onnxruntime")
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    torch.manual_seed(0)
    whole, smaller = (randomise_norms(Plain(width)) for width in (16, 8))
    found = compare_latency(whole, smaller, SHAPE, runtime)
    assert found.before.seconds > 0
    assert found.after.seconds > 0
    assert all(one.requires_grad for one in whole.parameters())
    assert f"time for one input ({runtime}, 1 thread): " in str(found)


def test_change_and_spread_are_in_words() -> None:
    found = Latency(Runtime.COMPILE, Timing(0.0123, 0.01), Timing(0.00923, 0.04), "2 threads")
    assert str(found) == (
        "time for one input (compile, 2 threads): 12.3 ms -> 9.23 ms (-25%); half of the "
        "measurements lie within 4%"
    )
    assert found.as_json()["seconds_after"] == 0.00923


def test_what_does_not_run_is_said() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today")

    with pytest.raises(UserError, match=r"does not run with eager \(not today\)"):
        compare_latency(Strict(), Strict(), SHAPE)

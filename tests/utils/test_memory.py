"""The memory budget: what an optimisation is taken to hold, what fits, and how little is refused."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
import tortured
from networks import Untraceable, randomise_norms
from torch import Tensor, nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.cli.arguments import parse_memory
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils import memory as module
from prune_viz.utils.devices import in_batches
from prune_viz.utils.errors import UserError
from prune_viz.utils.memory import free_memory, in_words

MIB = 2**20


@pytest.fixture(scope="module")
def network() -> FilterNetwork:
    return FilterNetwork(tortured.network(), (3, 64, 64), 64)


def test_an_optimisation_holds_what_its_backward_pass_reads(network: FilterNetwork) -> None:
    plan = MemoryPlan(network, None, 1)
    # The stem's rectified map, twelve channels of 64 by 64, at least; for the deepest layer all maps on the
    # way, 24 channels three times and 12 once in each block.
    pixels = 4 * 64 * 64
    assert 12 * pixels <= plan.taken("stem") <= 10 * 12 * pixels
    deepest = (12 + 2 * (3 * 24 + 12)) * pixels
    assert 0.5 * deepest <= plan.taken("blocks.1.project") <= 4 * deepest
    taken = [plan.taken(layer.name) for layer in network.layers]
    assert taken == sorted(taken)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_what_is_planned_fits_the_budget(network: FilterNetwork, workers: int) -> None:
    held = MemoryPlan(network, None, 1).held
    for extra in (16 * MIB, 64 * MIB, 1024 * MIB):
        plan = MemoryPlan(network, held + extra, workers)
        assert 1 <= plan.workers <= workers
        for layer in network.layers:
            batch = plan.batch(layer.name)
            assert 1 <= batch <= 48
            assert batch < 4 or batch % 4 == 0
            assert (
                plan.workers * batch * plan.taken(layer.name) <= plan.budget.limit - plan.held or batch == 1
            )
    assert MemoryPlan(network, held + 4096 * MIB, 2).batch("blocks.1.project") == 48


def test_measuring_leaves_nothing_behind(network: FilterNetwork) -> None:
    """A saved result that held the graph that saved it would stay for ever, with all of an optimisation."""
    made: list[weakref.ref[Tensor]] = []

    def run(images: Tensor) -> Tensor:
        maps = network.maps("blocks.1.project")(images)[1].sigmoid()  # whose backward pass reads its result
        made.append(weakref.ref(maps))
        return maps

    gc.collect()
    gc.disable()
    try:
        assert module.measure_row(run, (3, 16, 16), torch.device("cpu")).kept > 0
        assert [ref for ref in made if ref() is not None] == []
        assert len(made) == 2
    finally:
        gc.enable()


def test_too_little_is_refused_with_how_much_it_takes(network: FilterNetwork) -> None:
    with pytest.raises(
        UserError, match=r"--memory 10 MiB is too little: .+ are taken, and one filter of blocks\.1"
    ):
        MemoryPlan(network, 10 * MIB, 2)


@pytest.mark.slow
def test_a_small_budget_gives_the_same_stimuli(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tortured.network()
    layers = ["blocks.1*"]
    plenty = analyze(model, input_shape=(3, 16, 16), steps=6, layers=layers)
    batches: list[int] = []

    def spied(plan: MemoryPlan, layer: str) -> int:
        plan._left = 2 * 8 * plan.taken("blocks.1.project")  # for eight filters in each of two tasks
        batches.append(batch(plan, layer))
        return batches[-1]

    batch = MemoryPlan.batch
    monkeypatch.setattr(MemoryPlan, "batch", spied)
    little = analyze(model, input_shape=(3, 16, 16), steps=6, layers=layers, workers=2)
    assert min(batches) == 8
    assert max(batches) < 24
    for name, tensors in plenty.layers.items():
        assert (tensors.images == little.layers[name].images).all(), name


def test_unmeasured_layers_do_not_stop_the_plan() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 3)
            self.two = nn.Conv2d(4, 4, 3).to(torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).to(torch.complex64)).abs()

    plan = MemoryPlan(FilterNetwork(Complex(), (3, 16, 16)), None, 2)
    assert plan.taken("two") == 0
    assert plan.batch("two") == plan.batch("one") == 48
    untraceable = FilterNetwork(randomise_norms(Untraceable()), (3, 16, 16))
    assert MemoryPlan(untraceable, None, 2).taken(untraceable.layers[-1].name) > 0


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, limit in ((inner, "max"), (inner.parent, "1000000")):
        (group / "memory.max").write_text(limit)
        (group / "memory.current").write_text("900000")
        (group / "memory.stat").write_text("anon 500000\ninactive_file 400000\n")
    monkeypatch.setattr(module, "_control_groups", lambda: [inner, inner.parent, tmp_path])
    assert free_memory(torch.device("cpu")) == 500_000  # files that were read are given back when need be
    (inner.parent / "memory.max").write_text("max")
    assert free_memory(torch.device("cpu")) > 10 * MIB


def test_the_groups_of_this_process_are_found() -> None:
    groups = module._control_groups()
    assert all(group.is_relative_to("/sys/fs/cgroup") for group in groups)
    assert len(groups) == len(set(groups))


@pytest.mark.parametrize(("text", "size"), [
    ("8G", 8 * 2**30), ("500M", 500 * MIB), ("1.5GiB", 3 * 2**29), ("2 tb", 2**41), ("4096", 4096),
    ("1kb", 1024),
])  # fmt: skip
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "8X", "1e9", "\uff18G", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 8G"):
        parse_memory(text)


def test_sizes_in_words() -> None:
    sizes = (12, 2048, 3.4 * MIB, 1.5 * 2**30)
    assert [in_words(size) for size in sizes] == ["12 B", "2 KiB", "3 MiB", "1.5 GiB"]


def test_batches_shrink_when_memory_runs_out_and_stay_small() -> None:
    done: list[int] = []
    tried: list[int] = []

    def work(rows: torch.Tensor, new: int) -> None:
        tried.append(len(rows))
        if len(rows) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(rows[:new].tolist())

    room = [0]
    for most, fitted, sizes in ((6, 4, [24, 12] + 8 * [4]), (3, 2, [24, 12, 4] + 15 * [2] + [1])):
        room[0] = most
        done.clear()
        tried.clear()
        assert in_batches(31, 24, work, torch.device("cpu")) == fitted
        assert done == list(range(31))
        assert tried == sizes
    with pytest.raises(UserError, match="not enough memory for a single input"):
        in_batches(3, 2, lambda *_: (_ for _ in ()).throw(MemoryError()), torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        in_batches(3, 2, lambda *_: math.floor(1 / 0), torch.device("cpu"))

"""How the search for stimuli grows with filters, depth and canvas, and what a model zoo would take.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/benchmarks/bench_scale.py           # ResNets 18, 50, 152, EfficientNet-lite0
    .venv/bin/python scripts/benchmarks/bench_scale.py --quick   # ResNet-18 alone

ResNets have seeded random weights. Every figure is of this machine, in one run. Filters: the same layer,
more and more of its filters, and the exponent of a power fitted to the times. Depth: the last layer of each
quarter. Canvas: one layer on larger and larger ones. Cores: the same tasks one after the other with
operations spread over the cores, side by side in threads, and side by side in processes. All these with
stimuli of few steps. (Memory: `bench_memory.py`.)
The zoo is a plan on paper: hours and bytes as `analyze --dry-run` estimates them, the mean over these
networks; the search spread over a cluster's cores, what follows it done by each run's own process on as many
cores as this machine has; and what one process that writes a run directory can take in. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trained
from tables import print_table
from torch import nn
from torchvision import models

import prune_viz as pv
from prune_viz.analysis.pipeline import estimate
from prune_viz.execution.executors import LocalEngine
from prune_viz.execution.tasks import BATCHES, StimulusSettings, Task, TaskResult, run_task
from prune_viz.feature_visualization.search import BATCH
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.utils.array_files import read_arrays, write_arrays

SETTINGS = StimulusSettings("natural", 12, 0, None)  # few steps
BRIEF = StimulusSettings("natural", 1, 0, None)  # for the size of results
COUNTS = (16, 32, 64, 128)  # filters
CANVASES = (32, 48, 64, 96)
SHAPE = (3, 224, 224)
EARLY, LATE = "layer2.1.conv2", "layer3.1.conv1"  # layers of ResNet-18: by canvas, and for all else
PIECE = 192  # filters of a task, for the size of results
COMMON = 96  # canvas on which layers are compared, and more and more filters of one
ZOO, WORKERS, NODES = 10_000, 1_000, 16  # networks, cores to search them, nodes that each network goes to


def resnet(depth: int) -> nn.Module:
    """A ResNet with seeded random weights."""
    torch.manual_seed(0)
    return getattr(models, f"resnet{depth}")().eval()


def efficientnet() -> nn.Module:
    """EfficientNet-lite0, really trained."""
    return pv.load_model(trained.efficientnet_weights(), arch=trained.ARCH, arch_kwargs=trained.ARCH_KWARGS)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: resnet(18),
    "ResNet-50": lambda: resnet(50),
    "ResNet-152": lambda: resnet(152),
    "EfficientNet-lite0": efficientnet,
}


def seconds_of(network: FilterNetwork, layer: str, count: int) -> float:
    """Seconds that one worker takes for so many filters of a layer."""
    return run_task(network, Task(layer, 0, count, None, "", ""), SETTINGS, None).seconds


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of the power that fits seconds by sizes best."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def last_layers(network: FilterNetwork) -> list[str]:
    """The last layer of each quarter of the depth."""
    names = [layer.name for layer in network.layers]
    return [names[math.ceil(len(names) * share) - 1] for share in (0.25, 0.5, 0.75, 1.0)]


def by_filters(name: str, network: FilterNetwork) -> dict[str, Any]:
    """How long more and more filters of a layer at the middle take."""
    layer = next(one for one in network.layers[len(network.layers) // 2 :] if one.filters >= COUNTS[-1])
    seconds_of(network, layer.name, COUNTS[0])  # warms up
    seconds = [seconds_of(network, layer.name, count) for count in COUNTS]
    return {"network": name, "layer": layer.name, "seconds": seconds, "exponent": exponent(COUNTS, seconds)}


def by_depth(name: str, network: FilterNetwork) -> list[dict[str, Any]]:
    """How long a filter takes at several depths, on one canvas."""
    rows = []
    for layer in last_layers(network):
        count = min(COUNTS[0], network.layer(layer).filters)
        a_filter = seconds_of(network, layer, count) / count
        depth = network.layer(layer).depth
        rows.append({"network": name, "layer": layer, "depth": depth, "a_filter": a_filter})
    return rows


def by_canvas(model: nn.Module, layer: str) -> dict[str, Any]:
    """How long a layer's filters take on larger canvases."""
    seconds = [seconds_of(FilterNetwork(model, SHAPE, canvas), layer, COUNTS[1]) for canvas in CANVASES]
    return {"layer": layer, "seconds": seconds, "exponent": exponent(CANVASES, seconds)}


_network: FilterNetwork | None = None


def _search(layer: str, start: int) -> None:
    """In a process of its own: a task."""
    global _network
    torch.set_num_threads(1)
    _network = _network or FilterNetwork(resnet(18), SHAPE)
    run_task(_network, Task(layer, start, start + COUNTS[1], None, "", ""), SETTINGS, None)


def by_cores(network: FilterNetwork, cores: int) -> dict[str, float]:
    """Seconds that the same tasks take one after the other, side by side in threads, and in processes."""
    layer, tasks = LATE, [COUNTS[1] * number for number in range(2 * cores)]
    torch.set_num_threads(cores)
    start = time.perf_counter()
    for begin in tasks:
        run_task(network, Task(layer, begin, begin + COUNTS[1], None, "", ""), SETTINGS, None)
    spread = time.perf_counter() - start
    start = time.perf_counter()
    with LocalEngine(network, SETTINGS, cores) as engine:
        running = [
            engine.submit(Task(layer, begin, begin + COUNTS[1], None, "", ""), None) for begin in tasks
        ]
        for future in running:
            future.result()
    threads = time.perf_counter() - start
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_search, [layer] * cores, [0] * cores))  # begun, and ready
        start = time.perf_counter()
        list(pool.map(_search, [layer] * len(tasks), tasks))
        processes = time.perf_counter() - start
    torch.set_num_threads(1)
    return {"spread": spread, "threads": threads, "processes": processes}


def whole_run(name: str, model: nn.Module) -> dict[str, Any]:
    """What a run is estimated to take."""
    found = estimate(model, input_shape=SHAPE, device="cpu")
    counts = [cost.layer.filters for cost in found.layers]
    size = BATCHES * BATCH["cpu"]
    return {
        "network": name, "filters": sum(counts), "tasks": sum(math.ceil(count / size) for count in counts),
        "hours": sum(cost.seconds for cost in found.layers) / 3600,
        "after": (found.total - found.seconds["stimuli"]) / 3600, "disk": found.disk,
        "model": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }  # fmt: skip


def writing_rate(result: TaskResult) -> float:
    """Bytes a second that one process takes in: pieces written, read again and joined to a layer."""
    arrays = {"images": result.images, "activations": result.activations, "responses": result.responses}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for number in range(8):
            write_arrays(Path(folder) / str(number), arrays)
        found = [read_arrays(Path(folder) / str(number))[0] for number in range(8)]
        joined = {name: np.concatenate([one[name] for one in found]) for name in arrays}
        write_arrays(Path(folder) / "layer", joined)
        seconds = time.perf_counter() - start
    return 8 * sum(array.nbytes for array in arrays.values()) / seconds


def plan_zoo(rows: Sequence[dict[str, Any]], piece: TaskResult) -> dict[str, float]:
    """What `ZOO` networks, such as those of the rows, take on `WORKERS` cores."""
    search, conclusions, tasks, stored, model = (
        float(np.mean([row[name] for row in rows])) for name in ("hours", "after", "tasks", "disk", "model")
    )
    makespan = ZOO * search / WORKERS
    shipped = ZOO * model * NODES
    rate = writing_rate(piece)
    return {
        "search, core hours a network": search,
        "what follows, hours of a process": conclusions,
        "tasks a network": tasks,
        "one run after the other, hours": ZOO * (search / min(tasks, WORKERS) + conclusions),
        "runs side by side, hours": makespan,
        "runs at a time, for the cores to have work": math.ceil(WORKERS / tasks),
        "runs at a time, for what follows to keep up": math.ceil(ZOO * conclusions / makespan),
        "stored, TiB": ZOO * stored / 2**40,
        "networks through the object store, TiB": shipped / 2**40,
        "object store, MiB a second": (shipped + ZOO * stored) / (makespan * 3600) / 2**20,
        "of which results": ZOO * stored / (makespan * 3600) / 2**20,
        "the writing process takes, MiB a second": rate / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    quick = parser.parse_args().quick
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    names = list(NETWORKS)[:1] if quick else list(NETWORKS)
    small = FilterNetwork(resnet(18), SHAPE)
    used = by_cores(small, cores)
    print_table(
        f"The same tasks on {cores} cores", ["how", "seconds", "of operations spread over the cores"],
        [[how, seconds, seconds / used["spread"]] for how, seconds in used.items()],
    )  # fmt: skip
    canvas = by_canvas(resnet(18), EARLY)
    print_table(
        "Seconds by canvas, ResNet-18", ["layer", *map(str, CANVASES), "exponent"],
        [[canvas["layer"], *canvas["seconds"], canvas["exponent"]]],
    )  # fmt: skip
    filters, depths, runs = [], [], []
    for name in names:
        model = NETWORKS[name]()
        common = FilterNetwork(model, SHAPE, COMMON)
        filters.append(by_filters(name, common))
        depths += by_depth(name, common)
        torch.set_num_threads(cores)
        runs.append(whole_run(name, model))
        torch.set_num_threads(1)
        print(json.dumps(runs[-1]), flush=True)
    print_table(
        "Seconds by filters of a layer", ["network", "layer", *map(str, COUNTS), "exponent"],
        [[one["network"], one["layer"], *one["seconds"], one["exponent"]] for one in filters],
    )  # fmt: skip
    print_table(
        "Seconds a filter, by depth", ["network", "layer", "depth", "a filter"],
        [list(one.values()) for one in depths],
    )  # fmt: skip
    print_table(
        "Whole runs, estimated",
        ["network", "filters", "tasks", "search, core hours", "what follows, hours", "disk, GiB"],
        [[*(row[key] for key in ("network", "filters", "tasks", "hours", "after")), row["disk"] / 2**30]
         for row in runs],
    )  # fmt: skip
    piece = run_task(small, Task(LATE, 0, PIECE, None, "", ""), BRIEF, None)
    zoo = plan_zoo(runs, piece)
    print_table(f"{ZOO:,} networks on {WORKERS:,} cores", ["what", ""], [list(item) for item in zoo.items()])
    print(json.dumps({
        "filters": filters, "depth": depths, "canvas": canvas, "cores": used, "zoo": zoo,
        "exponent": max(one["exponent"] for one in filters), "runs": runs,
    }))  # fmt: skip


if __name__ == "__main__":
    main()

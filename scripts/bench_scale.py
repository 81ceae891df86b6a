"""How the search for stimuli grows with filters, depth and canvas, and what a model zoo would take.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/bench_scale.py           # ResNets 18, 50, 152, EfficientNet-lite0
    .venv/bin/python scripts/bench_scale.py --quick   # ResNet-18 alone

ResNets have seeded random weights. Every figure is of this machine, in one run. Filters: the same layer,
more and more of its filters, and the exponent of a power fitted to the times. Depth: the last layer of each
quarter. Canvas: one layer on larger and larger ones. Cores: the same tasks one after the other with
operations spread over the cores, side by side in threads, and side by side in processes. All these with
ascents of few steps. (Memory: `bench_memory.py`.)
The zoo is a plan on paper: core hours as `analyze --dry-run` estimates them, the mean over these networks,
and what one process that writes a run directory can take in. The last line is one JSON object.
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
from prune_viz.engines import LocalEngine
from prune_viz.estimate import estimate_stimuli
from prune_viz.files import read_arrays, write_arrays
from prune_viz.filters import FilterNetwork
from prune_viz.memory_plan import MemoryPlan
from prune_viz.progress import Progress
from prune_viz.tasks import Piece, StimulusSettings, Task, do_task

FULL = StimulusSettings("natural", 176, 0, None)
SETTINGS = StimulusSettings("natural", 12, 0, None)  # short ascents, but to estimate whole runs
BRIEF = StimulusSettings("natural", 1, 0, None)  # for the size of results
COUNTS = (16, 32, 64, 128)  # filters
CANVASES = (32, 48, 64, 96)
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
    return do_task(network, Task(layer, 0, count, None, "", ""), SETTINGS, None).seconds


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
    seconds = [
        seconds_of(FilterNetwork(model, (3, 224, 224), canvas), layer, COUNTS[1]) for canvas in CANVASES
    ]
    return {"layer": layer, "seconds": seconds, "exponent": exponent(CANVASES, seconds)}


_network: FilterNetwork | None = None


def _search(layer: str, start: int) -> None:
    """In a process of its own: a task."""
    global _network
    torch.set_num_threads(1)
    _network = _network or FilterNetwork(resnet(18), (3, 224, 224))
    do_task(_network, Task(layer, start, start + COUNTS[1], None, "", ""), SETTINGS, None)


def by_cores(network: FilterNetwork, cores: int) -> dict[str, float]:
    """Seconds that the same tasks take one after the other, side by side in threads, and in processes."""
    layer, tasks = "layer3.1.conv1", [COUNTS[1] * number for number in range(2 * cores)]
    torch.set_num_threads(cores)
    start = time.perf_counter()
    for begin in tasks:
        do_task(network, Task(layer, begin, begin + COUNTS[1], None, "", ""), SETTINGS, None)
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


def writer_rate(piece: Piece) -> float:
    """Bytes a second that one process takes in: pieces written, read again and joined to a layer."""
    arrays = {"images": piece.images, "activations": piece.activations, "responses": piece.responses}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for number in range(8):
            write_arrays(Path(folder) / str(number), arrays)
        found = [read_arrays(Path(folder) / str(number))[0] for number in range(8)]
        joined = {name: np.concatenate([one[name] for one in found]) for name in arrays}
        write_arrays(Path(folder) / "layer", joined)
        seconds = time.perf_counter() - start
    return 8 * sum(array.nbytes for array in arrays.values()) / seconds


def plan_zoo(
    hours: Sequence[float], filters: Sequence[int], model_bytes: Sequence[int], piece: Piece
) -> dict:
    """What `ZOO` such networks take on `WORKERS` cores."""
    piece_bytes = sum(array.nbytes for array in (piece.images, piece.activations, piece.responses))
    a_filter = piece_bytes / len(piece.activations)
    work = float(np.mean(hours))  # core hours a network
    results = float(np.mean(filters)) * a_filter  # bytes a network
    makespan = ZOO * work / WORKERS
    incoming = ZOO * results / (makespan * 3600)
    rate = writer_rate(piece)
    return {
        "core_hours_a_network": work,
        "makespan_hours": makespan,
        "stored_tib": ZOO * results / 2**40,
        "shipped_tib": ZOO * float(np.mean(model_bytes)) * NODES / 2**40,
        "incoming_mib_a_second": incoming / 2**20,
        "one_writer_mib_a_second": rate / 2**20,
        "writers_needed": math.ceil(incoming / rate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    quick = parser.parse_args().quick
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    names = list(NETWORKS)[:1] if quick else list(NETWORKS)
    small = FilterNetwork(resnet(18), (3, 224, 224))
    used = by_cores(small, cores)
    print_table(
        f"The same tasks on {cores} cores", ["how", "seconds", "of operations spread over the cores"],
        [[how, seconds, seconds / used["spread"]] for how, seconds in used.items()],
    )  # fmt: skip
    canvas = by_canvas(resnet(18), "layer2.1.conv2")
    print_table(
        "Seconds by canvas, ResNet-18", ["layer", *map(str, CANVASES), "exponent"],
        [[canvas["layer"], *canvas["seconds"], canvas["exponent"]]],
    )  # fmt: skip
    filters, depths, hours, counts, sizes = [], [], [], [], []
    for name in names:
        model = NETWORKS[name]()
        network = FilterNetwork(model, (3, 224, 224))
        common = FilterNetwork(model, (3, 224, 224), COMMON)
        filters.append(by_filters(name, common))
        depths += by_depth(name, common)
        plan = MemoryPlan(network, None, cores)
        costs = estimate_stimuli(network, network.layers, FULL, plan, Progress())
        hours.append(sum(cost.seconds for cost in costs) / 3600)
        counts.append(sum(layer.filters for layer in network.layers))
        sizes.append(sum(tensor.nbytes for tensor in model.state_dict().values()))
        print(f"{name}: exponent in filters {filters[-1]['exponent']:.3f}, {hours[-1]:.2f} core hours")
    print_table(
        "Seconds by filters of a layer", ["network", "layer", *map(str, COUNTS), "exponent"],
        [[one["network"], one["layer"], *one["seconds"], one["exponent"]] for one in filters],
    )  # fmt: skip
    print_table(
        "Seconds a filter, by depth", ["network", "layer", "depth", "a filter"],
        [list(one.values()) for one in depths],
    )  # fmt: skip
    print_table(
        "Core hours of all stimuli, by network", ["network", "filters", "hours"],
        [list(row) for row in zip(names, counts, hours, strict=True)],
    )  # fmt: skip
    piece = do_task(small, Task("layer3.1.conv1", 0, 192, None, "", ""), BRIEF, None)
    zoo = plan_zoo(hours, counts, sizes, piece)
    print_table(f"{ZOO:,} networks on {WORKERS:,} cores", ["what", ""], [list(item) for item in zoo.items()])
    print(json.dumps({
        "filters": filters, "depth": depths, "canvas": canvas, "cores": used, "zoo": zoo,
        "exponent": max(one["exponent"] for one in filters), "networks": dict(zip(names, hours, strict=True)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()

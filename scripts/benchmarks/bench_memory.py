"""What a run holds in memory from end to end, by network, under a memory budget.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/benchmarks/bench_memory.py           # ResNets 18, 50, 152, RegNet-X-32GF
    .venv/bin/python scripts/benchmarks/bench_memory.py --quick   # ResNet-18 alone

Networks have seeded random weights. Every one runs in a process of its own through all stages of a run, of
which only what does not change the peak is cut short. Stimuli take one step in two tasks of the layer whose
optimisation holds most; all others are noise. Eight a layer run through the network; images are
calibrated in one pass and compared in two variants; of the verdicts only the widest group's is reached.
Peaks are those of the whole process up to the end of a stage, in MiB. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tables import print_table
from torch import nn
from torchvision import models

from prune_viz.analysis.options import AnalysisOptions
from prune_viz.analysis.pipeline import analyze
from prune_viz.analysis.prepare import prepare
from prune_viz.calibration import extent, images, synthetic_images
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution import executors, quality
from prune_viz.execution.memory_plan import MemoryPlan
from prune_viz.execution.tasks import StimulusSettings, Task, TaskResult
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.redundancy import group_verdicts
from prune_viz.redundancy.channel_verdicts import GroupVerdicts, keep_whole_group
from prune_viz.redundancy.judge import judge
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.stages import peak_mib

NETWORKS = ("resnet18", "resnet50", "resnet152", "regnet_x_32gf")
SHAPE = (3, 224, 224)
BUDGET = 4 * 2**30  # bytes
SHOWN = 8  # of a layer's that are calibration images


def survey(name: str) -> dict[str, Any]:
    """In a process of its own: a network's size, its heaviest layer to optimise for, and its widest group."""
    prepared = prepare(seeded(name), AnalysisOptions(input_shape=SHAPE, device="cpu"))
    plan = MemoryPlan(prepared.network, BUDGET, None)
    return {
        "network": name, "layers": len(prepared.layers),
        "filters": sum(layer.filters for layer in prepared.layers),
        "heaviest": max(prepared.layers, key=lambda layer: plan.taken(layer.name)).name,
        "widest": max(prepared.judged, key=lambda group: group.channels).number,
    }  # fmt: skip


def run(known: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: a run, and its peaks."""
    model = seeded(known["network"])
    with tempfile.TemporaryDirectory() as folder, shortened(known["heaviest"], known["widest"]):
        analyze(model, input_shape=SHAPE, memory=BUDGET, device="cpu", out=folder)
        stages = RunDirectory(Path(folder)).read_provenance().stages
    return {**known, "peaks": {one.name: one.peak_mib for one in stages}, "peak_mib": peak_mib()}


def seeded(name: str) -> nn.Module:
    """One of torchvision's networks with seeded random weights."""
    torch.manual_seed(0)
    return getattr(models, name)().eval()


def apart(work: Callable[[Any], dict[str, Any]], given: object) -> dict[str, Any]:
    """Done in a process that begins with nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, given).result()


@contextmanager
def shortened(heaviest: str, widest: int) -> Iterator[None]:
    """Steps for two tasks of the heaviest layer, noise for all others, and less of what repeats itself."""
    make, find = images.noise_and_stimuli, executors.run_task

    def stimuli(network: FilterNetwork, task: Task, settings: StimulusSettings, *given: Any) -> TaskResult:
        if task.layer == heaviest and task.start < 2 * task.filters:
            return find(network, task, replace(settings, steps=1), *given)
        layer = network.layer(task.layer)
        random = np.random.default_rng(task.start)
        pictures = random.standard_normal((1, network.input_shape[0], *layer.canvas), dtype=np.float32)
        images = pictures * random.standard_normal((task.filters, 1, 1, 1), dtype=np.float32)
        responses = random.random((task.filters, layer.filters), dtype=np.float32)
        return TaskResult(
            images.astype(np.float16), np.ones(task.filters, np.float32), responses, (), "", 1.0
        )

    def few(layers: Iterable[np.ndarray], *settings: Any) -> Any:
        return make((images[:SHOWN] for images in layers), *settings)

    usual = quality.EFFORTS[quality.Quality.STANDARD]
    less = replace(usual, variants=2, sensitivity_variants=2)

    def judged(group: CouplingGroup, *settings: Any) -> GroupVerdicts:
        return judge(group, *settings) if group.number == widest else keep_whole_group(group)

    with (
        mock.patch.object(executors, "run_task", stimuli),
        mock.patch.object(images, "noise_and_stimuli", few),
        mock.patch.object(group_verdicts, "judge", judged),
        mock.patch.object(extent, "IMAGES", 2 * synthetic_images.BATCH),
        mock.patch.dict(quality.EFFORTS, {quality.Quality.STANDARD: less}),
        mock.patch.multiple(extent, PASSES=1, FEWEST_PASSES=1),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    names: Sequence[str] = NETWORKS[:1] if parser.parse_args().quick else NETWORKS
    rows = []
    for name in names:
        rows.append(apart(run, apart(survey, name)))
        print(json.dumps(rows[-1]), flush=True)
    stages = list(rows[0]["peaks"])
    print_table(
        f"Peak memory in MiB up to the end of each stage, --memory {BUDGET / 2**20:.0f}M",
        ["network", "layers", "filters", *stages],
        [[*(row[key] for key in ("network", "layers", "filters")), *(row["peaks"][name] for name in stages)]
         for row in rows],
    )  # fmt: skip
    print(json.dumps({"budget_mib": BUDGET / 2**20, "rows": rows}))


if __name__ == "__main__":
    main()

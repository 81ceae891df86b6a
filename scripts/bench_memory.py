"""What a run holds in memory from end to end, by network, where it is told how much it may.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/bench_memory.py           # ResNets 18, 50, 152, RegNet-X-32GF
    .venv/bin/python scripts/bench_memory.py --quick   # ResNet-18 alone

Networks have seeded random weights. Every one runs in a process of its own through all stages of a run, of
which only what does not change the peak is cut short. The search has a task a worker, of the layer whose
ascents hold most, with one step. For all else stimuli are noise: of the layer with most of it on its own
canvas, of the others on one of 64; eight a layer run through the network as probes; probes are calibrated in
one pass and compared in two variants; of the verdicts only the widest group's is reached. Peaks are those of
the whole process up to the end of a stage, in MiB. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tables import print_table
from torchvision import models

from prune_viz import calibration, engines, probes, ranking, verdicts
from prune_viz.analysis import analyze
from prune_viz.engines import LocalEngine
from prune_viz.filters import FilterNetwork
from prune_viz.groups import CouplingGroup
from prune_viz.layers import Layer
from prune_viz.memory_plan import MemoryPlan
from prune_viz.provenance import peak_mib
from prune_viz.redundancy import GroupVerdicts, judge, judge_unjudged
from prune_viz.runs import RunDirectory
from prune_viz.subjects import Subject, prepare_subject
from prune_viz.tasks import Piece, StimulusSettings, Task

NETWORKS = ("resnet18", "resnet50", "resnet152", "regnet_x_32gf")
BUDGET = 4 * 2**30  # bytes
CANVAS = 64  # of the noise that stands for stimuli, but in the layer that has most
SHOWN = 8  # of a layer's that are probes
BRIEF = StimulusSettings("natural", 1, 0, None)


def run(name: str) -> dict[str, Any]:
    """In a process of its own: the stages of a network's run, and their peaks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(models, name)().eval()
    subject = prepare_subject(
        model, (3, 224, 224), layers=(), canvas=None, seed=0, device="cpu", mean=None, std=None, data=None,
        out=None, file_sha256=None,
    )  # fmt: skip
    held = peak_mib()
    workers, batch = search(subject)
    peaks = {"search": peak_mib()}
    layers = subject.layers
    largest = max(layers, key=lambda layer: layer.filters * math.prod(layer.canvas))
    widest = max(subject.judged, key=lambda group: group.channels).number
    del subject
    with tempfile.TemporaryDirectory() as folder, shortened(largest, widest):
        analyze(model, input_shape=(3, 224, 224), canvas=CANVAS, memory=BUDGET, device="cpu", out=folder)
        stages = RunDirectory(Path(folder)).read_provenance()["stages"]
    peaks.update({one["name"]: one["peak_mib"] for one in stages})
    return {
        "network": name, "layers": len(layers), "filters": sum(layer.filters for layer in layers),
        "largest": f"{largest.filters} filters on {largest.canvas[0]}", "prepared": held, "peaks": peaks,
        "peak_mib": peak_mib(), "workers": workers, "batch": batch,
    }  # fmt: skip


def search(subject: Subject) -> tuple[int, int]:
    """A task for each worker, of the layer whose ascents hold most; how many workers and filters in each."""
    network = subject.network
    plan = MemoryPlan(network, BUDGET, 2)
    layer = max(network.layers, key=lambda layer: plan.taken(layer.name))
    batch = plan.batch(layer.name)
    with LocalEngine(network, BRIEF, plan.workers, plan.batch) as engine:
        tasks = [
            Task(layer.name, start, start + batch, None, "", "")
            for start in range(0, batch * plan.workers, batch)
        ]
        for future in [engine.submit(task, None) for task in tasks]:
            future.result()
    return plan.workers, batch


@contextmanager
def shortened(largest: Layer, widest: int) -> Iterator[None]:
    """Noise for stimuli; and what repeats itself cut short: probes, passes, variants and verdicts."""
    make = probes.make_probes

    def noise(network: FilterNetwork, task: Task, *_: Any) -> Piece:
        layer = network.layer(task.layer)
        canvas = largest.canvas if layer.name == largest.name else layer.canvas
        random = np.random.default_rng(task.start)
        pictures = random.standard_normal((1, network.input_shape[0], *canvas), dtype=np.float32)
        images = pictures * random.standard_normal((task.filters, 1, 1, 1), dtype=np.float32)
        responses = random.random((task.filters, layer.filters), dtype=np.float32)
        return Piece(images.astype(np.float16), np.ones(task.filters, np.float32), responses, (), "", 1.0)

    def few(layers: Iterable[np.ndarray], *settings: Any) -> Any:
        return make((images[:SHOWN] for images in layers), *settings)

    def judged(group: CouplingGroup, *settings: Any) -> GroupVerdicts:
        return judge(group, *settings) if group.number == widest else judge_unjudged(group)

    with (
        mock.patch.object(engines, "do_task", noise),
        mock.patch.object(probes, "make_probes", few),
        mock.patch.object(verdicts.redundancy, "judge", judged),
        mock.patch.object(calibration, "PROBES", 2 * calibration.BATCH),
        mock.patch.object(calibration, "VARIANTS", 2),
        mock.patch.object(ranking, "SENSED", 2),
        mock.patch.dict(calibration.calibrate.__kwdefaults__, passes=1),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone")
    names: Sequence[str] = NETWORKS[:1] if parser.parse_args().quick else NETWORKS
    rows = []
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(run, name).result())
        print(json.dumps(rows[-1]), flush=True)
    stages = list(rows[0]["peaks"])
    print_table(
        f"Peak memory in MiB up to the end of each stage, --memory {BUDGET / 2**20:.0f} MiB",
        ["network", "layers", "filters", "largest layer", "prepared", *stages, "peak"],
        [[row["network"], row["layers"], row["filters"], row["largest"], row["prepared"],
          *(row["peaks"].get(stage, 0) for stage in stages), row["peak_mib"]] for row in rows],
    )  # fmt: skip
    print(json.dumps({"budget_mib": BUDGET / 2**20, "rows": rows}))


if __name__ == "__main__":
    main()

"""What a run holds in memory from end to end, by network, where it is told how much it may.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/bench_memory.py           # ResNets 18, 50, 152, RegNet-X-32GF
    .venv/bin/python scripts/bench_memory.py --quick   # ResNet-18 alone

Networks have seeded random weights. Every one runs in a process of its own through all stages of a run, of
which only what does not change the peak is cut short: the search has a task a worker, of the layer whose
ascents hold most, with one step; the other stimuli are noise, of which eight a layer run through the network
as probes; probes are calibrated in one pass and compared in two variants. Of the verdicts only the widest
group's is reached. Peaks are those of the whole process up to the end of a stage, in MiB. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
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
from torch import Tensor
from torchvision import models

from prune_viz import calibration, conclusions, probes, ranking, verdicts
from prune_viz.engines import LocalEngine
from prune_viz.groups import CouplingGroup
from prune_viz.memory import Budget
from prune_viz.memory_plan import MemoryPlan
from prune_viz.progress import Progress
from prune_viz.provenance import Stages, peak_mib
from prune_viz.redundancy import GroupVerdicts, judge, judge_unjudged
from prune_viz.runs import LayerTensors, RunDirectory
from prune_viz.subjects import Subject, prepare_subject
from prune_viz.tasks import Settings, Task

NETWORKS = ("resnet18", "resnet50", "resnet152", "regnet_x_32gf")
BUDGET = 4 * 2**30  # bytes
CANVAS = 64  # of the noise that stands for stimuli
SHOWN = 8  # of a layer's that are probes
BRIEF = Settings("natural", 1, 0, None)


def run(name: str) -> dict[str, Any]:
    """In a process of its own: the stages of a network's run, and their peaks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(models, name)().eval()
    subject = prepare_subject(
        model, (3, 224, 224), layers=(), canvas=None, seed=0, device="cpu", mean=None, std=None, data=None,
        out=None, file_sha256=None,
    )  # fmt: skip
    stages = Stages()
    held = peak_mib()
    with stages.timed("search"):
        plan = search(subject)
    small = prepare_subject(
        model, (3, 224, 224), layers=(), canvas=CANVAS, seed=0, device="cpu", mean=None, std=None, data=None,
        out=None, file_sha256=None,
    )  # fmt: skip
    del subject
    with tempfile.TemporaryDirectory() as folder, shortened(small):
        directory = RunDirectory(Path(folder))
        write_noise(small, directory)
        conclusions.conclude(small, directory, "", stages, Progress(), Budget.of(torch.device("cpu"), BUDGET))
    return {
        "network": name, "layers": len(small.layers), "filters": sum(one.filters for one in small.layers),
        "prepared": held, "peaks": {one["name"]: one["peak_mib"] for one in stages.listed()},
        "peak_mib": peak_mib(), "workers": plan[0], "batch": plan[1],
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


def write_noise(subject: Subject, directory: RunDirectory) -> None:
    """Noise in place of the layers' stimuli and responses."""
    random = np.random.default_rng(0)
    directory.layers_folder.mkdir(parents=True)
    for record in subject.records:
        count = record.filters
        pictures = random.standard_normal((1, subject.network.input_shape[0], *record.canvas))
        images = (pictures * random.standard_normal((count, 1, 1, 1))).astype(np.float16)
        responses = random.random((count, count), dtype=np.float32)
        tensors = LayerTensors(images, np.ones(count, np.float32), responses)
        directory.write_layer(record.file, tensors, {})


@contextmanager
def shortened(subject: Subject) -> Iterator[None]:
    """Cut short what repeats itself: probes, passes, variants and verdicts."""
    widest = max(subject.judged, key=lambda group: group.channels).number
    make = probes.make_probes

    def few(layers: Iterable[Tensor], *settings: Any) -> Any:
        return make((images[:SHOWN] for images in layers), *settings)

    def judged(group: CouplingGroup, *settings: Any) -> GroupVerdicts:
        return judge(group, *settings) if group.number == widest else judge_unjudged(group)

    with (
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
        ["network", "layers", "filters", "prepared", *stages, "peak"],
        [[row["network"], row["layers"], row["filters"], row["prepared"],
          *(row["peaks"].get(stage, 0) for stage in stages), row["peak_mib"]] for row in rows],
    )  # fmt: skip
    print(json.dumps({"budget_mib": BUDGET / 2**20, "rows": rows}))


if __name__ == "__main__":
    main()

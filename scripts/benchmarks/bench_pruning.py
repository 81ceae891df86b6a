"""What is left of a network when a share of every layer's filters is removed, without fine-tuning.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained network
    .venv/bin/pip install --no-deps scikit-image
    .venv/bin/python scripts/benchmarks/bench_pruning.py  # MNIST networks of three seeds, EfficientNet-lite0
    .venv/bin/python scripts/benchmarks/bench_pruning.py --quick   # one VGG-like network, two shares
    .venv/bin/python scripts/benchmarks/bench_pruning.py --run reports/efficientnet_lite0  # a run made before

The same counts a layer are removed from the same network by every method: which filters go (selector)
and what makes up for them (compensator, `pruners.py`); prune-viz's own ones stand beside. "Images" are
256 unlabelled ones, which only the rows say so have seen: training images for MNIST, crops of one scene
for EfficientNet-lite0. Measured are top-1 on held-out digits, or agreement with the whole network on
crops of photographs, and the Kullback-Leibler divergence from the whole network's output. Of
EfficientNet-lite0 only the expansion layers are pruned, all by the same share; of MNIST's networks
everything, residual streams too.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pruners
import torch
import trained
from rich.console import Console
from torch import Tensor, nn
from trained import Trained

import prune_viz as pv
from prune_viz.calibration.image_files import load_synthetic_images
from prune_viz.calibration.images import fitted
from prune_viz.channels import coupling
from prune_viz.channels.groups import CouplingGroup
from prune_viz.execution.run_context import RunContext
from prune_viz.network.copies import plain_copy
from prune_viz.pruning.compensation import compensate_filters
from prune_viz.pruning.masks import Masks
from prune_viz.redundancy.elimination import rebuild_all
from prune_viz.redundancy.importance import CalibrationImages, measure_fisher, measure_groups
from prune_viz.redundancy.judge import combine, order_channels
from prune_viz.runs.output_kind import OutputKind, Task
from prune_viz.runs.run_directory import RunDirectory

RATIOS = (0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)
STEPS = 48  # of the stimuli, instead of 176
OURS = "prune-viz"
MERGE, WITH_NORMS = "merge", "merge and norms"  # prune-viz's compensators; the second is what `apply` does


@dataclass(frozen=True)
class Ranked:
    """prune-viz's removal order and Gram matrices of each group, by number, and its synthetic images."""

    order: Mapping[int, Sequence[int]]
    gram_matrices: Mapping[int, np.ndarray]
    images: Tensor | None


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities, shape (N, classes)."""
    with torch.no_grad():
        return torch.cat([model(part).log_softmax(dim=1) for part in images.split(32)])


class Judge:
    """Compares a pruned network with the whole one on images that nothing else has seen."""

    def __init__(self, network: Trained, groups: Sequence[CouplingGroup]) -> None:
        self.network = network
        self.groups = groups
        self.whole = outputs(network.model, network.images)
        self.labels = self.whole.argmax(dim=1) if network.labels is None else network.labels
        self.top1 = float((self.whole.argmax(dim=1) == self.labels).double().mean())

    def measure(self, masks: Masks) -> tuple[float, float]:
        """Top-1 (agreement, where there are no labels), and divergence in nats."""
        pruned = plain_copy(self.network.model)
        # Leaves nothing of the removed filters in what reads them.
        compensate_filters(pruned, masks, self.groups)
        found = outputs(pruned, self.network.images)
        divergence = (self.whole.exp() * (self.whole - found)).sum(dim=1).mean()
        return float((found.argmax(dim=1) == self.labels).double().mean()), float(divergence)


def analysed(network: Trained, groups: Sequence[CouplingGroup], run: Path | None) -> tuple[Ranked, Ranked]:
    """prune-viz's orders without data, from an analysis, and with the unlabelled images as well."""
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(run or Path(folder) / "run")
        if not directory.decisions_file.exists():
            # Only where calibration starts rests on the stimuli: their last percents do not matter here.
            pv.analyze(network.model, input_shape=network.input_shape, out=directory.path, steps=STEPS)
        order = {entry.group: list(entry.channels) for entry in directory.read_decisions().removal_order}
        calibrated = load_synthetic_images(directory.calibration_images_file)
        images = None if calibrated is None else calibrated.images
        free = Ranked(order, directory.read_gram_matrices(), images)
    calibration = CalibrationImages(None if images is None else fitted(images), network.unlabelled, 0)
    context = RunContext(output=OutputKind(Task.CLASSES))
    fisher = measure_fisher(network.model, groups, calibration, context)
    measured = measure_groups(network.model, groups, {}, calibration, fisher, context)
    found = {
        number: order_channels(*combine([consumer for consumer in consumers if consumer.output_variance > 0]))
        for number, consumers in measured.gram_matrices.items()
    }
    orders, gram_matrices = ({number: one[part] for number, one in found.items()} for part in (0, 2))
    return free, Ranked(orders, gram_matrices, images)


def find_groups(network: Trained) -> list[CouplingGroup]:
    """The coupling groups of a network."""
    return coupling.find_groups(network.model, torch.zeros(1, *network.input_shape))


def pruned_groups(network: Trained) -> list[CouplingGroup]:
    """The groups that are pruned: all that can be, of EfficientNet-lite0 the expansion layers."""
    groups = [group for group in find_groups(network) if group.removable]
    if network.labels is None:
        groups = [
            group for group in groups
            if any("expand" in name for name in group.layers)
            and not any("project" in name for name in group.layers)
        ]  # fmt: skip
    return groups


def rows_of(
    network: Trained, ratios: Sequence[float], seed: int, run: Path | None
) -> Iterator[dict[str, Any]]:
    """Give a row for every ratio, selector and compensator."""
    groups = pruned_groups(network)
    judge = Judge(network, groups)
    free, seen = analysed(network, groups, run)
    filters = {
        name: module.out_channels
        for name, module in network.model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    common = {"network": network.name, "seed": seed}
    yield {
        **common,
        "ratio": 0.0,
        "selector": "",
        "compensator": "",
        "probes": "",
        "top1": judge.top1,
        "kl": 0.0,
    }
    for ratio in ratios:
        counts = {group.number: round(ratio * group.channels) for group in groups}
        for selector in (*pruners.SELECTORS, OURS):
            for compensator in (*pruners.COMPENSATORS, MERGE, WITH_NORMS):
                for source in ("data-free", "images"):
                    mine = selector == OURS or compensator in (MERGE, WITH_NORMS)
                    if (source == "images" and not mine) or (compensator == WITH_NORMS and selector != OURS):
                        continue
                    ranked = free if source == "data-free" else seen
                    gone, weights = {}, {}
                    for group in groups:
                        count = counts[group.number]
                        if selector == OURS:
                            removed = list(ranked.order[group.number][:count])
                        else:
                            score = pruners.scores(network.model, group, selector, seed)
                            removed = pruners.removed_first(score, count)
                        gone[group.number] = removed
                        if compensator in (MERGE, WITH_NORMS):
                            weights[group.number] = _dense(removed, ranked.gram_matrices[group.number])
                        else:
                            weights[group.number] = pruners.rebuilt(
                                network.model, group, removed, compensator
                            )
                    masks = pruners.masks_from(groups, gone, weights, filters)
                    masks.calibration_images = ranked.images if compensator == WITH_NORMS else None
                    top1, kl = judge.measure(masks)
                    yield {
                        **common, "ratio": ratio, "selector": selector, "compensator": compensator,
                        "probes": source, "top1": round(top1, 4), "kl": round(kl, 4),
                    }  # fmt: skip


def _dense(gone: Sequence[int], gram: np.ndarray) -> np.ndarray:
    """prune-viz's merge: removed channels from all kept ones."""
    channels = len(gram) - 1
    kept = sorted(set(range(channels)) - set(gone))
    weights = np.zeros((len(gone), channels + 1))
    if gone:
        weights[:, [*kept, channels]] = rebuild_all(gone, kept, gram)
    return weights


def networks(quick: bool, only: str) -> Iterator[tuple[Trained, int]]:
    """The networks to prune, each with its seed."""
    if quick:
        yield trained.train_on_mnist("vgg", 0), 0
        return
    for kind in ("vgg", "resnet"):
        if only in kind:
            for seed in SEEDS:
                yield trained.train_on_mnist(kind, seed), seed
    if only in "efficientnet":
        yield trained.efficientnet_lite0(), 0


def print_tables(rows: pd.DataFrame, console: Console) -> None:
    """Print a table a network: top-1 (divergence) by method and ratio, a mean over seeds."""
    from rich.table import Table

    for name, found in rows.groupby("network", sort=False):
        table = Table(title=str(name), box=None, header_style="bold")
        for title in ("selector", "compensator", "probes"):
            table.add_column(title)
        ratios = sorted(ratio for ratio in found["ratio"].unique() if ratio > 0)
        for ratio in ratios:
            table.add_column(f"{ratio:.0%}", justify="right")
        whole = found[found["ratio"] == 0]["top1"].mean()
        table.add_row("unpruned", "", "", f"{whole:.3f}")
        for method, part in found[found["ratio"] > 0].groupby(
            ["selector", "compensator", "probes"], sort=False
        ):
            means = part.groupby("ratio")[["top1", "kl"]].mean()
            cells = [f"{means.loc[ratio, 'top1']:.3f} ({means.loc[ratio, 'kl']:.2f})" for ratio in ratios]
            table.add_row(*map(str, method), *cells)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one VGG-like network, two shares")
    parser.add_argument("--run", type=Path, help="run directory of EfficientNet-lite0, made if it is missing")
    parser.add_argument("--only", default="", help="vgg, resnet or efficientnet")
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 110)
    ratios = (0.3, 0.5) if options.quick else RATIOS
    rows = []
    for network, seed in networks(options.quick, options.only):
        run = options.run if network.labels is None else None
        for row in rows_of(network, ratios, seed, run):
            rows.append(row)
            print(*row.values(), sep=", ", file=sys.stderr, flush=True)
    print_tables(pd.DataFrame(rows), console)
    print(json.dumps({"quick": options.quick, "rows": rows}))


if __name__ == "__main__":
    main()

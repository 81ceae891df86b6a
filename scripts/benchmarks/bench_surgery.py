"""What pruned networks save for real, and how good they are before and after fine-tuning.

    scripts/test.sh --collect-only -q   # sets up .venv with what trained.py needs
    .venv/bin/python scripts/benchmarks/bench_surgery.py  # VGG-like and ResNet-like MNIST networks
    .venv/bin/python scripts/benchmarks/bench_surgery.py --quick   # one VGG-like network, half of its MACs

From the same trained network every method removes the same share of the multiply-accumulates and is then
trained for as many epochs on the same images in the same order. prune-viz's masks use no image; what they
remove is merged and batch norms are set anew (`apply --mode remove`). Beside it stand Torch-Pruning's
pruners by L1 norm, by FPGM and by group norm, its own defaults otherwise. prune-viz leaves multiples of
channels (`ROUND_TO`); the others do not, as one ratio for all layers would then overshoot. "prune-viz,
twice" prunes half of the way, trains, is analysed again, and goes the rest, within the same number of
epochs.

Latency is that of batches of 64 on this machine, whole and pruned network taking turns, the ratio of
medians; memory the largest sum of weights and live maps during one such batch, as PyTorch's memory tracker
counts it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch_pruning as tp
import trained
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from trained import Trained

import prune_viz as pv
from prune_viz.network.cost import count_cost
from prune_viz.pruning.budgets import write_masks
from prune_viz.pruning.masks import Masks, load_masks

SHARES = (0.5,)  # of the multiply-accumulates
SEEDS = (0, 1, 2)
ROUND_TO = {"vgg": 16, "resnet": 8}  # channels; half of what the narrowest layer has
EPOCHS = (1, 5)
RATE = 1e-3  # of fine-tuning; a third of training's
STEPS = 48  # of the stimuli, instead of 176
BATCH, TIMED = 64, 40
OURS, TWICE = "prune-viz", "prune-viz, twice"
PEERS = ("Torch-Pruning L1", "Torch-Pruning FPGM", "Torch-Pruning group norm")


# Ways to a smaller network


def masks_for(model: nn.Module, shape: Sequence[int], share: float, round_to: int, seed: int) -> Masks:
    """prune-viz's masks for a share of the MACs, and all that makes up for them."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        pv.analyze(model, input_shape=shape, out=run, steps=STEPS, seed=seed)
        write_masks(run, Path(folder) / "masks.pt", macs=share, round_to=round_to)
        return load_masks(Path(folder) / "masks.pt")


def by_peer(network: Trained, method: str, share: float) -> nn.Module:
    """Torch-Pruning's network without that share of the MACs, the smallest even ratio that reaches it."""
    example = torch.zeros(1, *network.input_shape)
    wanted = (1 - share) * count_cost(network.model, network.input_shape)[1]

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(network.model)
        (head,) = (module for module in model.modules() if isinstance(module, nn.Linear))
        make, importance = {
            "Torch-Pruning L1": (tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance(p=1)),
            "Torch-Pruning FPGM": (tp.pruner.MagnitudePruner, tp.importance.FPGMImportance()),
            "Torch-Pruning group norm": (
                tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance(p=2)
            ),
        }[method]  # fmt: skip
        make(model, example, importance=importance, pruning_ratio=ratio, ignored_layers=[head]).step()
        return model.eval()

    low, high = 0, 200
    while low < high:
        middle = (low + high) // 2
        fits = count_cost(pruned(middle / 200), network.input_shape)[1] <= wanted
        low, high = (low, middle) if fits else (middle + 1, high)
    return pruned(low / 200)


# Measuring


def top1(model: nn.Module, network: Trained) -> float:
    with torch.no_grad():
        scores = torch.cat([model(batch) for batch in network.images.split(250)])
    return float((scores.argmax(dim=1) == network.labels).double().mean())


def divergence(model: nn.Module, network: Trained) -> float:
    """Of the pruned network's output from the whole one's, on the images, in nats."""
    with torch.no_grad():
        whole = torch.cat([network.model(batch).log_softmax(1) for batch in network.images.split(250)])
        found = torch.cat([model(batch).log_softmax(1) for batch in network.images.split(250)])
    return float((whole.exp() * (whole - found)).sum(dim=1).mean())


def latency_ratio(pruned: nn.Module, whole: nn.Module, shape: Sequence[int]) -> float:
    """Median time of a batch, of the whole network's; the two take turns."""
    inputs = torch.randn(BATCH, *shape)
    times: dict[int, list[float]] = {0: [], 1: []}
    with torch.inference_mode():
        for turn in range(TIMED + 5):
            for index, model in enumerate((pruned, whole)):
                start = time.perf_counter()
                model(inputs)
                if turn >= 5:
                    times[index].append(time.perf_counter() - start)
    return float(np.median(times[0]) / np.median(times[1]))


def peak_mib(model: nn.Module, shape: Sequence[int]) -> float:
    """Largest sum of weights and live maps while a batch runs, in MiB."""
    tracker = MemTracker()
    tracker.track_external(model)
    with torch.no_grad(), tracker:
        model(torch.randn(BATCH, *shape))
    return float(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]) / 2**20


def rows_of(kind: str, seed: int, shares: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Give a row for every network, share, method and stage."""
    network = trained.train_on_mnist(kind, seed)
    images, targets, *_ = trained.mnist(seed)
    whole_cost = count_cost(network.model, network.input_shape)
    round_to = ROUND_TO[kind]
    common = {"network": network.name, "seed": seed}

    def tuned(model: nn.Module, epochs: int) -> nn.Module:
        model = copy.deepcopy(model)
        trained.fit(model, images, targets, epochs, RATE, seed)
        return model

    def row(model: nn.Module, share: float, selector: str, compensator: str, epochs: int) -> dict[str, Any]:
        params, macs = count_cost(model, network.input_shape)
        return {
            **common, "ratio": share, "selector": selector, "compensator": compensator, "probes": "data-free",
            "epochs": epochs, "params": params / whole_cost[0], "macs": macs / whole_cost[1],
            "top1": top1(model, network), "kl": round(divergence(model, network), 4),
        }  # fmt: skip

    def measured(model: nn.Module) -> dict[str, float]:
        shape = network.input_shape
        return {
            "latency_ratio": latency_ratio(model, network.model, shape),
            "memory_ratio": peak_mib(model, shape) / peak_mib(network.model, shape),
        }

    yield {**row(network.model, 0.0, "", "", 0), "latency_ratio": 1.0, "memory_ratio": 1.0}
    for epochs in EPOCHS:  # what the same training does for the network that nothing was removed from
        yield row(tuned(network.model, epochs), 0.0, "", "", epochs)
    example = torch.zeros(1, *network.input_shape)
    for share in shares:
        masks = masks_for(network.model, network.input_shape, share, round_to, seed)
        masked = pv.apply_masks(copy.deepcopy(network.model), masks).eval()
        yield row(pv.make_permanent(masked), share, OURS, "masked", 0)
        ways: list[tuple[str, Callable[[], nn.Module]]] = [
            (OURS, lambda masks=masks: pv.remove_filters(network.model, masks, example, compensate="merge")),
            *((peer, lambda peer=peer, share=share: by_peer(network, peer, share)) for peer in PEERS),
        ]
        for selector, make in ways:
            smaller = make()
            compensator = "merge" if selector == OURS else "none"
            yield {**row(smaller, share, selector, compensator, 0), **measured(smaller)}
            for epochs in EPOCHS:
                yield row(tuned(smaller, epochs), share, selector, compensator, epochs)
        yield row(twice(network, share, round_to, seed, tuned), share, TWICE, "merge", max(EPOCHS))


def twice(
    network: Trained, share: float, round_to: int, seed: int, tuned: Callable[[nn.Module, int], nn.Module]
) -> nn.Module:
    """Prune half of the way, train, analyse again and prune the rest, train; as many epochs in all."""
    example = torch.zeros(1, *network.input_shape)
    whole = count_cost(network.model, network.input_shape)[1]
    model, first = network.model, max(EPOCHS) // 2
    for left, epochs in (((1 - share) ** 0.5, first), (1 - share, max(EPOCHS) - first)):
        saving = 1 - left * whole / count_cost(model, network.input_shape)[1]
        if saving > 0:  # the first step may have rounded past the second
            masks = masks_for(model, network.input_shape, saving, round_to, seed)
            model = pv.remove_filters(model, masks, example, compensate="merge")
        model = tuned(model, epochs)
    return model


# Tables


def print_tables(rows: pd.DataFrame, console: Console) -> None:
    """Print a table a network: means over seeds, and the spread of what is left after all epochs."""
    for name, found in rows.groupby("network", sort=False):
        table = Table(title=str(name), box=None, header_style="bold")
        titles = ["MACs removed", "method", "MACs", "params", "latency", "memory", "top-1"]
        for title in (*titles, *(f"{epochs} epochs" for epochs in EPOCHS), "seeds' spread"):
            table.add_column(title, justify="left" if title == "method" else "right")
        for (share, selector, compensator), part in found.groupby(
            ["ratio", "selector", "compensator"], sort=False
        ):
            means = part.groupby("epochs").mean(numeric_only=True)
            last = part[part["epochs"] == max(EPOCHS)]["top1"]
            sizes = [means[column].iloc[0] for column in ("macs", "params", "latency_ratio", "memory_ratio")]
            marks = [means["top1"].get(epochs, np.nan) for epochs in (0, *EPOCHS)]
            method = {"": "unpruned", "masked": f"{selector}, masked"}.get(compensator, selector)
            cells = [f"{number:.2f}" for number in sizes] + [f"{number:.4f}" for number in marks]
            spread = f"{last.max() - last.min():.4f}" if len(last) > 1 else ""
            table.add_row(f"{share:.0%}", method, *("" if c == "nan" else c for c in cells), spread)
        console.print(table)


def figures(rows: pd.DataFrame) -> dict[str, Any]:
    """How prune-viz stands against the best peer at each network and share, and latency against MACs."""
    tuned = rows[rows["epochs"] == max(EPOCHS)]
    compared = []
    for (name, share), part in tuned[tuned["ratio"] > 0].groupby(["network", "ratio"], sort=False):
        means = part.groupby("selector")["top1"].agg(["mean", "min", "max"])
        best = means.loc[list(PEERS), "mean"].idxmax()
        compared.append(
            {
                "network": name, "ratio": share, "ours": means.loc[OURS, "mean"], "best_peer": best,
                "peer": means.loc[best, "mean"],
                "spread": float((means["max"] - means["min"]).loc[[OURS, best]].max()),
            }
        )  # fmt: skip
    smaller = rows[(rows["selector"] == OURS) & rows["latency_ratio"].notna()]
    falls = (1 - smaller["latency_ratio"]) / (1 - smaller["macs"])
    return {
        "after_training": compared,
        "latency_falls_of_macs": falls.groupby(smaller["network"]).median().round(3).to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one VGG-like network, half of its MACs")
    parser.add_argument("--only", default="", help="vgg or resnet")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = [(kind, seed) for kind in ("vgg", "resnet") for seed in SEEDS if options.only in kind]
    rows = []
    for kind, seed in [("vgg", 0)] if options.quick else cases:
        for found in rows_of(kind, seed, SHARES):
            rows.append(found)
            print(*found.values(), sep=", ", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    print_tables(table, Console(width=None if sys.stdout.isatty() else 110))
    listed = table.astype(object).where(table.notna(), None).to_dict("records")
    print(json.dumps({"quick": options.quick, "rows": listed, **figures(table)}))


if __name__ == "__main__":
    main()

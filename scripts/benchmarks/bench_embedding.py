"""Whether clusters find copies and agree with the verdicts, and how long maps and clusters take.

    .venv/bin/python scripts/benchmarks/bench_embedding.py          # some minutes on two cores
    .venv/bin/python scripts/benchmarks/bench_embedding.py --quick  # under a minute: smaller, and digits only

Filters of trained networks are overwritten with copies of others, at other scales and more or less noisy,
and their stimuli and responses found anew. Complete linkage at the package's cut is compared with HDBSCAN on
the same features:

- ARI: adjusted Rand index against the planted families, every other filter its own (natural look-alikes
  that are clustered count against it);
- together: share of the planted pairs that stand in one cluster (behind EfficientNet-lite0's ReLU6, copies
  at another scale are copies only as far as neither is cut off);
- alike: share of the pairs within clusters whose response profiles correlate by at least 0.9;
- agree: share of the filters called redundant with a single representative that stand in its cluster.

Times are those of the whole stage, every layer's map and clusters and the map of the network, on a
MobileNetV2 of about 26,000 filters with random weights and textures for stimuli, and of one layer of 4,096.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score
from torch import nn

from prune_viz.analysis.pipeline import analyze
from prune_viz.demo.digits import DigitsNet, load_digits, train
from prune_viz.embedding.features import describe_stimuli, response_profiles
from prune_viz.embedding.layer_map import embed, find_clusters, joint_features
from prune_viz.embedding.network_map import embed_network
from prune_viz.execution.run_context import RunContext
from prune_viz.feature_visualization.responses import response_matrix
from prune_viz.feature_visualization.search import as_stored
from prune_viz.feature_visualization.stimuli import find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.runs.run_directory import LayerTensors
from prune_viz.runs.stages import peak_mib

WIDTHS = (24, 48, 64, 96)
NOISES = (0.0, 0.1, 0.2)
COPIED = 0.25  # share of a layer's filters that become copies, of one to three for each original
LITE_LAYERS = {
    "_blocks.2._expand_conv": "_blocks.2._bn0",
    "_blocks.6._project_conv": "_blocks.6._bn2",
    "_blocks.7._expand_conv": "_blocks.7._bn0",
}
LITE_STEPS = 44
LITE_SHAPE = (3, 224, 224)
ALIKE = 0.9
EPOCHS = 8  # of the digits' networks


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    width: float  # of the MobileNetV2 that is timed
    wide: int  # filters of the layer that is timed
    seeds: int  # of the digits' networks
    lite: bool  # EfficientNet-lite0 too


FULL, QUICK = Effort(1.55, 4096, 3, True), Effort(0.25, 1024, 1, False)


@dataclass(frozen=True)
class Case:
    """A layer with planted copies.

    Attributes
    ----------
    network : str
        For people, with the noise of its copies.
    features, responses : ndarray
        Joint features (F, K) of the filters that respond, and their responses (N, F).
    families : ndarray of int, shape (F,)
        The same number for copies of each other.
    redundant : ndarray of int, shape (M, 2)
        Filters called redundant, and their single representatives.
    """

    network: str
    features: np.ndarray
    responses: np.ndarray
    families: np.ndarray
    redundant: np.ndarray


def plant(conv: nn.Module, norm: nn.Module, noise: float, random: torch.Generator) -> np.ndarray:
    """Overwrite filters with copies of others, in place; gives the family of each, shape (F,)."""
    count = len(conv.weight)
    order = torch.randperm(count, generator=random).tolist()
    copies = order[: int(COPIED * count)]
    originals = order[len(copies) : len(copies) + max(1, int(0.6 * len(copies)))]
    families = np.arange(count)
    with torch.no_grad():
        for place, copy in enumerate(copies):
            original = originals[place % len(originals)]
            families[copy] = original
            weight = conv.weight[original]
            conv.weight[copy] = weight + noise * weight.std() * torch.randn(weight.shape, generator=random)
            scale = float(0.5 + 1.5 * torch.rand((), generator=random))
            for name, factor in (("running_mean", 1), ("running_var", 1), ("weight", scale), ("bias", scale)):
                tensor = getattr(norm, name)
                tensor[copy] = factor * tensor[original]
    return families


def make_case(
    name: str, tensors: LayerTensors, families: np.ndarray, redundant: Sequence[tuple[int, int]]
) -> Case:
    features, responding = joint_features(describe_stimuli(tensors.images), tensors.responses)
    live = np.flatnonzero(responding)
    place = {int(number): index for index, number in enumerate(live)}
    pairs = [(place[one], place[other]) for one, other in redundant if one in place and other in place]
    return Case(
        name, features, tensors.responses[:, live], families[live], np.array(pairs, int).reshape(-1, 2)
    )


def digits_cases(seeds: int) -> Iterator[Case]:
    digits = load_digits()
    for seed in range(seeds):
        for noise in NOISES:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = DigitsNet(WIDTHS)
            train(model, digits, EPOCHS, seed=seed)
            random = torch.Generator().manual_seed(seed)
            families = {}
            for number in range(1, 5):
                parts = (getattr(model, f"{kind}{number}") for kind in ("conv", "bn"))
                families[f"conv{number}"] = plant(*parts, noise, random)
            with TemporaryDirectory() as folder:
                found = analyze(model, input_shape=(1, 8, 8), seed=seed, out=f"{folder}/run")
                rows = found.filters
                single = rows[(rows["verdict"] == "redundant") & rows["representative"].str.fullmatch(r"\d+")]
                for layer, truth in families.items():
                    own = single[single["layer"] == layer]
                    pairs = list(zip(own["filter"], own["representative"].astype(int), strict=True))
                    yield make_case(f"digits, noise {noise:.0%}", found.layers[layer], truth, pairs)


def lite_cases() -> Iterator[Case]:
    import trained

    for noise in NOISES[:2]:
        model = trained.efficientnet_lite0().model
        modules = dict(model.named_modules())
        random = torch.Generator().manual_seed(0)
        families = {
            layer: plant(modules[layer], modules[norm], noise, random) for layer, norm in LITE_LAYERS.items()
        }
        network = FilterNetwork(model, LITE_SHAPE)
        for layer, truth in families.items():
            stimuli = find_stimuli(network, layer, steps=LITE_STEPS)
            responses = response_matrix(network, layer, stimuli.images)
            tensors = LayerTensors(as_stored(stimuli.images).numpy(), stimuli.activations.numpy(), responses)
            yield make_case(f"EfficientNet-lite0, noise {noise:.0%}", tensors, truth, [])


def with_hdbscan(selection: str) -> Callable[[np.ndarray], np.ndarray]:
    def found(features: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = HDBSCAN(min_cluster_size=2, min_samples=1, cluster_selection_method=selection)
            return np.asarray(method.fit_predict(features))

    return found


METHODS = {
    "complete linkage": find_clusters,
    "HDBSCAN": with_hdbscan("eom"),
    "HDBSCAN, leaves": with_hdbscan("leaf"),
}


def measure(case: Case, clusters: np.ndarray) -> tuple[float, float, float, float]:
    """ARI, together, alike and agree, as the module says; NaN where there is no pair to look at."""
    alone = clusters < 0
    labels = clusters.copy()
    labels[alone] = clusters.max() + 1 + np.arange(alone.sum())
    off = ~np.eye(len(labels), dtype=bool)
    same = labels[:, None] == labels
    planted = (case.families[:, None] == case.families) & off
    profiles = response_profiles(np.nan_to_num(case.responses))
    inside = same & off
    return (
        adjusted_rand_score(case.families, labels),
        _share(same[planted]),
        _share((profiles @ profiles.T)[inside] >= ALIKE),
        _share(same[case.redundant[:, 0], case.redundant[:, 1]]),
    )


def _share(holds: np.ndarray) -> float:
    return float(holds.mean()) if len(holds) else float("nan")


class Synthetic(Mapping[str, LayerTensors]):
    """Textures and low-rank responses for every layer, made when asked for."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        self._noise = np.random.default_rng(0).normal(size=(64, 3, 112, 112)).astype(np.float16)
        self.seconds = 0.0

    def __getitem__(self, name: str) -> LayerTensors:
        started = time.perf_counter()
        layer = self._layers[name]
        random = np.random.default_rng(layer.depth)
        places = random.integers(0, 112 - max(layer.canvas), size=(layer.filters, 2))
        height, width = layer.canvas
        images = np.stack(
            [self._noise[index % 64, :, y : y + height, x : x + width] for index, (y, x) in enumerate(places)]
        )
        traits = random.normal(size=(layer.filters, 12))
        responses = np.exp(0.5 * traits @ traits.T + random.normal(size=(layer.filters, layer.filters)))
        self.seconds += time.perf_counter() - started
        return LayerTensors(images, np.diag(responses).copy(), responses.astype(np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def time_network(width: float) -> tuple[int, float]:
    """Filters of a MobileNetV2 of that width, and the seconds that the stage takes on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FilterNetwork(torchvision.models.mobilenet_v2(width_mult=width), (3, 224, 224))
    found = Synthetic(network.layers)
    started = time.perf_counter()
    embed_network(network, network.layers, found, RunContext())
    seconds = time.perf_counter() - started - found.seconds
    return sum(layer.filters for layer in network.layers), seconds


def time_layer(filters: int) -> float:
    layer = Layer("wide", "", filters, 0, None, (64, 64))
    tensors = Synthetic([layer])["wide"]
    started = time.perf_counter()
    embed(describe_stimuli(tensors.images), tensors.responses)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    effort = QUICK if options.quick else FULL
    console = Console()
    # First, so that what UMAP compiles counts.
    filters, seconds = time_network(effort.width)
    console.print(f"{filters:,} filters: {seconds:.0f} s; {peak_mib():.0f} MiB at most so far")
    layer_seconds = time_layer(effort.wide)
    console.print(f"a layer of {effort.wide:,}: {layer_seconds:.0f} s; {peak_mib():.0f} MiB at most so far")

    cases = list(digits_cases(effort.seeds))
    if effort.lite:
        cases += lite_cases()
    table = Table("network", "clusters by", "ARI", "together", "alike", "agree")
    figures: dict[str, dict[str, float]] = {}
    names = ("ari", "together", "alike", "agree")
    for method, cluster in METHODS.items():
        scores = np.array([measure(case, cluster(case.features)) for case in cases])
        for network in dict.fromkeys(case.network for case in cases):
            own = scores[[case.network == network for case in cases]]
            table.add_row(network, method, *(f"{value:.2f}" for value in _means(own)))
        figures[method] = dict(zip(names, _means(scores), strict=True))
    console.print(table)
    print(
        json.dumps(
            {
                "quick": options.quick, "filters": filters, "seconds": seconds, "wide_layer": effort.wide,
                "wide_layer_seconds": layer_seconds, "peak_mib": peak_mib(),
                "redundant": int(sum(len(case.redundant) for case in cases)), "methods": figures,
            }
        )
    )  # fmt: skip


def _means(scores: np.ndarray) -> list[float]:
    """Means of columns over the rows that have a figure; NaN where none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [float(value) for value in np.nanmean(scores, axis=0)]


if __name__ == "__main__":
    main()

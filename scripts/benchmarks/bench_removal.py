"""Whether removal is exact in networks of many kinds, and how much of each can go.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/pip install --no-deps timm torch-kirigami
    .venv/bin/python scripts/benchmarks/bench_removal.py             # all; takes hours, and 16 GiB
    .venv/bin/python scripts/benchmarks/bench_removal.py --kind detection
    .venv/bin/python scripts/benchmarks/bench_removal.py resnet      # those whose name has this in it
    .venv/bin/python scripts/benchmarks/bench_removal.py --peers 60  # other tools too, a minute each at most
    .venv/bin/python scripts/benchmarks/bench_removal.py --fuzz 300  # random networks, for so many seconds

Every network has random weights and norms with statistics of their own (`removal_networks`). A third of the
channels of each coupling group, at random, is masked, and removed; the two networks' outputs on the same
noise are compared. Other tools remove a third of what they can (`removal_peers`). Random networks are built
of blocks (`random_networks`), and lose random channels of each group. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import random_networks
import torch
from removal_networks import KINDS, build, names_of
from removal_peers import PEERS, SHARE, difference, tried
from tables import print_table

import prune_viz as pv
from prune_viz.channels.coupling import ChannelGraph, build_graph
from prune_viz.channels.groups import hidden_layers
from prune_viz.channels.labelling import UntraceableError
from prune_viz.network.copies import opened
from prune_viz.network.cost import count_cost
from prune_viz.network.layer_kinds import count_outputs, layers_of
from prune_viz.pruning.consistency import reconcile_with_groups
from prune_viz.utils.nested_tensors import tensors_of

EXACT = 1e-6  # of the largest output, in double precision
OUTPUT = "the network's output"


def row(kind: str, name: str, peers: float = 0.0) -> dict[str, Any]:
    """What removal makes of one network, and what other tools make of it in so many seconds."""
    model, images = build(kind, name)
    found: dict[str, Any] = {"network": name, "kind": kind}
    start = time.perf_counter()
    try:
        graph = build_graph(model, images[:1])
    except UntraceableError as error:
        return {**found, "said": str(error), "seconds": time.perf_counter() - start}
    found["seconds"] = time.perf_counter() - start
    whole = opened(model)
    hidden = set(hidden_layers(whole, graph.groups))
    counts = {layer: count_outputs(module) for layer, module in layers_of(whole, hidden).items()}
    found |= _shares(graph, counts, hidden, whole)
    found |= _exactness(model, images, graph, counts)
    if peers:
        outputs = [layer for group in graph.groups if OUTPUT in group.note for layer in group.layers]
        outputs += [layer for layer, note in graph.kept_linear.items() if OUTPUT in note]
        found["peers"] = {peer: tried(peer, kind, name, outputs, peers) for peer in PEERS}
    return found


def _shares(
    graph: ChannelGraph, counts: dict[str, int], hidden: set[str], model: torch.nn.Module
) -> dict[str, Any]:
    """How many filters and hidden units there are, how many of them can go, and why the rest cannot."""
    kept: Counter[str] = Counter()
    for group in graph.groups:
        if not group.removable:
            kept[group.note] += sum(len(places.indices) for places in group.producers)
    linear: Counter[str] = Counter()
    for layer, note in graph.kept_linear.items():
        if OUTPUT not in note:
            linear[note] += count_outputs(model.get_submodule(layer))
    filters = sum(count for layer, count in counts.items() if layer not in hidden)
    units = sum(counts[layer] for layer in hidden)
    return {
        "filters": filters,
        "removable": filters - sum(kept.values()),
        "units": units + sum(linear.values()),
        "removable_units": units,
        "kept": dict((kept + linear).most_common(4)),
    }


def _exactness(
    model: torch.nn.Module, images: torch.Tensor, graph: ChannelGraph, counts: dict[str, int]
) -> dict[str, Any]:
    """Remove a third of the channels of each group, and compare with the network that is masked alike."""
    random = np.random.default_rng(0)
    masks = pv.Masks({layer: torch.ones(count, dtype=torch.bool) for layer, count in counts.items()})
    for group in graph.groups:
        gone = random.choice(group.channels, int(SHARE * group.channels), replace=False)
        for places in group.producers if group.removable else ():
            masks[places.module][places.indices[np.isin(places.channels, gone)]] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is kept after all is in the counts
        smaller = pv.remove_filters(model, masks, images)
    masked = pv.apply_masks(copy.deepcopy(model), reconcile_with_groups(model, masks, graph.groups))
    with torch.no_grad():
        one, other, whole = (tensors_of(net(images)) for net in (masked, smaller, model))
    costs = [count_cost(net, images.shape[1:]) for net in (model, smaller)]
    return {
        "params": costs[1][0] / costs[0][0],
        "macs": costs[1][1] / costs[0][1],
        "changed": difference(whole, one),
        "difference": difference(one, other),
    }


def fuzz(seconds: float, first: int = 0) -> dict[str, Any]:
    """Try random networks for so many seconds: how many there were, and which are not exact."""
    end, seed, removable, filters, wrong = time.monotonic() + seconds, first, 0, 0, []
    while time.monotonic() < end:
        try:
            may, count, difference = random_networks.try_random(seed)
            removable, filters = removable + may, filters + count
            if not difference < EXACT:
                wrong.append([seed, difference])
        except Exception as error:  # any is a defect, and the next network is tried all the same
            wrong.append([seed, repr(error)])
        seed += 1
    return {"networks": seed - first, "removable": removable / max(filters, 1), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="of the names of networks to look at")
    parser.add_argument("--kind", choices=KINDS, help="of networks; all without it")
    parser.add_argument("--peers", type=float, default=0.0, metavar="SECONDS", help="try other tools too")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="try random networks instead")
    options = parser.parse_args()
    if options.fuzz:
        print(json.dumps(fuzz(options.fuzz)))
        return
    rows = []
    for kind in [options.kind] if options.kind else KINDS:
        for name in names_of(kind):
            if options.part in name:
                rows.append(row(kind, name, options.peers))
                print(json.dumps(rows[-1]), flush=True)
                gc.collect()
    columns = [
        "filters",
        "removable",
        "units",
        "removable_units",
        "params",
        "changed",
        "difference",
        "seconds",
    ]
    print_table(
        "A third of the channels removed; difference: removed from masked outputs, of the largest",
        ["network", *columns, *PEERS],
        [
            [one["network"], *(one.get(column, "") for column in columns), *(_brief(one, p) for p in PEERS)]
            for one in rows
        ],
    )
    measured = [one for one in rows if "difference" in one]
    print(
        json.dumps(
            {
                "networks": len(rows),
                "traced": len(measured),
                "smaller": sum(one["params"] < 1 for one in measured),
                "largest_difference": max((one["difference"] for one in measured), default=None),
                "rows": rows,
            }
        )
    )


def _brief(one: dict[str, Any], peer: str) -> str:
    """Another tool's share of the filters and units, difference and seconds, or why there are none."""
    found = one.get("peers", {}).get(peer, {})
    if "filters" not in found:
        return str(found.get("said", ""))[:24]
    share = found["filters"] / max(1, one["filters"] + one["units"])
    return f"{share:.0%}, {found['difference']:.0e}, {found['seconds']:.0f} s"


if __name__ == "__main__":
    main()

"""Whether removal is exact in every classification network of torchvision, and how much of each can go.

    scripts/test.sh --collect-only -q   # sets up .venv
    .venv/bin/python scripts/benchmarks/bench_removal.py             # all 80: half an hour, 16 GiB
    .venv/bin/python scripts/benchmarks/bench_removal.py resnet      # those whose name has this in it
    .venv/bin/python scripts/benchmarks/bench_removal.py --fuzz 300  # random networks, for so many seconds

Every network has random weights and batch norms with statistics of their own. A third of the channels of
each coupling group, at random, is masked, and removed; the two networks' outputs on the same noise are
compared. Random networks are built of blocks (`random_networks`), and lose random channels of each group. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
import warnings
from typing import Any

import numpy as np
import random_networks
import torch
import torchvision
from tables import print_table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import prune_viz as pv
from prune_viz.channels.groups import hidden_layers
from prune_viz.network.layer_kinds import count_outputs, layers_of
from prune_viz.pruning.consistency import groups_for_removal, reconcile_with_groups
from prune_viz.pruning.remove import count_cost
from prune_viz.utils.errors import UserError

SIZE, LARGE_SIZE = 96, 224  # of pictures; the larger for those that are built for it
BUILT_FOR_LARGE = ("vit_", "maxvit", "swin")
SHARE = 1 / 3
EXACT = 1e-6  # of the largest output, in double precision


def network(name: str) -> nn.Module:
    """A network with random weights, and batch norms that are not the identity."""
    torch.manual_seed(0)
    inception = name in ("googlenet", "inception_v3")
    kwargs: dict[str, Any] = {"init_weights": False} if inception else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **kwargs).eval()
    for module in model.modules():
        if inception and isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Linear) and not module.weight.any():  # the head of ViT
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def row(name: str) -> dict[str, Any]:
    """What removal makes of one network."""
    start = time.perf_counter()
    model = network(name)
    size = LARGE_SIZE if name.startswith(BUILT_FOR_LARGE) else SIZE
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"network": name}
    try:
        groups = groups_for_removal(model, images)
    except UserError as error:
        return {**found, "said": str(error).partition(": ")[2], "seconds": time.perf_counter() - start}
    random = np.random.default_rng(0)
    hidden = hidden_layers(model, groups)
    counts = {layer: count_outputs(module) for layer, module in layers_of(model, hidden).items()}
    masks = pv.Masks({layer: torch.ones(count, dtype=torch.bool) for layer, count in counts.items()})
    for group in groups:
        gone = random.choice(group.channels, int(SHARE * group.channels), replace=False)
        for places in group.producers:
            masks[places.module][places.indices[np.isin(places.channels, gone)]] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is kept after all is reported below
        smaller = pv.remove_filters(model, masks, images)
    masked = pv.apply_masks(copy.deepcopy(model), reconcile_with_groups(model, masks, groups))
    with torch.no_grad():
        one, other, whole = (_scores(net(images)) for net in (masked, smaller, model))
    costs = [count_cost(net, images.shape[1:]) for net in (model, smaller)]
    whole_groups = [group for group in groups if not group.removable]
    return {
        **found,
        "filters": sum(count for layer, count in counts.items() if layer not in hidden),
        "removable": sum(
            len(places.indices)
            for group in groups
            for places in group.producers
            if group.removable and places.module not in hidden
        ),
        "units": sum(counts[layer] for layer in hidden),
        "params": costs[1][0] / costs[0][0],
        "macs": costs[1][1] / costs[0][1],
        "changed": float((one - whole).abs().max() / whole.abs().max()),
        "difference": float((one - other).abs().max() / one.abs().max()),
        "said": whole_groups[0].note if whole_groups else "",
        "seconds": time.perf_counter() - start,
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


def _scores(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="of the names of networks to look at")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="try random networks instead")
    options = parser.parse_args()
    if options.fuzz:
        print(json.dumps(fuzz(options.fuzz)))
        return
    names = [
        name for name in torchvision.models.list_models(module=torchvision.models) if options.part in name
    ]
    rows = []
    for name in names:
        rows.append(row(name))
        print(*rows[-1].values(), sep=", ", flush=True)
        gc.collect()
    columns = ["filters", "removable", "units", "params", "macs", "changed", "difference"]
    print_table(
        "A third of the channels removed; difference: removed from masked outputs, of the largest",
        ["network", *columns, "kept whole, for instance"],
        [[one["network"], *(one.get(column, "") for column in columns), one["said"][:60]] for one in rows],
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


if __name__ == "__main__":
    main()

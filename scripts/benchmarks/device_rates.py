"""How fast a device finds the stimuli of ResNet-50, and whether it judges filters as the CPU does.

`bench_stimuli.py --device cuda` runs it, and `scripts/gpu_check.sh` with the tests that need a GPU. On
`--device cpu` it is there to be tried without one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peers
import torch
import torchvision
from tables import print_table
from torch import Tensor

import prune_viz as pv
from prune_viz.demo.digits import DigitsNet, load_digits, plant, train_digits_net
from prune_viz.feature_visualization.search import BATCH
from prune_viz.feature_visualization.stimuli import STEPS, find_stimuli
from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.layers import Layer
from prune_viz.network.precision import FULL, HALF

SHAPE = (3, 224, 224)
EVERY = 8  # of its layers are timed, one in so many
LONGEST = 200.0  # seconds that timing may take; layers beyond are left out
PRECISIONS = FULL, HALF
SIDES = {"cuda": 8192, "mps": 4096, "cpu": 1024}  # of the matrices whose multiplication is timed


def measure(device: torch.device) -> dict[str, Any]:
    """Time stimuli on a device and compare verdicts; prints tables.

    Parameters
    ----------
    device : torch.device
        Where.

    Returns
    -------
    dict
        ``device``, its name; ``layers``, a dict each; by the precision of gradients ``filters_a_second``, of
        the layers that were timed, by their filters, ``flops``, ``matmul_flops`` and ``share_of_rate``, of
        that; ``peak_mib``, of the device's memory; ``verdicts_agree``, the share of the demo's filters, and
        what `agreement` says.
    """
    rates = matmul_rates(device)
    rows = list(timed_layers(device))
    filters = sum(row["layer_filters"] for row in rows)
    each = {
        kind: sum(row["layer_filters"] * row["seconds"][kind] / row["filters"] for row in rows)
        for kind in PRECISIONS
    }
    work = sum(row["flops"] for row in rows)
    speeds = {kind: work / sum(row["seconds"][kind] for row in rows) for kind in PRECISIONS}
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "layers": rows,
        "filters_a_second": {kind: filters / seconds for kind, seconds in each.items()},
        "flops": speeds,
        "matmul_flops": rates,
        "share_of_rate": {kind: speeds[kind] / rates[kind] for kind in PRECISIONS},
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        **agreement(device),
    }
    print_table(
        f"ResNet-50 on {figures['device']}",
        ["layer", "canvas", "filters", *[f"{kind}, s/filter" for kind in PRECISIONS]],
        [
            [row["layer"], row["canvas"][0], row["filters"],
             *[row["seconds"][kind] / row["filters"] for kind in PRECISIONS]]
            for row in rows
        ],
    )  # fmt: skip
    for kind in PRECISIONS:
        rate, share = figures["filters_a_second"][kind], figures["share_of_rate"][kind]
        print(f"{kind}: {rate:.1f} filters a second, {share:.1%} of the rate at which matrices multiply")
    print(f"verdicts that agree with the CPU's: {figures['verdicts_agree']:.1%}")
    return figures


def timed_layers(device: torch.device) -> Sequence[dict[str, Any]]:
    """Seconds and operations of some layers, a batch of filters each, by the precision of gradients."""
    torch.manual_seed(0)  # rates do not depend on the weights
    model = torchvision.models.resnet50().eval()
    networks = {kind: FilterNetwork(model, SHAPE, device=device, precision=kind) for kind in PRECISIONS}
    network, count = networks[FULL], BATCH[device.type]
    for each in networks.values():
        find_stimuli(each, network.layers[-1].name, range(2), steps=1)  # loads kernels
    started, rows = time.perf_counter(), []
    for layer in network.layers[::EVERY]:
        chosen = range(min(count, layer.filters))
        rows.append(
            {
                "layer": layer.name,
                "canvas": list(layer.canvas),
                "layer_filters": layer.filters,
                "filters": len(chosen),
                "seconds": {kind: _search(each, layer, chosen) for kind, each in networks.items()},
                "flops": _operations(network, layer, chosen),
            }
        )
        if time.perf_counter() - started > LONGEST:
            break
    return rows


def _search(network: FilterNetwork, layer: Layer, filters: range) -> float:
    """Seconds of finding stimuli; their norms are read, so a device that works on its own is waited for."""
    started = time.perf_counter()
    find_stimuli(network, layer.name, filters, steps=STEPS)
    return time.perf_counter() - started


def _operations(network: FilterNetwork, layer: Layer, filters: range) -> int:
    with peers.OperationCounter() as counter:
        find_stimuli(network, layer.name, filters, steps=STEPS)
    return counter.total


def matmul_rates(device: torch.device) -> dict[str, float]:
    """Operations a second at which a device multiplies square matrices, by type."""
    side = SIDES[device.type]
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        one, other = torch.randn(2, side, side, device=device, dtype=kind)
        seconds = min(_seconds(lambda one=one, other=other: one @ other) for _ in range(5))
        found[str(kind).removeprefix("torch.")] = 2 * side**3 / seconds
    return found


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    float(work()[0, 0])  # waits for it
    return time.perf_counter() - started


def agreement(device: torch.device) -> dict[str, Any]:
    """How often verdicts on the demo's filters, and activations of their stimuli, are as on the CPU."""
    digits = load_digits()
    model, _ = plant(train_digits_net(digits), digits)
    here, there = (
        pv.analyze(model, input_shape=DigitsNet.input_shape, device=name).filters
        for name in ("cpu", str(device))
    )
    same = (here["verdict"] == there["verdict"]).mean()
    shares = (there["activation"] / here["activation"]).to_numpy()[here["activation"].to_numpy() > 0]
    return {"verdicts_agree": float(same), "activation_of_cpus": float(np.median(shares))}

"""How much of a network other tools remove, how exactly, and in what time; for `bench_removal.py`.

Each is asked for a third of the channels of whatever it can follow, at random. It runs in a process of its
own, with limits of time and memory, since some networks make it go on for hours.
"""

from __future__ import annotations

import copy
import multiprocessing
import random
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from removal_networks import build
from torch import Tensor, nn

from prune_viz.network.layer_kinds import count_outputs, input_axis, reads_channels
from prune_viz.utils.errors import brief
from prune_viz.utils.nested_tensors import tensors_of

SHARE = 1 / 3
MEMORY = 10 * 2**30

Gone = dict[str, set[int]]  # indices of outputs that went, by the layer's or norm's name
Removed = tuple[nn.Module, Gone, float]  # the smaller network, what went, and in how many seconds


def torch_pruning(model: nn.Module, images: Tensor, outputs: Sequence[str]) -> Removed:
    """Torch-Pruning's own pruner with random scores; outputs are named, since it removes from them too."""
    gone: Gone = {}
    whole = copy.deepcopy(model)  # on which nothing is pruned, so that indices stay what they were
    names = {module: name for name, module in whole.named_modules()}
    pruner, groups = _torch_pruning_groups(whole, images, outputs)
    for group in groups:
        for dep, indices in group:
            if pruner.DG.is_out_channel_pruning_fn(dep.handler) and dep.target.module in names:
                gone.setdefault(names[dep.target.module], set()).update(indices)
    start = time.perf_counter()
    for group in _torch_pruning_groups(model, images, outputs)[1]:
        group.prune()
    return model, gone, time.perf_counter() - start


def _torch_pruning_groups(model: nn.Module, images: Tensor, outputs: Sequence[str]) -> tuple[Any, Any]:
    """Its pruner, and an iterator over its groups, which chooses the same channels each time."""
    import torch_pruning as tp

    torch.manual_seed(0)
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=SHARE,
        ignored_layers=[model.get_submodule(name) for name in outputs],
    )
    return pruner, pruner.step(interactive=True)


def kirigami(model: nn.Module, images: Tensor, outputs: Sequence[str]) -> Removed:
    """torch-kirigami's candidates, a third of those of each axis, removed in one plan."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    start = time.perf_counter()
    pruner = Pruner(model, graph=DependencyGraph.build(model, args=(images,)))
    candidates: dict[Any, list[Any]] = {}
    for candidate in pruner.discover_candidates().candidates:
        candidates.setdefault(candidate.axis, []).append(candidate)
    draw = random.Random(0)
    chosen = [one for found in candidates.values() for one in draw.sample(found, int(SHARE * len(found)))]
    plan = pruner.plan_remove([selection for one in chosen for selection in one.remove])
    gone: Gone = {}
    for selection in plan.analysis.selections:
        for path in selection.tensor.paths:
            layer, _, kind = path.rpartition(".")
            if kind not in ("weight", "bias") or selection.tensor.kind != "parameter":
                continue
            axis = 1 - input_axis(model.get_submodule(layer)) if kind == "weight" else 0
            for region in selection.regions:
                others = [len(list(one)) for place, one in enumerate(region.axes) if place != axis]
                whole = [size for place, size in enumerate(selection.tensor.shape) if place != axis]
                if others == whole:
                    gone.setdefault(layer, set()).update(region.axes[axis])
    smaller, _ = pruner.apply(plan)
    return smaller, gone, time.perf_counter() - start


PEERS: dict[str, Callable[[nn.Module, Tensor, Sequence[str]], Removed]] = {
    "Torch-Pruning": torch_pruning,
    "torch-kirigami": kirigami,
}


def tried(peer: str, kind: str, name: str, outputs: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a tool makes of a network.

    Parameters
    ----------
    peer, kind, name : str
        The tool, and the network.
    outputs : sequence of str
        Layers that are the network's outputs.
    seconds : float
        How long it may take.

    Returns
    -------
    dict
        "filters", how many filters and units the layers have of which it removed some; "difference" of
        removed from masked outputs, of the largest; "seconds"; or "said", why there is nothing.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(there, peer, kind, name, list(outputs)), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return {"said": f"not done in {seconds:.0f} s"}
        return dict(here.recv())
    except EOFError:
        return {"said": "it died"}
    finally:
        process.kill()
        process.join()


def _run(there: Connection, peer: str, kind: str, name: str, outputs: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(0)
    try:
        model, images = build(kind, name)
        whole = copy.deepcopy(model)
        smaller, gone, seconds = PEERS[peer](model, images, outputs)
        with torch.no_grad():
            masked, removed = (tensors_of(net.eval()(images)) for net in (_silenced(whole, gone), smaller))
        modules = dict(whole.named_modules())
        found = {
            "filters": sum(count_outputs(modules[layer]) for layer in gone if reads_channels(modules[layer])),
            "difference": difference(masked, removed),
            "seconds": seconds,
        }
    except Exception as error:  # whatever it raises
        found = {"said": brief(error, 60) or type(error).__name__}
    there.send(found)


def difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of two networks' outputs, of the largest; infinite where shapes differ."""
    largest = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            scale = float(one.abs().max()) or 1.0
            largest = max(largest, float((one - other).abs().max()) / scale)
    return largest


def _silenced(model: nn.Module, gone: Gone) -> nn.Module:
    """The network with these outputs of layers and norms set to zero."""
    with torch.no_grad():
        for name, indices in gone.items():
            module: Any = model.get_submodule(name)
            places = torch.tensor(sorted(indices))
            axis = 1 - input_axis(module) if reads_channels(module) else 0
            for tensor, along in ((module.weight, axis), (module.bias, 0)):
                if tensor is not None:
                    tensor.index_fill_(along, places, 0.0)
    return model

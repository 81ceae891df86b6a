"""What others remove and how they make up for it, on coupling groups, to compare with.

Selectors give every channel of a group a score, and those with the least go. Compensators rebuild what is
removed from the weights alone: one to one after neuron merging (Kim et al., NeurIPS 2020), one to many in
closed form after LBYL (Ro et al., ICML 2022); both are written anew from their papers, with batch norms
folded into the weights they compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.layer_kinds import is_depthwise
from prune_viz.network.tracing import norms_behind
from prune_viz.pruning.masks import Masks
from prune_viz.runs.decisions_json import Merge

SELECTORS = ("random", "L1", "L2", "FPGM", "BN scale")
COMPENSATORS = ("none", "one to one", "one to many")
_RIDGE = 1e-2  # of a filter's own square, in one-to-many merging


def scores(model: nn.Module, group: CouplingGroup, selector: str, seed: int) -> np.ndarray:
    """Score a group's channels by a selector, a mean over the layers that write them.

    Parameters
    ----------
    model : nn.Module
        The network.
    group : CouplingGroup
        One of its groups.
    selector : str
        One of `SELECTORS`.
    seed : int
        Of the random one.

    Returns
    -------
    ndarray, shape (channels,)
        The least are removed first.
    """
    if selector == "random":
        return np.random.default_rng((seed, group.number)).random(group.channels)
    total, layers = np.zeros(group.channels), np.zeros(group.channels)
    modules, norms = dict(model.named_modules()), norms_behind(model)
    for places in group.producers:
        flat = modules[places.module].weight.detach().double().flatten(1)
        if selector == "BN scale":
            if places.module not in norms:
                continue
            score = modules[norms[places.module]].weight.detach().double().abs()
        elif selector == "FPGM":
            score = torch.cdist(flat, flat).sum(dim=1)
        else:
            score = flat.norm(p=1 if selector == "L1" else 2, dim=1)
        score = score / score.mean()
        np.add.at(total, places.channels, score.numpy()[places.indices])
        np.add.at(layers, places.channels, 1)
    return total / np.maximum(layers, 1)


def removed_first(score: np.ndarray, count: int) -> list[int]:
    """The `count` channels with the least score."""
    return [int(channel) for channel in np.argsort(score, kind="stable")[:count]]


def _filters(model: nn.Module, group: CouplingGroup) -> tuple[Tensor, Tensor]:
    """Every channel's filters as one row, batch norms folded, and its bias, a row too.

    A depthwise convolution on the way multiplies what is before it; several producers of a stream stand
    side by side.
    """
    modules, norms = dict(model.named_modules()), norms_behind(model)
    rows: list[Tensor] = []
    biases: list[Tensor] = []
    for places in group.producers:
        module = modules[places.module]
        weight = module.weight.detach().double().flatten(1)
        bias = torch.zeros(len(weight), dtype=torch.float64)
        if module.bias is not None:
            bias = module.bias.detach().double()
        norm = modules.get(norms.get(places.module, ""))
        if norm is not None:
            gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
            weight = weight * gain[:, None]
            bias = norm.bias.detach().double() + gain * (bias - norm.running_mean.double())
        row = torch.zeros(group.channels, weight.shape[1], dtype=torch.float64)
        row[places.channels] = weight[places.indices]
        shift = torch.zeros(group.channels, 1, dtype=torch.float64)
        shift[places.channels, 0] = bias[places.indices]
        if is_depthwise(module) and rows:
            rows[-1] = torch.einsum("ci,ck->cik", rows[-1], row).flatten(1)
            biases[-1] = shift
        else:
            rows.append(row)
            biases.append(shift)
    return torch.cat(rows, dim=1), torch.cat(biases, dim=1)


def rebuilt(model: nn.Module, group: CouplingGroup, gone: Sequence[int], compensator: str) -> np.ndarray:
    """How a compensator rebuilds removed channels, from the weights alone.

    Returns
    -------
    ndarray, shape (len(gone), channels + 1)
        Weights over the group's channels and a constant.
    """
    weights = np.zeros((len(gone), group.channels + 1))
    if compensator == "none" or not len(gone):
        return weights
    kept = sorted(set(range(group.channels)) - set(gone))
    filters, biases = _filters(model, group)
    if compensator == "one to one":
        # How alike two filters are counts their biases too; what is alike is scaled to the same size.
        whole = torch.cat([filters, biases], dim=1)
        unit = torch.nn.functional.normalize(whole, dim=1)
        best = (unit[list(gone)] @ unit[kept].T).argmax(dim=1).numpy()
        size = filters.norm(dim=1).clamp_min(1e-12)
        for row, (channel, place) in enumerate(zip(gone, best, strict=True)):
            weights[row, kept[place]] = size[channel] / size[kept[place]]
        return weights
    basis = torch.cat([filters, biases], dim=1)
    block = basis[kept] @ basis[kept].T
    block += torch.diag(_RIDGE * block.diagonal() + 1e-12)
    solved = torch.linalg.solve(block, basis[kept] @ basis[list(gone)].T)
    weights[:, kept] = solved.T.numpy()
    return weights


def masks_from(
    groups: Sequence[CouplingGroup],
    gone: Mapping[int, Sequence[int]],
    weights: Mapping[int, np.ndarray],
    filters: Mapping[str, int],
) -> Masks:
    """Masks that remove channels, with the merges given over each group's channels and a constant.

    Parameters
    ----------
    groups : sequence of CouplingGroup
        The groups.
    gone : mapping of int to sequence of int
        Which channels of each group go, by its number.
    weights : mapping of int to ndarray, each shape (len(gone), channels + 1)
        How they are rebuilt.
    filters : mapping of str to int
        Filters of every layer.
    """
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in filters.items()}
    merges = []
    for group in groups:
        channels = gone.get(group.number, ())
        for places in group.producers:
            masks[places.module][places.indices[np.isin(places.channels, channels)]] = False
        root = group.producers[0]
        filter_at = dict(zip(root.channels.tolist(), root.indices.tolist(), strict=True))
        for channel, row in zip(channels, weights.get(group.number, ()), strict=True):
            used = np.flatnonzero(row[:-1])
            merges.append(
                Merge(
                    root.module, filter_at[channel], tuple(filter_at[int(index)] for index in used),
                    tuple(row[used].tolist()), float(row[-1]),
                )
            )  # fmt: skip
    return Masks(masks, tuple(merges))

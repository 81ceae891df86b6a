"""What removing single channels of a network costs, and how well it was predicted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from planted_truth import Truth
from scipy.stats import spearmanr
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup, group_of_layer
from prune_viz.network.layer_kinds import count_outputs
from prune_viz.network.tracing import norms_behind
from prune_viz.pruning.masks import Masks
from prune_viz.pruning.merging import merge_filters
from prune_viz.redundancy.elimination import rebuild_all
from prune_viz.runs.decisions_json import Merge

SMALL = ("L1", "L2", "batch-norm scale", "FPGM")
BATCH = 64


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


def without(model: nn.Module, groups: Sequence[CouplingGroup], merge: Merge) -> nn.Module:
    """The model with one channel gone and what it gave rebuilt as the merge says."""
    group = group_of_layer(groups)[merge.layer]
    written = next(places for places in group.producers if places.module == merge.layer)
    channel = written.channels[written.indices == merge.filter]
    masks = Masks(merges=(merge,))
    for places in group.producers:
        count = count_outputs(model.get_submodule(places.module))
        masks[places.module] = torch.ones(count, dtype=torch.bool)
        masks[places.module][places.indices[np.isin(places.channels, channel)]] = False
    return merge_filters(copy.deepcopy(model), masks, groups)


def ablate(
    family: str,
    seed: int,
    count: int,
    model: nn.Module,
    groups: Sequence[CouplingGroup],
    table: pd.DataFrame,
    gram_matrices: Mapping[int, np.ndarray],
    truths: Sequence[Truth],
    images: Tensor,
    scores: Tensor,
) -> pd.DataFrame:
    """Remove single channels at random, and give a row each.

    Parameters
    ----------
    family, seed : str, int
        Of the network; the seed draws the channels.
    count : int
        How many are removed.
    model : nn.Module
        The network that was analysed.
    groups : sequence of CouplingGroup
        Its groups.
    table : DataFrame
        Its filters, by layer and filter.
    gram_matrices : mapping of int to ndarray
        The groups' Gram matrices.
    truths : sequence of Truth
        What was planted, and is left out.
    images, scores : Tensor
        On which the loss is measured, and what the network says of them.

    Returns
    -------
    DataFrame
        The divergence that removal costs with the rest taking over (``merged``) and with nothing in its
        place (``raw``), and what each method says of the channel.
    """
    planted = {truth.site.layer: set().union(*(p.set for p in truth.plants)) for truth in truths}
    norms = norms_behind(model)
    judged = [group for group in groups if group.number in gram_matrices]
    chosen = [
        (group, channel)
        for group in judged
        for channel in range(group.channels)
        if channel not in planted.get(group.layers[0], set())
        and not np.isnan(table.loc[(group.layers[0], channel), "damage"])
    ]
    order = np.random.default_rng(seed).permutation(len(chosen))[:count]
    rows = []
    for group, channel in (chosen[index] for index in order):
        layer, rest = group.layers[0], [k for k in range(group.channels) if k != channel]
        weights = rebuild_all([channel], rest, gram_matrices[group.number])[0].tolist()
        taken_over = Merge(layer, channel, tuple(rest), tuple(weights[:-1]), weights[-1])
        losses = [
            change(scores, scores_of(without(model, groups, merge), images))[1]
            for merge in (taken_over, Merge(layer, channel, (), (), 0.0))
        ]
        kernels = model.get_submodule(layer).weight.flatten(1).double()
        gain = model.get_submodule(norms[layer]).weight[channel].abs()
        rows.append(
            [family, seed, layer, channel, *losses, table.loc[(layer, channel), "damage"],
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

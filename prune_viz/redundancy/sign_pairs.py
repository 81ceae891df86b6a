"""Filters of opposite signs, f and -f: behind a rectifier they are the two sides of what one weight sees.

Few of either side may fire on calibration images, and others may then seem to make up for it. So of weights
that occur in both signs the last filter of a sign is never called redundant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_viz.channels.groups import CouplingGroup
from prune_viz.network.layer_kinds import by_filters

_COLLINEAR = 0.99  # cosine of weights from which they are one direction


def weight_signs(model: nn.Module, group: CouplingGroup, norms: Mapping[str, str]) -> np.ndarray:
    """Tell which channels of a group have the same weights but for their size, and which the opposite.

    Parameters
    ----------
    model : nn.Module
        The network.
    group : CouplingGroup
        The group; all that writes it counts.
    norms : mapping of str to str
        The batch norm behind each convolution, from `prune_viz.network.tracing.norms_behind`.

    Returns
    -------
    ndarray of int, shape (channels, channels)
        1 for the same, -1 for the opposite, 0 else.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    parts = []
    for places in group.producers:
        rows = _rows(modules[places.module])
        norm = modules[norms[places.module]] if places.module in norms else None
        if norm is not None and norm.weight is not None:
            rows = rows * norm.weight.detach().double().cpu().sign()[:, None]
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # where a channel has no filter
        parts.append(rows[torch.from_numpy(places.table(group.channels))].flatten(1))
    weights = torch.cat(parts, dim=1)
    unit = weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosine = (unit @ unit.T).numpy()
    return np.where(np.abs(cosine) >= _COLLINEAR, np.sign(cosine), 0).astype(int)


def _rows(convolution: Any) -> Tensor:
    """A convolution's weights, a row a filter."""
    return by_filters(convolution, convolution.weight.detach().double().cpu()).flatten(1)


def last_of_their_sign(signs: np.ndarray, flagged: Collection[int]) -> set[int]:
    """Give the flagged channels that must stay, so that both signs do where both occur.

    Parameters
    ----------
    signs : ndarray of int, shape (channels, channels)
        From `weight_signs`.
    flagged : collection of int
        Channels that are to go; of several of one sign the first stays.
    """
    kept = set(range(len(signs))) - set(flagged)
    staying = set()
    for channel in sorted(flagged):
        if (signs[channel] < 0).any() and not (signs[channel, sorted(kept)] > 0).any():
            kept.add(channel)
            staying.add(channel)
    return staying

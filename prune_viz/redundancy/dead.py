"""How channels are dead: silent, unread or constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prune_viz.redundancy.gram_matrices import GramMatrices

_SILENT = 1e-6  # largest value of a silent map, of its layer's typical one
_CONSTANT = 1e-3  # standard deviation of a constant map, of its mean or of its layer's typical deviation


def are_silent(consumers: Sequence[GramMatrices]) -> np.ndarray:
    """Which channels stay zero on every calibration image, from one a consumer; bool, shape (channels,)."""
    peak = np.max([consumer.peak for consumer in consumers], axis=0)
    return np.asarray(peak <= _SILENT * max(float(np.median(peak)), 1e-30))


def are_all_silent(consumers: Sequence[GramMatrices]) -> bool:
    """Whether all channels stay zero on every calibration image."""
    return not any(consumer.peak.any() for consumer in consumers)


def dead_kinds(consumers: Sequence[GramMatrices]) -> list[str]:
    """How each channel is dead, as far as the consumers show; empty where it is not."""
    silent = are_silent(consumers)
    weight_gram = np.zeros(len(silent))
    for consumer in consumers:
        weight_gram += np.diag(consumer.weight_gram)
    deviation = np.sqrt(np.max([consumer.variance for consumer in consumers], axis=0))
    mean = np.max([np.abs(consumer.mean) for consumer in consumers], axis=0)
    typical = float(np.median(deviation))
    kinds = []
    for channel in range(len(silent)):
        if silent[channel]:
            kinds.append("silent")
        elif weight_gram[channel] == 0:
            kinds.append("unread")
        elif deviation[channel] <= _CONSTANT * max(float(mean[channel]), typical):
            kinds.append("constant")
        else:
            kinds.append("")
    return kinds

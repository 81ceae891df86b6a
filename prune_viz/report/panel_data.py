"""What the panels of a layer's filters show, as plain data for the browser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prune_viz.report import wording
from prune_viz.report.layer_pages import LayerPage
from prune_viz.report.neighbours import firing, similar
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_directory import LayerTensors

_STEPS = 1000  # of a place on a picture, for the browser


def panel_data(
    page: LayerPage,
    tensors: LayerTensors,
    unit: Unit,
    places: Mapping[str, int],
    windows: np.ndarray | None,
) -> dict[str, Any]:
    """What the panels of a layer's filters show, as plain data.

    Parameters
    ----------
    page : LayerPage
        The layer's page.
    tensors : LayerTensors
        The layer's tensors.
    unit : Unit
        Of damage.
    places : mapping of str to int
        The place of each layer's page.
    windows : ndarray, shape (F, K, 4), or None
        The parts of example images that excite each filter most (`top_patches.TopPatches`).

    Returns
    -------
    dict
        ``answers``: of copies, by number, lines on how they and their original answer the same stimuli.
        Others with an entry a filter, by number: ``reasons``; ``figures``, pairs of a name and the filters'
        texts; ``fires`` and ``alike``, pairs of another filter and how much, the most first; and
        ``crops``, triples of a picture, left and upper edge in thousandths (None without example images).
        Of all filters: ``consumers``, pairs of a name and a place (-1 for none); ``weights``, whether theirs
        are drawn; and ``side`` of a crop as a share of its picture.
    """
    consumers = page.coupling.consumers if page.coupling else []
    cards = sorted(
        (card for cluster in page.clusters for card in cluster.cards), key=lambda card: card.number
    )
    return {
        "reasons": [wording.printable(card.reason) for card in cards],
        "answers": {one.card.number: one.proof for one in page.redundant if one.proof},
        "figures": [
            ("Verdict", [card.verdict for card in cards]),
            ("Activation", [wording.activation(card.activation) for card in cards]),
            ("Reconstructed, R²", [wording.r_squared(card.score) for card in cards]),
            ("Damage", [wording.damage(card.damage, unit) for card in cards]),
            ("Cluster", [str(card.cluster) if card.cluster >= 0 else "none" for card in cards]),
        ],
        "fires": _written(firing(tensors.responses)),
        "alike": _written(similar(tensors.responses)),
        "consumers": [(wording.label(name), places.get(name, -1)) for name in consumers],
        "weights": tensors.weights is not None,
        "crops": None if windows is None else [_crops(row) for row in windows],
        "side": 1.0 if windows is None else round(float(windows[0, 0, 3]), 4),
    }


def _written(neighbours: list[list[tuple[int, float]]]) -> list[list[tuple[int, str]]]:
    return [[(other, wording.nearness(share)) for other, share in row] for row in neighbours]


def _crops(windows: np.ndarray) -> list[tuple[int, int, int]]:
    return [
        (int(picture), round(_STEPS * float(left)), round(_STEPS * float(top)))
        for picture, left, top, _ in windows
        if picture >= 0
    ]

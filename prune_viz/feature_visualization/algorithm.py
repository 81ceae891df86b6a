"""What stimuli and responses depend on beside the network and the options: the number of the algorithm."""

from __future__ import annotations

from prune_viz.feature_visualization import optimiser, priors, search, stimuli
from prune_viz.network import layers, precision

ALGORITHM = 4  # raised with every change after which stimuli or responses come out differently


def settings() -> list[object]:
    """The number of the algorithm and its constants, for the key of results; batches are not among them."""
    constants = [
        search.LEAVE,
        search.LEAVE_FIRST,
        search.CLOSE,
        search.RESTARTS,
        search.DRAFT_RESTARTS,
        search.HALF_LIMIT,
    ]
    return [
        ALGORITHM,
        constants,
        stimuli.DRAFT_STEPS,
        optimiser.settings(),
        priors.settings(),
        layers.settings(),
        precision.settings(),
    ]

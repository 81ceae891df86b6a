"""How much work the stages of an analysis do, by the quality that is asked: a draft, the standard, or more.

A draft shows every filter and judges it within minutes. The standard begins where a draft ended: with its
pictures, and with the same calibration images.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum

from prune_viz.feature_visualization.stimuli import DRAFT_STEPS, STEPS


class Quality(StrEnum):
    """What is asked of an analysis."""

    DRAFT = "draft"
    STANDARD = "standard"
    FINE = "fine"


@dataclass(frozen=True)
class Effort:
    """How much work each stage does.

    Attributes
    ----------
    is_draft : bool
        Whether pictures stay drafts: few steps, on small canvases.
    steps : int
        Most steps of the optimiser for each stimulus.
    stimuli : int
        Stimuli on which verdicts rest, about.
    variants : int
        Shifted copies of each calibration image on which groups are compared, at most
        `prune_viz.calibration.variants.VARIANTS`.
    sensitivity_variants : int
        Those on which the output's sensitivity is measured.
    measuring : float
        Share of the usual work that goes into measured curves and budgets.
    """

    is_draft: bool
    steps: int
    stimuli: int
    variants: int
    sensitivity_variants: int
    measuring: float


ALL = sys.maxsize
EFFORTS = {
    Quality.DRAFT: Effort(True, DRAFT_STEPS, 2048, 4, 1, 0.25),
    Quality.STANDARD: Effort(False, STEPS, ALL, 16, 4, 1.0),
    Quality.FINE: Effort(False, 3 * STEPS, ALL, 16, 16, 4.0),
}

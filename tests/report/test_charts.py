"""Charts of the report: how coherent stimuli are by depth, and how damage is distributed."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from prune_viz.report.coherence import LayerCoherence, coherence, draw_coherence, layer_coherence
from prune_viz.report.damage_histogram import draw_histogram
from prune_viz.report.finding import Counts
from prune_viz.report.layer_pages import FilterCard
from prune_viz.report.pages import LayerRow
from prune_viz.runs.damage import Unit
from prune_viz.runs.run_json import LayerRecord
from prune_viz.runs.verdicts import Verdict

SIDE = 48
DOWN, ACROSS = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2


def grating(angle: float) -> np.ndarray:
    return np.sin(0.7 * (math.cos(angle) * ACROSS + math.sin(angle) * DOWN))


def test_coherence_of_lines_rings_and_crossings_is_known() -> None:
    rings = np.cos(0.8 * np.hypot(DOWN, ACROSS)) * np.exp(-(DOWN**2 + ACROSS**2) / 150)
    images = np.stack([grating(0), grating(1.1), rings, grating(0.4) + grating(0.4 + math.pi / 2)])
    found = coherence(images[:, None])
    assert found[:2] == pytest.approx(1, abs=0.01)  # the ends of a slanted one's rows are cut
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert found[3] == pytest.approx(0, abs=0.02)


def test_coherence_pools_channels_and_does_not_mind_scale() -> None:
    both = np.stack([grating(0), 2 * grating(math.pi / 2)])[None]
    assert coherence(both)[0] == pytest.approx((4 - 1) / (4 + 1), abs=1e-6)  # of squared contrasts
    assert coherence(1e-3 * both)[0] == pytest.approx(coherence(both)[0])


def test_what_has_no_angle_is_left_out() -> None:
    flat = np.ones((1, 3, 8, 8))
    assert np.isnan(coherence(flat)).all()
    assert np.isnan(coherence(np.ones((2, 1, 1, 8)))).all()
    assert layer_coherence(row(0), flat, np.array([True])) is None
    assert layer_coherence(row(0), np.ones((2, 1, 16)), np.array([True, True])) is None  # a signal
    assert layer_coherence(row(0), grating(0)[None, None], np.array([False])) is None  # none is kept
    some = layer_coherence(
        row(0), np.stack([grating(0), flat[0, 0, 0, 0] + 0 * DOWN])[:, None], np.ones(2, bool)
    )
    assert some is not None
    assert some.median == pytest.approx(1)


def row(place: int) -> LayerRow:
    record = LayerRecord(f"l{place}", "", 4, place, None, (8, 8), None, f"layers/{place}.safetensors")
    return LayerRow(record, place, "", Counts(dict.fromkeys(Verdict, 0) | {Verdict.KEEP: 4}))


def layers(medians: list[float]) -> list[LayerCoherence]:
    return [LayerCoherence(row(i), m, m / 2, (1 + m) / 2) for i, m in enumerate(medians)]


@pytest.mark.parametrize(
    ("medians", "says"),
    [
        ([0.9, 0.8, 0.5, 0.3, 0.2, 0.1], ["It falls from 85", "15", "\u22121.00"]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], ["it rises, from 15", "+1.00"]),
        ([0.2, 0.9, 0.1, 0.8, 0.2, 0.7], ["does not change steadily", "+0.03"]),
        ([0.5] * 6, ["does not change steadily", "+0.00"]),
        ([0.3, 0.2, 0.1], ["goes from 30", "so few layers show no trend"]),
    ],
)
def test_the_sentence_says_what_was_measured(medians: list[float], says: list[str]) -> None:
    curve = draw_coherence(layers(medians))
    assert curve is not None
    assert [part for part in says if part not in curve.finding] == []
    heights = np.array([y for _, y, _ in curve.points])
    nought, whole = (place for place, value in curve.ticks if value in (0.0, 1.0))
    assert (nought - heights) / (nought - whole) == pytest.approx(medians, abs=1e-3)


def test_two_layers_have_no_trend() -> None:
    assert draw_coherence(layers([0.9, 0.1])) is None


def card(number: int, verdict: str, damage: float) -> FilterCard:
    return FilterCard(number, Verdict(verdict), 1.0, 0.9, damage, -1, "")


def test_every_known_damage_stands_in_its_bar() -> None:
    damages = [0.0, 1e-12, 2e-5, 2.5e-5, 9e-5, 0.2, math.nan]
    verdicts = ["dead", "dead", "redundant", "keep", "keep", "keep", "keep"]
    drawn = draw_histogram(
        [card(i, *one) for i, one in enumerate(zip(verdicts, damages, strict=True))], Unit.NATS
    )
    assert drawn is not None
    labels = [bar.label.replace("\u202f", " ") for bar in drawn.bars]
    assert labels == [
        "below 1e-9 nats: 2 dead",
        "1e-5 nats to 3.2e-5 nats: 1 keep, 1 redundant",
        "3.2e-5 nats to 0.0001 nats: 1 keep",
        "0.1 nats to 0.32 nats: 1 keep",
    ]
    parts = [part for bar in drawn.bars for part in bar.parts]
    counts = [int(n) for label in labels for n in re.findall(r"(\d+) (?:keep|redundant|dead)", label)]
    unit = (drawn.bottom - drawn.up[0][0]) / 2  # the tallest bars hold two
    assert [part.height for part in parts] == pytest.approx([count * unit for count in counts], abs=0.2)
    places = [part.x for bar in drawn.bars for part in bar.parts[:1]]
    assert places == sorted(places)
    assert all(drawn.left <= part.x and part.x + part.width <= drawn.right for part in parts)
    # The mark of a power of ten stands where the bar begins whose least damage it is.
    ticks = {label.replace("\u202f", " "): x for x, label in drawn.across}
    assert "10⁻⁵ nats" not in ticks  # too near to "none"
    assert ticks["10⁻⁴ nats"] == pytest.approx(places[2] + (places[2] - places[1]), abs=0.2)
    assert ticks["0.1 nats"] == places[3]


def test_unknown_damage_has_no_histogram() -> None:
    assert draw_histogram([card(0, "keep", math.nan)], Unit.OUTPUT) is None
    only = draw_histogram([card(0, "dead", 0.0)], Unit.OUTPUT)
    assert only is not None
    assert len(only.bars) == 1
    near = draw_histogram(
        [card(0, "dead", 0.0), *(card(i, "keep", 10.0**-i) for i in range(1, 9))], Unit.NATS
    )
    assert near is not None
    for drawn in (only, near):
        places = [place for place, _ in drawn.across]
        assert drawn.across[0][1] == "none"
        assert min(np.diff(places), default=99) > 60  # or labels run into each other


@pytest.mark.parametrize(
    ("unit", "says"), [(Unit.CONSUMERS, "1e-6 % to 3.2e-6 %"), (Unit.NATS, "1e-8 nats to 3.2e-8 nats")]
)
def test_bars_of_little_damage_are_told_apart(unit: Unit, says: str) -> None:
    drawn = draw_histogram([card(0, "keep", 2e-8), card(1, "keep", 2e-7)], unit)
    assert drawn is not None
    labels = [bar.label.replace("\u202f", " ") for bar in drawn.bars]
    assert labels[0].startswith(says)
    assert labels[0] != labels[1]

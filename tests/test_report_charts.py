"""Charts of the report: how oriented stimuli are by depth, and how damage is distributed."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from prune_viz.report.damage_histogram import draw_histogram
from prune_viz.report.layer_pages import FilterCard
from prune_viz.report.orientation import (
    LayerOrientation,
    draw_orientation,
    layer_orientation,
    orientation,
)
from prune_viz.report.pages import Counts, LayerRow
from prune_viz.runs import LayerRecord

SIDE = 48
DOWN, ACROSS = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2


def grating(angle: float) -> np.ndarray:
    return np.sin(0.7 * (math.cos(angle) * ACROSS + math.sin(angle) * DOWN))


def test_orientation_of_lines_rings_and_crossings_is_known() -> None:
    rings = np.cos(0.8 * np.hypot(DOWN, ACROSS)) * np.exp(-(DOWN**2 + ACROSS**2) / 150)
    images = np.stack([grating(0), grating(1.1), rings, grating(0.4) + grating(0.4 + math.pi / 2)])
    found = orientation(images[:, None])
    assert found[:2] == pytest.approx(1, abs=0.01)  # the ends of a slanted one's rows are cut
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert found[3] == pytest.approx(0, abs=0.02)


def test_orientation_pools_channels_and_does_not_mind_scale() -> None:
    both = np.stack([grating(0), 2 * grating(math.pi / 2)])[None]
    assert orientation(both)[0] == pytest.approx((4 - 1) / (4 + 1), abs=1e-6)  # of squared contrasts
    assert orientation(1e-3 * both)[0] == pytest.approx(orientation(both)[0])


def test_what_has_no_angle_is_left_out() -> None:
    flat = np.ones((1, 3, 8, 8))
    assert np.isnan(orientation(flat)).all()
    assert np.isnan(orientation(np.ones((2, 1, 1, 8)))).all()
    assert layer_orientation(row(0), flat, np.array([True])) is None
    assert layer_orientation(row(0), np.ones((2, 1, 16)), np.array([True, True])) is None  # a signal
    some = layer_orientation(
        row(0), np.stack([grating(0), flat[0, 0, 0, 0] + 0 * DOWN])[:, None], np.ones(2, bool)
    )
    assert some is not None
    assert some.median == pytest.approx(1)


def row(place: int) -> LayerRow:
    return LayerRow(
        LayerRecord(f"l{place}", "", 4, place, None, (8, 8), None, ""), place, "", Counts(4, 0, 0)
    )


def layers(medians: list[float]) -> list[LayerOrientation]:
    return [LayerOrientation(row(i), m, m / 2, (1 + m) / 2) for i, m in enumerate(medians)]


@pytest.mark.parametrize(
    ("medians", "says", "rank"),
    [
        ([0.9, 0.8, 0.5, 0.3, 0.2, 0.1], "falls from 85", -1.0),
        ([0.1, 0.2, 0.3], "rises, from 10", 1.0),
        ([0.2, 0.9, 0.1, 0.8, 0.2, 0.7], "does not change steadily", None),
        ([0.5, 0.5, 0.5], "does not change steadily", 0.0),
    ],
)
def test_the_sentence_says_what_was_measured(medians: list[float], says: str, rank: float | None) -> None:
    curve = draw_orientation(layers(medians))
    assert curve is not None
    assert says in curve.finding
    if rank is not None:
        assert curve.correlation == pytest.approx(rank)
    heights = [y for _, y, _ in curve.points]
    assert (
        np.argsort(heights, kind="stable").tolist() == np.argsort(-np.array(medians), kind="stable").tolist()
    )


def test_two_layers_have_no_trend() -> None:
    assert draw_orientation(layers([0.9, 0.1])) is None


def card(number: int, verdict: str, damage: float) -> FilterCard:
    return FilterCard(number, verdict, 1.0, 0.9, damage, -1, "")


def test_every_known_damage_stands_in_its_bar() -> None:
    damages = [0.0, 1e-12, 2e-5, 2.5e-5, 9e-5, 0.2, math.nan]
    verdicts = ["dead", "dead", "redundant", "keep", "keep", "keep", "keep"]
    drawn = draw_histogram(
        [card(i, *one) for i, one in enumerate(zip(verdicts, damages, strict=True))], "nats"
    )
    assert drawn is not None
    labels = [bar.label.replace("\u202f", " ") for bar in drawn.bars]
    assert labels == [
        "below 1e-09 nats: 2 dead",
        "1e-05 nats to 3.2e-05 nats: 1 keep, 1 redundant",
        "3.2e-05 nats to 0.0001 nats: 1 keep",
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
    assert ticks["10⁻⁵ nats"] == places[1]
    assert ticks["0.1 nats"] == places[3]


def test_unknown_damage_has_no_histogram_and_nothing_but_zero_has_one() -> None:
    assert draw_histogram([card(0, "keep", math.nan)], "output") is None
    only = draw_histogram([card(0, "dead", 0.0)], "output")
    assert only is not None
    assert len(only.bars) == 1

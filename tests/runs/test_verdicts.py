"""Verdicts and damage: one place each that names, draws and writes them."""

from __future__ import annotations

import math

import pytest

from prune_viz.report.verdict_styles import verdict_styles
from prune_viz.runs.damage import Damage, Unit
from prune_viz.runs.verdicts import FLAGGED, Verdict


def test_verdicts_differ_in_letter_shape_and_colour() -> None:
    looks = [verdict.look for verdict in Verdict]
    for field in ("letter", "shape", "colour", "dark", "legend"):
        assert len({getattr(look, field) for look in looks}) == len(looks), field
    assert all(len(look.letter) == 1 for look in looks)
    assert Verdict.KEEP not in FLAGGED
    assert [str(verdict) for verdict in Verdict] == [
        "keep",
        "redundant",
        "dead",
        "unjudged",
    ]  # as files hold them


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("verdict", Verdict)
def test_marks_stand_out_from_both_grounds(verdict: Verdict) -> None:
    for colour, ground in ((verdict.look.colour, "#ffffff"), (verdict.look.dark, "#141616")):
        low, high = sorted((_luminance(colour), _luminance(ground)))
        assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG AA for text


@pytest.mark.parametrize("verdict", Verdict)
def test_style_sheet_shows_one_verdict_alone(verdict: Verdict) -> None:
    sheet = "\n".join(verdict_styles())
    assert f"--{verdict}:{verdict.look.colour};" in sheet
    assert f'[data-show="{verdict}"] .card:not(.{verdict})' in sheet
    assert f".{verdict}{{--verdict:var(--{verdict})}}" in sheet


@pytest.mark.parametrize(
    ("value", "unit", "plain", "narrow"),
    [
        (0.0123, Unit.NATS, "0.012 nats", "0.012|nats"),
        (2.5, Unit.NATS, "2.5 nats", "2.5|nats"),
        (1.23e-7, Unit.NATS, "1.2e-7 nats", "1.2e-7|nats"),
        (1e-12, Unit.NATS, "under 1e-9 nats", "under 1e-9|nats"),
        (0.0, Unit.NATS, "0 nats", "0|nats"),
        (0.0345, Unit.OUTPUT, "3.5%", "3.5|%"),
        (1.0, Unit.CONSUMERS, "100%", "100|%"),
        (12.34, Unit.OUTPUT, "1234%", "1234|%"),
        (1e-9, Unit.CONSUMERS, "under 0.0001%", "under 0.0001|%"),
        (math.nan, Unit.NATS, "\u2013", "\u2013"),
    ],
)
def test_damage_is_written_to_two_figures(value: float, unit: Unit, plain: str, narrow: str) -> None:
    assert Damage(value, unit).text() == plain
    assert Damage(value, unit).text("|") == narrow


def test_damage_says_what_it_is_a_share_of() -> None:
    assert str(Damage(0.02, Unit.NATS)) == "0.02 nats"
    assert str(Damage(0.02, Unit.OUTPUT)) == "2% of the output's square"
    assert str(Damage(0.02, Unit.CONSUMERS)) == "2% of the output of the layers that read it"
    in_files = ["nats", "nats over labels", "nats a position", "output", "readers"]
    assert [str(unit) for unit in Unit] == in_files

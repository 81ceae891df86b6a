"""The time that work of several stages has left."""

from itertools import pairwise

import pytest

from prune_viz.utils.time_left import Expected, TimeLeft, rounded

STAGES = [Expected("draw", 1.0), Expected("think", 6.0), Expected("draw", 1.0)]


def test_work_as_expected_has_the_rest_left() -> None:
    left = TimeLeft(STAGES)
    left.start("draw", 0.0, 0.0)
    assert left.seconds(1.0) is None
    for second in range(1, 11):
        left.advance(second / 10)
        if second >= 3:
            assert left.seconds(float(second)) == pytest.approx(80 - second)
    left.start("think", 0.0, 10.0)
    for second in range(11, 71):
        left.advance((second - 10) / 60)
        assert left.seconds(float(second)) == pytest.approx(80 - second)
    assert (left.number, left.count) == (2, 3)
    assert left.share == pytest.approx(7 / 8)


def test_the_time_left_does_not_jump() -> None:
    left = TimeLeft([Expected("short", 1.0), Expected("long", 1.0)])
    left.start("short", 0.0, 0.0)
    for second in range(1, 11):
        left.advance(second / 10)
        left.seconds(float(second))
    left.start("long", 0.0, 10.0)
    shown = [left.seconds(10.0)]
    for second in range(11, 211):  # twenty times as long as expected
        left.advance((second - 10) / 200)
        shown.append(left.seconds(float(second)))
    steps = [after - before for before, after in pairwise(shown)]
    assert max(steps) < 12
    assert shown[-1] < 10


def test_what_was_done_before_takes_no_time() -> None:
    left = TimeLeft([Expected("draw", 10.0), Expected("think", 10.0)])
    left.start("draw", 0.5, 0.0)
    assert left.share == pytest.approx(0.25)
    left.advance(0.75)
    assert left.seconds(5.0) == pytest.approx(5.0 * 12.5 / 2.5)


def test_stages_that_are_passed_over_are_not_waited_for() -> None:
    left = TimeLeft(STAGES)
    left.start("draw", 0.0, 0.0)
    left.advance(1.0)
    left.start("draw", 0.0, 5.0)
    assert left.number == 3
    assert left.seconds(5.0) == pytest.approx(5.0)


def test_a_stage_in_parts_goes_on_where_it_was() -> None:
    left = TimeLeft([Expected("rank", 1.0)])
    left.start("rank", 0.0, 0.0)
    left.advance(1.0)
    left.start("other", 0.0, 1.0)
    left.advance(0.5)
    assert left.share == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "under 10 s"), (42, "40 s"), (57, "1 min"), (301, "5 min"), (3580, "1 h"), (7700, "2 h 10 min")],
)
def test_times_are_as_rough_as_they_are_known(seconds: float, text: str) -> None:
    assert rounded(seconds) == text

"""The maps in a real browser: pointing, lassos, what is selected, and what else shows it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import VEILED, Watched
from report_fixture import HOSTILE, Plan, write_run

from prune_viz.report import write_report
from prune_viz.runs.run_directory import RunDirectory

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LAYERS = [Plan("stem", 16, (32, 32)), Plan(HOSTILE, 24, (32, 32)), Plan("deep", 40, (32, 32))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = write_run(tmp_path_factory.mktemp("run"), LAYERS)
    write_report(made)
    return made


def layer_page(run: RunDirectory, place: int) -> Path:
    return run.report_page.parent / "layers" / f"{run.layers()[place].slug}.html"


def places(run: RunDirectory) -> np.ndarray:
    """Where each filter lies on the map of the network, in units of its width, layer after layer."""
    text = run.report_page.with_name("network.js").read_text()
    data = json.loads(json.loads(text[text.index("(") + 1 : text.rindex(")")]))
    return np.frombuffer(base64.b64decode(data["places"]), "<u2").reshape(-1, 2) / 65534


def draw(page: Any, corners: list[tuple[float, float]]) -> None:
    """Draw a lasso through points of the window."""
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in [*corners[1:], corners[0]]:
        page.mouse.move(*corner, steps=5)
    page.mouse.up()


def around(box: Any, low: np.ndarray, high: np.ndarray) -> list[tuple[float, float]]:
    """Corners, in the window, of a rectangle in units of the width of a map with this box."""
    (left, top), (right, bottom) = low, high
    ring = ((left, top), (right, top), (right, bottom), (left, bottom))
    return [(box["x"] + x * box["width"], box["y"] + y * box["width"]) for x, y in ring]


def half(run: RunDirectory, count: int = 80) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A rectangle on the map of the network whose edge no filter is near, and who is inside."""
    found = places(run)
    order = np.sort(found[:, 0])
    gaps = np.diff(order)[10:-10]
    cut = order[10 + gaps.argmax()] + gaps.max() / 2
    inside = [index for index in range(count) if found[index, 0] < cut]
    return np.array([0.001, 0.001]), np.array([cut, 0.615]), inside


def test_pointing_previews_and_click_opens_a_filter(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    network = page.locator(".network")
    network.scroll_into_view_if_needed()
    box = network.bounding_box()
    at = places(run)
    apart = np.linalg.norm(at[:, None] - at[None], axis=2) + 9 * np.eye(len(at))
    index = int((apart.min(axis=1) * (at[:, 1] < 0.4)).argmax())  # clear of others, and of the bar below
    page.mouse.move(box["x"] + at[index, 0] * box["width"], box["y"] + at[index, 1] * box["width"])
    preview = page.locator("#preview")
    preview.wait_for()
    layer = 0 if index < 16 else 1 if index < 40 else 2
    number = index - [0, 16, 40][layer]
    assert f"Filter\n{number}\n" in preview.inner_text()
    sheet = f"{run.layers()[layer].slug}-0.jpg"
    page.wait_for_function(
        "name => getComputedStyle(document.querySelector('#preview .t')).backgroundImage.includes(name)",
        arg=sheet,
    )
    assert page.evaluate(VEILED) > 0.9
    page.mouse.move(2, 2)
    preview.wait_for(state="hidden")
    page.wait_for_timeout(100)
    assert page.evaluate(VEILED) == 0
    page.mouse.click(box["x"] + at[index, 0] * box["width"], box["y"] + at[index, 1] * box["width"])
    page.locator("#filter").wait_for()
    assert page.url.startswith(layer_page(run, layer).as_uri())
    assert page.locator("#filter h2").inner_text() == f"Filter {number}"


def test_lasso_on_the_network_map_selects(run: RunDirectory, watched: Watched) -> None:
    low, high, inside = half(run)
    page = watched.open(run.report_page)
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.locator(".network").scroll_into_view_if_needed()
    box = page.locator(".network").bounding_box()
    draw(page, around(box, low, high))
    assert page.url == run.report_page.as_uri()  # the end of a lasso is no click
    assert page.locator("[data-total=chosen]").inner_text() == f"{len(inside)} selected"
    assert page.locator(".selected li").count() == min(len(inside), 60)
    counts = [sum(start <= one < end for one in inside) for start, end in ((0, 16), (16, 40), (40, 80))]
    badges = page.locator(".layers [data-selected]").all_inner_texts()
    assert badges == [f"{count} selected" if count else "" for count in counts]
    page.locator("#review .selection").get_by_role("button", name="Keep").click()
    flagged = run.read_filters()["verdict"].ne("keep").to_numpy()
    decided = page.evaluate("pruneViz.decisions.file().decisions.length")
    removable = page.evaluate(
        "pruneViz.run.layers.map((layer, place) =>"
        " Array.from(layer.verdicts, (_, filter) => pruneViz.decisions.removable(place, filter)))"
    )
    movable = np.concatenate([np.array(one) for one in removable])
    assert decided == movable[inside].sum() >= flagged[inside].sum() > 0
    assert page.locator(".selected").is_hidden()  # what was decided is selected no more
    page.get_by_role("button", name="Undo").click()
    draw(page, around(box, low, high))
    page.goto(layer_page(run, 0).as_uri())  # the selection goes with the reader
    chosen = page.locator(".card.chosen").evaluate_all("all => all.map(one => Number(one.dataset.filter))")
    assert sorted(chosen) == [one for one in inside if one < 16] != []
    assert page.locator("[data-total=chosen]").inner_text() == f"{counts[0]} selected"


def test_lasso_takes_only_the_shown_verdict(run: RunDirectory, watched: Watched) -> None:
    low, high, left = half(run)
    inside = [index for index in range(80) if index not in left]
    low, high = np.array([high[0], 0.001]), np.array([0.999, 0.615])
    page = watched.open(run.report_page)
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.locator("#network .show label", has_text="redundant").click()
    page.locator(".network").scroll_into_view_if_needed()
    draw(page, around(page.locator(".network").bounding_box(), low, high))
    redundant = run.read_filters()["verdict"].eq("redundant").to_numpy()
    assert 0 < redundant[inside].sum() < len(inside)
    assert page.locator("[data-total=chosen]").inner_text() == f"{redundant[inside].sum()} selected"


def test_lasso_selects_cards_and_shift_adds(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_page(run, 2))
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.locator(".map").scroll_into_view_if_needed()
    tiles = page.locator(".map a").evaluate_all(
        "all => all.map(t => { const b = t.getBoundingClientRect();"
        " return [Number(t.id.split('-')[1]), b.left + b.width / 2, b.top + b.height / 2]; })"
    )
    box = page.locator(".map").bounding_box()
    cut = float(np.median([x for _, x, _ in tiles])) + 0.5

    def ring(left: float, right: float) -> list[tuple[float, float]]:
        top, bottom = box["y"] + 1, box["y"] + box["height"] - 1
        return [(left, top), (right, top), (right, bottom), (left, bottom)]

    chosen = ".card.chosen"
    draw(page, ring(box["x"] + 1, cut))
    numbers = page.locator(chosen).evaluate_all("all => all.map(one => Number(one.dataset.filter))")
    assert sorted(numbers) == sorted(number for number, x, _ in tiles if x < cut)
    assert page.locator(".map a.chosen").count() == len(numbers)
    page.keyboard.down("Shift")
    draw(page, ring(cut, box["x"] + box["width"] - 1))
    page.keyboard.up("Shift")
    assert page.locator(chosen).count() == 40
    page.keyboard.press("Escape")
    assert page.locator(chosen).count() == page.locator(".map a.chosen").count() == 0


def test_a_lasso_ends_where_the_button_is_let_go(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    page.locator(".network").scroll_into_view_if_needed()
    box = page.locator(".network").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] - 2, box["y"] + 50)
    page.mouse.up()  # outside
    page.mouse.move(box["x"] + 90, box["y"] + 80, steps=4)
    page.mouse.move(box["x"] + 200, box["y"] + 220, steps=4)
    assert "drawing" not in page.locator(".network").get_attribute("class")
    # No picture comes up while one is drawn.
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 120, steps=8)
    page.wait_for_timeout(150)
    assert page.locator("#preview").is_hidden()
    page.mouse.up()


def test_escape_ends_lasso_and_keeps_selection(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_page(run, 2))
    page.locator(".card .t").first.click()
    page.locator(".map").scroll_into_view_if_needed()
    box = page.locator(".map").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 3, steps=5)
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + 300, steps=5)
    page.keyboard.press("Escape")
    page.mouse.up()
    assert page.locator("[data-total=chosen]").inner_text() == "1 selected"


def test_control_click_opens_a_new_window(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    with watched.context.expect_page() as opened:
        page.locator(".network .t").first.click(modifiers=["Control"])
    opened.value.locator("#filter").wait_for()
    assert page.url == run.report_page.as_uri()


def test_the_table_of_layers_narrows_to_what_is_typed(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    find = page.get_by_role("searchbox")
    find.fill("DEEP 3x3")
    rows = page.locator(".layers tbody tr")
    assert [row.is_visible() for row in rows.all()] == [False, False, True]
    assert page.locator(".narrow [role=status]").inner_text() == "1 of 3"
    find.fill("")
    assert all(row.is_visible() for row in rows.all())

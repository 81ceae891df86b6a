"""Names of layers that mean something to HTML, JavaScript, URLs or terminals, on every page in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser import Watched
from report_fixture import Plan, write_run
from serving import serving
from typer.testing import CliRunner

from prune_viz.cli.commands import app
from prune_viz.pruning.review import read_review
from prune_viz.report import write_report
from prune_viz.report.review_server import ReviewServer
from prune_viz.report.single_file import write_single_file
from prune_viz.report.wording import label, printable
from prune_viz.runs.run_directory import RunDirectory

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = [
    "__proto__", "constructor", "toString", "</script><script>window.hit=1</script>",
    '"><img src=x onerror=window.hit=1>', "a\u2028b", "\u202egpj.exe", "'; window.hit=1; '", "{{7*7}}",
    "%3Cscript%3E", "..%2f..", "n" * 10_000, "\U0001f600", "\u0301", "a/b", "a b", "#x", "con",
]  # fmt: skip
ESCAPED = {"a\u2028b": "a\\u2028b", "\u202egpj.exe": "\\u202egpj.exe", "\u0301": "\\u0301"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = write_run(tmp_path_factory.mktemp("hostile") / "run", [Plan(name, 8, (12, 12)) for name in NAMES])
    write_report(made)
    return made


@pytest.fixture
def served(run: RunDirectory) -> Iterator[ReviewServer]:
    with serving(ReviewServer(run)) as server:
        yield server
    server.review_file.unlink(missing_ok=True)


@pytest.fixture
def visitor(chromium: Any, served: ReviewServer) -> Iterator[Watched]:
    """A page of the served report, on which in the end nothing was wrong but that there was no review."""
    made = Watched(chromium, home=served.url.rpartition("/")[0])
    made.page.goto(served.url)
    yield made
    made.context.close()
    assert [text for text in made.wrong if "404 (Not Found)" not in text] == []


def fragment(name: str, number: int) -> str:
    return f"#{quote(name, safe='')}/{number}"


def check_page(page: Any) -> None:
    assert page.evaluate("window.hit") is None
    assert page.locator("img[src='x']").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def check_panel(page: Any, name: str, number: int) -> None:
    panel = page.locator("#filter")
    panel.wait_for()
    assert panel.get_by_role("heading").first.inner_text() == f"Filter {number}"
    assert panel.locator("[data-part=layer]").inner_text() == label(name)
    assert panel.locator("[data-part=layer] *").count() == 0
    assert page.evaluate("pruneViz.named()") == {"place": NAMES.index(name), "filter": number}


def follow(page: Any, place: int) -> None:
    """Go from the overview to a layer's page, until its scripts have run."""
    page.locator(".layers tbody a").nth(place).click()
    page.locator(f"#layer-{place}").wait_for()
    page.locator("html.reviewing").wait_for()


def drawn_around(page: Any, what: Any) -> None:
    """Draw around all of what is there."""
    what.scroll_into_view_if_needed()
    box = what.bounding_box()
    left, top, right, bottom = (
        box["x"] + 1,
        box["y"] + 1,
        box["x"] + box["width"] - 1,
        box["y"] + box["height"] - 1,
    )
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()


def test_every_layer_is_reached_and_its_filters_open(visitor: Watched, served: ReviewServer) -> None:
    page = visitor.page
    check_page(page)
    assert page.locator(".layers tbody a").all_inner_texts() == [label(name) for name in NAMES]
    for place, name in enumerate(NAMES):
        page.goto(served.url)
        follow(page, place)
        assert page.locator("h1").inner_text() == printable(name)
        assert page.title().startswith(label(name))
        check_page(page)
        page.locator(".card[data-filter='3'] b").click()
        check_panel(page, name, 3)
        check_page(page)


def test_links_open_filters_of_every_layer(visitor: Watched, served: ReviewServer) -> None:
    page = visitor.page
    for name in NAMES:
        page.goto("about:blank")
        page.goto(served.url + fragment(name, 5))  # leads to the layer's page
        check_panel(page, name, 5)
        check_page(page)


def test_pages_on_disk_complain_of_nothing(run: RunDirectory, watched: Watched) -> None:
    for path in (run.report_page, *sorted((run.report_page.parent / "layers").glob("*.html"))):
        check_page(watched.open(path))
    for name in (*NAMES[:2], *NAMES[-4:]):
        check_panel(watched.open(run.report_page, fragment(name, 2)), name, 2)


def test_one_file_holds_every_layer(run: RunDirectory, watched: Watched, tmp_path: Path) -> None:
    write_single_file(run, tmp_path / "report.html")
    page = watched.open(tmp_path / "report.html")
    for place, name in enumerate(NAMES):
        page.evaluate("where => { location.hash = where }", fragment(name, 4))  # which loads it anew
        page.locator(f"#layer-{place}").wait_for()
        check_panel(page, name, 4)
        assert page.locator("h1:visible").inner_text() == printable(name)
        check_page(page)
    for place in (0, 1, 3):
        page.goto("about:blank")
        page = watched.open(tmp_path / "report.html", f"#layer-{place + 1}")
        page.locator(f".top[data-layer='{place + 1}'] a[rel=prev]").click()
        page.locator(f"#layer-{place}").wait_for()


def test_marks_that_move_text_are_shown_escaped(visitor: Watched) -> None:
    text = visitor.page.content() + visitor.page.locator("body").inner_text()
    for name, shown in ESCAPED.items():
        assert shown in text
        assert name not in text
    assert "\u202e" not in text
    assert "\u2028" not in text


def test_a_very_long_name_leaves_room_for_the_rest(visitor: Watched) -> None:
    page, place = visitor.page, NAMES.index("n" * 10_000)
    row = page.locator(".layers tbody tr").nth(place)
    assert row.locator("code").inner_text() == "n" * 120 + "\u2026" + "n" * 40
    assert row.bounding_box()["height"] < 80
    follow(page, place)
    assert page.locator("h1").bounding_box()["height"] < 350
    page.locator(".card[data-filter='3'] b").click()
    assert page.locator("#filter [data-part=layer]").bounding_box()["height"] < 80
    assert page.locator("#filter [data-part=picture]").bounding_box()["y"] < 500
    page.keyboard.press("Escape")
    page.locator("a[rel=prev]").click()
    assert page.locator("h1").inner_text() == NAMES[place - 1]
    assert page.locator(".top").bounding_box()["height"] < 150
    assert page.locator(".coupling").bounding_box()["height"] < 150


@pytest.mark.parametrize("name", ["__proto__", "constructor", NAMES[3], "\u202egpj.exe"])
def test_decisions_are_saved_under_the_right_name(
    visitor: Watched, served: ReviewServer, run: RunDirectory, name: str
) -> None:
    page, place = visitor.page, NAMES.index(name)
    follow(page, place)
    page.locator(".card[data-filter='2']").focus()
    with page.expect_response(lambda answer: answer.request.method == "PUT"):
        page.keyboard.press("a")
    assert read_review(served.review_file, run).decisions == {(name, 2): "remove"}
    page.reload()
    page.locator(".card[data-decided='remove']").wait_for()
    assert page.locator(".card[data-filter='2']").get_attribute("data-decided") == "remove"
    drawn_around(page, page.locator("[data-map]"))
    assert page.locator("[data-total=chosen]").inner_text() == "8 selected"
    with page.expect_response(lambda answer: answer.request.method == "PUT"):
        page.locator("#review .selection").get_by_role("button", name="Keep").click()
    assert read_review(served.review_file, run).decisions == {(name, number): "keep" for number in range(8)}
    with page.expect_download() as download:
        page.get_by_role("button", name="Save review").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert {one["layer"] for one in saved["decisions"]} == {name}
    check_page(page)


def test_a_lasso_on_the_overview_selects_in_all_layers(
    visitor: Watched, served: ReviewServer, run: RunDirectory
) -> None:
    page = visitor.page
    drawn_around(page, page.locator(".network"))
    assert page.locator(".selected h3").inner_text().startswith(f"{8 * len(NAMES)} selected in {len(NAMES)} ")
    assert page.locator(".layers tr.chosen").count() == len(NAMES)
    with page.expect_response(lambda answer: answer.request.method == "PUT"):
        page.locator("#review .selection").get_by_role("button", name="Keep").click()
    decided = read_review(served.review_file, run).decisions
    assert {layer for layer, _ in decided} == set(
        NAMES[:-1]
    )  # the last one's filters are the network's output
    check_page(page)


def test_the_last_of_many_quick_decisions_is_saved(
    visitor: Watched, served: ReviewServer, run: RunDirectory
) -> None:
    page = visitor.page
    follow(page, 0)
    page.locator(".card[data-filter='1']").focus()
    for key in "aruaraur" * 4:
        page.keyboard.press(key)
    page.locator(".card[data-filter='4']").focus()
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")  # to the next page at once
    page.locator("#layer-1").wait_for()
    decided = {("__proto__", 1): "keep", ("__proto__", 4): "remove"}
    for _ in range(50):
        if served.review_file.exists() and read_review(served.review_file, run).decisions == decided:
            break
        page.wait_for_timeout(100)
    assert read_review(served.review_file, run).decisions == decided
    page.locator("html.reviewing").wait_for()
    assert page.evaluate("pruneViz.decisions.file().decisions.length") == 2


def test_why_a_review_was_not_saved_is_shown(visitor: Watched, served: ReviewServer) -> None:
    page = visitor.page
    served.review_file.mkdir()
    follow(page, 0)
    page.locator(".card[data-filter='1']").focus()
    page.keyboard.press("a")
    page.get_by_role("status").filter(has_text="Not saved: ").filter(has_text="not a regular file").wait_for()
    served.review_file.rmdir()
    visitor.wrong[:] = [text for text in visitor.wrong if "409 (Conflict)" not in text]


@pytest.mark.parametrize("name", ["__proto__", "a\u2028b", "\u202egpj.exe", NAMES[3]])
def test_names_take_one_line_of_a_terminal(run: RunDirectory, tmp_path: Path, name: str) -> None:
    given = ["figure", str(run.path), "--layer", name, "--out", str(tmp_path / "figure.png")]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0
    (line,) = done.output.split("\n")[:-1]
    assert line.isprintable()
    assert line.startswith("8 stimuli of ")
    missing = CliRunner().invoke(app, [*given[:3], name + "?", *given[4:]])
    assert missing.exit_code == 2
    assert missing.output.removesuffix("\n").isprintable()

"""Reviewing in a real browser: clicks, keys, totals, and what is saved."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from browser import Watched
from marks import slow

from prune_viz.pruning.rankings import Saving, read_rankings
from prune_viz.pruning.review import identity, read_review
from prune_viz.pruning.reviewed_masks import reviewed_masks
from prune_viz.report.review_server import ReviewServer
from prune_viz.runs.run_directory import RunDirectory

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(analysed: Callable[[str], Path]) -> RunDirectory:
    return RunDirectory(analysed("residual with a copy"))


def page_of(run: RunDirectory, layer: str) -> Path:
    record = next(record for record in run.layers() if record.name == layer)
    return run.report_page.parent / "layers" / f"{record.slug}.html"


def totals(page: Any) -> dict[str, str]:
    return {
        name: page.locator(f"#review [data-total={name}]").inner_text().replace("\u202f", " ")
        for name in ("reviewed", "filters", "macs", "damage")
    }


def expected_totals(run: RunDirectory, review: Path) -> tuple[int, float]:
    """Filters that go and the share of MACs that saves, as Python counts them."""
    masks = reviewed_masks(run, read_review(review, run)).masks
    decisions = run.read_decisions()
    rankings = read_rankings(decisions)
    counts = {}
    for ranking in rankings:
        layer, placed = next(iter(ranking.filters.items()))
        gone = [channel for channel in range(ranking.channels) if not masks[layer][placed[channel]]]
        ranking.order[:] = [*gone, *(c for c in ranking.order if c not in gone)]
        counts[ranking.number] = len(gone)
    return masks.removed, Saving(rankings, decisions.macs).of(counts)


def saved(page: Any, path: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name="Save review").click()
    assert download.value.suggested_filename == "review.json"
    download.value.save_as(path)
    return path


def test_deciding_by_mouse_and_keys_gives_the_masks(
    run: RunDirectory, watched: Watched, tmp_path: Path
) -> None:
    flagged = [one.filter for one in run.read_decisions().verdicts if one.layer == "inner"]
    assert len(flagged) == 2
    page = watched.open(page_of(run, "inner"))
    assert totals(page)["reviewed"].startswith("0 of ")
    predicted = run.read_decisions().prediction
    assert predicted is not None
    assert totals(page)["damage"] == f"damage {predicted.text(' ')}"
    kept, gone = flagged
    case = page.locator(f".case[data-filter='{kept}']")
    case.get_by_role("button", name="Keep").click()
    assert case.get_by_role("button", name="Keep").get_attribute("aria-pressed") == "true"
    assert (
        page.locator(f".card[data-filter='{kept}']").get_attribute("data-decided") == "keep"
    )  # the gallery knows
    assert page.get_by_role("status").inner_text() == f"Filter {kept} stays"
    page.locator(f".card[data-filter='{gone}']").focus()
    page.keyboard.press("a")
    other = next(number for number in range(8) if number not in flagged)
    page.locator(f".card[data-filter='{other}'] .t").click()
    page.keyboard.press("a")
    assert totals(page)["reviewed"].startswith("2 of ")
    review = saved(page, tmp_path / "review.json")
    assert read_review(review, run).decisions == {
        ("inner", kept): "keep", ("inner", gone): "remove", ("inner", other): "remove",
    }  # fmt: skip
    filters, macs = expected_totals(run, review)
    shown = totals(page)
    assert shown["filters"].startswith(f"{filters} of ")
    assert "1 of them added" in shown["filters"]
    assert shown["macs"].startswith(f"{100 * macs:.1f} %")
    assert "of" in shown["damage"] or "nats" in shown["damage"]
    masks = reviewed_masks(run, read_review(review, run)).masks
    assert [number for number in range(8) if not masks["inner"][number]] == sorted((gone, other))


def test_what_goes_together_is_decided_together_and_undone(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(page_of(run, "outer"))
    before = totals(page)
    page.locator(".card[data-filter='3']").hover()
    page.locator(".card[data-filter='3']").get_by_role("button", name="Remove").click()
    assert totals(page) != before
    page.goto(page_of(run, "stem").as_uri())  # another page of the same review
    assert page.locator(".card[data-filter='3']").get_attribute("data-decided") == "remove"
    page.locator(".card[data-filter='3']").focus()
    page.keyboard.press("u")
    assert page.locator(".card[data-filter='3']").get_attribute("data-decided") == ""
    page.keyboard.press("z")
    assert page.locator(".card[data-filter='3']").get_attribute("data-decided") == "remove"
    page.keyboard.press("r")
    page.goto(page_of(run, "outer").as_uri())
    assert page.locator(".card[data-filter='3']").get_attribute("data-decided") == "keep"


@pytest.mark.slow
def test_many_are_decided_at_once(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(page_of(run, "inner"))
    cards = page.locator(".card .t")
    cards.nth(0).click()
    cards.nth(3).click(modifiers=["Shift"])
    assert page.locator("[data-total=chosen]").inner_text() == "4 selected"
    page.locator("#review .selection").get_by_role("button", name="Keep").click()
    assert page.locator(".card[data-decided=keep]").count() == 4
    assert page.locator(".card.chosen").count() == 0
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".card[data-decided=keep]").count() == 0
    assert page.get_by_role("button", name="Undo").is_disabled()
    page.locator(".evidence.redundant").get_by_role("button", name="Keep all").click()
    count = page.locator(".evidence.redundant .case").count()
    assert page.locator(".evidence.redundant .case[data-decided=keep]").count() == count >= 1
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.get_by_role("button", name="Close").click()
    assert page.get_by_role("dialog").is_hidden()


@pytest.mark.slow
def test_keys_act_on_focus_not_on_hidden(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(page_of(run, "inner"))
    page.locator(".card.keep .t").first.click()
    page.locator(".show label", has_text="redundant").click()
    page.keyboard.press("j")  # from the choice of verdicts, too
    number = page.evaluate("document.activeElement.dataset.filter")
    page.keyboard.press("a")
    decided = page.evaluate("pruneViz.decisions.file().decisions")
    assert [one["filter"] for one in decided] == [int(number)]
    page.keyboard.press("?")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("dialog").is_visible()
    assert page.url.startswith(page_of(run, "inner").as_uri())


@pytest.mark.slow
def test_double_click_opens_without_selecting(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(page_of(run, "inner"))
    panel = page.locator("#filter")
    page.locator(".card[data-filter='2'] .t").dblclick()
    panel.wait_for()
    box = panel.bounding_box()
    page.mouse.click(box["x"] + 8, box["y"] + 8)  # its padding
    assert panel.is_visible()
    page.keyboard.press("Alt+ArrowRight")
    assert panel.get_by_role("heading").first.inner_text() == "Filter 2"
    page.mouse.click(box["x"] - 20, box["y"] + 20)
    panel.wait_for(state="hidden")
    page.locator(".card[data-filter='3'] b").click()
    panel.wait_for()
    page.keyboard.press("Escape")
    assert page.locator(".card.chosen").count() == 0


@pytest.mark.slow
def test_j_and_k_go_from_filter_to_filter(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(page_of(run, "inner"))
    here = "document.activeElement.id"
    page.keyboard.press("j")
    first = page.evaluate(here)
    assert first.startswith("e")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.evaluate(here) == first
    page.keyboard.press("k")
    assert page.evaluate(here).startswith("f")  # the last of the gallery


def test_a_review_is_opened_again(run: RunDirectory, watched: Watched, tmp_path: Path) -> None:
    decisions = [{"layer": "inner", "filter": 2, "decision": "remove"}]
    mine, other = tmp_path / "mine.json", tmp_path / "other.json"
    mine.write_text(json.dumps({"format": 1, "run": identity(run), "decisions": decisions}))
    other.write_text(json.dumps({"format": 1, "run": "ab" * 32, "decisions": decisions}))
    page = watched.open(page_of(run, "inner"))
    for file, decided in ((other, ""), (mine, "remove")):
        page.locator("#review input[type=file]").set_input_files(file)
        page.wait_for_timeout(100)
        assert page.locator(".card[data-filter='2']").get_attribute("data-decided") == decided
    more = [
        *decisions,
        {"layer": "inner", "filter": 99, "decision": "keep"},
        {"layer": "x", "filter": 0, "decision": "keep"},
    ]
    mine.write_text(json.dumps({"format": 1, "run": identity(run), "decisions": more}))
    page.locator("#review input[type=file]").set_input_files(mine)
    page.get_by_role("status").filter(has_text="1 decision read").wait_for()
    page.reload()  # kept in the browser
    assert page.locator(".card[data-filter='2']").get_attribute("data-decided") == "remove"


def test_what_cannot_go_offers_no_decision(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    assert page.locator("#review").is_visible()
    assert page.locator(".decide").count() == 0


@pytest.mark.slow
def test_served_it_saves_into_the_run(run: RunDirectory, chromium: Any) -> None:
    with ReviewServer(run) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            one = Watched(chromium, home=server.url.rpartition("/")[0])
            one.page.goto(server.url)
            one.page.get_by_role("link", name="inner").last.click()
            one.page.locator("#review").wait_for()
            one.page.locator(".card[data-filter='2']").focus()
            with one.page.expect_response(lambda answer: answer.request.method == "PUT"):
                one.page.keyboard.press("a")
            assert read_review(server.review_file, run).decisions == {("inner", 2): "remove"}
            one.page.evaluate("localStorage.clear()")
            with one.page.expect_response("**/review.json"):
                one.page.reload()  # the run directory knows best
            one.page.wait_for_timeout(100)
            assert one.page.locator(".card[data-filter='2']").get_attribute("data-decided") == "remove"
            one.context.close()
            assert [text for text in one.wrong if "404" not in text] == []  # there was no review at first
        finally:
            server.shutdown()
            thread.join()
            server.review_file.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", slow("dark")])
def test_assistive_technology_stumbles_over_nothing(run: RunDirectory, chromium: Any, scheme: str) -> None:
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    one = Watched(chromium, color_scheme=scheme, bypass_csp=True)
    for path in (run.report_page, page_of(run, "inner")):
        page = one.open(path)
        page.locator("#review").wait_for()
        if path != run.report_page:
            page.locator(".card .t").first.click()
            page.keyboard.press("a")
        page.evaluate(axe)
        for shown in ("page", "keys", "filter") if path != run.report_page else ("page", "keys"):
            if shown == "keys":
                page.keyboard.press("?")
            if shown == "filter":
                page.keyboard.press("Escape")
                page.locator(".card[data-filter='3']").focus()
                page.keyboard.press("o")
                page.locator("#filter").wait_for()
            found = page.evaluate("axe.run()")["violations"]
            assert [(one["id"], one["nodes"][0]["html"]) for one in found] == [], (path.name, shown)
    one.context.close()


@pytest.mark.slow
def test_a_filter_is_opened_large_by_link_key_and_click(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page, "#inner/3")  # leads to the layer's page
    panel = page.locator("#filter")
    panel.wait_for()
    assert page.url.startswith(page_of(run, "inner").as_uri())
    assert panel.get_by_role("heading").first.inner_text() == "Filter 3"
    picture = panel.get_by_role("img", name="Stimulus of filter 3")
    assert picture.bounding_box()["width"] > 200
    row = run.read_filters().set_index(["layer", "filter"]).loc[("inner", 3)]
    assert panel.locator("[data-part=reason]").inner_text() == row["reason"]
    responses = run.read_layer(next(r.file for r in run.layers() if r.name == "inner")).responses
    shares = responses[3] / responses.max(axis=0).clip(1e-9)
    shares[3] = -1
    first = panel.locator("[data-part=fires] button").first
    assert first.locator("b").inner_text() == str(shares.argmax())
    first.click()
    assert page.url.endswith(f"#inner/{shares.argmax()}")
    page.keyboard.press("ArrowRight")
    following = (int(shares.argmax()) + 1) % 8
    assert panel.get_by_role("heading").first.inner_text() == f"Filter {following}"
    page.keyboard.press("Escape")
    assert panel.is_hidden()
    page.wait_for_url(f"**#f1-{following}")
    page.locator(".card[data-filter='5']").focus()
    page.keyboard.press("o")
    assert panel.get_by_role("heading").first.inner_text() == "Filter 5"
    panel.get_by_role("button", name="Close").click()
    page.locator(".card[data-filter='6'] b").click()
    assert page.url.endswith("#inner/6")

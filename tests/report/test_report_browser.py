"""The report in a real browser, from disk, as a person opens it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import VEILED, Watched
from marks import slow
from report_fixture import HOSTILE, write_run

from prune_viz.report import write_report
from prune_viz.report.wording import printable
from prune_viz.runs.run_directory import RunDirectory
from prune_viz.runs.verdicts import Verdict

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    made = write_run(tmp_path_factory.mktemp("run"))
    write_report(made)
    return made


def layer_pages(run: RunDirectory) -> list[Path]:
    return [run.report_page.parent / "layers" / f"{record.slug}.html" for record in run.layers()]


def test_every_page_opens_without_the_network_or_complaints(run: RunDirectory, watched: Watched) -> None:
    for path in [run.report_page, *layer_pages(run)]:
        page = watched.open(path)
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(100)
        assert page.evaluate("getComputedStyle(document.body).marginTop") == "0px"  # the style sheet came
        assert page.evaluate("document.documentElement.className") == "js reviewing"  # and the scripts ran
    assert all(url.startswith("file://") for url in watched.requests)
    assert any(url.endswith("-map.jpg") for url in watched.requests)
    assert any(url.endswith("depth.jpg") for url in watched.requests)


@pytest.mark.slow
def test_the_policy_stops_what_it_should(run: RunDirectory, chromium: Any) -> None:
    """The other tests would pass with no policy at all; this one would not."""
    one = Watched(chromium)
    page = one.open(run.report_page)
    page.evaluate("fetch('http://example.invalid/').catch(() => null)")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.bad = 1\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.bad") is None
    assert not [url for url in one.requests if url.startswith("http")]
    assert any("Content Security Policy" in text for text in one.wrong)
    one.context.close()


def test_a_hostile_name_is_only_text(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_pages(run)[1])
    assert page.locator("h1").inner_text() == printable(HOSTILE)
    assert page.locator("h1 *").count() == 0
    assert page.locator("img[src='x']").count() == 0


@pytest.mark.slow
def test_pointing_at_a_thumbnail_shows_its_filter(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_pages(run)[2])
    assert page.locator("#preview").is_hidden()
    page.locator("#m2-7").hover()
    preview = page.locator("#preview")
    assert preview.is_visible()
    assert preview.locator("p").inner_text().split()[:2] == ["Filter", "7"]
    same = "n => getComputedStyle(document.querySelector(n)).background"
    assert page.evaluate(same, "#preview .t").split("/")[0] == page.evaluate(same, "#f2-7 .t").split("/")[0]
    box = preview.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    page.mouse.move(2, 2)
    assert preview.is_hidden()


@pytest.mark.slow
def test_the_keyboard_reaches_the_map(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_pages(run)[2])
    page.locator(".show input").first.focus()
    stops = []
    for _ in range(4):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id"))
    assert sum(stop.startswith("m") for stop in stops) == 1  # the map is one stop, not forty
    page.locator("[data-map] a[tabindex='0']").focus()
    first = page.evaluate("document.activeElement.id")
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.id")
    assert second.startswith("m")
    assert page.url.split("#")[0] == layer_pages(run)[2].as_uri()  # arrows on the map do not turn the page
    assert page.locator("#preview").is_visible()
    page.keyboard.press("Enter")
    assert page.url.endswith("#f" + second[1:])
    assert first


def test_choosing_a_thumbnail_goes_to_its_card(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_pages(run)[2])
    page.locator("#m2-11").click()
    assert page.url.endswith("#f2-11")
    page.wait_for_timeout(100)
    box = page.locator("#f2-11").bounding_box()
    assert 0 <= box["y"] < 900 - box["height"]


def test_showing_one_verdict_hides_the_others(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(layer_pages(run)[2])
    shown = "() => Array.from(document.querySelectorAll('.card')).filter(n => n.getClientRects().length)"
    assert page.locator(".show label", has_text="unjudged").count() == 0  # as all were judged
    for verdict in (Verdict.KEEP, Verdict.REDUNDANT, Verdict.DEAD):
        page.locator(".show label", has_text=verdict).click()
        total = page.locator(f".card.{verdict}").count()
        assert total > 0
        assert page.evaluate(f"({shown})().map(n => n.className)") == [f"card {verdict.classes}"] * total
    assert page.locator("#redundant-2").is_hidden()
    assert page.locator("#dead-2").is_visible()
    # A link out of the evidence to a hidden card shows all again.
    page.locator(".show label", has_text="redundant").click()
    page.locator(".case.redundant .kin a").first.click()
    assert page.locator(".card.keep").first.is_visible()
    assert page.locator(".show input[value=all]").is_checked()


# Share of the map that what is drawn above it covers.


@pytest.mark.parametrize("script", [slow(True), False])
def test_the_map_of_the_network_leads_to_layers(run: RunDirectory, chromium: Any, script: bool) -> None:
    one = Watched(chromium, java_script_enabled=script)
    page = one.open(run.report_page)
    layers = page.locator(".network svg a")
    assert layers.count() == 3
    assert page.locator(".network .t").first.is_visible()
    layers.first.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    page.wait_for_timeout(300)
    if script:
        assert page.evaluate(VEILED) > 0.9  # the others fade, to show where the layer's filters lie
    assert layers.first.locator("text").is_visible()
    page.keyboard.press("Enter")
    page.wait_for_url(layer_pages(run)[0].as_uri())
    page = one.open(run.report_page)
    page.locator(".network .t").first.click()
    assert "/layers/" in page.url
    assert "#f" in page.url
    one.context.close()
    assert one.wrong == []


@pytest.mark.slow
def test_columns_of_the_table_sort(run: RunDirectory, watched: Watched) -> None:
    page = watched.open(run.report_page)
    page.get_by_role("button", name="Filters").click()
    column = page.locator(".layers tbody tr td:nth-child(4)")
    assert column.all_inner_texts() == ["40", "24", "16"]
    page.get_by_role("button", name="Filters").click()
    assert column.all_inner_texts() == ["16", "24", "40"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"


@pytest.mark.slow
def test_arrow_keys_turn_from_layer_to_layer(run: RunDirectory, watched: Watched) -> None:
    first, second, third = (path.as_uri() for path in layer_pages(run))
    page = watched.open(layer_pages(run)[0])
    page.keyboard.press("ArrowLeft")
    assert page.url == first
    for key, url in (("ArrowRight", second), ("ArrowRight", third), ("ArrowLeft", second)):
        page.keyboard.press(key)
        page.wait_for_url(url)


@pytest.mark.slow
def test_everything_reads_without_javascript(run: RunDirectory, chromium: Any) -> None:
    one = Watched(chromium, java_script_enabled=False)
    page = one.open(run.report_page)
    assert page.locator(".layers tbody tr").count() == 3
    assert page.locator(".tiles a").first.is_visible()
    page.locator(".layers tbody a").nth(2).click()
    assert page.locator(".map a").count() == 40
    assert page.locator(".card").count() == 40
    assert page.locator(".case .profile").first.is_visible()
    assert page.locator(".show").is_hidden()  # what needs the script is not offered
    page.locator("#m2-5").click()
    assert page.url.endswith("#f2-5")
    one.context.close()
    assert one.wrong == []


@pytest.mark.parametrize("width", [360, slow(420), slow(1280)])
def test_no_page_scrolls_sideways(run: RunDirectory, watched: Watched, width: int) -> None:
    watched.page.set_viewport_size({"width": width, "height": 900})
    for path in [run.report_page, *layer_pages(run)]:
        page = watched.open(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


_CONTRAST = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = css => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = css;
    paint.fillRect(0, 0, 1, 1);
    return Array.from(paint.getImageData(0, 0, 1, 1).data);
  };
  const linear = v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgb("white");
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = Array.from(node.childNodes).some(n => n.nodeType === 3 && n.data.trim());
    if (!own || node.closest("svg") || !node.getClientRects().length) continue;
    const a = light(rgb(getComputedStyle(node).color)), b = light(ground(node));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(node.tagName + "." + node.className + " " + ratio.toFixed(2));
  }
  return low;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", slow("dark")])
def test_text_stands_out_from_its_ground(run: RunDirectory, chromium: Any, scheme: str) -> None:
    one = Watched(chromium, color_scheme=scheme)
    for path in [run.report_page, layer_pages(run)[2]]:
        page = one.open(path)
        assert page.evaluate(_CONTRAST) == []
    one.context.close()

"""The report in one file, and real images in the panel, in a real browser."""

from __future__ import annotations

import io
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Watched
from networks import Plain, randomise_norms
from PIL import Image
from report_fixture import HOSTILE, SMALL, write_run
from typer.testing import CliRunner

import prune_viz as pv
from prune_viz.cli.commands import app
from prune_viz.feature_visualization.top_patches import read_top_patches
from prune_viz.report import single_file, write_report
from prune_viz.report.single_file import write_single_file
from prune_viz.report.wording import printable
from prune_viz.runs.run_directory import RunDirectory

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run = write_run(folder / "run")
    write_report(run)
    write_single_file(run, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A network that was analysed with example images: red across, green down, of a blue of their own."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    (folder / "data").mkdir()
    for number in range(12):
        along = np.linspace(20, 235, 64)
        ramps = np.stack([*np.meshgrid(along, along), np.full((64, 64), 20.0 * number)], axis=2)
        picture = np.clip(ramps + random.integers(-15, 16, size=ramps.shape), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / "data" / f"{number}.png")
    pv.analyze(
        randomise_norms(Plain()), input_shape=(3, 64, 64), steps=4, data=folder / "data", out=folder / "run"
    )
    return RunDirectory(folder / "run")


def shown(page: Any) -> list[str]:
    return page.locator("main").evaluate_all(
        "all => all.filter(m => m.getClientRects().length).map(m => m.id)"
    )


def test_one_file_holds_every_page_and_asks_for_nothing(whole: Path, watched: Watched) -> None:
    page = watched.open(whole)
    assert shown(page) == ["main"]
    assert page.locator(".layers tbody tr").count() == len(SMALL)
    page.locator(".layers tbody a").nth(2).click()
    page.locator("#layer-2").wait_for()
    assert shown(page) == ["layer-2"]
    assert page.title().startswith("features.7.conv")
    background = "getComputedStyle(document.querySelector('#layer-2 .card .t')).backgroundImage"
    assert page.evaluate(background).startswith('url("data:image/jpeg;base64,')
    assert page.locator(".matrix:visible").evaluate("node => node.complete && node.naturalWidth") == 40
    page.locator("#m2-11").click()
    assert page.url.endswith("#f2-11")
    page.keyboard.press("ArrowLeft")
    page.locator("#layer-1").wait_for()
    assert page.locator("h1:visible").inner_text() == printable(HOSTILE)
    page.go_back()
    page.locator("#layer-2").wait_for()
    page.goto(whole.as_uri() + "#layer-0")
    page.locator("#layer-0").wait_for()
    page.goto(whole.as_uri())
    page.locator("#main").wait_for()
    page.locator(".layers tbody a").nth(1).click()
    page.locator("#layer-1").wait_for()
    page.go_back()
    page.locator("#main").wait_for()
    assert shown(page) == ["main"]
    assert {url.partition("#")[0] for url in watched.requests if not url.startswith("data:")} == {
        whole.as_uri()
    }


def test_the_sample_report_opens(watched: Watched) -> None:
    sample = Path(__file__).parents[2] / "reports" / "demo.html"
    assert sample.stat().st_size < 3_000_000
    page = watched.open(sample, "#layer-1")
    assert shown(page) == ["layer-1"]
    assert page.locator("#review").is_visible()


def test_reviewing_and_links_to_filters_work_in_one_file(whole: Path, watched: Watched) -> None:
    page = watched.open(whole, "#features.0/3")
    page.locator("#filter").wait_for()
    assert page.locator("#filter h2").inner_text() == "Filter 3"
    assert shown(page) == ["layer-0"]
    page.keyboard.press("Escape")
    page.locator("#f0-3").focus()
    page.keyboard.press("x")
    assert page.locator("[data-total=chosen]").inner_text() == "1 selected"
    case = page.locator("#layer-0 .case").first
    case.get_by_role("button", name="Keep").click()
    assert page.locator("[data-total=reviewed]").inner_text().startswith("1 of ")
    page.locator(".brand a:visible").click()
    page.locator("#main").wait_for()
    page.locator("[data-total=reviewed]", has_text="1 of ").wait_for()  # kept in the browser
    assert page.locator(".selected li").count() == 1
    page.locator(".selected li a").click()
    page.locator("#filter").wait_for()
    assert shown(page) == ["layer-0"]


@pytest.mark.slow
def test_going_back_closes_the_panel(whole: Path, watched: Watched) -> None:
    page = watched.open(whole, "#layer-0")
    panel = page.locator("#filter")
    page.evaluate("location.hash = 'features.0/3'")
    panel.wait_for()
    page.go_back()
    panel.wait_for(state="hidden")
    assert page.url.endswith("#layer-0")
    for wrong in ("features.0/", "features.0/0x2", "features.0/99", "nowhere/1", "%/1"):
        page.evaluate("hash => { location.hash = hash; }", wrong)
        page.wait_for_timeout(50)
        assert panel.is_hidden()


@pytest.mark.slow
def test_single_file_works_without_javascript_unique_ids(whole: Path, chromium: Any) -> None:
    one = Watched(chromium, java_script_enabled=False)
    page = one.open(whole)
    assert page.locator("main").count() == 1 + len(SMALL)
    assert all(main.is_visible() for main in page.locator("main").all())
    page.locator(".layers tbody a").nth(1).click()
    assert page.url.endswith("#layer-1")
    page.locator("#m1-5").click()
    assert page.url.endswith("#f1-5")
    one.context.close()
    assert one.wrong == []
    ids = [part.partition('"')[0] for part in whole.read_text(encoding="utf-8").split(' id="')[1:]]
    assert len(ids) == len(set(ids)) > 100


@pytest.mark.slow
def test_assistive_technology_finds_nothing_in_one_file(whole: Path, chromium: Any) -> None:
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    one = Watched(chromium, bypass_csp=True)
    page = one.open(whole, "#layer-2")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
    one.context.close()


@pytest.mark.slow
def test_a_report_too_large_for_a_mail_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = whole.with_name("run"), whole.with_name("large.html")
    monkeypatch.setattr(single_file, "LIMIT", 100_000)
    result = CliRunner().invoke(app, ["report", str(run), "--single-file", str(out)])
    assert result.exit_code == 2
    assert "more than the 0 MB" in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    before = (run / "filters.csv").read_bytes()
    for inside in ("filters.csv", "report/index.html", "new.html"):
        result = CliRunner().invoke(app, ["report", str(run), "--single-file", str(run / inside)])
        assert result.exit_code == 2
        assert "lies in the run directory" in result.stderr
    assert (run / "filters.csv").read_bytes() == before
    result = CliRunner().invoke(app, ["report", str(run), "--single-file", str(out)])
    assert result.exit_code == 0
    assert "in one file:" in result.stdout
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_panel_shows_weights_consumers_and_top_patches(
    with_images: RunDirectory, watched: Watched, together: bool
) -> None:
    page_file = with_images.report_page
    if together:
        page_file = with_images.path.with_name("one.html")
        write_single_file(with_images, page_file)
    page = watched.open(page_file, "#conv1/2")
    panel = page.locator("#filter")
    panel.wait_for()
    files = {record.name: record.slug for record in with_images.layers()}
    counts = {record.name: record.filters for record in with_images.layers()}
    parts = read_top_patches(with_images.examples_file, files, counts)
    assert parts is not None
    windows = [window for window in parts.windows["conv1"][2] if window[0] >= 0]
    crops = panel.locator("[data-part=crops] .t")
    assert crops.count() == len(windows) > 0
    for crop, (number, left, top, side) in zip(crops.all(), windows, strict=True):
        picture = Image.open(io.BytesIO(crop.screenshot())).convert("RGB")
        kept = parts.pictures[int(number)]
        a, b, size = (round(64 * float(value)) for value in (left, top, side))
        wanted = kept[b : b + size, a : a + size].mean(axis=(0, 1))
        assert np.asarray(picture).mean(axis=(0, 1)) == pytest.approx(wanted, abs=6)
    weights = panel.locator("[data-part=weights] .t")
    assert weights.is_visible()
    drawn = weights.evaluate("node => getComputedStyle(node).backgroundImage")
    assert ("data:image/png" if together else "weights.png") in drawn
    consumers = panel.locator("[data-part=consumers] a")
    assert consumers.all_inner_texts() == ["conv2"]
    consumers.first.click()
    page.locator("h1:visible", has_text="conv2").wait_for()
    page.goto(page_file.as_uri() + "#conv2/1")
    panel.wait_for()
    assert panel.locator("[data-part=weights]").is_hidden()
